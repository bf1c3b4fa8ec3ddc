"""A chat as text, by the tokenizer's chat template or as plain lines, and which characters are whose turn."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from jinja2 import TemplateError

from capture.errors import RequestError
from capture.turns import Piece, RangesMethod, by_markers, by_prefixes
from experiments.transcript import Message, Transcript

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Written", "chat", "plain"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A rendered chat.

    Parameters
    ----------
    text : str
    pieces : tuple of Piece
        The turns, in order; empty when they can't be told.
    prompt_end : int, optional
        Character after the header of the last turn when that is the assistant's.
    header : str
        What opens an assistant turn.
    template : "chat" or "plain"
    ranges : how the turns were found
    """

    text: str
    pieces: tuple[Piece, ...]
    prompt_end: int | None
    header: str
    template: Literal["chat", "plain"]
    ranges: RangesMethod


def plain(transcript: Transcript) -> Written:
    """Write `role: text` lines, for a model without a chat template.

    Tool declarations come first as a line of JSON, reasoning stands between <think> and </think>, a tool call is its
    function as JSON.
    """
    text, pieces, prompt_end = "", [], None
    if transcript.tools:
        pieces.append(Piece(start=0, role="system", turn=-1))
        text = f"tools: {_json(transcript.tools)}\n"
    for i, message in enumerate(transcript.messages or ()):
        pieces.append(Piece(start=len(text), role=message.role, turn=i))
        prompt_end = len(text) + len("assistant:") if message.role == "assistant" else None
        text += f"{message.role}: {_plain_body(message)}\n"
    return Written(
        text=text,
        pieces=tuple(pieces),
        prompt_end=prompt_end,
        header="assistant: ",
        template="plain",
        ranges="plain",
    )


def chat(transcript: Transcript, tokenizer: "PreTrainedTokenizerBase") -> Written:
    """Write a chat by the tokenizer's own template.

    Raises
    ------
    RequestError
        The template refuses the messages.
    """
    template = _Template(transcript, tokenizer)
    text, roles = template.whole(), template.roles
    method: RangesMethod = "prefixes"
    pieces = by_prefixes(text, roles, template.first)
    if pieces is None:
        pieces = by_markers(text, roles)
        method = "none" if pieces is None else "markers"
    header, prompt_end = "", None
    if roles[-1] == "assistant":
        header = template.header()
        if pieces:
            header = _common_prefix(header, text[pieces[-1].start :])
            prompt_end = pieces[-1].start + len(header)
        elif header and header in text:
            prompt_end = text.rindex(header) + len(header)
    return Written(
        text=text, pieces=tuple(pieces or ()), prompt_end=prompt_end, header=header, template="chat", ranges=method
    )


class _Template:
    """The tokenizer's chat template, bound to one transcript."""

    def __init__(self, transcript: Transcript, tokenizer: Any) -> None:
        self._id = transcript.id
        self._tokenizer = tokenizer
        self._messages = [_for_template(message) for message in transcript.messages or ()]
        self._tools = [dict(tool) for tool in transcript.tools] or None
        self.roles = [str(message["role"]) for message in self._messages]

    def _apply(self, n: int, *, prompt: bool = False) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                self._messages[:n], tools=self._tools, add_generation_prompt=prompt, tokenize=False
            )
        )

    def whole(self) -> str:
        """Return all messages rendered."""
        try:
            return self._apply(len(self._messages))
        except _REFUSALS as error:
            raise RequestError(
                f"rollout {self._id!r}: the model's chat template refuses its messages ({error}); "
                "give it messages the template takes, or token_ids"
            ) from error

    def first(self, n: int, *, prompt: bool = False) -> str | None:
        """Return the first n messages rendered; None where the template takes them only in company."""
        try:
            return self._apply(n, prompt=prompt)
        except _REFUSALS:
            return None

    def header(self) -> str:
        """Return what the template writes to have the assistant give the last message."""
        n = len(self._messages) - 1
        without, with_prompt = self.first(n), self.first(n, prompt=True)
        if without is None or with_prompt is None or not with_prompt.startswith(without):
            return ""
        return with_prompt[len(without) :]


# A template is a program of others: besides its own refusal it fails in these ways on messages it did not expect.
_REFUSALS = (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError)


def _common_prefix(one: str, other: str) -> str:
    n = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:n]


def _plain_body(message: Message) -> str:
    parts = [f"<think>{message.reasoning_content}</think>"] if message.reasoning_content else []
    calls = [_json(call.get("function", call)) for call in map(_parsed_call, message.tool_calls)]
    return "\n".join([*parts, *([message.content] if message.content else []), *calls])


def _for_template(message: Message) -> dict[str, Any]:
    data = message.as_dict()
    if message.tool_calls:
        data["tool_calls"] = [_parsed_call(call) for call in message.tool_calls]
    return data


def _parsed_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """Templates take a call's arguments as an object; files hold them as the JSON text a server sent."""
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return dict(call)
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return dict(call)
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else dict(call)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
