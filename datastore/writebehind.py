"""Files on their way to disk: written back at once, waited for a few files later, and then out of the page cache."""

import ctypes
import errno
import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

__all__ = ["WriteBehind", "libc_function"]

_SYNC_WRITE, _SYNC_WAIT = 2, 1 | 2 | 4
"""Flags of sync_file_range: start writing back; wait for what is under way, start the rest, wait for that."""


class WriteBehind:
    """The files written last, of which the disk is still taking the bytes; each then leaves the page cache.

    Writing starts at once and is waited for a few files later, so that the one sync at the end finds little to do, and
    the cache keeps what is read again, the model's weights, instead of a store's bytes that are written once. Memory
    that is used again is also much faster than memory that is touched once (docs/design/0001-store.md has the numbers).
    Where the system can't do this, the files are simply closed. Used by any thread.

    A file that the disk did not take is deleted: the cache may go on showing what is nowhere else, and whoever looks
    later would take it for finished.
    """

    def __init__(self, depth: int = 8) -> None:
        self._depth, self._lock = depth, threading.Lock()
        self._files: deque[tuple[int, Path]] = deque()

    def push(self, descriptor: int, file: Path) -> None:
        """Take over an open file that is written, under the name that it has.

        Raises
        ------
        OSError
            The disk could not take this file or an earlier one, which is gone then.
        """
        with self._lock:
            self._files.append((descriptor, file))
            old = self._files.popleft() if len(self._files) > self._depth else None
        with _deleted_unless_taken(file):
            _sync_range(descriptor, _SYNC_WRITE)
        if old is not None:
            self._finish(*old)

    def drain(self) -> None:
        """Wait for what is left, and let it leave the cache too.

        Raises
        ------
        OSError
            As `push`.
        """
        while self._files:
            self._finish(*self._files.popleft())

    def close(self) -> None:
        """Close what is left without waiting for it."""
        while self._files:
            os.close(self._files.popleft()[0])

    def _finish(self, descriptor: int, file: Path) -> None:
        try:
            with _deleted_unless_taken(file):
                _sync_range(descriptor, _SYNC_WAIT)
            with suppress(AttributeError, OSError):  # it is advice, and not every system or file takes it
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


@contextmanager
def _deleted_unless_taken(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        file.unlink(missing_ok=True)
        error.filename = str(file)
        raise


def _sync_range(descriptor: int, how: int) -> None:
    """Start writing a file to disk or wait for it, where the system knows how; no promise of durability."""
    call = libc_function("sync_file_range")
    if call is not None and call(descriptor, ctypes.c_int64(0), ctypes.c_int64(0), ctypes.c_uint(how)) != 0:
        error = ctypes.get_errno()
        if error in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            raise OSError(error, os.strerror(error))


@lru_cache
def libc_function(name: str) -> Any:
    """Return a function of the C library, None where it has none of that name."""
    return getattr(ctypes.CDLL(None, use_errno=True), name, None)
