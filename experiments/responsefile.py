"""The response file of an experiment tree, one object a rollout, from tables: its tokens, text, turns and labels."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from experiments.formats import labels_of

__all__ = ["response_record"]

_FIXED = ("n_tokens", "prompt_end", "prompt_set", "tags", "token_sha256")


def response_record(rollout_id: str, row: Mapping[Any, Any], tokens: pd.DataFrame, *, stem: str) -> dict[str, Any]:
    """Return a rollout in the keys of a response file: tokens, text, turns, labels, tags.

    Parameters
    ----------
    rollout_id : str
    row : mapping
        Its row of the rollout table.
    tokens : DataFrame
        token_id, text (NaN where unknown), role, turn, thinking: a row for each token.
    stem : str
        Name of the file without its suffix; the record says its id where it is another one.
    """
    text = [one if isinstance(one, str) else "" for one in tokens["text"]]
    cut = int(row["prompt_end"])
    record: dict[str, Any] = {
        "prompt": "".join(text[:cut]),
        "response": "".join(text[cut:]),
        "tokens": text,
        "token_ids": [int(i) for i in tokens["token_id"]],
        "prompt_end": cut,
        "tags": list(row["tags"]),
        "turn_boundaries": _turns(tokens),
    }
    if stem != rollout_id:
        record["id"] = rollout_id
    if row["prompt_set"]:
        record["prompt_set"] = str(row["prompt_set"])
    return {**record, **_labels(row)}


def _labels(row: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the labels; those named like a key of a response file stand in `source`, which is read as labels too."""
    labels = {str(k): _plain(v) for k, v in row.items() if k not in _FIXED and v is not None and v == v}
    free = {name: value for name, value in labels.items() if labels_of({name: value})}
    others = {name: value for name, value in labels.items() if name not in free}
    return {**free, **({"source": others} if others else {})}


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _turns(tokens: pd.DataFrame) -> list[dict[str, Any]]:
    """Return runs of one role and turn, with the reasoning ranges in each."""
    role = tokens["role"].to_numpy(dtype=object)
    turn, thinking = tokens["turn"].to_numpy(), tokens["thinking"].to_numpy(dtype=np.bool_)
    edges = np.flatnonzero((role[1:] != role[:-1]) | (np.diff(turn) != 0)) + 1
    found = []
    for start, stop in zip([0, *edges.tolist()], [*edges.tolist(), len(role)], strict=True):
        inside = _ranges(thinking[start:stop], start)
        if role[start] == "none" and turn[start] == -1 and not inside:
            continue
        one: dict[str, Any] = {"role": str(role[start]), "token_start": start, "token_end": stop}
        one["turn"] = int(turn[start])
        if role[start] == "assistant":
            one["has_thinking"] = bool(inside)
        if len(inside) == 1:
            one["thinking_start"], one["thinking_end"] = inside[0]
        elif inside:
            one["thinking_ranges"] = inside
        found.append(one)
    # Said even where there is nothing to say: a file without turns is read by the usual rule, response = assistant.
    return found or [{"role": "none", "token_start": 0, "token_end": len(role), "turn": -1}]


def _ranges(marks: NDArray[np.bool_], first: int) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], marks, [False]]).astype(np.int8)))
    return [(first + int(a), first + int(b)) for a, b in edges.reshape(-1, 2)]
