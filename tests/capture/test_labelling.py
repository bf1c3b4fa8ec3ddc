"""Labels from files on the command line: joined by id, and all that does not fit is said."""

import json
from pathlib import Path

import pytest

import datastore
from tests.capture.cli import Command, command
from tests.datastore import making

__all__ = ["command"]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "run.zarr"
    known = {"run": "run-1", "sample_idx": 4, "n": 1}
    text = {i: f"w{i} ".encode() for i in range(200)}
    rollouts = [making.rollout("71", 5, prompt_end=2, labels=known), making.rollout("72", 4, labels={"n": 2})]
    making.capture(path, rollouts, vocab=text)
    return path


def test_a_table_is_joined_by_id_and_strangers_are_named(store: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "l.csv").write_text("rollout_id,verdict,n\n71,lie,high\n99,honest,low\n")
    told = command("label", store, tmp_path / "l.csv", "--dry-run")
    assert "would give 1 rollouts verdict (1), n (1) and 0 annotations" in told.out
    assert "verdict" not in datastore.open(store).rollouts
    told = command("label", store, tmp_path / "l.csv")
    assert told.code == 0
    assert "gave 1 rollouts verdict (1), n (1) and 0 annotations" in told.out
    assert "1 rollouts of the store are not in the files" in told.out
    assert "1 ids are not in" in told.err
    assert "left out: 99" in told.err
    assert "label 'n' was numbers and is now given text: it becomes text" in told.err
    table = datastore.open(store).rollouts
    assert table["verdict"].dropna().to_dict() == {"71": "lie"}
    assert table["n"].to_dict() == {"71": "high", "72": "2"}


def test_classifications_are_joined_on_run_and_sample(store: Path, tmp_path: Path, command: Command) -> None:
    found = [{"run": "run-1", "sample": 4, "label": "lie"}, {"run": "run-2", "sample": 4, "label": "honest"}]
    (tmp_path / "a.json").write_text(json.dumps({"classifications": found}))
    told = command("label", store, tmp_path / "a.json", "--json").json
    assert told["unknown"] == ["run-2 sample 4"]
    assert datastore.open(store).rollouts["classification"].dropna().to_dict() == {"71": "lie"}


def test_annotations_by_token_and_by_text(store: Path, tmp_path: Path, command: Command) -> None:
    ids = datastore.open(store).tokens("71")["token_id"].tolist()
    ranges = {"72": {"annotations": [{"token_start": 1, "token_end": n, "label": "x"} for n in (3, 9)]}}
    (tmp_path / "t.json").write_text(json.dumps(ranges))
    spans = [{"span": f"w{ids[3]} w{ids[4]}", "category": "y"}, {"span": "nowhere", "category": "y"}]
    (tmp_path / "s.json").write_text(json.dumps({"annotations": [{"id": "71", "spans": spans}]}))
    told = command("label", store, tmp_path / "t.json", tmp_path / "s.json")
    assert told.code == 0, told.err
    assert "'x' ends at token 9, beyond its 4 tokens; it was left out" in told.err
    assert "rollout '71' does not contain 'nowhere'" in told.err
    assert sorted(datastore.open(store).annotations.values.tolist()) == [["71", 3, 5, "y"], ["72", 1, 3, "x"]]


def test_ids_of_another_store_and_names_of_columns_are_refused(store: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "l.csv").write_text("id,x\n1,2\n")
    told = command("label", store, tmp_path / "l.csv")
    assert told.code == 2
    assert "none of the 1 ids is a rollout of" in told.err
    (tmp_path / "l.csv").write_text("id,n_tokens\n71,2\n")
    assert "a label can't be called n_tokens" in command("label", store, tmp_path / "l.csv").err
    assert not list((store / "labels").glob("0*"))


def test_ranges_that_count_from_the_response(store: Path, tmp_path: Path, command: Command) -> None:
    spans = [{"bias": 38, "tokens": [1, 3], "text": "not looked at", "note": "n"}, {"bias": 4, "tokens": [2, 4]}]
    entries = {"71": {"intended_bias": 44, "exploitations": spans}, "72": {"intended_bias": 2, "exploitations": []}}
    (tmp_path / "b.json").write_text(json.dumps({"metadata": {"date": "d"}, "detailed_annotations": entries}))
    told = command("label", store, tmp_path / "b.json")
    assert told.code == 0, told.err
    assert "'bias 4' ends at token 6, beyond its 5 tokens; it was left out" in told.err
    opened = datastore.open(store)
    assert opened.annotations.values.tolist() == [["71", 3, 5, "bias 38"]]
    assert opened.rollouts["intended_bias"].to_dict() == {"71": 44, "72": 2}
    entries["71"]["exploitations"] = [{"bias": 38}]
    (tmp_path / "b.json").write_text(json.dumps({"detailed_annotations": entries}))
    refused = command("label", store, tmp_path / "b.json")
    assert (refused.code, "an exploitation is not valid ('tokens')" in refused.err) == (2, True)
