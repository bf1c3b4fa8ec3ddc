"""Transcripts as tokens: exact bytes, turns, reasoning, segments and annotations, on tokenizers of three kinds."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

import experiments
from capture.errors import RequestError
from capture.tokenbytes import _BYTE_OF_CHARACTER
from capture.tokens import Rendered, render, token_bytes
from datastore.schema import ROLES, Annotation
from experiments import Transcript
from tests.capture.stories import MODEL, ROLLOUTS

DATA = Path(__file__).parents[1] / "data"
KIMI = {k: v for k, v in json.loads((DATA / "kimi_k2" / "special_tokens.json").read_text()).items() if k[0] != "_"}

# Keeps reasoning only from the last assistant message without tool calls on: longer prefixes may render shorter.
REWRITING = """
{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}
  {%- if m.role == 'assistant' and not m.tool_calls -%}{%- set ns.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- if tools -%}<|im_system|>tool_declare<|im_middle|>{{ tools | tojson }}<|im_end|>{%- endif -%}
{%- for m in messages -%}
  {%- if m.role in ('user', 'assistant') -%}<|im_{{ m.role }}|>{{ m.role }}<|im_middle|>
  {%- else -%}<|im_system|>{{ m.name or m.role }}<|im_middle|>{%- endif -%}
  {%- if m.role == 'assistant' -%}
    <think>{% if loop.index0 >= ns.last %}{{ m.reasoning_content or '' }}{% endif %}</think>
  {%- endif -%}
  {{ m.content }}
  {%- for call in m.tool_calls or [] -%}
    <|tool_call_begin|>{{ call.function.arguments | tojson }}<|tool_call_end|>
  {%- endfor -%}
  <|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}
