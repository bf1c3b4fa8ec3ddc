"""What a calibration would read: the passes it takes, and over how much."""

from dataclasses import dataclass

import numpy as np

from calibrate.rows import Rows
from calibrate.selected import Selected

__all__ = ["PlannedPass", "to_read"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedPass:
    """One pass over some rollouts at all layers."""

    what: str
    rollouts: int
    tokens: int
    nbytes: int


def to_read(selected: Selected, *, passes: bool) -> list[PlannedPass]:
    """Return the passes that `fit` takes; none where none may be made.

    `tokens` counts a token once for each layer.
    """
    if not passes:
        return []
    alone = {"rollouts": 0, "tokens": 0, "nbytes": 0}
    every = dict(alone)
    for first, source in selected.offsets():
        here = slice(first, first + len(source.table))
        rows = np.flatnonzero(selected.wanted[here].any(axis=1)).tolist()
        counts = selected.counts[here].sum(axis=1)
        _add(every, source, counts=int(counts[rows].sum()), rollouts=len(rows), layers=len(selected.layers))
        unkept: set[int] = set()
        for layer in selected.layers:
            mine = source.unkept(layer, rows)
            unkept |= set(mine)
            _add(alone, source, counts=int(counts[mine].sum()), rollouts=0, layers=1)
        alone["rollouts"] += len(unkept)
    planned = [PlannedPass(what="the sums that were not kept for each rollout", **alone)] if alone["tokens"] else []
    return [*planned, PlannedPass(what="extremes, medians and percentiles", **every)]


def _add(into: dict[str, int], source: Rows, *, counts: int, rollouts: int, layers: int) -> None:
    into["rollouts"] += rollouts
    into["tokens"] += counts * layers
    into["nbytes"] += counts * layers * source.width * source.itemsize
