"""What the page reads of one store: only what is shown, when it is shown, kept while it is looked at. No drawing."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from threading import RLock
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

import datastore
from datastore.cells import snapshot
from datastore.errors import AbsentError
from datastore.query import Store
from datastore.scores import Column, Place, known_columns, load_results, read_scores
from datastore.storage import numbered
from experiments.direction import Direction
from project.cleaning import top_dims
from view.comparing import fork_of, pairs, reference_of
from view.treatment import Treatment, treated

__all__ = ["Mark", "Model", "Models"]

R = TypeVar("R")
MOST_KEPT = 32
"""Results that are kept at once."""
RESULTS = ("labels", "annotations", "scores", "calibration")
TABLE = ("trait", "layer", "component", "method", "vector_position")


class Mark(NamedTuple):
    """A labelled span of a rollout, half-open."""

    start: int
    stop: int
    label: str


class Model:
    """One store as it was when opened.

    Parameters
    ----------
    store : Store
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._mark = _mark(store.path)
        self._results = load_results(store.path)
        self.tokens = lru_cache(maxsize=8)(store.tokens)
        self.scores = lru_cache(maxsize=8)(self.read)
        self.treated = lru_cache(maxsize=8)(self._treated)
        self.pairs = lru_cache(maxsize=4)(self._pairs)
        self.fork = lru_cache(maxsize=64)(self._fork)
        self._kept: dict[Hashable, Any] = {}
        self._keeping = RLock()

    @property
    def path(self) -> Path:
        """The store's directory."""
        return self.store.path

    @property
    def name(self) -> str:
        """What the store is called on the page."""
        return self.path.name

    def changed(self) -> bool:
        """Whether anything was added to the store, or taken away, since it was opened."""
        return _mark(self.path) != self._mark

    def reopened(self) -> "Model":
        """The store as it is now."""
        return Model(datastore.open(self.path))

    # -- tables ----------------------------------------------------------------------------------------------------

    @property
    def rollouts(self) -> pd.DataFrame:
        """The rollout table, indexed by rollout_id."""
        return self.store.rollouts

    @cached_property
    def labels(self) -> list[str]:
        """Names of the labels, those that divide the rollouts in few groups first."""
        fixed = ("n_tokens", "prompt_end", "tags", "token_sha256")
        names = [str(name) for name in self.rollouts.columns if name not in fixed]
        values = {name: {str(value).lower() for value in self.rollouts[name].unique()} for name in names}
        few = [name for name in names if 2 <= len(values[name]) <= 12]
        groups = sorted(few, key=lambda n: ("honest" not in values[n], n != "label", n == "prompt_set"))
        return groups + [n for n in names if n not in groups]

    def groups(self, label: str) -> dict[str, str]:
        """Return each rollout's value of a label, as text; those without one are left out."""
        if label not in self.rollouts.columns:
            return {}
        return {str(name): str(value) for name, value in self.rollouts[label].items() if pd.notna(value)}

    def reference(self, label: str) -> str | None:
        """The value of a label that others are compared with."""
        return reference_of(list(self.groups(label).values()))

    def length(self, rollout: str) -> int:
        """Tokens of a rollout; 0 where there is none of that name."""
        return int(self.rollouts["n_tokens"].get(rollout, 0))

    def annotations(self, rollout: str) -> list[Mark]:
        """The labelled spans of one rollout."""
        table = self.store.annotations
        mine = table[table["rollout_id"] == rollout]
        columns = (mine["token_start"].tolist(), mine["token_end"].tolist(), mine["label"].tolist())
        return [Mark(int(start), int(stop), str(label)) for start, stop, label in zip(*columns, strict=True)]

    @cached_property
    def scored(self) -> list[str]:
        """Rollouts that have a score along any direction, in the store's order."""
        columns = known_columns(self._results, self.store.cells)
        names = {name for column, many in columns.items() if column.kind == "score" for name in many}
        return [name for name in map(str, self.store.cells.ids) if name in names]

    @property
    def first(self) -> str:
        """The rollout that is shown where none is asked for; nothing where there is none."""
        return (self.scored or [str(name) for name in self.rollouts.index[:1]] or [""])[0]

    @cached_property
    def directions(self) -> pd.DataFrame:
        """The directions along which anything is scored: direction (its label), trait, layer, component, method..."""
        if not self.scored:
            return pd.DataFrame({name: [] for name in ("direction", *TABLE)})
        one = self.scores((self.scored[0],))
        return pd.DataFrame({name: one[name].values for name in ("direction", *TABLE)})

    def along(self, direction: str) -> Direction:
        """Return a direction with its numbers, a unit vector, as it was scored; `direction` is its label."""
        at = list(map(str, self.directions["direction"])).index(direction)
        row = self.directions.iloc[at]
        sha256 = str(self.scores((self.scored[0],))["sha256"].values[at])
        column = Column("score", Place(str(row["component"]), int(row["layer"])), sha256)
        result = next(one for one in reversed(self._results) if column in one.columns["score"])
        same = [one for one in result.columns["score"] if one.place.component == column.place.component]
        values = result.vectors(column.place.component)[same.index(column)]
        return Direction(trait=str(row["trait"]), **column.place._asdict(), values=values, method=str(row["method"]))

    @cached_property
    def traits(self) -> list[str]:
        """Names of the traits, in the order of the directions."""
        return list(dict.fromkeys(map(str, self.directions["trait"])))

    def drawn(self, traits: Sequence[str]) -> list[str]:
        """Return the directions of some traits by their labels, at every layer; of all traits where none is named."""
        wanted = set(traits or self.traits)
        table = self.directions
        return [str(name) for name, trait in zip(table["direction"], table["trait"], strict=True) if trait in wanted]

    # -- numbers ---------------------------------------------------------------------------------------------------

    def read(self, rollouts: tuple[str, ...]) -> xr.Dataset:
        """Read scores of these rollouts along all directions; `scores` keeps the last ones.

        Raises
        ------
        AbsentError
            A rollout has none.
        """
        return read_scores(self._results, self.store.cells, rollouts=list(rollouts)).load()

    def _treated(self, rollouts: tuple[str, ...], how: Treatment) -> xr.DataArray:
        """Values that are drawn, (token, direction)."""
        return treated(self.scores(rollouts), how, top_dims=self.top_dims)

    def values(self, rollout: str, how: Treatment) -> NDArray[np.float32]:
        """Values of one rollout, (token, direction); no columns where it has no scores."""
        if rollout not in self._scored:
            return np.empty((self.length(rollout), 0), np.float32)
        return np.asarray(self.treated((rollout,), how).values)

    def keep(self, key: Hashable, compute: Callable[[], R]) -> R:
        """Return what was computed under this key before, or compute it; one thread at a time."""
        with self._keeping:
            if key not in self._kept:
                if len(self._kept) >= MOST_KEPT:
                    self._kept.pop(next(iter(self._kept)))
                self._kept[key] = compute()
            found: R = self._kept[key]
            return found

    def kept(self, key: Hashable) -> Any:
        """Return what was computed under this key before, None where nothing was."""
        return self._kept.get(key)

    def _pairs(self, label: str | None, reference: str | None) -> pd.DataFrame:
        """Rollouts that share a prefix, the most telling pairs first."""
        return pairs(self.store, label, reference=reference)

    def _fork(self, rollouts: tuple[str, ...]) -> int:
        """The first position at which some rollouts are not all the same."""
        return fork_of(self.store, rollouts)

    def forks(self, label: str, reference: str) -> dict[str, int]:
        """Return where each rollout leaves the one that it shares most with; those that share nothing are left out."""
        found: dict[str, int] = {}
        table = self.pairs(label or None, reference or None)
        for a, b, fork in zip(table["a"], table["b"], table["fork"].tolist(), strict=True):
            for name in (a, b):
                found.setdefault(str(name), fork)
        return found

    @cached_property
    def _scored(self) -> frozenset[str]:
        return frozenset(self.scored)

    def is_scored(self, rollout: str) -> bool:
        """Whether a rollout has a score along any direction."""
        return rollout in self._scored

    def top_dims(self, component: str) -> Mapping[int, Sequence[int]]:
        """Massive dimensions by layer, of the newest calibration; empty where there is none."""
        return top_dims(self.store, component)

    def norms(self, rollout: str) -> dict[str, NDArray[np.float32]]:
        """Norm of each token, `residual@8` -> (token,), at every captured layer that kept them."""
        found: dict[str, NDArray[np.float32]] = {}
        for component in self.store.components:
            there = self.store.captured(component).loc[rollout]
            layers = [int(layer) for layer, held in there.items() if held]  # type: ignore[call-overload]
            try:
                kept = self.store.norms(component, rollouts=rollout, layers=layers) if layers else None
            except AbsentError:  # captured without statistics
                continue
            if kept is not None:
                values = np.asarray(kept.values)
                found |= {f"{component}@{layer}": values[:, j] for j, layer in enumerate(layers)}
        return found

    def in_blocks(self, rollouts: Iterable[str], *, tokens: int = 400_000) -> list[tuple[str, ...]]:
        """Divide rollouts into runs of at most so many tokens, for one read each."""
        counts: Any = self.rollouts["n_tokens"].to_dict()
        blocks: list[list[str]] = []
        room = 0
        for name in rollouts:
            if not blocks or counts[name] > room:
                blocks.append([])
                room = tokens
            blocks[-1].append(name)
            room -= counts[name]
        return [tuple(block) for block in blocks]


class Models:
    """The stores that a server shows, by name; what was read of one is shared by all visitors.

    Parameters
    ----------
    stores : sequence of Store
    """

    def __init__(self, stores: Sequence[Store]) -> None:
        names = [store.path.name for store in stores]
        self._models = {
            name if names.count(name) == 1 else str(store.path): Model(store)
            for name, store in zip(names, stores, strict=True)
        }

    @property
    def names(self) -> list[str]:
        """What the stores are called."""
        return list(self._models)

    def __getitem__(self, name: str) -> Model:
        return self._models[name]

    def reopen(self, name: str) -> None:
        """Open a store anew, unless another visitor did."""
        if self._models[name].changed():
            self._models[name] = self._models[name].reopened()


def _mark(path: Path) -> tuple[Any, ...]:
    return (snapshot(path), *(tuple(numbered(path / name)) for name in RESULTS))
