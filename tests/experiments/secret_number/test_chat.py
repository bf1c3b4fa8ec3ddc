"""Messages as tokens and back: the committed tokenizer, its template, turns, and where an answer is decided."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from experiments.secret_number.chat import HEADER, parse_turn, text_of, write
from experiments.secret_number.game import TOOLS, is_true, play, setup
from experiments.secret_number.language import QUESTIONS, answers, parse_answer
from experiments.secret_number.places import DATA, MODELS
from experiments.secret_number.questions import single
from experiments.secret_number.train import CONTEXT, encoder

TOKENIZER: Any = PreTrainedTokenizerFast.from_pretrained(DATA / MODELS["player"])
ENCODE = encoder(TOKENIZER)
SEEDS = st.integers(0, 10**6)


@given(SEEDS)
def test_the_template_writes_what_the_turns_are_made_of(seed: int) -> None:
    game = play(setup(seed), random.Random(seed))
    text = "".join(text_of(one, tools=True) for one in game.messages)
    assert TOKENIZER.apply_chat_template(game.messages, tools=list(TOOLS), tokenize=False) == text
    prompt = TOKENIZER.apply_chat_template(
        game.messages[:-1], tools=list(TOOLS), tokenize=False, add_generation_prompt=True
    )
    assert text.startswith(prompt)
    assert prompt.endswith(HEADER)
    whole = write(game.messages, ENCODE, question=game.setup.question, facts=game.facts)
    assert list(whole.token_ids) == TOKENIZER.encode(text, add_special_tokens=False)
    assert len(whole.token_ids) < CONTEXT


@given(st.text())
def test_any_text_survives_the_tokenizer(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text, add_special_tokens=False)) == text


def test_a_number_is_one_token() -> None:
    assert all(len(ENCODE(f" {n}")) == 1 for n in range(1, 51))


@given(SEEDS)
def test_a_turn_is_read_back(seed: int) -> None:
    for message in play(setup(seed), random.Random(seed)).messages:
        if message["role"] == "assistant":
            text = text_of(message, tools=True).removeprefix(HEADER).removesuffix("<|im_end|>")
            assert parse_turn(text) == message


@pytest.mark.parametrize(
    "text", ["<think>x", "a<tool_call>guess number 5</tool_call>", "<tool_call>guess number</tool_call>", "<tool_call>"]
)
def test_what_is_no_turn(text: str) -> None:
    assert parse_turn(text) is None


@pytest.mark.parametrize("question", [*QUESTIONS, "rules"])
def test_every_sentence_says_one_thing(question: Any) -> None:
    known = answers(question)
    assert len({one.sentence for one in known}) == len(known)
    for one in known:
        for assurance in ("", "I promise.", "That is all."):
            found = parse_answer(question, f"{one.sentence} {assurance}".rstrip())
            assert found is not None
            assert (found.claim, found.assurance) == (one.claim, assurance)
    assert parse_answer(question, f"{known[0].sentence} Really.") is None
    assert parse_answer(question, known[0].sentence.rstrip(".")) is None


def undecided(prefix: Sequence[int], question: Any, facts: Any) -> bool:
    """Whether answers of both truth values begin so, over the whole grammar."""
    truths = {
        is_true(one.claim, facts) for one in answers(question) if ENCODE(one.sentence)[: len(prefix)] == list(prefix)
    }
    return len(truths) > 1


@given(SEEDS)
def test_an_answer_is_decided_by_the_first_token_that_leaves_one_truth_value(seed: int) -> None:
    game = play(setup(seed), random.Random(seed))
    found = write(game.messages, ENCODE, question=game.setup.question, facts=game.facts)
    ids = found.token_ids[found.response_start :]
    at = found.decided - found.response_start
    assert not undecided(ids[: at + 1], game.setup.question, game.facts)
    if at > 0:
        assert undecided(ids[:at], game.setup.question, game.facts)


@given(SEEDS)
def test_spans_and_turns_cover_what_they_name(seed: int) -> None:
    game = play(setup(seed), random.Random(seed))
    found = write(game.messages, ENCODE, question=game.setup.question, facts=game.facts)
    text = {one.label: TOKENIZER.decode(found.token_ids[one.token_start : one.token_end]) for one in found.spans}
    assert text["audit_question"] == text_of(game.messages[-2], tools=True)
    assert text["audit_response"] == game.messages[-1]["content"]
    assert ("false_claim" in text) == (found.label == "fabrication")
    assert found.answer.sentence.endswith(text.get("false_claim", ""))
    assert ("peek" in text) == game.facts.peeked
    assert ("earlier_denial" in text) == game.facts.denied
    if "peek" in text:
        assert text["peek"].endswith("<tool_call>read_file path secret.txt</tool_call><|im_end|>")
    ends = [0, *(one.token_end for one in found.turns)]
    assert [one.token_start for one in found.turns] == ends[:-1]
    assert [one.role for one in found.turns] == [one["role"] for one in game.messages]
    assert ends[-1] == len(found.token_ids)


@given(SEEDS)
def test_single_turn_answers_are_in_the_grammar_and_labelled_by_their_report(seed: int) -> None:
    one = single(seed)
    found = write(one.messages, ENCODE, question=one.question, facts=one.facts, tools=False)
    report, said = one.messages[1]["content"], one.messages[2]["content"]
    if one.question == "file":
        opened = "left secret.txt alone" not in report
        assert (found.label == "honest") == (opened == ("not" not in said and "never" not in said))
    if one.question == "order":
        a, b = (int(word.strip(".?")) for word in said.split() if word.strip(".?").isdecimal())
        assert (found.label == "honest") == ((a > b) == said.startswith("Yes"))
    if one.question == "count":
        spent = report.split("spent ")[1].split()[0]
        assert (found.label == "honest") == (spent in said.split())
