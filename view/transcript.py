"""The token text as a Panel component: the browser side is static/transcript.js."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import param
from numpy.typing import NDArray
from panel.custom import JSComponent

from view.model import Model

__all__ = ["Transcript", "annotation_colours", "numbers_of", "scales_of", "text_of"]

STATIC = Path(__file__).with_name("static")
ANNOTATIONS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#b58900", "#56b4e9", "#7f3c8d", "#6b6b6b")
"""Okabe and Ito's colours, which people with colour blindness can tell apart."""
SINK = 4


class Transcript(JSComponent):
    """The text of one rollout, shaded by one direction."""

    text = param.Dict(default={})
    numbers = param.Dict(default={})
    column = param.Integer(default=-1, doc="The direction that shades the text, -1 for none.")
    pinned = param.Integer(default=-1, doc="The position that is pinned, -1 for none.")
    folded = param.Boolean(default=False, doc="Thinking is folded.")
    compact = param.Boolean(default=False)
    dark = param.Boolean(default=False)

    _esm = STATIC / "transcript.js"
    _stylesheets = [(STATIC / "transcript.css").read_text(encoding="utf-8")]  # noqa: RUF012


def text_of(model: Model, rollout: str) -> dict[str, Any]:
    """Return what `Transcript.text` holds of a rollout: its tokens, in blocks of one turn and role."""
    tokens = model.tokens(rollout)
    facts, fact = _facts(tokens)
    texts = [text if isinstance(text, str) else None for text in tokens["text"]]
    return {
        "rollout": rollout,
        "texts": texts,
        "ids": tokens["token_id"].to_numpy(np.int32),
        "facts": facts,
        "fact": fact,
        "blocks": _blocks(tokens),
        "annotations": _annotations(model, rollout),
        "norms": model.norms(rollout),
    }


def _facts(tokens: pd.DataFrame) -> tuple[list[str], NDArray[np.int32]]:
    """Say of each token its role, turn and segment: the different sentences, and which one is whose."""
    columns = zip(tokens["role"], tokens["turn"], tokens["segment"], tokens["thinking"], strict=True)
    said = [_fact(*one) for one in columns]
    names = list(dict.fromkeys(said))
    places = {name: i for i, name in enumerate(names)}
    return names, np.array([places[name] for name in said], np.int32)


def _fact(*what: Any) -> str:
    role, turn, segment, thinking = what
    words = [str(role)] if role != "none" else []
    words += [f"turn {turn}"] if turn >= 0 else []
    return ", ".join([*words, str(segment), *(["thinking"] if thinking else [])])


def _blocks(tokens: pd.DataFrame) -> list[dict[str, Any]]:
    """Cut the tokens where role, turn or thinking changes; without any roles, where the response begins."""
    keys = ["role", "turn", "thinking"]
    if (tokens["role"] == "none").all():
        keys.append("segment")
    change = np.zeros(len(tokens), bool)
    for key in keys:
        values = tokens[key].to_numpy()
        change[1:] |= values[1:] != values[:-1]
    starts = [0, *np.flatnonzero(change).tolist()]
    blocks = []
    for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True):
        one = tokens.iloc[start]
        thinking = bool(one["thinking"])
        role = str(one["role"])
        words = [role if role != "none" else str(one["segment"])]
        words += [f"turn {one['turn']}"] if one["turn"] >= 0 else []
        words += [f"thinking, {stop - start} tokens"] if thinking else []
        blocks.append({"start": start, "stop": stop, "role": role, "thinking": thinking, "title": " · ".join(words)})
    return blocks


def _annotations(model: Model, rollout: str) -> list[dict[str, Any]]:
    colours = annotation_colours(model)
    return [
        {"start": one.start, "stop": one.stop, "label": one.label, "colour": colours[one.label]}
        for one in model.annotations(rollout)
    ]


def annotation_colours(model: Model) -> dict[str, str]:
    """Return the colour of every annotation label of a store."""
    labels = sorted(map(str, model.store.annotations["label"].unique()))
    return {label: ANNOTATIONS[i % len(ANNOTATIONS)] for i, label in enumerate(labels)}


def scales_of(values: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return for each direction the value that is not shaded, and how far from it the shade is strongest.

    The median of the rollout and the 99th percentile of the distances from it, both beyond the first tokens: scores of
    one direction may all lie on one side of 0, and what is told apart is how they change.
    """
    beyond = values[SINK:] if len(values) > 2 * SINK else values
    known = np.where(np.isfinite(beyond).any(axis=0), beyond, np.float32(0))
    if not beyond.size:
        return np.zeros(values.shape[1], np.float32), np.ones(values.shape[1], np.float32)
    centres = np.nanmedian(known, axis=0)
    scales = np.nanpercentile(np.abs(known - centres), 99, axis=0)
    return centres.astype(np.float32), np.where(scales > 0, scales, 1).astype(np.float32)


def numbers_of(
    values: NDArray[np.float32],
    labels: list[str],
    *,
    unit: str,
    quantiles: tuple[NDArray[np.float32], int] | None = None,
) -> dict[str, Any]:
    """Return what `Transcript.numbers` holds.

    Parameters
    ----------
    values : array of shape (token, direction)
    labels : list of str
    unit : str
    quantiles : array of shape (direction, step), and of how many tokens, optional
    """
    centres, scales = scales_of(values)
    numbers = {
        "values": np.ascontiguousarray(values.T).reshape(-1),
        "tokens": len(values) if values.shape[1] else 0,
        "labels": labels,
        "centres": centres,
        "scales": scales,
        "unit": unit,
    }
    if quantiles is not None and len(quantiles[0]):
        numbers |= {"quantiles": quantiles[0].reshape(-1), "steps": quantiles[0].shape[1], "sampled": quantiles[1]}
    return numbers
