"""A transcript as token ids: rendered, cut to the context, with role, turn, reasoning and annotation ranges.

Segments: `prompt_end` is where the response starts. For prompt and response texts that is the first token of the
response; for a chat that ends with an assistant turn, the first token of that turn after its header; for everything
else (pre-tokenised rollouts that don't say, plain text, chats that end otherwise) the number of tokens: all is prompt.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from capture.errors import RequestError
from capture.rendering import Written, chat, plain
from capture.tokenbytes import TokenBytes, token_bytes
from capture.turns import RangesMethod, marked_blocks, runs, thinking_ranges
from datastore.schema import ROLES, Annotation, Rollout
from experiments.annotations import TextSpan, TokenSpan, token_range
from experiments.transcript import Transcript

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["RenderNotes", "Rendered", "render", "token_bytes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderNotes:
    """How a transcript became tokens, for the provenance.

    Parameters
    ----------
    template : "chat", "plain", "none"
        The tokenizer's chat template; `role: text` lines for want of one; nothing to render.
    ranges : "prefixes", "markers", "stored", "plain", "none"
        How turns were found.
    truncated_from : int, optional
        Number of tokens before it was cut.
    unmatched : tuple of str
        Annotated text that isn't in the response.
    cut_annotations : int
        Annotations shortened or lost by the cut.
    """

    template: Literal["chat", "plain", "none"]
    ranges: RangesMethod
    truncated_from: int | None = None
    unmatched: tuple[str, ...] = ()
    cut_annotations: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {**asdict(self), "unmatched": list(self.unmatched)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A transcript as a rollout, and how it became one."""

    rollout: Rollout
    notes: RenderNotes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draft:
    """Token ids of a whole transcript with what is known of each, before annotations and the cut."""

    ids: list[int]
    prompt_end: int
    notes: RenderNotes
    role: NDArray[np.int8]
    turn: NDArray[np.int32]
    header: bytes = b""


def render(
    transcript: Transcript,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    context: int | None,
    truncate: bool = False,
    vocab_size: int | None = None,
) -> Rendered:
    """Turn a transcript into token ids with all that is known of each token.

    Parameters
    ----------
    transcript : Transcript
    tokenizer : of transformers
    context : int, optional
        Most tokens the model takes.
    truncate : bool
        Cut a longer transcript to its first `context` tokens, annotations with it, instead of refusing it.
    vocab_size : int, optional
        Rows of the model's embedding; default what the tokenizer's ids need.

    Raises
    ------
    RequestError
        Longer than the context, no tokens, ids beyond the vocabulary, or a template that refuses the messages.
    """
    draft = _draft(transcript, tokenizer)
    _check(transcript, draft, vocab_size=_vocab_size(tokenizer) if vocab_size is None else vocab_size)
    n = len(draft.ids)
    keep = n if context is None else min(n, context)
    if keep < n and not truncate:
        raise RequestError(
            f"rollout {transcript.id!r} has {n:,} tokens and the model takes {context:,}; leave it out, or give "
            f"--truncate to keep its first {context:,}"
        )
    pieces = TokenBytes(tokenizer).of(draft.ids)
    thinking = _thinking(transcript, draft, pieces)
    annotations, unmatched = _annotations(transcript, draft, pieces)
    rollout = Rollout(
        rollout_id=transcript.id,
        token_ids=np.array(draft.ids[:keep], dtype=np.int32),
        prompt_end=min(draft.prompt_end, keep),
        role=draft.role[:keep],
        turn=draft.turn[:keep],
        thinking=thinking[:keep],
        labels=dict(transcript.labels),
        annotations=tuple(replace(a, token_end=min(a.token_end, keep)) for a in annotations if a.token_start < keep),
        tags=transcript.tags,
        prompt_set=transcript.prompt_set,
    )
    notes = replace(
        draft.notes,
        truncated_from=n if keep < n else None,
        unmatched=unmatched,
        cut_annotations=sum(a.token_end > keep for a in annotations),
    )
    return Rendered(rollout=rollout, notes=notes)


