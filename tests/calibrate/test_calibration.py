"""Calibration of stores against a straight reading of every definition in float64, and against itself otherwise cut."""

import math
import tempfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import calibrate
import datastore
from datastore.errors import AbsentError, ConflictError, CorruptError, MisuseError
from tests.calibrate.stores import Rows, build, random_rows

LAYERS = (2, 7, 9)
LENGTHS, ENDS = (13, 9, 1, 20, 6), (5, 9, 0, 19, 0)
"""With both halves, all prompt, one response token, one response token behind a long prompt, all response."""
EITHER, PROMPT, RESPONSE, BOTH = None, "prompt", "response", ("prompt", "response")


def ends_of(lengths: Sequence[int], ends: Sequence[int]) -> dict[str, int]:
    return {str(i): min(end, n) for i, (n, end) in enumerate(zip(lengths, ends, strict=True))}


def halves(rows: Rows, ends: Mapping[str, int], layer: int) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
    wide = {name: of[layer].astype(np.float64) for name, of in rows.items()}
    return {name: (values[: ends[name]], values[ends[name] :]) for name, values in wide.items()}


def tokens_of(rows: Rows, ends: Mapping[str, int], layer: int, segment: Any) -> NDArray[np.float64]:
    """All tokens that are pooled, by the definition."""
    parts: list[Any] = []
    for prompt, response in halves(rows, ends, layer).values():
        if segment is None:
            parts.append(response if len(response) else prompt)
        else:
            parts += [half for half, name in ((prompt, "prompt"), (response, "response")) if name in segment]
    return np.concatenate(parts)


def cosines(half: NDArray[np.float64]) -> list[float]:
    mean = half.mean(axis=0)
    return [float(h @ mean) / (math.hypot(*h) * math.hypot(*mean)) for h in half]


