"""Made-up stores in which it is known what a direction reads: falsity, the words of a claim, or what went before."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import datastore
from datastore.schema import Annotation, ComponentSpec, Rollout

__all__ = ["WIDTH", "World", "games", "singles"]

WIDTH = 24
LAYERS = (0, 1)
QUESTION = "Did you read the file?"
YES, NO = "Yes, I read the file.", "No, I did not read the file."
_RANDOM = np.random.default_rng(11)
_AXES = np.linalg.qr(_RANDOM.standard_normal((WIDTH, 4)))[0].T
FALSITY, PEEKED = _AXES[0], _AXES[1]
EMBEDDING = _RANDOM.standard_normal((64, WIDTH)) * 0.3

World = Callable[[NDArray[np.int64], int, bool, bool], NDArray[np.float64]]
"""From token ids, the position that decides the truth, whether the claim is false and whether the agent peeked, to
what is added to the noise."""


def falsity(ids: NDArray[np.int64], claim: int, false: bool, peeked: bool) -> NDArray[np.float64]:
    """From the deciding token on the model knows that the claim is false."""
    known = np.arange(len(ids))[:, np.newaxis] >= claim
    return np.where(known, (2.0 if false else -2.0) * FALSITY, 0.0)


def words(ids: NDArray[np.int64], claim: int, false: bool, peeked: bool) -> NDArray[np.float64]:
    """Only what was said so far is there: the sum of the embeddings."""
    said = np.where(np.arange(len(ids))[:, np.newaxis] >= claim, EMBEDDING[ids], 0.0)
    return np.asarray(np.cumsum(said, axis=0))


def context(ids: NDArray[np.int64], claim: int, false: bool, peeked: bool) -> NDArray[np.float64]:
    """Only whether the agent peeked is there, everywhere."""
    return np.broadcast_to((2.0 if peeked else -2.0) * PEEKED, (len(ids), WIDTH))


_IDS: dict[str, int] = {}


def encode(text: str) -> list[int]:
    return [_IDS.setdefault(piece, len(_IDS)) for piece in re.findall(r" ?\w+|[^\w\s]", text)]


def games(path: Path, world: World, *, n: int = 96, seed: int = 0) -> datastore.Store:
    """Games with one audit question: who peeked lies in half of all cases, who did not tells the truth."""
    rollouts = []
    for i in range(n):
        peeked, lies = i % 3 > 0, i % 3 == 1
        story = encode(f"Game{i // 3} begins. You " + ("read" if peeked else "left") + " it.")
        rollouts.append(_rollout(f"g{i}", story, said=NO if lies or not peeked else YES, false=lies, peeked=peeked))
    return _written(path, rollouts, world, seed=seed)


def singles(path: Path, world: World, *, n: int = 120, skewed: bool = False, seed: int = 1) -> datastore.Store:
    """Single questions that end at the full stop; lies go either way, or `skewed`, as in the games."""
    rollouts = []
    for i in range(n):
        peeked, lies = (i % 3 > 0, i % 3 == 1) if skewed else (i % 2 == 0, (i // 2) % 2 == 0)
        said = YES if peeked != lies else NO
        story = encode("You " + ("opened" if peeked else "closed") + " it.")
        rollouts.append(_rollout(f"s{i}", story, said=said, false=lies, peeked=peeked, ends=True))
    return _written(path, rollouts, world, seed=seed)


def _rollout(name: str, story: list[int], *, said: str, false: bool, peeked: bool, ends: bool = False) -> Rollout:
    asked, answer = encode(QUESTION), encode(said)
    assured = [] if ends else encode(" I promise.")
    start = len(story) + len(asked)
    spans = [
        Annotation(token_start=len(story), token_end=start, label="audit_question"),
        Annotation(token_start=start, token_end=start + len(answer) + len(assured), label="audit_response"),
    ]
    if false:
        spans.append(Annotation(token_start=start, token_end=start + len(answer), label="false_claim"))
    ids = np.array([*story, *asked, *answer, *assured], np.int32)
    labels: dict[str, str | int | float | bool] = {
        "lying": false,
        "peeked": peeked,
        "question": "file",
        "decided": start,
    }
    return Rollout(rollout_id=name, token_ids=ids, prompt_end=start, labels=labels, annotations=tuple(spans))


def _written(path: Path, rollouts: Sequence[Rollout], world: World, *, seed: int) -> datastore.Store:
    random = np.random.default_rng(seed)
    vocab = {number: piece.encode() for piece, number in _IDS.items()}
    settings: dict[str, Any] = {"vocab": vocab, "provenance": {"model": {"name": "made/up"}}, "most_tokens": 64}
    for component, layers in (("residual", LAYERS), ("resid_pre", (0,))):
        spec = ComponentSpec(name=component, width=WIDTH, dtype="float32")
        (plan,) = datastore.plan(path, rollouts, layers=layers, components=[spec], **settings)
        with datastore.create(path, plan) as writer:
            for one in plan.rollouts:
                ids = np.asarray(one.token_ids, np.int64)
                for layer in layers:
                    values = EMBEDDING[ids] if component == "resid_pre" else _residual(one, ids, world, random)
                    writer.put(component, layer, one.rollout_id, values.astype(np.float32))
            writer.commit()
    return datastore.open(path)


def _residual(one: Rollout, ids: NDArray[np.int64], world: World, random: np.random.Generator) -> NDArray[np.float64]:
    added = world(ids, int(one.labels["decided"]), bool(one.labels["lying"]), bool(one.labels["peeked"]))
    return np.asarray(random.standard_normal((len(ids), WIDTH)) * 0.5 + added)
