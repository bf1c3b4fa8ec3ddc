"""The stores that are served, by name, each as it is now; and which directions have scores in one."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
import xarray as xr

import datastore
from datastore.errors import AbsentError, MisuseError
from datastore.query import Store
from datastore.results import sibling_of
from datastore.scores import IDENTITY, Result, load_results, read_scores
from datastore.storage import numbered

__all__ = ["Served", "Shelf", "names_of"]


def names_of(paths: Sequence[Path]) -> list[str]:
    """Return a short name for each store: its directory's, without `.zarr`; a second one of a name gets `-2`.

    Examples
    --------
    >>> names_of([Path("a/run.zarr"), Path("b/run.zarr"), Path("other")])
    ['run', 'run-2', 'other']
    """
    names: list[str] = []
    for path in paths:
        stem = path.absolute().name.removesuffix(".zarr") or "store"
        copies = [stem, *(f"{stem}-{n}" for n in range(2, len(paths) + 2))]
        names.append(next(name for name in copies if name not in names))
    return names


@dataclass(slots=True, kw_only=True)
class Served:
    """One store under its name.

    Attributes
    ----------
    name : str
    path : Path
    beside : Path or None
        A store of results of this one, whose scores count as well.
    """

    name: str
    path: Path
    beside: Path | None = None
    _last: tuple[Store, tuple[Any, ...]] | None = None

    def now(self) -> Store:
        """Return the store as it is now: another one only when something was added to it or taken away.

        Raises
        ------
        DatastoreError
            It is no longer there, or can't be read.
        """
        fresh = datastore.open(self.path)  # cheap: of what did not change nothing is read again
        added = tuple(tuple(numbered(self.path / kind)) for kind in ("labels", "annotations"))
        last = self._last
        if last is None or last[0].cells is not fresh.cells or last[1] != added:
            self._last = last = (fresh, added)
        return last[0]

    def results(self) -> list[Result]:
        """Return the score results that count, ascending; what is computed later counts more."""
        places = [self.path] if self.beside is None else [self.path, self.beside]
        return [result for place in places for result in _results(place, _marks(place / "scores"))]

    def directions(self) -> pd.DataFrame:
        """Return the newest of every direction that has scores, indexed by its label, such as `bs/lying@20`.

        Where two would have one label, component, method and position are added to all.

        Raises
        ------
        AbsentError
            Nothing was scored.
        """
        tables = [result.directions for result in self.results() if len(result.directions)]
        if not tables:
            raise AbsentError(
                f"store {self.name!r} holds no scores; compute them with python -m project STORE --vectors DIR"
            )
        table = pd.concat(tables, ignore_index=True).drop_duplicates(list(IDENTITY), keep="last")
        table = table.sort_values(["trait", "layer"], kind="stable").reset_index(drop=True)
        labels = [f"{row.trait}@{row.layer}" for row in table.itertuples()]
        if len(set(labels)) < len(labels):
            labels = [
                f"{row.trait}@{row.layer}/{row.component}/{row.method}/{row.vector_position}"
                for row in table.itertuples()
            ]
        return table.set_index(pd.Index(labels, name="direction"))

    def scores(self, directions: pd.DataFrame, *, rollouts: Sequence[str] | None = None) -> xr.Dataset:
        """Read the scores along some rows of `directions()`, in that order and under those labels."""
        found = read_scores(
            self.results(), self.now().cells, rollouts=rollouts, sha256=[str(sha) for sha in directions["sha256"]]
        )
        keys = ("sha256", "component", "layer")
        there = list(zip(*(found[key].values.tolist() for key in keys), strict=True))
        wanted = list(zip(*(directions[key].tolist() for key in keys), strict=True))
        kept: xr.Dataset = found.isel(direction=[there.index(key) for key in wanted])
        return kept.assign_coords(direction=directions.index.tolist())

    def pick(
        self,
        *,
        labels: Sequence[str] | None = None,
        traits: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
    ) -> pd.DataFrame:
        """Return the rows of `directions()` that are asked for.

        Raises
        ------
        AbsentError
            One of them is not there; the message lists what is.
        """
        table = self.directions()
        table = _picked(table, table.index, labels, what="directions")
        short = table["trait"].str.rpartition("/")[2]
        known = pd.Index([*table["trait"], *short])
        _all_known(known, traits, what="traits", listed=table["trait"])
        if traits is not None:
            table = table[table["trait"].isin(traits) | short.loc[table.index].isin(traits)]
        return _picked(table, pd.Index(table["layer"]), layers, what="layers")


def _picked(table: pd.DataFrame, values: pd.Index, wanted: Sequence[Any] | None, *, what: str) -> pd.DataFrame:
    _all_known(values, wanted, what=what, listed=values)
    return table if wanted is None else table[values.isin(list(wanted))]


def _all_known(known: pd.Index, wanted: Sequence[Any] | None, *, what: str, listed: Any) -> None:
    unknown = [one for one in wanted or () if one not in known]
    if unknown:
        there = ", ".join(dict.fromkeys(map(str, listed)))
        raise AbsentError(f"there are no scores of {what} {', '.join(map(str, unknown))}, but of {there}")


def _marks(path: Path) -> tuple[tuple[int, int], ...]:
    """What tells the numbered members of a group from others of the same numbers."""
    return tuple((n, (path / f"{n:04d}" / "zarr.json").stat().st_mtime_ns) for n in numbered(path))


@lru_cache(maxsize=32)
def _results(path: Path, marks: tuple[tuple[int, int], ...]) -> list[Result]:
    return load_results(path) if marks else []


@dataclass(frozen=True, slots=True)
class Shelf:
    """All stores that are served.

    Attributes
    ----------
    served : tuple of Served
        In the order given; a store of results of another one here is not served by itself, its scores are added.

    Raises
    ------
    MisuseError
        There is none.
    """

    served: tuple[Served, ...] = field(default=())

    @classmethod
    def of(cls, stores: Sequence[Store]) -> "Shelf":
        """Name the stores and put results beside the stores that they are of."""
        paths = list(dict.fromkeys(store.path.resolve() for store in stores))
        of = {path: owner.resolve() for path in paths if (owner := sibling_of(path)) and owner.resolve() in paths}
        beside = {owner: path for path, owner in of.items()}
        own = [path for path in paths if path not in of]
        if not own:
            raise MisuseError("no store is given, so there is nothing to serve; give the path of one")
        pairs = zip(names_of(own), own, strict=True)
        return cls(tuple(Served(name=name, path=path, beside=beside.get(path)) for name, path in pairs))

    def named(self, name: str | None) -> Served:
        """Return the store of a name; None means the only one.

        Raises
        ------
        AbsentError, MisuseError
            There is none of that name, or several and none is named.
        """
        there = ", ".join(one.name for one in self.served)
        if name is None:
            if len(self.served) > 1:
                raise MisuseError(f"several stores are served and none is named; add store=NAME, one of {there}")
            return self.served[0]
        for one in self.served:
            if one.name == name:
                return one
        raise AbsentError(f"no store named {name!r} is served; there are {there}")
