"""Memory that processes share, in slots of one size: an array in it is compressed by another process where it lies."""

import mmap
import os
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datastore.errors import PlanError

__all__ = ["Arena", "mapped", "memory_file"]


class Arena:
    """Slots of shared memory. A page takes room once it is used.

    Parameters
    ----------
    slot : int
        Bytes of a slot at least.
    slots : int

    Raises
    ------
    PlanError
        The system has no such memory: it is Linux that has it.
    """

    def __init__(self, slot: int, slots: int) -> None:
        self.slot = -(-slot // mmap.PAGESIZE) * mmap.PAGESIZE
        self.descriptor = memory_file("datastore-chunks")
        os.ftruncate(self.descriptor, self.slot * slots)
        self._memory = mapped(self.descriptor)
        self._free = list(reversed(range(slots)))

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return a free slot as an array."""
        start, n_bytes = self._free.pop() * self.slot, int(np.prod(shape)) * dtype.itemsize
        return self._memory[start : start + n_bytes].view(dtype).reshape(shape)

    def give_back(self, values: NDArray[Any]) -> None:
        """Take back an array that `take` gave."""
        self._free.append(self.offset(values) // self.slot)

    def offset(self, values: NDArray[Any]) -> int:
        """Return where an array that `take` gave begins."""
        return int(values.ctypes.data - self._memory.ctypes.data)

    def close(self) -> None:
        """Let go of the memory; it goes once no array of it is left, here or in another process."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def memory_file(name: str, content: bytes = b"") -> int:
    """Return the descriptor of a file in memory, at its beginning.

    Raises
    ------
    PlanError
        The system has no such files: it is Linux that has them.
    """
    if not hasattr(os, "memfd_create"):
        raise PlanError(f"{sys.platform} has no memory files, so processes can't share chunks; write in threads")
    descriptor = os.memfd_create(name)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def mapped(descriptor: int) -> NDArray[np.uint8]:
    """Return all of a memory file."""
    return np.frombuffer(mmap.mmap(descriptor, os.fstat(descriptor).st_size), np.uint8)
