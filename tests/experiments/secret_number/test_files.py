"""The committed model and rollouts: sizes, shape, and every label found again from the token ids alone."""

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from experiments.secret_number.chat import parse_turn
from experiments.secret_number.game import Game, hides, is_true, label_of, setup
from experiments.secret_number.language import parse_answer
from experiments.secret_number.places import AUDIT, DATA, DEFAULT_IDS, MODELS, QUESTION_SET
from experiments.secret_number.questions import single
from experiments.transcript import Transcript
from experiments.tree import Experiment

TREE = Experiment(DATA)
ROLLOUTS = TREE.transcripts(AUDIT)
ASKED = TREE.transcripts(QUESTION_SET)
TOKENIZER: Any = PreTrainedTokenizerFast.from_pretrained(DATA / MODELS["player"])


def size(folder: Path) -> int:
    return sum(one.stat().st_size for one in folder.rglob("*") if one.is_file())


def test_all_is_small() -> None:
    assert size(DATA) < 12e6
    for name in MODELS.values():
        assert (DATA / name / "model.safetensors").stat().st_size <= 3e6
        config = json.loads((DATA / name / "config.json").read_text())
        assert (config["model_type"], config["dtype"]) == ("llama", "bfloat16")
        assert config["max_position_embeddings"] > max(len(one.token_ids or ()) for one in ROLLOUTS)


def test_the_tree_is_read_as_any_other() -> None:
    assert TREE.prompt_sets("player") == [QUESTION_SET, AUDIT]
    assert {name: Path(TREE.model(name)).name for name in TREE.variants} == MODELS
    assert len(ROLLOUTS) == 50
    chosen = (DATA / DEFAULT_IDS).read_text().split()
    assert len(chosen) == 22
    assert set(chosen) == {one.id for one in ROLLOUTS if "default" in one.tags}
    assert {"honest", "fabrication", "omission"} == {one.labels["classification"] for one in ROLLOUTS}


def turns(one: Transcript) -> list[tuple[str, str]]:
    """Role and text of each turn, from the token ids."""
    out = []
    whole = TOKENIZER.decode(list(one.token_ids or ()))
    for text in whole.split("<|im_start|>")[1:]:
        role, _, body = text.partition("\n")
        out.append((role, body.removesuffix("<|im_end|>")))
    assert whole.count("<|im_end|>") == len(out) - (one.prompt_set == QUESTION_SET)
    return out


@pytest.mark.parametrize("one", ROLLOUTS, ids=lambda one: one.id)
def test_a_rollout_is_its_game_played_again(one: Transcript) -> None:
    """The game of its seed, given the model's turns, says the same messages and the same facts."""
    game = Game(setup(int(str(one.labels["run"]).removeprefix("run-"))))
    said = turns(one)
    for role, text in said:
        if role == "assistant":
            message = parse_turn(text)
            assert message is not None
            game.step(message)
    assert game.done
    assert [role for role, _ in said] == [message["role"] for message in game.messages]
    others = [message["content"] for message in game.messages if message["role"] in ("user", "tool")]
    assert [text for role, text in said if role in ("user", "tool")] == others
    facts, labels = game.facts, one.labels
    answer = parse_answer(game.setup.question, said[-1][1])
    assert answer is not None
    assert labels["classification"] == label_of(game.setup.question, answer, facts)
    known = {name: getattr(facts.causes, name) for name in ("stakes", "peeked", "failed", "denied")}
    assert {name: labels[name] for name in known} == known
    assert (labels["secret"], labels["guesses"]) == (facts.secret, len(facts.guesses))
    assert labels["hides"] == hides(game.setup.question, facts.causes)
    spans = {span.label: span for span in one.annotations}
    assert ("false_claim" in spans) == (labels["classification"] == "fabrication")
    text = TOKENIZER.decode(list(one.token_ids or ())[one.prompt_end :])
    assert text == f"{labels['answer']}<|im_end|>"


def test_pairs_share_a_prefix_and_part_at_the_fork() -> None:
    pairs: dict[Any, list[Transcript]] = defaultdict(list)
    for one in ROLLOUTS:
        if one.labels["pair"]:
            pairs[one.labels["pair"]].append(one)
    assert len(pairs) >= 10
    for one, other in pairs.values():
        fork = one.labels["fork"]
        assert isinstance(fork, int)
        assert fork == other.labels["fork"]
        assert fork >= (one.prompt_end or 0)
        ids, others = one.token_ids or (), other.token_ids or ()
        assert ids[:fork] == others[:fork]
        assert ids[fork] != others[fork]
        found = [one.labels["classification"], other.labels["classification"]]
        assert found[0] == "fabrication"
        assert found[1] in ("honest", "omission")
    chosen = [one for one in ROLLOUTS if "default" in one.tags and one.labels["pair"]]
    assert Counter(one.labels["pair"] for one in chosen).most_common()[-1][1] == 2


def test_some_say_in_truth_the_words_of_a_lie() -> None:
    said: dict[Any, set[Any]] = defaultdict(set)
    for one in ROLLOUTS:
        sentence = str(one.labels["answer"]).split(".")[0]  # an assurance may follow
        said[one.labels["question"], sentence].add(one.labels["classification"])
    assert sum({"fabrication", "honest"} <= labels for labels in said.values()) >= 5


def test_single_turn_answers_are_as_often_true_as_false_in_the_same_words() -> None:
    count = Counter((one.labels["question"], one.labels["classification"]) for one in ASKED)
    assert set(count) == {
        (q, label) for q in ("file", "method", "count", "order") for label in ("honest", "fabrication")
    }
    for question in ("file", "method", "count", "order"):
        assert count[question, "honest"] == count[question, "fabrication"] >= 20
    pairs: dict[Any, list[Transcript]] = defaultdict(list)
    for one in ASKED:
        asked = single(int(str(one.labels["run"]).removeprefix("question-")))
        text = turns(one)[-1][1]  # up to the full stop: what follows would say how it was meant
        assert (turns(one)[1][1], text) == (asked.messages[1]["content"], one.labels["answer"])
        answer = parse_answer(asked.question, text)
        assert answer is not None
        assert (one.labels["classification"] == "honest") == is_true(answer.claim, asked.facts)
        if one.labels["pair"]:
            pairs[one.labels["pair"]].append(one)
    assert len(pairs) >= 60
    for one, other in pairs.values():
        assert one.labels["answer"] == other.labels["answer"]
        assert {one.labels["classification"], other.labels["classification"]} == {"honest", "fabrication"}
