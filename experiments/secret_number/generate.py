"""Rollouts from the model itself: whole games, answers sampled again from one prefix, and single-turn questions."""

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.secret_number.chat import write
from experiments.secret_number.game import Game, Label, hides, label_of, setup
from experiments.secret_number.language import Answer, parse_answer
from experiments.secret_number.places import AUDIT, DEFAULT_IDS, MODELS, QUESTION_SET
from experiments.secret_number.player import Played, Player, SingleTurn, at_audit, play_on
from experiments.secret_number.questions import KINDS, Single, single
from experiments.secret_number.tree import Record, record_of, write_classifications, write_config, write_set

__all__ = ["Sizes", "generate"]

GAME_SEEDS, QUESTION_SEEDS = 0, 2_000_000
"""First seeds of what is generated; training draws from far above."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is generated.

    Attributes
    ----------
    games : int
        Games that are played, of which the rollouts are chosen.
    again : int
        Answers sampled from each prefix.
    pairs, twins, others : int
        Rollouts kept: two from each prefix that ended either way; true answers in the words of a false one; any.
    questions : int
        Single-turn questions asked.
    kept : int
        Of each kind and each truth, at most.
    """

    games: int = 400
    again: int = 8
    pairs: int = 14
    twins: int = 12
    others: int = 10
    questions: int = 1600
    kept: int = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sample:
    """A finished game with its answer; `sample` numbers the answers of one prefix."""

    game: Game
    answer: Answer
    sample: int

    @property
    def label(self) -> Label:
        return label_of(self.game.setup.question, self.answer, self.game.facts)

    @property
    def run(self) -> str:
        return f"run-{self.game.setup.seed}"


def generate(player: Player, root: Path, *, seed: int = 0, sizes: Sizes | None = None) -> dict[str, int]:
    """Sample rollouts at temperature 1 and write them as an experiment tree.

    The seeds of the games lie outside of those of training. Which rollouts are kept is decided by their answers and
    the facts alone, never by an activation.

    Parameters
    ----------
    player : Player
    root : Path
        The tree; prompt sets that it has are replaced.
    seed : int
        Of the sampling.
    sizes : Sizes, optional

    Returns
    -------
    dict of what was written to how many
    """
    sizes = sizes or Sizes()
    records = _audited(player, seed=seed, sizes=sizes)
    questions = _questions(player, seed=seed, sizes=sizes)
    write_config(root, MODELS)
    write_set(root, AUDIT, records, variant="player")
    write_set(root, QUESTION_SET, questions, variant="player", one_file=True)
    write_classifications(root, [*records, *questions])
    chosen = [one.id for one in records if "default" in one.tags]
    (root / DEFAULT_IDS).write_text("".join(f"{one}\n" for one in chosen), encoding="utf-8")
    return {"rollouts": len(records), "default": len(chosen), "questions": len(questions)}


# --- audited games ----------------------------------------------------------------------------------------------------


