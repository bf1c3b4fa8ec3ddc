"""Score results: how `scores/000N` is laid out, which of its columns still count, and reading them as one Dataset.

A result holds columns over the tokens of its rollouts: scores along directions, token norms, and the activations at
single dimensions. It is never changed; a later one adds directions or rollouts, and a column counts for a rollout as
long as the capture that it was computed from does.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray
from xarray.core import indexing

from datastore import storage
from datastore.axis import Axis
from datastore.cells import Cells
from datastore.codec import encode
from datastore.errors import AbsentError
from datastore.index import RolloutIndex
from datastore.layout import Ragged
from datastore.lazy import COORDINATES, TokenArray
from datastore.plainfile import MOST_TABLE
from datastore.schema import Codec

__all__ = [
    "CHUNK",
    "IDENTITY",
    "Column",
    "Place",
    "Result",
    "create_result",
    "known_columns",
    "load_results",
    "read_scores",
    "span",
    "write_columns",
]

CHUNK = 8192
"""Tokens a chunk of the result arrays; a chunk holds all columns, and is written by one task."""
IDENTITY = ("trait", "component", "layer", "method", "vector_position")
"""What names a direction; where several hashes share them, the latest result's counts."""
_COLUMNS = ("score", "norm", "dim")
_NUMBERS = ("vector_norm", "baseline", "delta", "coefficient")
"""Of the table of directions: NaN where unknown, which JSON writes as null."""


class Place(NamedTuple):
    """Where activations are taken: a component at a layer."""

    component: str
    layer: int


class Column(NamedTuple):
    """One column of results.

    Attributes
    ----------
    kind : str
        `score`, `norm` or `dim`.
    place : Place
    key : str
        The sha256 of a direction, the number of a dimension, nothing for a norm.
    """

    kind: str
    place: Place
    key: str = ""


@dataclass(frozen=True, eq=False, kw_only=True)
class Result:
    """One committed result as its metadata describes it; no column is read.

    Attributes
    ----------
    number : int
    path : Path
    attrs : mapping
    rollout_ids, token_sha256 : tuple of str
        One for each row.
    counts : ndarray of int64, shape (row,)
        Tokens of each rollout.
    places : tuple of Place
    capture : ndarray of int64, shape (row, place)
        Number of the capture that a rollout's activations were read from, -1 where it has no column there.
    columns : mapping of kind to tuple of Column
        In the order of the arrays' columns.
    """

    number: int
    path: Path
    attrs: Mapping[str, Any]
    rollout_ids: tuple[str, ...]
    token_sha256: tuple[str, ...]
    counts: NDArray[np.int64]
    places: tuple[Place, ...]
    capture: NDArray[np.int64]
    columns: Mapping[str, tuple[Column, ...]]

    @cached_property
    def ragged(self) -> Ragged:
        """Rollout <-> token range on the token axis."""
        return Ragged(self.counts)

    @cached_property
    def directions(self) -> pd.DataFrame:
        """The table of the directions, a row for each column of `score`."""
        names, rows = self.attrs["direction_columns"], self.attrs["directions"]
        columns = {name: [row[i] for row in rows] for i, name in enumerate(names)}
        return pd.DataFrame({n: np.array(v, np.float64) if n in _NUMBERS else v for n, v in columns.items()})

    def vectors(self, component: str) -> NDArray[np.float32]:
        """Unit vectors of the component's directions, shape (direction, hidden), in the order of the table."""
        found: NDArray[np.float32] = storage.read_array(self.path / "vectors" / component, most=MOST_TABLE)
        return found

    def counted_rows(self, cells: Cells, place: Place) -> list[int]:
        """Return the rows whose activations at a place are still those that the columns were computed from."""
        at = self.places.index(place)
        keys = self.attrs["captures"]
        holder, held_at = cells.where(place.component, place.layer)
        rows = []
        for row, name in enumerate(self.rollout_ids):
            index = cells.index.get(name, -1)
            if index < 0 or holder[index] < 0:
                continue
            capture = cells.captures[holder[index]]
            same = capture.attrs["plan"] == keys.get(str(self.capture[row, at]))
            if same and capture.token_sha256[held_at[index]] == self.token_sha256[row]:
                rows.append(row)
        return rows


