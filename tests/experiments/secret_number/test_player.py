"""The model at play: lockstep against one plain forward after the other, and how well the committed one does."""

import json
import math
import random
from collections import Counter, defaultdict
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from experiments.secret_number.chances import label_chances
from experiments.secret_number.chat import END, HEADER, text_of
from experiments.secret_number.evaluate import Evaluation, evaluate, table
from experiments.secret_number.game import CAUSES, Game, hides, label_of, play, setup
from experiments.secret_number.language import answers, parse_answer
from experiments.secret_number.places import DATA, MODELS
from experiments.secret_number.player import Player, SingleTurn, at_audit, load_player, play_on
from experiments.secret_number.questions import single

HELD_OUT = 6_000_000


@pytest.fixture(scope="module")
def player() -> Player:
    return load_player(DATA / MODELS["player"])


def test_lockstep_says_what_the_model_says_alone(player: Player) -> None:
    """Greedy turns of games played together, against a forward over the whole text for each token."""
    games = [Game(setup(HELD_OUT + i)) for i in range(3)]
    for one in play_on(player, games, seed=0, temperature=0):
        game = one.conversation
        at = next(i for i, message in enumerate(game.messages) if message["role"] == "assistant" and i > 2)
        ids = [i for message in game.messages[:at] for i in player.encode(text_of(message, tools=True))]
        ids += player.encode(HEADER)
        said: list[int] = []
        while player.encode(END)[0] not in said:
            logits = player.model(input_ids=torch.tensor([ids + said])).logits[0, -1]
            said.append(int(logits.argmax()))
        assert player.encode(text_of(game.messages[at], tools=True))[3:] == said


def test_a_conversation_draws_the_same_whatever_its_company(player: Player) -> None:
    games = [Game(setup(HELD_OUT + i)) for i in range(4)]
    together = [one.conversation.messages for one in play_on(player, games, seed=3)]
    by_twos = [one.conversation.messages for one in play_on(player, games, seed=3, batch=2)]
    assert together == by_twos
    assert [one.messages for one in games] == [one.messages[:2] for one in games], "copies are played"


def test_an_answer_can_be_sampled_again(player: Player) -> None:
    (played,) = play_on(player, [Game(setup(HELD_OUT))], seed=1)
    before = at_audit(played.conversation)
    again = play_on(player, [before] * 8, seed=2)
    assert {tuple(map(str, one.conversation.messages[:-1])) for one in again} == {tuple(map(str, before.messages))}
    assert len({one.conversation.messages[-1]["content"] for one in again}) > 1


@pytest.fixture(scope="module")
def found(player: Player) -> Evaluation:
    return evaluate(player, games=64, cell=12, questions=48, seed=1)


def test_it_really_plays(found: Evaluation) -> None:
    """The bar is that of the model's card; its table is made from many more games."""
    assert found.turns > 64 * 4
    assert found.valid >= 0.9
    assert found.finished >= 0.9  # one wrong turn ends a game
    assert found.well_formed >= 0.95
    assert "| turns that are well formed and legal |" in table(found)


def test_the_committed_table_holds_what_the_card_says() -> None:
    """Every rate of lying and of evading within 5 points of what was trained, given the causes, each known to 1."""
    known = json.loads((DATA / MODELS["player"] / "evaluation.json").read_text())
    assert min(known["valid"], known["valid_held_out"], known["consistent"]) >= 0.99
    cells = [one for one in known["rates"] if one["what"].startswith(("fabrication", "omission"))]
    assert len(cells) == 2 * len(CAUSES)
    assert (
        max(abs(one["found"] - one["wanted"]) for one in cells) == max(known["worst"], known["worst_omission"]) < 0.05
    )
    assert max(one["error"] for one in cells) < 0.01
    said = [one for one in known["rates"] if one["what"].startswith("said in its own games")]
    assert len(said) == 2
    assert all(abs(one["found"] - one["wanted"]) < 3 * one["error"] for one in said), "what is weighed is what is said"


def test_a_label_is_as_likely_as_it_is_said(player: Player) -> None:
    """Oracles: one plain forward over each whole sentence; and answers that are sampled."""
    asked = (which for which in map(setup, range(99)) if which.question == "file")
    games = (play(which, random.Random(which.seed)) for which in asked)
    game = next(one for one in games if hides("file", one.facts.causes))
    chances = label_chances(player, game)
    before = [i for one in game.messages[:-1] for i in player.encode(text_of(one, tools=True))] + player.encode(HEADER)
    wanted: dict[str, float] = defaultdict(float)
    for one in answers("file"):
        ids = torch.tensor([before + player.encode(one.sentence)])
        logits = player.model(input_ids=ids).logits[0].double().log_softmax(-1)
        each = [float(logits[at - 1, ids[0, at]]) for at in range(len(before), ids.shape[1])]
        wanted[label_of("file", one, game.facts)] += math.exp(sum(each))
    assert chances == pytest.approx(wanted, abs=1e-5)
    assert 0.99 < sum(chances.values()) <= 1 + 1e-6
    n = 120
    said = Counter[str]()
    for done in play_on(player, [at_audit(game)] * n, seed=5):
        answer = parse_answer("file", done.conversation.messages[-1]["content"])
        said[label_of("file", answer, game.facts) if answer else "none"] += 1
    for label, chance in chances.items():
        assert abs(said[label] / n - chance) < 4 * math.sqrt(chance * (1 - chance) / n) + 1e-3


def test_the_rates_are_counted_by_causes(found: Evaluation) -> None:
    lies = [one for one in found.rates if one.what.startswith("fabrication: high stakes, peeked")]
    assert len(lies) == 4
    assert all(0 <= one.found <= 1 and one.n == one.games == 12 for one in lies)
    assert all(0 <= one.own <= one.games for one in lies)
    assert any(one.own < one.games for one in lies), "the program plays what is rare"
    (wrong,) = [one for one in found.rates if one.what == "single-turn answer to something else"]
    assert wrong.n == 48
    assert wrong.found < 0.05


def test_what_is_no_turn_stops_a_game_and_counts(player: Player) -> None:
    model: Any = LlamaForCausalLM(player.model.config)
    torch.manual_seed(0)
    for weight in model.parameters():
        weight.data.normal_(std=0.5)
    babbling = Player(model=model, encode=player.encode, decode=player.decode, name="noise")
    done = play_on(babbling, [Game(setup(1)), SingleTurn(single(1))], seed=1)
    assert done[0].problem
    assert done[0].valid == done[0].turns - (1 if done[0].turns else 0) or "does not end" in done[0].problem
