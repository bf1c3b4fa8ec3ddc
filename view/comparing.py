"""Rollouts against each other: pairs that share a prefix, their difference and what moves first, groups with bands."""

from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from datastore.query import Store
from project import groups, scoring
from project.derive import runs_of_rollouts
from project.groups import Family
from project.positions import token_columns
from project.resampling import bootstrap_differences, bootstrap_means
from project.statistics import auroc, effect_size

__all__ = [
    "MOVED",
    "aligned_curves",
    "around_forks",
    "effects",
    "first_moves",
    "fork_of",
    "pairs",
    "reference_of",
    "smoothed_apart",
    "smoothed_at_forks",
]

Float = NDArray[np.floating]
HONEST = ("honest", "truthful", "control", "baseline", "none", "false", "no", "0", "0.0")
"""Values of a label that stand for the side that others are compared with, best first."""
SINK = 4
"""First tokens left out where a scale is taken: they dwarf all others in many models."""
MOVED = ((3.0, 2), (2.0, 2), (3.0, 1), (2.0, 1), (1.0, 1))
"""Standard deviations, and for how many tokens in a row: the first by which any direction has moved is what is said.

The rarer by chance the earlier. After some forks only a few tokens follow, of which one alone says it.
"""
EVERY_PAIR = 8
"""Of families of at most so many rollouts all pairs are offered; of larger ones neighbours."""


def reference_of(values: Sequence[str]) -> str | None:
    """Return the value of a label that the others are compared with: an honest one, else the most frequent."""
    names = dict.fromkeys(values)
    for word in HONEST:
        for name in names:
            if name.lower() == word:
                return name
    return max(names, key=list(values).count) if names else None


def pairs(store: Store, label: str | None, *, reference: str | None = None) -> pd.DataFrame:
    """Find rollouts that share a prefix, pair by pair, the most telling first.

    Parameters
    ----------
    store : Store
    label : str, optional
        Column of the rollout table; pairs that differ in it come first.
    reference : str, optional
        The value that rollout a should have, such as honest.

    Returns
    -------
    DataFrame
        a, b, fork (the first position at which they differ), shared (fork over the shorter one's tokens), label_a,
        label_b, differ: those that differ in the label first, one of which has the reference value; then by `shared`.
    """
    table = store.rollouts
    of = {} if label is None else {str(name): str(value) for name, value in table[label].items() if pd.notna(value)}
    counts = {str(name): int(n) for name, n in table["n_tokens"].items()}
    rows = []
    families = groups.families(store)
    several = [name for family in families if len(family.rollouts) > 2 for name in family.rollouts]
    columns = token_columns(store, several, ("token_id",)) if several else {}
    ids = {name: tokens["token_id"].to_numpy() for name, tokens in columns.items()}
    for family in families:
        for a, b, fork in _members(family, ids):
            first, second = (b, a) if of.get(b) == reference != of.get(a) else (a, b)
            la, lb = of.get(first, ""), of.get(second, "")
            shared = fork / min(counts[a], counts[b])
            rows.append((first, second, fork, shared, la, lb, la != lb, la == reference != lb))
    names = ["a", "b", "fork", "shared", "label_a", "label_b", "differ", "against"]
    found = pd.DataFrame(rows, columns=names)
    return found.sort_values(["against", "differ", "shared"], ascending=False, kind="stable").reset_index(drop=True)


def _members(family: Family, ids: Mapping[str, NDArray[np.int32]]) -> list[tuple[str, str, int]]:
    names = family.rollouts
    if len(names) == 2:
        return [(names[0], names[1], family.fork)]
    chosen = combinations(names, 2) if len(names) <= EVERY_PAIR else pairwise(names)
    return [(a, b, _shared(ids[a], ids[b])) for a, b in chosen]


def _shared(a: NDArray[np.int32], b: NDArray[np.int32]) -> int:
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


