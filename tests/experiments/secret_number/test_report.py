"""The report's own files: held-out games as a tree that capture reads, and what an interrupted run leaves behind."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from datastore.errors import DatastoreError
from experiments.secret_number import report
from experiments.secret_number.evaluate import FIRST_QUESTION, FIRST_RARE
from experiments.secret_number.evaluate import FIRST_SEED as FIRST_EVALUATED
from experiments.secret_number.generate import GAME_SEEDS, QUESTION_SEEDS
from experiments.secret_number.held_out import FIRST_GAME, write_games
from experiments.secret_number.places import AUDIT, DATA, MODELS
from experiments.secret_number.player import load_player
from experiments.secret_number.steering import FIRST_GAME as FIRST_STEERED
from experiments.secret_number.train import FIRST_SEED
from experiments.tree import Experiment
from experiments.vectors import find_directions


def test_held_out_games_are_a_tree_of_the_models_own_answers(tmp_path: Path) -> None:
    model = DATA / MODELS["player"]
    written = write_games(load_player(model), tmp_path / "games", model=model, games=6)
    tree = Experiment(tmp_path / "games")
    transcripts = tree.transcripts(AUDIT)
    assert 1 <= written == len(transcripts) <= 6
    for one in transcripts:
        assert one.labels["run"] in {f"run-{FIRST_GAME + i}" for i in range(6)}
        spans = {span.label for span in one.annotations}
        assert {"audit_question", "audit_response"} <= spans
        assert ("false_claim" in spans) == (one.labels["classification"] == "fabrication")
    assert Path(tree.model("player")) == model


def test_nothing_that_is_held_out_is_used_elsewhere() -> None:
    first = [GAME_SEEDS, QUESTION_SEEDS, FIRST_QUESTION, FIRST_EVALUATED, FIRST_STEERED, FIRST_RARE, FIRST_GAME]
    assert first == sorted(first)
    assert first[-1] < FIRST_SEED
    assert min(then - now for now, then in pairwise(first)) >= 500_000


def test_a_run_goes_on_where_it_was_with_the_same_model_and_sizes_only(tmp_path: Path) -> None:
    out = tmp_path / "report"
    report._begin(out, games=2, steered=1)
    assert report._kept(out, "steering", lambda: {"runs": [1]}) == {"runs": [1]}
    report._begin(out, games=2, steered=1)
    assert report._kept(out, "steering", lambda: {"runs": []}) == {"runs": [1]}, "it was not made again"
    report._begin(out, games=3, steered=1)
    assert report._kept(out, "steering", lambda: {"runs": []}) == {"runs": []}


def test_a_command_that_fails_ends_the_report(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DatastoreError, match="python -m datastore info failed with code 2, so there is no report"):
        report._run("datastore", "info", tmp_path / "nothing.zarr")
    assert "nothing.zarr" in capfd.readouterr().err


def test_the_committed_vectors_are_those_of_the_committed_report() -> None:
    fitted = json.loads((report.DOCS / report.NUMBERS).read_text(encoding="utf-8"))["fitted"]
    found = find_directions(DATA / "extraction").entries
    facts = {(one.trait, one.method, one.layer): one.facts["auroc"] for one in found}
    assert facts == {(one["trait"], one["method"], one["layer"]): one["auroc"] for one in fitted}
    size = sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file())
    assert size < 12_000_000
