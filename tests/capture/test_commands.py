"""The capture command: what it does by default, what each flag changes, one sentence for everything that is wrong."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from capture.report import ranges
from tests.capture import stored
from tests.capture.cli import Command
from tests.capture.stories import MODEL, ROLLOUTS, command

__all__ = ["command"]

IDS = ["1-0", "1-1", "2-0", "2-2", "5-1", "5-3", "6-0", "6-1"]
FEW = ("--layers", "0,3", "--limit", 2)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "run.zarr"


def captured(store: Path, number: int = 1) -> list[str]:
    return sorted({rollout for _, _, rollout in stored.rows(store)}) if number in stored.captures(store) else []


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# -- what it does ------------------------------------------------------------------------------------------------------


def test_without_a_choice_all_of_it_is_captured(command: Command, store: Path) -> None:
    result = command("--store", store)
    assert result.code == 0
    assert result.out.startswith("captured 8 rollouts, 3,383 tokens, layers 0-4 of residual from stories260K in ")
    assert f"next: python -m datastore info {store}; python -m datastore verify {store}" in result.out
    assert captured(store) == IDS
    rows = stored.rows(store)
    assert {(component, layer) for component, layer, _ in rows} == {("residual", layer) for layer in range(5)}
    assert sum(len(values) for values in rows.values()) == 5 * 3383


def test_the_provenance_says_what_decides_the_bits(command: Command, store: Path) -> None:
    command("--store", store, *FEW)
    said = stored.attributes(store, 1)["provenance"]
    assert said["model"] | {"weights_sha256": None} == {
        "name": "stories260K",
        "model_type": "llama",
        "revision": None,
        "weights_sha256": None,
        "dtype": "float32",
        "hidden_size": 64,
        "n_layers": 5,
    }
    assert len(said["model"]["weights_sha256"]) == len(said["tokenizer"]["sha256"]) == 64
    assert said["tokenizer"]["rendered"] == ["plain"]
    assert said["settings"]["attn_implementation"] == "sdpa"
    assert said["settings"]["hooks"] == {"residual": "layers.{layer}"}
    assert {"torch", "transformers", "zarr", "python"} <= set(said["environment"]["versions"])
    assert stored.attributes(store, 1)["created"]


def test_json_is_one_document(command: Command, store: Path) -> None:
    result = command("--store", store, *FEW, "--json")
    assert result.err == ""
    assert {name: result.json[name] for name in ("captures", "pending", "rollouts", "skipped", "nonfinite")} == {
        "captures": [1],
        "pending": 0,
        "rollouts": 2,
        "skipped": 0,
        "nonfinite": {"residual": 0},
    }
    files = (store / "captures" / "0001" / "residual" / "c").rglob("*")
    assert result.json["stored_bytes"] == sum(file.stat().st_size for file in files if file.is_file())
    assert result.json["raw_bytes"] == result.json["tokens"] * 2 * 64 * 4


def test_what_is_there_is_skipped_and_what_is_not_is_added(command: Command, store: Path) -> None:
    assert command("--store", store, *FEW).code == 0
    again = command("--store", store, *FEW)
    assert again.code == 0
    assert "2 of 2 rollouts were in the store already and were skipped" in again.out
    assert stored.captures(store) == [1]
    more = command("--store", store, "--layers", "0,3", "--limit", 3)
    assert "captured 1 rollouts" in more.out
    assert "2 of 3 rollouts were in the store already" in more.out
    assert captured(store) == IDS[:3]


def test_replace_captures_again_and_counts(command: Command, store: Path) -> None:
    command("--store", store, *FEW)
    assert command("--store", store, *FEW, "--replace", "--dtype", "bfloat16").code == 0
    assert stored.captures(store) == [1, 2]
    assert {values.dtype for values in stored.rows(store).values()} == {np.dtype("u2")}


# -- choosing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--ids", "6-1,1-0"], ["1-0", "6-1"]),
        (["--prompt-ids", "2-0"], ["2-0"]),
        (["--limit", "3"], IDS[:3]),
        (["--where", "reward == 1 and n_tokens > 380"], None),
        (["--where", "rollout_id == '5-1'"], ["5-1"]),
        (["--ids", "1-0,2-0,5-1", "--where", "task_id > 1", "--limit", "1"], ["2-0"]),
    ],
)
def test_rollouts_are_chosen(command: Command, store: Path, words: list[str], expected: list[str] | None) -> None:
    assert command("--store", store, "--layers", "0", *words).code == 0
    if expected is None:
        records = {r["id"]: r for r in map(json.loads, ROLLOUTS.read_text().splitlines())}
        lengths = {rollout: len(values) for (_, _, rollout), values in stored.rows(store).items()}
        expected = [name for name in IDS if records[name]["reward"] == 1 and lengths.get(name, 0) > 380]
        assert 0 < len(expected) < 8
    assert captured(store) == expected


def test_ids_are_read_from_a_file(command: Command, store: Path, tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("5-3\n\n 2-2 \n")
    assert command("--store", store, "--layers", "0", "--ids", f"@{tmp_path / 'ids.txt'}").code == 0
    assert captured(store) == ["2-2", "5-3"]


def test_what_is_not_chosen_may_be_too_long(command: Command, store: Path, tmp_path: Path) -> None:
    long, short = {"id": "long", "token_ids": [5] * 600, "kind": "x"}, {"id": "short", "token_ids": [5] * 6}
    source = write(tmp_path / "in.jsonl", long, short)
    common = ("--store", store, "--layers", "0", "--input", source)
    assert command(*common, "--where", "n_tokens <= 512").code == 0
    assert captured(store) == ["short"]
    refused = command(*common)
    assert refused.code == 2
    assert "rollout 'long' has 600 tokens and the model takes 512" in refused.err
    assert command(*common, "--truncate").code == 0
    assert len(stored.rows(store)["residual", 0, "long"]) == 512
    assert stored.attributes(store, 2)["provenance"]["tokenizer"]["truncated"] == {"long": 600}


def test_layers_components_codec_and_chunks(command: Command, store: Path) -> None:
    words = ("--layers", "50%,4", "--components", "residual,k_proj", "--codec", "none", "--chunk-tokens", 64)
    assert command("--store", store, "--limit", 2, *words).code == 0
    rows = stored.rows(store)
    assert {(component, layer) for component, layer, _ in rows} == {
        (component, layer) for component in ("residual", "k_proj") for layer in (2, 4)
    }
    attrs = stored.attributes(store, 1)
    assert attrs["codec"]["name"] == "none"
    meta = json.loads((store / "captures/0001/residual/zarr.json").read_text())
    assert meta["chunk_grid"]["configuration"]["chunk_shape"] == [64, 1, 64]


# -- planning only -----------------------------------------------------------------------------------------------------


def test_a_dry_run_reads_no_weights_and_writes_nothing(command: Command, tmp_path: Path, store: Path) -> None:
    hollow = shutil.copytree(MODEL, tmp_path / "hollow")
    (hollow / "model.safetensors").unlink()
    result = command("--store", store, "--model", hollow, "--dry-run", "--json")
    assert result.code == 0
    (plan,) = result.json["plans"]
    assert (plan["rollouts"], plan["tokens"], plan["raw_bytes"]) == (8, 3383, 3383 * 5 * 64 * 4)
    assert (plan["key"], result.json["weights_hashed"]) == (None, False)
    assert not store.exists()
    assert not store.with_name("run.zarr.plans").exists()
    said = command("--store", store, "--model", hollow, "--dry-run").out
    expected = "would capture 8 rollouts, 3,383 tokens, layers 0-4, residual of hollow: 2 batches of up to 2,048"
    assert said.startswith(expected)


def test_a_dry_run_tells_what_the_capture_will_be(command: Command, store: Path) -> None:
    command("--store", store, "--layers", "0", "--limit", 2)
    words = ("--store", store, "--layers", "0-1", "--limit", 3)
    plans = command(*words, "--dry-run", "--json").json["plans"]
    assert [(plan["rollouts"], plan["layers"]) for plan in plans] == [(2, [1]), (1, [0, 1])]
    assert command(*words).code == 0
    assert [plan["key"] for plan in plans] == [stored.attributes(store, n)["plan"] for n in (2, 3)]
    assert "holds all of it already; nothing would be captured" in command(*words, "--dry-run").out


def test_layer_numbers_are_written_short() -> None:
    assert ranges([0, 1, 2, 4, 7, 8]) == "0-2, 4, 7-8"


# -- values that are not finite ----------------------------------------------------------------------------------------


@pytest.fixture
def poisoned(tmp_path: Path) -> Path:
    """The small model with NaN in the embedding of one token."""
    directory = shutil.copytree(MODEL, tmp_path / "poisoned")
    weights = load_file(directory / "model.safetensors")
    name = next(name for name in weights if "embed_tokens" in name)
    weights[name][7] = float("nan")
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_nan_in_the_weights_is_reported(command: Command, store: Path, poisoned: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", {"id": "good", "token_ids": [5, 6]}, {"id": "bad", "token_ids": [7, 5, 5]})
    words = ("--store", store, "--model", poisoned, "--input", source, "--layers", "1")
    strict = command(*words, "--strict")
    assert strict.code == 2
    assert (
        "residual at layer 1 of rollout 'bad' is not finite at token 0 (one of 3 tokens); --strict stops" in strict.err
    )
    assert stored.captures(store) == []
    result = command(*words)
    assert result.code == 0
    assert "warning: not finite: residual at layer 1 of rollout 'bad', token 0" in result.err
    assert f"warning: {3 * 64} values are not finite; they are stored as they are" in result.err
    rows = stored.rows(store)
    assert np.isnan(rows["residual", 1, "bad"].view(np.float32)).all()
    assert np.isfinite(rows["residual", 1, "good"].view(np.float32)).all()


# -- what is wrong -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layers", "99"], r"'99' names layer 99, which does not exist; this model has layers 0 to 4"),
        (["--layers", "4-2"], r"selects nothing"),
        (["--components", "nope"], r"'nope' is not a component; they are residual, .*v_proj"),
        (
            ["--where", "colour == 'red'"],
            r"names a column that is not there .*colour.*; the rollout table has rollout_id",
        ),
        (["--where", "n_tokens >"], r"--where 'n_tokens >' is not a query .*write it like"),
        (["--where", "n_tokens + 1"], r"is not a condition on each rollout"),
        (["--where", "n_tokens > 9999"], r"nothing is selected: no rollout is left after --where"),
        (["--ids", "1-0,77,78"], r"2 of the ids asked for are not there: 77, 78; there are 1-0, "),
        (["--ids", ","], r"names nothing"),
        (["--part", "3/2"], r"--part '3/2' is not a part; write it like 2/4"),
        (["--batch-tokens", "many"], r"--batch-tokens 'many' is neither auto nor a number"),
        (["--codec", "gzip"], r"--codec 'gzip' is not known; choose one of zstd, lz4, none"),
        (["--dtype", "int8"], r"dtype 'int8'; a store holds bfloat16"),
        (["--device", "abacus"], r"device 'abacus' is not one that torch knows"),
        (["--hook-path", "residual"], r"--hook-path 'residual' is not a path"),
        (["--hook-path", "residual=nowhere.{layer}"], r"the model has no module nowhere"),
        (["--memory", "lots"], r"'lots' is not a size"),
        (["--input", "missing.jsonl"], r"missing.jsonl does not exist"),
    ],
)
def test_a_wrong_word_is_one_sentence(command: Command, store: Path, words: list[str], message: str) -> None:
    expect_refusal(command, store, message, *words)


def test_a_model_that_is_not_there(command: Command, store: Path, tmp_path: Path) -> None:
    message = r"no/model/here is not a directory, so there is no model in it; give a model's directory or a Hub id"
    expect_refusal(command, store, message, "--model", "no/model/here", code=1)
    expect_refusal(command, store, r"has no config.json, so it is not a model's", "--model", tmp_path, code=1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"in.jsonl is empty; it should hold transcripts"),
        ("not json", r"in.jsonl, line 1, column 1: not valid JSON"),
        (
            '{"id": "a", "text": "x"}\n{"id": "a", "text": "y"}\n',
            r"transcript id 'a' is there twice: .*line 1 .*line 2",
        ),
        ('{"id": "z", "token_ids": []}\n', r"transcript 'z' is empty: `token_ids` has no tokens"),
        ('{"id": "z", "text": ""}\n', r"transcript 'z' is empty: there is no text"),
        ('{"id": "v", "token_ids": [5, 512]}\n', r"rollout 'v' has token id 512 at position 1, beyond .* of 512"),
        ('{"id": "v", "token_ids": [5, -1]}\n', r"-1"),
    ],
    ids=["empty", "not JSON", "twice", "no tokens", "no text", "beyond the vocabulary", "negative"],
)
def test_wrong_input_is_one_sentence(command: Command, store: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "in.jsonl").write_text(text)
    expect_refusal(command, store, message, "--input", tmp_path / "in.jsonl")


def expect_refusal(command: Command, store: Path, message: str, *words: object, code: int = 2) -> None:
    result = command("--store", store, *words)
    assert result.code == code
    assert re.search(message, result.err), result.err
    assert result.err.startswith("error: ")
    assert result.out == ""
    assert not store.with_name(f"{store.name}.plans").exists()


def a_file(path: Path) -> None:
    path.write_text("x")


def a_directory(path: Path) -> None:
    path.mkdir()
    (path / "x").touch()


def a_newer_store(path: Path) -> None:
    path.mkdir()
    attributes = {"format": "activation-datastore", "version": 99}
    (path / "zarr.json").write_text(json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes}))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (a_file, r"exists and is not an activation store .*nothing was read or written"),
        (a_directory, r"exists and is not an activation store .*nothing was read or written"),
        (a_newer_store, r"has format version 99, and this release reads up to 1; upgrade"),
    ],
)
def test_a_place_that_is_no_store(command: Command, store: Path, make: Callable[[Path], None], message: str) -> None:
    make(store)
    expect_refusal(command, store, message)


def test_the_same_id_with_other_tokens_or_another_model_is_refused(
    command: Command, store: Path, poisoned: Path, tmp_path: Path
) -> None:
    command("--store", store, *FEW)
    other = write(tmp_path / "in.jsonl", {"id": "1-0", "token_ids": [5, 6, 7]})
    expect_refusal(
        command, store, r"rollout '1-0' is in .* with 511 tokens .* now has 3 tokens", "--input", other, code=1
    )
    message = r"rollout '1-0' is in .* from model stories260K .* model poisoned"
    expect_refusal(command, store, message, "--model", poisoned, code=1)
    expect_refusal(command, store, r"rollout '1-0' is in .*dtype", "--dtype", "bfloat16", code=1)
    assert stored.captures(store) == [1]
