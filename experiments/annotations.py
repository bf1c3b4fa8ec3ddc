"""Annotated spans of responses: two file formats, told apart by shape, and text spans as token ranges."""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from experiments.errors import ExperimentError, step_by_step
from experiments.jsonfile import MAX_BYTES, load_json

__all__ = ["ResponseSpan", "Span", "TextSpan", "TokenSpan", "parse_annotations", "read_annotations", "token_range"]


class TokenSpan(BaseModel):
    """A labelled token range, half-open, from the first token of the whole transcript."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    token_start: int = Field(ge=0)
    token_end: int = Field(ge=0)
    label: str

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.token_end < self.token_start:
            raise ValueError(f"token_end {self.token_end} lies before token_start {self.token_start}")
        return self


class ResponseSpan(TokenSpan):
    """A labelled token range, half-open, from the first token of the response."""


class TextSpan(BaseModel):
    """A verbatim piece of the response's text with a label."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    span: str = Field(min_length=1)
    label: str = ""


Span = TokenSpan | TextSpan


def read_annotations(path: Path, *, max_bytes: int = MAX_BYTES) -> dict[str, tuple[Span, ...]]:
    """Read an annotations file of either format.

    Returns
    -------
    dict of transcript id to its spans

    Raises
    ------
    ExperimentError
        Neither format, or a span that is not valid.
    """
    return parse_annotations(load_json(path, max_bytes=max_bytes), source=str(path))


def parse_annotations(data: Any, *, source: str) -> dict[str, tuple[Span, ...]]:
    """Tell the two formats apart and read either.

    Text spans: a top-level list `annotations` of entries `{idx | id, spans: [{span, category?}]}` (`borderline` spans
    are left out). Token ranges: one object per transcript id, `{id: {annotations: [{token_start, token_end, label}]}}`.
    """
    try:
        if isinstance(data, dict) and isinstance(data.get("annotations"), list):
            return _text_format(data["annotations"])
        if isinstance(data, dict) and data and all(_is_token_entry(value) for value in data.values()):
            return {
                str(key): tuple(TokenSpan.model_validate(one) for one in value["annotations"])
                for key, value in data.items()
            }
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = step_by_step(first["loc"]) or "span"
        raise ExperimentError(f"{source}: an annotation is not valid: `{place}`: {first['msg']}") from None
    raise ExperimentError(
        f"{source}: neither text spans (a list `annotations` of entries with `idx` and `spans`) nor token ranges "
        "(id -> `annotations` with `token_start`, `token_end`, `label`)"
    )


class _TextEntry(BaseModel):
    """One entry of the text-span format; `idx` is the older name of `id`."""

    id: int | str
    spans: tuple[TextSpan, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        spans = data.get("spans") or []
        if not isinstance(spans, list):
            return {"id": data.get("id", data.get("idx")), "spans": spans}
        labelled = [
            {**s, "label": s.get("category") or s.get("label") or ""} if isinstance(s, dict) else s for s in spans
        ]
        return {"id": data.get("id", data.get("idx")), "spans": labelled}


def _text_format(entries: list[Any]) -> dict[str, tuple[Span, ...]]:
    out: dict[str, tuple[Span, ...]] = {}
    for entry in map(_TextEntry.model_validate, entries):
        out[str(entry.id)] = out.get(str(entry.id), ()) + entry.spans
    return out


def _is_token_entry(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("annotations"), list)


def token_range(pieces: Sequence[bytes], span: str) -> tuple[int, int] | None:
    """Find the tokens that a piece of text overlaps.

    The text is that of the tokens' bytes, so multi-byte characters split over tokens and unreliable token strings do
    no harm. The first exact match counts, else the first that differs in case only.

    Parameters
    ----------
    pieces : sequence of bytes
        The bytes of each token.
    span : str
        Verbatim text.

    Returns
    -------
    (start, stop), half-open indices into `pieces`; None when the text is not there

    Examples
    --------
    >>> token_range([b"The ", b"caf", bytes([0xC3]), bytes([0xA9]), b" is"], "fé")
    (1, 4)
    """
    raw = b"".join(pieces)
    text = raw.decode("utf-8", "surrogateescape")
    start = text.find(span)
    stop = start + len(span)
    if start < 0:
        # re.IGNORECASE keeps offsets; lower() may change a string's length.
        match = re.search(re.escape(span), text, re.IGNORECASE)
        if match is None:
            return None
        start, stop = match.span()
    byte_start = len(text[:start].encode("utf-8", "surrogateescape"))
    byte_stop = byte_start + len(text[start:stop].encode("utf-8", "surrogateescape"))
    ends = list(accumulate(len(piece) for piece in pieces))
    starts = [0, *ends[:-1]]
    return bisect_right(ends, byte_start), bisect_left(starts, byte_stop)