def _check(transcript: Transcript, draft: _Draft, *, vocab_size: int) -> None:
    if not draft.ids:
        raise RequestError(f"rollout {transcript.id!r} ({transcript.source}) has 0 tokens; leave it out")
    worst = max(draft.ids)
    if worst >= vocab_size or min(draft.ids) < 0:
        bad = worst if worst >= vocab_size else min(draft.ids)
        raise RequestError(
            f"rollout {transcript.id!r} has token id {bad} at position {draft.ids.index(bad)}, beyond the model's "
            f"vocabulary of {vocab_size}; it was tokenised for another model"
        )


def _vocab_size(tokenizer: Any) -> int:
    """Ids may lie beyond the number of tokens, special ones above a gap."""
    return max(len(tokenizer), *(int(one) + 1 for one in tokenizer.added_tokens_decoder), 0)


def _draft(transcript: Transcript, tokenizer: Any) -> _Draft:
    if transcript.messages is not None and transcript.token_ids is None:
        return _rendered(tokenizer, chat(transcript, tokenizer) if tokenizer.chat_template else plain(transcript))
    if transcript.token_ids is not None:
        ids = list(transcript.token_ids)
        prompt_end = len(ids) if transcript.prompt_end is None else transcript.prompt_end
    else:
        opening = transcript.text if transcript.text is not None else transcript.prompt or ""
        ids = _leading(tokenizer, opening) + _encode(tokenizer, opening)[0]
        prompt_end = len(ids)
        ids += _encode(tokenizer, transcript.response or "")[0]
    return _unrendered(transcript, tokenizer, ids, prompt_end=prompt_end)


def _unrendered(transcript: Transcript, tokenizer: Any, ids: list[int], *, prompt_end: int) -> _Draft:
    """Text or ids that stand as they are: turns as stored, else where single tokens open them."""
    role, turn = np.zeros(len(ids), np.int8), np.full(len(ids), -1, np.int32)
    stored = [(t.token_start, t.token_end, t.role) for t in transcript.turns]
    found = stored or _marked(TokenBytes(tokenizer).of(ids))
    numbers = {i: t.turn for i, t in enumerate(transcript.turns) if t.turn is not None}
    for i, (start, stop, name) in enumerate(found):
        role[start:stop] = ROLES.index(name)
        turn[start:stop] = numbers.get(i, i)
    if not found:
        role[prompt_end:] = ROLES.index("assistant")
    method: RangesMethod = "stored" if stored else "markers" if found else "none"
    notes = RenderNotes(template="none", ranges=method)
    return _Draft(ids=ids, prompt_end=prompt_end, notes=notes, role=role, turn=turn)


def _marked(tokens: Sequence[bytes]) -> list[tuple[int, int, str]]:
    """Token ranges of the turns that marker tokens open, each up to the next; a marker spelled out opens none."""
    pieces = [one.decode("utf-8", "replace") for one in tokens]
    starts = np.cumsum([0, *(len(one) for one in pieces)])[:-1]
    opened = [
        (int(np.searchsorted(starts, at, "right")) - 1, marker, role or "none")
        for at, marker, role in marked_blocks("".join(pieces))
    ]
    whole = [(at, role) for at, marker, role in opened if pieces[at] == marker]
    edges = [at for at, _ in whole] + [len(pieces)]
    return [(at, stop, role) for (at, role), stop in zip(whole, edges[1:], strict=True)]


def _rendered(tokenizer: Any, written: Written) -> _Draft:
    """Encode a rendered text and put its character ranges on the tokens."""
    # A chat template writes the tokens it wants in front itself.
    leading = _leading(tokenizer, written.text) if written.template == "plain" else []
    ids, spans = _encode(tokenizer, written.text)
    role, turn = np.zeros(len(leading) + len(ids), np.int8), np.full(len(leading) + len(ids), -1, np.int32)
    notes = RenderNotes(template=written.template, ranges=written.ranges if spans else "none")
    draft = _Draft(ids=leading + ids, prompt_end=len(role), notes=notes, role=role, turn=turn)
    if not spans:
        return draft
    starts, ends = np.array([(0, 0)] * len(leading) + spans, dtype=np.int64).T
    for piece in written.pieces:
        # A token over two turns belongs to the one it starts in.
        role[starts >= piece.start] = ROLES.index(piece.role)
        turn[starts >= piece.start] = piece.turn
    if written.prompt_end is None:
        return draft
    # The first token that holds any of the response: " Yes" after "assistant:" is response.
    after = np.flatnonzero(ends > written.prompt_end)
    return replace(draft, prompt_end=int(after[0]) if after.size else len(role), header=written.header.encode())


