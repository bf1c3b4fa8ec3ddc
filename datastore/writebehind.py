"""Files on their way to disk: written back at once, waited for a few files later, and then out of the page cache."""

import ctypes
import errno
import os
import threading
from collections import deque
from contextlib import suppress
from functools import lru_cache
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
    """

    def __init__(self, depth: int = 8) -> None:
        self._depth, self._lock = depth, threading.Lock()
        self._files: deque[int] = deque()

    def push(self, descriptor: int) -> None:
        """Take over an open file that is written.

        Raises
        ------
        OSError
            The disk could not take an earlier file.
        """
        with self._lock:
            self._files.append(descriptor)
            old = self._files.popleft() if len(self._files) > self._depth else None
        _sync_range(descriptor, _SYNC_WRITE)
        if old is not None:
            self._finish(old)

    def close(self) -> None:
        """Close what is left; the sync that follows waits for it."""
        while self._files:
            os.close(self._files.popleft())

    def _finish(self, descriptor: int) -> None:
        try:
            _sync_range(descriptor, _SYNC_WAIT)
            with suppress(AttributeError, OSError):  # it is advice, and not every system or file takes it
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


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
