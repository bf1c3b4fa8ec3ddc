"""The exceptions of capture, grouped by what a caller would do about them.

CaptureError              exit code 1, a DatastoreError
├── RequestError          exit code 2: layers, components or options that this model can't give
├── ModelError            exit code 1: the model's files are missing, incomplete or of an unknown kind
│   └── CacheError        exit code 1: a fast-load cache is not usable; loading goes on without it
└── NoMemoryError         exit code 1: one rollout does not fit, however it is split
"""

from datastore.errors import DatastoreError


class CaptureError(DatastoreError):
    """Base of every error of capture; its text is one sentence for a person."""


class RequestError(CaptureError):
    """What was asked for is not something this model can give; nothing was computed."""

    exit_code = 2


class ModelError(CaptureError):
    """The model can't be described or loaded as it should be."""


class CacheError(ModelError):
    """A fast-load cache is partial, damaged, stale, or of another model."""


class NoMemoryError(CaptureError):
    """Even the smallest piece of one rollout ran out of memory."""
