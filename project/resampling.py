"""Bootstrap intervals of many columns at once: one set of draws for all of them, the same as for each by itself.

How often each rollout is drawn is counted once and serves every column, so a column costs a product instead of new
draws. The draws are those that `statistics` makes with the same seed, and so are the intervals.
"""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from project.statistics import RESAMPLES, Interval, auroc

__all__ = ["bootstrap_aurocs", "bootstrap_differences", "bootstrap_means"]

Floats = NDArray[np.float64]
BLOCK = 1 << 20
"""Draws that are counted together: what stays in the cache of a core."""


def bootstrap_means(sums: ArrayLike, counts: ArrayLike, *, confidence: float = 0.95, seed: int = 0) -> list[Interval]:
    """Return `statistics.bootstrap_mean` of every column.

    Parameters
    ----------
    sums, counts : arrays of shape (rollouts, columns)
        Of each rollout's tokens; those without any are left out.
    """
    total, number = np.asarray(sums, np.float64), np.asarray(counts, np.float64)

    def alike(there: NDArray[np.bool_], columns: NDArray[np.int64]) -> list[Interval]:
        both = (total[there][:, columns], number[there][:, columns])
        values = both[0].sum(axis=0) / both[1].sum(axis=0) if there.any() else np.full(len(columns), np.nan)
        if there.sum() < 2:
            return _intervals(values, None, confidence)
        joined = np.concatenate(both, axis=1)
        drawn = np.concatenate([draws @ joined for draws in _draws(len(joined), np.random.default_rng(seed))])
        return _intervals(values, drawn[:, : len(columns)] / drawn[:, len(columns) :], confidence)

    return _by_rows(number > 0, alike)


def bootstrap_differences(a: ArrayLike, b: ArrayLike, *, confidence: float = 0.95, seed: int = 0) -> list[Interval]:
    """Return `statistics.bootstrap_difference` of every column, mean of b less mean of a.

    Parameters
    ----------
    a, b : arrays of shape (rollouts, columns)
        NaN where a rollout has no number; it is left out there.
    """
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)

    def alike(there: NDArray[np.bool_], columns: NDArray[np.int64]) -> list[Interval]:
        sides = (first[there[: len(first)]][:, columns], second[there[len(first) :]][:, columns])
        if not all(map(len, sides)):
            return _intervals(np.full(len(columns), np.nan), None, confidence)
        values = sides[1].mean(axis=0) - sides[0].mean(axis=0)
        if min(map(len, sides)) < 2:
            return _intervals(values, None, confidence)
        random = np.random.default_rng(seed)
        before, after = (np.concatenate([draws @ s / len(s) for draws in _draws(len(s), random)]) for s in sides)
        return _intervals(values, after - before, confidence)

    return _by_rows(np.isfinite(np.concatenate([first, second])), alike)


def bootstrap_aurocs(
    positive: ArrayLike, negative: ArrayLike, *, confidence: float = 0.95, seed: int = 0
) -> list[Interval]:
    """Return `statistics.bootstrap_auroc` of every column.

    Parameters
    ----------
    positive, negative : arrays of shape (rollouts, columns)
        NaN where a rollout has no number; it is left out there.
    """
    up, down = np.asarray(positive, np.float64), np.asarray(negative, np.float64)

    def alike(there: NDArray[np.bool_], columns: NDArray[np.int64]) -> list[Interval]:
        ups, downs = up[there[: len(up)]][:, columns], down[there[len(up) :]][:, columns]
        values = np.array([auroc(ups[:, j], downs[:, j]) for j in range(len(columns))])
        if min(len(ups), len(downs)) < 2:
            return _intervals(values, None, confidence)
        random = np.random.default_rng(seed)
        above, below = (_counted(len(side), random) for side in (ups, downs))
        drawn = [_drawn_aurocs(ups[:, j], downs[:, j], above=above, below=below) for j in range(len(columns))]
        return _intervals(values, np.stack(drawn, axis=1), confidence)

    return _by_rows(np.isfinite(np.concatenate([up, down])), alike)


def _by_rows(
    there: NDArray[np.bool_], alike: Callable[[NDArray[np.bool_], NDArray[np.int64]], list[Interval]]
) -> list[Interval]:
    """Do those columns together of which the same rows are there; nearly always that is all of them."""
    found: dict[int, Interval] = {}
    kinds: dict[bytes, list[int]] = {}
    for column in range(there.shape[1]):
        kinds.setdefault(there[:, column].tobytes(), []).append(column)
    for columns in kinds.values():
        found |= dict(zip(columns, alike(there[:, columns[0]], np.array(columns)), strict=True))
    return [found[column] for column in range(there.shape[1])]


def _draws(n: int, random: np.random.Generator) -> Iterator[Floats]:
    """Yield how often each of n rollouts is drawn, (resample, n), some resamples at a time."""
    size = max(1, BLOCK // n)
    for start in range(0, RESAMPLES, size):
        rows = min(size, RESAMPLES - start)
        places = random.integers(0, n, (rows, n)) + np.arange(rows)[:, np.newaxis] * n
        yield np.bincount(places.reshape(-1), minlength=rows * n).reshape(rows, n).astype(np.float64)


def _counted(n: int, random: np.random.Generator) -> NDArray[np.uint8]:
    """Return all of `_draws`: nothing is ever drawn 255 times as often as it should be."""
    return np.concatenate([draws.astype(np.uint8) for draws in _draws(n, random)])


def _drawn_aurocs(
    up: Floats, down: Floats, *, above: NDArray[np.uint8], below: NDArray[np.uint8]
) -> NDArray[np.float64]:
    """AUROC of each resample: of every positive, how many negatives are smaller, and half of those that are equal."""
    order = np.argsort(down, kind="stable")
    ranked = down[order]
    ends = [np.searchsorted(ranked, up, side=side) for side in ("left", "right")]
    if np.array_equal(ends[0], ends[1]):  # no ties
        ends = ends[:1]
    found = np.empty(len(above))
    size = max(1, BLOCK // (4 * len(down)))
    for start in range(0, len(above), size):
        rows = slice(start, start + size)
        smaller = np.zeros((len(above[rows]), len(down) + 1), np.float32)
        np.cumsum(np.take(below[rows], order, axis=1), axis=1, dtype=np.float32, out=smaller[:, 1:])
        counted = [np.take(smaller, end, axis=1) for end in ends]
        sums = [np.einsum("ij,ij->i", above[rows], side, dtype=np.float64) for side in counted]
        found[rows] = sum(sums) / len(ends)
    return found / (len(up) * len(down))


def _intervals(values: Floats, drawn: Floats | None, confidence: float) -> list[Interval]:
    edges = 50 * (1 - confidence), 50 * (1 + confidence)
    shape = (2, len(values))
    low, high = np.full(shape, np.nan) if drawn is None else np.percentile(drawn, edges, axis=0)
    sides = zip(values.tolist(), low.tolist(), high.tolist(), strict=True)
    return [Interval(value=value, low=a, high=b) for value, a, b in sides]
