"""The arithmetic of scores, against float64 NumPy and straight loops."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from datastore.errors import MisuseError
from project import scoring

U = 2.0**-24
DTYPES = [ml_dtypes.bfloat16, np.float16, np.float32, np.float64]
seeds = st.integers(0, 2**32 - 1)


def activations(seed: int, tokens: int, width: int, *, dtype: Any = ml_dtypes.bfloat16) -> NDArray[Any]:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((tokens, width)) * 2.0 ** rng.integers(-6, 3, (tokens, 1))
    values[:, rng.integers(width)] *= 1000  # a massive dimension
    return values.astype(dtype)


@settings(max_examples=60)
@given(
    seed=seeds,
    tokens=st.integers(0, 200),
    width=st.integers(1, 300),
    count=st.integers(1, 24),
    dtype=st.sampled_from(DTYPES),
)
def test_scores_are_the_exact_ones_within_the_bound(seed: int, tokens: int, width: int, count: int, dtype: Any) -> None:
    values = activations(seed, tokens, width, dtype=dtype)
    vectors = np.random.default_rng(seed + 1).standard_normal((count, width)) * 3
    out = np.full((tokens, count), np.nan, np.float32)
    assert scoring.score_block(values, scoring.unit_columns(list(vectors)), out) is out
    exact = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    wide = values.astype(np.float64)
    bound = (width + 4) * U * (np.abs(wide) @ np.abs(exact.T)) + 1e-40
    assert np.all(np.abs(out - wide @ exact.T) <= bound)


def test_a_bfloat16_product_would_not_do() -> None:
    values = activations(0, 100, 2560)
    vector = np.random.default_rng(1).standard_normal(2560)
    exact = values.astype(np.float64) @ (vector / np.linalg.norm(vector))
    out = np.empty((100, 1), np.float32)
    scoring.score_block(values, scoring.unit_columns([vector]), out)
    rounded = values.astype(np.float64) @ scoring.unit(vector).astype(ml_dtypes.bfloat16).astype(np.float64)
    ours, theirs = np.abs(out[:, 0] - exact).max(), np.abs(rounded - exact).max()
    assert ours < 1e-3 * theirs


def test_a_block_gives_the_same_bits_again_with_a_buffer_that_was_used() -> None:
    directions = scoring.unit_columns(list(np.random.default_rng(0).standard_normal((3, 96))))
    scratch, values = scoring.scratch_for(96), activations(3, 150, 96)
    first, again = np.empty((150, 3), np.float32), np.empty((150, 3), np.float32)
    with scoring.one_blas_thread():
        scoring.score_block(values, directions, first, scratch=scratch)
        scoring.score_block(activations(4, 90, 96), directions, np.empty((90, 3), np.float32), scratch=scratch)
        scoring.score_block(values, directions, again, scratch=scratch)
    assert first.tobytes() == again.tobytes()


def test_only_the_row_that_is_not_finite_has_no_score() -> None:
    values = activations(5, 130, 32)
    values[70, 3], values[71, 4] = np.nan, np.inf
    directions = scoring.unit_columns(list(np.eye(32)[:5]))
    out = scoring.score_block(values, directions, np.empty((130, 5), np.float32))
    assert np.flatnonzero(~np.isfinite(out).all(axis=1)).tolist() == [70, 71]
    assert np.isnan(out[70, 3])


def test_what_does_not_fit_is_refused() -> None:
    directions = scoring.unit_columns([np.ones(4)])
    with pytest.raises(MisuseError, match=r"activations of shape \(2, 5\), directions of shape \(4, 1\)"):
        scoring.score_block(np.ones((2, 5), np.float32), directions, np.empty((2, 1), np.float32))
    with pytest.raises(MisuseError, match=r"directions of widths \[\(3,\), \(4,\)\] can't be scored together"):
        scoring.unit_columns([np.ones(3), np.ones(4)])


@given(seed=seeds, width=st.integers(1, 50), power=st.integers(-900, 900))
def test_a_unit_vector_is_the_exact_one_rounded_once(seed: int, width: int, power: int) -> None:
    vector = np.random.default_rng(seed).standard_normal(width) + 0.1
    exact = vector / np.sqrt(sum(float(x) ** 2 for x in vector))
    np.testing.assert_allclose(scoring.unit(vector * 2.0**power), exact, rtol=2**-23.9, atol=0)


@pytest.mark.parametrize(
    "vector", [np.zeros(3), np.array([1.0, np.nan]), np.array([np.inf, 1.0]), np.ones((2, 2)), np.ones(0)]
)
def test_what_has_no_direction_is_refused(vector: NDArray[Any]) -> None:
    with pytest.raises(MisuseError, match="has no direction to score along"):
        scoring.unit(vector)


@given(seed=seeds, tokens=st.integers(0, 150), dtype=st.sampled_from(DTYPES))
def test_norms_are_rounded_once(seed: int, tokens: int, dtype: Any) -> None:
    values = activations(seed, tokens, 40, dtype=dtype)
    exact = np.linalg.norm(values.astype(np.float64), axis=1)
    np.testing.assert_allclose(scoring.token_norms(values), exact, rtol=2**-23.9)


@given(seed=seeds, tokens=st.integers(0, 30))
def test_cosine_normalised_centred_and_velocity(seed: int, tokens: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.standard_normal((tokens, 2)).astype(np.float32)
    norms = np.where(rng.random(tokens) < 0.2, 0, rng.random(tokens) + 0.5).astype(np.float32)
    response = rng.random(tokens) < 0.5
    p, h = scores.astype(float), norms.astype(float)
    want = [[p[t, k] / h[t] if h[t] > 0 else 0.0 for k in range(2)] for t in range(tokens)]
    np.testing.assert_allclose(scoring.cosine(scores, norms), np.reshape(want, (tokens, 2)), rtol=2**-23, atol=1e-30)
    counted = [h[t] for t in range(tokens) if response[t]] or list(h)
    mean = sum(counted) / len(counted) if counted else 0.0
    np.testing.assert_allclose(
        scoring.normalised(scores, norms, response=response), p / mean if mean else p, rtol=2**-23, atol=1e-30
    )
    np.testing.assert_allclose(scoring.centred(scores), p - p[0] if tokens else p, rtol=2**-23, atol=1e-30)
    steps = [p[t + 1] - p[t] for t in range(tokens - 1)]
    np.testing.assert_allclose(
        scoring.velocity(scores), np.reshape(steps, (max(tokens - 1, 0), 2)), rtol=2**-23, atol=1e-30
    )


def test_norms_must_be_of_the_same_tokens() -> None:
    with pytest.raises(MisuseError, match=r"\(3,\) norms do not belong to scores of shape \(4, 2\)"):
        scoring.cosine(np.ones((4, 2)), np.ones(3))


@given(seed=seeds, tokens=st.integers(0, 40), window=st.integers(1, 12))
def test_smoothing_is_the_mean_of_what_the_window_reaches(seed: int, tokens: int, window: int) -> None:
    values = np.random.default_rng(seed).standard_normal((tokens, 2))
    half = window // 2
    rows = [values[max(0, t - half) : t + half + 1].mean(axis=0) for t in range(tokens)]
    want = values if tokens < window else np.reshape(rows, (tokens, 2))
    np.testing.assert_allclose(scoring.smooth(values, window), want, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(scoring.smooth(values[:, 0], window), scoring.smooth(values, window)[:, 0])


def test_an_even_window_is_one_wider() -> None:
    values = np.arange(9.0) ** 2
    np.testing.assert_array_equal(scoring.smooth(values, 4), scoring.smooth(values, 5))
    with pytest.raises(MisuseError, match="a smoothing window of 0 tokens averages nothing"):
        scoring.smooth(values, 0)


def test_a_gap_does_not_spread_beyond_the_window() -> None:
    values = np.arange(20.0)
    values[10] = np.nan
    assert np.flatnonzero(np.isnan(scoring.smooth(values, 5))).tolist() == [8, 9, 10, 11, 12]


@settings(max_examples=50)
@given(seed=seeds, tokens=st.integers(0, 20), dims=st.sets(st.integers(0, 15), max_size=16))
def test_cleaning_is_scoring_without_the_dimensions(seed: int, tokens: int, dims: set[int]) -> None:
    values = activations(seed, tokens, 16, dtype=np.float32)
    columns = scoring.unit_columns(list(np.random.default_rng(seed).standard_normal((3, 16))))
    chosen, wide = sorted(dims), values.astype(np.float64)
    without = wide.copy()
    without[:, chosen] = 0
    got = scoring.clean_scores(wide @ columns, values[:, chosen], columns[chosen])
    size = np.abs(wide) @ np.abs(columns.astype(np.float64)) + 1e-30
    assert np.all(np.abs(got - without @ columns) <= 4 * U * size)
    norms = scoring.token_norms(values)
    left = scoring.clean_norms(norms, values[:, chosen])
    assert np.all(np.abs(left - np.linalg.norm(without, axis=1)) <= 2.0**-11 * norms)


def test_a_difference_is_cleaned_of_its_own_difference() -> None:
    a, b = activations(1, 9, 16, dtype=np.float32), activations(2, 9, 16, dtype=np.float32)
    v = scoring.unit_columns([np.random.default_rng(3).standard_normal(16)])
    each = scoring.clean_scores(b @ v, b[:, :4], v[:4]).astype(float) - scoring.clean_scores(a @ v, a[:, :4], v[:4])
    together = scoring.clean_scores(b @ v - a @ v, b[:, :4] - a[:, :4], v[:4])
    np.testing.assert_allclose(together, each, atol=1e-5 * np.abs(b).max())


def test_an_ensemble_is_a_weighted_mean() -> None:
    scores = np.array([[1.0, 3.0], [2.0, 6.0]])
    assert scoring.ensemble(scores, [1, 3]).tolist() == [2.5, 5.0]
    assert scoring.ensemble(scores, [1, -1]).tolist() == [2.0, 4.0], "equal weights where they sum to zero"
    with pytest.raises(MisuseError, match=r"weights \[1.0\] are not one finite number for each of 2 directions"):
        scoring.ensemble(scores, [1])


def test_an_unknown_baseline_is_no_midpoint() -> None:
    assert scoring.less_baseline([[1.0, 2.0]], [0.5, 0.0]).tolist() == [[0.5, 2.0]]
    with pytest.raises(MisuseError, match=r"1 of 2 directions have no baseline, so their scores can't be centred"):
        scoring.less_baseline([[1.0, 2.0]], [0.5, np.nan])
