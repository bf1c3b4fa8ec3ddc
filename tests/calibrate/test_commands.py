"""`python -m calibrate`: what it prints, keeps and writes, where it reads nothing, and what it says to wrong input."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

import calibrate
import datastore
from calibrate.layerspec import parse_captured
from datastore import storage
from datastore.errors import AbsentError, MisuseError
from datastore.results import read_results
from experiments.projections import read_massive
from tests.calibrate.stores import build, random_rows

LENGTHS, LAYERS = (13, 9, 6), (10, 15, 25)
ENDS = {"0": 5, "1": 9, "2": 0}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    rows = random_rows(1, LENGTHS, LAYERS)
    build(tmp_path / "run.zarr", {"residual": rows, "attn_contribution": rows}, ENDS)
    return tmp_path / "run.zarr"


def test_it_keeps_results_in_the_store_and_says_what_took_a_pass(store: Path, run: Any) -> None:
    found = run(store, "--components", "residual,attn_contribution", "--json").json
    assert found["saved"] == [f"{store}/calibration/0001", f"{store}/calibration/0002"]
    assert [one["component"] for one in found["calibrations"]] == ["residual", "attn_contribution"]
    fitted = calibrate.fit(store)
    (_, kept), (_, second) = read_results(store, "calibration")
    xr.testing.assert_allclose(kept.drop_attrs(), fitted.data.drop_attrs())
    assert second.attrs["component"] == "attn_contribution"
    opened = datastore.open(store)
    assert opened.calibration().identical(kept)
    assert opened.calibration("attn_contribution").identical(second)
    assert opened.calibration(number=1).identical(kept)
    with pytest.raises(AbsentError, match=r"run.zarr holds no calibration of mlp_out; make one with python -m calib"):
        opened.calibration("mlp_out")
    layer = found["calibrations"][0]["by_layer"][1]
    one = fitted.data.sel(layer=15)
    assert (layer["layer"], layer["top_dims"]) == (15, one["top_dims"].values.tolist())
    assert layer["norm"] == pytest.approx(float(one["norm"]))
    assert found["calibrations"][0]["by_layer"][2]["consecutive_cosine"] is None
    sources = found["calibrations"][0]["sources"]
    assert {"mean", "alignment", "norm"} <= set(sources["statistics"])
    assert {"alignment_min", "percentiles", "massive_sun"} <= set(sources["pass"])
    plain = run(store, "--no-pass")
    assert plain.code == 0
    assert "from a pass over the data: nothing" in plain.out
    assert f"wrote {store}/calibration/0003" in plain.out.replace("\n", "")


def test_provenance_names_captures_rollouts_and_tokens(store: Path, run: Any) -> None:
    run(store, "--ids", "0,2", "--layers", "10-15", "--segment", "response", "--top-k", "2", "--no-pass")
    ((_, kept),) = read_results(store, "calibration")
    table = datastore.open(store).rollouts
    assert kept["layer"].values.tolist() == [10, 15]
    assert sorted(kept["rollout_id"].values) == ["0", "2"]
    for name, sha in zip(kept["rollout_id"].values, kept["token_sha256"].values, strict=True):
        assert sha == table.loc[name, "token_sha256"]
    assert kept.attrs["sources"][0]["captures"]["1"]["model"] == "toy/it"
    assert kept.attrs["sources"][0]["store"] == str(store)
    asked = kept.attrs["selection"]
    assert (asked["layers"], asked["segment"], asked["top_k"]) == ([10, 15], ["response"], 2)
    assert kept.attrs["tokens"] == "the response"
    assert kept.attrs["n_tokens"] == 8 + 6


def test_where_limits_and_several_stores(store: Path, tmp_path: Path, run: Any) -> None:
    other = {str(i + 5): rows for i, rows in enumerate(random_rows(2, (7, 4), LAYERS).values())}
    build(tmp_path / "more.zarr", {"residual": other}, {"5": 2, "6": 4})
    more = tmp_path / "more.zarr"
    found = run(store, more, "--where", "n_tokens > 8", "--json").json
    assert found["calibrations"][0]["rollouts"] == 2
    found = run(store, more, "--ids", "0,6", "--json").json
    assert found["calibrations"][0]["rollouts"] == 2
    assert found["saved"] == [f"{store}/calibration/0002", f"{more}/calibration/0001"]
    ((_, kept),) = read_results(more, "calibration")
    assert [one["store"] for one in kept.attrs["sources"]] == [str(store), str(more)]


def test_a_dry_run_reads_and_writes_nothing(store: Path, run: Any) -> None:
    shutil.rmtree(store / "captures" / "0001" / "residual" / "c")
    (plan,) = run(store, "--dry-run", "--json").json["dry_run"]
    tokens = sum(LENGTHS) * len(LAYERS)
    assert (plan["layers"], plan["rollouts"], plan["tokens"]) == (list(LAYERS), 3, 8 + 9 + 6)
    assert plan["passes"] == [{"what": "extremes, medians and percentiles", "rollouts": 3, "bytes": tokens * 16 * 2}]
    shown = run(store, "--dry-run", "--no-pass")
    assert "no pass: all from the statistics kept at capture" in shown.out
    assert storage.numbered(store / "calibration") == []


def test_it_exports_valid_json_with_a_layers_list(store: Path, tmp_path: Path, run: Any) -> None:
    out = tmp_path / "made" / "massive.json"
    found = run(store, "--ids", "1", "--export", "json", "--out", out, "--json").json
    assert found["written"] == [str(out)]
    text = out.read_text()
    assert "NaN" not in text
    record = read_massive(out)
    assert record.layers == list(LAYERS)
    assert set(record.aggregate.layer_norms) == set(LAYERS)
    assert list(record.aggregate.consecutive_cosine or {}) == [10, 15]
    assert record.aggregate.attn_norms == record.aggregate.layer_norms
    assert record.aggregate.mlp_norms is None
    per_layer = json.loads(run_per_layer(store, tmp_path, run).read_text())
    assert per_layer["layers"] == list(LAYERS)
    assert set(per_layer["per_layer"]["10"]["3"]) == {"ratio", "cv", "p5_ratio", "pct_above_10x"}


def test_every_token_at_the_massive_dims(store: Path, tmp_path: Path, run: Any) -> None:
    out = tmp_path / "massive.json"
    assert run(store, "--export", "json", "--out", out, "--per-token", "--top-k", "2", "--memory", "1MB").code == 0
    found, rows = read_massive(out).per_prompt, random_rows(1, LENGTHS, LAYERS)
    assert found is not None
    assert set(found) == set(ENDS)
    for name, one in found.items():
        half = slice(0, ENDS[name]) if ENDS[name] else slice(None)
        for layer in LAYERS:
            values, magnitude = rows[name][layer].astype(np.float64), np.abs(rows[name][layer].astype(np.float64))[half]
            peaks = magnitude.max(axis=0)
            order = sorted(range(16), key=lambda d, peaks=peaks: -peaks[d])[:2]  # type: ignore[misc]
            ratios = [peaks[d] / sorted(peaks)[7] for d in order]
            want = [
                (d, round(peaks[d], 2), round(magnitude[:, d].mean(), 4), round(r, 1), r > 100)
                for d, r in zip(order, ratios, strict=True)
            ]
            entries = one.massive_dims[layer]
            assert [(e.dim, e.max_val, e.mean_val, e.ratio, e.is_massive) for e in entries] == want
            for dim in one.tracked_dims:
                assert one.prompt_dim_values[layer][dim] == values[: ENDS[name], dim].tolist()
                assert one.response_dim_values[layer][dim] == values[ENDS[name] :, dim].tolist()
            for part, ranges in (
                (values[: ENDS[name]], one.prompt_mean_alignment),
                (values[ENDS[name] :], one.response_mean_alignment),
            ):
                assert (layer in ranges) == (len(part) > 0)
                if len(part):
                    mean = part.mean(axis=0)
                    cosines = (part @ mean) / np.linalg.norm(part, axis=1) / np.linalg.norm(mean)
                    assert (ranges[layer].min, ranges[layer].max) == (round(cosines.min(), 4), round(cosines.max(), 4))
        listed = {e.dim for entries in one.massive_dims.values() for e in entries}
        massive = {e.dim for entries in one.massive_dims.values() for e in entries if e.is_massive}
        assert one.tracked_dims == sorted(massive or listed)[:5]
        assert 3 in one.tracked_dims, "the planted dimension"
        assert (len(one.prompt_tokens), len(one.response_tokens)) == (ENDS[name], LENGTHS[int(name)] - ENDS[name])


def run_per_layer(store: Path, tmp_path: Path, run: Any) -> Path:
    out = tmp_path / "per_layer_stats.json"
    assert run(store, "--export", "per-layer", "--out", out).code == 0
    return out


def test_an_experiment_finds_its_store_and_gets_its_files(store: Path, tmp_path: Path, run: Any) -> None:
    tree = tmp_path / "toy"
    (tree / "inference" / "instruct").mkdir(parents=True)
    (tree / "config.json").write_text('{"model_variants": {"instruct": {"model": "toy/it"}}}')
    store.rename(tree / "inference" / "instruct" / "set1.zarr")
    found = run("--experiment", tree, "--prompt-set", "set1", "--json").json
    massive = Path("massive_activations")
    places = [
        tree / "inference" / "instruct" / massive / "set1.json",
        tree / "inference" / "instruct" / massive / "calibration.json",
        tree / "inference" / massive / "calibration.json",
    ]
    assert found["written"][:3] == [str(place) for place in places]
    assert len({place.read_text() for place in places}) == 1
    record = read_massive(places[0])
    assert (record.experiment, record.model, record.model_variant) == ("toy", "toy/it", "instruct")
    assert found["written"][3:] == [str(places[0].with_name("per_layer_stats.json"))]


def test_the_picture_has_true_layer_numbers(store: Path, tmp_path: Path, run: Any) -> None:
    assert run(store, "--plot", tmp_path / "out.png").code == 0
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    figure = calibrate.draw(calibrate.fit(store).data)
    dims, norms, aligned = figure.axes
    assert aligned.get_xticks().tolist() == list(LAYERS)
    data = calibrate.fit(store).data
    np.testing.assert_array_equal(norms.lines[0].get_xydata(), np.stack([LAYERS, data["norm"].values], axis=1))
    labels = {line.get_label(): line for line in dims.lines}
    np.testing.assert_array_equal(labels["dim 3"].get_ydata(), data["dim_magnitude"].values[:, 3])
    refused = run(store, "--plot", tmp_path / "out.xyz")
    assert refused.code == 2
    assert "out.xyz can't be drawn" in refused.err


@pytest.fixture
def read_only(store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The store as a user finds it who may not write it, also where the tests may write everything."""
    access = os.access

    def refusing(path: Any, mode: int, **more: Any) -> bool:
        return not (mode & os.W_OK and Path(path).is_relative_to(store)) and access(path, mode, **more)

    monkeypatch.setattr(os, "access", refusing)
    return store


