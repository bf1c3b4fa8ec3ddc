"""The one exception of the files around a store."""

import errno
import os
from collections.abc import Sequence


class ExperimentError(Exception):
    """A file or a tree of the user's can't be read as asked; its text is one sentence naming file and line.

    Attributes
    ----------
    exit_code : int
        What a command that ends with this error returns to the shell: 2, or 1 where the disk could not read the file.
    """

    @property
    def exit_code(self) -> int:
        cause = self.__cause__
        while cause is not None:
            if getattr(cause, "errno", None) == errno.EIO or os.strerror(errno.EIO) in str(cause):
                return 1  # some libraries keep of it the words only
            cause = cause.__cause__
        return 2


def step_by_step(loc: Sequence[object]) -> str:
    """Name the way to a value in a JSON document, on one line whatever its keys hold."""
    return " ".join(".".join(str(part) for part in loc).split())
