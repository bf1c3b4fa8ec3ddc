"""Where calibration gets its rows from: a store or an array, as a table of rollouts and pieces of their tokens.

A store gives whole rollouts and what was kept of them at capture; an array gives the tokens that it holds. A row is a
rollout's place in a source's table, a segment 0 for its prompt and 1 for its response.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, TypeVar

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray
from xarray.core import indexing

import datastore
from datastore.axis import Axis
from datastore.errors import AbsentError, MisuseError
from datastore.lazy import ComponentArray, NormArray
from datastore.schema import SEGMENTS
from datastore.stats import Moments
from datastore.stream import Block, Span

__all__ = ["ArrayRows", "Kept", "Memory", "Piece", "Rows", "Run", "StoreRows"]

R = TypeVar("R")
Work = Callable[[NDArray[Any], "list[Piece]"], R]
Memory = dict[str, NDArray[Any]]
"""What statistics are read into, by name."""
Run = tuple[int, int, int]
"""A row, and the first and the last position (half-open) in its rollout."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of a block that are of one segment of one rollout; `whole` where they are all the segment there is."""

    row: int
    segment: int
    rows: slice
    whole: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What was kept at capture for some rows at one layer.

    Attributes
    ----------
    by_row : iterator of (rows, Moments)
        Of rows that are kept by themselves, some at a time: moments (row, segment, hidden), valid until the next.
    together : list of (segment, Moments)
        Sums of captures as a whole.
    summed : list of int
        The rows of those captures.
    unknown : list of int
        Rows that only a pass over the data answers for.
    """

    by_row: Iterator[tuple[list[int], Moments]]
    together: list[tuple[int, Moments]]
    summed: list[int]
    unknown: list[int]


class Rows(Protocol):
    """One source of rows. A row is a place in `table`, which has `prompt` and `response` tokens and `token_sha256`."""

    table: pd.DataFrame
    layers: tuple[int, ...]
    width: int
    itemsize: int
    component: str

    def unkept(self, layer: int, rows: Sequence[int]) -> list[int]:
        """Return those of some rows of which nothing was kept by themselves."""

    def in_order(self, layer: int, rows: Sequence[int]) -> list[int]:
        """Return some rows in the order that their tokens lie in."""

    def kept(self, layer: int, rows: Sequence[int], *, memory: Memory | None = None) -> Kept:
        """Return the statistics kept for some rows; with `memory`, each part of `by_row` is read into it again."""

    def means(self, layer: int, rows: Sequence[int]) -> Iterator[tuple[int, NDArray[np.float64]]]:
        """Yield the means (segment, hidden) of those rows that are kept by themselves."""

    def norms(self, layer: int, rows: Sequence[int]) -> NDArray[np.float32]:
        """Return the norms kept for the tokens of some rows, end to end."""

    def peek(self, layer: int, runs: Sequence[Run]) -> list[NDArray[Any]]:
        """Return the values of short runs of tokens, each by itself; none where that is no quicker than a pass."""

    def map(self, work: Work[R], layer: int, rows: Sequence[int], *, memory: int) -> Iterator[tuple[int, R]]:
        """Call `work` on every block of some rows' tokens; yield tokens and result in a fixed order."""

    def describe(self) -> dict[str, Any]:
        """Return where the rows come from, as JSON."""


