"""Captures from an experiment tree, and what a model offers: the place of the store, whose text, which variant."""

import json
import re
import shutil
from pathlib import Path

import pytest
from transformers import BloomConfig

import datastore
from capture.errors import ModelError
from capture.loading import describe
from tests.capture.cli import Command, command
from tests.capture.stories import MODEL

__all__ = ["command"]

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "toy_experiment"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "toy"
    shutil.copytree(GOLDEN, root)
    variants = {
        "instruct": {"model": str(MODEL)},
        "other": {"model": str(MODEL)},
        "tuned": {"model": "a/b", "lora": "c/d"},
    }
    (root / "config.json").write_text(json.dumps({"defaults": {"application": "instruct"}, "model_variants": variants}))
    shutil.copytree(root / "inference/instruct/responses/set1", root / "inference/instruct/responses/deep/set")
    return root


def test_a_prompt_set_of_a_tree_goes_into_the_trees_own_store(tree: Path, command: Command) -> None:
    words = ("--experiment", tree, "--prompt-set", "deep/set", "--layers", "1")
    told = command(*words)
    assert told.code == 0, told.err
    store = datastore.open(tree / "inference/instruct/deep/set.zarr")
    record = json.loads((tree / "inference/instruct/responses/set1/1.json").read_text())
    assert store.tokens("1")["token_id"].tolist() == record["token_ids"]
    assert store.rollouts["prompt_set"].tolist() == ["deep/set"] * 3
    assert store.layers == (1,)
    assert "3 of 3 rollouts were in the store already" in command(*words).out


def test_one_model_over_anothers_responses(tree: Path, tmp_path: Path, command: Command) -> None:
    asked = (
        "--experiment",
        tree,
        "--prompt-set",
        "set1",
        "--model-variant",
        "other",
        "--dry-run",
        "--layers",
        "0",
        "--json",
    )
    refused = command(*asked)
    assert (refused.code, "prompt sets with responses of 'other': none" in refused.err) == (2, True)
    planned = command(*asked, "--responses-from", "instruct").json
    assert planned["store"] == str(tree / "inference/other/set1.zarr")
    assert planned["plans"][0]["tokens"] == 37


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "--experiment needs --prompt-set; .* has responses of instruct to: deep/set, set1"),
        (("--prompt-set", "set1", "--model-variant", "no"), "has no model variant 'no'; it has instruct, other, tuned"),
        (("--prompt-set", "set1", "--input", "x.json"), "--input and --experiment both name transcripts"),
    ],
)
def test_what_a_tree_lacks_is_said(words: tuple[str, ...], message: str, tree: Path, command: Command) -> None:
    told = command("--experiment", tree, *words)
    assert told.code == 2
    assert re.search(message, told.err), told.err


def test_tree_options_without_a_tree_are_refused(command: Command) -> None:
    assert "Missing option --store (or --experiment)" in command("--layers", "1").err
    assert "Missing option --experiment" in command("--store", "x.zarr", "--prompt-set", "s").err


def test_a_models_components_are_listed_with_paths_and_widths(command: Command) -> None:
    found = command("components", MODEL, "--json").json
    rows = {row["component"]: row for row in found["components"]}
    config = json.loads((Path(MODEL) / "config.json").read_text())
    assert found["n_layers"] == config["num_hidden_layers"]
    assert rows["residual"]["width"] == config["hidden_size"]
    heads = config["num_key_value_heads"] * config["hidden_size"] // config["num_attention_heads"]
    assert (rows["k_proj"]["width"], rows["k_proj"]["module"]) == (heads, "layers.{layer}.self_attn.k_proj")
    assert all(row["layers"] == list(range(found["n_layers"])) for row in rows.values())
    assert "layers.{layer}.self_attn.k_proj" in command("components", MODEL).out


def test_components_are_listed_from_a_config_without_weights_or_tokenizer(command: Command, tmp_path: Path) -> None:
    BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=64, dtype="bfloat16").save_pretrained(tmp_path / "bare")
    told = command("components", tmp_path / "bare", "--json")
    assert told.code == 0, told.err
    widths = {row["component"]: row.get("width") for row in told.json["components"]}
    assert (widths["residual"], widths["mlp_out"]) == (32, 32)
    with pytest.raises(ModelError, match="has no tokenizer that can be read"):
        describe(tmp_path / "bare")
