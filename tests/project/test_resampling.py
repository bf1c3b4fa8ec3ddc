"""Intervals of many columns at once against those of each column by itself, which scipy resamples."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from project import resampling
from project.resampling import bootstrap_aurocs, bootstrap_differences, bootstrap_means
from project.statistics import Interval, bootstrap_auroc, bootstrap_difference, bootstrap_mean

COLUMNS = 4


def _same(found: Sequence[Interval], wanted: Sequence[Interval]) -> None:
    for one, other in zip(found, wanted, strict=True):
        values = ((one.value, one.low, one.high), (other.value, other.low, other.high))
        np.testing.assert_allclose(*values, rtol=1e-6, atol=1e-9, equal_nan=True)


def _holes(shape: tuple[int, int], seed: int) -> NDArray[np.float64]:
    """Numbers with ties, of which two columns lack some."""
    random = np.random.default_rng(seed)
    values = np.round(random.standard_normal(shape), 1)
    values[random.random(shape) < 0.2 * (np.arange(shape[1]) % 2)] = np.nan
    return values


def _known(values: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    return [column[np.isfinite(column)] for column in values.T]


@pytest.mark.parametrize("rollouts", [0, 1, 2, 7, 60])
def test_means_of_many_columns(rollouts: int) -> None:
    random = np.random.default_rng(rollouts)
    counts = random.integers(1, 9, (rollouts, COLUMNS)).astype(float)
    counts[::3, 1] = 0
    sums = random.standard_normal((rollouts, COLUMNS)) * counts
    _same(
        bootstrap_means(sums, counts, seed=3), [bootstrap_mean(*c, seed=3) for c in zip(sums.T, counts.T, strict=True)]
    )


@pytest.mark.parametrize(("n", "m"), [(0, 5), (1, 5), (2, 2), (30, 41)])
@pytest.mark.parametrize(
    ("many", "single"), [(bootstrap_differences, bootstrap_difference), (bootstrap_aurocs, bootstrap_auroc)]
)
@pytest.mark.parametrize("block", [1 << 20, 100], ids=["at once", "in blocks"])
def test_two_groups_of_many_columns(
    n: int,
    m: int,
    *,
    many: Callable[..., list[Interval]],
    single: Callable[..., Interval],
    block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resampling, "BLOCK", block)
    a, b = _holes((n, COLUMNS), seed=1), _holes((m, COLUMNS), seed=2)
    pairs: Any = zip(_known(a), _known(b), strict=True)
    _same(many(a, b, seed=5), [single(x, y, seed=5) for x, y in pairs])
