"""Read a store: open it, look at its tables, select rows as lazy xarray, stream its chunks.

Everything after `open` is plain xarray and pandas; a reader may leave this module at any line.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray
from xarray.core import indexing

from datastore import chunked, lazy, results, scores, storage, stream, tables
from datastore.axis import Axis
from datastore.cells import Cells, Ints, latest
from datastore.errors import AbsentError, CorruptError, MisuseError
from datastore.index import RolloutIndex, TokenVariable
from datastore.kept import KeptStatistics
from datastore.schema import ROLES, SEGMENTS
from datastore.stream import Block, Span

__all__ = ["Store", "open"]

R = TypeVar("R")
Rollouts = str | Sequence[str] | pd.DataFrame | pd.Index | pd.Series | NDArray[Any] | None
Where = Callable[[xr.Dataset], Any]
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""As s3://bucket begins, also where a Path has made one stroke of two."""


def open(path: str | os.PathLike[str]) -> "Store":
    """Open a store: the union of its captures as it is now.

    Parameters
    ----------
    path : path
        The store's directory.

    Returns
    -------
    Store
        It does not follow what is captured later; open the store again for that.

    Raises
    ------
    NotAStoreError
        The path does not exist or is something else.
    MisuseError
        It is the address of a bucket.
    NewerFormatError
        The store was written by a newer release.
    CorruptError
        A capture's metadata or table can't be read.
    """
    if _ADDRESS.match(str(path)) and not Path(path).exists():
        raise MisuseError(
            f"{path} is an address, and a store is read by path; mount the bucket and give the path there, or open one "
            "of its captures with plain zarr"
        )
    return Store(latest(Path(path)))


