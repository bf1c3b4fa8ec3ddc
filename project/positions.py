"""Which tokens of a rollout a position names: `response[:5]`, `prompt[-1]`, `turn[2]:thinking[:]`.

    [turn[N]:]frame[slice]

frame   prompt: the tokens before the response, or the last user turn of a chat without one; response: the response, or
        the last assistant turn, without its header and reasoning; thinking: its reasoning; system, tool_result: the
        last turn of that role; tool_call: spans annotated `tool_call`; all: every token
turn[N] the N-th turn of the frame's role, from 0, negative ones from the end
slice   one index, or a:b, or :, counted within the frame; what lies outside is left out
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from xarray.core import indexing

from datastore.axis import Axis
from datastore.errors import MisuseError
from datastore.lazy import TokenArray
from datastore.query import Store

__all__ = ["FRAMES", "Position", "parse_position", "token_columns", "tokens_at", "tokens_of"]

FRAMES = ("prompt", "response", "thinking", "system", "tool_call", "tool_result", "all")
_ROLE = {"prompt": "user", "response": "assistant", "thinking": "assistant", "system": "system", "tool_result": "tool"}
_GRAMMAR = re.compile(
    rf"(?:turn\[(?P<turn>-?\d+)\]:)?(?P<frame>{'|'.join(FRAMES)})\[(?:(?P<one>-?\d+)|(?P<a>-?\d+)?:(?P<b>-?\d+)?)\]"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """A position, parsed.

    Attributes
    ----------
    text : str
        As it was written.
    frame : str
        One of `FRAMES`.
    turn : int or None
        Which turn of the frame's role.
    start, stop : int or None
        Within the frame.
    """

    text: str
    frame: str
    turn: int | None
    start: int | None
    stop: int | None


def parse_position(text: str) -> Position:
    """Read a position.

    Raises
    ------
    MisuseError
        It is none.

    Examples
    --------
    >>> parse_position("turn[2]:response[:5]").stop
    5
    """
    found = _GRAMMAR.fullmatch(text.strip())
    if found is None:
        raise MisuseError(
            f"{text!r} is no position; write it like response[:5], prompt[-1] or turn[2]:thinking[:], with "
            f"one of {', '.join(FRAMES)}"
        )
    turn = None if found["turn"] is None else int(found["turn"])
    if turn is not None and found["frame"] in ("all", "tool_call"):
        raise MisuseError(f"{text!r} names a turn of {found['frame']}, which has no turns; leave turn[{turn}] out")
    if found["one"] is not None:
        one = int(found["one"])
        return Position(text=text, frame=found["frame"], turn=turn, start=one, stop=one + 1 if one != -1 else None)
    bounds = [None if found[key] is None else int(found[key]) for key in ("a", "b")]
    return Position(text=text, frame=found["frame"], turn=turn, start=bounds[0], stop=bounds[1])


def tokens_at(store: Store, position: Position | str, rollout_id: str) -> NDArray[np.int64]:
    """Return the positions in a rollout that a position names, ascending; empty where it has no such tokens."""
    return tokens_of(store, position, [rollout_id])[rollout_id]


def tokens_of(store: Store, position: Position | str, rollouts: Sequence[str]) -> dict[str, NDArray[np.int64]]:
    """Return the positions that a position names in each of some rollouts."""
    asked = parse_position(position) if isinstance(position, str) else position
    spans = {}
    if asked.frame == "tool_call":
        annotated = store.annotations
        spans = dict(list(annotated[annotated["label"] == "tool_call"].groupby("rollout_id")))
    nothing = pd.DataFrame({"token_start": [], "token_end": []}, dtype=np.int64)
    columns = token_columns(store, rollouts, ("token_id", "segment", "role", "turn", "thinking"))
    return {
        name: in_frame(tokens, asked, spans=spans.get(name, nothing))[asked.start : asked.stop]
        for name, tokens in columns.items()
    }


def token_columns(store: Store, rollouts: Sequence[str], names: Sequence[str]) -> dict[str, pd.DataFrame]:
    """Read coordinates of the tokens of some rollouts, each coordinate once."""
    cells = store.cells
    rollout = np.array([cells.index[name] for name in rollouts], np.int64)
    axis = Axis(rollout, np.zeros_like(rollout), cells.counts[rollout])
    key = indexing.BasicIndexer((slice(None),))
    table = pd.DataFrame({name: TokenArray(cells, name, axis=axis)[key] for name in names})
    return {
        name: table.iloc[axis.edges[i] : axis.edges[i + 1]].reset_index(drop=True) for i, name in enumerate(rollouts)
    }


def in_frame(tokens: pd.DataFrame, position: Position, *, spans: pd.DataFrame) -> NDArray[np.int64]:
    """Return the tokens of a frame, before the slice is taken.

    Parameters
    ----------
    tokens : DataFrame
        token_id, segment, role, turn, thinking: a row for each token.
    position : Position
    spans : DataFrame
        token_start and token_end of the spans annotated as tool calls.
    """
    if position.frame == "all":
        return np.arange(len(tokens))
    if position.frame == "tool_call":
        inside = np.zeros(len(tokens), bool)
        for start, stop in zip(spans["token_start"], spans["token_end"], strict=True):
            inside[start:stop] = True
        return np.flatnonzero(inside)
    segment = tokens["segment"].to_numpy()
    has_response = bool((segment == "response").any())
    if position.turn is None and has_response and position.frame in ("prompt", "response"):
        chosen = segment == position.frame
        return np.flatnonzero(chosen & ~tokens["thinking"].to_numpy() if position.frame == "response" else chosen)
    inside = _turn(tokens, position)
    thinking = tokens["thinking"].to_numpy()
    if position.frame == "thinking":
        return np.flatnonzero(inside & thinking) if position.turn is not None else _last_thinking(tokens)
    if position.frame == "response":
        inside = inside & ~thinking & ~_headers(tokens)
    if not inside.any() and position.turn is None and position.frame == "prompt" and not _has_turns(tokens):
        return np.arange(len(tokens))  # text without turns is all prompt
    return np.flatnonzero(inside)


def _has_turns(tokens: pd.DataFrame) -> bool:
    return bool((tokens["turn"] >= 0).any())


def _turn(tokens: pd.DataFrame, position: Position) -> NDArray[np.bool_]:
    """Mark the tokens of the N-th turn of the frame's role, the last one by default."""
    of_role = (tokens["role"] == _ROLE[position.frame]).to_numpy() & (tokens["turn"] >= 0).to_numpy()
    turns = np.unique(tokens["turn"].to_numpy()[of_role])
    index = -1 if position.turn is None else position.turn
    if not -len(turns) <= index < len(turns):
        return np.zeros(len(tokens), bool)
    return np.asarray(of_role & (tokens["turn"] == turns[index]).to_numpy())


