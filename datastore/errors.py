"""The exceptions of the store, grouped by what a caller would do about them.

DatastoreError                exit code 1
├── MisuseError               exit code 2: the call or the command is wrong
│   ├── NotAStoreError        the path exists and is not a store, or does not exist
│   ├── NewerFormatError      the store was written by a newer release
│   ├── PlanError             a plan or the rows put into it contradict themselves
│   └── AbsentError           asked for what is not captured; the message lists what is
├── ConflictError             the same rollout id with other tokens or another model
├── CorruptError              a chunk or a file is missing, truncated or does not decode
├── BusyError                 a living process holds this part of this plan
└── ReadOnlyError             the place can't be written
"""


class DatastoreError(Exception):
    """Base of every error of this package; its text is one sentence for a person.

    Attributes
    ----------
    exit_code : int
        What a command that ends with this error returns to the shell.
    """

    exit_code: int = 1


class MisuseError(DatastoreError):
    """The call or the command is wrong; nothing was done."""

    exit_code = 2


class NotAStoreError(MisuseError):
    """The path is not an activation store."""


class NewerFormatError(MisuseError):
    """The store's format version is newer than this release reads."""


class PlanError(MisuseError):
    """A plan, or the rows put into it, contradict themselves."""


class AbsentError(MisuseError):
    """What was asked for is not captured."""


class ConflictError(DatastoreError):
    """A rollout id is already there with other tokens or another model."""


class CorruptError(DatastoreError):
    """A chunk or file is missing, truncated, or does not decode."""


class BusyError(DatastoreError):
    """A living process holds this part of this plan."""


class ReadOnlyError(DatastoreError):
    """The place can't be written."""
