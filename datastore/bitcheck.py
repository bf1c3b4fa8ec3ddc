"""The checks of a capture's rows: every chunk decodes, and norms and statistics are those of the bits."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datastore import layout, storage
from datastore.codec import ChunkDecoder
from datastore.dtype import numpy_dtype
from datastore.errors import CorruptError
from datastore.findings import DAMAGE, Subject, some
from datastore.plainfile import read_plain
from datastore.schema import SEGMENTS, STATISTICS
from datastore.stats import Key, Moments, MomentsTable

__all__ = ["ComponentCheck", "chunk_tokens"]

MOST_CHUNK_BYTES = 1 << 30
"""A chunk that claims to be larger than this is refused unread; chunks are written with 8 MiB or one token."""
RELATIVE = 1e-9
"""How far kept sums may be from sums over the bits: both are float64 sums of the same numbers."""


def chunk_tokens(subject: Subject, component: str) -> int:
    """Return the tokens of a chunk of a component.

    Raises
    ------
    CorruptError
        The array is not one that a capture of this table and these layers has.
    """
    spec, capture = subject.capture.components[component], subject.capture
    meta = storage.array_metadata(capture.path / component)
    shape = [capture.ragged.n_tokens, len(capture.layers), spec.width]
    if meta["shape"] != shape or meta["data_type"] != spec.dtype:
        raise CorruptError(f"{component} is {meta['data_type']} {meta['shape']}, and should be {spec.dtype} {shape}")
    size, *rest = meta["chunk_grid"]["configuration"]["chunk_shape"]
    if rest != [1, spec.width] or not 0 < size * spec.width * spec.itemsize <= MOST_CHUNK_BYTES:
        raise CorruptError(f"{component} has chunks of {[size, *rest]}, which no capture has")
    return int(size)


@dataclass(frozen=True, slots=True, eq=False)
class _Read:
    """What a chunk gave: nothing where no row of it counts, else its statistics if asked for, or what is wrong."""

    chunk: int
    read: bool = False
    table: MomentsTable | None = None
    wrong: str = ""


class ComponentCheck:
    """The check of one component of a capture.

    Parameters
    ----------
    subject : Subject
    component : str
    full : bool
        Compute norms and statistics from the bits and compare; else only decode.
    pool : ThreadPoolExecutor
    ahead : int
        Chunks read ahead of the one that is compared.
    tick : callable
        Told for each chunk the bytes that were decoded, 0 where none of its rows counts.
    """

    def __init__(
        self,
        subject: Subject,
        component: str,
        *,
        full: bool,
        pool: ThreadPoolExecutor,
        ahead: int,
        tick: Callable[[int], object],
    ) -> None:
        self.subject, self.component, self.full = subject, component, full
        self._pool, self._ahead, self._tick = pool, ahead, tick
        self._capture = subject.capture
        self._spec = subject.capture.components[component]
        self._array = subject.capture.path / component

    def run(self) -> None:
        """Check every layer; one that is damaged does not hide the others."""
        with self.subject.guard(component=self.component):
            self._size = chunk_tokens(self.subject, self.component)
            self._decoder = ChunkDecoder.of(storage.array_metadata(self._array))
            if self._decoder is None:
                storage.zarr_array(self._array)  # codecs of which Zarr knows nothing are an error here
            self._pieces = _Pieces(self.subject) if self.full else None
            totals = [self._layer(index, layer) for index, layer in enumerate(self._capture.layers)]
            self._compare_nonfinite([n for n in totals if n is not None])

    def _compare_nonfinite(self, totals: list[int]) -> None:
        said = (self._capture.attrs.get("nonfinite") or {}).get(self.component)
        if len(totals) == len(self._capture.layers) and said != sum(totals):
            what = f"{self.component} has {sum(totals)} values that are not finite, its metadata says {said}"
            self.subject.problem(what, component=self.component)

    def _layer(self, index: int, layer: int) -> int | None:
        """Check one layer; return how many values are not finite, where all of it was counted."""
        counts = self.subject.counted(self.component, layer)
        kept = _Kept.of(self.subject, self.component, layer, counts=counts) if counts.any() else None
        for one in self._in_order(index, counts):
            start, stop = self._range(one.chunk)
            self._tick((stop - start) * self._spec.width * self._spec.itemsize if one.read else 0)
            wrong = one.wrong
            if kept is not None and one.table is not None:
                wrong = wrong or kept.compare_norms(start, stop, one.table)
            if wrong:
                self._problem(layer, start, stop, what=wrong)
            if kept is not None and one.table is not None and not wrong:
                kept.add(one.table)
            elif kept is not None:
                kept.miss(start, stop)
        return kept.finish() if kept is not None else None

    def _in_order(self, index: int, counts: NDArray[np.bool_]) -> Iterator[_Read]:
        """Yield chunks in order with few of them waiting, so that memory does not grow with the store."""
        waiting = deque[Future[_Read]]()
        for chunk in range(layout.n_chunks(self._capture.ragged.n_tokens, self._size)):
            waiting.append(self._pool.submit(self._read, chunk, index, counts))
            if len(waiting) > self._ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _range(self, chunk: int) -> tuple[int, int]:
        return layout.chunk_range(chunk, self._size, self._capture.ragged.n_tokens)

    def _read(self, chunk: int, index: int, counts: NDArray[np.bool_]) -> _Read:
        start, stop = self._range(chunk)
        ragged = self._capture.ragged
        if not counts[ragged.row_at(start) : ragged.row_at(stop - 1) + 1].any():
            return _Read(chunk)
        try:
            values = self._values(chunk, index)
            table = None if self._pieces is None else MomentsTable.of_pieces(values, self._pieces.of(start, stop))
            return _Read(chunk, True, table)
        except DAMAGE as error:
            return _Read(chunk, True, wrong=f"is broken: {error}")

    def _values(self, chunk: int, index: int) -> NDArray[Any]:
        start, stop = self._range(chunk)
        if self._decoder is None:
            region = (slice(start, stop), slice(index, index + 1), slice(0, self._spec.width))
            return storage.read_region(self._array, region)[:, 0]
        file = storage.chunk_file(self._array, (chunk, index, 0))
        try:
            encoded = read_plain(file, self._decoder.most_bytes)
        except OSError as error:
            raise CorruptError(f"{file} can't be read ({error.strerror})") from error
        values = np.empty((self._size, self._spec.width), dtype=numpy_dtype(self._spec.dtype))
        self._decoder.decode_into(encoded, values)
        return values[: stop - start]

    def _problem(self, layer: int, start: int, stop: int, *, what: str) -> None:
        names = self.subject.names(start, stop)
        place = f"{self.component} at layer {layer}, tokens {start}-{stop} (rollouts {some(names)})"
        self.subject.problem(
            f"{place}: {what}", component=self.component, layer=layer, rollouts=names, tokens=(start, stop)
        )


class _Pieces:
    """The runs of one statistics key in a range of tokens of a capture."""

    def __init__(self, subject: Subject) -> None:
        self._ragged = subject.capture.ragged
        self._segment = storage.read_array(subject.capture.path / "segment")
        self._per_rollout = subject.capture.attrs.get("statistics") == "rollout"

    def of(self, start: int, stop: int) -> list[tuple[Key, int, int]]:
        """Return (key, start, stop), counted from `start`."""
        runs: list[tuple[Key, int, int]] = []
        for piece in self._ragged.pieces(start, stop):
            codes = self._segment[piece.start : piece.stop]
            cuts = [0, *(np.flatnonzero(np.diff(codes)) + 1).tolist(), len(codes)]
            for a, b in pairwise(cuts):
                segment = int(codes[a])
                key: Key = (piece.row, segment) if self._per_rollout else (segment,)
                runs.append((key, piece.start - start + a, piece.start - start + b))
        return runs


class _Kept:
    """The norms and statistics kept of one component and layer: they decode, and are those of the bits.

    Statistics are read a block of rows of the table at a time, once the chunks of these rows were added: memory does
    not grow with the number of rollouts.
    """

    @classmethod
    def of(cls, subject: Subject, component: str, layer: int, *, counts: NDArray[np.bool_]) -> "_Kept | None":
        """Return what is kept; None where the capture keeps nothing, or what it keeps is lost, which is a problem."""
        if subject.capture.attrs.get("statistics") == "none":
            return None
        found: _Kept | None = None
        what = f"the statistics of {component} at layer {layer} are lost: "
        with subject.guard(what, component=component, layer=layer):
            found = cls(subject, component, layer, counts=counts)
        return found

    def __init__(self, subject: Subject, component: str, layer: int, *, counts: NDArray[np.bool_]) -> None:
        self._subject, self._component, self._layer, self._counts = subject, component, layer, counts
        self._index = subject.capture.layers.index(layer)
        self._width = subject.capture.components[component].width
        self._path = subject.capture.path / "stats" / component
        tokens, here = slice(0, subject.capture.ragged.n_tokens), slice(self._index, self._index + 1)
        self._norms = storage.read_region(self._path / "norm", (tokens, here))[:, 0]
        self._per_rollout = subject.capture.attrs["statistics"] == "rollout"
        self._rows = int(storage.zarr_array(self._path / "sum").chunks[0]) if self._per_rollout else 1
        self._missed: set[int] = set()
        self._sums: dict[Key, Moments] = {}
        self._next, self._nonfinite, self._lost = 0, 0, False

    def compare_norms(self, start: int, stop: int, table: MomentsTable) -> str:
        """Return what is wrong with the norms of these tokens, or nothing."""
        bad = ~np.isclose(table.norms, self._norms[start:stop], rtol=1e-6, atol=0.0, equal_nan=True)
        return f"the norms of {int(bad.sum())} tokens are not those written at capture" if bad.any() else ""

    def miss(self, start: int, stop: int) -> None:
        """Leave out the rollouts of a chunk whose statistics are not known."""
        self._missed.update(piece.row for piece in self._subject.capture.ragged.pieces(start, stop))

    def add(self, table: MomentsTable) -> None:
        """Add the statistics of the next chunk, and compare those of all blocks before it."""
        for key, moments in table.moments.items():
            while self._next < (key[0] // self._rows if self._per_rollout else 0):
                self._close()
            self._sums[key] = self._sums[key] + moments if key in self._sums else moments

    def finish(self) -> int | None:
        """Compare what is left; return the number of values that are not finite where everything was counted."""
        blocks = layout.n_chunks(len(self._counts), self._rows) if self._per_rollout else 1
        while self._next < blocks:
            self._close()
        return None if self._missed or self._lost else self._nonfinite

    def _close(self) -> None:
        """Compare one block of rows, all of whose chunks were added or missed."""
        if not self._lost:
            self._lost = True
            what = f"the statistics of {self._component} at layer {self._layer} are lost: "
            with self._subject.guard(what, component=self._component, layer=self._layer):
                kept = {name: self._read(name) for name in STATISTICS}
                if self._per_rollout:
                    self._compare_rollouts(kept)
                elif not self._missed:
                    self._compare_sums(kept, (), rollouts=())
                self._lost = False
        self._sums, self._next = {}, self._next + 1

    def _read(self, name: str) -> NDArray[Any]:
        """Read a statistic of the block: (rows, segment, hidden), or (segment, hidden) where it is per capture."""
        here, widths = slice(self._index, self._index + 1), slice(0, self._width)
        region: tuple[slice, ...] = (slice(0, len(SEGMENTS)), here, widths)
        if self._per_rollout:
            first = self._next * self._rows
            region = (slice(first, min(first + self._rows, len(self._counts))), *region)
        return storage.read_region(self._path / name, region)[..., 0, :]

    def _compare_rollouts(self, kept: Mapping[str, NDArray[Any]]) -> None:
        first = self._next * self._rows
        for place in range(len(kept["sum"])):
            row = first + place
            if row not in self._missed and self._counts[row]:
                one = {name: values[place] for name, values in kept.items()}
                self._compare_sums(one, (row,), rollouts=(self._subject.capture.rollout_ids[row],))

    def _compare_sums(self, kept: Mapping[str, NDArray[Any]], key: Key, *, rollouts: tuple[str, ...]) -> None:
        for code, segment in enumerate(SEGMENTS):
            found = self._sums.get((*key, code)) or Moments.zero(self._width)
            self._nonfinite += int(found.nonfinite.sum())
            wrong = [name for name in STATISTICS if not _close_to(kept[name][code], getattr(found, name))]
            if wrong:
                of = f"rollout {rollouts[0]!r}" if rollouts else "all its rollouts"
                what = f"statistics of {self._component} at layer {self._layer} of {of}, {segment}, are not those of "
                self._subject.problem(
                    f"{what}the bits: {', '.join(wrong)}",
                    component=self._component,
                    layer=self._layer,
                    rollouts=rollouts,
                )


def _close_to(kept: NDArray[Any], found: NDArray[Any]) -> bool:
    scale = float(np.abs(found.astype(np.float64)).max(initial=0.0))
    return bool(np.allclose(kept, found, rtol=RELATIVE, atol=RELATIVE * scale))
