"""Rollouts against each other: those that share a prefix, means by label, turn or annotation, correlation of traits.

A rollout is the unit of every interval: its tokens depend on each other.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from datastore.errors import MisuseError
from datastore.query import Rollouts, Store
from project.derive import runs_of_rollouts
from project.positions import token_columns
from project.resampling import bootstrap_aurocs, bootstrap_means
from project.statistics import effect_size

__all__ = ["Family", "aligned", "compare", "families", "lag_correlation", "rollout_correlation"]

Flags = NDArray[np.bool_]
PER = ("rollout", "turn", "role", "annotation")


@dataclass(frozen=True, slots=True)
class Family:
    """Rollouts that begin with the same tokens.

    Attributes
    ----------
    rollouts : tuple of str
    fork : int
        The first position at which they are not all the same.
    """

    rollouts: tuple[str, ...]
    fork: int


def families(store: Store, *, rollouts: Rollouts = None, least: int | None = None) -> list[Family]:
    """Find rollouts that share a prefix, from their token ids alone.

    Parameters
    ----------
    store : Store
    rollouts : id, ids or rollout table, optional
    least : int, optional
        Tokens that neighbours must share; default half of the shorter one, since all chats of one template share its
        first tokens.

    Returns
    -------
    list of Family
        Of two rollouts or more, the longest prefix first.
    """
    columns = token_columns(store, _names(store, rollouts), ("token_id",))
    ids = {name: tokens["token_id"].to_numpy() for name, tokens in columns.items()}
    # in lexicographic order the rollouts that share a prefix lie together
    order = sorted(ids, key=lambda name: ids[name].astype(">u4").tobytes())
    found: list[Family] = []
    members, fork = order[:1], None
    for before, name in [*pairwise(order), (None, None)]:
        shared = _shared(ids[before], ids[name]) if before is not None and name is not None else -1
        shorter = min(len(ids[before]), len(ids[name])) if before is not None and name is not None else 0
        if name is not None and shared >= (least if least is not None else max(1, shorter // 2)):
            members, fork = [*members, name], shared if fork is None else min(fork, shared)
            continue
        if fork is not None:
            found.append(Family(tuple(members), fork))
        members, fork = ([name] if name is not None else []), None
    return sorted(found, key=lambda family: -family.fork)


def aligned(scores: xr.Dataset, family: Family) -> xr.DataArray:
    """Return a family's scores side by side, (rollout, position, direction), NaN beyond a rollout's end.

    The attribute `fork` is the first position at which the rollouts differ; up to it scores of one model differ only by
    the company that the rollouts were computed in.

    Raises
    ------
    MisuseError
        A rollout has no scores here.
    """
    runs = dict(runs_of_rollouts(scores))
    missing = [name for name in family.rollouts if name not in runs]
    if missing:
        raise MisuseError(f"rollout {missing[0]!r} has no scores here; score the whole family")
    longest = max(runs[name].stop - runs[name].start for name in family.rollouts)
    out = np.full((len(family.rollouts), longest, scores.sizes["direction"]), np.nan, np.float32)
    for row, name in enumerate(family.rollouts):
        out[row, : runs[name].stop - runs[name].start] = scores.score.values[runs[name]]
    return xr.DataArray(
        out,
        dims=("rollout", "position", "direction"),
        coords={
            "rollout": list(family.rollouts),
            "position": np.arange(longest),
            "direction": scores.direction.values,
            "shared": ("position", np.arange(longest) < family.fork),
        },
        name="score",
        attrs={"fork": family.fork},
    )


def compare(
    store: Store,
    scores: xr.Dataset,
    label: str,
    *,
    per: str = "rollout",
    segment: str | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare groups of rollouts, direction by direction.

    Parameters
    ----------
    store : Store
    scores : Dataset
        From `project.scores`, or with other values in `score`, as those of `derive`.
    label : str
        Column of the rollout table; rollouts without a value are left out.
    per : str
        `rollout` takes all tokens together; `turn`, `role` and `annotation` give a row for each turn number, role or
        annotation label.
    segment : str, optional
        Only its tokens.
    seed : int
        Of the resampling.

    Returns
    -------
    DataFrame
        direction, what `per` names, group, n_rollouts, n_tokens, the mean over tokens with low and high (95 % over
        rollouts), and against all other groups the effect size of the rollouts' means and the AUROC with its interval.

    Raises
    ------
    MisuseError
        There is no such label, or `per` is none of these.
    """
    table = store.rollouts
    if label not in table.columns:
        raise MisuseError(f"the rollouts have no label {label!r}; they have {', '.join(map(str, table.columns))}")
    if per not in PER:
        raise MisuseError(f"per {per!r} is not known; choose one of {', '.join(PER)}")
    rows = []
    of = {str(name): value for name, value in table[label].items() if pd.notna(value)}
    kept = np.isin(scores.rollout.values, list(of))
    if segment is not None:
        kept &= scores.segment.values == segment
    for key, mask in _parts(store, scores, per):
        sums, counts, names = _sums(scores, mask & kept)
        groups = np.array([str(of.get(name)) for name in names], dtype=object)
        for group in sorted(set(groups)):
            found = _group_rows(sums, counts, groups == group, seed=seed)
            for direction, row in zip(scores.direction.values, found, strict=True):
                part = {per: key} if per != "rollout" else {}
                rows.append({"direction": str(direction), **part, "group": group, **row})
    return pd.DataFrame(rows)


