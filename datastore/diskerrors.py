"""Errors of the disk in words: which file, what follows, and how much room is needed and there."""

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from datastore.errors import DatastoreError, ReadOnlyError

__all__ = ["disk_error", "enough_room", "free_bytes", "named", "naming", "writable"]

P = ParamSpec("P")
T = TypeVar("T")

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def writable(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write below `path` into a `ReadOnlyError`."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise ReadOnlyError(
            f"{path} can't be written ({error.strerror}: {error.filename}), so nothing was captured; choose a place "
            "that you may write to, or change its permissions"
        ) from error


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an error of the system name the file, or what holds it, also where the failing call knew only a number."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def named(function: Callable[Concatenate[Path, P], T]) -> Callable[Concatenate[Path, P], T]:
    """Wrap a function of a path so that an error of the system in it names that path."""

    @wraps(function)
    def named(path: Path, /, *arguments: P.args, **options: P.kwargs) -> T:
        with naming(path):
            return function(path, *arguments, **options)

    return named


@contextmanager
def enough_room(path: Path, n_bytes: int) -> Iterator[None]:
    """Turn an error of the disk into one sentence that says how much room `path` needs."""
    try:
        yield
    except OSError as error:
        if error.errno not in (*_NO_ROOM, errno.EIO):
            raise
        raise disk_error(error, path, n_bytes) from error


def disk_error(error: OSError, path: Path, n_bytes: int) -> DatastoreError:
    """Return what is to be said when `n_bytes` are still to write and the system failed a call on a file of `path`."""
    full = error.errno in _NO_ROOM
    done, cure = ("written", "make room and") if full else ("read or written", "once the disk is well")
    named = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    return DatastoreError(
        f"{named or path} could not be {done} ({error.strerror or error}): {n_bytes:,} bytes before "
        f"compression are still to write and {free_bytes(path):,} are free; what is finished is kept, {cure} run the "
        "same command again to go on"
    )


def free_bytes(path: Path) -> int:
    """Return the bytes free on the file system that holds `path` or its nearest existing parent."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free
