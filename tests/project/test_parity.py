"""Scores of the golden tree: the old tool's to 1e-5 where it computed in float32, nearer to float64 where it rounded.

It projected in float32, from vectors that had been rounded to bfloat16 (these are stored so, and lose nothing). Norms
it took in bfloat16, so that its token norms and their means are off by up to 2⁻⁸.
"""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from experiments.projections import ProjectionEntry, dim_set, numbers, read_massive, read_projection
from experiments.steering import find_steering
from experiments.vectors import find_directions
from project import scoring
from project.criteria import Criteria
from project.selection import select

TOY = Path(__file__).parents[1] / "data" / "golden" / "toy_experiment"
INSTRUCT = TOY / "inference" / "instruct"
LAYERS = (1, 3, 5)
HALVES = ("prompt", "response")
IDS = ("1", "2", "3")
BFLOAT16 = 2.0**-8


def stored(rollout_id: str, half: str, layer: int) -> NDArray[Any]:
    """The old tool's activations, bit for bit."""
    raw = torch.load(INSTRUCT / "raw" / "residual" / "set1" / f"{rollout_id}.pt", weights_only=True)
    bits = raw[half]["activations"][layer]["residual"].contiguous().view(torch.uint16)
    values: NDArray[Any] = bits.numpy().view(ml_dtypes.bfloat16)
    return values


def golden(rollout_id: str) -> dict[str, Any]:
    path = INSTRUCT / "projections" / "alignment" / "deception" / "set1" / f"{rollout_id}.json"
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def best() -> NDArray[np.float32]:
    found = select(find_directions(TOY), LAYERS, steering=find_steering(TOY), criteria=Criteria(layers="best"))
    return np.asarray(found.vectors[0].values)


def score(values: NDArray[Any], vector: NDArray[Any]) -> NDArray[np.float32]:
    out = np.empty((len(values), 1), np.float32)
    return scoring.score_block(values, scoring.unit_columns([vector]), out)[:, 0]


@pytest.mark.parametrize("rollout_id", IDS)
@pytest.mark.parametrize("half", HALVES)
def test_projections_are_the_same_to_1e_5(rollout_id: str, half: str) -> None:
    values, vector = stored(rollout_id, half, 3), best()
    ours, theirs = score(values, vector), golden(rollout_id)["projections"][0][half]
    np.testing.assert_allclose(ours, np.array(theirs), rtol=0, atol=1e-5)
    exact = values.astype(np.float64) @ (vector / np.linalg.norm(vector.astype(np.float64)))
    np.testing.assert_allclose(ours, exact, rtol=0, atol=66 * 2**-24 * 10)


def test_all_in_all_ours_are_no_farther_from_float64() -> None:
    vector = best().astype(np.float64)
    ours: list[float] = []
    theirs: list[float] = []
    for rollout_id in IDS:
        for half in HALVES:
            values = stored(rollout_id, half, 3)
            exact = values.astype(np.float64) @ (vector / np.linalg.norm(vector))
            ours.extend(np.abs(score(values, vector) - exact))
            theirs.extend(np.abs(np.array(golden(rollout_id)["projections"][0][half]) - exact))
    assert np.mean(ours) <= np.mean(theirs)


@pytest.mark.parametrize("rollout_id", IDS)
@pytest.mark.parametrize("half", HALVES)
def test_token_norms_are_theirs_to_bfloat16_and_nearer_to_float64(rollout_id: str, half: str) -> None:
    values = stored(rollout_id, half, 3)
    theirs = np.array(golden(rollout_id)["projections"][0]["token_norms"][half])
    ours, exact = scoring.token_norms(values), np.linalg.norm(values.astype(np.float64), axis=1)
    np.testing.assert_allclose(ours, theirs, rtol=BFLOAT16)
    np.testing.assert_allclose(ours, exact, rtol=2**-24)
    if len(values):
        assert np.abs(ours - exact).max() < 1e-3 * np.abs(theirs - exact).max()


@pytest.mark.parametrize("rollout_id", IDS)
@pytest.mark.parametrize("half", HALVES)
def test_activation_norms_are_theirs_to_bfloat16(rollout_id: str, half: str) -> None:
    means = [scoring.token_norms(stored(rollout_id, half, layer)) for layer in LAYERS]
    ours = [float(norms.mean()) if norms.size else 0.0 for norms in means]
    np.testing.assert_allclose(ours, golden(rollout_id)["activation_norms"][half], rtol=BFLOAT16)


@pytest.mark.parametrize("rollout_id", IDS)
def test_cleaning_with_what_the_old_file_carries_gives_what_cleaning_the_store_gives(rollout_id: str) -> None:
    """The viewer cleans from the file; here the same sum is taken from the stored bits."""
    massive = read_massive(INSTRUCT / "massive_activations" / "set1.json")
    data = read_projection(
        INSTRUCT / "projections" / "alignment" / "deception" / "set1" / f"{rollout_id}.json"
    ).massive_dim_data
    assert data is not None
    assert list(dim_set("all", massive.aggregate.top_dims_by_layer)) == data.dims
    dims = list(dim_set("top5-3layers", massive.aggregate.top_dims_by_layer))
    assert dims == [5, 52]
    vector = best()
    assert {dim: float(vector[dim]) for dim in data.dims} == data.vec_components
    for half in HALVES:
        values = stored(rollout_id, half, 3)
        kept = getattr(data.activation_values, half)
        for dim in data.dims:
            assert kept.get(dim, []) == numbers(values[:, dim].astype(np.float64))
        raw = score(values, vector)
        theirs = [
            raw[t] - sum(kept[d][t] * data.vec_components[d] for d in dims) / data.vec_norm for t in range(len(values))
        ]
        column = scoring.unit_columns([vector])[dims]
        ours = scoring.clean_scores(raw[:, None], values[:, dims], column)[:, 0]
        # the file's vec_norm is 1.0 where the stored vector's is 1.0001: dividing by it is off by that much
        np.testing.assert_allclose(ours, np.array(theirs, np.float64).reshape(-1), atol=2e-4)
        np.testing.assert_allclose(ours, score(_without(values, dims), vector), atol=2e-6)


def _without(values: NDArray[Any], dims: list[int]) -> NDArray[Any]:
    left = values.copy()
    left[:, dims] = 0
    return left


def test_an_entry_of_ours_has_every_key_of_an_old_one() -> None:
    values, old = stored("1", "response", 3), golden("1")["projections"][0]
    norms = {"prompt": [], "response": numbers(scoring.token_norms(values))}
    entry = ProjectionEntry.model_validate(
        {"method": "probe", "layer": 3, "selection_source": "steering", "baseline": 0.3, "prompt": [],
         "response": numbers(score(values, best())), "token_norms": norms}
    )  # fmt: skip
    assert set(json.loads(entry.model_dump_json(exclude_unset=True))) == set(old)