def _group_rows(
    sums: NDArray[np.float64], counts: NDArray[np.float64], inside: Flags, *, seed: int
) -> list[dict[str, float]]:
    """Compare the rollouts of a group with all others, direction by direction."""
    ours, others = (_means(sums[side], counts[side]) for side in (inside, ~inside))
    means = bootstrap_means(sums[inside], counts[inside], seed=seed)
    areas = bootstrap_aurocs(ours, others, seed=seed)
    return [
        {
            "n_rollouts": int(np.isfinite(ours[:, j]).sum()),
            "n_tokens": int(counts[inside, j].sum()),
            "mean": mean.value,
            "low": mean.low,
            "high": mean.high,
            "effect_size": effect_size(*(side[np.isfinite(side[:, j]), j] for side in (others, ours))),
            "auroc": area.value,
            "auroc_low": area.low,
            "auroc_high": area.high,
        }
        for j, (mean, area) in enumerate(zip(means, areas, strict=True))
    ]


def _means(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean of each rollout, (rollout, direction), NaN where it has no tokens."""
    found: NDArray[np.float64] = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
    return found


def _sums(scores: xr.Dataset, mask: Flags) -> tuple[NDArray[np.float64], NDArray[np.float64], list[str]]:
    """Sum and count of finite scores over the tokens of a mask, (rollout, direction)."""
    sums, counts, names = [], [], []
    for name, run in runs_of_rollouts(scores):
        values = scores.score.values[run][mask[run]].astype(np.float64)
        if not len(values):
            continue
        finite = np.isfinite(values)
        sums.append(np.where(finite, values, 0.0).sum(axis=0))
        counts.append(finite.sum(axis=0).astype(np.float64))
        names.append(name)
    shape = (len(names), scores.sizes["direction"])
    return np.array(sums, np.float64).reshape(shape), np.array(counts, np.float64).reshape(shape), names


def _parts(store: Store, scores: xr.Dataset, per: str) -> Iterator[tuple[object, Flags]]:
    """Yield what `per` names, with the tokens that belong to it."""
    if per == "rollout":
        yield None, np.ones(scores.sizes["token"], bool)
    elif per == "annotation":
        runs = dict(runs_of_rollouts(scores))
        spans = store.annotations[store.annotations["rollout_id"].isin(runs)]
        for label, of_label in spans.groupby("label"):
            mask = np.zeros(scores.sizes["token"], bool)
            for name, start, stop in of_label[["rollout_id", "token_start", "token_end"]].itertuples(index=False):
                mask[runs[name]][start:stop] = True
            yield label, mask
    else:
        values = np.asarray(scores[per].values)
        for value in np.unique(values):
            if per != "turn" or value >= 0:
                yield value.item(), values == value


def lag_correlation(scores: xr.Dataset, *, max_lag: int = 10) -> xr.DataArray:
    """Pearson correlation of direction a at a token with direction b some tokens later, pooled within rollouts.

    Returns
    -------
    DataArray
        (lag, direction, other), lags from -max_lag to max_lag; NaN where there are too few pairs or no spread.

    Raises
    ------
    MisuseError
        `max_lag` is negative.
    """
    if max_lag < 0:
        raise MisuseError(f"a lag of at most {max_lag} tokens leaves none; give 0 or more")
    runs = [scores.score.values[run].astype(np.float64) for _, run in runs_of_rollouts(scores)]
    lags = np.arange(-max_lag, max_lag + 1)
    n = scores.sizes["direction"]
    out = np.full((len(lags), n, n), np.nan)
    for i, lag in enumerate(lags.tolist()):
        pairs = [(run[: len(run) - lag], run[lag:]) if lag >= 0 else (run[-lag:], run[:lag]) for run in runs]
        pairs = [(a, b) for a, b in pairs if len(a)]
        if pairs:
            a, b = (np.concatenate(side) for side in zip(*pairs, strict=True))
            out[i] = _pearson(a, b)
    labels = scores.direction.values
    return xr.DataArray(
        out,
        dims=("lag", "direction", "other"),
        coords={"lag": lags, "direction": labels, "other": labels},
        name="correlation",
    )


def rollout_correlation(scores: xr.Dataset) -> xr.DataArray:
    """Pearson correlation of the directions' means over the rollouts, (direction, other)."""
    means = np.array([scores.score.values[run].astype(np.float64).mean(axis=0) for _, run in runs_of_rollouts(scores)])
    labels = scores.direction.values
    coords = {"direction": labels, "other": labels}
    return xr.DataArray(_pearson(means, means), dims=("direction", "other"), coords=coords, name="correlation")


def _pearson(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Correlate the columns of two arrays over their rows, those with a value that is not finite left out."""
    there = np.isfinite(a).all(axis=1) & np.isfinite(b).all(axis=1)
    a, b = a[there], b[there]
    if len(a) < 2:
        return np.full((a.shape[1], b.shape[1]), np.nan)
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    spread = np.sqrt((a**2).sum(axis=0))[:, np.newaxis] * np.sqrt((b**2).sum(axis=0))
    with np.errstate(divide="ignore", invalid="ignore"):
        found: NDArray[np.float64] = np.where(spread > 0, a.T @ b / spread, np.nan)
    return found


def _names(store: Store, rollouts: Rollouts) -> Sequence[str]:
    if rollouts is None:
        return [str(name) for name in store.rollouts.index]
    chosen = rollouts.index if isinstance(rollouts, pd.DataFrame) else rollouts
    return [chosen] if isinstance(chosen, str) else [str(name) for name in chosen]


def _shared(a: NDArray[np.int32], b: NDArray[np.int32]) -> int:
    """How many tokens two rollouts have in common at their beginning."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n
