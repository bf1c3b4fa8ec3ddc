"""The formulas of calibration, each against a straight reading of its definition in float64."""

import itertools
import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from calibrate import formulas
from datastore.errors import MisuseError
from datastore.stats import Moments

seeds = st.integers(0, 2**32 - 1)
widths = st.integers(5, 40)


def activations(seed: int, tokens: int, width: int, *, dtype: Any = ml_dtypes.bfloat16) -> NDArray[Any]:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((tokens, width)) + rng.standard_normal(width)
    values[:, rng.integers(width)] *= rng.choice([1, 50, 3000])
    return values.astype(dtype)


def moments(values: NDArray[Any]) -> dict[str, NDArray[np.float64]]:
    return Moments.of(values)[0].finalise()


@given(seed=seeds, width=st.integers(1, 9))
def test_the_lower_median_is_that_of_torch(seed: int, width: int) -> None:
    values = np.random.default_rng(seed).integers(0, 4, (3, width)).astype(np.float64)
    np.testing.assert_array_equal(formulas.lower_median(values), torch.from_numpy(values).median(dim=-1).values.numpy())
    values[1, 0] = np.nan
    assert np.isnan(formulas.lower_median(values)).tolist() == [False, True, False]


@settings(max_examples=60)
@given(seed=seeds, tokens=st.integers(1, 30), width=widths)
def test_peak_dims(seed: int, tokens: int, width: int) -> None:
    values = activations(seed, tokens, width)
    wide = values.astype(np.float64)
    found = formulas.peak_dims(moments(values)["max_abs"], moments(values)["mean_abs"])
    peaks = [max(abs(wide[t, d]) for t in range(tokens)) for d in range(width)]
    median = sorted(peaks)[(width - 1) // 2]
    want = sorted(range(width), key=lambda d: (-peaks[d], d))[:5]
    assert found.dims.tolist() == want
    np.testing.assert_allclose(found.ratio, [peaks[d] / median for d in want], rtol=1e-12)
    np.testing.assert_allclose(found.mean_abs, [np.abs(wide[:, d]).mean() for d in want], rtol=1e-12)
    assert found.massive.tolist() == [peaks[d] > 100 * median for d in want]


def test_a_median_of_zero_is_an_infinite_ratio() -> None:
    found = formulas.peak_dims([0.0, 7.0, 0.0], [0.0, 1.0, 0.0], top_k=2)
    assert (found.dims.tolist(), found.ratio.tolist(), found.massive.tolist()) == ([1, 0], [np.inf] * 2, [True, False])
    with pytest.raises(MisuseError, match="top_k is 9, which is none of the 1 to 3 dimensions there are"):
        formulas.peak_dims(np.ones(3), np.ones(3), top_k=9)


@pytest.mark.parametrize(
    ("peak", "median", "massive"),
    [(2000, 1, True), (1000, 1, False), (99, 0.01, False), (101, 0.1, True), (2000, 3, False)],
)
def test_both_conditions_of_sun_et_al(peak: float, median: float, massive: bool) -> None:
    assert formulas.above_peak_threshold([[peak, 1.0]], [median]).tolist() == [[massive, False]]


@given(
    seed=seeds,
    tokens=st.integers(0, 9),
    width=widths,
    dtype=st.sampled_from([ml_dtypes.bfloat16, np.float32, np.float16]),
)
def test_the_median_magnitude_is_counted_and_adds_up(seed: int, tokens: int, width: int, dtype: Any) -> None:
    values = activations(seed, tokens, width, dtype=np.float32).clip(-6e4, 6e4).astype(dtype)
    counts = formulas.magnitude_counts(values[:3]) + formulas.magnitude_counts(values[3:])
    got = formulas.magnitude_median(counts)
    if tokens == 0:
        assert math.isnan(got)
        return
    magnitudes = np.sort(np.abs(values.astype(np.float64)), axis=None)
    want = magnitudes[(magnitudes.size - 1) // 2]
    if dtype is ml_dtypes.bfloat16:
        assert got == want
    else:
        assert got <= want <= got * (1 + 2**-7)


def test_what_is_not_finite_is_not_counted() -> None:
    values = np.array([[1.0, np.nan, np.inf, -3.0, 2.0]])
    for dtype in (ml_dtypes.bfloat16, np.float32, np.float64):
        counts = formulas.magnitude_counts(values.astype(dtype))
        assert (counts.sum(), formulas.magnitude_median(counts)) == (3, 2.0)


@settings(max_examples=60)
@given(seed=seeds, tokens=st.integers(1, 30), width=widths)
def test_alignment_from_moments_is_the_mean_of_the_cosines(seed: int, tokens: int, width: int) -> None:
    values = activations(seed, tokens, width)
    wide, got = values.astype(np.float64), moments(values)
    mean = wide.mean(axis=0)
    cosines = [float(h @ mean) / (math.hypot(*h) * math.hypot(*mean)) for h in wide]
    assert formulas.mean_alignment(got["mean_unit"], got["mean"]) == pytest.approx(np.mean(cosines), abs=1e-12)
    np.testing.assert_allclose(formulas.token_cosines(values, got["mean"]), cosines, atol=1e-12)


def test_a_zero_token_has_cosine_zero_both_ways() -> None:
    values = np.array([[3.0, 4.0], [0.0, 0.0]], np.float32)
    got = moments(values)
    assert formulas.mean_alignment(got["mean_unit"], got["mean"]) == pytest.approx(0.5)
    assert formulas.token_cosines(values, got["mean"]).tolist() == [1.0, 0.0]


@given(seed=seeds, layers=st.integers(1, 5), width=widths)
def test_magnitudes_and_cosines_of_means(seed: int, layers: int, width: int) -> None:
    means = np.random.default_rng(seed).standard_normal((layers, width))
    want = [[abs(x) / (sum(map(abs, row)) / width) for x in row] for row in means]
    np.testing.assert_allclose(formulas.dim_magnitude(means), want, rtol=1e-12)
    pairs: list[float] = [float(a @ b) / math.sqrt(float(a @ a) * float(b @ b)) for a, b in itertools.pairwise(means)]
    np.testing.assert_allclose(formulas.consecutive_cosine(means), pairs, atol=1e-12)


def test_means_of_zero_have_no_direction() -> None:
    assert np.isnan(formulas.consecutive_cosine([[0.0, 0.0], [1.0, 0.0]])).all()
    assert np.isnan(formulas.dim_magnitude([0.0, 0.0])).all()


@settings(max_examples=60)
@given(seed=seeds, tokens=st.integers(1, 60), width=widths)
def test_how_steady_each_dimension_is(seed: int, tokens: int, width: int) -> None:
    values = activations(seed, tokens, width)
    magnitudes, got = np.abs(values.astype(np.float64)), moments(values)
    base, ratio, cv = formulas.dim_spread(got["mean_abs"], got["rms"])
    assert base == pytest.approx(sorted(magnitudes.mean(axis=0))[(width - 1) // 2], rel=1e-12)
    np.testing.assert_allclose(ratio, magnitudes.mean(axis=0) / base, rtol=1e-12)
    np.testing.assert_allclose(cv, magnitudes.std(axis=0) / magnitudes.mean(axis=0), atol=3e-7)
    chosen = values[:, :3]
    above: Any = [100 * sum(float(x) > 10 * base for x in magnitudes[:, d]) / tokens for d in range(3)]
    np.testing.assert_allclose(formulas.share_above(chosen, float(base)), above)
    np.testing.assert_allclose(formulas.percentiles(chosen, 5)[0], np.percentile(magnitudes[:, :3], 5, axis=0))


def test_no_tokens_have_no_share_and_no_percentile() -> None:
    none = np.empty((0, 2), np.float32)
    assert np.isnan(formulas.share_above(none, 1.0)).tolist() == [True, True]
    assert np.isnan(formulas.percentiles(none, [5, 95])).shape == (2, 2)


@given(seed=seeds, cuts=st.lists(st.integers(0, 30), max_size=4), scale=st.sampled_from([1.0, 1e-9, 1e5]))
def test_a_spread_is_the_same_for_any_split(seed: int, cuts: list[int], scale: float) -> None:
    values = 0.9999 + scale * np.random.default_rng(seed).standard_normal(30)
    total = formulas.Spread()
    for part in np.split(values, sorted(cuts)):
        total = total + formulas.Spread.of(part)
    want = {"mean": values.mean(), "min": values.min(), "max": values.max(), "std": values.std(ddof=1)}
    assert total.finalise() == pytest.approx(want, rel=1e-6, abs=1e-14)


def test_a_spread_of_one_has_no_deviation() -> None:
    assert formulas.Spread.of([2.0]).finalise() == pytest.approx(
        {"mean": 2, "min": 2, "max": 2, "std": math.nan}, nan_ok=True
    )
    assert all(math.isnan(value) for value in formulas.Spread().finalise().values())


def test_recommended_dims_are_in_the_first_five_of_three_layers() -> None:
    assert formulas.recommended_dims(
        [[5, 36, 52, 49, 43, 7], [5, 52, 58, 42, 19, 7], [5, 52, 1, 55, 59, 7]]
    ).tolist() == [5, 52]


def test_quantiles_leave_out_what_is_not_finite() -> None:
    assert formulas.norm_quantiles([1.0, 3.0, np.inf, 2.0, np.nan], [0, 0.5, 1]).tolist() == [1.0, 2.0, 3.0]
    assert np.isnan(formulas.norm_quantiles([], [0.5])).all()
