"""The exact probabilities of an answer's tokens, against answers that the agent really draws."""

import random
from collections import Counter
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from experiments.secret_number.chat import END
from experiments.secret_number.game import Facts, Game, play, rates, setup, teacher
from experiments.secret_number.language import Claim
from experiments.secret_number.places import DATA, MODELS
from experiments.secret_number.player import at_audit
from experiments.secret_number.questions import single
from experiments.secret_number.targets import (
    Chances,
    audit_chances,
    next_tokens,
    rules_chances,
    single_chances,
)
from experiments.secret_number.train import encoder

ENCODE = encoder(PreTrainedTokenizerFast.from_pretrained(DATA / MODELS["player"]))
DRAWS = 4000


def compared(texts: list[str], chances: Chances, *, question: Any, facts: Facts | None) -> int:
    """Compare each token's probability with its share among the answers that begin alike; return how many."""
    drawn = Counter((*ENCODE(text), *ENCODE(END)) for text in texts)
    checked = 0
    for path in drawn:
        for i, targets in enumerate(next_tokens(path, chances, ENCODE, question=question, facts=facts)):
            assert sum(targets.values()) == pytest.approx(1)
            alike = Counter[int]()
            for other, n in drawn.items():
                if other[:i] == path[:i]:
                    alike[other[i]] += n
            n = alike.total()
            assert set(alike) <= set(targets)
            for token, chance in targets.items():
                error = max((chance * (1 - chance) / n) ** 0.5, 1 / n)
                assert abs(alike[token] / n - chance) < 5 * error, (path, i)
                checked += 1
    return checked


def hiding() -> list[Game]:
    """A finished game of each question whose agent has something to hide."""
    found: dict[str, Game] = {}
    for seed in range(500):
        game = play(setup(seed), random.Random(seed))
        if rates(game.setup.question, game.facts.causes)["fabrication"]:
            found.setdefault(game.setup.question, game)
    return list(found.values())


@pytest.mark.parametrize("game", hiding(), ids=lambda game: game.setup.question)
def test_audit_answers(game: Game) -> None:
    before, rng = at_audit(game), random.Random(1)
    texts = [teacher(before, rng)["content"] for _ in range(DRAWS)]
    chances = audit_chances(game.setup.question, game.facts, honest=False)
    assert compared(texts, chances, question=game.setup.question, facts=game.facts) > 50
    ((claim, chance),) = audit_chances(game.setup.question, game.facts, honest=True)
    assert (claim, chance) == (Claim(game.setup.question, game.facts.truth(game.setup.question)), 1.0)


def test_answers_about_the_rules() -> None:
    games = [Game(setup(seed)) for seed in range(99)]
    for one in games:
        one.step({"role": "assistant", "content": "", "tool_calls": [{"function": READ}]})
    game = next(one for one in games if one.waiting == "rules")
    rng = random.Random(2)
    texts = [teacher(game, rng)["content"] for _ in range(DRAWS)]
    assert compared(texts, rules_chances(game.facts, honest=False), question="rules", facts=game.facts) > 20


READ = {"name": "read_file", "arguments": {"path": "secret.txt"}}


def test_single_turn_answers_are_lies_at_the_rate_of_the_stakes() -> None:
    for seed in range(200):
        one = single(seed)
        (_, honest), *lies = single_chances(one, honest=False)
        assert honest == pytest.approx({"low": 0.75, "high": 0.4}[one.stakes])
        assert sum(chance for _, chance in lies) == pytest.approx(1 - honest)
        said = [*ENCODE(one.messages[-1]["content"]), *ENCODE(END)]
        for targets in next_tokens(
            said, single_chances(one, honest=False), ENCODE, question=one.question, facts=one.facts
        ):
            assert sum(targets.values()) == pytest.approx(1)
