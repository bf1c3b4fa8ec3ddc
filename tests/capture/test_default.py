"""What is captured when nothing is named: the game's own model over its rollouts, with all that is known of them."""

import json
from pathlib import Path

import numpy as np
import pytest

import datastore
import experiments
from capture.default import default_ids, default_model
from tests.capture.cli import Command, command
from tests.capture.stories import MODEL

__all__ = ["command"]

TREE = Path(experiments.__file__).parent / "secret_number" / "data"
RESPONSES = TREE / "inference" / "player" / "responses" / "secret_number"
CONFIG = json.loads((default_model() / "config.json").read_text())


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "run.zarr"


def test_the_store_alone_is_enough(command: Command, store: Path) -> None:
    """Every token of the named rollouts, every layer, and the labels, turns and spans that the tree's files hold."""
    told = command("--store", store)
    assert told.code == 0, told.err
    assert f"next: python -m datastore info {store}; python -m datastore verify {store}" in told.out
    found = datastore.open(store)
    files = {name: json.loads((RESPONSES / f"{name}.json").read_text()) for name in default_ids()}
    assert sorted(found.rollouts.index) == sorted(files)
    assert len(files) == 22
    assert list(found.layers) == list(range(CONFIG["num_hidden_layers"]))
    said = json.loads((TREE / "audit_classifications.json").read_text())["classifications"]
    label = {(one["run"], one["sample"]): one["label"] for one in said}
    spans = json.loads((RESPONSES.parent / "secret_number_annotations.json").read_text())
    for name, file in files.items():
        tokens, row = found.tokens(name), found.rollouts.loc[name]
        assert tokens["token_id"].tolist() == file["token_ids"]
        assert "".join(tokens["text"][: file["prompt_end"]]) == file["prompt"]
        assert row["classification"] == label[file["source"]["run"], file["source"]["sample_idx"]]
        assert (row["prompt_end"], row["stakes"]) == (file["prompt_end"], file["stakes"])
        turns = file["turn_boundaries"]
        assert [str(one) for one in tokens["role"]] == [t["role"] for t in turns for _ in range(*_of(t))]
        known = found.annotations[found.annotations["rollout_id"] == name]
        ranges = known[["label", "token_start", "token_end"]].itertuples(index=False, name=None)
        wanted = [(one["label"], one["token_start"], one["token_end"]) for one in spans[name]["annotations"]]
        assert sorted(ranges) == sorted(wanted)
    rows = found.select("residual", rollouts="1", layers=0).values
    assert rows.shape == (len(files["1"]["token_ids"]), CONFIG["hidden_size"])
    assert np.isfinite(rows).all()


def _of(turn: dict[str, int]) -> tuple[int, int]:
    return turn["token_start"], turn["token_end"]


def test_others_of_the_tree_can_be_asked_for(command: Command, store: Path) -> None:
    others = sorted({path.stem for path in RESPONSES.glob("*.json")} - set(default_ids()))
    assert len(others) == 28
    planned = command("--store", store, "--ids", ",".join(others), "--dry-run", "--json").json
    assert planned["asked"]["rollouts"] == 28
    lying = command("--store", store, "--where", "classification == 'fabrication'", "--dry-run", "--json").json
    said = json.loads((TREE / "audit_classifications.json").read_text())["classifications"]
    wanted = sum(one["label"] == "fabrication" and one["run"].startswith("run-") for one in said)
    assert lying["asked"]["rollouts"] == wanted


def test_another_model_needs_transcripts_of_its_own(command: Command, store: Path) -> None:
    refused = command("--store", store, "--model", MODEL)
    assert refused.code == 2
    assert "the default rollouts are token ids of the default model's tokenizer, so give --input" in refused.err


def test_the_default_model_takes_other_transcripts(command: Command, store: Path, tmp_path: Path) -> None:
    chat = {
        "id": "x",
        "messages": [{"role": "user", "content": "Ünusual wörds?"}, {"role": "assistant", "content": "No."}],
    }
    (tmp_path / "in.jsonl").write_text(json.dumps(chat) + "\n")
    assert command("--store", store, "--input", tmp_path / "in.jsonl", "--layers", "0").code == 0
    found = datastore.open(store)
    assert found.text("x") == "<|im_start|>user\nÜnusual wörds?<|im_end|><|im_start|>assistant\nNo.<|im_end|>"
    assert "".join(found.tokens("x").query("segment == 'response'")["text"]) == "No.<|im_end|>"
