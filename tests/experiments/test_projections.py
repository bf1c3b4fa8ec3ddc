"""Projection and massive-activation files: old ones are read to the last key, and NaN never reaches one of ours."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pydantic import ValidationError

from experiments.errors import ExperimentError
from experiments.projections import (
    MassiveActivations,
    Projection,
    ProjectionEntry,
    dim_set,
    massive_paths,
    numbers,
    projection_path,
    read_massive,
    read_projection,
    write_json,
)

INFERENCE = Path(__file__).parents[1] / "data" / "golden" / "toy_experiment" / "inference"
PROJECTIONS = INFERENCE / "instruct" / "projections"
MASSIVE = INFERENCE / "instruct" / "massive_activations" / "set1.json"


@pytest.mark.parametrize("rollout_id", ["1", "2", "3"])
def test_an_old_projection_is_read_and_written_back_key_by_key(rollout_id: str, tmp_path: Path) -> None:
    path = projection_path(PROJECTIONS, trait="alignment/deception", prompt_set="set1", rollout_id=rollout_id)
    read = read_projection(path)
    assert json.loads(write_json(tmp_path / "a" / "1.json", read).read_text()) == json.loads(path.read_text())
    assert read.entry().layer == read.entry(3).layer == 3
    with pytest.raises(
        ExperimentError, match=rf"rollout {rollout_id} has no projection on layer 9; it has layers \[3\]"
    ):
        read.entry(9)


def test_an_old_massive_activations_file_is_read_and_written_back(tmp_path: Path) -> None:
    read = read_massive(MASSIVE)
    assert json.loads(write_json(tmp_path / "set1.json", read).read_text()) == json.loads(MASSIVE.read_text())
    assert read.aggregate.dim_magnitude_by_layer[5] == [52.811, 49.069, 46.942]


def one_vector(layer: int, method: str) -> str:
    source = {"layer": layer, "method": method, "baseline": 0.1, "selection_source": "steering"}
    old = {
        "metadata": {"prompt_id": "7", "prompt_set": "s", "vector_source": source},
        "projections": {"prompt": [1.0], "response": [2.0, float(layer)]},
        "token_norms": {"prompt": [4.0], "response": [5.0, 6.0]},
    }
    return json.dumps(old)


def test_the_form_of_one_vector_is_read_into_the_form_of_several(tmp_path: Path) -> None:
    path = tmp_path / "7.json"
    path.write_text(one_vector(12, "probe"))
    entry = read_projection(path).entry(12)
    assert (entry.method, entry.baseline, entry.selection_source) == ("probe", 0.1, "steering")
    assert (entry.response, entry.token_norms is not None and entry.token_norms.response) == ([2.0, 12.0], [5.0, 6.0])


def test_files_of_one_vector_each_are_read_as_one(tmp_path: Path) -> None:
    for layer, method in ((12, "probe"), (9, "probe"), (9, "mean_diff")):
        (tmp_path / f"7_{method}_L{layer}.json").write_text(one_vector(layer, method))
    read = read_projection(tmp_path / "7.json")
    assert [(e.layer, e.method, e.response[1]) for e in read.projections] == [
        (9, "mean_diff", 9.0), (9, "probe", 9.0), (12, "probe", 12.0),
    ]  # fmt: skip
    assert read.metadata.n_vectors == 3
    with pytest.raises(ExperimentError, match=r"8\.json does not exist"):
        read_projection(tmp_path / "8.json")


def test_bare_nan_of_an_old_file_is_read_as_null(tmp_path: Path) -> None:
    path = tmp_path / "1.json"
    path.write_text(
        PROJECTIONS.joinpath("alignment/deception/set1/1.json").read_text().replace("0.6701884865760803", "NaN")
    )
    assert read_projection(path).entry().prompt[0] is None
    path.write_text(path.read_text().replace('"activation_norms"', '"logit_lens": {"p": NaN}, "activation_norms"'))
    again = read_projection(path)
    assert again.logit_lens == {"p": None}


@given(arrays.arrays(np.float32, st.integers(0, 20), elements=st.floats(width=32)))
def test_float32_comes_back_from_json_to_the_bit(values: np.ndarray) -> None:
    back = json.loads(json.dumps(numbers(values), allow_nan=False))
    finite = np.isfinite(values)
    assert [b is None for b in back] == (~finite).tolist()
    np.testing.assert_array_equal(np.array([b for b in back if b is not None], np.float32), values[finite])


def test_numbers_are_short_where_float32_is() -> None:
    assert json.dumps(numbers(np.array([0.1, 1 / 3], np.float32))) == "[0.1, 0.33333334]"
    assert numbers(np.array([[1.5, np.inf]])) == [[1.5, None]]


def test_what_is_not_finite_is_null_in_the_file(tmp_path: Path) -> None:
    entry = ProjectionEntry(method="probe", layer=1, baseline=float("nan"), prompt=[float("inf"), 1.0])
    text = write_json(tmp_path / "x.json", entry).read_text()
    assert json.loads(text) == {"method": "probe", "layer": 1, "baseline": None, "prompt": [None, 1.0]}


def test_scores_of_another_length_than_the_tokens_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "1.json"
    metadata = {"prompt_id": "1", "prompt_set": "s", "n_prompt_tokens": 3, "n_response_tokens": 0}
    path.write_text(json.dumps({"metadata": metadata, "projections": [{"method": "m", "layer": 1, "prompt": [1.0]}]}))
    with pytest.raises(
        ExperimentError, match=r"1\.json has \(1, 0\) prompt and response scores at layer 1 for \(3, 0\)"
    ):
        read_projection(path)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "1.json"
    path.write_text('{"metadata": {')
    with pytest.raises(ExperimentError, match=r"1\.json is not valid JSON .*; it may be cut short"):
        read_projection(path)
    path.write_text("{}")
    with pytest.raises(ExperimentError, match=r"1\.json is not valid: `experiment`"):
        read_massive(path)


def test_lists_follow_the_layers_they_name() -> None:
    document = json.loads(MASSIVE.read_text())
    assert MassiveActivations.model_validate({**document, "layers": [1, 3, 5]}).layers == [1, 3, 5]
    with pytest.raises(ValidationError, match="has 3 magnitudes of dim 1 for 2 layers"):
        MassiveActivations.model_validate({**document, "layers": [1, 3]})


def test_the_places_where_tools_look() -> None:
    shown = [path.as_posix() for path in massive_paths("e", variant="v", prompt_set="a/b", calibration=True)]
    assert shown == [
        "e/inference/v/massive_activations/a/b.json",
        "e/inference/v/massive_activations/calibration.json",
        "e/inference/massive_activations/calibration.json",
    ]
    assert len(massive_paths("e", variant="v", prompt_set="s", calibration=False)) == 1


TOP = {1: [5, 36, 52, 49, 43, 7], 3: [5, 52, 58, 42, 19, 7], 5: [5, 52, 1, 55, 59, 7]}


@pytest.mark.parametrize(
    ("rule", "dims"),
    [
        ("none", ()), ("top5-3layers", (5, 52)), ("443, 5,443", (5, 443)), ([9, 2], (2, 9)),
        ("all", (1, 5, 7, 19, 36, 42, 43, 49, 52, 55, 58, 59)),
    ],
)  # fmt: skip
def test_dim_sets(rule: str | list[int], dims: tuple[int, ...]) -> None:
    assert dim_set(rule, TOP) == dims


def test_an_unknown_dim_set_is_refused() -> None:
    with pytest.raises(
        ExperimentError, match="'top3' names no set of dimensions; use none, all, top5-3layers or a list"
    ):
        dim_set("top3", TOP)


def test_a_projection_needs_its_metadata() -> None:
    with pytest.raises(ValidationError, match="metadata"):
        Projection.model_validate({"projections": []})
