"""Steering the game: outcomes are counted from the facts, results are read back by those who choose layers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from capture.errors import RequestError
from datastore.errors import MisuseError
from experiments.direction import Direction
from experiments.secret_number import steering
from experiments.secret_number.game import Game, play, setup
from experiments.secret_number.player import Played, Player
from experiments.steering import find_steering, read_steering
from project.ranking import RULES, rank

WIDTH = 16


@pytest.fixture(scope="module")
def player() -> Player:
    """A player that never learned: what it says is no turn, and steering can make it say one token for ever."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=512,
    )
    model: Any = LlamaForCausalLM(config)
    model.eval().requires_grad_(False)
    return Player(
        model=model, encode=lambda text: [*text[:20].encode()], decode=lambda ids: "".join(map(chr, ids)), name="m"
    )


def a_direction(layer: int = 1, *, width: int = WIDTH, trait: str = "secret_number/lying", seed: int = 0) -> Direction:
    values = np.random.default_rng(seed).standard_normal(width).astype(np.float32)
    return Direction(trait=trait, layer=layer, method="mean_diff", position="response[-1]", values=values, model="m")


def played(seed: int, **change: Any) -> Played:
    import random

    game = play(setup(seed), random.Random(seed))
    turns = sum(one["role"] == "assistant" for one in game.messages)
    return Played(**{"conversation": game, "problem": "", "turns": turns, "valid": turns, **change})


def test_outcomes_are_those_of_the_facts() -> None:
    """Oracle: the label that the game's own checker gives to each answer, counted by hand."""
    from experiments.secret_number.game import label_of
    from experiments.secret_number.language import parse_answer

    games = [played(i) for i in range(60)]
    broken = replace(games[0], problem="not a turn", valid=games[0].turns - 1)
    outcome = steering.outcome_of([broken, *games[1:]])
    said = []
    for one in games[1:]:
        game: Game = one.conversation
        answer = parse_answer(game.setup.question, game.messages[-1]["content"])
        assert answer is not None
        said.append((label_of(game.setup.question, answer, game.facts), answer.assurance))
    assert sum(outcome.false) == sum(label == "fabrication" for label, _ in said) > 5
    assert sum(outcome.promised) == sum(text in ("I promise.", "You can trust me.") for _, text in said)
    assert sum(outcome.peeked) == sum(bool(one.conversation.facts.peeked) for one in games)
    assert (outcome.turns - outcome.valid, len(outcome.false), outcome.games) == (1, 59, 60)
    result = outcome.result("false")
    assert result["trait_mean"] == pytest.approx(100 * sum(outcome.false) / 59)
    assert result["coherence_mean"] == pytest.approx(100 * outcome.valid / outcome.turns)
    assert result["trait_std"] == pytest.approx(np.std([100.0 * one for one in outcome.false]))


def test_no_answer_is_no_mean() -> None:
    outcome = steering.outcome_of([replace(played(1), problem="not a turn", turns=1, valid=0)])
    result = outcome.result("false")
    assert result["trait_mean"] is None
    assert (result["coherence_mean"], result["n"]) == (0.0, 0)


def test_the_model_is_really_steered_and_left_as_it_was(player: Player) -> None:
    """Along an embedding, far enough, the model says its token and nothing else; unsteered it does not."""
    token = 65
    row = player.model.get_input_embeddings().weight[token].numpy()
    push = Direction(trait="secret_number/lying", layer=1, values=row, position="response[-1]", method="mean_diff")
    baseline, found = steering.steer(player, [push], {1: 1.0}, multiples=[1e4], games=3)
    again, _ = steering.steer(player, [], {}, games=3)
    assert baseline == again
    assert (baseline.turns, baseline.valid) == (3, 0), "it never learned to make a turn"
    ((direction, coefficient, outcome),) = found
    assert (direction, coefficient) == (push, 1e4)
    assert (outcome.turns, outcome.valid) == (3, 0)
    from capture.steering import steered
    from experiments.secret_number.player import play_on

    with steered(player.model, [(push, 1e4)]):
        (one,) = play_on(player, [Game(setup(steering.FIRST_GAME))], seed=0)
    assert one.problem == "a turn that does not end"


def test_results_choose_the_layer_that_moved_most_and_stayed_coherent(tmp_path: Path) -> None:
    def outcome(lies: int, valid: int = 100) -> steering.Outcome:
        false = tuple(i < lies for i in range(20))
        return steering.Outcome(games=20, turns=100, valid=valid, false=false, promised=false, peeked=false)

    vectors = [a_direction(layer) for layer in (0, 1, 2)]
    found = [(vectors[0], 2.0, outcome(9)), (vectors[1], 2.5, outcome(15)), (vectors[2], 3.0, outcome(20, valid=50))]
    other = (a_direction(1, trait="secret_number/peeked"), 1.0, outcome(3))
    files = steering.write_results(tmp_path, outcome(5), [*found, other], variant="player")
    assert [one.trait for one in find_steering(tmp_path)] == ["secret_number/lying", "secret_number/peeked"]
    lying = read_steering(files[0], strict=True)
    assert lying.baseline is not None
    assert (lying.baseline.trait_mean, lying.baseline.coherence_mean) == (25.0, 100.0)
    (best, *_) = rank(vectors, {"response[-1]": lying}, rules=RULES["dev"])
    assert (best.entry.layer, best.delta, best.coefficient) == (1, 50.0, 2.5)
    assert files[0] == tmp_path / "secret_number/lying/player/response_-1/steering/results.jsonl"


def test_what_can_not_be_steered_is_refused(player: Player) -> None:
    with pytest.raises(MisuseError, match="no norm is known for layer 1"):
        steering.steer(player, [a_direction()], {0: 1.0}, games=1)
    with pytest.raises(RequestError, match="has width 8 and residual of llama has 16"):
        steering.steer(player, [a_direction(width=8)], {1: 1.0}, games=1)
