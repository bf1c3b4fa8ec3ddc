"""Comparing groups of rollouts: effect sizes, AUROC, and bootstrap intervals that resample rollouts.

Tokens of one rollout depend on each other, so a rollout is the unit everywhere: one number each, or a sum and a count.
What is undefined (one rollout, no spread, one class) is NaN, never 0.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import bootstrap, rankdata

from datastore.errors import MisuseError

__all__ = [
    "Interval",
    "auroc",
    "aurocs",
    "bootstrap_auroc",
    "bootstrap_difference",
    "bootstrap_mean",
    "effect_size",
    "paired_effect_size",
]

Floats = NDArray[np.float64]

RESAMPLES = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An estimate with its percentile bootstrap interval; the bounds are NaN where resampling says nothing."""

    value: float
    low: float
    high: float


def effect_size(a: ArrayLike, b: ArrayLike) -> float:
    """Cohen's d of b over a: (mean b − mean a) / √((var a + var b)/2), variances with ddof 1.

    NaN for fewer than two of either, or where neither varies.
    """
    first, second = _finite(a), _finite(b)
    if min(len(first), len(second)) < 2:
        return float("nan")
    spread = float(np.sqrt((first.var(ddof=1) + second.var(ddof=1)) / 2))
    return float(second.mean() - first.mean()) / spread if spread > 0 else float("nan")


def paired_effect_size(a: ArrayLike, b: ArrayLike) -> float:
    """Mean of b − a over its standard deviation with ddof 0, pair by pair; NaN where the difference does not vary.

    Raises
    ------
    MisuseError
        If there are not as many of a as of b.
    """
    first, second = _finite(a), _finite(b)
    if len(first) != len(second):
        raise MisuseError(f"{len(first)} and {len(second)} values are no pairs; match them by rollout")
    change = second - first
    spread = float(change.std()) if len(change) > 1 else 0.0
    return float(change.mean()) / spread if spread > 0 else float("nan")


def auroc(positive: ArrayLike, negative: ArrayLike) -> float:
    """Share of (positive, negative) pairs in which the positive is larger, ties counting half; NaN without both."""
    up, down = _finite(positive), _finite(negative)
    if not len(up) or not len(down):
        return float("nan")
    return float(_auroc(up, down, axis=-1))


def aurocs(positive: ArrayLike, negative: ArrayLike) -> Floats:
    """Return `auroc` of each column of (positives, columns) and (negatives, columns), all finite and some of each."""
    up, down = np.asarray(positive, np.float64), np.asarray(negative, np.float64)
    return _auroc(up, down, axis=0)


def bootstrap_mean(
    sums: ArrayLike, counts: ArrayLike | None = None, *, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Mean over tokens with an interval over rollouts: Σ sums / Σ counts, rollouts drawn with replacement.

    Parameters
    ----------
    sums : array of shape (rollouts,)
        Sum over each rollout's tokens; its mean where `counts` is left out.
    counts : array of shape (rollouts,), optional
        Tokens of each rollout; those without any are left out.
    """
    total = _finite(sums)
    number = np.ones(len(total)) if counts is None else _finite(counts)
    total, number = total[number > 0], number[number > 0]
    return _resampled(_ratio, (total, number), paired=True, confidence=confidence, seed=seed)


def bootstrap_difference(a: ArrayLike, b: ArrayLike, *, confidence: float = 0.95, seed: int = 0) -> Interval:
    """Mean of b less mean of a with an interval, rollouts drawn with replacement within each group."""
    return _resampled(_difference, (_finite(a), _finite(b)), paired=False, confidence=confidence, seed=seed)


def bootstrap_auroc(positive: ArrayLike, negative: ArrayLike, *, confidence: float = 0.95, seed: int = 0) -> Interval:
    """AUROC with an interval, rollouts drawn with replacement within each class; one number for each rollout."""
    up, down = _finite(positive), _finite(negative)
    values, places = np.unique(np.concatenate([up, down]), return_inverse=True)
    # Resamples repeat the values that there are: counting each one's copies needs no sort, and gives the same numbers.
    samples = places[: len(up)].astype(np.float64), places[len(up) :].astype(np.float64)

    def statistic(up: Floats, down: Floats, axis: int) -> Floats:
        return _auroc_of_places(up, down, axis, n_values=len(values))

    return _resampled(statistic, samples, paired=False, confidence=confidence, seed=seed)


def _resampled(
    statistic: Callable[..., Floats], samples: tuple[Floats, Floats], *, paired: bool, confidence: float, seed: int
) -> Interval:
    fewest = min(map(len, samples))
    value = float(statistic(*samples, axis=-1)) if fewest else float("nan")
    if fewest < 2:
        return Interval(value=value, low=float("nan"), high=float("nan"))
    found: Any = bootstrap(
        samples,
        statistic,
        paired=paired,
        vectorized=True,
        method="percentile",
        n_resamples=RESAMPLES,
        confidence_level=confidence,
        rng=np.random.default_rng(seed),
    )
    bounds = found.confidence_interval
    return Interval(value=value, low=float(bounds.low), high=float(bounds.high))


def _ratio(sums: Floats, counts: Floats, axis: int) -> Floats:
    return np.asarray(sums.sum(axis=axis) / counts.sum(axis=axis))


def _difference(a: Floats, b: Floats, axis: int) -> Floats:
    return np.asarray(b.mean(axis=axis) - a.mean(axis=axis))


def _auroc(up: Floats, down: Floats, axis: int) -> Floats:
    # Mann and Whitney's U from the sum of ranks, over all pairs
    n, m = up.shape[axis], down.shape[axis]
    ranks = rankdata(np.concatenate([up, down], axis=axis), axis=axis)
    above = np.take(ranks, np.arange(n), axis=axis).sum(axis=axis) - n * (n + 1) / 2
    return np.asarray(above / (n * m))


def _auroc_of_places(up: Floats, down: Floats, axis: int, *, n_values: int) -> Floats:
    """Return `_auroc` along the last axis, of values given by their places among all distinct ones in order."""
    n, m = up.shape[axis], down.shape[axis]
    above, below = (_counts(places, n_values) for places in (up, down))
    below = np.cumsum(below, axis=-1) - below / 2  # smaller ones, and ties by half
    return np.asarray((above * below).sum(axis=-1) / (n * m)).reshape(up.shape[:-1])


def _counts(places: Floats, n_values: int) -> Floats:
    """Count the copies of each place in each row."""
    rows = places.reshape(-1, places.shape[-1]).astype(np.int64)
    offset = np.arange(len(rows))[:, np.newaxis] * n_values
    counted = np.bincount((rows + offset).reshape(-1), minlength=len(rows) * n_values)
    return counted.reshape(len(rows), n_values).astype(np.float64)


def _finite(values: ArrayLike) -> Floats:
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not np.isfinite(array).all():
        bad = int(np.count_nonzero(~np.isfinite(array)))
        raise MisuseError(
            f"values of shape {array.shape} with {bad} that are not finite can't be compared; "
            "give one finite number for each rollout and leave the others out"
        )
    return array