def fork_of(store: Store, rollouts: Sequence[str]) -> int:
    """Return the first position at which some rollouts are not all the same; 0 where they share nothing."""
    found = groups.families(store, rollouts=list(dict.fromkeys(rollouts)), least=0)
    return found[0].fork if found else int(store.rollouts["n_tokens"][rollouts[0]])


def aligned_curves(scores: xr.Dataset, values: xr.DataArray, rollouts: Sequence[str], *, fork: int) -> xr.DataArray:
    """Return treated values of some rollouts side by side, (rollout, position, direction), NaN beyond their ends."""
    family = Family(tuple(dict.fromkeys(rollouts)), fork)
    found = groups.aligned(scores.assign(score=scores.score.copy(data=values.values)), family)
    lengths = {name: run.stop - run.start for name, run in runs_of_rollouts(scores)}
    return found.assign_attrs(lengths=lengths)


def smoothed_apart(aligned: xr.DataArray, window: int) -> xr.DataArray:
    """Smooth what is before the fork and what is after it by themselves, so that the curves part at the fork."""
    fork, out = int(aligned.attrs["fork"]), aligned.values.copy()
    for row, name in enumerate(aligned.rollout.values):
        length = int(aligned.attrs["lengths"][str(name)])
        for side in (slice(0, fork), slice(fork, length)):
            out[row, side] = scoring.smooth(out[row, side], window)
    return aligned.copy(data=out)


def smoothed_at_forks(values: xr.DataArray, window: int, *, forks: Mapping[str, int]) -> xr.DataArray:
    """Smooth values of many rollouts, (token, direction), before each one's fork and after it by themselves."""
    if window == 1:
        return values
    out = values.values.copy()
    for name, run in runs_of_rollouts(values):
        cut = run.start + min(forks.get(name, 0), run.stop - run.start)
        for side in (slice(run.start, cut), slice(cut, run.stop)):
            out[side] = scoring.smooth(out[side], window)
    return values.copy(data=out)


def first_moves(aligned: xr.DataArray, *, threshold: float = 3.0, run: int = 2) -> pd.DataFrame:
    """Say for every direction where the second rollout first leaves the first one, after the fork.

    A direction has moved from the first of `run` tokens in a row at which the difference is, on the same side, beyond
    `threshold` standard deviations of the first rollout over the shared prefix (its first four tokens left out, the
    whole rollout taken where the prefix is shorter than eight).

    Parameters
    ----------
    aligned : DataArray
        From `aligned_curves`, of unsmoothed values.
    threshold : float
        In standard deviations.
    run : int
        Tokens in a row, 1 or 2.

    Returns
    -------
    DataFrame
        direction, moved_at (position; NaN where it never did), tokens_after (from the fork), difference there, peak
        (the largest after the fork) in standard deviations and its position peak_at; the first to move first.
    """
    fork = int(aligned.attrs["fork"])
    first, second = (aligned.values[i].astype(np.float64) for i in (0, 1))
    shared = first[SINK:fork] if fork >= 2 * SINK else first[min(SINK, len(first) - 1) :]
    spread = np.nanstd(shared, axis=0)
    spread[~(spread > 0)] = np.nan
    after = ((second - first) / spread)[fork:]
    rows = []
    for j, direction in enumerate(aligned.direction.values):
        values = after[:, j][np.isfinite(after[:, j])]
        at = _moved(values, threshold, run=run)
        top = int(np.argmax(np.abs(values))) if len(values) else None
        there = (fork + at, at, values[at]) if at is not None else (np.nan, np.nan, np.nan)
        rows.append((str(direction), *there, *((np.nan, np.nan) if top is None else (values[top], fork + top))))
    found = pd.DataFrame(rows, columns=["direction", "moved_at", "tokens_after", "difference", "peak", "peak_at"])
    return found.sort_values(["moved_at", "peak"], key=_largest_last, kind="stable").reset_index(drop=True)


def _largest_last(column: "pd.Series[float]") -> "pd.Series[float]":
    return -column.abs() if column.name == "peak" else column


