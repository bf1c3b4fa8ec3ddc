"""Statistics of activations as a monoid: zero, of(block), +, finalise, and the partial file of one chunk.

Everything is computed from the bits as stored, widened exactly and accumulated in float64. The result for a given block
of rows is the same to the bit on every machine: tiles are counted from the block's first row, only NumPy's
elementwise operations and its axis reductions over buffers of our own are used, and no BLAS, whose results and speed
hang on its kernels and threads. Where numba is installed, `compile_sums` puts one compiled loop in their place that
gives the same bits.
"""

import importlib
import logging
import struct
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from datastore.dtype import numpy_dtype, upcast
from datastore.errors import CorruptError, MisuseError
from datastore.schema import STATISTICS

__all__ = ["SUMS", "WORTH_COMPILING", "Key", "Moments", "MomentsTable", "compile_sums"]

Key = tuple[int, ...]
"""What a piece of a chunk is counted under: (row, segment), or (segment,) when statistics are kept per capture."""

_TILE_VALUES = 1 << 18
"""Values a tile holds at most (if a row is not wider): 4.5 MiB of buffers for bfloat16. Smaller tiles would
fit L2 and are still slower, because after each NumPy call the threads contend for the interpreter lock: measured at
hidden 7168 with two threads, 0.9 GB/s of bfloat16 with 2^15, 1.5 with 2^16, 2.4 with 2^18. Changing it changes the last
bits of the sums."""

_TILES = 4
"""Tiles that one NumPy call takes together: the same sums of the same tiles, with a quarter of the calls. After each
call a thread waits for the interpreter lock, which held sixteen threads to 0.7 GB/s of bfloat16 at hidden 4096."""

WORTH_COMPILING: Final = 1 << 30
"""Bytes of rows for which `compile_sums` pays: it takes half a second, and the first time on a machine some seconds."""

_INFINITY: Final[Mapping[str, tuple[type[np.unsignedinteger[Any]], int]]] = {
    "bfloat16": (np.uint16, 0x7F80),
    "float16": (np.uint16, 0x7C00),
    "float32": (np.uint32, 0x7F800000),
    "float64": (np.uint64, 0x7FF0000000000000),
}
"""The unsigned integer of each dtype's size, and infinity's bits in it: magnitudes order as their bits do."""

_SAFE_SQUARES = (1e-280, 1e280)
"""Sums of squares outside this range may have under- or overflowed; only zero rows and float64 data get there."""

