"""Comparisons of groups, against textbook loops and scikit-learn."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap
from sklearn.metrics import roc_auc_score

from datastore.errors import MisuseError
from project.statistics import (
    RESAMPLES,
    auroc,
    bootstrap_auroc,
    bootstrap_difference,
    bootstrap_mean,
    effect_size,
    paired_effect_size,
)

numbers = st.lists(st.integers(-20, 20).map(lambda n: n / 4), min_size=2, max_size=20)


def variance(values: list[float], ddof: int) -> float:
    mean = sum(values) / len(values)
    return sum((x - mean) ** 2 for x in values) / (len(values) - ddof)


@given(a=numbers, b=numbers)
def test_effect_sizes(a: list[float], b: list[float]) -> None:
    spread = math.sqrt((variance(a, 1) + variance(b, 1)) / 2)
    got = effect_size(a, b)
    want = (sum(b) / len(b) - sum(a) / len(a)) / spread if spread else math.nan
    assert got == pytest.approx(want, nan_ok=True)
    pairs = [y - x for x, y in zip(a, b, strict=False)]
    spread = math.sqrt(variance(pairs, 0))
    want = sum(pairs) / len(pairs) / spread if spread else math.nan
    assert paired_effect_size(a[: len(pairs)], b[: len(pairs)]) == pytest.approx(want, nan_ok=True)


@given(positive=numbers, negative=numbers)
def test_auroc_is_that_of_scikit_learn(positive: list[float], negative: list[float]) -> None:
    labels = [1] * len(positive) + [0] * len(negative)
    assert auroc(positive, negative) == pytest.approx(roc_auc_score(labels, positive + negative))


def test_what_is_undefined_is_nan() -> None:
    for value in (effect_size([1], [2, 3]), effect_size([1, 1], [1, 1]), paired_effect_size([1], [2]), auroc([], [1])):
        assert math.isnan(value)
    alone = bootstrap_mean([3.0])
    assert (alone.value, math.isnan(alone.low)) == (3.0, True)
    assert math.isnan(bootstrap_mean([]).value)


def test_pairs_and_finite_numbers_are_asked_for() -> None:
    with pytest.raises(MisuseError, match="2 and 1 values are no pairs; match them by rollout"):
        paired_effect_size([1, 2], [1])
    with pytest.raises(MisuseError, match=r"values of shape \(2,\) with 1 that are not finite can't be compared"):
        auroc([1, math.nan], [1])


def test_a_mean_over_tokens_weighs_rollouts_by_their_tokens() -> None:
    interval = bootstrap_mean([10.0, 2.0, 0.0], [10, 1, 0])
    assert interval.value == pytest.approx(12 / 11)
    assert (interval.low, interval.high) == (1.0, 2.0), "each rollout drawn alone is a bound"


@settings(max_examples=5)
@given(seed=st.integers(0, 1000))
def test_the_interval_of_a_mean_is_near_the_normal_one(seed: int) -> None:
    values = np.random.default_rng(seed).standard_normal(200)
    interval, half = bootstrap_mean(values), 1.96 * values.std() / math.sqrt(200)
    assert interval == bootstrap_mean(values), "seeded"
    assert interval.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_intervals_of_two_groups_hold_their_value() -> None:
    rng = np.random.default_rng(0)
    low, high = rng.standard_normal(30), rng.standard_normal(25) + 1
    apart, above = bootstrap_difference(low, high), bootstrap_auroc(high, low)
    assert apart.value == pytest.approx(high.mean() - low.mean())
    assert apart.low < apart.value < apart.high
    assert 0.5 < above.low < above.value == auroc(high, low) < above.high < 1


@pytest.mark.parametrize("ties", [False, True])
def test_the_interval_of_an_area_is_that_of_all_pairs_of_each_resample(ties: bool) -> None:
    random = np.random.default_rng(4)
    up, down = random.standard_normal(9) + 0.5, random.standard_normal(12)
    if ties:
        up, down = np.round(up), np.round(down)

    def pairs(up: np.ndarray, down: np.ndarray) -> float:
        difference = up[:, np.newaxis] - down
        return float((difference > 0).mean() + (difference == 0).mean() / 2)

    rng = np.random.default_rng(0)
    expected = bootstrap(
        (up, down), pairs, paired=False, vectorized=False, method="percentile", n_resamples=RESAMPLES, rng=rng
    )
    found = bootstrap_auroc(up, down)
    np.testing.assert_allclose(found.value, pairs(up, down), rtol=1e-12)
    bounds = expected.confidence_interval
    np.testing.assert_allclose([found.low, found.high], [bounds.low, bounds.high], rtol=1e-12)
