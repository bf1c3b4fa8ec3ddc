"""The statistics of a capture from the partials of its chunks, piece by piece: each is a few files of `stats/`.

A piece needs the chunks of some rollouts or tokens only, so that the pieces of a long capture are combined while its
later rows are computed, and side by side in threads or processes.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from datastore import layout, storage
from datastore.capture_group import STATS_ROW_BYTES
from datastore.codec import encode_pieces
from datastore.partials import ChunkId, Partials
from datastore.plainfile import shape_of
from datastore.schema import SEGMENTS, STATISTICS, Codec, Plan
from datastore.stats import SUMS, Key, Moments

__all__ = ["PIECE_BYTES", "Combiner", "Counted", "Pending", "StatsPiece"]

NAMED_NONFINITE = 20
PIECE_BYTES = 8 * STATS_ROW_BYTES
"""What combining a piece holds: its sums of seven kinds, and one of them as it is compressed."""


class StatsPiece(NamedTuple):
    """Some rows of the sums of one layer of a component, or some of its tokens' norms: one chunk of each array."""

    component: str
    layer_index: int
    norms: bool
    block: int


Counted = tuple[int, list[dict[str, Any]]]
"""Of a piece of sums, the elements that are not finite; of norms, the first tokens whose norm is not."""


class Combiner:
    """Adds the partials of all chunks up, in token order, and writes the statistics of a capture.

    Parameters
    ----------
    plan : Plan
    group : Path
        The capture's group, before it is published.
    partials : Partials
    """

    def __init__(self, plan: Plan, group: Path, partials: Partials) -> None:
        self.plan, self.group, self.partials = plan, group, partials
        self._chunk_rows: dict[tuple[str, str], int] = {}

    def pieces(self) -> list[StatsPiece]:
        """Return all pieces, by component and layer."""
        found = []
        for one in self.plan.components:
            rows = len(self.plan.rollouts) if self.plan.stats_level == "rollout" else 1
            sums, norms = layout.n_chunks(rows, self._rows(one.name, "sum")), self.plan.n_tokens
            norms = layout.n_chunks(norms, self._rows(one.name, "norm"))
            for i in range(len(self.plan.layers)):
                found += [StatsPiece(one.name, i, False, block) for block in range(sums)]
                found += [StatsPiece(one.name, i, True, block) for block in range(norms)]
        return found

    def chunks(self, piece: StatsPiece) -> range:
        """Return the indices of the chunks that a piece needs."""
        return layout.chunks_of(*self._tokens(piece), self.plan.chunk_tokens[piece.component])

    def combine(self, piece: StatsPiece) -> Counted:
        """Write one piece."""
        return self._norms(piece) if piece.norms else self._sums(piece)

    def _tokens(self, piece: StatsPiece) -> tuple[int, int]:
        if piece.norms:
            return layout.chunk_range(piece.block, self._rows(piece.component, "norm"), self.plan.n_tokens)
        if self.plan.stats_level == "capture":
            return 0, self.plan.n_tokens
        first, last = self._block_rows(piece)
        return self.plan.ragged.range(first)[0], self.plan.ragged.range(last - 1)[1]

    def _block_rows(self, piece: StatsPiece) -> tuple[int, int]:
        return layout.chunk_range(piece.block, self._rows(piece.component, "sum"), len(self.plan.rollouts))

    def _rows(self, component: str, name: str) -> int:
        """Rows of a chunk of one of the arrays."""
        if name == "sum" and self.plan.stats_level == "capture":
            return 1
        if (component, name) not in self._chunk_rows:
            _, chunk = shape_of(storage.array_metadata(self.group / "stats" / component / name))
            self._chunk_rows[component, name] = chunk[0]
        return self._chunk_rows[component, name]

    def _sums(self, piece: StatsPiece) -> Counted:
        per_row = self.plan.stats_level == "rollout"
        mine = range(*self._block_rows(piece)) if per_row else range(0)
        sums: dict[Key, Moments] = {}
        for index in self.chunks(piece):
            table = self.partials.read(self.group, ChunkId(piece.component, piece.layer_index, index))
            for key, moments in table.moments.items():
                if not per_row or key[0] in mine:
                    sums[key] = sums[key] + moments if key in sums else moments
        self._write_sums(piece, mine, sums)
        return sum(int(m.nonfinite.sum()) for m in sums.values()), []

    def _write_sums(self, piece: StatsPiece, rows: range, sums: Mapping[Key, Moments]) -> None:
        width = self.plan.component(piece.component).width
        index: tuple[int, ...] = (0, piece.layer_index, 0)
        keys: list[Key] = [(segment,) for segment in range(len(SEGMENTS))]
        shape: tuple[int, ...] = (len(SEGMENTS), 1, width)
        if self.plan.stats_level == "rollout":
            keys = [(row, segment) for row in rows for segment in range(len(SEGMENTS))]
            index, shape = (piece.block, *index), (len(rows), *shape)
        zero = Moments.zero(width)
        for name in STATISTICS:
            values = np.stack([getattr(sums.get(key, zero), name) for key in keys]).reshape(shape)
            values = values.astype(np.int64 if name in ("count", "nonfinite") else np.float64, copy=False)
            self._write(piece.component, name, index=index, values=values)

    def _norms(self, piece: StatsPiece) -> Counted:
        first, stop = self._tokens(piece)
        norms, size = np.empty(stop - first, dtype=np.float32), self.plan.chunk_tokens[piece.component]
        for index in self.chunks(piece):
            start, end = layout.chunk_range(index, size, self.plan.n_tokens)
            table = self.partials.read(self.group, ChunkId(piece.component, piece.layer_index, index))
            low, high = max(start, first), min(end, stop)
            norms[low - first : high - first] = table.norms[low - start : high - start]
        self._write(piece.component, "norm", index=(piece.block, piece.layer_index), values=norms[:, None])
        return 0, self._name_nonfinite(piece, norms, first)

    def _write(self, component: str, name: str, *, index: tuple[int, ...], values: NDArray[Any]) -> None:
        """Write one chunk, a last one padded with the fill value; there are thousands, and zarr-python takes long."""
        array = self.group / "stats" / component / name
        short = 0 if len(index) == 3 else self._rows(component, name) - len(values)  # sums per capture are whole
        if short:
            fill = np.nan if values.dtype.kind == "f" else 0
            values = np.concatenate([values, np.full((short, *values.shape[1:]), fill, values.dtype)])
        with storage.naming(array):
            storage.write_chunk(array, index, encode_pieces(values, Codec(), sums=name in SUMS))

    def _name_nonfinite(self, piece: StatsPiece, norms: NDArray[np.float32], first: int) -> list[dict[str, Any]]:
        named = []
        for token in np.flatnonzero(~np.isfinite(norms))[:NAMED_NONFINITE] + first:
            row = self.plan.ragged.row_at(int(token))
            named.append(
                {
                    "component": piece.component,
                    "layer": self.plan.layers[piece.layer_index],
                    "rollout_id": self.plan.rollouts[row].rollout_id,
                    "position": int(token) - self.plan.ragged.range(row)[0],
                }
            )
        return named


