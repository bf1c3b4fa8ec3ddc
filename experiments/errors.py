"""The one exception of the files around a store."""


class ExperimentError(Exception):
    """A file or a tree of the user's can't be read as asked; its text is one sentence naming file and line.

    Attributes
    ----------
    exit_code : int
        What a command that ends with this error returns to the shell.
    """

    exit_code: int = 2