# -- writing -----------------------------------------------------------------------------------------------------------


def create_result(
    path: Path,
    *,
    attrs: Mapping[str, Any],
    rollouts: Mapping[str, tuple[str, int]],
    capture: NDArray[np.int64],
    columns: Sequence[Column],
    directions: pd.DataFrame,
    vectors: Mapping[str, NDArray[np.float32]],
) -> None:
    """Lay a result down with its tables filled and its columns empty, for tasks to fill chunk by chunk.

    Parameters
    ----------
    path : Path
        Aside of the store; the caller renames it.
    attrs : mapping
        JSON: `captures` (number to plan key), selection, inputs and provenance.
    rollouts : mapping of id to (token_sha256, tokens)
        In the order of the token axis.
    capture : int64 array of shape (rollouts, places)
        Places in order of first appearance in `columns`.
    columns : sequence of Column
    directions : DataFrame
        A row for each score column, in order.
    vectors : mapping of component to float32 array (direction, hidden)
    """
    places = list(dict.fromkeys(column.place for column in columns))
    by_kind = {kind: [column for column in columns if column.kind == kind] for kind in _COLUMNS}
    tables = {
        "places": [list(place) for place in places],
        "columns": {kind: [[places.index(c.place), c.key] for c in mine] for kind, mine in by_kind.items()},
        "direction_columns": list(directions.columns),
        "directions": _records(directions),
    }
    storage.create_group(path, {**attrs, **tables, "kind": "scores"})
    storage.create_group(path / "rollouts", {})
    _text(path / "rollouts" / "rollout_id", list(rollouts), "row")
    _text(path / "rollouts" / "token_sha256", [sha for sha, _ in rollouts.values()], "row")
    counts = np.asarray([n for _, n in rollouts.values()], np.int64)
    storage.write_array(path / "rollouts" / "n_tokens", counts, dims=("row",))
    storage.write_array(path / "rollouts" / "capture", capture, dims=("row", "place"))
    storage.create_group(path / "vectors", {})
    for component, values in vectors.items():
        storage.write_array(path / "vectors" / component, values, dims=("direction", f"{component}_hidden"))
    for kind, mine in by_kind.items():
        storage.create_array(
            path / kind,
            shape=(int(counts.sum()), len(mine)),
            dtype="float32",
            chunks=(CHUNK, max(1, len(mine))),
            dims=("token", "direction" if kind == "score" else f"{kind}_column"),
        )


