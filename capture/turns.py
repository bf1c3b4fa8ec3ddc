"""Where the turns and reasoning ranges of a rendered conversation lie, as pure functions of text and bytes.

A chat template is a program: what it writes for message i may depend on the messages after it (templates of reasoning
models drop or keep earlier reasoning). So turns are found by rendering longer and longer prefixes only where each is a
true prefix of the whole, else by the markers that open a turn.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Literal

__all__ = ["Piece", "by_markers", "by_prefixes", "marked_blocks", "thinking_ranges"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A run of characters of one turn, up to the next piece; turn -1 is text before the first message's own."""

    start: int
    role: str
    turn: int


# What opens a turn, and whose it is; None: the name follows the marker.
_MARKERS: dict[str, str | None] = {
    "<|im_user|>": "user",
    "<|im_assistant|>": "assistant",
    "<|im_system|>": None,
    "<|im_start|>": None,
    "<|start_header_id|>": None,
    "<start_of_turn>": None,
    "<|START_OF_TURN_TOKEN|>": None,
    "<|start|>": None,
    "<|user|>": "user",
    "<|assistant|>": "assistant",
    "<|system|>": "system",
    "<|observation|>": "tool",
    "<|tool|>": "tool",
    "<\uff5cUser\uff5c>": "user",
    "<\uff5cAssistant\uff5c>": "assistant",
}
_NAMES = {
    "system": "system",
    "developer": "system",
    "tool_declare": "system",
    "user": "user",
    "assistant": "assistant",
    "model": "assistant",
    "chatbot": "assistant",
    "tool": "tool",
    "ipython": "tool",
    "observation": "tool",
}
_OPENING = re.compile("(" + "|".join(map(re.escape, _MARKERS)) + r")\s*(?:<\|)?([A-Za-z_]*?)(?:_TOKEN)?(?![A-Za-z_])")

# (opens, closes) a reasoning range; the last is the analysis channel of the harmony format.
_THINKING = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
    ("<|channel|>analysis<|message|>", "<|end|>"),
)


def marked_blocks(text: str) -> list[tuple[int, str, str | None]]:
    """Return (start, marker, role or None) of each place where a known marker opens a turn."""
    found = []
    for match in _OPENING.finditer(text):
        marker, name = match.groups()
        role = _MARKERS[marker] or _NAMES.get(name.lower())
        if role is None and marker == "<|im_system|>":
            role = "tool"  # a tool's result is headed by the tool's own name
        found.append((match.start(), marker, role))
    return found


def by_prefixes(text: str, roles: Sequence[str], render: Callable[[int], str | None]) -> list[Piece] | None:
    """Find the turns by rendering the first 1, 2, ... messages.

    Parameters
    ----------
    text : str
        The whole conversation, rendered.
    roles : sequence of str
        The role of each message.
    render : function of n
        The first n messages rendered; None where the template refuses them.

    Returns
    -------
    list of Piece, or None when some rendering is not a prefix of the next
    """
    ends = [0]
    for n in range(1, len(roles)):
        prefix = render(n)
        if prefix is None or len(prefix) < ends[-1] or not text.startswith(prefix):
            return None
        ends.append(len(prefix))
    pieces = [Piece(start=start, role=role, turn=i) for i, (start, role) in enumerate(zip(ends, roles, strict=True))]
    # What the template puts before the first message (tool declarations, a default system prompt) is no message's.
    inside = marked_blocks(text[: ends[1]] if len(ends) > 1 else text)
    if len(inside) < 2:
        return pieces
    leading = [Piece(start=at, role=role or "system", turn=-1) for at, _, role in inside[:-1]]
    return [
        Piece(start=0, role=leading[0].role, turn=-1),
        *leading[1:],
        Piece(start=inside[-1][0], role=roles[0], turn=0),
        *pieces[1:],
    ]


def by_markers(text: str, roles: Sequence[str]) -> list[Piece] | None:
    """Find the turns by the markers that open them, the last block being the last message.

    Consecutive tool results may share a block. Blocks before the first message belong to no turn.

    Returns
    -------
    list of Piece, or None when the markers and the messages don't agree
    """
    blocks = marked_blocks(text)
    turns = list(range(len(roles)))
    if len(blocks) < len(roles):
        turns = [i for i in turns if not (i and roles[i] == "tool" and roles[i - 1] == "tool")]
    extra = len(blocks) - len(turns)
    if extra < 0 or not blocks:
        return None
    pieces = [Piece(start=at, role=role or "system", turn=-1) for at, _, role in blocks[:extra]]
    for (at, _, role), turn in zip(blocks[extra:], turns, strict=True):
        # Templates put tool results into user or system blocks.
        if role not in (None, roles[turn]) and roles[turn] != "tool":
            return None
        pieces.append(Piece(start=at, role=roles[turn], turn=turn))
    return [Piece(start=0, role=pieces[0].role, turn=pieces[0].turn), *pieces[1:]]


def thinking_ranges(tokens: Sequence[bytes], *, header: bytes = b"") -> list[tuple[int, int]]:
    """Return the token ranges of one turn that lie between reasoning markers, the markers left out.

    Parameters
    ----------
    tokens : sequence of bytes
        The bytes of the turn's tokens.
    header : bytes
        What opens such a turn; reasoning that was opened before the turn's text starts after it.

    Returns
    -------
    list of (start, stop), half-open; a range that is never closed runs to the end
    """
    raw = b"".join(tokens)
    starts = [0, *accumulate(len(one) for one in tokens)][:-1]
    out = []
    for start, stop in _between(raw, len(header) if raw.startswith(header) else 0):
        inside = [i for i, at in enumerate(starts) if start <= at < stop]
        if inside:
            out.append((inside[0], inside[-1] + 1))
    return out


def _between(raw: bytes, begin: int) -> list[tuple[int, int]]:
    """Byte ranges between the first pair of markers that occurs."""
    for opens, closes in ((o.encode(), c.encode()) for o, c in _THINKING):
        events = [
            (m.start(), m.end(), m.group() == opens)
            for m in re.finditer(re.escape(opens) + b"|" + re.escape(closes), raw)
        ]
        # A closing <|end|> closes every harmony channel: without an opening it says nothing.
        meaningful = [e for e in events if e[2]] or closes != b"<|end|>"
        if not events or not meaningful:
            continue
        # A turn whose reasoning was opened by the prompt starts with text and then closes it.
        at: int | None = None if events[0][2] else begin
        out = []
        for start, end, opening in events:
            if opening and at is None:
                at = end
            elif not opening and at is not None:
                out.append((at, start))
                at = None
        return [*out, (at, len(raw))] if at is not None else out
    return []


def runs(keys: Sequence[tuple[int, int]]) -> list[tuple[tuple[int, int], int, int]]:
    """Return (key, start, stop) of each run of equal keys."""
    out, at = [], 0
    for key, group in groupby(keys):
        n = sum(1 for _ in group)
        out.append((key, at, at + n))
        at += n
    return out


RangesMethod = Literal["prefixes", "markers", "stored", "plain", "none"]
"""How turns were found, for the provenance."""
