"""The one exception of the files around a store."""

import errno


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
        while isinstance(cause, ExperimentError):
            cause = cause.__cause__
        return 1 if isinstance(cause, OSError) and cause.errno == errno.EIO else 2
