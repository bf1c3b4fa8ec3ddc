"""Calibration of the golden tree: the same keys and the same values as the old tool wrote, from statistics alone."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import calibrate
from calibrate import formulas
from calibrate.export import aggregate, alignment_range, massive_dims
from datastore.stats import Moments
from tests.calibrate.stores import build

INSTRUCT = Path(__file__).parents[1] / "data" / "golden" / "toy_experiment" / "inference" / "instruct"
LAYERS = (1, 3, 5)


def stored(rollout_id: int, half: str, layer: int) -> NDArray[Any]:
    raw = torch.load(INSTRUCT / "raw" / "residual" / "set1" / f"{rollout_id}.pt", weights_only=True)
    bits = raw[half]["activations"][layer]["residual"].contiguous().view(torch.uint16)
    values: NDArray[Any] = bits.numpy().view(ml_dtypes.bfloat16)
    return values


def pooled(layer: int) -> tuple[Moments, float]:
    """Moments and mean norm over each rollout's response, or over its prompt where it has no response."""
    total = Moments.zero(64)
    norms: list[float] = []
    for rollout_id in (1, 2, 3):
        response = stored(rollout_id, "response", layer)
        part, lengths = Moments.of(response if len(response) else stored(rollout_id, "prompt", layer))
        total, norms = total + part, [*norms, *lengths]
    return total, float(np.mean(norms))


def test_the_aggregate_is_that_of_the_old_tool() -> None:
    over = [pooled(layer) for layer in LAYERS]
    aligned = [
        [
            float(formulas.mean_alignment(found["mean_unit"], found["mean"]))
            for found in (Moments.of(stored(rollout_id, "prompt", layer))[0].finalise() for layer in LAYERS)
        ]
        for rollout_id in (1, 2, 3)
    ]
    means = np.stack([found.finalise()["mean"] for found, _ in over])
    ours = aggregate(LAYERS, means, layer_norms=[norm for _, norm in over], alignment=aligned)
    written = json.loads(ours.model_dump_json(exclude_unset=True))
    cosines = written.pop("consecutive_cosine")
    assert written == json.loads((INSTRUCT / "massive_activations" / "set1.json").read_text())["aggregate"]
    a, b = means[0], means[1]
    assert cosines["1"] == round(float(a @ b / np.sqrt((a @ a) * (b @ b))), 4)
    assert list(cosines) == ["1", "3"], "each cosine is under the lower of its two layers"


def test_a_rollout_without_alignment_is_left_out_not_counted_as_zero() -> None:
    means = np.eye(2, 6) + 0.1
    ours = aggregate((4, 9), means, layer_norms=[1.0, 2.0], alignment=[[0.5, np.nan], [0.7, np.nan]])
    assert ours.mean_alignment_by_layer == {4: 0.6, 9: None}
    assert ours.n_prompts == 2


def test_norms_of_components_have_their_own_keys() -> None:
    norms = {"attn_norms": [1.26, np.nan]}
    ours = aggregate((4, 9), np.ones((2, 6)), layer_norms=[1, 2], alignment=[[1, 1]], component_norms=norms)
    assert ours.attn_norms == {4: 1.3, 9: None}
    assert "mlp_norms" not in json.loads(ours.model_dump_json(exclude_unset=True))


def test_per_rollout_entries_round_as_the_old_ones_and_hold_no_infinity() -> None:
    peaks = formulas.peak_dims([0.0, 123.456, 0.0], [0.0, 1.23456, 0.0], top_k=1)
    assert [entry.model_dump() for entry in massive_dims(peaks)] == [
        {"dim": 1, "max_val": 123.46, "mean_val": 1.2346, "ratio": None, "is_massive": True}
    ]
    spread = formulas.Spread.of([0.98765]).finalise()
    assert alignment_range(spread).model_dump() == {"mean": 0.9877, "min": 0.9877, "max": 0.9877, "std": None}


@pytest.fixture(scope="module", params=["rollout", "capture", "none"])
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> calibrate.Calibration:
    """The golden activations in a store, in chunks of four tokens, calibrated."""
    halves = {i: [stored(i, half, 1) for half in ("prompt", "response")] for i in (1, 2, 3)}
    rows = {
        str(i): {
            layer: np.concatenate([stored(i, h, layer).reshape(-1, 64) for h in ("prompt", "response")])
            for layer in LAYERS
        }
        for i in halves
    }
    ends = {str(i): len(prompt) for i, (prompt, _) in halves.items()}
    path = tmp_path_factory.mktemp("golden") / "set1.zarr"
    return calibrate.fit(build(path, {"residual": rows}, ends, level=request.param, most_tokens=4))


def test_a_store_gives_the_file_of_the_old_tool(golden: calibrate.Calibration) -> None:
    about: Any = {"experiment": "toy", "model_variant": "instruct", "prompt_set": "set1"}
    ours = json.loads(calibrate.massive_file(golden.data, **about).model_dump_json(exclude_unset=True))
    cosines = ours["aggregate"].pop("consecutive_cosine")
    assert ours.pop("layers") == list(LAYERS)
    assert ours == json.loads((INSTRUCT / "massive_activations" / "set1.json").read_text())
    means = golden.data["mean"].values
    want = [round(float(a @ b) / (math.hypot(*a) * math.hypot(*b)), 4) for a, b in pairwise(means)]
    assert cosines == dict(zip("13", want, strict=True))


def test_how_the_recommended_dims_behave(golden: calibrate.Calibration) -> None:
    """Every number of `per_layer_stats.json` from its definition, over the responses; there is no golden file of it."""
    ours = calibrate.per_layer_file(golden.data, experiment="toy", model_variant="instruct")
    tops = golden.data["top_dims"].values
    assert ours.massive_dims == formulas.recommended_dims(tops).tolist() == [5, 52]
    assert (ours.layers, ours.n_layers) == (list(LAYERS), 3)
    for layer in LAYERS:
        parts = [stored(i, "response", layer).reshape(-1, 64) for i in (1, 2, 3)]
        parts = [part if len(part) else stored(i, "prompt", layer) for i, part in zip((1, 2, 3), parts, strict=True)]
        magnitude = np.abs(np.concatenate(parts).astype(np.float64))
        assert ours.n_tokens == len(magnitude)
        base = sorted(magnitude.mean(axis=0))[31]
        for dim in ours.massive_dims:
            column = magnitude[:, dim]
            want = {
                "ratio": column.mean() / base,
                "cv": column.std() / column.mean(),
                "p5_ratio": np.percentile(column, 5) / base,
                "pct_above_10x": 100 * (column > 10 * base).mean(),
            }
            assert ours.per_layer[layer][dim].model_dump() == pytest.approx(want, abs=1e-4)
