"""What one transcript is, whichever file it came from: messages, texts or token ids, and what is known of it."""

import math
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from experiments.annotations import TextSpan, TokenSpan
from experiments.errors import ExperimentError, step_by_step

__all__ = ["LabelValue", "Message", "Role", "Transcript", "Turn", "sentence"]

Role = Literal["system", "user", "assistant", "tool"]
LabelValue = str | int | float | bool

# Names other tools give to the four roles.
_ROLES = {
    "developer": "system",
    "human": "user",
    "ai": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "tool_call": "assistant",
    "function": "tool",
    "ipython": "tool",
    "tool_result": "tool",
}
# Columns the rollout table has already: a label of the same name could not be told from them.
_TABLE_COLUMNS = {"rollout_id", "token_start", "n_tokens", "prompt_end", "prompt_set", "batch", "sha256", "tags"}


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")


class Message(_Record):
    """One message of a chat, in the shape that chat templates take.

    `content` of text parts is joined; `reasoning` is read as `reasoning_content`; other keys are kept for the template.
    """

    role: Role
    content: str = ""
    reasoning_content: str | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        data = dict(data)
        if "reasoning" in data and "reasoning_content" not in data:
            data["reasoning_content"] = data.pop("reasoning")
        data["role"] = _role(data.get("role"))
        data["content"] = _text(data.get("content"))
        data["tool_calls"] = data.get("tool_calls") or ()
        return data

    def as_dict(self) -> dict[str, Any]:
        """Return it as chat templates take it, without the keys that are not set."""
        data = self.model_dump(exclude_none=True, exclude_defaults=True)
        return {**data, "role": self.role, "content": self.content}


class Turn(_Record):
    """Where one turn of a pre-tokenised transcript lies, half-open, from the first token of the whole.

    Files written from a store also give its number there, and all reasoning ranges where there are several.
    """

    role: Role | Literal["none"]
    token_start: int = Field(ge=0)
    token_end: int = Field(ge=0)
    thinking_start: int | None = None
    thinking_end: int | None = None
    turn: int | None = Field(default=None, ge=-1)
    thinking_ranges: tuple[tuple[int, int], ...] = ()

    @field_validator("role", mode="before")
    @classmethod
    def _known_role(cls, value: Any) -> Any:
        return _role(value)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.token_end < self.token_start:
            raise ValueError(f"turn ends at token {self.token_end}, before its start {self.token_start}")
        return self


