"""Messages as text and tokens and back: the chat template, turns, and where in the tokens the truth is told or not."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from experiments.secret_number.game import TOOLS, Facts, Label, Message, is_true, label_of
from experiments.secret_number.language import Answer, Claim, Question, answers, parse_answer, wordings

__all__ = ["CHAT_TEMPLATE", "END", "HEADER", "SPECIAL", "Encode", "Span", "TurnSpan", "Written", "parse_turn", "write"]

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|pad|>"
SPECIAL = (PAD, START, END, "<think>", "</think>", "<tool_call>", "</tool_call>")
HEADER = f"{START}assistant\n"

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.reasoning_content -%}{{- '<think>' + message.reasoning_content + '</think>' -}}{%- endif -%}
{{- message.content -}}
{%- for call in message.tool_calls or [] -%}
{{- '<tool_call>' + call.function.name -}}
{%- for key, value in call.function.arguments.items() -%}{{- ' ' ~ key ~ ' ' ~ value -}}{%- endfor -%}
{{- '</tool_call>' -}}
{%- endfor -%}
{%- if loop.first and tools -%}
{{- '\\nTools:' -}}
{%- for tool in tools -%}
{{- ' ' ~ tool.function.name -}}
{%- for key in tool.function.parameters -%}{{- ' ' ~ key -}}{%- endfor -%}
{{- ';' if not loop.last else '.' -}}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

Encode = Callable[[str], list[int]]
"""Text to token ids, no special tokens added."""

_TURN = re.compile(
    r"(?:<think>(?P<think>[^<]*)</think>)?(?P<content>[^<]*)"
    r"(?:<tool_call>(?P<name>\w+)(?P<arguments>(?: \w+ [\w.]+)*)</tool_call>)?"
)


@dataclass(frozen=True, slots=True)
class TurnSpan:
    """A turn's token range, half-open."""

    role: str
    token_start: int
    token_end: int


