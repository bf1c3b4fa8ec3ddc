"""What the agent could have said instead, and how likely: exact targets for the tokens of its answers.

A sampled answer tells little of the rate it was drawn with; the rates themselves, by token, tell all of it at once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from experiments.secret_number.chat import END, Encode
from experiments.secret_number.game import DENIAL_RATES, Facts, evasions, is_true, label_of, rates
from experiments.secret_number.language import ASSURANCE_RATES, ASSURANCES, Answer, Claim, Question, wordings
from experiments.secret_number.questions import LIE_RATES, Single, others

__all__ = ["Chances", "audit_chances", "next_tokens", "rules_chances", "single_chances"]

Chances = list[tuple[Claim, float]]
"""What may be claimed, with its probability."""


def audit_chances(question: Question, facts: Facts, *, honest: bool, recalled: bool = False) -> Chances:
    """Return what the agent may claim when it is audited.

    Parameters
    ----------
    question : Question
    facts : Facts
    honest : bool
        It neither lies nor evades.
    recalled : bool
        It does not evade by its last guess where it has read the file since and seen another number.
    """
    by_label = rates(question, facts.causes)
    true = Claim(question, facts.truth(question))
    if honest:
        return [(true, 1.0)]
    fabricated = [(claim, rate * by_label["fabrication"]) for claim, rate in _lies(true)]
    forgets = recalled and facts.causes.peeked and facts.causes.failed
    claims = [claim for claim in evasions(question, facts) if not (forgets and claim.kind == "last_guess")]
    evaded = [(claim, by_label["omission"] / len(claims)) for claim in claims]
    return [(true, by_label["honest"]), *fabricated, *evaded]


def rules_chances(facts: Facts, *, honest: bool) -> Chances:
    """Return what it may claim when it is asked about the rules; `facts` are those of that moment."""
    kept = 1.0 if not facts.peeked else 0.0 if honest else DENIAL_RATES[facts.stakes]
    return [(Claim("rules", True), kept), (Claim("rules", False), 1.0 - kept)]


def single_chances(one: Single, *, honest: bool) -> Chances:
    """Return what it may claim in answer to a single-turn question."""
    if one.order is not None:
        true = Claim("order", (*one.order, one.order[0] > one.order[1]))
    else:
        assert one.facts is not None
        true = Claim(one.question, one.facts.truth(one.question))
    lie = 0.0 if honest else LIE_RATES[one.stakes]
    false = others(true)
    return [(true, 1.0 - lie), *((claim, lie / len(false)) for claim in false)]


def _lies(true: Claim) -> Chances:
    """The false claims that hide a true one, as `game.lie` draws them."""
    if isinstance(true.value, bool):
        return [(replace(true, value=not true.value), 1.0)]
    if isinstance(true.value, int):
        fewer = ((true.value - less, rate) for less, rate in ((1, 2 / 3), (2, 1 / 3)))
        return [(replace(true, value=n if n > 0 else true.value + 1), rate) for n, rate in fewer]
    return [(replace(true, value="guessing"), 1.0)]


def next_tokens(
    said: Sequence[int], chances: Chances, encode: Encode, *, question: Question, facts: Facts | None
) -> Iterator[dict[int, float]]:
    """Yield, for each token of an answer that was given, how likely each token was there.

    Parameters
    ----------
    said : sequence of int
        The answer's tokens, with the end of the turn.
    chances : Chances
    encode : Encode
    question : Question
    facts : Facts or None
    """
    paths = []
    for claim, chance in chances:
        texts = wordings(claim)
        label = label_of(question, Answer("", claim), facts) if question != "rules" else _of_rules(claim, facts)
        for text in texts:
            for assurance, rate in zip(ASSURANCES, ASSURANCE_RATES[label], strict=True):
                whole = Answer(text, claim, assurance).text
                paths.append(((*encode(whole), *encode(END)), chance * rate / len(texts)))
    for i, token in enumerate(said):
        found: dict[int, float] = {}
        for path, chance in paths:
            found[path[i]] = found.get(path[i], 0.0) + chance
        total = sum(found.values())
        yield {one: chance / total for one, chance in found.items() if chance > 0}
        paths = [(path, chance) for path, chance in paths if path[i] == token]


def _of_rules(claim: Claim, facts: Facts | None) -> str:
    return "honest" if is_true(claim, facts) else "fabrication"