def _last_thinking(tokens: pd.DataFrame) -> NDArray[np.int64]:
    thinking, turn = tokens["thinking"].to_numpy(), tokens["turn"].to_numpy()
    if not thinking.any():
        return np.zeros(0, np.int64)
    return np.flatnonzero(thinking & (turn == turn[thinking].max()))


def _headers(tokens: pd.DataFrame) -> NDArray[np.bool_]:
    """Mark the tokens that open assistant turns: those before the response in the last one, and the same elsewhere.

    A rollout without a response does not say where its headers end, so none is marked there.
    """
    marked = np.zeros(len(tokens), bool)
    segment, turn = tokens["segment"].to_numpy(), tokens["turn"].to_numpy()
    ids = tokens["token_id"].to_numpy()
    assistant = (tokens["role"] == "assistant").to_numpy() & (turn >= 0)
    response = np.flatnonzero(segment == "response")
    if not len(response) or not assistant[response[0]]:
        return marked
    last = np.flatnonzero(assistant & (turn == turn[response[0]]))
    header = ids[last[0] : response[0]]
    for number in np.unique(turn[assistant]):
        start = int(np.flatnonzero(assistant & (turn == number))[0])
        if np.array_equal(ids[start : start + len(header)], header):
            marked[start : start + len(header)] = True
    return marked
