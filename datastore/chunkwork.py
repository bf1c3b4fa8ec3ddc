"""What becomes of a whole chunk, compressed, written and counted: here, in whichever thread asks."""

from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from datastore import storage
from datastore.codec import encode_pieces
from datastore.combine import Combiner, Counted, StatsPiece
from datastore.partials import ChunkId, Partials, grid_index
from datastore.schema import Plan
from datastore.stats import compile_sums
from datastore.writebehind import WriteBehind

__all__ = ["ChunkWork", "Work"]


class Work(Protocol):
    """Who does it: this process, or others. Asked by several threads at once."""

    def write(self, chunk: ChunkId, values: NDArray[Any], rows: int) -> int:
        """Write a chunk, of whose values so many rows count, and its statistics; return its bytes on disk."""

    def combine(self, piece: StatsPiece) -> Counted:
        """Write a piece of the statistics, as `Combiner.combine`."""

    def drain(self) -> None:
        """Wait until the disk has what was written, or raise that it could not take it; nobody writes meanwhile."""

    def close(self) -> None:
        """Let go of files and processes."""


class ChunkWork:
    """Does it in the thread that asks.

    Parameters
    ----------
    group : Path
        The capture's group, before it is published.
    plan : Plan
    partials : Partials
    compiled : bool
        Count by the compiled loop, where there is one.
    """

    def __init__(self, group: Path, plan: Plan, partials: Partials, *, compiled: bool) -> None:
        self._group, self._plan, self._partials = group, plan, partials
        self._combiner = Combiner(plan, group, partials)
        self._behind = WriteBehind()
        if compiled:
            compile_sums()

    def write(self, chunk: ChunkId, values: NDArray[Any], rows: int) -> int:
        """As `Work.write`."""
        pieces = encode_pieces(values, self._plan.codec)
        stored = storage.write_chunk(self._group / chunk.component, grid_index(chunk), pieces, behind=self._behind)
        if self._plan.statistics:
            self._partials.write(chunk, values[:rows], seal=bytes(pieces[-1]))
        return stored

    def combine(self, piece: StatsPiece) -> Counted:
        """As `Work.combine`."""
        return self._combiner.combine(piece)

    def drain(self) -> None:
        """As `Work.drain`."""
        self._behind.drain()

    def close(self) -> None:
        """As `Work.close`."""
        self._behind.close()