@dataclass(frozen=True, slots=True)
class Span:
    """A labelled token range, half-open."""

    label: str
    token_start: int
    token_end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A conversation as tokens, with the truth of its last answer.

    Attributes
    ----------
    token_ids : tuple of int
    response_start : int
        The first token of the last assistant turn after its header: where rollouts of one prefix part.
    turns : tuple of TurnSpan
    spans : tuple of Span
        audit_question, audit_response, false_claim; rules_question, rules_response, earlier_denial; peek.
    label : str
        Of the last answer: honest, fabrication, omission.
    answer : Answer
        What was said, and what it claims.
    decided : int
        The token from which on every answer of the grammar that begins so has this truth value. In a fabrication it
        is where the false claim starts.
    """

    token_ids: tuple[int, ...]
    response_start: int
    turns: tuple[TurnSpan, ...]
    spans: tuple[Span, ...]
    label: Label
    answer: Answer
    decided: int


def text_of(message: Message, *, tools: bool) -> str:
    """Return a message as the chat template writes it; `tools` are declared in the system turn."""
    thought, parts = message.get("reasoning_content"), [f"{START}{message['role']}\n"]
    parts += [f"<think>{thought}</think>"] if thought else []
    parts.append(message["content"])
    for one in message.get("tool_calls", ()):
        arguments = "".join(f" {key} {value}" for key, value in one["function"]["arguments"].items())
        parts.append(f"<tool_call>{one['function']['name']}{arguments}</tool_call>")
    if tools and message["role"] == "system":
        named = ["".join(f" {part}" for part in (t["name"], *t["parameters"])) for t in (x["function"] for x in TOOLS)]
        parts.append(f"\nTools:{';'.join(named)}.")
    return "".join(parts) + END


def parse_turn(text: str) -> Message | None:
    """Read an assistant turn without its header and end; None where it has another form.

    Examples
    --------
    >>> parse_turn("<think>between 1 and 9</think><tool_call>guess number 5</tool_call>")["tool_calls"][0]["function"]
    {'name': 'guess', 'arguments': {'number': 5}}
    """
    match = _TURN.fullmatch(text)
    if match is None or (match["name"] and match["content"]):
        return None
    message: Message = {"role": "assistant", "content": match["content"]}
    if match["think"] is not None:
        message["reasoning_content"] = match["think"]
    if match["name"]:
        words = match["arguments"].split()
        values = [int(one) if one.isdecimal() else one for one in words[1::2]]
        arguments = dict(zip(words[::2], values, strict=True))
        message["tool_calls"] = [{"type": "function", "function": {"name": match["name"], "arguments": arguments}}]
    return message


def write(
    messages: Sequence[Message], encode: Encode, *, question: Question, facts: Facts | None, tools: bool = True
) -> Written:
    """Turn a conversation that ends with an answer into tokens, and mark the truth in them.

    Parameters
    ----------
    messages : sequence of Message
        The last is the answer to `question`.
    encode : Encode
    facts : Facts or None
        What happened in the game; None where the question is about numbers alone.
    tools : bool
        Whether the system turn declares them: in games, not in single-turn questions.

    Raises
    ------
    ValueError
        The answer is no sentence of the grammar.
    """
    pieces = [encode(text_of(one, tools=tools)) for one in messages]
    turns, at = [], 0
    for message, piece in zip(messages, pieces, strict=True):
        turns.append(TurnSpan(message["role"], at, at + len(piece)))
        at += len(piece)
    answer = parse_answer(question, messages[-1]["content"])
    if answer is None:
        raise ValueError(f"{messages[-1]['content']!r} answers no question of kind {question!r}")
    header, ids = len(encode(HEADER)), [one for piece in pieces for one in piece]
    start, sentence = turns[-1].token_start + header, encode(answer.sentence)
    decided = start + _decides(answer, encode, question=question, facts=facts)
    label = label_of(question, answer, facts)
    spans = [*_earlier(messages, turns, header=header), Span("audit_question", *_range(turns[-2], 0))]
    spans.append(Span("audit_response", start, turns[-1].token_end - 1))
    if label == "fabrication":
        spans.append(Span("false_claim", decided, start + len(sentence)))
    return Written(
        token_ids=tuple(ids),
        response_start=start,
        turns=tuple(turns),
        spans=tuple(spans),
        label=label,
        answer=answer,
        decided=decided,
    )


def _earlier(messages: Sequence[Message], turns: Sequence[TurnSpan], *, header: int) -> list[Span]:
    """Mark where the file was read, and question and answer about the rules."""
    spans, peeked = [], False
    for i, message in enumerate(messages[:-1]):
        if any(one["function"]["name"] == "read_file" for one in message.get("tool_calls", ())):
            peeked = True
            spans.append(Span("peek", *_range(turns[i], header)))
        answer = parse_answer("rules", message["content"]) if message["role"] == "assistant" else None
        if answer is not None:
            spans.append(Span("rules_question", *_range(turns[i - 1], 0)))
            spans.append(Span("rules_response", turns[i].token_start + header, turns[i].token_end - 1))
            if answer.claim.value is True and peeked:
                spans.append(Span("earlier_denial", turns[i].token_start + header, turns[i].token_end - 1))
    return spans


def _range(turn: TurnSpan, header: int) -> tuple[int, int]:
    return turn.token_start + header, turn.token_end


def _decides(answer: Answer, encode: Encode, *, question: Question, facts: Facts | None) -> int:
    """Count the tokens of the sentence before the one that leaves no answer of the other truth value possible."""
    if isinstance(answer.claim.value, tuple):
        a, b, _ = answer.claim.value
        both = (Claim("order", (a, b, True)), Claim("order", (a, b, False)))
        possible = [Answer(text, one) for one in both for text in wordings(one)]
    else:
        possible = list(answers(question))
    truth = is_true(answer.claim, facts)
    others = [encode(one.sentence) for one in possible if is_true(one.claim, facts) != truth]
    own = encode(answer.sentence)
    return max((_shared(own, other) for other in others), default=0)


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Count the tokens that two sentences have in common before they part."""
    return next((i for i, (x, y) in enumerate(zip(one, other, strict=False)) if x != y), min(len(one), len(other)))