class Transcript(BaseModel):
    """One transcript before it is tokens.

    It holds `token_ids` (then they are the truth and the texts only describe them), or `messages`, or `prompt` and
    `response` (rendered as they stand, no chat template), or `text`.

    Parameters
    ----------
    id : str
        Becomes the rollout id.
    prompt_end : int, optional
        Position of the first response token of `token_ids`; default their number (all of it is prompt).
    turns : tuple of Turn
        For `token_ids`: where the turns lie.
    tools : tuple of dict
        Tool declarations, passed to the chat template.
    labels : dict
        Named properties: str, int, float or bool.
    annotations : tuple of TokenSpan or TextSpan
    source : str
        The file (and line) it was read from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(min_length=1)
    messages: tuple[Message, ...] | None = None
    prompt: str | None = None
    response: str | None = None
    token_ids: tuple[int, ...] | None = None
    prompt_end: int | None = None
    turns: tuple[Turn, ...] = ()
    text: str | None = None
    tools: tuple[dict[str, Any], ...] = ()
    labels: dict[str, LabelValue] = Field(default_factory=dict)
    tags: tuple[str, ...] = ()
    prompt_set: str = ""
    annotations: tuple[TokenSpan | TextSpan, ...] = ()
    source: str = ""

    @field_validator("id", mode="before")
    @classmethod
    def _id_as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("token_ids", mode="before")
    @classmethod
    def _whole_numbers(cls, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            for position, one in enumerate(value):
                if type(one) is not int or one < 0:
                    raise ValueError(f"token id {one!r} at position {position} is not a whole number from 0")
        return value

    @field_validator("labels", mode="before")
    @classmethod
    def _known_labels(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            for name, one in value.items():
                _check_label(name, one)
        return value

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        given = [n for n in ("messages", "prompt", "text") if getattr(self, n) is not None]
        if self.token_ids is not None:
            self._check_tokens(len(self.token_ids))
            return self
        if self.response is not None and self.prompt is None:
            raise ValueError("has a `response` and no `prompt`")
        if len(given) != 1:
            found = f"has both `{given[0]}` and `{given[1]}`" if given else "has nothing to capture"
            raise ValueError(f"{found}; give one of `messages`, `prompt` with `response`, `token_ids` or `text`")
        if self.messages == () or not (self.messages or self.prompt or self.response or self.text):
            raise ValueError("is empty: there is no text to capture")
        if self.turns or self.prompt_end is not None:
            raise ValueError("has `prompt_end` or `turn_boundaries`, which count tokens, but no `token_ids`")
        return self

    def _check_tokens(self, n: int) -> None:
        if n == 0:
            raise ValueError("is empty: `token_ids` has no tokens")
        if self.prompt_end is not None and not 0 <= self.prompt_end <= n:
            raise ValueError(f"`prompt_end` {self.prompt_end} is outside its {n} tokens")
        for turn in self.turns:
            if turn.token_end > n:
                raise ValueError(f"turn [{turn.token_start}, {turn.token_end}) ends beyond its {n} tokens")
        for span in self.annotations:
            if isinstance(span, TokenSpan) and span.token_end > n:
                raise ValueError(f"annotation {span.label!r} ends at token {span.token_end}, beyond its {n} tokens")

    @property
    def kind(self) -> Literal["token_ids", "messages", "prompt", "text"]:
        """What it is rendered from."""
        if self.token_ids is not None:
            return "token_ids"
        if self.messages is not None:
            return "messages"
        return "prompt" if self.prompt is not None else "text"

    @classmethod
    def of(cls, fields: Mapping[str, Any], *, source: str) -> Self:
        """Validate `fields`, naming `source` and the transcript in the error."""
        try:
            return cls.model_validate({**fields, "source": source})
        except ValidationError as error:
            name = f"transcript {fields['id']!r}" if fields.get("id") not in (None, "") else "transcript without `id`"
            raise ExperimentError(f"{source}: {name} {sentence(error)}") from None


def sentence(error: ValidationError) -> str:
    """Say the first complaint of pydantic in one clause."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    message = first["msg"].removeprefix("Value error, ")
    place = step_by_step(first["loc"])
    if first["type"] == "value_error" and len(first["loc"]) <= 1:
        return message if message.startswith(("has ", "is ")) else f"is not valid: {message}"
    return f"is not valid: `{place}`: {message}"


def _role(value: Any) -> Any:
    return _ROLES.get(value, value) if isinstance(value, str) else value


def _text(content: Any) -> Any:
    """Join text parts; what is no text is refused rather than left out, for it would change the tokens."""
    if content is None:
        return ""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise ValueError(f"content part of type {kind!r} is not text; only text can be captured")
    return "".join(part["text"] for part in content)


def _check_label(name: Any, value: Any) -> None:
    if name in _TABLE_COLUMNS:
        raise ValueError(f"has a label `{name}`, a column the rollout table has already; rename it")
    # A label becomes an array of this name inside the store.
    if not name or "/" in name or "\0" in name or name.startswith((".", "__")) or len(name.encode()) > 200:
        raise ValueError(f"has a label named {name[:80]!r}, which can't name an array; rename it")
    if isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**63:
        raise ValueError(f"has a label `{name}` beyond 64 bits; write it as a string")
    if isinstance(value, float) and math.isinf(value):
        raise ValueError(f"has a label `{name}` that is infinite; write it as a string")
