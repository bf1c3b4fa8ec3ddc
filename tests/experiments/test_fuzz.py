"""Readers of foreign files, given anything: they read it or refuse it in one sentence, and never do anything else."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import experiments
from experiments.annotations import read_annotations
from experiments.errors import ExperimentError
from experiments.labelfile import read_labels
from experiments.rawfiles import check_content, read_raw, write_raw
from experiments.reading import read_tags
from experiments.tree import read_classifications

DATA = Path(__file__).parents[1] / "data"
RAW = DATA / "golden" / "toy_experiment" / "inference" / "instruct" / "raw" / "residual" / "set1" / "1.pt"
VECTOR = DATA / "golden/toy_experiment/extraction/alignment/deception/base/vectors/response__5/residual/probe/layer0.pt"
KEYS = [
    *("id", "messages", "prompt", "response", "token_ids", "text", "turn_boundaries", "prompt_end", "annotations"),
    *("spans", "token_start", "token_end", "label", "role", "content", "tags", "idx", "classifications"),
    *("run", "sample", "traj", "reward", "task_id", "trial", "rollout_id", "metadata", "projections", "layer"),
]

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
documents = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=4), inner),
    max_leaves=12,
)
READERS: dict[str, Callable[[Path], Any]] = {
    "transcripts": experiments.read,
    "annotations": read_annotations,
    "tags": read_tags,
    "classifications": read_classifications,
    "labels": read_labels,
    "projection": experiments.read_projection,
    "massive": experiments.read_massive,
    "steering": experiments.read_steering,
}
BOUNDED = settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])


def reads_or_refuses(reader: Callable[[Path], Any], path: Path) -> None:
    try:
        reader(path)
    except ExperimentError as refused:
        text = str(refused)
        assert "\n" not in text.strip(), text
        assert 0 < len(text) < 2000


@pytest.mark.parametrize("name", READERS)
@BOUNDED
@given(document=documents)
def test_json_of_any_shape(name: str, document: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    reads_or_refuses(READERS[name], path)


@pytest.mark.parametrize("name", READERS)
@BOUNDED
@given(data=st.binary(max_size=200))
def test_bytes_that_are_no_json(name: str, data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(data)
    reads_or_refuses(READERS[name], path)


@BOUNDED
@given(
    rows=st.lists(st.lists(st.text(max_size=6), max_size=4), max_size=5), head=st.sampled_from(["rollout_id,x\n", ""])
)
def test_tables_of_any_shape(rows: list[list[str]], head: str, tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text(head + "\n".join(",".join(row) for row in rows), encoding="utf-8")
    reads_or_refuses(read_labels, path)


def whole(path: Path) -> None:
    check_content(path)
    for rows in read_raw(path).rows():
        np.asarray(rows.values).sum()


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("originals")
    arrays = {("residual", layer): np.ones((3, 4), np.float32) for layer in (1, 2)}
    about = {"token_ids": [1, 2, 3], "prompt_end": 1, "tokens": ["a", "b", "c"], "prompt": "a", "response": "bc"}
    found = {"pt": RAW.read_bytes()}
    for form in ("safetensors", "npz"):
        write_raw(folder / f"1.{form}", arrays, about)
        found[form] = (folder / f"1.{form}").read_bytes()
    return found


@pytest.mark.parametrize("form", ["pt", "safetensors", "npz"])
@settings(BOUNDED, max_examples=400)
@given(edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4), cut=st.floats(0, 1) | st.none())
def test_activation_files_with_edited_bytes(
    form: str, edits: list[tuple[float, int]], cut: float | None, originals: dict[str, bytes], tmp_path: Path
) -> None:
    data = bytearray(originals[form])
    for place, byte in edits:
        data[int(place * (len(data) - 1))] = byte
    path = tmp_path / f"1.{form}"
    path.write_bytes(data if cut is None else data[: int(cut * len(data))])
    reads_or_refuses(whole, path)


@BOUNDED
@given(edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_direction_files_with_edited_bytes(edits: list[tuple[float, int]], tmp_path: Path) -> None:
    data = bytearray(VECTOR.read_bytes())
    for place, byte in edits:
        data[int(place * (len(data) - 1))] = byte
    folder = tmp_path / "extraction/a/b/base/vectors/response__5/residual/probe"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "layer0.pt").write_bytes(data)
    reads_or_refuses(experiments.read_directions, tmp_path)