"""
CHATML = """
{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\\nBe good.<|im_end|>\\n' }}{% endif -%}
{%- for m in messages -%}
  {{ '<|im_start|>' + m.role + '\\n' }}
  {%- if m.reasoning_content %}{{ '<think>\\n' + m.reasoning_content + '\\n</think>\\n' }}{% endif -%}
  {{ m.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n\\n' }}{% endif -%}
"""
LINES = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


class ByteTokenizer(PreTrainedTokenizer):
    """A Python tokenizer of single bytes in the byte-level alphabet, with special tokens at the ids of Kimi K2."""

    def __init__(self, **kwargs: Any) -> None:
        self.byte_encoder = {b: c for c, b in _BYTE_OF_CHARACTER.items()}
        special = {i: AddedToken(t, special=True, normalized=False) for t, i in KIMI.items()}
        super().__init__(added_tokens_decoder=special, **kwargs)  # type: ignore[no-untyped-call]

    @property
    def vocab_size(self) -> int:
        return 256

    def get_vocab(self) -> dict[str, int]:
        return {**_BYTE_OF_CHARACTER, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return [self.byte_encoder[b] for b in text.encode()]

    def _convert_token_to_id(self, token: str) -> int:
        return _BYTE_OF_CHARACTER[token]

    def _convert_id_to_token(self, index: int) -> str | None:  # type: ignore[override]
        return self.byte_encoder.get(index)


@pytest.fixture(scope="module")
def stories() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def kimi() -> Any:
    tokenizer = ByteTokenizer()
    tokenizer.chat_template = REWRITING
    return tokenizer


def bpe(template: str | None, *, normalizer: Any = None) -> Any:
    """A byte-level BPE of the GPT-2 kind, with merges over spaces and line ends."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=sorted(_BYTE_OF_CHARACTER), special_tokens=["<s>"], show_progress=False
    )
    core.train_from_iterator(["user: hello there\nassistant: yes no system é世\n\n"] * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>")  # type: ignore[no-untyped-call]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def chatml() -> Any:
    return bpe(CHATML)


def chat(*messages: tuple[str, str] | dict[str, Any], **fields: Any) -> Transcript:
    listed = [m if isinstance(m, dict) else {"role": m[0], "content": m[1]} for m in messages]
    return Transcript.of({"id": "71", "messages": listed, **fields}, source="here")


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def texts(tokenizer: Any, found: Rendered, mask: Any) -> str:
    ids = found.rollout.token_ids[mask].tolist()
    table = token_bytes(tokenizer, ids)
    return b"".join(table[i] for i in ids).decode()


def expect_blocks(tokenizer: Any, found: Rendered, blocks: list[tuple[str, str, int]]) -> None:
    """The oracle: each block encoded alone (special tokens part them), end to end."""
    parts = [(ids_of(tokenizer, text), role, turn) for text, role, turn in blocks]
    assert found.rollout.token_ids.tolist() == [i for ids, _, _ in parts for i in ids]
    assert found.rollout.role is not None
    assert found.rollout.turn is not None
    assert [ROLES[r] for r in found.rollout.role] == [role for ids, role, _ in parts for _ in ids]
    assert found.rollout.turn.tolist() == [turn for ids, _, turn in parts for _ in ids]


# --- bytes -----------------------------------------------------------------------------------------------------------

words = st.text(st.characters(codec="utf-8", exclude_characters="\u2581<"), max_size=30)


@given(text=words)
def test_bytes_of_sentencepiece_tokens_are_the_text_after_one_space(stories: Any, text: str) -> None:
    ids = ids_of(stories, text)
    table = token_bytes(stories, ids)
    assert b"".join(table[i] for i in ids) == (b" " + text.encode() if text else b"")


@given(
    parts=st.lists(words | st.sampled_from(["<|im_start|>", "<think>", "</think>", "<s>", "<|im_end|>"]), max_size=6)
)
def test_bytes_of_byte_level_tokens_are_the_text(chatml: Any, parts: list[str]) -> None:
    text = "".join(parts)
    ids = ids_of(chatml, text)
    table = token_bytes(chatml, ids)
    assert b"".join(table[i] for i in ids) == text.encode()


def test_bytes_of_single_tokens(stories: Any, kimi: Any) -> None:
    table = token_bytes(stories, [1, 13, 0, 261, 13])
    assert table == {0: b"<unk>", 1: b"<s>", 13: b"\n", 261: b" a"}
    assert list(table) == [0, 1, 13, 261]
    assert token_bytes(stories, range(3, 259)) == {i: bytes([i - 3]) for i in range(3, 259)}
    assert token_bytes(kimi, [195, 163606, 163000]) == {195: b"\xc3", 163000: b"", 163606: b"<think>"}


def test_bytes_of_added_tokens_of_a_sentencepiece_vocabulary() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<a\u2581b>"]})
    tokenizer.add_tokens([AddedToken("\u2581\u2581", normalized=False)])
    assert token_bytes(tokenizer, [512, 513]) == {512: "<a\u2581b>".encode(), 513: b"  "}


def test_the_golden_text_is_read_back_without_the_tokenizer(stories: Any) -> None:
    golden = json.loads((DATA / "stories260K" / "golden.json").read_text())
    ids = golden["greedy_from_bos"][1:]
    table = token_bytes(stories, ids)
    assert b"".join(table[i] for i in ids).decode().strip() == golden["text_1"].strip()


# --- chats without a template ----------------------------------------------------------------------------------------


def test_plain_rendering(stories: Any) -> None:
    found = render(chat(("system", "be good"), ("user", "hi\nyou"), ("assistant", "yes 世")), stories, context=512)
    text = "system: be good\nuser: hi\nyou\nassistant: yes 世\n"
    assert found.rollout.token_ids.tolist() == [1, *ids_of(stories, text)]
    assert found.rollout.role is not None
    for turn, (role, expected) in enumerate(
        [("system", "<s> system: be good\n"), ("user", "user: hi\nyou\n"), ("assistant", "assistant: yes 世\n")]
    ):
        mask = found.rollout.turn == turn
        assert texts(stories, found, mask) == expected
        assert {ROLES[r] for r in found.rollout.role[mask]} == {role}
    assert texts(stories, found, found.rollout.segment == 1) == " yes 世\n"
    assert found.notes.as_dict() == {
        "template": "plain",
        "ranges": "plain",
        "truncated_from": None,
        "unmatched": [],
        "cut_annotations": 0,
    }


def test_plain_rendering_of_tools_and_reasoning(chatml: Any) -> None:
    plain = bpe(None)
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    found = render(
        chat(
            ("user", "hi"),
            {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "hm hm"},
            {"role": "tool", "content": "42", "name": "f"},
            tools=[{"name": "f"}],
        ),
        plain,
        context=None,
    )
    assert texts(plain, found, slice(None)) == (
        'tools: [{"name": "f"}]\nuser: hi\n'
        'assistant: <think>hm hm</think>\n{"name": "f", "arguments": {"a": 1}}\ntool: 42\n'
    )
    assert texts(plain, found, found.rollout.turn == -1) == 'tools: [{"name": "f"}]\n'
    assert texts(plain, found, found.rollout.thinking) == "hm hm"
    assert found.rollout.prompt_end == found.rollout.n_tokens  # it does not end with an assistant turn


# --- chat templates --------------------------------------------------------------------------------------------------

CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": "b"}'}}
AGENT = (
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "x", "reasoning_content": "gone", "tool_calls": [CALL]},
    {"role": "tool", "name": "f", "content": "42"},
    {"role": "assistant", "content": "done", "reasoning_content": "kept"},
)


def test_a_template_that_rewrites_earlier_reasoning_falls_to_markers(kimi: Any) -> None:
    # The premise: a longer prefix of messages renders to fewer tokens of the same turns.
    listed = [dict(m) for m in AGENT]
    assert not kimi.apply_chat_template(listed, tokenize=False).startswith(
        kimi.apply_chat_template(listed[:2], tokenize=False)
    )
    found = render(chat(*AGENT), kimi, context=None)
    blocks = [
        ("<|im_user|>user<|im_middle|>hi<|im_end|>", "user", 0),
        (
            "<|im_assistant|>assistant<|im_middle|><think></think>x"
            '<|tool_call_begin|>{"a": "b"}<|tool_call_end|><|im_end|>',
            "assistant",
            1,
        ),
        ("<|im_system|>f<|im_middle|>42<|im_end|>", "tool", 2),
        ("<|im_assistant|>assistant<|im_middle|><think>kept</think>done<|im_end|>", "assistant", 3),
    ]
    expect_blocks(kimi, found, blocks)
    assert found.notes.ranges == "markers"
    assert texts(kimi, found, found.rollout.thinking) == "kept"
    assert texts(kimi, found, found.rollout.segment == 1) == "<think>kept</think>done<|im_end|>"
    declared = render(chat(*AGENT, tools=[{"a": 1}]), kimi, context=None)
    leading = ('<|im_system|>tool_declare<|im_middle|>[{"a": 1}]<|im_end|>', "system", -1)
    expect_blocks(kimi, declared, [leading, *blocks])


def test_a_monotonic_template_goes_by_prefixes(chatml: Any) -> None:
    messages = (("user", "hello there"), ("assistant", "yes"), ("user", "é\n"), AGENT[3])
    found = render(chat(*messages), chatml, context=None)
    blocks = [
        ("<|im_start|>system\nBe good.<|im_end|>\n", "system", -1),
        ("<|im_start|>user\nhello there<|im_end|>\n", "user", 0),
        ("<|im_start|>assistant\nyes<|im_end|>\n", "assistant", 1),
        ("<|im_start|>user\né\n<|im_end|>\n", "user", 2),
        ("<|im_start|>assistant\n<think>\nkept\n</think>\ndone<|im_end|>\n", "assistant", 3),
    ]
    expect_blocks(chatml, found, blocks)
    assert found.notes.ranges == "prefixes"
    assert texts(chatml, found, found.rollout.thinking) == "\nkept\n"
    # The header ends where the generation prompt and the turn part.
    assert texts(chatml, found, found.rollout.segment == 1) == "<think>\nkept\n</think>\ndone<|im_end|>\n"


def test_a_response_that_starts_unlike_the_generation_prompt_is_kept_whole(chatml: Any) -> None:
    found = render(chat(("user", "hi"), ("assistant", "q")), chatml, context=None)
    assert texts(chatml, found, found.rollout.segment == 1) == "q<|im_end|>\n"


def test_the_tokens_are_those_of_the_template_itself(chatml: Any, kimi: Any) -> None:
    for tokenizer in (chatml, kimi):
        listed = [{"role": "user", "content": "hi 世"}, {"role": "assistant", "content": "a  b"}]
        expected = tokenizer.apply_chat_template(listed, tokenize=True, return_dict=False)
        assert render(chat(*listed), tokenizer, context=None).rollout.token_ids.tolist() == expected


def test_turns_may_part_inside_a_line_of_merged_tokens() -> None:
    tokenizer = bpe(LINES)
    found = render(chat(("user", "hello"), ("assistant", "yes")), tokenizer, context=None)
    assert texts(tokenizer, found, found.rollout.turn == 0) == "user: hello\n"
    assert texts(tokenizer, found, found.rollout.turn == 1) == "assistant: yes\n"
    assert found.notes.ranges == "prefixes"


def test_a_rewriting_template_without_markers_has_no_turns_and_says_so() -> None:
    tokenizer = bpe("{{ messages | length }}: {% for m in messages %}{{ m.content }}{% endfor %}")
    found = render(chat(("user", "hello"), ("assistant", "yes")), tokenizer, context=None)
    assert found.notes.ranges == "none"
    assert set(found.rollout.turn.tolist() if found.rollout.turn is not None else []) == {-1}


def test_a_template_that_refuses_the_messages_is_named() -> None:
    tokenizer = bpe("{{ raise_exception('System role not supported') }}")
    with pytest.raises(RequestError, match=r"'71': .*refuses its messages \(System role not supported\)"):
        render(chat(("system", "a")), tokenizer, context=None)


# --- texts and stored tokens -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["once upon", "<s>once upon", ""])
def test_prompt_and_response_with_one_bos(stories: Any, prompt: str) -> None:
    one = Transcript.of({"id": "a", "prompt": prompt, "response": "a time"}, source="here")
    found = render(one, stories, context=512)
    expected = [1, *ids_of(stories, prompt.removeprefix("<s>"))]
    assert found.rollout.token_ids.tolist() == expected + ids_of(stories, "a time")
    assert found.rollout.prompt_end == len(expected)
    assert [ROLES[r] for r in np.asarray(found.rollout.role)] == ["none"] * len(expected) + ["assistant"] * (
        found.rollout.n_tokens - len(expected)
    )


def test_plain_text_is_all_prompt_and_gets_no_bos_that_the_tokenizer_does_not_add(chatml: Any) -> None:
    found = render(Transcript.of({"id": "a", "text": "hello <think>a</think> b"}, source="x"), chatml, context=None)
    assert found.rollout.token_ids.tolist() == ids_of(chatml, "hello <think>a</think> b")
    assert found.rollout.prompt_end == found.rollout.n_tokens
    assert texts(chatml, found, found.rollout.thinking) == "a"


def test_stored_tokens_are_the_truth(stories: Any) -> None:
    fields = {"id": "a", "prompt": "other text", "response": "x", "token_ids": [1, 1, 5, 6, 7], "prompt_end": 3}
    turns = [
        {"role": "user", "token_start": 1, "token_end": 3},
        {"role": "assistant", "token_start": 3, "token_end": 5, "thinking_start": 3, "thinking_end": 4},
    ]
    found = render(Transcript.of({**fields, "turns": turns}, source="x"), stories, context=None).rollout
    assert found.token_ids.tolist() == [1, 1, 5, 6, 7]
    assert found.segment.tolist() == [0, 0, 0, 1, 1]
    assert np.asarray(found.role).tolist() == [0, 2, 2, 3, 3]
    assert np.asarray(found.turn).tolist() == [-1, 0, 0, 1, 1]
    assert np.asarray(found.thinking).tolist() == [False, False, False, True, False]
    alone = render(Transcript.of({"id": "a", "token_ids": [4, 5]}, source="x"), stories, context=None).rollout
    assert alone.prompt_end == 2


def test_stored_tokens_without_turns_go_by_marker_tokens_not_by_their_text(kimi: Any) -> None:
    text = "<|im_user|>user<|im_middle|>hi<|im_end|><|im_assistant|>assistant<|im_middle|><think>a</think>b"
    ids = [*ids_of(kimi, text), *b"<|im_user|>"]  # the last spelled out byte by byte
    found = render(Transcript.of({"id": "a", "token_ids": ids}, source="x"), kimi, context=None)
    assert found.notes.ranges == "markers"
    assert KIMI["<|im_user|>"] == found.rollout.token_ids[0]
    assert set(np.asarray(found.rollout.turn).tolist()) == {0, 1}
    assert texts(kimi, found, found.rollout.turn == 0) == "<|im_user|>user<|im_middle|>hi<|im_end|>"
    assert set(np.asarray(found.rollout.role)[found.rollout.turn == 1].tolist()) == {ROLES.index("assistant")}
    assert texts(kimi, found, found.rollout.thinking) == "a"


# --- limits ----------------------------------------------------------------------------------------------------------


def test_longer_than_the_context_is_named_or_cut(stories: Any) -> None:
    one = Transcript.of(
        {
            "id": "long",
            "token_ids": list(range(3, 13)),
            "prompt_end": 4,
            "labels": {"reward": 1.0},
            "annotations": [
                {"token_start": 2, "token_end": 4, "label": "whole"},
                {"token_start": 4, "token_end": 9, "label": "cut"},
                {"token_start": 6, "token_end": 9, "label": "lost"},
            ],
        },
        source="x",
    )
    with pytest.raises(
        RequestError, match=r"'long' has 10 tokens and the model takes 6; .*--truncate to keep its first 6"
    ):
        render(one, stories, context=6)
    assert render(one, stories, context=10).notes.truncated_from is None
    found = render(one, stories, context=6, truncate=True)
    assert found.rollout.token_ids.tolist() == [3, 4, 5, 6, 7, 8]
    assert found.rollout.prompt_end == 4
    assert found.rollout.labels == {"reward": 1.0}
    assert found.rollout.annotations == (
        Annotation(token_start=2, token_end=4, label="whole"),
        Annotation(token_start=4, token_end=6, label="cut"),
    )
    assert (found.notes.truncated_from, found.notes.cut_annotations) == (10, 2)
    assert render(one, stories, context=3, truncate=True).rollout.prompt_end == 3


def test_ids_beyond_the_vocabulary(stories: Any) -> None:
    one = Transcript.of({"id": "odd", "token_ids": [1, 512]}, source="x")
    with pytest.raises(
        RequestError, match="'odd' has token id 512 at position 1, beyond the model's vocabulary of 512"
    ):
        render(one, stories, context=None)
    assert render(one, stories, context=None, vocab_size=513).rollout.n_tokens == 2


def test_no_tokens() -> None:
    stripping = bpe(None, normalizer=normalizers.Strip())
    one = Transcript.of({"id": "blank", "text": "  "}, source="a.jsonl, line 3")
    with pytest.raises(RequestError, match=r"'blank' \(a\.jsonl, line 3\) has 0 tokens"):
        render(one, stripping, context=None)


def test_annotated_text_is_found_in_the_response(stories: Any) -> None:
    spans = [{"span": "世 was", "label": "lie"}, {"span": "nowhere", "label": "x"}]
    one = Transcript.of(
        {"id": "a", "prompt": "世 was", "response": "then 世 was gone", "annotations": spans}, source="x"
    )
    found = render(one, stories, context=None)
    (span,) = found.rollout.annotations
    assert span.label == "lie"
    assert span.token_start >= found.rollout.prompt_end
    assert texts(stories, found, slice(span.token_start, span.token_end)) == "世 was"
    assert found.notes.unmatched == ("nowhere",)


def test_annotated_tokens_beyond_the_end(stories: Any) -> None:
    one = Transcript.of(
        {"id": "a", "text": "b", "annotations": [{"token_start": 0, "token_end": 99, "label": "z"}]}, source="x"
    )
    with pytest.raises(RequestError, match=r"annotation 'z' ends at token 99, beyond its \d tokens"):
        render(one, stories, context=None)


# --- real transcripts ------------------------------------------------------------------------------------------------


def test_the_short_rollouts_fit_the_small_model(stories: Any) -> None:
    found = [render(one, stories, context=512, vocab_size=512).rollout for one in experiments.read(ROLLOUTS)]
    assert len(found) == 8
    assert all(one.labels["cut"] is True and 0 < one.prompt_end < one.n_tokens for one in found)
    tasks = {one.labels["task_id"] for one in found}
    assert all({one.labels["reward"] for one in found if one.labels["task_id"] == task} == {0.0, 1.0} for task in tasks)


def test_the_short_rollouts_are_cuts_of_the_real_ones() -> None:
    real = {one.id: one for one in experiments.read(DATA / "rollouts")}
    for one in experiments.read(ROLLOUTS):
        whole = real[one.id]
        assert {k: v for k, v in one.labels.items() if k != "cut"} == whole.labels
        for message, original in zip(one.messages or (), whole.messages or (), strict=False):
            assert message.role == original.role
            assert original.content.startswith(message.content)
            assert message.tool_calls == original.tool_calls


def test_the_real_transcripts_whole(stories: Any, kimi: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for one in experiments.read(DATA / "rollouts"):
            found = render(one, stories, context=512, truncate=True)
            assert found.rollout.n_tokens == 512
            assert (found.notes.truncated_from or 0) > 4000
            messages = one.messages or ()
            turned = render(one, kimi, context=None)
            roles = np.asarray(turned.rollout.role)
            for i, message in enumerate(messages):
                mask = turned.rollout.turn == i
                assert message.content in texts(kimi, turned, mask)
                assert {ROLES[r] for r in roles[mask]} == {message.role}
    assert not caplog.records