class Store:
    """A store as it was when opened. Made by `open`."""

    def __init__(self, cells: Cells) -> None:
        self._cells = cells
        self._labels = self._added("labels")
        self._annotations = self._added("annotations")

    def _added(self, name: str) -> list[Path]:
        return [self.path / name / f"{n:04d}" for n in storage.numbered(self.path / name)]

    def __repr__(self) -> str:
        return (
            f"Store({str(self.path)!r}: {len(self._cells.ids)} rollouts, {int(self._cells.counts.sum())} tokens, "
            f"{', '.join(self.components) or 'no components'}, {len(self.layers)} layers, "
            f"{len(self._cells.captures)} captures)"
        )

    @property
    def path(self) -> Path:
        """The store's directory."""
        return self._cells.snapshot.path

    @property
    def cells(self) -> Cells:
        """Which capture holds which rollout's rows of each layer and component; for code that reads chunks itself."""
        return self._cells

    # -- what is there ---------------------------------------------------------------------------------------------

    @cached_property
    def rollouts(self) -> pd.DataFrame:
        """One row per rollout, indexed by rollout_id: n_tokens, prompt_end, prompt_set, tags, token_sha256, the labels.

        A label that is not given for every rollout is NaN there (None for a bool). A label of different types in
        different captures is text.
        """
        with self._cells.unchanged():
            return tables.rollout_table(self._cells, self._labels)

    @cached_property
    def annotations(self) -> pd.DataFrame:
        """Labelled token spans: rollout_id, token_start, token_end (half-open, from the rollout's start), label."""
        with self._cells.unchanged():
            return tables.annotation_table(self._cells, self._annotations)

    @property
    def layers(self) -> tuple[int, ...]:
        """All layer numbers captured for any component and rollout, ascending."""
        return self._cells.layers

    @property
    def components(self) -> tuple[str, ...]:
        """Names of all components captured for any rollout."""
        return tuple(self._cells.components)

    @property
    def captures(self) -> pd.DataFrame:
        """One row per capture, indexed by number: model, revision, n_rollouts, n_tokens, layers, components..."""
        return tables.capture_table(self._cells)

    @property
    def provenance(self) -> dict[int, Mapping[str, Any]]:
        """By capture number, how its rows were computed: model, tokenizer, settings, environment, notes."""
        return {one.number: one.attrs["provenance"] for one in self._cells.captures}

    def captured(self, component: str) -> pd.DataFrame:
        """Return which cells of a component are captured: bool, one row per rollout, one column per layer."""
        self._known(component)
        layers = self._cells.layers_of(component)
        there = {layer: self._cells.where(component, layer)[0] >= 0 for layer in layers}
        index = pd.Index(self._cells.ids.tolist(), name="rollout_id", dtype="str")
        return pd.DataFrame(there, index=index).rename_axis(columns="layer")

    # -- rows as xarray --------------------------------------------------------------------------------------------

    def select(
        self,
        component: str,
        *,
        rollouts: Rollouts = None,
        layers: int | Sequence[int] | None = None,
        segment: str | Sequence[str] | None = None,
        role: str | Sequence[str] | None = None,
        turn: int | Sequence[int] | None = None,
        positions: slice | None = None,
        where: Where | None = None,
        raw: bool = False,
    ) -> xr.DataArray:
        """Return rows as a lazy array; nothing but coordinates is read until its values are used.

        Parameters
        ----------
        component : str
        rollouts : rollout id, ids, or a (filtered) rollout table, optional
            Token order follows it. Default all.
        layers : int or ints, optional
            Real layer numbers; one int drops the dimension. Default all at which the component is captured.
        segment : "prompt" or "response", optional
        role : one or several of "none", "system", "user", "assistant", "tool", optional
        turn : int or ints, optional
        positions : slice, optional
            Of positions in each rollout; negative ones count from the rollout's end.
        where : callable, optional
            Given the coordinates of the tokens left by all of the above as a Dataset, returns one bool per token.
        raw : bool
            Keep the stored dtype.

        Returns
        -------
        DataArray
            (token, layer, hidden), float32 (float64 where that is stored), with coordinates token_id, position,
            segment, role, turn, thinking, rollout, layer.

        Raises
        ------
        AbsentError
            Something asked for is not captured, at any of the cells asked for; the message lists what is.
        MisuseError
            An argument is none of the above.
        """
        numbers = self._layer_numbers(component, layers)
        chosen = self._chosen(rollouts)
        self._all_captured(component, numbers, chosen)
        axis = self._tokens_of(chosen, segment=segment, role=role, turn=turn, positions=positions)
        if where is not None:
            axis = axis.take(self._kept(where, axis))
        array = lazy.ComponentArray(self._cells, component, layers=numbers, axis=axis, raw=raw)
        rows = self._wrap({component: array}, axis, numbers)[component]
        return rows.isel(layer=0) if isinstance(layers, int | np.integer) else rows

    def dataset(self, *, chunks: int | Literal["auto"] | None = None) -> xr.Dataset:
        """Return the whole store as one lazy Dataset: every component over (token, layer, its width).

        `ds.sel(rollout="71", layer=20)` selects. Where the store is ragged, reading a cell that is not captured raises
        AbsentError. With `chunks`, the components are dask arrays, and a task reads whole chunks of one layer: as many
        as are in that many tokens, or for "auto" in 128 MiB.
        """
        axis, layers = self._tokens_of(np.arange(len(self._cells.ids))), self.layers
        names = self.components
        arrays = {name: lazy.ComponentArray(self._cells, name, layers=layers, axis=axis) for name in names}
        whole = self._wrap(arrays, axis, layers)
        return whole if chunks is None else chunked.chunked(whole, self._cells, axis, chunks=chunks)

    def norms(
        self, component: str, *, rollouts: Rollouts = None, layers: int | Sequence[int] | None = None
    ) -> xr.DataArray:
        """Return each token's Euclidean norm as kept at capture: lazy float32 (token, layer).

        Raises
        ------
        AbsentError
            A cell is not captured, or was captured without statistics.
        """
        numbers = self._layer_numbers(component, layers)
        chosen = self._chosen(rollouts)
        self._all_captured(component, numbers, chosen)
        holders = {int(p) for n in numbers for p in np.unique(self._cells.where(component, n)[0][chosen])}
        for one in (self._cells.captures[place] for place in sorted(holders)):
            if one.attrs["statistics"] == "none":
                raise AbsentError(
                    f"capture {one.number} was made without statistics, so it holds no norms of {component}; "
                    "compute them from select() or blocks()"
                )
        axis = self._tokens_of(chosen)
        array = lazy.NormArray(self._cells, component, layers=numbers, axis=axis)
        rows = self._wrap({component: array}, axis, numbers)[component].rename("norm")
        return rows.isel(layer=0) if isinstance(layers, int | np.integer) else rows

    def statistics(self, component: str, layer: int, *, rollouts: Rollouts = None) -> KeptStatistics:
        """Return the sums kept at capture for these rollouts; it says for which ones a pass is needed.

        Raises
        ------
        AbsentError
            A cell is not captured; the message lists what is.
        """
        numbers, chosen = self._layer_numbers(component, layer), self._chosen(rollouts)
        self._all_captured(component, numbers, chosen)
        return KeptStatistics(self._cells, component, numbers[0], rollouts=chosen)

    def scores(self, *, rollouts: Rollouts = None, traits: Sequence[str] | None = None) -> xr.Dataset:
        """Return the scores that are in the store now, labelled: `score` and `norm` (token, direction), float32.

        Parameters
        ----------
        rollouts : id, ids or rollout table, optional
            Default all that have a score; NaN where one has no score along a direction.
        traits : sequence of str, optional
            `category/name`, or just the name; default all.

        Raises
        ------
        AbsentError
            There are no such scores.
        """
        names = None if rollouts is None else [str(self._cells.ids[i]) for i in self._chosen(rollouts)]
        with self._cells.unchanged():
            return scores.read_scores(scores.load_results(self.path), self._cells, rollouts=names, traits=traits)

    def calibration(self, component: str = "residual", *, number: int | None = None) -> xr.Dataset:
        """Return a calibration that is in the store now: the newest of a component, or the one of a number.

        Raises
        ------
        AbsentError
            There is none.
        """
        numbers = None if number is None else [number]
        with self._cells.unchanged():
            kept = results.read_results(self.path, "calibration", numbers=numbers)
        found = [one for _, one in kept if number is not None or one.attrs.get("component") == component]
        if not found:
            wanted = f"of {component}" if number is None else f"number {number}"
            raise AbsentError(
                f"{self.path} holds no calibration {wanted}; make one with python -m calibrate {self.path.name}"
            )
        return found[-1]

    # -- text ------------------------------------------------------------------------------------------------------

    def tokens(self, rollout_id: str) -> pd.DataFrame:
        """Return a rollout's tokens: token_id, text, position, segment, role, turn, thinking.

        The texts end to end are the whole text: a character spread over several tokens stands at the last of them,
        bytes that are no UTF-8 are written as `\\xff`. A token whose bytes the capture was not given has no text (NaN).
        """
        chosen = self._chosen(rollout_id)
        axis = self._tokens_of(chosen)
        names = [name for name in lazy.COORDINATES if name != "rollout"]
        found = {name: np.asarray(self._coordinate(name, axis).values) for name in names}
        texts = tables.token_texts(self._cells, int(self._cells.newest[chosen[0]]), found["token_id"])
        text = pd.array(texts, dtype="str")
        return pd.DataFrame({"token_id": found.pop("token_id"), "text": text, **found})

    def text(self, rollout_id: str) -> str:
        """Return a rollout's whole text.

        Raises
        ------
        AbsentError
            The capture was not given the bytes of one of its tokens.
        """
        chosen = self._chosen(rollout_id)
        ids = np.asarray(self._coordinate("token_id", self._tokens_of(chosen)).values)
        texts = tables.token_texts(self._cells, int(self._cells.newest[chosen[0]]), ids)
        if None in texts:
            raise AbsentError(
                f"rollout {rollout_id!r} has no text: the bytes of its token id {int(ids[texts.index(None)])} were not "
                "given when it was captured; decode its token_id with the model's tokenizer"
            )
        return "".join(text for text in texts if text is not None)

    # -- rows as blocks --------------------------------------------------------------------------------------------

    def blocks(
        self,
        component: str,
        *,
        layers: int | Sequence[int],
        rollouts: Rollouts = None,
        memory: int = 1 << 30,
        threads: int | None = None,
    ) -> Iterator[Block]:
        """Return an iterator of the stored values, chunk after chunk, decoded ahead by threads: the hot path.

        Parameters
        ----------
        component : str
        layers : int or ints
        rollouts : as for `select`
            Only their rows come, and only those that count in the union.
        memory : int
            Bytes of chunks held at most.
        threads : int, optional
            Decoding threads; one a core by default.

        Returns
        -------
        iterator of Block
            Layer by layer, then in the order of captures and their token axes. Values are as stored, and valid until
            the next block is taken.

        Raises
        ------
        AbsentError
            Something asked for is not captured; raised by this call.
        CorruptError
            In the place of a block whose chunk is missing or does not decode.
        DatastoreError
            A capture was deleted or replaced since the store was opened.
        """
        chunks = self._sources(component, layers, rollouts)
        return self._guarded(stream.blocks(chunks, memory=memory, threads=threads), lambda block: block.capture)

    def map_blocks(
        self,
        fn: Callable[[Block], R],
        component: str,
        *,
        layers: int | Sequence[int],
        rollouts: Rollouts = None,
        memory: int = 1 << 30,
        threads: int | None = None,
    ) -> Iterator[tuple[Span, R]]:
        """Call `fn` on every block in the thread that decoded it; return an iterator of spans and results, in order.

        Parameters and errors are those of `blocks`; `fn` may keep nothing of the block's values without a copy.
        """
        chunks = self._sources(component, layers, rollouts)
        found = stream.map_blocks(fn, chunks, memory=memory, threads=threads)
        return self._guarded(found, lambda result: result[0].capture)

    def rows_of(self, span: Span) -> list[tuple[str, slice, slice]]:
        """Return whose tokens a block or span holds: rollout id, positions in the rollout, rows of the block."""
        capture = next(one for one in self._cells.captures if one.number == span.capture)
        starts, first = capture.ragged.starts, span.tokens.start
        return [
            (
                capture.rollout_ids[p.row],
                slice(p.start - int(starts[p.row]), p.stop - int(starts[p.row])),
                slice(p.start - first, p.stop - first),
            )
            for p in capture.ragged.pieces(span.tokens.start, span.tokens.stop)
        ]

    def _sources(self, component: str, layers: int | Sequence[int], rollouts: Rollouts) -> Iterator[stream.Source]:
        numbers, chosen = self._layer_numbers(component, layers), np.unique(self._chosen(rollouts))
        self._all_captured(component, numbers, chosen)
        axis = self._tokens_of(chosen)

        def chunks() -> Iterator[stream.Source]:
            for number in numbers:
                reads = lazy.chunk_reads(self._cells, component, number, axis=axis)
                yield from lazy.sources(self._cells, component, reads, whole=False)

        return chunks()

    def _guarded(self, found: Iterator[R], capture_of: Callable[[R], int]) -> Iterator[R]:
        places = {one.number: place for place, one in enumerate(self._cells.captures)}
        try:
            for one in found:
                self._cells.check([places[capture_of(one)]])
                yield one
        except CorruptError:
            self._cells.check(places.values())
            raise
        finally:
            getattr(found, "close", lambda: None)()

    # -- what is asked for -----------------------------------------------------------------------------------------

    def _known(self, component: str) -> None:
        if component not in self._cells.components:
            raise AbsentError(
                f"component {component!r} is not captured in {self.path}, which holds "
                f"{', '.join(self.components) or 'no components'}; capture it to add it to the store"
            )

    def _layer_numbers(self, component: str, layers: int | Sequence[int] | None) -> tuple[int, ...]:
        self._known(component)
        there = self._cells.layers_of(component)
        if layers is None:
            return there
        wanted = tuple(int(n) for n in np.atleast_1d(np.asarray(layers)).tolist())
        absent = [n for n in wanted if n not in there]
        if absent or not wanted:
            raise AbsentError(
                f"{component} at layer {absent[0] if absent else '(none given)'} is not captured for any rollout; it "
                f"is captured at layers {', '.join(map(str, there))}; capture it to add it to the store"
            )
        return wanted

    def _chosen(self, rollouts: Rollouts) -> Ints:
        """Return the places of the rollouts asked for, in the order asked for."""
        if rollouts is None:
            return np.arange(len(self._cells.ids), dtype=np.int64)
        names: Any = rollouts.index if isinstance(rollouts, pd.DataFrame) else rollouts
        names = [names] if isinstance(names, str | int) else [str(name) for name in names]
        unknown = [str(name) for name in names if str(name) not in self._cells.index]
        if unknown:
            raise AbsentError(
                f"rollout {unknown[0]!r} is not in the store, which holds {_some(self._cells.ids.tolist())}"
                + (f"; {len(unknown)} of the ids asked for are not" if len(unknown) > 1 else "")
            )
        if not names:
            raise MisuseError("no rollouts are asked for: the ids or the table are empty; ask for less narrow ones")
        return np.array([self._cells.index[str(name)] for name in names], dtype=np.int64)

    def _all_captured(self, component: str, layers: Sequence[int], chosen: Ints) -> None:
        missing = {n: int((self._cells.where(component, n)[0][chosen] < 0).sum()) for n in layers}
        for number in layers:
            if missing[number]:
                try:
                    self._cells.found(component, number, chosen)
                except AbsentError as error:
                    raise AbsentError(
                        f"{error} ({sum(missing.values())} of the {len(layers) * len(chosen)} rollouts x layers asked "
                        f"for are not captured; store.captured({component!r}) shows which are)"
                    ) from None

    def _tokens_of(
        self,
        chosen: Ints,
        *,
        segment: str | Sequence[str] | None = None,
        role: str | Sequence[str] | None = None,
        turn: int | Sequence[int] | None = None,
        positions: slice | None = None,
    ) -> Axis:
        counts = self._cells.counts[chosen]
        axis = Axis.of(chosen, np.zeros(len(chosen), np.int64), counts)
        if segment is not None:
            axis = self._in_segment(axis, _codes("segment", segment, SEGMENTS))
        if positions is not None:
            axis = _at(axis, self._cells.counts, positions)
        if role is not None:
            wanted = [ROLES[code] for code in sorted(_codes("role", role, ROLES))]
            axis = self._with(axis, "role", wanted)
        if turn is not None:
            axis = self._with(axis, "turn", np.atleast_1d(np.asarray(turn, dtype=np.int64)).tolist())
        return axis

    def _with(self, axis: Axis, coordinate: str, values: list[Any]) -> Axis:
        return axis.take(np.flatnonzero(np.isin(self._coordinate(coordinate, axis).values, values)))

    def _in_segment(self, axis: Axis, codes: set[int]) -> Axis:
        if len(codes) == len(SEGMENTS):
            return axis
        ends = self._cells.column("prompt_end")[axis.rollout]
        return axis.within(axis.start, ends) if 0 in codes else axis.within(ends, axis.stop)

    def _kept(self, where: Where, axis: Axis) -> Ints:
        keep = where(self._wrap({}, axis, ()))
        keep = np.asarray(keep.values if isinstance(keep, xr.DataArray | xr.Variable) else keep)
        if keep.dtype != np.bool_ or keep.shape != (axis.n_tokens,):
            raise MisuseError(
                f"where returned {keep.dtype} of shape {keep.shape} for {axis.n_tokens} tokens; return one bool per "
                "token, like lambda tokens: tokens.position < 5"
            )
        return np.flatnonzero(keep)

    # -- wrapping --------------------------------------------------------------------------------------------------

    def _coordinate(self, name: str, axis: Axis) -> xr.Variable:
        return TokenVariable(("token",), _read_once(lazy.TokenArray(self._cells, name, axis=axis)))

    def _wrap(self, arrays: Mapping[str, Any], axis: Axis, layers: Sequence[int]) -> xr.Dataset:
        """Return lazy arrays with the coordinates of their tokens as a Dataset."""
        chunk = max((getattr(a, "chunk_tokens", 1024) for a in arrays.values()), default=1024)
        index = RolloutIndex(self._cells.ids, axis).compact()
        coords: dict[str, Any] = {name: self._coordinate(name, axis) for name in lazy.COORDINATES if name != "rollout"}
        if layers:
            coords["layer"] = ("layer", np.asarray(layers, dtype=np.int32))
        variables, sizes = {}, dict[str, int]()
        for name, array in arrays.items():
            dims: tuple[str, ...] = ("token", "layer")
            if len(array.shape) > 2:
                hidden = array.hidden if sizes.get(array.hidden, array.shape[2]) == array.shape[2] else f"{name}_hidden"
                sizes[hidden] = array.shape[2]
                dims = (*dims, hidden)
            preferred = dict(zip(dims, (chunk, 1, *array.shape[2:]), strict=True))
            variables[name] = xr.Variable(dims, _read_once(array), encoding={"preferred_chunks": preferred})
        dataset = xr.Dataset(variables, coords=coords, attrs={"store": str(self.path)})
        return dataset.assign_coords(xr.Coordinates.from_xindex(index))