class Pending:
    """The pieces of a capture: each combined as soon as this process has seen all its chunks written, or at the end.

    Parameters
    ----------
    combiner : Combiner
    combine : callable
        What does `Combiner.combine`, perhaps elsewhere.
    threads, memory : int
        At the end, pieces are combined in so many threads and bytes at most.
    """

    def __init__(
        self, combiner: Combiner, combine: Callable[[StatsPiece], Counted], *, threads: int, memory: int
    ) -> None:
        self.combiner, self._combine = combiner, combine
        self._threads = max(1, min(threads, memory // PIECE_BYTES))
        self._begun: dict[StatsPiece, Future[Counted]] = {}
        self._left: dict[StatsPiece, int] = {}
        self._users: dict[str, dict[int, list[tuple[bool, int]]]] = {}
        self._count = Lock()

    def expect(self, chunks: Iterable[ChunkId]) -> None:
        """Begin pieces early, all of whose chunks are among these, which are still to be written."""
        pieces = self.combiner.pieces()
        for piece in pieces:
            if piece.layer_index == 0:  # the same for every layer
                users = self._users.setdefault(piece.component, {})
                for index in self.combiner.chunks(piece):
                    users.setdefault(index, []).append((piece.norms, piece.block))
        seen = Counter(piece for chunk in chunks for piece in self._pieces_of(chunk))
        self._left = {piece: seen[piece] for piece in pieces if seen[piece] == len(self.combiner.chunks(piece)) > 0}

    def _pieces_of(self, chunk: ChunkId) -> Iterator[StatsPiece]:
        for norms, block in self._users.get(chunk.component, {}).get(chunk.chunk, ()):
            yield StatsPiece(chunk.component, chunk.layer_index, norms, block)

    def written(self, chunk: ChunkId, pool: ThreadPoolExecutor) -> None:
        """A chunk and its partial are there; pieces that waited for it alone are combined in the pool."""
        with self._count:
            for piece in self._pieces_of(chunk):
                if piece in self._left:
                    self._left[piece] -= 1
                    if not self._left[piece]:
                        with suppress(RuntimeError):  # the pool ends: this capture is given up
                            self._begun[piece] = pool.submit(self._combine, piece)

    def finish(self) -> dict[str, Any]:
        """Write what is left of `stats/` and return what the capture's metadata says of it."""
        total = {one.name: 0 for one in self.combiner.plan.components}
        named: list[dict[str, Any]] = []
        with ThreadPoolExecutor(self._threads) as pool:
            doing = [(p, self._begun.get(p) or pool.submit(self._combine, p)) for p in self.combiner.pieces()]
            for (component, _), cell in groupby(doing, key=lambda one: one[0][:2]):
                counted = [future.result() for _, future in cell]
                count = sum(n for n, _ in counted)
                total[component] += count
                if count:
                    named += [token for _, tokens in counted for token in tokens][:NAMED_NONFINITE]
        return {"nonfinite": total, "nonfinite_tokens": named[:NAMED_NONFINITE]}