def _encode(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Return ids without special tokens around them, and each one's range of characters (none when not known)."""
    if not text:
        return [], []
    ids = list(tokenizer.encode(text, add_special_tokens=False))
    pieces = TokenBytes(tokenizer).of(ids)
    if b"".join(pieces) == text.encode():
        return ids, _characters(text, pieces)
    if not tokenizer.is_fast:
        return ids, []
    # Sentencepiece puts spaces where the text has none: its own offsets know which.
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(found["input_ids"]), [(int(a), int(b)) for a, b in found["offset_mapping"]]


def _characters(text: str, pieces: Sequence[bytes]) -> list[tuple[int, int]]:
    """Return the range of characters of which each token holds any byte."""
    byte_of = np.cumsum([0, *(len(character.encode()) for character in text)])
    ends = np.cumsum([len(piece) for piece in pieces])
    begins = np.concatenate([[0], ends[:-1]])
    first = np.searchsorted(byte_of, begins, "right") - 1
    return list(zip(first.tolist(), np.searchsorted(byte_of, ends, "left").tolist(), strict=True))


def _leading(tokenizer: Any, text: str) -> list[int]:
    """Return the special tokens that the tokenizer puts before a text, unless the text starts with them already."""
    probe = "a"
    bare = list(tokenizer.encode(probe, add_special_tokens=False))
    full = list(tokenizer.encode(probe, add_special_tokens=True))
    at = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
    first = tokenizer.convert_ids_to_tokens(full[0]) if at else None
    return [] if first is not None and text.startswith(str(first)) else full[:at]


def _thinking(transcript: Transcript, draft: _Draft, pieces: list[bytes]) -> NDArray[np.bool_]:
    """Mark what lies between reasoning markers in assistant turns, or anywhere when no turns are known."""
    out = np.zeros(len(draft.ids), np.bool_)
    for turn in transcript.turns:
        ranges = [(turn.thinking_start, turn.thinking_end), *turn.thinking_ranges]
        for first, last in ranges:
            if first is not None and last is not None:
                out[max(first, 0) : max(last, 0)] = True
    if any(turn.turn is not None for turn in transcript.turns):
        return out  # written from a store, which knows
    known = bool((draft.turn >= 0).any())
    for (role, _), start, stop in (
        runs(list(zip(draft.role.tolist(), draft.turn.tolist(), strict=True))) if known else []
    ):
        if ROLES[role] == "assistant":
            for a, b in thinking_ranges(pieces[start:stop], header=draft.header):
                out[start + a : start + b] = True
    if not known:
        for a, b in thinking_ranges(pieces):
            out[a:b] = True
    return out


def _annotations(
    transcript: Transcript, draft: _Draft, pieces: list[bytes]
) -> tuple[tuple[Annotation, ...], tuple[str, ...]]:
    """Return the annotations as token ranges, and the text spans that aren't there."""
    found, unmatched = [], []
    # Text is looked for in the response; where there is none, in the whole.
    begin = draft.prompt_end if draft.prompt_end < len(draft.ids) else 0
    for span in transcript.annotations:
        if isinstance(span, TokenSpan):
            if span.token_end > len(draft.ids):
                raise RequestError(
                    f"rollout {transcript.id!r}: annotation {span.label!r} ends at token {span.token_end}, beyond its "
                    f"{len(draft.ids)} tokens; it was made with another tokenizer or template"
                )
            found.append(Annotation(token_start=span.token_start, token_end=span.token_end, label=span.label))
        elif isinstance(span, TextSpan):
            where = token_range(pieces[begin:], span.span)
            if where is None:
                unmatched.append(span.span)
            else:
                found.append(Annotation(token_start=begin + where[0], token_end=begin + where[1], label=span.label))
    return tuple(found), tuple(unmatched)
