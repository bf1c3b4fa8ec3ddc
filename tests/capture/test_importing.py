"""Import and export: the golden tree goes in and out unchanged, and what can't is named, left out or refused."""

import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

import datastore
from capture.importing import carry_out, plans_of, survey
from datastore import storage
from datastore.query import Store
from datastore.schema import Annotation
from experiments.errors import ExperimentError
from experiments.rawfiles import check_content, read_raw
from tests.capture.cli import Command, command, start, wait_for
from tests.datastore import making

__all__ = ["command"]

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "toy_experiment"
SET1 = Path("inference/instruct/raw/residual/set1")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The golden tree, with everything beside its responses that a tree may have."""
    root = tmp_path / "toy"
    shutil.copytree(GOLDEN, root)
    responses = root / "inference/instruct/responses"
    (responses / "set1/_tags.json").write_text('{"1": ["kept"], "3": ["rollout", "hacker"]}')
    spans = {"annotations": [{"idx": 2, "spans": [{"span": "w10w11", "category": "lie"}]}]}
    (responses / "set1_annotations.json").write_text(json.dumps(spans))
    record = json.loads((responses / "set1/3.json").read_text())
    record["source"] = {"run": "run-37", "sample_idx": 4, "type": "audit"}
    (responses / "set1/3.json").write_text(json.dumps(record))
    audit = {"classifications": [{"run": "run-37", "sample": 4, "label": "fabrication", "justification": "it lied"}]}
    (root / "audit_classifications.json").write_text(json.dumps(audit))
    return root


def golden(name: str, layer: int) -> NDArray[Any]:
    """Return what torch reads in a golden file: prompt and response together, as bits."""
    parts = torch.load(GOLDEN / SET1 / f"{name}.pt", weights_only=True)
    both = [parts[part]["activations"][layer]["residual"] for part in ("prompt", "response")]
    return torch.cat(both).view(torch.uint16).numpy()


def stored(store: Store, component: str, layer: int, *, rollout: str) -> NDArray[Any]:
    values = np.asarray(store.select(component, rollouts=rollout, layers=layer, raw=True).values)
    return values.view(np.uint16) if values.dtype == ml_dtypes.bfloat16 else values


def equal(a: Path, b: Path) -> None:
    """Check that two stores hold the same rollouts, labels, annotations, text, tokens and bits."""
    one, two = datastore.open(a), datastore.open(b)
    first, second = (s.rollouts.sort_index().sort_index(axis=1) for s in (one, two))
    pd.testing.assert_frame_equal(first, second)
    names = ["rollout_id", "token_start", "token_end", "label"]
    first, second = (s.annotations.sort_values(names).reset_index(drop=True) for s in (one, two))
    pd.testing.assert_frame_equal(first, second)
    assert one.components == two.components
    for name in one.rollouts.index:
        pd.testing.assert_frame_equal(one.tokens(name), two.tokens(name))
    for component in one.components:
        assert one.captured(component).sort_index().to_dict() == two.captured(component).sort_index().to_dict()
        for name, row in one.captured(component).iterrows():
            for layer in row.index[row]:
                assert (
                    stored(one, component, layer, rollout=str(name)) == stored(two, component, layer, rollout=str(name))
                ).all()


def test_the_golden_tree_goes_in_with_all_that_is_known_of_it(tree: Path, tmp_path: Path, command: Command) -> None:
    path = tmp_path / "run.zarr"
    told = command("import", tree, "--store", path)
    assert told.code == 0, told.err
    assert "imported 3 rollouts, 37 tokens" in told.out
    store = datastore.open(path)
    for name in "123":
        for layer in (1, 3, 5):
            assert (stored(store, "residual", layer, rollout=name) == golden(name, layer)).all()
    table = store.rollouts
    assert table["prompt_set"].tolist() == ["set1"] * 3
    assert table["prompt_end"].to_dict() == {"1": 4, "2": 2, "3": 12}
    assert table["tags"].to_dict() == {"1": ("kept",), "2": (), "3": ("rollout", "hacker")}
    assert (table.loc["3", "classification"], table.loc["3", "run"]) == ("fabrication", "run-37")
    assert store.tokens("3")["role"].tolist() == ["user"] * 4 + ["assistant"] * 8
    assert store.text("1") == "<bos>w1w2w3w4,w5.w6w7w8"
    assert store.annotations.values.tolist() == [["2", 4, 6, "lie"]]
    provenance = store.provenance[1]
    assert provenance["model"] == {"name": "toy/it", "dtype": "bfloat16"}
    assert provenance["settings"]["imported_from"] == "pt"
    assert "lost" in provenance["tokenizer"]["text"]
    files = {one["rollout_id"]: one["content"] for many in provenance["notes"]["files"] for one in many}
    assert files == {name: check_content(GOLDEN / SET1 / f"{name}.pt") for name in "123"}


def test_importing_again_does_nothing_and_replace_does(tree: Path, tmp_path: Path, command: Command) -> None:
    path = tmp_path / "run.zarr"
    command("import", tree, "--store", path)
    again = command("import", tree, "--store", path, "--json").json
    assert (again["already_there"], again["imported"]["captures"]) == (3, [])
    assert command("import", tree, "--store", path, "--replace", "--json").json["imported"]["captures"] == [2]


def test_a_dry_run_says_what_and_writes_nothing(tree: Path, tmp_path: Path, command: Command) -> None:
    told = command("import", tree, "--store", tmp_path / "run.zarr", "--dry-run", "--ids", "1,3")
    assert told.out.startswith("would import 2 rollouts, 23 tokens, residual at layers 1, 3, 5: 8.83 kB raw")
    assert not list(tmp_path.glob("run.zarr*"))


@pytest.mark.parametrize("form", ["pt", "safetensors", "npz"])
def test_what_is_exported_comes_back_as_an_equal_store(form: str, tree: Path, tmp_path: Path, command: Command) -> None:
    first, second, out = tmp_path / "a.zarr", tmp_path / "b.zarr", tmp_path / "out"
    command("import", tree, "--store", first)
    assert command("export", first, out, "--format", form).code == 0
    told = command("import", out, "--store", second)
    assert told.code == 0, told.err
    equal(first, second)


def test_an_exported_file_has_the_golden_keys_and_bits_and_its_own_rows_only(
    tree: Path, tmp_path: Path, command: Command
) -> None:
    command("import", tree, "--store", tmp_path / "a.zarr")
    command("export", tmp_path / "a.zarr", tmp_path / "out", "--variant", "instruct")
    for name in "123":
        old = torch.load(GOLDEN / SET1 / f"{name}.pt", weights_only=True)
        new = torch.load(tmp_path / "out" / SET1 / f"{name}.pt", weights_only=True)
        for part in ("prompt", "response"):
            assert new[part].keys() == old[part].keys()
            assert new[part]["tokens"] == old[part]["tokens"]
            assert new[part]["token_ids"] == old[part]["token_ids"]
            for layer, components in old[part]["activations"].items():
                tensor = new[part]["activations"][layer]["residual"]
                assert torch.equal(tensor.view(torch.uint16), components["residual"].view(torch.uint16))
                assert tensor.untyped_storage().nbytes() == tensor.nbytes
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model_variants"] == {"instruct": {"model": "toy/it"}}


def rich_store(path: Path) -> None:
    """Make a store of all that a rollout can have: odd names, turns, several reasoning ranges, every type of label."""
    rollouts = [
        making.rollout(
            "a/b:é",
            9,
            prompt_end=3,
            role=np.array([1, 1, 2, 3, 3, 3, 3, 0, 4], np.int8),
            turn=np.array([0, 0, 1, 2, 2, 2, 2, 5, -1], np.int32),
            thinking=np.array([0, 0, 0, 1, 0, 1, 0, 0, 1], np.bool_),
            labels={"reward": 0.5, "n": 3, "ok": True, "text": "a label called like a key", "type": "t"},
            annotations=(
                Annotation(token_start=1, token_end=1, label="empty"),
                Annotation(token_start=2, token_end=9, label="x"),
            ),
            tags=("one", "two"),
            prompt_set="deep/er",
        ),
        making.rollout(
            ".hidden", 5, labels={"reward": 1.0, "n": 4, "ok": False, "text": "b", "type": "u"}, prompt_set="deep/er"
        ),
    ]
    making.capture(path, rollouts, (0, 7))


@pytest.mark.parametrize("form", ["pt", "safetensors", "npz"])
def test_everything_a_rollout_can_have_survives_export_and_import(form: str, tmp_path: Path, command: Command) -> None:
    rich_store(tmp_path / "a.zarr")
    assert command("export", tmp_path / "a.zarr", tmp_path / "out", "--format", form).code == 0
    told = command("import", tmp_path / "out", "--store", tmp_path / "b.zarr")
    assert told.code == 0, told.err
    equal(tmp_path / "a.zarr", tmp_path / "b.zarr")


def test_files_with_other_layers_and_components_become_one_store(tmp_path: Path, command: Command) -> None:
    folder = tmp_path / "raw"
    folder.mkdir()
    shapes = {
        "a": {1: ["residual"], 2: ["residual"]},
        "b": {2: ["residual", "attn_out"]},
        "c": {1: ["residual"], 3: ["v"]},
    }
    made: dict[tuple[str, int, str], torch.Tensor] = {}
    for name, layers in shapes.items():
        activations: dict[int, dict[str, torch.Tensor]] = {}
        for layer, components in layers.items():
            for one in components:
                made[name, layer, one] = activations.setdefault(layer, {})[one] = torch.randn(3, 2 if one == "v" else 4)
        part = {"text": "", "tokens": ["x"] * 3, "token_ids": [1, 2, 3], "activations": activations}
        empty = {"text": "", "tokens": [], "token_ids": [], "activations": {}}
        torch.save({"prompt": part, "response": empty}, folder / f"{name}.pt")
    assert command("import", folder, "--store", tmp_path / "run.zarr").code == 0
    store = datastore.open(tmp_path / "run.zarr")
    have = {
        (name, layer, component)
        for component in store.components
        for name, row in store.captured(component).iterrows()
        for layer in row.index[row]
    }
    assert have == set(made)
    for (name, layer, one), tensor in made.items():
        assert (stored(store, one, layer, rollout=name) == tensor.numpy()).all()
    with pytest.raises(datastore.AbsentError):
        store.select("residual", rollouts="b", layers=1)


def test_rows_of_the_response_only_keep_their_turns_and_say_what_is_left_out(
    tree: Path, tmp_path: Path, command: Command
) -> None:
    file = tree / SET1 / "1.pt"
    parts = torch.load(file, weights_only=True)
    parts["prompt"]["activations"] = {}
    torch.save(parts, file)
    record = tree / "inference/instruct/responses/set1/1.json"
    known = json.loads(record.read_text())
    known["turn_boundaries"] = [
        {"role": "user", "token_start": 0, "token_end": 4},
        {"role": "assistant", "token_start": 4, "token_end": 11, "thinking_start": 5, "thinking_end": 7},
    ]
    record.write_text(json.dumps(known))
    assert command("import", file, "--store", tmp_path / "run.zarr").code == 0
    store = datastore.open(tmp_path / "run.zarr")
    row = store.rollouts[["n_tokens", "prompt_end", "prompt_tokens_left_out"]].to_dict("index")["1"]
    assert list(row.values()) == [7, 0, 4]
    assert (stored(store, "residual", 3, rollout="1") == golden("1", 3)[4:]).all()
    tokens = store.tokens("1")
    assert tokens["role"].tolist() == ["assistant"] * 7
    assert np.flatnonzero(tokens["thinking"]).tolist() == [1, 2]
    assert store.cells.captures[0].prefix("1").tolist() == parts["prompt"]["token_ids"]
    assert command("export", tmp_path / "run.zarr", tmp_path / "out", "--variant", "instruct").code == 0
    again = torch.load(tmp_path / "out" / SET1 / "1.pt", weights_only=True)
    for part, known in parts.items():
        for key in ("token_ids", "tokens"):
            assert again[part][key] == known[key]
        assert again[part]["activations"].keys() == known["activations"].keys()
    assert command("import", tmp_path / "out", "--store", tmp_path / "again.zarr").code == 0
    equal(tmp_path / "run.zarr", tmp_path / "again.zarr")


def test_an_inference_servers_requests_go_in_with_their_layers(tmp_path: Path, command: Command) -> None:
    states = torch.randn(6, 2, 4).bfloat16()
    save_file({"token_ids": torch.arange(6), "hidden_states": states}, tmp_path / "req-1.safetensors")
    refused = command("import", tmp_path, "--store", tmp_path / "run.zarr")
    assert (refused.code, "req-1.safetensors does not say which layers it holds" in refused.err) == (2, True)
    told = command(
        "import",
        tmp_path / "req-1.safetensors",
        "--store",
        tmp_path / "run.zarr",
        "--layers",
        "30,10",
        "--model",
        "a/b",
    )
    assert told.code == 0, told.err
    assert "1 of 1 files, such as" in told.err
    assert "do not say the text of all their tokens, so these rollouts have none; give --tokenizer NAME" in told.err
    store = datastore.open(tmp_path / "run.zarr")
    assert (stored(store, "residual", 30, rollout="req-1") == states[:, 0].view(torch.uint16).numpy()).all()
    assert (stored(store, "residual", 10, rollout="req-1") == states[:, 1].view(torch.uint16).numpy()).all()
    assert store.provenance[1]["model"]["name"] == "a/b"


def test_bad_files_stop_an_import_before_anything_is_written_or_are_left_out(
    tree: Path, tmp_path: Path, command: Command
) -> None:
    (tree / SET1 / "4.pt").write_bytes((tree / SET1 / "1.pt").read_bytes()[:9000])
    (tree / SET1 / "5.pt").touch()
    refused = command("import", tree, "--store", tmp_path / "run.zarr")
    assert refused.code == 2
    assert "4.pt can't be read" in refused.err
    assert "nothing was imported, --keep-going leaves such files out" in refused.err
    assert not list(tmp_path.glob("run.zarr*"))
    told = command("import", tree, "--store", tmp_path / "run.zarr", "--keep-going")
    assert told.code == 0
    assert "2 files were left out" in told.out
    assert "5.pt is empty; copy it again or leave it out" in told.err
    assert sorted(datastore.open(tmp_path / "run.zarr").rollouts.index) == ["1", "2", "3"]


def test_damage_that_only_reading_shows_is_named_and_nothing_of_the_file_comes_in(
    tree: Path, tmp_path: Path, command: Command
) -> None:
    file = tree / SET1 / "2.pt"
    data = bytearray(file.read_bytes())
    at = data.index(golden("2", 3).tobytes()[:64])
    data[at] ^= 4
    file.write_bytes(data)
    refused = command("import", tree, "--store", tmp_path / "run.zarr")
    assert (refused.code, "2.pt is damaged (the checksum of" in refused.err) == (2, True)
    assert datastore.open(tmp_path / "run.zarr").rollouts.empty
    told = command("import", tree, "--store", tmp_path / "run.zarr", "--keep-going", "--json").json
    assert list(told["skipped"]) == [str(file)]
    assert sorted(datastore.open(tmp_path / "run.zarr").rollouts.index) == ["1", "3"]


def test_tokens_unlike_the_responses_join_labels_and_no_ranges(tree: Path, tmp_path: Path, command: Command) -> None:
    record = tree / "inference/instruct/responses/set1/3.json"
    known = json.loads(record.read_text())
    known["token_ids"][0] = 60
    record.write_text(json.dumps(known))
    told = command("import", tree, "--store", tmp_path / "run.zarr")
    assert "3.pt: its tokens are not those of" in told.err
    store = datastore.open(tmp_path / "run.zarr")
    assert store.rollouts.loc["3", "run"] == "run-37"
    assert set(store.tokens("3")["turn"]) == {-1}


def test_one_id_in_two_prompt_sets_is_refused_with_both_places(tree: Path, tmp_path: Path, command: Command) -> None:
    shutil.copytree(tree / SET1, tree / SET1.parent / "set2")
    refused = command("import", tree, "--store", tmp_path / "run.zarr", "--keep-going")
    assert refused.code == 2
    assert "rollout '1' is in two files" in refused.err
    assert "set1/1.pt and" in refused.err


def test_an_export_writes_over_nothing_unless_told(tree: Path, tmp_path: Path, command: Command) -> None:
    store, out = tmp_path / "a.zarr", tmp_path / "out"
    command("import", tree, "--store", store)
    command("export", store, out, "--ids", "1", "--format", "npz")
    (out / "1.npz").write_bytes(b"mine")
    refused = command("export", store, out, "--format", "npz")
    assert (refused.code, refused.err.startswith("error: 1 of 3 files are there already, such as ")) == (2, True)
    command("export", store, out, "--format", "npz", "--skip-existing")
    assert (out / "1.npz").read_bytes() == b"mine"
    assert sorted(file.name for file in out.iterdir()) == ["1.npz", "2.npz", "3.npz"]
    command("export", store, out, "--format", "npz", "--replace", "--layers", "3,5")
    assert sorted(read_raw(out / "1.npz").arrays) == [("residual", 3), ("residual", 5)]
    absent = command("export", store, out, "--format", "npz", "--layers", "4", "--replace")
    assert (absent.code, "captured are residual at layers 1, 3, 5" in absent.err) == (2, True)


def test_memory_and_order_do_not_change_an_import(tree: Path, tmp_path: Path) -> None:
    for store, memory in ((tmp_path / "a.zarr", 1 << 30), (tmp_path / "b.zarr", 1)):
        asked = survey(tree)
        asked.found.reverse()
        plans = plans_of(asked, store, most_tokens=4)
        carry_out(asked, store, plan=partial(list, plans), memory=memory)
    equal(tmp_path / "a.zarr", tmp_path / "b.zarr")


def many(folder: Path, n: int) -> Path:
    folder.mkdir()
    for i in range(n):
        part = {
            "text": "",
            "tokens": ["x"] * 64,
            "token_ids": [i] * 64,
            "activations": {0: {"residual": torch.full((64, 256), float(i))}},
        }
        torch.save(
            {"prompt": part, "response": {"text": "", "tokens": [], "token_ids": [], "activations": {}}},
            folder / f"{i}.pt",
        )
    return folder


def test_a_killed_import_goes_on_to_the_same_store_and_redoes_no_finished_chunk(tmp_path: Path) -> None:
    folder, path = many(tmp_path / "raw", 400), tmp_path / "run.zarr"
    words = ("import", folder, "--store", path, "--chunk-tokens", "64")
    process = start(*words)

    def chunks() -> list[Path]:
        return list(tmp_path.glob("run.zarr.plans/*/group/residual/c/*/*/*"))

    wait_for(lambda: len(chunks()) > 20, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = {file.relative_to(file.parents[4]): file.stat().st_ino for file in chunks() if ".partial" not in file.name}
    assert 0 < len(done) < 400
    resumed = start(*words)
    _, err = resumed.communicate()
    assert resumed.returncode == 0, err
    group = path / "captures/0001"
    assert {name: (group / name).stat().st_ino for name in done} == done
    store = datastore.open(path)
    for i in range(0, 400, 37):
        assert (np.asarray(store.select("residual", rollouts=str(i), layers=0).values) == i).all()
    files = [one for many in store.provenance[1]["notes"]["files"] for one in many]
    assert {one["rollout_id"] for one in files} == {str(i) for i in range(400)}


def test_a_file_that_changes_between_the_passes_is_refused(tree: Path, tmp_path: Path) -> None:
    asked = survey(tree)
    (tree / SET1 / "2.pt").write_bytes((tree / SET1 / "1.pt").read_bytes())
    with pytest.raises(ExperimentError, match=r"2\.pt changed while it was read; start again"):
        carry_out(asked, tmp_path / "run.zarr", plan=lambda: plans_of(asked, tmp_path / "run.zarr"))


def test_a_full_disk_is_refused_before_anything_is_written(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "free_bytes", lambda path: 1000)
    asked = survey(tree)
    with pytest.raises(datastore.DatastoreError, match=r"about 10,\d\d\d bytes .* 1,000 bytes are free"):
        carry_out(asked, tmp_path / "run.zarr", plan=lambda: plans_of(asked, tmp_path / "run.zarr"))
    assert not (tmp_path / "run.zarr").exists()
    assert os.listdir(tmp_path) == ["toy"]