_INT64, _FLOAT32, _FLOAT64 = np.dtype(np.int64), np.dtype(np.float32), np.dtype(np.float64)
_DTYPES = dict.fromkeys(STATISTICS, (_FLOAT64,)) | {
    "count": (_INT64,),
    "nonfinite": (_INT64,),
    "max_abs": (_FLOAT32, _FLOAT64),
}
SUMS = ("sum", "sum_abs", "sum_squares", "sum_unit")
_MAGIC = b"MOMT"
_VERSION = 1
_HEADER = struct.Struct("<4sHBBIIII")
_CHECKSUM = struct.Struct("<I")
_DENSE = -1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Moments:
    """Sums over tokens from which means, spreads and maxima follow, one number per dimension of the width axis.

    Moments of two blocks add up to the moments of both together, to float64 rounding. Elements that are not finite are
    left out of every sum and counted in `nonfinite`.

    Attributes
    ----------
    count : int64 array of shape (..., width)
        Tokens whose element is finite.
    sum, sum_squares, sum_abs : float64 arrays of the same shape
        Sums of h, h² and |h| over those tokens, in the component's own unit (squared for `sum_squares`).
    max_abs : float32 array (float64 for float64 data, and as a store keeps it) of the same shape
        Largest |h|, 0 where there is none.
    sum_unit : float64 array of the same shape
        Sum of h / |h|, |h| the token's Euclidean norm; a token that is zero or holds a non-finite element adds nothing.
    nonfinite : int64 array of the same shape
        Tokens whose element is NaN or infinite.

    Raises
    ------
    MisuseError
        If the arrays differ in shape or one has another dtype than above.
    """

    count: NDArray[np.int64]
    sum: NDArray[np.float64]
    sum_squares: NDArray[np.float64]
    sum_abs: NDArray[np.float64]
    max_abs: NDArray[np.floating[Any]]
    sum_unit: NDArray[np.float64]
    nonfinite: NDArray[np.int64]

    def __post_init__(self) -> None:
        for name in STATISTICS:
            array = getattr(self, name)
            if array.shape != self.count.shape or array.dtype not in _DTYPES[name]:
                raise MisuseError(
                    f"Moments: {name} is {array.dtype} of shape {array.shape} where count has shape {self.count.shape} "
                    f"and {name} must be {' or '.join(map(str, _DTYPES[name]))}, so they can't be added up; "
                    "take them from Moments.of or from one capture's stats."
                )

    @classmethod
    def zero(cls, width: int) -> Self:
        """Moments of no token at all: the neutral element of +.

        Parameters
        ----------
        width : int
            Length of the width axis.
        """
        arrays = {name: np.zeros(width, _DTYPES[name][0]) for name in STATISTICS}
        return cls(**arrays)

    @staticmethod
    def of(values: NDArray[Any]) -> tuple["Moments", NDArray[np.float32]]:
        """Moments and norms of a block of rows.

        Parameters
        ----------
        values : array of shape (tokens, width)
            Rows in the stored dtype: bfloat16 (ml_dtypes), float16, float32 or float64, any strides.

        Returns
        -------
        Moments
            Of all the rows; the same rows give the same bits, whatever the thread, strides or alignment.
        float32 array of shape (tokens,)
            Euclidean norm of each row; NaN or infinity for a row that holds one (NaN if both), and infinity where the
            norm itself is beyond float32.

        Raises
        ------
        MisuseError
            If `values` is not two-dimensional or of a dtype that is not stored.

        Examples
        --------
        >>> moments, norms = Moments.of(np.array([[3.0, 4.0], [0.0, 0.0]], np.float32))
        >>> norms.tolist(), moments.sum_unit.round(12).tolist()
        ([5.0, 0.0], [0.6, 0.8])
        """
        table = MomentsTable.of_pieces(values, [((), 0, len(values))])
        return table.moments[()], table.norms

    def __add__(self, other: "Moments") -> "Moments":
        if self.count.shape != other.count.shape:
            raise MisuseError(
                f"Moments of shapes {self.count.shape} and {other.count.shape} can't be added, because they are not of "
                "the same width axis; add moments of one component."
            )
        arrays = {name: getattr(self, name) + getattr(other, name) for name in STATISTICS if name != "max_abs"}
        return Moments(**arrays, max_abs=np.maximum(self.max_abs, other.max_abs))

    def __getitem__(self, index: Any) -> "Moments":
        """Moments at some places of the axes before the width."""
        return Moments(**{name: getattr(self, name)[index] for name in STATISTICS})

    def total(self, wanted: NDArray[np.bool_]) -> "Moments":
        """The sum of those moments that are wanted, added one after the other in their order.

        Parameters
        ----------
        wanted : bool array of the shape of the moments without the width
        """
        sums: dict[str, NDArray[Any]] = {}
        for name in STATISTICS:
            add, values = np.maximum if name == "max_abs" else np.add, getattr(self, name)
            into = sums[name] = np.zeros(values.shape[-1], values.dtype)
            for index in np.argwhere(wanted).tolist():
                add(into, values[tuple(index)], out=into)
        return Moments(**sums)

    def finalise(self) -> dict[str, NDArray[np.float64]]:
        """Means and spreads, float64 arrays of the moments' shape.

        Returns
        -------
        dict of str to float64 array
            `count` and `nonfinite`; over the finite elements `mean`, `rms` = sqrt(mean of h²), `std` = sqrt(rms² -
            mean²) (population, no smaller spread than about 1e-8 of the mean is resolved), `mean_abs`, `max_abs`;
            and `mean_unit`, sum h/|h| over count + nonfinite, that is all tokens, those without a direction counting
            as zero, so that its direction is that of `sum_unit`. NaN where nothing was counted.
        """
        count = self.count.astype(np.float64)
        nonfinite = self.nonfinite.astype(np.float64)
        with np.errstate(all="ignore"):
            mean, mean_square = self.sum / count, self.sum_squares / count
            return {
                "count": count,
                "nonfinite": nonfinite,
                "mean": mean,
                "rms": np.sqrt(mean_square),
                "std": np.sqrt(np.maximum(mean_square - mean * mean, 0.0)),
                "mean_abs": self.sum_abs / count,
                "max_abs": np.where(self.count > 0, self.max_abs.astype(np.float64), np.nan),
                "mean_unit": self.sum_unit / (count + nonfinite),
            }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MomentsTable:
    """The statistics of one chunk: moments of each piece key, and the norm of each row.

    Attributes
    ----------
    moments : mapping of key to Moments
        All of one width, keys all of one length, in the order in which the chunk first has them.
    norms : float32 array of shape (tokens,)
        Norm of each row of the chunk.

    Raises
    ------
    MisuseError
        If the moments differ in width or the keys in length.
    """

    moments: Mapping[Key, Moments]
    norms: NDArray[np.float32]

    def __post_init__(self) -> None:
        shapes = {moments.count.shape for moments in self.moments.values()}
        lengths = {len(key) for key in self.moments}
        if len(shapes) > 1 or len(lengths) > 1 or any(len(shape) != 1 for shape in shapes):
            raise MisuseError(
                f"A table of moments of shapes {sorted(shapes)} under keys of lengths {sorted(lengths)} can't be kept, "
                "because a chunk has one width and one kind of key; make a table for each chunk."
            )

    @classmethod
    def of_pieces(cls, values: NDArray[Any], pieces: Sequence[tuple[Key, int, int]]) -> Self:
        """Moments of the pieces of a chunk; pieces with the same key are counted together.

        Parameters
        ----------
        values : array of shape (tokens, width)
            The chunk's rows in the stored dtype.
        pieces : sequence of (key, start, stop)
            Half-open row ranges in ascending order that together are the whole chunk.

        Raises
        ------
        MisuseError
            If the pieces leave a gap, overlap or end elsewhere than the chunk, or as for `Moments.of`.
        """
        _check_pieces(values, pieces)
        tallies: dict[Key, _Tally] = {}
        norms = np.empty(len(values), np.float32)
        with np.errstate(all="ignore"):
            for key, start, stop in pieces:
                if key not in tallies:
                    tallies[key] = _Tally(values.shape[1], values.dtype, _Compiled.module)
                tallies[key].add(values[start:stop], norms[start:stop])
            return cls(moments={key: tally.moments() for key, tally in tallies.items()}, norms=norms)

    def to_bytes(self) -> bytes:
        """The chunk's partial file: header, keys, sums, counts, maxima, norms, crc32c; all little-endian.

        Counts that are the same in all dimensions, as they are without non-finite elements, take 8 bytes.
        """
        first = next(iter(self.moments.items()), None)
        key_length, width = (0, 0) if first is None else (len(first[0]), len(first[1].count))
        moments = self.moments.values()
        top = np.result_type(np.float32, *(m.max_abs.dtype for m in moments)).newbyteorder("<")
        header = (_MAGIC, _VERSION, key_length, top.itemsize, len(moments), width, len(self.norms), 0)
        sections = [
            _HEADER.pack(*header),
            np.array(list(self.moments), "<i8").tobytes(),
            *(getattr(m, name).astype("<f8", copy=False).tobytes() for m in moments for name in SUMS),
            *(_pack_counts(counts) for m in moments for counts in (m.count, m.nonfinite)),
            *(m.max_abs.astype(top, copy=False).tobytes() for m in moments),
            self.norms.astype("<f4", copy=False).tobytes(),
        ]
        body = b"".join(sections)
        return body + _CHECKSUM.pack(google_crc32c.value(body))

    @classmethod
    def from_bytes(cls, raw: bytes) -> Self:
        """The table whose `to_bytes` is `raw`, bit for bit.

        Raises
        ------
        CorruptError
            If `raw` is cut off, altered, or of another format version: compute the table from its chunk again.
        """
        key_length, top_size, n_keys, width, n_tokens = _checked_header(raw)
        reader = _Reader(raw, _HEADER.size)
        keys = reader.take("<i8", n_keys * key_length).reshape(n_keys, key_length).tolist()
        sums = reader.take("<f8", n_keys * len(SUMS) * width).reshape(n_keys, len(SUMS), width)
        counts = [(reader.counts(width), reader.counts(width)) for _ in keys]
        tops = reader.take(f"<f{top_size}", n_keys * width).reshape(n_keys, width)
        norms = reader.take("<f4", n_tokens)
        moments = {
            tuple(key): Moments(count=count, nonfinite=nonfinite, max_abs=top, **dict(zip(SUMS, total, strict=True)))
            for key, total, (count, nonfinite), top in zip(keys, sums, counts, tops, strict=True)
        }
        return cls(moments=moments, norms=norms)


