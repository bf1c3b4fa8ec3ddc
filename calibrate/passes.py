"""What does not follow from the statistics kept at capture: passes over the data, chunk by chunk, within an allowance.

`sums` makes the moments that were not kept; `details` finds what no moments tell: the spread of cosines with a mean,
the median magnitude of all elements, percentiles of single dimensions. Both give the same for any cut of the data into
blocks, to float64 rounding.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from calibrate.formulas import Spread
from calibrate.magnitudes import ALL, Magnitudes, Window
from calibrate.rows import Piece, Rows
from calibrate.scratch import scratch
from calibrate.selected import Flags
from datastore.dtype import upcast
from datastore.errors import MisuseError
from datastore.stats import Moments, MomentsTable

__all__ = ["PERCENTILES", "Columns", "Details", "Found", "Tick", "details", "sums"]

Key = tuple[int, int]
"""Row and segment."""
Tick = Callable[[int], None]
Floats = NDArray[np.float64]
PERCENTILES = (1.0, 5.0, 25.0, 50.0, 75.0, 95.0, 99.0)
ABOVE = 10.0
"""Times the median dimension's mean magnitude that a token must exceed to be counted in the share above it."""
_FOLD, _TABLE_BYTES = 1 << 20, 8 << 15
"""Values are counted when they take more memory than that, or than the counts do."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Found:
    """The moments of one segment of a row, its tokens' norms, and whether it lay in several blocks."""

    row: int
    segment: int
    moments: Moments
    norms: NDArray[np.float32]
    crossing: bool


def sums(
    source: Rows, layer: int, rows: Sequence[int], *, counts: NDArray[np.int64], memory: int, tick: Tick
) -> Iterator[Found]:
    """Yield the moments and norms of both segments of some rows, read from their data.

    Parameters
    ----------
    source : Rows
    layer : int
    rows : sequence of int
    counts : int64 array (row, segment)
        Tokens of the source's rows: a segment is yielded when all its tokens have come.
    memory : int
        Bytes of chunks held at most.
    tick : callable
        Told the number of tokens of each block that is done.
    """

    def work(values: NDArray[Any], pieces: list[Piece]) -> tuple[list[Piece], MomentsTable]:
        keyed = [((p.row, p.segment), p.rows.start, p.rows.stop) for p in pieces]
        return pieces, MomentsTable.of_pieces(values, keyed)

    held: dict[Key, Moments] = {}
    norms: dict[Key, list[NDArray[np.float32]]] = {}
    for tokens, (pieces, table) in source.map(work, layer, rows, memory=memory):
        tick(tokens)
        for key in dict.fromkeys((p.row, p.segment) for p in pieces):
            held[key] = held[key] + table.moments[key] if key in held else table.moments[key]
            found = norms.setdefault(key, [])
            crossing = bool(found)
            found += [table.norms[p.rows] for p in pieces if (p.row, p.segment) == key]
            if sum(map(len, found)) == counts[key]:
                lengths = np.concatenate(norms.pop(key))
                yield Found(row=key[0], segment=key[1], moments=held.pop(key), norms=lengths, crossing=crossing)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Details:
    """What a pass over one layer finds.

    Attributes
    ----------
    spreads : mapping of (row, segment) to Spread
        Of the cosines of the segment's tokens with its mean, tokens that are not finite left out.
    magnitudes : Magnitudes
        Of the elements that are pooled.
    columns : Columns
        Of the dimensions that are tracked, over the tokens that are pooled.
    """

    spreads: dict[Key, Spread]
    magnitudes: Magnitudes
    columns: "Columns"

    @classmethod
    def empty(cls, columns: "Columns", *, window: Window = ALL) -> Self:
        """What is found in no token; magnitudes are to be counted in a window."""
        return cls(spreads={}, magnitudes=Magnitudes.none(window), columns=columns)

    def merge(self, other: "Details", *, first: int) -> None:
        """Add what was found in other rows, which count from `first` here."""
        self.spreads.update({(first + row, segment): spread for (row, segment), spread in other.spreads.items()})
        self.magnitudes.merge(other.magnitudes)
        self.columns.merge(other.columns)


def details(
    source: Rows,
    layer: int,
    rows: Sequence[int],
    *,
    wanted: Flags,
    pooled: Flags,
    means: Mapping[Key, Floats],
    into: Details,
    memory: int,
    tick: Tick,
) -> None:
    """Add what a pass over some rows of one layer finds.

    Parameters
    ----------
    source, layer, rows, memory, tick
        As for `sums`.
    wanted, pooled : bool array (row, segment)
        What cosines are found of, and what counts in the rest.
    means : mapping of (row, segment) to float64 array (hidden,)
        Needed for every segment that lies in several blocks.
    into : Details
    """
    dims = into.columns.dims

    def work(
        values: NDArray[Any], pieces: list[Piece]
    ) -> tuple[list[tuple[Key, Spread]], Magnitudes, list[NDArray[Any]]]:
        spreads, counts, columns = [], Magnitudes.none(into.magnitudes.window), []
        for piece in pieces:
            key, part = (piece.row, piece.segment), values[piece.rows]
            if wanted[key]:
                mean = means[key] if key in means else _mean(part, whole=piece.whole)
                spreads.append((key, Spread.of(_cosines(part, mean))))
            if pooled[key]:
                counts.add(part)
                columns.append(_columns(part, dims))
        return spreads, counts, columns

    with threadpool_limits(1, user_api="blas"):  # blocks are worked on in several threads already
        for tokens, (spreads, counts, columns) in source.map(work, layer, rows, memory=memory):
            tick(tokens)
            for key, spread in spreads:
                into.spreads[key] = into.spreads.get(key, Spread()) + spread
            into.magnitudes.merge(counts)
            for part in columns:
                into.columns.add(part)


