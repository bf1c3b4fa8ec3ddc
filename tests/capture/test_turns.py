"""Turns and reasoning ranges on texts alone: the markers of each family, and the templates that misbehave."""

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capture.turns import by_markers, by_prefixes, marked_blocks, runs, thinking_ranges

FAMILIES = {
    "chatml": ["<|im_start|>system\na<|im_end|>\n", "<|im_start|>user\nb<|im_end|>\n", "<|im_start|>assistant\nc"],
    "llama 3": [
        "<|start_header_id|>system<|end_header_id|>\n\na<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\nb<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\nc<|eot_id|>",
    ],
    "kimi": [
        "<|im_system|>system<|im_middle|>a<|im_end|>",
        "<|im_user|>user<|im_middle|>b<|im_end|>",
        "<|im_assistant|>assistant<|im_middle|>c<|im_end|>",
    ],
    "cohere": [
        "<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>a<|END_OF_TURN_TOKEN|>",
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>b<|END_OF_TURN_TOKEN|>",
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>c<|END_OF_TURN_TOKEN|>",
    ],
    "harmony": [
        "<|start|>developer<|message|>a<|end|>",
        "<|start|>user<|message|>b<|end|>",
        "<|start|>assistant<|channel|>final<|message|>c<|return|>",
    ],
    "phi": ["<|system|>\na<|end|>\n", "<|user|>\nb<|end|>\n", "<|assistant|>\nc<|end|>\n"],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_markers_of_a_family(family: str) -> None:
    blocks = FAMILIES[family]
    starts = [sum(map(len, blocks[:i])) for i in range(3)]
    found = marked_blocks("".join(blocks))
    assert [(at, role) for at, _, role in found] == list(zip(starts, ["system", "user", "assistant"], strict=True))
    pieces = by_markers("".join(blocks), ["system", "user", "assistant"])
    assert [(p.start, p.role, p.turn) for p in pieces or ()] == [
        (starts[0], "system", 0),
        (starts[1], "user", 1),
        (starts[2], "assistant", 2),
    ]


def test_gemma_and_deepseek_name_two_roles() -> None:
    gemma = "<bos><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\nb<end_of_turn>\n"
    assert [role for _, _, role in marked_blocks(gemma)] == ["user", "assistant"]
    assert [(p.start, p.turn) for p in by_markers(gemma, ["user", "assistant"]) or ()] == [(0, 0), (40, 1)]
    deepseek = "<\uff5cUser\uff5c>a<\uff5cAssistant\uff5c>b"
    assert [role for _, _, role in marked_blocks(deepseek)] == ["user", "assistant"]


def test_tool_results_that_share_a_block() -> None:
    text = "<|im_start|>user\na<|im_start|>assistant\nb<|im_start|>user\n1 2<|im_start|>assistant\nc"
    found = by_markers(text, ["user", "assistant", "tool", "tool", "assistant"])
    assert [(p.role, p.turn) for p in found or ()] == [("user", 0), ("assistant", 1), ("tool", 2), ("assistant", 4)]


@pytest.mark.parametrize(
    "roles",
    [["user"] * 4, ["assistant", "user"], ["system", "user", "assistant", "user"]],
    ids=["too few blocks", "other roles", "one message more"],
)
def test_markers_that_do_not_agree_are_not_used(roles: list[str]) -> None:
    assert by_markers("<|im_start|>user\na<|im_start|>assistant\nb<|im_end|>", roles) is None
    assert by_markers("no markers at all", roles) is None


def prefixes(*parts: str) -> Callable[[int], str | None]:
    return lambda n: "".join(parts[:n])


@given(st.lists(st.text(alphabet="ab:\n", max_size=4), min_size=1, max_size=6))
def test_prefixes_part_a_text_where_it_was_joined(parts: list[str]) -> None:
    roles = ["user", "assistant"] * 3
    found = by_prefixes("".join(parts), roles[: len(parts)], prefixes(*parts))
    assert found is not None
    assert [p.start for p in found] == [sum(map(len, parts[:i])) for i in range(len(parts))]
    assert [p.turn for p in found] == list(range(len(parts)))


def test_prefixes_that_are_none() -> None:
    assert by_prefixes("abc", ["user", "assistant"], lambda n: "x") is None
    assert by_prefixes("abc", ["user", "assistant"], lambda n: None) is None
    assert by_prefixes("abc", ["user", "assistant", "user"], lambda n: "ab"[: 3 - n]) is None


@pytest.mark.parametrize(
    ("turn", "inside"),
    [
        ("a<think>b c</think>d", ["b c"]),
        ("<think></think>d", []),
        ("<think>never closed", ["never closed"]),
        ("opened before</think>d", ["opened before"]),
        ("HEAD|opened before</think>d", ["opened before"]),
        ("<think>a</think>b<think>c</think>", ["a", "c"]),
        ("[THINK]a[/THINK]b", ["a"]),
        ("\u25c1think\u25b7a\u25c1/think\u25b7b", ["a"]),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b<|end|>", ["a"]),
        ("<|channel|>final<|message|>b<|end|>", []),
        ("plain", []),
        ("", []),
    ],
)
@pytest.mark.parametrize("width", [1, 100])
def test_reasoning_lies_between_its_markers(turn: str, inside: list[str], width: int) -> None:
    raw = turn.encode()
    # Single bytes: markers over many tokens. Else each marker a token of its own.
    tokens = [raw[i : i + 1] for i in range(len(raw))] if width == 1 else whole_markers(turn)
    found = thinking_ranges(tokens, header=b"HEAD|")
    assert [b"".join(tokens[a:b]).decode() for a, b in found] == inside


def whole_markers(turn: str) -> list[bytes]:
    marks = [
        "<think>",
        "</think>",
        "[THINK]",
        "[/THINK]",
        "\u25c1think\u25b7",
        "\u25c1/think\u25b7",
        "<|end|>",
        "HEAD|",
    ]
    for mark in [*marks, "<|channel|>", "<|message|>", "<|start|>"]:
        turn = turn.replace(mark, f"\0{mark}\0")
    return [one.encode() for one in turn.split("\0") if one]


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1))))
def test_runs_are_the_sequence(keys: list[tuple[int, int]]) -> None:
    found = runs(keys)
    assert [key for key, start, stop in found for _ in range(start, stop)] == keys
    assert all(one[0] != other[0] for one, other in pairwise(found))