def median(values: Sequence[float]) -> float:
    return sorted(values)[(len(values) - 1) // 2]


def check_layer(found: xr.Dataset, values: NDArray[np.float64]) -> None:
    """Compare one layer's pooled results with the definitions, written out."""
    mean, magnitude = values.mean(axis=0), np.abs(values)
    close = np.testing.assert_allclose
    close(found["mean"], mean, rtol=1e-12, atol=1e-12)
    close(found["std"], values.std(axis=0), atol=1e-6 * np.abs(mean).max())
    close(found["mean_abs"], magnitude.mean(axis=0), rtol=1e-12)
    close(found["max_abs"], magnitude.max(axis=0), rtol=1e-12)
    middle = median(magnitude.max(axis=0).tolist())
    close(found["peak_ratio"], magnitude.max(axis=0) / middle, rtol=1e-12)
    assert found["massive"].values.tolist() == (magnitude.max(axis=0) / middle > 100).tolist()
    order = sorted(range(len(mean)), key=lambda d: -abs(mean[d]))
    assert found["top_dims"].values.tolist() == order[:4]
    close(found["dim_magnitude"], np.abs(mean) / np.abs(mean).mean(), rtol=1e-12)
    base = median(magnitude.mean(axis=0).tolist())
    close(found["dim_base"], base, rtol=1e-12)
    close(found["cv"], magnitude.std(axis=0) / magnitude.mean(axis=0), atol=1e-6)
    lengths = np.array([math.hypot(*h) for h in values])
    close(found["norm"], lengths.mean(), rtol=1e-6)
    close(found["norm_quantiles"], np.quantile(lengths, found["quantile"].values), rtol=1e-6)
    middle = median(magnitude.reshape(-1).tolist())
    close(found["magnitude_median"], middle, rtol=0)
    sun = (magnitude.max(axis=0) > 100) & (magnitude.max(axis=0) > 1000 * middle)
    assert found["massive_sun"].values.tolist() == sun.tolist()
    tracked = magnitude[:, found["tracked_dim"].values]
    close(found["percentiles"], np.percentile(tracked, found["percentile"].values, axis=0), rtol=1e-12)
    close(found["share_above_10x"], 100 * (tracked > 10 * base).mean(axis=0), rtol=1e-12)


@pytest.mark.parametrize("segment", [EITHER, PROMPT, RESPONSE, BOTH])
def test_every_result_is_its_definition(segment: Any, tmp_path: Path) -> None:
    rows, ends = random_rows(1, LENGTHS, LAYERS), ends_of(LENGTHS, ENDS)
    store = build(tmp_path / "run.zarr", {"residual": rows}, ends)
    found = calibrate.fit(store, segment=segment, top_k=4)
    assert found.layers == LAYERS
    means = []
    for layer in LAYERS:
        values = tokens_of(rows, ends, layer, segment)
        check_layer(found.data.sel(layer=layer), values)
        means.append(values.mean(axis=0))
    pairs: Any = [float(a @ b) / (math.hypot(*a) * math.hypot(*b)) for a, b in pairwise(means)]
    np.testing.assert_allclose(found.data["consecutive_cosine"], [*pairs, np.nan], atol=1e-12)
    assert found.data.attrs["n_tokens"] == len(tokens_of(rows, ends, 2, segment))


def test_what_is_found_for_each_rollout(tmp_path: Path) -> None:
    rows, ends = random_rows(2, LENGTHS, LAYERS), ends_of(LENGTHS, ENDS)
    data = calibrate.fit(build(tmp_path / "run.zarr", {"residual": rows}, ends), threshold=20, top_k=2).data
    data = data.set_index(row="rollout_id")
    for layer in LAYERS:
        aligned = []
        for name, (prompt, response) in halves(rows, ends, layer).items():
            one = data.sel(row=name, layer=layer)
            for half, segment in ((prompt, "prompt"), (response, "response")):
                here, want = one.sel(segment=segment), cosines(half) if len(half) else [np.nan]
                np.testing.assert_allclose(here["alignment"], np.mean(want), rtol=1e-12)
                np.testing.assert_allclose(here["alignment_min"], min(want), rtol=1e-12)
                np.testing.assert_allclose(here["alignment_max"], max(want), rtol=1e-12)
                std = np.std(want, ddof=1) if len(want) > 1 else np.nan
                np.testing.assert_allclose(here["alignment_std"], std, rtol=1e-6, atol=1e-12)
            half = prompt if len(prompt) else response
            aligned.append(np.mean(cosines(half)))
            peaks = np.abs(half).max(axis=0)
            order = sorted(range(len(peaks)), key=lambda d, peaks=peaks: -peaks[d])[:2]  # type: ignore[misc]
            assert one["rollout_dims"].values.tolist() == order
            ratio = [peaks[d] / median(peaks.tolist()) for d in order]
            np.testing.assert_allclose(one["rollout_ratio"], ratio, rtol=1e-12)
            assert one["rollout_massive"].values.tolist() == [r > 20 for r in ratio]
            np.testing.assert_allclose(one["rollout_mean_abs"], [np.abs(half)[:, d].mean() for d in order], rtol=1e-12)
        np.testing.assert_allclose(data["mean_alignment"].sel(layer=layer), np.mean(aligned), rtol=1e-12)


def assert_same(a: calibrate.Calibration, b: calibrate.Calibration, *, but: Sequence[str] = ()) -> None:
    """The same results to float64 rounding, rollouts matched by their ids."""
    first, second = (one.data.set_index(row="rollout_id").sortby("row") for one in (a, b))
    assert set(first.data_vars) - set(but) == set(second.data_vars) - set(but)
    for name in set(first.data_vars) - set(but):
        assert first[name].dims == second[name].dims
        # a deviation is the root of a difference: half the digits
        loose = 1e-6 if name in ("std", "cv", "alignment_std") else 1e-11
        np.testing.assert_allclose(
            first[name].values.astype(float), second[name].values.astype(float), rtol=loose, atol=loose, err_msg=name
        )
    for name in ("token_sha256", "prompt_tokens", "response_tokens"):
        assert first[name].values.tolist() == second[name].values.tolist()


cuts = st.fixed_dictionaries(
    {
        "level": st.sampled_from(["rollout", "capture", "none"]),
        "most_tokens": st.sampled_from([2, 4, 16, 64]),
        "captures": st.sampled_from(
            [None, (("0", "1", "2", "3"),), (("3", "1"), ("0", "2")), (("2",), ("0", "1", "3"))]
        ),
    }
)


@settings(max_examples=10)
@given(
    seed=st.integers(0, 2**32 - 1),
    lengths=st.tuples(*[st.integers(1, 24)] * 4),
    ends=st.tuples(*[st.integers(0, 24)] * 4),
    dtype=st.sampled_from([ml_dtypes.bfloat16, np.float16, np.float32, np.float64]),
    cut=cuts,
    segment=st.sampled_from([EITHER, PROMPT, BOTH]),
)
def test_any_cut_of_the_data_gives_the_same(
    seed: int, lengths: tuple[int, ...], ends: tuple[int, ...], dtype: Any, cut: dict[str, Any], segment: Any
) -> None:
    rows, where = random_rows(seed, lengths, (1, 4), width=8, dtype=dtype), ends_of(lengths, ends)
    if segment == PROMPT and not any(where.values()):
        segment = EITHER
    with tempfile.TemporaryDirectory() as directory:
        one = build(Path(directory, "a.zarr"), {"residual": rows}, where, most_tokens=8)
        other = build(Path(directory, "b.zarr"), {"residual": rows}, where, **cut)
        small = 1 << 18  # a few chunks, and the means of one or two rollouts at a time
        assert_same(
            calibrate.fit(one, segment=segment),
            calibrate.fit(other, segment=segment, memory=small),
            but=("component_norm",),
        )


def test_a_captures_sum_that_does_not_tell_what_counts_apart(tmp_path: Path) -> None:
    """Of a rollout without a response the prompt counts, and the capture keeps one sum of all its prompts."""
    rows, ends = random_rows(6, LENGTHS, LAYERS), ends_of(LENGTHS, ENDS)
    found = calibrate.fit(build(tmp_path / "a.zarr", {"residual": rows}, ends, level="capture"))
    assert (found.sources["mean"], found.sources["norm"]) == ("pass", "statistics")
    assert_same(calibrate.fit(build(tmp_path / "b.zarr", {"residual": rows}, ends)), found)


def test_an_array_gives_what_its_store_gives(tmp_path: Path) -> None:
    rows, ends = random_rows(3, LENGTHS, LAYERS), ends_of(LENGTHS, ENDS)
    store = build(tmp_path / "run.zarr", {"residual": rows}, ends)
    array = store.select("residual")
    assert_same(calibrate.fit(store), calibrate.fit(array), but=("component_norm",))
    assert_same(calibrate.fit(store), calibrate.fit(array.chunk({"token": 7, "hidden": 5})), but=("component_norm",))
    first = store.select("residual", positions=slice(0, 4), layers=7)
    found = calibrate.fit(first, segment=BOTH, memory=5000)
    values = np.concatenate([rows[name][7][:4] for name in rows]).astype(np.float64)
    np.testing.assert_allclose(found.data["mean"][0], values.mean(axis=0), rtol=1e-12)
    assert found.layers == (7,)


def test_several_stores_are_one(tmp_path: Path) -> None:
    rows, ends = random_rows(4, LENGTHS, LAYERS), ends_of(LENGTHS, ENDS)
    whole = build(tmp_path / "all.zarr", {"residual": rows}, ends)
    parts = [{n: rows[n] for n in "03"}, {n: rows[n] for n in "124"}]
    stores = [build(tmp_path / f"{i}.zarr", {"residual": part}, ends) for i, part in enumerate(parts)]
    found = calibrate.fit([stores[0], tmp_path / "1.zarr"])
    assert_same(calibrate.fit(whole), found, but=())
    assert [one["store"] for one in found.data.attrs["sources"]] == [str(store.path) for store in stores]
    assert found.data["source"].values.tolist() == [0, 0, 1, 1, 1]
    some = calibrate.fit(stores, rollouts=["0", "4"])
    assert_same(calibrate.fit(whole, rollouts=["0", "4"]), some)


@pytest.mark.parametrize(
    ("level", "rollouts", "total", "rows", "norms"),
    [
        ("rollout", None, "statistics", "statistics", "statistics"),
        ("rollout", ["0", "3"], "statistics", "statistics", "statistics"),
        ("capture", None, "statistics", "pass", "statistics"),
        ("capture", ["0", "3"], "pass", "pass", "pass"),
        ("none", None, "pass", "pass", "pass"),
    ],
)
def test_it_says_what_took_a_pass(
    level: str, rollouts: list[str] | None, total: str, rows: str, norms: str, tmp_path: Path
) -> None:
    lengths = (12, 9, 3, 20)
    store = build(
        tmp_path / "run.zarr",
        {"residual": random_rows(5, lengths, LAYERS)},
        ends_of(lengths, (3, 3, 1, 8)),
        level=level,
    )
    plain = build(
        tmp_path / "plain.zarr", {"residual": random_rows(5, lengths, LAYERS)}, ends_of(lengths, (3, 3, 1, 8))
    )
    seen: list[int] = []
    found = calibrate.fit(store, rollouts=rollouts, tick=seen.append)
    assert_same(calibrate.fit(plain, rollouts=rollouts), found, but=("component_norm",))
    assert {found.sources[name] for name in ("mean", "max_abs", "cv", "top_dims", "consecutive_cosine")} == {total}
    assert {found.sources[name] for name in ("alignment", "mean_alignment", "rollout_dims")} == {rows}
    assert {found.sources[name] for name in ("norm", "norm_quantiles")} == {norms}
    assert {found.sources[name] for name in ("alignment_min", "magnitude_median", "percentiles")} == {"pass"}
    tokens = sum(lengths) if rollouts is None else 32
    passes = 1 if rows == "statistics" else 2
    assert sum(seen) == passes * tokens * len(LAYERS)


def test_without_a_pass_no_data_is_read(tmp_path: Path) -> None:
    rows, ends = random_rows(6, LENGTHS, LAYERS), ends_of(LENGTHS, ENDS)
    store = build(tmp_path / "run.zarr", {"residual": rows}, ends)
    full = calibrate.fit(store)
    for chunk in (store.path / "captures" / "0001" / "residual" / "c").rglob("0"):
        if chunk.is_file():
            chunk.unlink()
    found = calibrate.fit(store, passes=False)
    assert set(found.sources.values()) == {"statistics"}
    lacking = {name for name, source in full.sources.items() if source == "pass"}
    assert_same(full, found, but=tuple(lacking))
    with pytest.raises(CorruptError, match="is missing"):
        calibrate.fit(store)


def test_sums_of_whole_captures_answer_without_a_pass_where_they_can(tmp_path: Path) -> None:
    lengths = (12, 9, 3, 20)
    rows = random_rows(7, lengths, LAYERS)
    alike = build(tmp_path / "a.zarr", {"residual": rows}, ends_of(lengths, (3, 3, 1, 8)), level="capture")
    found = calibrate.fit(alike, passes=False)
    np.testing.assert_allclose(found.data["mean"], calibrate.fit(alike).data["mean"], rtol=1e-12)
    assert np.isnan(found.data["alignment"]).all()
    mixed = build(tmp_path / "b.zarr", {"residual": rows}, ends_of(lengths, (3, 9, 1, 8)), level="capture")
    with pytest.raises(MisuseError, match=r"do not tell 4 of these rollouts apart at layer 2, so a pass .* is needed"):
        calibrate.fit(mixed, passes=False)


def test_what_is_not_finite_is_left_out_and_counted(tmp_path: Path) -> None:
    rows: Any = random_rows(8, (6, 5), (1,))
    rows["0"][1][2, 4], rows["1"][1][0, 0] = np.nan, np.inf
    rows["1"][1][3] = 0
    store = build(tmp_path / "run.zarr", {"residual": rows}, {"0": 0, "1": 0})
    found = calibrate.fit(store)
    assert found.data["nonfinite"].values[0, [0, 4]].tolist() == [1, 1]
    assert found.data["nonfinite_tokens"].values.tolist() == [2]
    for name, one in found.data.data_vars.items():
        paired = one.isel(layer=slice(None, -1)) if name == "consecutive_cosine" else one
        kept = paired.isel(segment=1) if "segment" in paired.dims else paired
        assert np.isfinite(kept.values.astype(float)).all(), name
    wide = rows["1"][1].astype(np.float64)
    mean = np.where(np.isfinite(wide), wide, 0).sum(axis=0) / np.isfinite(wide).sum(axis=0)
    seen = [float(h @ mean) / ((math.hypot(*h) or 1.0) * math.hypot(*mean)) for h in wide[1:]]
    assert 0.0 in seen, "a token of zeros has cosine 0"
    last = found.data.set_index(row="rollout_id").sel(row="1", segment="response").isel(layer=0)
    spread = [float(last[f"alignment_{name}"]) for name in ("min", "max", "std")]
    assert spread == pytest.approx([min(seen), max(seen), np.std(seen, ddof=1)])
    assert float(last["alignment"]) == pytest.approx(sum(seen) / len(wide), rel=1e-9)
    for level in ("capture", "none"):
        other = build(tmp_path / f"{level}.zarr", {"residual": rows}, {"0": 0, "1": 0}, level=level, most_tokens=2)
        assert_same(found, calibrate.fit(other), but=("component_norm",))


def test_components_of_another_width_and_norms_of_all(tmp_path: Path) -> None:
    rows, ends = random_rows(9, (9, 4), (1, 2, 3)), {"0": 2, "1": 1}
    keys = random_rows(10, (9, 4), (1, 2, 3), width=6)
    store = build(tmp_path / "run.zarr", {"residual": rows, "attn_contribution": rows, "k_proj": keys}, ends)
    found = calibrate.fit(store, component="k_proj", top_k=3)
    assert found.data.sizes["hidden"] == 6
    np.testing.assert_allclose(
        found.data["mean"][1], np.concatenate([keys[n][2][ends[n] :] for n in "01"]).astype(float).mean(0)
    )
    norms = found.data["component_norm"].sel(component="residual").values
    np.testing.assert_allclose(norms, calibrate.fit(store).data["norm"], rtol=1e-12)
    with pytest.raises(MisuseError, match="top_k is 9, which is none of the 1 to 6 dimensions"):
        calibrate.fit(store, component="k_proj", top_k=9)


def test_layers_that_only_some_rollouts_have_are_left_out_and_named(tmp_path: Path) -> None:
    rows = random_rows(11, (9, 4), (1, 2, 3))
    path, ends = tmp_path / "run.zarr", {"0": 2, "1": 1}
    build(path, {"residual": {"0": rows["0"]}}, ends)
    store = build(path, {"residual": {"1": {n: rows["1"][n] for n in (2, 3)}}}, ends)
    found = calibrate.fit(store)
    assert found.layers == (2, 3)
    assert found.data.attrs["sources"][0]["layers_left_out"] == [1]
    assert calibrate.fit(store, rollouts="0").layers == (1, 2, 3)
    with pytest.raises(AbsentError, match=r"residual at layer 1 .*is not captured"):
        calibrate.fit(store, layers=1)


@pytest.mark.parametrize(
    ("wanted", "error", "message"),
    [
        ({"component": "mlp_out"}, AbsentError, "component 'mlp_out' is not captured"),
        ({"layers": [4]}, AbsentError, "residual at layer 4 is not captured"),
        ({"rollouts": ["0", "7"]}, AbsentError, "1 of 2 rollouts asked for are in none of the stores: 7"),
        (
            {"rollouts": ["1"], "segment": "response"},
            MisuseError,
            r"no tokens to calibrate: 1 rollouts .* the response",
        ),
        ({"segment": "answer"}, MisuseError, "segment 'answer' is not known; choose from prompt, response"),
        ({"segment": ()}, MisuseError, r"segment \(none given\) is not known"),
        ({"rollouts": []}, MisuseError, "nothing is selected to be calibrated"),
    ],
)
def test_what_cannot_be_calibrated_is_said(
    wanted: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    store = build(tmp_path / "run.zarr", {"residual": random_rows(12, (9, 4), (1, 2))}, {"0": 2, "1": 4})
    with pytest.raises(error, match=message):
        calibrate.fit(store, **wanted)


def test_stores_of_other_models_or_widths_are_not_pooled(tmp_path: Path) -> None:
    def make(name: str, **other: Any) -> datastore.Store:
        rows = random_rows(13, (4,), (1,), width=other.pop("width", 16))
        return build(tmp_path / name, {"residual": rows}, {"0": 2}, **other)

    store = make("a.zarr")
    with pytest.raises(ConflictError, match=r"different widths \(8, 16\), so their statistics can't be pooled"):
        calibrate.fit([store, make("b.zarr", width=8)])
    with pytest.raises(ConflictError, match=r"different models \(toy/it, toy/other\)"):
        calibrate.fit([store, make("c.zarr", model="toy/other")])
    with pytest.raises(MisuseError, match="nothing is selected"):
        calibrate.fit([])


def test_values_that_do_not_fit_the_allowance_are_refused(tmp_path: Path) -> None:
    rows = random_rows(14, (400,), (1,), dtype=np.float32)
    store = build(tmp_path / "run.zarr", {"residual": rows}, {"0": 0})
    with pytest.raises(MisuseError, match=r"values of 5 dimensions take more than 5000 bytes, .* allow more --memory"):
        calibrate.fit(store, memory=40_000)


def test_an_array_without_its_coordinates_is_refused() -> None:
    with pytest.raises(MisuseError, match=r"lacks layer, rollout, segment to be calibrated"):
        calibrate.fit(xr.DataArray(np.zeros((3, 4)), dims=("token", "hidden")))