def _mean(values: NDArray[Any], *, whole: bool) -> Floats:
    assert whole, "a mean was made for every segment that lies in several blocks"
    return Moments.of(values)[0].finalise()["mean"]


def _cosines(values: NDArray[Any], mean: Floats) -> Floats:
    """Cosines of tokens with a mean, 0 for a token of zeros; a few rows at a time, so that they stay in the cache."""
    unit = mean / (np.linalg.norm(mean) or 1.0)
    along, squares = np.empty(len(values)), np.empty(len(values))
    wide = scratch("wide", values.shape[1], np.float64)
    with np.errstate(all="ignore"):
        for start in range(0, len(values), len(wide)):
            tile = values[start : start + len(wide)]
            rows, part = wide[: len(tile)], slice(start, start + len(tile))
            np.copyto(rows, tile)  # exact from every stored dtype
            np.matmul(rows, unit, out=along[part])
            np.vecdot(rows, rows, out=squares[part])
        cosines: Floats = along / np.sqrt(squares)
    unknown = np.flatnonzero(np.isnan(cosines))
    cosines[unknown[~values[unknown].any(axis=1)]] = 0.0
    return cosines[np.isfinite(cosines)]


def _columns(values: NDArray[Any], dims: NDArray[np.int64]) -> NDArray[Any]:
    # NumPy takes columns of plain integers faster than of bfloat16
    plain = values.view(np.uint16) if values.dtype.itemsize == 2 else values
    taken: NDArray[Any] = np.take(plain, dims, axis=1).view(values.dtype)
    return taken


class Columns:
    """The magnitudes of a few dimensions over all tokens, from which percentiles follow exactly.

    Numbers of two bytes have 32,768 magnitudes, which are counted; others are kept.

    Parameters
    ----------
    dims : int64 array
    memory : int
        Bytes that may be kept.
    """

    def __init__(self, dims: NDArray[np.int64], *, memory: int) -> None:
        self.dims, self._memory = dims, memory
        self._parts: dict[np.dtype[Any], list[NDArray[Any]]] = {}
        self._counts: dict[np.dtype[Any], NDArray[np.int64]] = {}
        self._held = 0

    def add(self, part: NDArray[Any]) -> None:
        """Add the dimensions' values of some tokens, (tokens, dims).

        Raises
        ------
        MisuseError
            Values that have to be kept do not fit the allowance.
        """
        self._parts.setdefault(part.dtype, []).append(part)
        self._held += part.nbytes
        if self._held > min(max(_FOLD, len(self.dims) * _TABLE_BYTES), self._memory):
            self._fold()
        if self._held > self._memory:
            raise MisuseError(
                f"the values of {len(self.dims)} dimensions take more than {self._memory} bytes, so their percentiles "
                "can't be found; allow more --memory, or select fewer rollouts"
            )

    def merge(self, other: "Columns") -> None:
        """Add what another counted and kept."""
        for dtype, table in other._counts.items():
            self._counts[dtype] = self._counts[dtype] + table if dtype in self._counts else table
        for parts in other._parts.values():
            for part in parts:
                self.add(part)

    def finish(self, base: float) -> tuple[Floats, Floats]:
        """Return percentiles of |h_d|, (PERCENTILES, dims), and the per cent of tokens above 10 × base, (dims,)."""
        self._fold()
        quantiles = np.full((len(PERCENTILES), len(self.dims)), np.nan)
        shares = np.full(len(self.dims), np.nan)
        for i in range(len(self.dims)):
            values, counts = self._column(i)
            if len(values):
                quantiles[:, i] = _percentiles(values, counts)
                shares[i] = 100.0 * counts[values > ABOVE * base].sum() / counts.sum()
        return quantiles, shares

    def _column(self, i: int) -> tuple[Floats, NDArray[np.int64]]:
        """Return a dimension's finite magnitudes, ascending, and how often each comes."""
        values, counts = [np.empty(0)], [np.empty(0, np.int64)]
        for dtype, table in self._counts.items():
            codes = np.flatnonzero(table[i])
            values.append(upcast(codes.astype(np.uint16).view(dtype)).astype(np.float64))
            counts.append(table[i][codes])
        for parts in self._parts.values():
            values += [np.abs(part[:, i]).astype(np.float64) for part in parts]
            counts += [np.ones(len(part), np.int64) for part in parts]
        every, often = np.concatenate(values), np.concatenate(counts)
        order = np.argsort(every, kind="stable")
        order = order[np.isfinite(every[order])]
        return every[order], often[order]

    def _fold(self) -> None:
        """Count what can be counted."""
        for dtype in [one for one in self._parts if one.itemsize == 2]:
            bits = np.concatenate(self._parts.pop(dtype)).view(np.uint16) & np.uint16(0x7FFF)
            table = self._counts.setdefault(dtype, np.zeros((len(self.dims), 1 << 15), np.int64))
            for i in range(len(self.dims)):
                table[i] += np.bincount(bits[:, i], minlength=table.shape[1])
            self._held -= bits.nbytes


def _percentiles(values: Floats, counts: NDArray[np.int64]) -> Floats:
    """Interpolate linearly between the order statistics, as NumPy does."""
    edges = np.cumsum(counts)
    place = np.asarray(PERCENTILES) / 100 * (edges[-1] - 1)
    low = np.floor(place).astype(np.int64)
    below = values[np.searchsorted(edges, low, side="right")]
    above = values[np.searchsorted(edges, np.minimum(low + 1, edges[-1] - 1), side="right")]
    return np.asarray(below + (above - below) * (place - low))