def _moved(values: Float, threshold: float, *, run: int) -> int | None:
    beyond = np.abs(values) > threshold
    moved = np.flatnonzero(beyond if run == 1 else beyond[:-1] & beyond[1:] & (values[:-1] * values[1:] > 0))
    return int(moved[0]) if len(moved) else None


def effects(
    means: pd.DataFrame, groups_of: Mapping[str, str], *, reference: str, other: str | None = None
) -> pd.DataFrame:
    """Compare the rollouts' means of two groups, direction by direction.

    Parameters
    ----------
    means : DataFrame
        A row for each rollout, a column for each direction.
    groups_of : mapping of rollout id to its group
    reference : str
        The group that `other` is compared with.
    other : str, optional
        Default all other groups together.

    Returns
    -------
    DataFrame
        direction, n_reference, n_other, mean_reference, mean_other, difference with low and high (95 %, bootstrap over
        rollouts), effect_size, auroc; the largest effect first.
    """
    of = np.array([groups_of.get(str(name), "") for name in means.index], dtype=object)
    base = of == reference
    rest = (of != "") & ~base if other is None else of == other
    sides = [means.to_numpy(np.float64)[rows] for rows in (base, rest)]
    changes = bootstrap_differences(*sides)
    rows = []
    for j, (direction, change) in enumerate(zip(means.columns, changes, strict=True)):
        a, b = (values[np.isfinite(values[:, j]), j] for values in sides)
        side = (a.mean() if len(a) else np.nan, b.mean() if len(b) else np.nan)
        row = (direction, len(a), len(b), *side, change.value, change.low, change.high)
        rows.append((*row, effect_size(a, b), auroc(b, a)))
    columns = ["direction", "n_reference", "n_other", "mean_reference", "mean_other", "difference", "low", "high"]
    found = pd.DataFrame(rows, columns=[*columns, "effect_size", "auroc"])
    order = found["effect_size"].abs().sort_values(ascending=False, kind="stable", na_position="last").index
    return found.loc[order].reset_index(drop=True)


def around_forks(
    values: xr.DataArray,
    forks: Mapping[str, int],
    groups_of: Mapping[str, str],
    *,
    before: int = 24,
    after: int = 64,
    step: int = 4,
) -> pd.DataFrame:
    """Average groups of rollouts by distance from where each one forks.

    Parameters
    ----------
    values : DataArray
        (token,), one direction.
    forks : mapping of rollout id to position
    groups_of : mapping of rollout id to its group
    before, after, step : int
        Tokens before and after the fork, in bins of `step`; 0 is the fork.

    Returns
    -------
    DataFrame
        group, offset (a bin's first token from the fork), n_rollouts, mean, low, high: 95 % over rollouts.
    """
    offsets = np.arange(-before, after, step)
    sums: dict[str, list[tuple[NDArray[Any], NDArray[Any]]]] = {}
    for name, run in runs_of_rollouts(values):
        if name not in forks or name not in groups_of:
            continue
        mine = np.asarray(values.values[run], np.float64)
        place = (np.arange(len(mine)) - forks[name] + before) // step
        inside = (place >= 0) & (place < len(offsets)) & np.isfinite(mine)
        total = np.bincount(place[inside], weights=mine[inside], minlength=len(offsets))
        count = np.bincount(place[inside], minlength=len(offsets)).astype(np.float64)
        sums.setdefault(groups_of[name], []).append((total, count))
    rows = []
    for group in sorted(sums):
        totals, counts = (np.array(side) for side in zip(*sums[group], strict=True))
        means = bootstrap_means(totals, counts)
        for i, (offset, mean) in enumerate(zip(offsets.tolist(), means, strict=True)):
            rows.append((group, offset, int((counts[:, i] > 0).sum()), mean.value, mean.low, mean.high))
    return pd.DataFrame(rows, columns=["group", "offset", "n_rollouts", "mean", "low", "high"])