def write_columns(path: Path, kind: str, values: NDArray[np.float32], *, start: int) -> None:
    """Write whole chunks of a result's columns of one kind, without zarr-python, whose event loop takes longer.

    Parameters
    ----------
    path : Path
        The result.
    kind : str
    values : float32 array of shape (tokens, columns)
        All columns; whole chunks, but for the last of the result.
    start : int
        The first token, where a chunk begins.
    """
    size = int(storage.array_metadata(path / kind)["chunk_grid"]["configuration"]["chunk_shape"][0])
    for at in range(0, len(values), size):
        chunk = values[at : at + size]
        if len(chunk) < size:
            chunk = np.concatenate([chunk, np.full((size - len(chunk), values.shape[1]), np.nan, np.float32)])
        file = storage.chunk_file(path / kind, ((start + at) // size, 0))
        file.parent.parent.mkdir(exist_ok=True)  # not all of its parents: a store that is gone is not brought back
        file.parent.mkdir(exist_ok=True)
        storage.write_atomic(file, encode(chunk, Codec()))


def _text(path: Path, values: Sequence[str], dim: str) -> None:
    storage.write_array(path, np.asarray(list(values), dtype=object), dims=(dim,))


def _records(table: pd.DataFrame) -> list[list[Any]]:
    """Return the rows of a table as JSON values, null for what is missing."""
    columns = [
        [None if lacks else v for v, lacks in zip(table[name].tolist(), table[name].isna(), strict=True)]
        for name in table.columns
    ]
    return [list(row) for row in zip(*columns, strict=True)]


# -- which columns there are -------------------------------------------------------------------------------------------


def load_results(store: Path) -> list[Result]:
    """Read the metadata of every committed score result of a store, ascending."""
    return [_load(store / "scores" / f"{n:04d}", n) for n in storage.numbered(store / "scores")]


def _load(path: Path, number: int) -> Result:
    attrs = storage.attributes(path)
    places = [Place(str(component), int(layer)) for component, layer in attrs["places"]]
    columns = {
        kind: tuple(Column(kind, places[place], str(key)) for place, key in attrs["columns"][kind]) for kind in _COLUMNS
    }
    return Result(
        number=number,
        path=path,
        attrs=attrs,
        rollout_ids=tuple(str(v) for v in storage.read_array(path / "rollouts" / "rollout_id")),
        token_sha256=tuple(str(v) for v in storage.read_array(path / "rollouts" / "token_sha256")),
        counts=storage.read_array(path / "rollouts" / "n_tokens").astype(np.int64),
        places=tuple(places),
        capture=storage.read_array(path / "rollouts" / "capture").astype(np.int64),
        columns=columns,
    )


def known_columns(results: Iterable[Result], cells: Cells) -> dict[Column, set[str]]:
    """Return, for every column that any result holds, the rollouts for which it still counts."""
    known: dict[Column, set[str]] = {}
    for result in results:
        for place in result.places:
            names = {result.rollout_ids[row] for row in result.counted_rows(cells, place)}
            for column in (column for kind in _COLUMNS for column in result.columns[kind] if column.place == place):
                known.setdefault(column, set()).update(names)
    return known


# -- reading -----------------------------------------------------------------------------------------------------------


def read_scores(
    results: Sequence[Result],
    cells: Cells,
    *,
    rollouts: Sequence[str] | None = None,
    traits: Sequence[str] | None = None,
    sha256: Sequence[str] | None = None,
) -> xr.Dataset:
    """Read the scores that count as one labelled Dataset.

    Parameters
    ----------
    results : sequence of Result
        Ascending; where two hold a column for a rollout the later counts.
    cells : Cells
        The captures that count.
    rollouts : sequence of str, optional
        Default all that have a score.
    traits : sequence of str, optional
        `category/name` or just `name`; default all.
    sha256 : sequence of str, optional
        Exactly these directions, in this order.

    Returns
    -------
    Dataset
        `score` and `norm` (token, direction), float32, NaN where a rollout has no such column; `dim_value`
        (token, dim_column), the activations at single dimensions, and `dim_unit` (dim_column, direction), the unit
        vectors there, 0 where the direction is of another place. The table of directions is coordinates along
        `direction`, where `vector_position` is the position that a direction was fitted over.

    Raises
    ------
    AbsentError
        If there are no such scores.
    """
    chosen = _chosen(results, traits=traits, sha256=sha256)
    wanted = [Column("score", Place(str(c), int(n)), str(sha)) for c, n, sha in _keys(chosen)]
    places = list(dict.fromkeys(column.place for column in wanted))
    found = _Found(results, cells, places)
    names = list(rollouts) if rollouts is not None else found.rollouts(wanted)
    missing = [name for name in names if name not in found.tokens]
    if missing or not names:
        raise AbsentError(
            f"there are no scores of {len(missing) or 'any'} rollouts{_some(missing)} along these directions; "
            "project them first (python -m project STORE --vectors DIR)"
        )
    dims = sorted(
        {c for r in results for c in r.columns["dim"] if c.place in places}, key=lambda c: (c.place, int(c.key))
    )
    norms = found.read([Column("norm", place) for place in places], names)
    score = found.read(wanted, names)
    return _dataset(
        score=score,
        norm=norms[:, [places.index(column.place) for column in wanted]],
        dim_value=found.read(dims, names),
        dim_unit=found.units(dims, wanted),
        directions=chosen,
        dims=dims,
        index=found.index(names),
        token_coords=found.token_coords(names),
    )


def _keys(table: pd.DataFrame) -> list[tuple[Any, ...]]:
    return list(zip(table["component"], table["layer"], table["sha256"], strict=True))


def _chosen(results: Sequence[Result], *, traits: Sequence[str] | None, sha256: Sequence[str] | None) -> pd.DataFrame:
    tables = [result.directions for result in results if len(result.directions)]
    if not tables:
        raise AbsentError("the store holds no scores; compute them with python -m project STORE --vectors DIR")
    every = tables[0] if len(tables) == 1 else pd.concat(tables, ignore_index=True)
    if sha256 is not None:
        last = every.drop_duplicates(["sha256", "component", "layer"], keep="last").set_index("sha256", drop=False)
        absent = [sha for sha in sha256 if sha not in last.index]
        if absent:
            raise AbsentError(
                f"{len(absent)} of {len(sha256)} directions have no scores as they are now (sha256 {absent[0][:12]}): "
                "they are new, or their files changed after they were scored; project them again"
            )
        return last.loc[list(dict.fromkeys(sha256))].reset_index(drop=True)
    latest = every.drop_duplicates(list(IDENTITY), keep="last")
    if traits is not None:
        hit = latest["trait"].isin(traits) | latest["trait"].str.rpartition("/")[2].isin(traits)
        if not hit.any():
            raise AbsentError(
                f"there are no scores of {', '.join(traits)}, but of {', '.join(sorted(set(latest['trait'])))}; "
                "project the traits first"
            )
        latest = latest[hit]
    return latest.sort_values(["trait", "layer"], kind="stable").reset_index(drop=True)


class _Found:
    """Which result holds which column for which rollout."""

    def __init__(self, results: Sequence[Result], cells: Cells, places: Sequence[Place]) -> None:
        self._results, self._cells = results, cells
        self._rows = {
            (i, place): result.counted_rows(cells, place)
            for i, result in enumerate(results)
            for place in result.places
            if place in places
        }
        self.tokens = {
            result.rollout_ids[row]: int(result.counts[row])
            for (i, _), rows in self._rows.items()
            for result in [results[i]]
            for row in rows
        }

    def rollouts(self, wanted: Sequence[Column]) -> list[str]:
        names = {
            result.rollout_ids[row]
            for i, result in enumerate(self._results)
            for column in result.columns["score"]
            if column in wanted
            for row in self._rows[i, column.place]
        }
        return [name for name in self._cells.index if name in names]

    def read(self, columns: Sequence[Column], names: Sequence[str]) -> NDArray[np.float32]:
        """Fill (tokens of names, columns), the later result over the earlier."""
        starts = dict(zip(names, np.cumsum([0, *(self.tokens[n] for n in names)])[:-1], strict=True))
        out = np.full((sum(self.tokens[name] for name in names), len(columns)), np.nan, np.float32)
        for i, result in enumerate(self._results):
            for place in dict.fromkeys(column.place for column in columns):
                kinds = {column.kind for column in columns}
                rows = [row for row in self._rows.get((i, place), []) if result.rollout_ids[row] in starts]
                for kind in kinds:
                    self._copy(result, kind, place=place, rows=rows, columns=columns, starts=starts, out=out)
        return out

    @staticmethod
    def _copy(
        result: Result,
        kind: str,
        *,
        place: Place,
        rows: Sequence[int],
        columns: Sequence[Column],
        starts: Mapping[str, int],
        out: NDArray[np.float32],
    ) -> None:
        mine = {column: j for j, column in enumerate(result.columns[kind]) if column.place == place}
        pairs = [(mine[column], j) for j, column in enumerate(columns) if column in mine]
        if not pairs or not rows:
            return
        source, target = span([a for a, _ in pairs]), span([b for _, b in pairs])
        every = slice(0, len(result.columns[kind]))
        for first, last in _some_at_a_time(result.ragged.tokens_of(rows)):
            values = storage.read_region(result.path / kind, (slice(first, last), every))[:, source]
            for piece in result.ragged.pieces(first, last):
                at = starts[result.rollout_ids[piece.row]] + piece.start - result.ragged.range(piece.row)[0]
                out[at : at + piece.stop - piece.start, target] = values[piece.start - first : piece.stop - first]

    def units(self, dims: Sequence[Column], wanted: Sequence[Column]) -> NDArray[np.float32]:
        """Unit vectors at the dimensions, shape (dims, directions)."""
        out = np.zeros((len(dims), len(wanted)), np.float32)
        read: dict[tuple[int, str], NDArray[np.float32]] = {}
        for j, column in enumerate(wanted):
            mine = [i for i, dim in enumerate(dims) if dim.place == column.place]
            if not mine:
                continue
            result = next(r for r in reversed(self._results) if column in r.columns["score"])
            same = [c for c in result.columns["score"] if c.place.component == column.place.component]
            key = (result.number, column.place.component)
            if key not in read:
                read[key] = result.vectors(column.place.component)
            out[mine, j] = read[key][same.index(column)][[int(dims[i].key) for i in mine]]
        return out

    def index(self, names: Sequence[str]) -> RolloutIndex:
        """The index of the tokens."""
        return RolloutIndex(self._cells.ids, self._axis(names)).compact()

    def token_coords(self, names: Sequence[str]) -> dict[str, xr.Variable]:
        """Coordinates of the tokens, from the newest capture of each rollout, read when they are used."""
        axis = self._axis(names)
        arrays = {name: TokenArray(self._cells, name, axis=axis) for name in COORDINATES if name != "rollout"}
        return {name: xr.Variable("token", indexing.LazilyIndexedArray(array)) for name, array in arrays.items()}

    def _axis(self, names: Sequence[str]) -> Axis:
        rollout = np.asarray([self._cells.index[name] for name in names], np.int64)
        return Axis.of(rollout, np.zeros_like(rollout), self._cells.counts[rollout])


def _dataset(
    *,
    score: NDArray[np.float32],
    norm: NDArray[np.float32],
    dim_value: NDArray[np.float32],
    dim_unit: NDArray[np.float32],
    directions: pd.DataFrame,
    dims: Sequence[Column],
    index: RolloutIndex,
    token_coords: Mapping[str, xr.Variable],
) -> xr.Dataset:
    table = {str(name): ("direction", directions[name].to_numpy()) for name in directions.columns}
    named = [directions[name].tolist() for name in ("trait", "layer", "component", "method", "vector_position")]
    labels = [f"{trait}@{layer}" for trait, layer, *_ in zip(*named, strict=True)]
    if len(set(labels)) < len(labels):
        labels = [f"{trait}@{'/'.join(map(str, others))}" for trait, *others in zip(*named, strict=True)]
    placed = {
        "dim_component": ("dim_column", [column.place.component for column in dims]),
        "dim_layer": ("dim_column", np.asarray([column.place.layer for column in dims], np.int64)),
        "dim": ("dim_column", np.asarray([int(column.key) for column in dims], np.int64)),
    }
    return xr.Dataset(
        {
            "score": (("token", "direction"), score),
            "norm": (("token", "direction"), norm),
            "dim_value": (("token", "dim_column"), dim_value),
            "dim_unit": (("dim_column", "direction"), dim_unit),
        },
        coords=xr.Coordinates.from_xindex(index).assign({**token_coords, **table, **placed, "direction": labels}),
    )


def span(columns: list[int]) -> list[int] | slice:
    """Return columns that lie side by side as a slice, which NumPy copies many times faster."""
    side_by_side = columns == list(range(columns[0], columns[0] + len(columns))) if columns else False
    return slice(columns[0], columns[-1] + 1) if side_by_side else columns


def _some_at_a_time(ranges: Sequence[tuple[int, int]], most: int = 4 * CHUNK) -> Iterator[tuple[int, int]]:
    """Cut ranges of tokens where chunks begin, so that a result is not held twice while it is read."""
    for first, last in ranges:
        edges = [first, *range((first // most + 1) * most, last, most), last]
        yield from pairwise(edges)


def _some(names: Sequence[str], most: int = 5) -> str:
    if not names:
        return ""
    return f" ({', '.join(names[:most])}{', ...' if len(names) > most else ''})"
