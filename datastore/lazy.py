"""Arrays that read when they are indexed, and then only the chunks they need: components, norms, token coordinates.

They are what xarray calls backend arrays: explicitly indexed, picklable (a snapshot of the store travels, no data), and
used from any thread. Nothing is ever made up: what is not captured raises AbsentError, what is broken CorruptError.
"""

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from xarray.backends import BackendArray
from xarray.core import indexing

from datastore import storage
from datastore.axis import Axis, Ints
from datastore.cells import Cells
from datastore.codec import ChunkDecoder
from datastore.dtype import numpy_dtype
from datastore.errors import ConflictError, CorruptError
from datastore.plainfile import MOST_TABLE
from datastore.schema import ROLES, SEGMENTS
from datastore.stream import Block, Source, map_blocks
from datastore.union import Capture

__all__ = ["COORDINATES", "ComponentArray", "NormArray", "TokenArray", "chunk_reads", "sources"]

COORDINATES: Final = ("token_id", "position", "segment", "role", "turn", "thinking", "rollout")
_TABLE_CHUNK: Final = storage.TABLE_CHUNK

Reads = dict[tuple[int, int, int], list[tuple[int, int, int]]]
"""For each (capture, layer, chunk): the pieces wanted, as token range on the capture's axis and place in the result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutSource(Source):
    """A chunk to read that knows whose tokens it holds."""

    held_by: Capture = field(repr=False)

    def describe(self) -> str:
        """Return the chunk's name for a message: rollouts with token ranges, layer, component, file."""
        end = min(self.start + self.tokens, self.held_by.ragged.n_tokens)
        starts = self.held_by.ragged.starts
        pieces = self.held_by.ragged.pieces(self.start, end)
        names = [
            f"{self.held_by.rollout_ids[p.row]!r} tokens {p.start - int(starts[p.row])}-{p.stop - int(starts[p.row])}"
            for p in pieces
        ]
        listed = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        place = f"chunk {self.file} of capture {self.capture}"
        return f"{self.component} at layer {self.layer} of rollout {listed} ({place})"


@dataclass(frozen=True, slots=True)
class _Layout:
    """One component's array in one capture, as its zarr.json says."""

    path: Path
    tokens: int
    width: int
    dtype: np.dtype[Any]
    axis: str
    decoder: ChunkDecoder | None


@lru_cache(maxsize=256)
def layout_of(path: Path, mark: tuple[int, int]) -> _Layout:
    """Read an array's zarr.json; `mark` tells one capture at this path from another."""
    meta = storage.array_metadata(path)
    try:
        tokens, width = int(meta["chunk_grid"]["configuration"]["chunk_shape"][0]), int(meta["shape"][2])
        dtype, axis = numpy_dtype(meta["data_type"]), str(meta["dimension_names"][2])
        if tokens < 1 or width < 1 or tokens * width * dtype.itemsize > MOST_TABLE:
            raise ValueError(f"chunks of {tokens} tokens of width {width}")
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        raise CorruptError(
            f"{path / 'zarr.json'} does not describe rows of tokens ({error}), so none is read; run `verify` on the "
            "store to see what else is broken"
        ) from error
    return _Layout(path=path, tokens=tokens, width=width, dtype=dtype, axis=axis, decoder=ChunkDecoder.of(meta))


def component_layout(cells: Cells, place: int, component: str) -> _Layout:
    """Return the layout of a component in the capture at `place`."""
    return layout_of(cells.captures[place].path / component, cells.snapshot.captures[place][1])


def _through_zarr(layer_index: int, tokens: slice, *, path: Path, width: int) -> NDArray[Any]:
    region = (tokens, slice(layer_index, layer_index + 1), slice(0, width))
    return storage.read_region(path, region)[:, 0]