class _Scratch(threading.local):
    """Each thread's buffers of some tiles, kept between calls: their strides, so the order of every sum, are ours."""

    rows: int = 0
    shape: tuple[int, int] = (0, 0)
    dtype: np.dtype[Any] = np.dtype(np.float32)
    magnitude: NDArray[np.unsignedinteger[Any]]
    x: NDArray[np.float64]
    y: NDArray[np.float64]

    def fit(self, width: int, dtype: np.dtype[Any]) -> "_Scratch":
        self.rows = max(1, _TILE_VALUES // max(1, width))
        shape = (_TILES * self.rows, width)
        if (self.shape, self.dtype) != (shape, dtype):
            self.magnitude = np.empty(shape, _INFINITY[dtype.name][0])
            self.x, self.y = np.empty(shape), np.empty(shape)
            self.shape, self.dtype = shape, dtype
        return self


_SCRATCH = _Scratch()


class _Compiled:
    """The compiled loop, once `compile_sums` has found that it gives NumPy's bits."""

    lock = threading.Lock()
    tried = False
    module: Any = None


def compile_sums() -> bool:
    """Use the compiled loop for the statistics of bfloat16 rows from now on: the same bits, two to three times faster.

    Returns
    -------
    bool
        Whether there is one: numba is installed and can compile here, and the loop gives NumPy's bits on this machine.
    """
    with _Compiled.lock:
        if not _Compiled.tried:
            _Compiled.module = _tried()
            _Compiled.tried = True
        return _Compiled.module is not None


def _tried() -> Any:
    try:
        module = importlib.import_module("datastore.compiled")
    except Exception as error:  # whatever keeps numba from compiling, NumPy does the same more slowly
        logging.getLogger(__name__).info("statistics are computed by NumPy: %s", error)
        return None
    rows = np.random.default_rng(0).standard_normal((70, 4 * 257), np.float32).astype(numpy_dtype("bfloat16"))
    found = []
    for loop in (None, module):
        tally, norms = _Tally(rows.shape[1], rows.dtype, loop), np.empty(len(rows), np.float32)
        tally.add(rows, norms)
        found.append([norms.tobytes(), tally.top.tobytes(), *(one.tobytes() for one in tally.sums)])
    if found[0] != found[1]:
        logging.getLogger(__name__).warning("statistics are computed by NumPy: numba gives other bits on this machine")
        return None
    return module


class _Tally:
    """The sums of one key while its tiles are added."""

    def __init__(self, width: int, dtype: np.dtype[Any], compiled: Any) -> None:
        self.dtype = dtype
        self.compiled = compiled if dtype.name == "bfloat16" else None
        self.unsigned, self.infinity = _INFINITY[dtype.name]
        self.mask = self.unsigned(np.iinfo(self.unsigned).max >> 1)
        self.scratch = _SCRATCH.fit(width, dtype)
        self.tokens = 0
        self.nonfinite: NDArray[np.int64] | None = None
        self.sums: list[NDArray[np.float64]] = []  # in the order of SUMS; empty before the first tile
        self.top = np.zeros(0, self.unsigned)

    def add(self, values: NDArray[Any], norms: NDArray[np.float32]) -> None:
        """Add rows (t, width) and write their norms (t,); tiles are counted from the first row."""
        self.tokens += len(values)
        plain = values.flags.c_contiguous and values.flags.aligned
        if self.compiled is not None and plain and self._add_compiled(self.compiled, values, norms):
            return
        rows = self.scratch.rows
        whole = len(values) // rows * rows
        for start in range(0, whole, _TILES * rows):
            stop = min(start + _TILES * rows, whole)
            self._add(values[start:stop], norms[start:stop], tiles=(stop - start) // rows)
        if whole < len(values):
            self._add(values[whole:], norms[whole:], tiles=1)

    def _add_compiled(self, compiled: Any, values: NDArray[Any], norms: NDArray[np.float32]) -> bool:
        width = values.shape[1]
        top = self.top.copy() if self.sums else np.zeros(width, np.uint16)
        sums = np.array(self.sums) if self.sums else np.zeros((len(SUMS), width))
        bits, ends = values.view(np.uint16), compiled.leaves(width)
        if not compiled.add_tiles(bits, self.scratch.rows, *_SAFE_SQUARES, ends, top, sums, norms):
            return False
        self.top, self.sums = top, list(sums)
        return True

    def _add(self, values: NDArray[Any], norms: NDArray[np.float32], *, tiles: int) -> None:
        top, sums = self._tiles(values, norms, tiles)
        if self.sums:
            top = np.maximum(self.top, top, out=self.top)
            sums = [np.concatenate([total[None], parts]) for total, parts in zip(self.sums, sums, strict=True)]
        self.top, self.sums = top, [np.add.reduce(parts, axis=0) for parts in sums]  # one after the other

    def moments(self) -> Moments:
        width = self.scratch.shape[1]
        if not self.sums:
            return Moments.zero(width)
        nonfinite = np.zeros(width, np.int64) if self.nonfinite is None else self.nonfinite
        return Moments(
            count=self.tokens - nonfinite,
            max_abs=upcast(self.top.view(self.dtype)),
            nonfinite=nonfinite,
            **dict(zip(SUMS, self.sums, strict=True)),
        )

    def _tiles(
        self, values: NDArray[Any], norms: NDArray[np.float32], tiles: int
    ) -> tuple[NDArray[np.unsignedinteger[Any]], list[NDArray[np.float64]]]:
        """Bits of the largest magnitude of tiles of one length, and each tile's four sums (tiles, width)."""
        n = len(values)
        magnitude, x, y = self.scratch.magnitude[:n], self.scratch.x[:n], self.scratch.y[:n]
        np.bitwise_and(values.view(self.unsigned), self.mask, out=magnitude)
        np.copyto(x, values)  # exact from every stored dtype
        top = np.maximum.reduce(magnitude, axis=0)
        broken = None
        if np.maximum.reduce(top, initial=0) >= self.infinity:
            broken = self._set_aside(magnitude, x)
            top = np.maximum.reduce(magnitude, axis=0)
        each, other = x.reshape(tiles, n // tiles, -1), y.reshape(tiles, n // tiles, -1)
        sums = [np.add.reduce(each, axis=1)]
        np.abs(x, out=y)
        sums.append(np.add.reduce(other, axis=1))
        np.multiply(x, x, out=y)
        sums.append(np.add.reduce(other, axis=1))
        norm, root = _norms(x, y)
        if broken is not None:
            norm = np.where(broken == 0.0, norm, broken)
            root[broken != 0.0] = np.inf
        norms[:] = norm
        root[root == 0.0] = np.inf  # a zero row has no direction: it adds x / inf, nothing
        # Row after row, a product and a sum each, without BLAS: the same bits on every machine, and one pass less.
        sums.append(np.einsum("ti,tij->tj", (1.0 / root).reshape(tiles, -1), each, optimize=False))
        return top, sums

    def _set_aside(self, magnitude: NDArray[np.unsignedinteger[Any]], x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Count the non-finite elements and make them zero in place; NaN, infinity or (a finite row) 0 for each row."""
        bad = magnitude >= self.infinity
        worst = np.maximum.reduce(magnitude, axis=1)
        magnitude[bad] = 0
        x[bad] = 0.0
        counted = np.add.reduce(bad, axis=0, dtype=np.int64)
        self.nonfinite = counted if self.nonfinite is None else self.nonfinite + counted
        return np.select([worst > self.infinity, worst == self.infinity], [np.nan, np.inf], 0.0)


def _norms(x: NDArray[np.float64], squares: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Norms of the rows of x (n, width), and the r (n,) for which x / r has unit rows.

    A row whose sum of squares leaves float64's range is first divided, in place, by a power of two.
    """
    total = np.add.reduce(squares, axis=1)
    odd = (total < _SAFE_SQUARES[0]) | (total > _SAFE_SQUARES[1])
    if not odd.any():
        root = np.sqrt(total)
        return root.copy(), root
    exponent = np.frexp(np.abs(x[odd]).max(axis=1, initial=0.0))[1]
    x[odd] = scaled = np.ldexp(x[odd], -exponent[:, None])
    total[odd] = np.add.reduce(scaled * scaled, axis=1)
    root = np.sqrt(total)
    norm = root.copy()
    norm[odd] = np.ldexp(root[odd], exponent)
    return norm, root


def _check_pieces(values: NDArray[Any], pieces: Sequence[tuple[Key, int, int]]) -> None:
    if values.ndim != 2 or values.dtype.name not in _INFINITY or not values.dtype.isnative:
        raise MisuseError(
            f"Statistics of {values.dtype} values of shape {values.shape} can't be computed, because rows are "
            f"(tokens, width) in one of {', '.join(_INFINITY)}, native byte order; pass them as stored."
        )
    position = 0
    for key, start, stop in pieces:
        if start != position or stop < start:
            raise MisuseError(
                f"Piece {key} covers rows {start} to {stop} where row {position} comes next, so a row would be counted "
                "twice or never; pass ascending pieces without gaps."
            )
        position = stop
    if position != len(values):
        raise MisuseError(
            f"The pieces end at row {position} of {len(values)}, so a row would be counted never or is not there; "
            "pass pieces that cover exactly the rows given."
        )


def _pack_counts(counts: NDArray[np.int64]) -> bytes:
    constant = counts.size > 0 and bool((counts == counts[0]).all())
    return np.array(counts[:1] if constant else [_DENSE, *counts], "<i8").tobytes()


def _checked_header(raw: bytes) -> tuple[int, int, int, int, int]:
    """Key length, bytes of a maximum, keys, width and tokens of a partial file whose checksum holds."""
    if len(raw) < _HEADER.size + _CHECKSUM.size:
        raise CorruptError(
            f"A file of partial statistics has {len(raw)} bytes, fewer than its header and checksum, so it was cut "
            "off; compute it from its chunk again."
        )
    (stored,) = _CHECKSUM.unpack_from(raw, len(raw) - _CHECKSUM.size)
    found = google_crc32c.value(raw[: -_CHECKSUM.size])
    if stored != found:
        raise CorruptError(
            f"A file of partial statistics has checksum {found:08x} where {stored:08x} is recorded, so its numbers "
            "can't be trusted; compute it from its chunk again."
        )
    magic, version, key_length, top_size, n_keys, width, n_tokens, _ = _HEADER.unpack_from(raw)
    if (magic, version) != (_MAGIC, _VERSION):
        raise CorruptError(
            f"A file of partial statistics begins with {magic!r}, version {version}, where {_MAGIC!r}, version "
            f"{_VERSION} is read, so its numbers have another meaning; compute it from its chunk again."
        )
    return key_length, top_size, n_keys, width, n_tokens


class _Reader:
    """Takes arrays off a partial file, one after the other, as read-only views."""

    def __init__(self, raw: bytes, offset: int) -> None:
        self.raw, self.offset = raw, offset

    def take(self, dtype: str, length: int) -> NDArray[Any]:
        array = np.frombuffer(self.raw, dtype, length, self.offset)
        self.offset += array.nbytes
        return array

    def counts(self, width: int) -> NDArray[np.int64]:
        first = int(self.take("<i8", 1)[0])
        return self.take("<i8", width) if first == _DENSE else np.full(width, first, np.int64)
