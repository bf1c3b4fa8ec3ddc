"""Direction files: every form is read to the bit and written back; what is no direction is refused in one sentence."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from experiments.direction import Direction, directions_of, directory_of_position, position_of_directory
from experiments.errors import ExperimentError
from experiments.vectors import (
    find_directions,
    load_direction,
    read_directions,
    write_directions,
    write_flat,
)

DATA = Path(__file__).parents[1] / "data"
TOY = DATA / "golden" / "toy_experiment"
QWEN = DATA / "vectors" / "qwen3-4b"
PROBE = Path("extraction/alignment/deception/base/vectors/response__5/residual/probe")


def direction(values: object = (3.0, 4.0), *, trait: str = "bs/lying", layer: int = 2, **more: object) -> Direction:
    return Direction(trait=trait, layer=layer, values=np.asarray(values, np.float32), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("below", [".", "extraction", "extraction/alignment/deception", PROBE.as_posix()])
def test_the_vector_tree_is_found_from_any_directory_above_it(below: str) -> None:
    entries = find_directions(TOY / below).entries
    assert [entry.layer for entry in entries] == list(range(6))
    third = load_direction(entries[3])
    raw = torch.load(TOY / PROBE / "layer3.pt", weights_only=True)
    assert (third.trait, third.variant, third.component) == ("alignment/deception", "base", "residual")
    assert (third.method, third.position, third.model) == ("probe", "response[:5]", "toy/base")
    assert third.baseline == 0.30000000000000004
    assert third.facts == {"bias": 0.02, "train_acc": 0.98}
    assert third.values.dtype == np.float32
    np.testing.assert_array_equal(third.values, raw.float().numpy())
    assert third.norm == pytest.approx(float(raw.double().norm()), rel=1e-15)


def test_the_manifest_of_a_flat_directory_names_its_twenty_vectors() -> None:
    index = find_directions(QWEN)
    manifest = json.loads((QWEN / "manifest.json").read_text())
    there = {trait for trait, about in manifest["traits"].items() if (QWEN / about["file"]).is_file()}
    assert len(there) == 20
    assert set(index.traits) == there
    assert len(index.absent) == len(manifest["traits"]) - 20
    for entry in index.entries:
        loaded, about = load_direction(entry), manifest["traits"][entry.trait]
        raw = torch.load(QWEN / about["file"], weights_only=True)
        assert (entry.layer, entry.method, entry.delta) == (about["layer"], about["method"], about["delta"])
        assert (entry.applied_model, entry.position) == ("Qwen/Qwen3-4B", "response[:5]")
        np.testing.assert_array_equal(loaded.values, raw.float().numpy())
        assert abs(loaded.norm - 1) < 3e-4, "published as unit vectors, rounded to bfloat16"


def test_an_unknown_baseline_is_not_zero(tmp_path: Path) -> None:
    write_directions(tmp_path, [direction(position="response[:5]")], variant="base")
    assert read_directions(tmp_path)[0].baseline is None


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_flat_file_gives_back_what_was_written(tmp_path: Path, suffix: str) -> None:
    given_ = [
        direction([0.1, -2.0], position="response[2:7]", method="probe", baseline=0.25, model="a/b", delta=-3.0),
        Direction(trait="bs/lying", layer=3, position="response[2:7]", method="probe", values=np.array([1e-300, 1.0])),
    ]
    path = write_flat(tmp_path / f"directions{suffix}", given_)
    for got, want in zip(read_directions(path), given_, strict=True):
        assert got.values.dtype == want.values.dtype
        np.testing.assert_array_equal(got.values, want.values)
        about = ("trait", "layer", "component", "method", "position", "baseline", "model", "delta", "sha256")
        assert [getattr(got, name) for name in about] == [getattr(want, name) for name in about]
    assert len(find_directions(tmp_path).entries) == 2


def test_a_flat_file_holds_each_direction_once_and_has_a_known_form(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match=r"d\.npz would hold one direction twice"):
        write_flat(tmp_path / "d.npz", [direction(), direction()])
    with pytest.raises(
        ExperimentError, match=r"d\.csv has no known form of directions; name it \.npz or \.safetensors"
    ):
        write_flat(tmp_path / "d.csv", [direction()])
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04")
    (tmp_path / "cut.safetensors").write_bytes(b"\x08")
    for name in ("cut.npz", "cut.safetensors"):
        with pytest.raises(ExperimentError, match=rf"{name} can't be read \(.+\); copy it again or leave it out"):
            find_directions(tmp_path / name)


def test_foreign_files_need_only_a_trait_and_a_layer_in_their_keys(tmp_path: Path) -> None:
    arrays: dict[str, Any] = {"bs/lying/layer20": np.ones(3, np.float16), "guilt_L7": np.ones(3, np.float32)}
    np.savez(tmp_path / "a.npz", **arrays)
    found = read_directions(tmp_path / "a.npz")
    assert [(d.trait, d.layer, d.values.dtype.name) for d in found] == [
        ("bs/lying", 20, "float32"),
        ("guilt", 7, "float32"),
    ]
    np.savez(tmp_path / "b.npz", lying=np.ones(3))
    with pytest.raises(ExperimentError, match=r"b\.npz names an array 'lying' from which no trait and layer follow"):
        find_directions(tmp_path / "b.npz")


def test_bfloat16_in_safetensors_is_widened_exactly(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    raw = torch.randn(16, dtype=torch.float64).to(torch.bfloat16)
    save_file({"bs/lying/layer1": raw}, tmp_path / "v.safetensors")
    np.testing.assert_array_equal(read_directions(tmp_path)[0].values, raw.float().numpy())


def test_the_written_tree_reads_back_and_keeps_the_layers_described_before(tmp_path: Path) -> None:
    first = direction(
        [0.1, 0.7], position="response[:5]", method="probe", baseline=0.5, model="m", facts={"auroc": 0.9}
    )
    second = Direction(
        trait="bs/lying", layer=11, position="response[:5]", method="probe", model="m", values=np.array([0.1, 2.0])
    )
    files = write_directions(tmp_path, [first], variant="base") + write_directions(tmp_path, [second], variant="base")
    assert files[0] == tmp_path / "bs/lying/base/vectors/response__5/residual/probe/layer2.pt"
    metadata = json.loads(files[0].with_name("metadata.json").read_text())
    assert list(metadata["layers"]) == ["2", "11"]
    assert metadata["layers"]["2"] == {"norm": first.norm, "baseline": 0.5, "sha256": first.sha256, "auroc": 0.9}
    old, new = read_directions(tmp_path)
    assert (old.baseline, old.facts, old.sha256, new.sha256) == (0.5, {"auroc": 0.9}, first.sha256, second.sha256)
    assert new.values.dtype == np.float64, "a float64 vector is not rounded down"
    assert not [file for file in files[0].parent.iterdir() if "writing" in file.name]


def test_a_tree_is_not_written_over_vectors_of_another_model(tmp_path: Path) -> None:
    write_directions(tmp_path, [direction(model="a")], variant="base")
    with pytest.raises(ExperimentError, match=r"describes vectors of a, and bs/lying is of b; write it under another"):
        write_directions(tmp_path, [direction(model="b")], variant="base")
    with pytest.raises(ExperimentError, match="trait 'lying' can't be placed in a vector tree; name it category/name"):
        write_directions(tmp_path, [direction(trait="lying")], variant="base")


def test_the_hash_is_of_the_numbers_not_of_the_file() -> None:
    values = np.array([0.5, -2.0], ml_dtypes.bfloat16)
    hashes = {
        Direction(trait="t", layer=0, values=values.astype(dtype)).sha256
        for dtype in (ml_dtypes.bfloat16, np.float16, np.float32, np.float64)
    }
    assert len(hashes) == 1
    assert direction([0.5, -2.0000002]).sha256 not in hashes


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (np.zeros(4), r"bs/lying \(layer 2, residual, given\) is all zeros, so it points nowhere; extract it again"),
        (np.array([1.0, np.nan, np.inf]), r"has 2 non-finite values among 3, so every score would be NaN"),
        (np.ones((2, 3)), r"has shape \(2, 3\); a direction is one vector of shape \[hidden\]"),
        (np.ones(0), r"has shape \(0,\); a direction"),
        (np.ones(3, np.int64), r"holds int64; a direction is bfloat16, float16, float32 or float64"),
    ],
)
def test_what_is_no_direction_can_not_be_held(values: np.ndarray, sentence: str) -> None:
    with pytest.raises(ExperimentError, match=sentence):
        Direction(trait="bs/lying", layer=2, values=values)


def test_a_file_that_is_no_tensor_is_named(tmp_path: Path) -> None:
    place = tmp_path / "bs/lying/base/vectors/response__5/residual/probe"
    place.mkdir(parents=True)
    (place / "layer1.pt").write_bytes(b"PK\x03\x04 cut")
    torch.save({"vector": torch.ones(3)}, place / "layer2.pt")
    torch.save(torch.ones(3, dtype=torch.int32), place / "layer3.pt")
    torch.save(torch.zeros(3), place / "layer4.pt")
    cut, mapping, integers, zeros = find_directions(tmp_path).entries
    with pytest.raises(ExperimentError, match=r"layer1\.pt can't be read \(.+\); copy it again or leave it out"):
        load_direction(cut)
    with pytest.raises(
        ExperimentError, match=r"layer2\.pt holds dict where a floating-point tensor of shape \[hidden\]"
    ):
        load_direction(mapping)
    with pytest.raises(ExperimentError, match=r"layer3\.pt holds torch\.int32 where"):
        load_direction(integers)
    with pytest.raises(ExperimentError, match=r"in .*layer4\.pt is all zeros"):
        load_direction(zeros)
    (place / "metadata.json").write_text('{"layers": {"1"')
    with pytest.raises(ExperimentError, match=r"metadata\.json, line 1, column \d+: not valid JSON"):
        find_directions(tmp_path)


def test_nothing_to_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match=r"nowhere does not exist, so no directions can be read from it"):
        find_directions(tmp_path / "nowhere")
    with pytest.raises(ExperimentError, match=r"holds no directions; expected .*layerN\.pt, a manifest\.json"):
        find_directions(tmp_path)
    with pytest.raises(ExperimentError, match=r"holds no directions of variant 'other'"):
        find_directions(TOY, variant="other")


def test_a_labelled_array_is_a_set_of_directions() -> None:
    array = xr.DataArray(
        np.eye(2, 3), dims=("direction", "hidden"),
        coords={"trait": ("direction", ["a/x", "a/y"]), "layer": ("direction", [3, 4]), "method": "probe"},
    )  # fmt: skip
    assert [(d.trait, d.layer, d.method, d.values.tolist()) for d in directions_of(array)] == [
        ("a/x", 3, "probe", [1, 0, 0]),
        ("a/y", 4, "probe", [0, 1, 0]),
    ]
    with pytest.raises(ExperimentError, match=r"lacks trait and layer"):
        directions_of(array.drop_vars(["trait", "layer"]))


indices = st.integers(-40, 40)
cuts = st.one_of(
    st.just(":"), indices.map(str), indices.map(lambda i: f":{i}"), indices.map(lambda i: f"{i}:"),
    st.tuples(indices, indices).map(lambda pair: f"{pair[0]}:{pair[1]}"),
)  # fmt: skip
frames = st.sampled_from(["prompt", "response", "thinking", "system", "tool_call", "tool_result", "all"])
turns = st.one_of(st.just(""), st.just("turn:"), st.integers(0, 30).map(lambda n: f"turn[{n}]:"))


@given(turn=turns, frame=frames, cut=cuts)
def test_every_position_of_the_grammar_survives_its_directory_name(turn: str, frame: str, cut: str) -> None:
    position = f"{turn}{frame}[{cut}]"
    name = directory_of_position(position)
    assert not set("[]:") & set(name)
    assert position_of_directory(name) == position


@pytest.mark.parametrize(
    ("position", "name"),
    [
        ("response[:5]", "response__5"), ("prompt[-1]", "prompt_-1"), ("response[-5:]", "response_-5_"),
        ("response[:]", "response_all"), ("response[0]", "response_0"),
    ],
)  # fmt: skip
def test_the_directory_names_in_use(position: str, name: str) -> None:
    assert directory_of_position(position) == name


def test_a_directory_outside_the_grammar_stands_for_itself() -> None:
    assert position_of_directory("my_tokens") == "my_tokens"
    assert directory_of_position("response[2_7]") == directory_of_position("response[2:7]"), "not injective"


def test_a_manifest_may_name_what_no_file_can_be_called(tmp_path: Path) -> None:
    about = {"layer": 3, "method": "probe", "component": "residual", "position": "response[:5]"}
    (tmp_path / "manifest.json").write_text(json.dumps({"traits": {"bs/lying": {**about, "file": "x" * 5000}}}))
    index = find_directions(tmp_path)
    assert index.entries == ()
    ((trait, why),) = index.absent
    assert (trait, why.endswith("named in manifest.json, is not there"), len(why) < 600) == ("bs/lying", True, True)