def chunk_reads(cells: Cells, component: str, layer: int, *, axis: Axis) -> Reads:
    """Return which chunks hold the tokens of `axis` at one layer, and where each piece goes on that axis.

    Raises
    ------
    AbsentError
        A cell is not captured.
    """
    holder, row = cells.found(component, layer, axis.rollout)
    reads: Reads = {}
    for place in np.unique(holder).tolist():
        size = component_layout(cells, place, component).tokens
        runs = np.flatnonzero(holder == place)
        low = cells.captures[place].ragged.starts[row[runs]] + axis.start[runs]
        high, target = low + axis.lengths[runs], axis.edges[runs]
        n_chunks = (high - 1) // size - low // size + 1
        run = np.repeat(np.arange(len(runs)), n_chunks)
        chunk = np.arange(len(run)) - np.repeat(np.cumsum(n_chunks) - n_chunks, n_chunks) + (low // size)[run]
        first, last = np.maximum(low[run], chunk * size), np.minimum(high[run], (chunk + 1) * size)
        at = target[run] + first - low[run]
        order = np.argsort(chunk, kind="stable")
        columns = (values[order].tolist() for values in (chunk, first, last, at))
        for index, *piece in zip(*columns, strict=True):
            reads.setdefault((place, layer, index), []).append((piece[0], piece[1], piece[2]))
    return reads


def sources(cells: Cells, component: str, reads: Reads, *, whole: bool) -> Iterator[RolloutSource]:
    """Yield one source for each chunk of `reads`.

    With `whole` its rows are one slice from the first to the last token wanted, else one slice for each run wanted.
    """
    for (place, layer, index), pieces in reads.items():
        capture, found = cells.captures[place], component_layout(cells, place, component)
        runs = [(min(p[0] for p in pieces), max(p[1] for p in pieces))] if whole else _merged(pieces)
        yield RolloutSource(
            path=found.path,
            capture=capture.number,
            component=component,
            layer=layer,
            layer_index=capture.layers.index(layer),
            chunk=index,
            tokens=found.tokens,
            width=found.width,
            dtype=found.dtype,
            rows=tuple(slice(low - index * found.tokens, high - index * found.tokens) for low, high in runs),
            decoder=found.decoder,
            read=None if found.decoder else partial(_through_zarr, path=found.path, width=found.width),
            held_by=capture,
        )


def _merged(pieces: Sequence[tuple[int, int, int]]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for low, high, _ in sorted(pieces):
        if runs and low <= runs[-1][1]:
            runs[-1] = (runs[-1][0], max(high, runs[-1][1]))
        else:
            runs.append((low, high))
    return runs


class _Lazy(BackendArray):
    """What the lazy arrays share: explicit indexing by integers, slices and arrays along each axis."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def __getitem__(self, key: indexing.ExplicitIndexer) -> NDArray[Any]:
        if not isinstance(key, indexing.VectorizedIndexer):
            return self._read(key.tuple)  # the adapter below stumbles over empty slices that go backwards
        found = indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)
        return np.asarray(found)

    def _read(self, key: tuple[Any, ...]) -> NDArray[Any]:
        """Read the outer product of the keys; an integer drops its axis."""
        kept = tuple(slice(k, k + 1) if isinstance(k, int | np.integer) else k for k in key)
        values = self._outer(kept)
        dropped = tuple(i for i, k in enumerate(key) if isinstance(k, int | np.integer))
        return values.reshape([n for i, n in enumerate(values.shape) if i not in dropped])

    def _outer(self, key: tuple[Any, ...]) -> NDArray[Any]:
        raise NotImplementedError


class ComponentArray(_Lazy):
    """A component's values, (token, layer, hidden): float32 (float64 where that is stored), or as stored.

    Parameters
    ----------
    cells : Cells
    component : str
    layers : sequence of int
        Real layer numbers.
    axis : Axis
    raw : bool
        Keep the stored dtype.

    Raises
    ------
    ConflictError
        The captures hold the component at different widths, or, for `raw`, in different dtypes.
    """

    def __init__(self, cells: Cells, component: str, *, layers: Sequence[int], axis: Axis, raw: bool = False) -> None:
        self.cells, self.component, self.layers, self.axis = cells, component, tuple(layers), axis
        used = _used(cells, component, layers=self.layers, axis=axis)
        found = {cells.captures[place].number: component_layout(cells, place, component) for place in used}
        width = _only(component, "width", {number: one.width for number, one in found.items()})
        dtypes = {number: one.dtype for number, one in found.items()}
        self.hidden = found[max(found)].axis
        wide = np.dtype(np.float64 if np.dtype(np.float64) in dtypes.values() else np.float32)
        self.dtype = _only(component, "dtype", dtypes) if raw else wide
        self.shape = (axis.n_tokens, len(self.layers), width)
        self.chunk_tokens = max(one.tokens for one in found.values())

    def _outer(self, key: tuple[Any, ...]) -> NDArray[Any]:
        token, layer, hidden = key
        axis, layers = self.axis.take(token), np.asarray(self.layers)[layer].tolist()
        reads: Reads = {}
        for number in dict.fromkeys(layers):
            reads |= chunk_reads(self.cells, self.component, number, axis=axis)
        width = len(range(*hidden.indices(self.shape[2]))) if isinstance(hidden, slice) else len(hidden)
        out = np.empty((axis.n_tokens, len(layers), width), self.dtype)
        targets = {number: [i for i, n in enumerate(layers) if n == number] for number in layers}
        places = {capture.number: place for place, capture in enumerate(self.cells.captures)}

        def copy(block: Block) -> None:
            place = places[block.capture]
            chunk = block.tokens.start // component_layout(self.cells, place, self.component).tokens
            for low, high, at in reads[place, block.layer, chunk]:
                values = block.values[low - block.tokens.start : high - block.tokens.start, hidden]
                for target in targets[block.layer]:
                    out[at : at + high - low, target] = values

        used = {place for place, _, _ in reads}
        with _Unchanged(self.cells, used):
            _run(copy, list(sources(self.cells, self.component, reads, whole=True)))
        return out


def _used(cells: Cells, component: str, *, layers: Sequence[int], axis: Axis) -> list[int]:
    """Return the captures that hold any of these cells; where none is, those that have the component."""
    rollouts = np.unique(axis.rollout)
    holders = {int(place) for n in layers for place in np.unique(cells.where(component, n)[0][rollouts])} - {-1}
    return sorted(holders) or [place for place, c in enumerate(cells.captures) if component in c.components]


def _only(component: str, what: str, found: Mapping[int, Any]) -> Any:
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{value} in capture {number}" for number, value in found.items())
        raise ConflictError(
            f"{component} has not one {what} but {listed}, so its rows do not fit in one array; "
            "select rollouts and layers that were captured alike"
        )
    return next(iter(found.values()))


def _run(copy: Callable[[Block], None], chunks: Sequence[Source]) -> None:
    """Decode the chunks and copy from them: on all cores, or in this thread when it is one of somebody's pool."""
    if not chunks:
        return
    alone = threading.current_thread() is not threading.main_thread()
    threads = 1 if alone else min(len(chunks), len(os.sched_getaffinity(0)))
    largest = max(one.nbytes for one in chunks)
    for _ in map_blocks(copy, chunks, memory=(2 * threads + 3) * (largest + 1024), threads=threads):
        pass


class _Unchanged:
    """Raises DatastoreError when captures that were read from are no longer those of the snapshot."""

    def __init__(self, cells: Cells, places: set[int]) -> None:
        self.cells, self.places = cells, places

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, CorruptError):
            self.cells.check(self.places)


def _gather(
    paths: Mapping[int, Path], runs: tuple[Ints, Ints, Ints], *, out: NDArray[Any], column: int | None = None
) -> None:
    """Fill `out` (tokens,) from small arrays along the token axis; runs are (capture, first token, length), end to end.

    Only regions of whole chunks that are wanted are read.
    """
    place, first, length = runs
    edges = np.concatenate([[0], np.cumsum(length)])
    for one in np.unique(place).tolist():
        mine = np.flatnonzero(place == one)
        mine = mine[np.argsort(first[mine], kind="stable")]
        low, high = first[mine] // _TABLE_CHUNK, (first[mine] + length[mine] - 1) // _TABLE_CHUNK
        apart = np.flatnonzero(low[1:] > np.maximum.accumulate(high)[:-1] + 1) + 1
        for group in np.split(mine, apart):
            start, stop = int(first[group].min()), int((first[group] + length[group]).max())
            region = (slice(start, stop),) if column is None else (slice(start, stop), slice(column, column + 1))
            values = storage.read_region(paths[one], region).reshape(-1)
            for at, begin, n in zip(edges[group], first[group] - start, length[group], strict=True):
                out[at : at + n] = values[begin : begin + n]


class NormArray(_Lazy):
    """Norms of tokens as they were kept at capture, (token, layer) float32.

    Raises
    ------
    AbsentError
        When a cell that is not captured is read.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, cells: Cells, component: str, *, layers: Sequence[int], axis: Axis) -> None:
        self.cells, self.component, self.layers, self.axis = cells, component, tuple(layers), axis
        self.shape = (axis.n_tokens, len(self.layers))

    def _outer(self, key: tuple[Any, ...]) -> NDArray[Any]:
        axis, layers = self.axis.take(key[0]), np.asarray(self.layers)[key[1]].tolist()
        out = np.empty((len(layers), axis.n_tokens), np.float32)
        for i, number in enumerate(layers):
            place, row = self.cells.found(self.component, number, axis.rollout)
            for one in np.unique(place).tolist():
                capture = self.cells.captures[one]
                runs = np.flatnonzero(place == one)
                part = Axis(axis.rollout[runs], axis.start[runs], axis.stop[runs])
                values = np.empty(part.n_tokens, np.float32)
                first = capture.ragged.starts[row[runs]] + part.start
                paths = {one: capture.path / "stats" / self.component / "norm"}
                with _Unchanged(self.cells, {one}):
                    _gather(paths, (place[runs], first, part.lengths), out=values, column=capture.layers.index(number))
                out[i, slice(None) if len(runs) == len(place) else np.repeat(place == one, axis.lengths)] = values
        return out.T


class TokenArray(_Lazy):
    """A coordinate along the token axis: one of `COORDINATES`; segment, role and rollout as text.

    Text is of fixed width in memory, because dask and NumPy handle it without Python objects.
    """

    def __init__(self, cells: Cells, name: str, *, axis: Axis) -> None:
        self.cells, self.name, self.axis = cells, name, axis
        text = {"segment": np.array(SEGMENTS).dtype, "role": np.array(ROLES).dtype, "rollout": cells.ids.dtype}
        plain = {"thinking": np.dtype(np.bool_)}
        self.dtype = text.get(name) or plain.get(name) or np.dtype(np.int32)
        self.shape = (axis.n_tokens,)

    def _outer(self, key: tuple[Any, ...]) -> NDArray[Any]:
        axis = self.axis.take(key[0])
        match self.name:
            case "rollout":
                return np.asarray(axis.spread(self.cells.ids[axis.rollout]))
            case "position":
                return axis.positions().astype(np.int32)
            case "segment":
                ends = self.cells.column("prompt_end")[axis.rollout]
                return np.asarray(np.array(SEGMENTS)[(axis.positions() >= axis.spread(ends)).astype(np.int8)])
            case "role":
                return np.asarray(np.array(ROLES)[self._stored(axis)])
            case _:
                return self._stored(axis)

    def _stored(self, axis: Axis) -> NDArray[Any]:
        place = self.cells.newest[axis.rollout]
        captures = self.cells.captures
        starts = np.empty(len(place), dtype=np.int64)
        for one in np.unique(place).tolist():
            mine = place == one
            starts[mine] = captures[one].ragged.starts[self.cells.described_at[axis.rollout[mine]]]
        out = np.empty(axis.n_tokens, np.int8 if self.name == "role" else self.dtype)
        used = set(place.tolist())
        with _Unchanged(self.cells, used):
            paths = {one: captures[one].path / self.name for one in used}
            _gather(paths, (place, starts + axis.start, axis.lengths), out=out)
        return out
