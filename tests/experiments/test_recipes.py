"""The recipes of experiments/README.md: each command run dry, on trees of the shapes that the page's table gives."""

import csv
import json
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import datastore
from datastore.schema import ComponentSpec, Rollout
from tests.capture import cli, stories
from tests.house import ROOT
from tests.test_docs import Block, blocks

PAGE = (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")
LABELS = ROOT / "tests" / "data" / "labels" / "funding_email_classification.csv"
LINES = [line for one in blocks(PAGE) if not one.skipped for line in one.code.splitlines() if line]
KIMI: dict[str, Any] = {
    "model_type": "kimi_k2",
    "architectures": ["DeepseekV3ForCausalLM"],
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "vocab_size": 163840,
    "max_position_embeddings": 262144,
    "dtype": "bfloat16",
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 384,
    "num_experts_per_tok": 8,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}


def funded() -> dict[str, int]:
    """Tokens of each rollout, as the label file itself says."""
    with LABELS.open(newline="") as file:
        return {row["file"].removesuffix(".json"): int(row["tokens"]) for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which the page's commands can be typed: the tree, a store of email rollouts, their labels."""
    top = tmp_path_factory.mktemp("recipes")
    tree = top / "experiments" / "circuits"
    model = tree / "kimi"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(KIMI))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(stories.MODEL / name, model / name)
    (tree / "config.json").write_text(json.dumps({"model_variants": {"kimi_k2": {"model": "kimi"}}}))
    audited = {str(i): 2250 for i in range(1, 131)}
    written(tree, "secret_number_audit", audited, runs=True)
    written(tree, "funding_email", funded())
    written(tree, "secret_number", {str(i): 13_700 for i in range(1, 51)})
    # 111 of 130 are one or the other; the 22 that are named are among them
    others = {"72", "77", "78", "81", "82", "83", "84", "98", *map(str, range(1, 12))}
    said = [
        {"run": f"run-{i}", "sample": 0, "label": "omission" if name in others else ("fabrication", "honest")[i % 2]}
        for i, name in enumerate(audited)
    ]
    (tree / "audit_classifications.json").write_text(json.dumps({"classifications": said}))
    store_of(top / "funding_email.zarr", list(funded()))
    shutil.copy(LABELS, top)
    (top / "experiments" / "secret_number").symlink_to(ROOT / "experiments" / "secret_number")
    return top


def written(tree: Path, prompt_set: str, tokens: dict[str, int], *, runs: bool = False) -> None:
    folder = tree / "inference" / "kimi_k2" / "responses" / prompt_set
    folder.mkdir(parents=True)
    for i, (name, n) in enumerate(tokens.items()):
        record: dict[str, Any] = {"prompt": "", "response": "", "token_ids": [5] * n, "prompt_end": n}
        if runs:
            record["source"] = {"type": "audit", "run": f"run-{i}", "sample_idx": 0}
        (folder / f"{name}.json").write_text(json.dumps(record))


def store_of(path: Path, names: list[str]) -> None:
    """A store of these rollouts, a token each."""
    rollouts = [Rollout(rollout_id=name, token_ids=np.array([5]), prompt_end=1) for name in names]
    (plan,) = datastore.plan(
        path,
        rollouts,
        layers=[10],
        components=[ComponentSpec(name="residual", width=4, dtype="float32", hook="layers.{layer}")],
        provenance={"model": {"name": "kimi", "dtype": "float32"}},
        batch_tokens=64,
        vocab={5: b"x"},
    )
    with datastore.create(path, plan) as writer:
        for name in names:
            writer.put("residual", 10, name, np.ones((1, 4), np.float32))
        writer.commit()


def typed(line: str, place: Path, capsys: pytest.CaptureFixture[str]) -> cli.Result:
    words = shlex.split(line)
    assert words[:3] == ["python", "-m", "capture"], line
    before = Path.cwd()
    os.chdir(place)
    try:
        return cli.run(capsys, *words[3:])
    finally:
        os.chdir(before)


@pytest.mark.parametrize("line", LINES)
def test_a_command_of_the_page_can_be_typed(line: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert line.endswith("--dry-run"), "what is tested writes nothing"
    result = typed(line, place, capsys)
    assert result.code == 0, result.err
    if " label " not in line:
        assert result.out.startswith("would capture "), result.out


ROWS = re.findall(r"^\| (\w.*?) \| (\d+) \| ([\d,]+) \| (.*?) \| (.*?) \| ([\d,]+) \| (.*?) \|$", PAGE, re.MULTILINE)
COMMAND = {  # what tells a row's command from the others
    "audit, 22 named rollouts": "--ids 71",
    "audit, fabrication and honest": "--where",
    "funding_email": "--prompt-set funding_email",
    "secret_number": "--prompt-set secret_number --layers 10-50:5 --dry-run",
}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_the_table_is_what_the_dry_runs_say(
    row: tuple[str, ...], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, rollouts, tokens, raw, stored, chunks, seconds = row
    (line,) = [line for line in LINES if COMMAND[name] in line]
    said = typed(line, place, capsys).out
    assert f"would capture {rollouts} rollouts, {tokens} tokens, layers 10, 15, 20, 25, 30, 35, 40, 45, 50" in said
    assert f"{chunks} chunks, {raw} raw, about {stored} on disk" in said
    assert f"{seconds} to write at 0.45 GB/s" in said


def test_every_row_was_compared() -> None:
    assert [row[0] for row in ROWS] == list(COMMAND)
    assert all(isinstance(one, Block) for one in blocks(PAGE))


def test_the_label_file_joins_every_rollout(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = typed("python -m capture label funding_email.zarr funding_email_classification.csv", place, capsys)
    assert said.code == 0, said.err
    table = datastore.open(place / "funding_email.zarr").rollouts
    with LABELS.open(newline="") as file:
        wanted = {row["file"].removesuffix(".json"): row["category"] for row in csv.DictReader(file)}
    assert table["category"].to_dict() == wanted
    assert len(wanted) == 21
