"""A directory as a user finds it who may not write it, also where the tests run as one who may write everything."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["read_only"]


@contextmanager
def read_only(directory: Path) -> Iterator[None]:
    """Forbid to write into a directory; an administrator, who may write everywhere, becomes nobody for that time."""
    directory.chmod(0o555)
    mine = os.geteuid()
    if mine == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(mine)
        directory.chmod(0o755)
