"""Only the rows of responses are stored: the same bits as with all tokens, whatever is added to the store later."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import datastore
from datastore.schema import Rollout
from datastore.verify import verify
from tests.capture import stored
from tests.capture.cli import Command, command

__all__ = ["command"]

COMMON = ("--chunk-tokens", 16, "--batch-tokens", 200)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    random = np.random.default_rng(2)
    records = [
        {
            "id": f"r{i}",
            "token_ids": random.integers(3, 512, n).tolist(),
            "prompt_end": n // 3,
            "annotations": [{"token_start": n // 3 - 2, "token_end": n // 3 + 4, "label": "odd"}],
        }
        for i, n in enumerate((30, 61, 17, 90, 45))
    ]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_the_rows_are_those_of_the_responses(command: Command, tmp_path: Path, source: Path) -> None:
    whole, part = tmp_path / "whole.zarr", tmp_path / "part.zarr"
    assert command("--store", whole, "--input", source, *COMMON).code == 0
    assert command("--store", part, "--input", source, *COMMON, "--response-only").code == 0
    all_rows, rows = stored.rows(whole), stored.rows(part)
    records = {record["id"]: record for record in map(json.loads, source.read_text().splitlines())}
    assert set(rows) == set(all_rows)
    for (component, layer, name), values in rows.items():
        assert np.array_equal(values, all_rows[component, layer, name][records[name]["prompt_end"] :])
    store = datastore.open(part)
    for name, record in records.items():
        assert store.tokens(name)["token_id"].tolist() == record["token_ids"][record["prompt_end"] :]
    assert set(store.select("residual", layers=2).segment.values) == {"response"}
    assert store.annotations[["token_start", "token_end"]].drop_duplicates().values.tolist() == [[0, 4]]
    assert verify(part, full=True).problems == []


def test_what_is_added_later_keeps_the_same_company(command: Command, tmp_path: Path, source: Path) -> None:
    once, grown = tmp_path / "once.zarr", tmp_path / "grown.zarr"
    words = ("--input", source, *COMMON, "--response-only")
    assert command("--store", once, *words).code == 0
    assert command("--store", grown, *words, "--layers", "1,3").code == 0
    assert command("--store", grown, *words, "--ids", "r1,r4", "--layers", "0-2").code == 0
    assert command("--store", grown, *words).code == 0
    stored.assert_same(stored.rows(grown), stored.rows(once))


def test_whole_and_response_rows_of_one_rollout_do_not_mix(command: Command, tmp_path: Path, source: Path) -> None:
    store = tmp_path / "s.zarr"
    assert command("--store", store, "--input", source, "--layers", "0", "--response-only").code == 0
    refused = command("--store", store, "--input", source, "--layers", "1")
    assert refused.code == 1
    assert "rollout 'r0' is in" in refused.err
    assert command("--store", store, "--input", source, "--layers", "1", "--replace").code == 0
    assert {len(values) for (_, _, name), values in stored.rows(store).items() if name == "r3"} == {60, 90}


def test_a_rollout_without_response_is_named(command: Command, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"id": "a", "text": "once"}\n{"id": "b", "prompt": "x", "response": "y"}\n')
    refused = command("--store", tmp_path / "s.zarr", "--input", tmp_path / "in.jsonl", "--response-only")
    assert refused.code == 2
    assert "1 of 2 rollouts have no response tokens, 'a' the first" in refused.err
    assert '--where "prompt_end < n_tokens"' in refused.err
    words = ("--input", tmp_path / "in.jsonl", "--response-only", "--where", "prompt_end < n_tokens")
    assert command("--store", tmp_path / "s.zarr", *words).code == 0


def test_a_prefix_is_part_of_what_a_rollout_is() -> None:
    ids = np.arange(5, 15, dtype=np.int32)
    whole, cut, other = (
        Rollout(rollout_id="a", token_ids=ids),
        Rollout(rollout_id="a", token_ids=ids[4:], prefix=ids[:4]),
        Rollout(rollout_id="a", token_ids=ids[5:], prefix=ids[:5]),
    )
    assert len({one.token_sha256 for one in (whole, cut, other)}) == 3
    assert cut.token_sha256 == f"{whole.token_sha256}+4"
    assert all(np.array_equal(one.computed_ids, ids) for one in (whole, cut, other))


def test_exported_files_have_the_prompt_that_has_no_rows(command: Command, tmp_path: Path, source: Path) -> None:
    """The users' form of such a file: ids and text of the prompt, no activations of it; import takes it back."""
    part, out, again = tmp_path / "part.zarr", tmp_path / "out", tmp_path / "again.zarr"
    assert command("--store", part, "--input", source, *COMMON, "--response-only").code == 0
    assert command("export", part, out).code == 0
    tree, rows, store = out / "inference/exported", stored.rows(part), datastore.open(part)
    for record in map(json.loads, source.read_text().splitlines()):
        name, cut = record["id"], record["prompt_end"]
        file = torch.load(tree / f"raw/residual/exported/{name}.pt", weights_only=True)
        assert file["prompt"]["token_ids"] + file["response"]["token_ids"] == record["token_ids"]
        assert (len(file["prompt"]["tokens"]), file["prompt"]["activations"]) == (cut, {})
        states = file["response"]["activations"][2]["residual"]
        assert np.array_equal(states.view(torch.uint16).numpy(), rows["residual", 2, name])
        response = json.loads((tree / f"responses/exported/{name}.json").read_text())
        assert (response["token_ids"], response["prompt_end"]) == (record["token_ids"], cut)
        assert response["annotations"] == [{"token_start": cut, "token_end": cut + 4, "label": "odd"}]
    assert command("import", out, "--store", again).code == 0
    assert {key: rows.tobytes() for key, rows in stored.rows(again).items()} == {
        k: v.tobytes() for k, v in rows.items()
    }
    back = datastore.open(again)
    columns = ["token_start", "token_end", "label"]
    assert back.annotations[columns].values.tolist() == store.annotations[columns].values.tolist()
    assert set(back.rollouts["prompt_tokens_left_out"]) == {10, 20, 5, 30, 15}