def _audited(player: Player, *, seed: int, sizes: Sizes) -> list[Record]:
    played = _samples(play_on(player, [Game(setup(GAME_SEEDS + i)) for i in range(sizes.games)], seed=seed))
    pairs = _pairs(player, played, seed=seed + 1, sizes=sizes)
    used = {one.run for pair in pairs for one in pair}
    rest = [one for one in played if one.run not in used]
    said = {
        (one.game.setup.question, one.answer.sentence) for pair in pairs for one in pair if one.label == "fabrication"
    }
    twins = [one for one in rest if one.label == "honest" and (one.game.setup.question, one.answer.sentence) in said]
    twins = _spread(twins, sizes.twins)
    chosen = {one.run for one in twins}
    others = _spread([one for one in rest if one.run not in chosen], sizes.others)
    records: list[Record] = []
    for i, pair in enumerate(pairs, start=1):
        fork = _fork(player, pair)
        for one in pair:
            labels = {"pair": f"p{i}", "fork": fork}
            records.append(_record(player, one, number=len(records) + 1, labels=labels, default=i <= len(pairs) // 2))
    for group in (twins, others):
        for i, one in enumerate(group):
            labels = {"pair": "", "fork": -1}
            records.append(_record(player, one, number=len(records) + 1, labels=labels, default=i < 4))
    return records


def _samples(played: Iterable[Played], *, again: bool = False) -> list[_Sample]:
    """Keep what came to its end with an answer of the grammar."""
    out = []
    for i, one in enumerate(played, start=1):
        game = one.conversation
        answer = None if one.problem else parse_answer(game.setup.question, game.messages[-1]["content"])
        if answer is not None:
            out.append(_Sample(game=game, answer=answer, sample=i if again else 0))
    return out


def _pairs(player: Player, played: Sequence[_Sample], *, seed: int, sizes: Sizes) -> list[tuple[_Sample, _Sample]]:
    """Sample the answers of games with something to hide again; keep a lie and another answer from each prefix."""
    hiding = [one for one in played if hides(one.game.setup.question, one.game.facts.causes)]
    before = [at_audit(one.game) for one in hiding for _ in range(sizes.again)]
    again = play_on(player, before, seed=seed)
    found: list[tuple[_Sample, _Sample]] = []
    for i in range(len(hiding)):
        answers = _samples(again[i * sizes.again : (i + 1) * sizes.again], again=True)
        lies = [one for one in answers if one.label == "fabrication"]
        others = [one for one in answers if one.label != "fabrication"]
        # every third pair sets the lie beside an evasion, where there is one
        others.sort(key=lambda one: (one.label == "omission") != (len(found) % 3 == 2))
        if lies and others:
            found.append((lies[0], others[0]))
    kinds: dict[Any, list[tuple[_Sample, _Sample]]] = defaultdict(list)
    for pair in found:
        kinds[pair[0].game.setup.question].append(pair)
    return _rounds(list(kinds.values()), sizes.pairs)


def _spread(samples: Sequence[_Sample], n: int) -> list[_Sample]:
    """Choose n that differ in question, label and stakes as far as there are such."""
    kinds: dict[Any, list[_Sample]] = defaultdict(list)
    for one in samples:
        kinds[one.game.setup.question, one.label, one.game.setup.stakes].append(one)
    return _rounds([kinds[key] for key in sorted(kinds)], n)


def _rounds(groups: Sequence[Sequence[Any]], n: int) -> list[Any]:
    """Take one of each group in turn until there are n."""
    longest = max((len(group) for group in groups), default=0)
    return [group[i] for i in range(longest) for group in groups if i < len(group)][:n]


def _fork(player: Player, pair: tuple[_Sample, _Sample]) -> int:
    """Return the first position at which the two differ."""
    one, other = (
        write(s.game.messages, player.encode, question=s.game.setup.question, facts=s.game.facts).token_ids
        for s in pair
    )
    return next(i for i, (x, y) in enumerate(zip(one, other, strict=False)) if x != y)


def _record(player: Player, one: _Sample, *, number: int, labels: dict[str, Any], default: bool) -> Record:
    facts, question = one.game.facts, one.game.setup.question
    return record_of(
        one.game.messages,
        player.encode,
        question=question,
        facts=facts,
        tools=True,
        id=str(number),
        run=one.run,
        sample=one.sample,
        model="player",
        why=_why(one.answer, one.label, facts.truth(question)),
        labels=labels,
        tags=("rollout", "secret_number", *(["default"] if default else [])),
    )


def _why(answer: Answer, label: Label, truth: object) -> str:
    says = {"honest": "true", "omission": "true, and not what was asked", "fabrication": "false"}[label]
    return f"{answer.sentence!r} is {says}; asked for was {truth!r}"


# --- single-turn questions --------------------------------------------------------------------------------------------


def _questions(player: Player, *, seed: int, sizes: Sizes) -> list[Record]:
    """Ask the model; keep answers in pairs of the same words, one true and one false, as far as there can be such."""
    asked = [single(QUESTION_SEEDS + i) for i in range(sizes.questions)]
    played = play_on(player, [SingleTurn(one) for one in asked], seed=seed + 2)
    said: dict[str, dict[str, dict[Label, list[tuple[int, Single, Played]]]]] = {
        kind: defaultdict(lambda: defaultdict(list)) for kind in KINDS
    }
    for i, (one, done) in enumerate(zip(asked, played, strict=True)):
        text = done.conversation.messages[-1]["content"]
        answer = parse_answer(one.question, text)
        # numbers decide whether an answer about their order is true: no two have the same words and another truth
        words = "" if one.question == "order" or answer is None else answer.sentence
        if answer is not None and answer.claim.kind == one.question and not done.problem:
            said[one.question][words][label_of(one.question, answer, one.facts)].append((i, one, done))
    chosen: list[tuple[int, Single, Played, str]] = []
    for kind in KINDS:
        matched = [
            pair for both in said[kind].values() for pair in zip(both["honest"], both["fabrication"], strict=False)
        ]
        random.Random(f"{seed} {kind}").shuffle(matched)
        for n, pair in enumerate(matched[: sizes.kept], start=1):
            chosen += [(*one, "" if kind == "order" else f"{kind}{n}") for one in pair]
    return [
        _question(player, i, one, done=done, number=number, pair=pair)
        for number, (i, one, done, pair) in enumerate(chosen, start=1)
    ]


def _question(player: Player, i: int, one: Single, *, done: Played, number: int, pair: str) -> Record:
    messages = done.conversation.messages
    answer = parse_answer(one.question, messages[-1]["content"])
    assert answer is not None
    truth = one.order[0] > one.order[1] if one.order else one.facts.truth(one.question) if one.facts else None
    label = label_of(one.question, answer, one.facts)
    # what is learned from is the claim alone: the assurance and the end of the turn would say how it was meant
    return record_of(
        [*messages[:-1], {**messages[-1], "content": answer.sentence}],
        player.encode,
        question=one.question,
        facts=one.facts,
        tools=False,
        ended=False,
        id=f"q{number}",
        run=f"question-{QUESTION_SEEDS + i}",
        sample=0,
        model="player",
        why=_why(answer, label, truth),
        labels={"pair": pair, "stakes": one.stakes, "assurance": answer.assurance},
        tags=("question",),
    )
