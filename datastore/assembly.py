"""Chunks in memory whose rows are not all there yet: bounded, their buffers used again, the oldest put aside on disk.

One thread opens chunks and fills them; the threads that write complete ones hand the buffers back.
"""

from collections.abc import Callable
from pathlib import Path
from threading import Condition
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datastore import storage
from datastore.arena import Arena
from datastore.dtype import numpy_dtype
from datastore.partials import ChunkId
from datastore.schema import Plan

__all__ = ["Assembly", "OpenChunk", "bits"]

_BITS = {2: np.uint16, 4: np.uint32, 8: np.uint64}


def bits(values: NDArray[Any]) -> NDArray[Any]:
    """Return the same memory as unsigned integers: NumPy copies those far faster than ml_dtypes' bfloat16."""
    return values.view(_BITS[values.itemsize])


class OpenChunk:
    """One chunk's buffer (chunk tokens, width), and which of its rows are filled.

    Zarr stores a last chunk whole; its tail holds the fill value, NaN. A `lent` chunk is the caller's own memory,
    whole from the start, and never used again.
    """

    __slots__ = ("filled", "lent", "rows", "values")

    def __init__(self, values: NDArray[Any], rows: int, *, lent: bool = False) -> None:
        self.values, self.rows, self.lent = values, rows, lent
        self.filled = np.full(rows, lent)
        if rows < len(values):
            values[rows:] = np.nan

    @property
    def complete(self) -> bool:
        """Whether all rows are there."""
        return bool(self.filled.all())


class Assembly:
    """The open chunks of a writer.

    Parameters
    ----------
    plan : Plan
    directory : Path
        Where chunks are put aside; made when needed.
    allowance : int
        Bytes of buffers, open, being written and free, at most; one buffer is always allowed.
    waiting : int
        Bytes of complete chunks at which no new buffer is made: a few that are used again and again are faster than
        many that are each touched once. One is always allowed to wait.
    check : callable
        Raises when writing failed, so that nobody waits for a buffer that does not come back.
    arena : Arena, optional
        Where buffers lie that other processes see; it has a slot for each that the allowance allows.
    """

    def __init__(
        self,
        plan: Plan,
        directory: Path,
        *,
        allowance: int,
        waiting: int,
        check: Callable[[], None],
        arena: Arena | None = None,
    ) -> None:
        self._shapes = {c.name: (plan.chunk_tokens[c.name], c.width) for c in plan.components}
        self._dtypes = {c.name: numpy_dtype(c.dtype) for c in plan.components}
        self._directory, self._allowance, self._waiting, self._check = directory, allowance, waiting, check
        self._arena = arena
        self._open: dict[ChunkId, OpenChunk] = {}
        self._aside: dict[ChunkId, NDArray[np.bool_]] = {}
        self._free: dict[str, list[NDArray[Any]]] = {c.name: [] for c in plan.components}
        self._allocated = 0
        self._busy = 0
        self._room = Condition()

    def open(self, chunk: ChunkId, rows: int) -> OpenChunk:
        """Return an open chunk; a new one, or one read back from disk, once there is room for it."""
        if chunk not in self._open:
            one = OpenChunk(self._buffer(chunk.component), rows)
            if chunk in self._aside:
                self._bring_back(chunk, one)
            self._open[chunk] = one
        return self._open[chunk]

    def take(self, chunk: ChunkId) -> OpenChunk:
        """Hand a complete chunk over to be written; its buffer must come back through `give_back`."""
        with self._room:
            self._busy += 1
        return self._open.pop(chunk)

    def lend(self, chunk: ChunkId, values: NDArray[Any]) -> OpenChunk | None:
        """Take a whole chunk in the caller's own memory, once there is room among those that wait to be written.

        None where rows of the chunk are here already, so that it must be put together, and where others must see it.
        """
        if self._arena or chunk in self._open or chunk in self._aside:
            return None
        with self._room:
            while self._busy and (self._busy + 1) * values.nbytes > self._waiting:
                self._check()
                self._room.wait()
            self._check()
            self._busy += 1
        return OpenChunk(values, len(values), lent=True)

    def give_back(self, chunk: ChunkId, one: OpenChunk) -> None:
        """Take the buffer of a chunk that is written, or that could not be; called by any thread."""
        with self._room:
            if not one.lent:
                self._free[chunk.component].append(one.values)
            self._busy -= 1
            self._room.notify_all()

    def wait(self) -> None:
        """Wait until nothing is being written."""
        with self._room:
            while self._busy:
                self._check()
                self._room.wait()
            self._check()

    def _buffer(self, component: str) -> NDArray[Any]:
        while True:
            with self._room:
                self._check()
                found = self._free_or_new(component)
                if found is not None:
                    return found
                if self._busy:
                    self._room.wait()
                    continue
            self._put_aside(next(iter(self._open)))

    def _free_or_new(self, component: str) -> NDArray[Any] | None:
        if self._free[component]:
            return self._free[component].pop()
        shape, dtype = self._shapes[component], self._dtypes[component]
        need = self._arena.slot if self._arena else shape[0] * shape[1] * dtype.itemsize
        for others in self._free.values():
            while others and self._allocated + need > self._allowance:
                self._forget(others.pop())
        if self._busy and (self._busy + 1) * need > self._waiting:
            return None
        if self._allocated + need > self._allowance and (self._busy or self._open):
            return None
        self._allocated += need
        return self._arena.take(shape, dtype) if self._arena else np.empty(shape, dtype)

    def _forget(self, buffer: NDArray[Any]) -> None:
        self._allocated -= self._arena.slot if self._arena else buffer.nbytes
        if self._arena:
            self._arena.give_back(buffer)

    def _put_aside(self, chunk: ChunkId) -> None:
        one = self._open[chunk]
        self._directory.mkdir(exist_ok=True)
        with storage.naming(self._file(chunk)):
            self._file(chunk).write_bytes(bits(one.values[: one.rows]).data)
        del self._open[chunk]
        self._aside[chunk] = one.filled
        with self._room:
            self._free[chunk.component].append(one.values)

    def _bring_back(self, chunk: ChunkId, one: OpenChunk) -> None:
        with storage.naming(self._file(chunk)), self._file(chunk).open("rb") as file:
            file.readinto(bits(one.values[: one.rows]).data)
        one.filled = self._aside.pop(chunk)
        self._file(chunk).unlink()

    def _file(self, chunk: ChunkId) -> Path:
        return self._directory / f"{chunk.component}-{chunk.layer_index}-{chunk.chunk}"