def _read_once(array: Any) -> Any:
    """Return an array that reads when its values are used, and then keeps them, as xarray's own backends do."""
    lazily: Any = indexing.LazilyIndexedArray(array)
    return indexing.MemoryCachedArray(indexing.CopyOnWriteArray(lazily))  # type: ignore[no-untyped-call]


def _codes(what: str, asked: str | Sequence[str], known: Sequence[str]) -> set[int]:
    names = [asked] if isinstance(asked, str) else list(asked)
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise MisuseError(f"{what} {unknown[0] if unknown else names!r} is not known; choose from {', '.join(known)}")
    return {known.index(name) for name in names}


def _at(axis: Axis, counts: Ints, positions: slice) -> Axis:
    """Return the tokens at some positions of each rollout."""
    step = 1 if positions.step is None else int(positions.step)
    if step < 1:
        raise MisuseError(f"positions {positions} goes backwards; give a positive step and reverse the result")
    n = counts[axis.rollout]

    def place(bound: int | None, default: Ints) -> Ints:
        if bound is None:
            return default
        return np.clip(n + bound if bound < 0 else np.full_like(n, bound), 0, n)

    first = place(positions.start, np.zeros_like(n))
    if step > 1:
        offset = axis.positions() - axis.spread(first)
        last = axis.spread(place(positions.stop, n))
        return axis.take(np.flatnonzero((offset >= 0) & (offset % step == 0) & (axis.positions() < last)))
    return axis.within(first, place(positions.stop, n))


def _some(names: Sequence[str], most: int = 8) -> str:
    listed = ", ".join(names[:most]) or "no rollouts"
    return listed if len(names) <= most else f"{listed} and {len(names) - most} more"