class StoreRows:
    """Rollouts of a store, whole.

    Parameters
    ----------
    store : Store
    component : str
    rollouts : ids, optional
        Default all.
    layers : sequence of int, optional
        Default those that are captured for all the rollouts.

    Raises
    ------
    AbsentError
        A rollout, or a layer of one, is not captured.
    """

    def __init__(
        self,
        store: datastore.Store,
        component: str,
        *,
        rollouts: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        captured = store.captured(component)
        table = store.rollouts if rollouts is None else store.rollouts.loc[_known(rollouts, store)]
        if rollouts is None:
            table = table[captured.any(axis=1).reindex(table.index)]
        self.table = pd.DataFrame(
            {
                "prompt": table["prompt_end"],
                "response": table["n_tokens"] - table["prompt_end"],
                "token_sha256": table["token_sha256"],
            }
        )
        self.store, self.component = store, component
        here = captured.loc[self.table.index]
        held, some = (here.columns[flags].tolist() for flags in (here.all(), here.any()))
        self.layers = tuple(int(n) for n in (held if layers is None else layers))
        if not self.layers:
            raise AbsentError(
                f"{component} is captured at no layer that all {len(here)} rollouts have; "
                "choose rollouts that were captured alike, or name --layers"
            )
        self.left_out = tuple(int(n) for n in some if int(n) not in self.layers)
        self.ids = [str(name) for name in self.table.index]
        self._row = {name: row for row, name in enumerate(self.ids)}
        self._prompt = self.table["prompt"].to_numpy(np.int64)
        self._counts = self.table[["prompt", "response"]].to_numpy(np.int64)
        spec = store.cells.components[component]
        self.width, self.itemsize = spec.width, spec.itemsize

    def unkept(self, layer: int, rows: Sequence[int]) -> list[int]:
        """Return those of some rows of which nothing was kept by themselves."""
        names = [self.ids[row] for row in rows]
        alone = set(self.store.statistics(self.component, layer, rollouts=names).per_rollout)
        return [row for row in rows if self.ids[row] not in alone]

    def in_order(self, layer: int, rows: Sequence[int]) -> list[int]:
        """Return some rows in the order of captures and their token axes."""
        cells = self.store.cells
        holder, place = cells.where(self.component, layer)
        at = {row: cells.index[self.ids[row]] for row in rows}
        return sorted(rows, key=lambda row: (int(holder[at[row]]), int(place[at[row]])))

    def kept(self, layer: int, rows: Sequence[int], *, memory: Memory | None = None) -> Kept:
        """Return the statistics kept for some rows."""
        names = [self.ids[row] for row in rows]
        found = self.store.statistics(self.component, layer, rollouts=names)
        unknown = sorted(self._row[name] for name in found.needs_pass)
        alone = {self._row[name] for name in found.per_rollout}
        tables = found.tables(memory=memory)
        return Kept(
            by_row=(([self._row[name] for name in table.rollouts], table.moments) for table in tables),
            together=[(SEGMENTS.index(segment), moments) for _, segment, moments in found.together()],
            summed=sorted(set(rows) - alone - set(unknown)),
            unknown=unknown,
        )

    def means(self, layer: int, rows: Sequence[int]) -> Iterator[tuple[int, NDArray[np.float64]]]:
        """Yield the means (segment, hidden) of those rows that are kept by themselves."""
        found = self.store.statistics(self.component, layer, rollouts=[self.ids[row] for row in rows])
        for names, values in found.tables(("sum", "count")):
            with np.errstate(all="ignore"):
                means = values["sum"] / values["count"]
            yield from zip((self._row[name] for name in names), means, strict=True)

    def norms(self, layer: int, rows: Sequence[int]) -> NDArray[np.float32]:
        """Return the norms kept for the tokens of some rows, end to end."""
        places = np.array([self.store.cells.index[self.ids[row]] for row in rows], np.int64)
        axis = Axis.of(places, np.zeros_like(places), self._counts[list(rows)].sum(axis=1))
        array = NormArray(self.store.cells, self.component, layers=[layer], axis=axis)
        values: NDArray[np.float32] = array[indexing.BasicIndexer((slice(None), 0))]
        return values

    def peek(self, layer: int, runs: Sequence[Run]) -> list[NDArray[Any]]:
        """Return the values of short runs of tokens, each by itself, read from the chunks that hold them."""
        places = np.array([self.store.cells.index[self.ids[row]] for row, _, _ in runs], np.int64)
        bounds = np.array([run[1:] for run in runs], np.int64).reshape(len(runs), 2)
        axis = Axis(places, bounds[:, 0], bounds[:, 1])
        array = ComponentArray(self.store.cells, self.component, layers=[layer], axis=axis)
        values = array[indexing.BasicIndexer((slice(None), 0, slice(None)))]
        return [values[low:high] for low, high in pairwise(axis.edges.tolist())]

    def map(self, work: Work[R], layer: int, rows: Sequence[int], *, memory: int) -> Iterator[tuple[int, R]]:
        """Call `work` in the threads that decode; yield tokens and result in the order of captures and tokens."""

        def on(block: Block) -> R:
            return work(block.values, self._pieces(block))

        ids = [self.ids[row] for row in rows]
        found = self.store.map_blocks(on, self.component, layers=layer, rollouts=ids, memory=memory)
        with closing(found):  # type: ignore[type-var]
            for span, result in found:
                yield span.tokens.stop - span.tokens.start, result

    def _pieces(self, span: Span) -> list[Piece]:
        pieces = []
        for name, positions, rows in self.store.rows_of(span):
            row = self._row[name]
            end = int(self._prompt[row])
            for segment, low, high in (
                (0, positions.start, min(positions.stop, end)),
                (1, max(positions.start, end), positions.stop),
            ):
                if low < high:
                    at = slice(rows.start + low - positions.start, rows.start + high - positions.start)
                    pieces.append(Piece(row, segment, at, high - low == self._counts[row, segment]))
        return pieces

    def describe(self) -> dict[str, Any]:
        """Return where the rows come from, as JSON."""
        names = ["model", "revision", "created"]
        captures = {str(n): dict(row) for n, row in self.store.captures[names].iterrows()}
        return {"store": str(self.store.path), "captures": captures, "layers_left_out": list(self.left_out)}


def _known(rollouts: Sequence[str], store: datastore.Store) -> list[str]:
    names = [str(name) for name in rollouts]
    unknown = [name for name in names if name not in store.rollouts.index]
    if unknown or not names:
        raise AbsentError(
            f"{len(unknown)} of {len(names)} rollouts asked for are not in {store.path}"
            f"{': ' + unknown[0] if unknown else ''}; it holds {len(store.rollouts)}, store.rollouts names them"
        )
    return list(dict.fromkeys(names))


class ArrayRows:
    """What `Store.select` returned, or any array like it: (token, layer, hidden) with `rollout` and `segment`.

    Nothing was kept for such rows, so all of it is read.

    Raises
    ------
    MisuseError
        The array is none of that.
    """

    def __init__(self, array: xr.DataArray) -> None:
        lacking = {"token", "layer"} - set(array.dims) | {"rollout", "segment", "layer"} - set(array.coords)
        if "layer" in array.coords and array.ndim == 2 and lacking == {"layer"}:
            array, lacking = array.expand_dims("layer", axis=1), set()
        if lacking or array.ndim != 3:
            raise MisuseError(
                f"an array of dimensions {array.dims} lacks {', '.join(sorted(lacking)) or 'hidden'} to be calibrated; "
                "give what store.select(...) returns, whose layer is a coordinate"
            )
        self.array = array.transpose("token", "layer", ...)
        self.component = "residual" if array.name is None else str(array.name)
        self.layers = tuple(int(n) for n in np.atleast_1d(array["layer"].values))
        self.width, self.itemsize = int(self.array.shape[2]), int(self.array.dtype.itemsize)
        rollout, names = pd.factorize(np.asarray(array["rollout"].values).astype(str))
        segment = np.asarray(array["segment"].values) == SEGMENTS[1]
        edges = np.flatnonzero((np.diff(rollout) != 0) | (segment[1:] != segment[:-1])) + 1
        runs = pairwise([0, *edges.tolist(), len(rollout)])
        self._runs = [(int(rollout[a]), int(segment[a]), a, b) for a, b in runs if a < b]
        self._counts = np.zeros((len(names), 2), np.int64)
        np.add.at(self._counts, (rollout, segment.astype(np.int64)), 1)
        ids = np.asarray(array["token_id"].values if "token_id" in array.coords else np.zeros(len(rollout)), "<i4")
        sha = [hashlib.sha256(ids[rollout == i].tobytes()).hexdigest() for i in range(len(names))]
        table = {"prompt": self._counts[:, 0], "response": self._counts[:, 1], "token_sha256": sha}
        self.table = pd.DataFrame(table, index=pd.Index(names.tolist(), name="rollout_id"))

    def unkept(self, layer: int, rows: Sequence[int]) -> list[int]:
        """Return all of them."""
        return list(rows)

    def in_order(self, layer: int, rows: Sequence[int]) -> list[int]:
        """Return them as they are."""
        return list(rows)

    def kept(self, layer: int, rows: Sequence[int], *, memory: Memory | None = None) -> Kept:
        """Return that nothing is kept."""
        return Kept(by_row=iter(()), together=[], summed=[], unknown=list(rows))

    def means(self, layer: int, rows: Sequence[int]) -> Iterator[tuple[int, NDArray[np.float64]]]:
        """Yield nothing."""
        return iter(())

    def norms(self, layer: int, rows: Sequence[int]) -> NDArray[np.float32]:
        """Return no norms, for no row."""
        return np.zeros(0, np.float32)

    def peek(self, layer: int, runs: Sequence[Run]) -> list[NDArray[Any]]:
        """Return nothing: what a piece of an array costs to make is not known here."""
        return []

    def map(self, work: Work[R], layer: int, rows: Sequence[int], *, memory: int) -> Iterator[tuple[int, R]]:
        """Call `work` on runs of tokens, as many at a time as the allowance holds."""
        wanted, at = set(rows), self.layers.index(layer)
        most = max(1, memory // (4 * self.width * self.array.dtype.itemsize))
        for row, segment, start, stop in self._runs:
            if row not in wanted:
                continue
            for low in range(start, stop, most):
                high = min(low + most, stop)
                values = np.asarray(self.array[low:high, at].values)
                whole = high - low == self._counts[row, segment]
                yield high - low, work(values, [Piece(row, segment, slice(0, high - low), whole)])

    def describe(self) -> dict[str, Any]:
        """Return where the rows come from, as JSON."""
        return {"store": self.array.attrs.get("store"), "array": [str(dim) for dim in self.array.dims]}
