"""The controls do their work: in worlds where it is known what a direction reads, each one falls where it should."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import datastore
import project
from datastore.errors import AbsentError, MisuseError
from datastore.schema import ComponentSpec, Rollout
from experiments.direction import Direction
from experiments.secret_number import controls
from experiments.secret_number.answers import answers_of, positions
from experiments.secret_number.finding import CAVEAT, find
from project.statistics import auroc
from tests.experiments.secret_number import worlds


def found_in(directory: Path, world: Any, *, method: str = "mean_diff", skewed: bool = False) -> dict[str, Any]:
    store = worlds.games(directory / "games.zarr", world)
    learned = worlds.singles(directory / "singles.zarr", world, skewed=skewed)
    fitted = project.fit_directions(learned, "lying", method=method, position="response[-1]")
    first, second = (one.direction for one in fitted)
    return find(store, second, learned_on=learned, others=[first])


@pytest.fixture(scope="module")
def falsity(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return found_in(tmp_path_factory.mktemp("falsity"), worlds.falsity)


def test_a_direction_of_falsity_survives_every_control(falsity: dict[str, Any]) -> None:
    assert falsity["answers"] == {
        "n": 96,
        "false": 32,
        "by_question": {"file": {"n": 96, "false": 32}},
        "labels": {"fabrication": 32, "honest": 64},
    }
    assert all(falsity["survives"].values()), falsity["survives"]
    assert len(falsity["survives"]) == 8
    assert falsity["readings"]["at the full stop"]["auroc"]["value"] > 0.99
    assert 0.35 < falsity["readings"]["before the answer"]["auroc"]["value"] < 0.65
    assert falsity["readings"]["at the full stop"]["random_directions"]["p"] < 0.03
    assert "beyond every control" in falsity["verdict"]
    assert falsity["caveat"] == CAVEAT


def test_it_separates_first_where_the_truth_is_decided(falsity: dict[str, Any]) -> None:
    assert falsity["first_separates"]["claim"] == 0
    assert falsity["first_separates"]["start"] == 0
    curve = falsity["profile"]["claim"]
    before = [auc for at, auc in zip(curve["offset"], curve["auroc"], strict=True) if at < 0]
    after = [auc for at, auc in zip(curve["offset"], curve["auroc"], strict=True) if at >= 0]
    assert max(before) < 0.75 < 0.95 < min(after)


def test_a_pair_parts_at_its_answer_and_not_before(falsity: dict[str, Any]) -> None:
    """The two peekers of a game share all up to the answer, and only noise tells them apart there."""
    pairs = falsity["pairs"]
    assert pairs["n_pairs"] == 32
    assert pairs["at the full stop"]["value"] > 0.95
    assert 0.2 < pairs["before the fork"]["value"] < 0.8


def test_a_direction_of_words_falls_to_words_and_equal_sentences(tmp_path: Path) -> None:
    found = found_in(tmp_path, worlds.words, skewed=True)
    assert found["survives"]["chance"], "the words alone look like a finding"
    assert not found["survives"]["token ids only"]
    assert not found["survives"]["embedding layer"]
    assert not found["survives"]["equal sentences"]
    assert re.search("does not survive token ids only, nor embedding layer, nor .*equal sentences", found["verdict"])
    same = found["readings"]["equal sentences, at the full stop"]
    assert same["token_ids"]["value"] == same["embedding"]["value"] == 0.5


def test_a_direction_of_what_went_before_falls_to_the_token_before_the_answer(tmp_path: Path) -> None:
    found = found_in(tmp_path, worlds.context, skewed=True)
    assert found["survives"]["equal sentences"], "equal words are told apart by what was done"
    assert not found["survives"]["equal sentences beyond what was known before"]
    assert not found["survives"]["before the answer"]


def test_a_probe_is_controlled_by_probes(tmp_path: Path) -> None:
    found = found_in(tmp_path, worlds.falsity, method="probe")
    assert all(found["survives"].values())
    assert found["readings"]["at the full stop"]["relearned_from_shuffled"]["n"] == controls.SHUFFLES // 10


def test_the_result_is_json_and_the_same_every_time(falsity: dict[str, Any], tmp_path: Path) -> None:
    again = found_in(tmp_path, worlds.falsity)
    assert json.dumps(again, allow_nan=False) == json.dumps(falsity, allow_nan=False)


def test_scores_read_are_the_scores_kept(tmp_path: Path) -> None:
    """The AUROC of the finding is that of `project.scores` at the same tokens."""
    store = worlds.games(tmp_path / "games.zarr", worlds.falsity)
    learned = worlds.singles(tmp_path / "singles.zarr", worlds.falsity)
    direction = project.fit_directions(learned, "lying", position="response[-1]")[0].direction
    answers, scores = answers_of(store), project.scores(store, [direction])
    at = {
        row.rollout: float(scores.score.sel(rollout=row.rollout).isel(direction=0).values[row.stop])
        for row in answers.itertuples()
    }
    false = answers["false"].to_numpy()
    kept = np.array([at[name] for name in answers["rollout"]])
    found = find(store, direction, learned_on=learned)["readings"]["at the full stop"]["auroc"]["value"]
    assert found == pytest.approx(auroc(kept[false], kept[~false]), abs=1e-3)


def test_answers_say_where_they_stand(tmp_path: Path) -> None:
    store = worlds.games(tmp_path / "games.zarr", worlds.falsity, n=12)
    answers = answers_of(store).set_index("rollout")
    assert answers.loc["g1", "sentence"] == worlds.NO
    assert bool(answers.loc["g1", "false"])
    assert not answers.loc["g0", "false"]
    for name, row in answers.iterrows():
        texts = store.tokens(str(name))["text"]
        assert texts[row["stop"]] == "."
        assert "".join(texts[row["start"] : row["stop"] + 1]) == row["sentence"]
    assert set(positions(answers.reset_index(), 0, since="stop")) == set(answers.index)
    assert positions(answers.reset_index(), 4, since="stop") == {}, "beyond the answer there is nothing to read"
    assert positions(answers.reset_index(), 9, since="start") == {}, "the assurance is not the sentence"


def test_ranks_within_strata_compare_equals_only() -> None:
    """Oracle: the mean over strata of AUROCs, where each stratum has as many of either kind."""
    random = np.random.default_rng(3)
    strata = np.repeat(["a", "b", "c"], 20)
    false = np.tile([True, False], 30)
    scores = random.standard_normal(60) + false * 0.7 + np.repeat([0.0, 50.0, -9.0], 20)
    of = {s: auroc(scores[(strata == s) & false], scores[(strata == s) & ~false]) for s in "abc"}
    ranks = controls.stratified(scores[:, np.newaxis], strata.tolist())[:, 0]
    assert auroc(ranks[false], ranks[~false]) == pytest.approx(np.mean([*of.values()]), abs=0.06)
    shifted = controls.stratified((scores + (strata == "b") * 1e3)[:, np.newaxis], strata.tolist())[:, 0]
    np.testing.assert_array_equal(ranks, shifted)


def test_equal_sentences_are_those_said_both_ways() -> None:
    answers = pd.DataFrame({"sentence": ["x", "x", "y", "z", "z"], "false": [True, False, True, False, False]})
    assert controls.equals(answers)["sentence"].tolist() == ["x", "x"]


def test_misuse_is_said(tmp_path: Path) -> None:
    learned = worlds.singles(tmp_path / "singles.zarr", worlds.falsity)
    direction = project.fit_directions(learned, "lying", position="response[-1]")[0].direction
    few = worlds.games(tmp_path / "few.zarr", worlds.falsity, n=9)
    with pytest.raises(MisuseError, match="of 9 audit answers 3 are false; 4 of each kind"):
        find(few, direction, learned_on=learned)
    store = worlds.games(tmp_path / "games.zarr", worlds.falsity)
    given = Direction(trait="a/b", layer=0, values=direction.values)
    with pytest.raises(MisuseError, match="does not say which label it was fitted on"):
        find(store, given, learned_on=learned)


def test_a_store_of_something_else_is_refused(tmp_path: Path) -> None:
    spec = ComponentSpec(name="residual", width=4, dtype="float32")
    one = Rollout(rollout_id="r", token_ids=np.arange(3, dtype=np.int32))
    (plan,) = datastore.plan(tmp_path / "s.zarr", [one], layers=[0], components=[spec])
    with datastore.create(tmp_path / "s.zarr", plan) as writer:
        writer.put("residual", 0, "r", np.zeros((3, 4), np.float32))
        writer.commit()
    store = datastore.open(tmp_path / "s.zarr")
    with pytest.raises(AbsentError, match="no rollout with labels question and decided"):
        answers_of(store)
    direction = Direction(trait="a/b", layer=0, values=np.ones(4, np.float32), facts={"label": "x"})
    with pytest.raises(AbsentError, match="does not hold resid_pre at layer 0"):
        controls.lessons_of(store, direction)


def test_shuffling_stays_among_equals() -> None:
    """Where stratum and label are one, shuffling among equals can change nothing; without strata it does."""
    false = np.repeat([True, False], 15)
    scores = np.random.default_rng(0).standard_normal(30)
    within = controls.shuffled_spread(scores, false, strata=["a"] * 15 + ["b"] * 15, seed=0)
    assert within.low == within.high == pytest.approx(0.5)
    free = controls.shuffled_spread(scores, false, strata=None, seed=0)
    assert free.low < 0.35 < 0.65 < free.high
    assert free.mean == pytest.approx(0.5, abs=0.02)
