"""The directory that weights kept on disk may be copied to: gone with the process that made it, however that ends."""

import atexit
import fcntl
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

__all__ = ["offload_folder"]

_PREFIX = "capture-on-disk-"
_YOUNG = 60.0
"""Seconds for which a directory is left alone, locked or not: its maker may be about to lock it."""


def offload_folder() -> Path:
    """Make a directory that is deleted when this process ends, and delete those of processes that were killed.

    A process holds a lock on its directory. The system lets it go when the process ends, so that a directory without a
    lock is nobody's.
    """
    for left in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        if _nobodys(left):
            shutil.rmtree(left, ignore_errors=True)
    made = Path(tempfile.mkdtemp(prefix=_PREFIX))
    with suppress(OSError):  # where nothing can be locked, nothing is deleted for others
        fcntl.flock(os.open(made, os.O_RDONLY), fcntl.LOCK_EX)  # open until the process ends
    atexit.register(_delete, made, os.getpid())
    return made


def _delete(directory: Path, maker: int) -> None:
    if os.getpid() == maker:  # a fork that ends is not the one that uses it
        shutil.rmtree(directory, ignore_errors=True)


def _nobodys(directory: Path) -> bool:
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        found = os.fstat(descriptor)
        if found.st_uid != os.getuid() or time.time() - found.st_mtime < _YOUNG:
            return False
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True
