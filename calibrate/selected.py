"""What is to be calibrated: stores, paths or arrays brought together, and which of their tokens count.

A rollout's tokens fall into a prompt and a response. By default what is pooled are the responses, with the prompt of a
rollout that has no response, and what is found for each rollout is of its prompt, as the users' files have both.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

import datastore
from calibrate.rows import ArrayRows, Rows, StoreRows
from datastore.errors import AbsentError, ConflictError, MisuseError
from datastore.schema import SEGMENTS

__all__ = ["Chosen", "Flags", "Selected", "Selection", "resolve"]

Flags = NDArray[np.bool_]
Selection = datastore.Store | str | os.PathLike[str] | xr.DataArray
Chosen = tuple[datastore.Store, Sequence[str] | None]
"""A store with the ids of its rollouts that are wanted; None wants all."""
EITHER = "the response, or the prompt of a rollout without one"


@dataclass(frozen=True, kw_only=True, eq=False)
class Selected:
    """Sources resolved to common layers, and which tokens of their rollouts count.

    Attributes
    ----------
    sources : tuple of Rows
    layers : tuple of int
        Ascending.
    counts : int64 array (rollout, segment)
        Tokens, sources end to end.
    wanted, pooled, aligned : bool array (rollout, segment)
        Looked at at all; counted in what is pooled over all tokens; in what is found for each rollout by itself.
    rule : str
        The tokens that are pooled, in words.
    """

    sources: tuple[Rows, ...]
    layers: tuple[int, ...]
    counts: NDArray[np.int64]
    wanted: Flags
    pooled: Flags
    aligned: Flags
    rule: str

    @property
    def component(self) -> str:
        """The component of all sources."""
        return self.sources[0].component

    @property
    def width(self) -> int:
        """Its width."""
        return self.sources[0].width

    @property
    def tokens(self) -> int:
        """Tokens that are pooled."""
        return int(self.counts[self.pooled].sum())

    def part(self, source: int) -> slice:
        """Return where the rollouts of a source are, sources end to end."""
        first = sum(len(one.table) for one in self.sources[:source])
        return slice(first, first + len(self.sources[source].table))

    def rows(self, source: int) -> list[int]:
        """Return the rows of a source that are looked at."""
        return [int(row) for row in np.flatnonzero(self.wanted[self.part(source)].any(axis=1))]

    def offsets(self) -> Iterator[tuple[int, Rows]]:
        """Yield each source with the place of its first rollout."""
        first = 0
        for source in self.sources:
            yield first, source
            first += len(source.table)


def resolve(
    selection: Selection | Iterable[Selection | Chosen],
    *,
    component: str = "residual",
    layers: int | Sequence[int] | None = None,
    rollouts: Any = None,
    segment: str | Sequence[str] | None = None,
) -> Selected:
    """Return what is to be calibrated.

    Raises
    ------
    AbsentError
        Something asked for is not captured.
    ConflictError
        The sources are not of one width, or not of one model.
    MisuseError
        The selection is empty or holds no tokens.
    """
    items = [selection] if isinstance(selection, str | os.PathLike | xr.DataArray | datastore.Store) else [*selection]
    wanted = None if layers is None else [int(n) for n in np.atleast_1d(np.asarray(layers))]
    sources = _sources(items, component, layers=wanted, rollouts=_ids(rollouts))
    if not sources:
        raise MisuseError("nothing is selected to be calibrated; give a store, or rollouts that one of them holds")
    _check_alike(sources)
    shared = set.intersection(*(set(source.layers) for source in sources))
    missing = sorted(set(wanted or ()) - shared)
    if missing or not shared:
        raise AbsentError(
            f"{component} has no layer {missing[0] if missing else ''} in every source; their layers are "
            f"{'; '.join(', '.join(map(str, source.layers)) for source in sources)}"
        )
    counts = np.concatenate([s.table[["prompt", "response"]].to_numpy(np.int64) for s in sources])
    flags, pooled, aligned, rule = _rule(counts, segment)
    if not counts[pooled].sum():
        raise MisuseError(
            f"the selection has no tokens to calibrate: {len(counts)} rollouts have none in {rule}; "
            "select other rollouts, or another --segment"
        )
    return Selected(
        sources=tuple(sources),
        layers=tuple(sorted(shared)),
        counts=counts,
        wanted=flags,
        pooled=pooled,
        aligned=aligned,
        rule=rule,
    )


def _sources(
    items: Sequence[Any], component: str, *, layers: list[int] | None, rollouts: list[str] | None
) -> list[Rows]:
    stores = [_opened(item, rollouts) for item in items]
    held = {str(name) for store, _ in stores if isinstance(store, datastore.Store) for name in store.rollouts.index}
    absent = [name for name in rollouts or () if name not in held]
    if absent:
        raise AbsentError(
            f"{len(absent)} of {len(rollouts or ())} rollouts asked for are in none of the stores: {absent[0]}; "
            f"they hold {len(held)} rollouts"
        )
    found: list[Rows] = []
    for store, wanted in stores:
        if isinstance(store, xr.DataArray):
            found.append(ArrayRows(store if layers is None else store.sel(layer=layers)))
            continue
        mine = None if wanted is None else [name for name in wanted if rollouts is None or name in store.rollouts.index]
        if mine is None or mine:
            found.append(StoreRows(store, component, rollouts=mine, layers=layers))
    return found


def _opened(item: Any, rollouts: list[str] | None) -> tuple[Any, Sequence[str] | None]:
    if isinstance(item, tuple):
        return item
    opened = isinstance(item, datastore.Store | xr.DataArray)
    return (item if opened else datastore.open(Path(item))), rollouts


def _ids(rollouts: Any) -> list[str] | None:
    if rollouts is None:
        return None
    names = rollouts.index if isinstance(rollouts, pd.DataFrame) else rollouts
    return [names] if isinstance(names, str) else [str(name) for name in names]


def _check_alike(sources: Sequence[Rows]) -> None:
    widths = {source.width for source in sources}
    models = {
        (capture["model"], capture["revision"])
        for source in (sources if len(sources) > 1 else ())
        for capture in source.describe().get("captures", {}).values()
    }
    if len(widths) > 1 or len(models) > 1:
        listed = ", ".join(map(str, sorted(widths))) if len(widths) > 1 else ", ".join(sorted(m for m, _ in models))
        raise ConflictError(
            f"the stores are of different {'widths' if len(widths) > 1 else 'models'} ({listed}), so their statistics "
            "can't be pooled; calibrate each by itself"
        )


def _rule(counts: NDArray[np.int64], segment: str | Sequence[str] | None) -> tuple[Flags, Flags, Flags, str]:
    has = counts > 0
    if segment is None:
        other = has[:, ::-1]
        alone = has & ~other  # the only segment that a rollout has
        prompt, response = np.array([True, False]), np.array([False, True])
        return has, (has & response) | alone, (has & prompt) | alone, EITHER
    names = [segment] if isinstance(segment, str) else list(segment)
    unknown = [name for name in names if name not in SEGMENTS]
    if unknown or not names:
        wrong = repr(unknown[0]) if unknown else "(none given)"
        raise MisuseError(f"segment {wrong} is not known; choose from {', '.join(SEGMENTS)}")
    chosen = has & np.array([name in names for name in SEGMENTS])
    return chosen, chosen, chosen, " and ".join(f"the {name}" for name in SEGMENTS if name in names)