def test_a_store_that_cannot_be_written(read_only: Path, tmp_path: Path, run: Any) -> None:
    refused = run(read_only)
    assert refused.code == 1, refused.err
    assert "run.zarr can't be written" in refused.err
    assert "nothing was computed, give --out other.zarr" in refused.err
    found = run(read_only, "--out", tmp_path / "other.zarr", "--json").json
    assert found["saved"] == [f"{tmp_path}/other.zarr/calibration/0001"]
    exported = run(read_only, "--export", "json", "--out", tmp_path / "m.json", "--json")
    assert (exported.json["saved"], exported.json["written"]) == ([], [str(tmp_path / "m.json")])
    assert exported.err.startswith("warning: ")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ((), 2, "Name a store, or an --experiment"),
        (("nowhere.zarr",), 2, "nowhere.zarr does not exist"),
        (("run.zarr", "--ids", "0,8"), 2, "1 of the ids asked for are in none of the stores: 8"),
        (("run.zarr", "--where", "n_tokens > 99"), 2, "nothing is selected"),
        (("run.zarr", "--layers", "12"), 2, "'12' names no captured layer; captured are 10, 15, 25"),
        (("run.zarr", "--layers", "best"), 2, "'best' is no layer or range"),
        (("run.zarr", "--ids", "1", "--segment", "response"), 2, "has no tokens to calibrate"),
        (("run.zarr", "--segment", "answer"), 2, "segment 'answer' is not known"),
        (("run.zarr", "--components", "mlp_out"), 2, "'mlp_out' is not captured"),
        (("run.zarr", "--top-k", "17"), 2, "top_k is 17, which is none of the 1 to 16 dimensions"),
        (("run.zarr", "--export", "json"), 2, "--export json needs --out PATH"),
        (("run.zarr", "--per-token"), 2, "--per-token needs --export json or --experiment"),
        (("run.zarr", "--per-token", "--export", "json", "--out", "x", "--no-pass"), 2, "leave --no-pass out"),
        (("run.zarr", "--export", "csv", "--out", "x"), 2, "--export 'csv' is not known"),
        (("run.zarr", "--export", "json", "--out", "x", "--components", "a,b"), 2, "writes one component's file"),
        (("run.zarr", "--model-variant", "x"), 2, "belong to an --experiment"),
        (("--experiment", "."), 2, "--experiment needs --prompt-set"),
        (("--experiment", ".", "--prompt-set", "s"), 2, "is not an experiment tree"),
        (("run.zarr", "--out", "run.zarr"), 2, "is a store of its own"),
        (("run.zarr", "--export", "per-layer", "--out", "x", "--no-pass"), 2, "percentiles take a pass"),
    ],
)
def test_wrong_input_is_one_sentence(
    words: tuple[str, ...], code: int, message: str, store: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(store.parent)
    ran = run(*words)
    assert ran.code == code
    assert message in ran.err
    assert "Traceback" not in ran.err
    assert storage.numbered(store / "calibration") == []


def test_layers_are_chosen_among_those_captured() -> None:
    captured = (10, 15, 20, 25)
    assert parse_captured("all", captured) == captured
    assert parse_captured("25, 10-20:10", captured) == (10, 20, 25)
    assert parse_captured("0-75", captured) == captured
    with pytest.raises(AbsentError, match=r"'11-14' names no captured layer; captured are 10, 15, 20, 25"):
        parse_captured("11-14", captured)
    with pytest.raises(MisuseError, match=r"'5-:2' is no layer or range"):
        parse_captured("10,5-:2", captured)
