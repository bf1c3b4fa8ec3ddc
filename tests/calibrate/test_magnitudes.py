"""Medians counted in a window against sorting, and a calibration that samples against one that counts everything."""

import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import calibrate
from calibrate import layer, magnitudes
from calibrate.magnitudes import ALL, Magnitudes, Window, median_bits, window_around
from calibrate.selected import resolve
from tests.calibrate.stores import build, random_rows

LAYERS = (2, 7)
LENGTHS, ENDS = (13, 40, 1, 20, 16, 9), (5, 39, 0, 19, 0, 9)


def code_of(magnitude: float) -> int:
    return int(np.array(magnitude, np.float32).view(np.uint32) >> 16)


@settings(max_examples=80)
@given(
    seed=st.integers(0, 2**32 - 1),
    tokens=st.integers(1, 30),
    dtype=st.sampled_from([ml_dtypes.bfloat16, np.float16, np.float32]),
    away=st.integers(-12, 12),
    cut=st.integers(0, 30),
    spoilt=st.booleans(),
)
def test_a_window_gives_the_median_or_says_that_it_lies_elsewhere(
    seed: int, tokens: int, dtype: Any, away: int, cut: int, spoilt: bool
) -> None:
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal((tokens, 33)) * rng.choice([0.01, 1, 300], 33)).astype(dtype)
    if spoilt:
        values[0, :5] = [np.nan, np.inf, -np.inf, 0, -0.0]
    finite = np.sort(np.abs(values.astype(np.float64)[np.isfinite(values.astype(np.float64))]))
    code = code_of(float(finite[(len(finite) - 1) // 2]))
    window = Window(max(0, code + away - 4), code + away + 5)
    one, other = Magnitudes.none(window), Magnitudes.none(window)
    one.add(values[:cut])
    other.add(values[cut:])
    one.merge(other)
    found = one.median(len(finite))
    if abs(away) <= 4:
        assert found is not None
        assert code_of(found) == code
    else:
        assert found is None
    everything = Magnitudes.none(ALL)
    everything.add(values)
    assert everything.median(len(finite)) == np.array(code << 16, np.uint32).view(np.float32)


def test_the_window_is_about_the_samples_and_no_wider_than_is_of_use() -> None:
    assert window_around([501, 501]) == Window(501 - 2, 501 + 3)
    assert window_around([500, 502]) == Window(501 - 6, 501 + 7), "the standard error is 1"
    assert window_around([1, 1]) == Window(0, 4)
    assert window_around([ALL.high - 1] * 3) == Window(ALL.high - 3, ALL.high)
    assert window_around([]) == window_around([500]) == ALL
    assert window_around([500, 700]) == ALL
    assert median_bits(np.array([[1.0, -8.0, 2.0]], np.float32)) == code_of(2.0)
    assert math.isnan(Magnitudes.none(ALL).median(0) or 0.0)


@pytest.mark.parametrize("segment", [None, "prompt", ("prompt", "response")])
@pytest.mark.parametrize("off", [0, 1000])
def test_a_sample_changes_no_result(segment: Any, off: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the sample leads astray, and all elements are counted after all."""
    ends = {str(i): end for i, end in enumerate(ENDS)}
    parts = [random_rows(seed, LENGTHS, LAYERS, width=64) for seed in (1, 2)]
    named = [{f"{i}{name}": of for name, of in rows.items()} for i, rows in enumerate(parts)]
    both = [{f"{i}{name}": end for name, end in ends.items()} for i in range(2)]
    stores = [
        build(tmp_path / f"{i}.zarr", {"residual": rows}, here)
        for i, (rows, here) in enumerate(zip(named, both, strict=True))
    ]
    want = calibrate.fit(stores, segment=segment)
    used: list[Window] = []

    def expected(medians: list[int]) -> Window:
        assert len(medians) == layer.SAMPLES
        used.append(window_around([one + off for one in medians]))
        return used[-1]

    monkeypatch.setattr(layer, "SAMPLED_FROM", 1)
    monkeypatch.setattr(layer, "window_around", expected)
    monkeypatch.setattr(magnitudes, "MOST", ALL.high)
    got = calibrate.fit(stores, segment=segment)
    assert len(used) == len(LAYERS)
    assert ALL not in used
    for name in want.data.variables:
        np.testing.assert_array_equal(want.data[name].values, got.data[name].values, err_msg=str(name))


def test_samples_lie_in_what_is_pooled_and_everywhere_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = {str(i): end for i, end in enumerate(ENDS)}
    selected = resolve(build(tmp_path / "run.zarr", {"residual": random_rows(3, LENGTHS, LAYERS)}, ends))
    monkeypatch.setattr(layer, "SAMPLE_TOKENS", 3)
    (runs,) = layer._spread_out(selected)
    assert len(runs) == layer.SAMPLES
    for row, first, last in runs:
        prompt, response = selected.counts[row].tolist()
        segment = int(first >= prompt)
        assert selected.pooled[row, segment]
        assert (0, prompt)[segment] <= first < last <= (prompt, prompt + response)[segment]
        assert last - first <= 3
    assert len({row for row, _, _ in runs}) >= 3
