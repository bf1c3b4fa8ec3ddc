"""Small stores for the tests of the viewer: games played twice from one prefix, honestly and with a lie planted."""

import fcntl
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import calibrate
import datastore
import project
from datastore.schema import Annotation, ComponentSpec, Rollout
from experiments.direction import Direction

__all__ = [
    "FIRST_MOVE",
    "FORK",
    "LAYERS",
    "TRAITS",
    "WIDTH",
    "directions",
    "game_store",
    "long_store",
    "once",
    "plain_store",
]

WIDTH = 32
LAYERS = (4, 8, 12)
FORK = 40
TRAITS = ("bs/lying", "bs/evasion", "mood/calm")
FIRST_MOVE = {"bs/lying": 2, "bs/evasion": 9}
"""Tokens after the fork from which a lie was planted along a trait."""
WORDS = (
    "the ",
    "number ",
    "is ",
    "seven",
    ", ",
    "no ",
    "I ",
    "did ",
    "not ",
    "peek",
    ". ",
    "guess ",
    "<b>&",
    "ünï ",
    "?\n",
)
TOOL, ASSISTANT, USER, SYSTEM = 4, 3, 2, 1


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """Return a directory of stores that no test changes, made by the first of the test processes that asks for it."""
    base = factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    root.mkdir(exist_ok=True)
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / "stores").exists():
            making = factory.mktemp(name)
            make(making)
            making.rename(root / "stores")
    return root / "stores"


def directions(traits: Sequence[str] = TRAITS, layers: Sequence[int] = LAYERS[:2]) -> list[Direction]:
    """The directions that were planted: one unit axis a trait, bent a little from layer to layer."""
    return [
        Direction(trait=trait, layer=layer, values=_axis(i, layer), method="probe", position="response[:5]")
        for i, trait in enumerate(traits)
        for layer in layers
    ]


def _axis(trait: int, layer: int) -> NDArray[np.float32]:
    values = np.zeros(WIDTH, np.float32)
    values[2 + trait % (WIDTH - 2)] = 1.0
    values[1 + (trait + layer) % (WIDTH - 2)] += 0.3
    values[0] = 0.05  # some of the massive dimension leaks into every score
    return values


def _tokens(name: str, game: int, n_tokens: int) -> NDArray[np.int32]:
    shared = np.random.default_rng([7, game]).integers(0, len(WORDS), n_tokens)
    own = np.random.default_rng([8, *name.encode()]).integers(0, len(WORDS), n_tokens)
    own[FORK] = (shared[FORK] + 1 + (name.endswith("lie"))) % len(WORDS)  # they do part here
    return np.concatenate([shared[:FORK], own[FORK:]]).astype(np.int32)


def game_rollout(game: int, kind: str, *, n_tokens: int = 72) -> Rollout:
    """One side of a game: a system line, a question, thinking, a tool's answer, and the reply in which it parts."""
    name = f"g{game}-{kind}"
    role, turn = np.zeros(n_tokens, np.int8), np.zeros(n_tokens, np.int32)
    for start, code, number in ((0, SYSTEM, 0), (8, USER, 1), (20, ASSISTANT, 2), (30, TOOL, 3), (36, ASSISTANT, 4)):
        role[start:], turn[start:] = code, number
    thinking = np.zeros(n_tokens, bool)
    thinking[20:26] = True
    spans = [Annotation(token_start=FORK + 2, token_end=FORK + 8, label="false_claim")] if kind == "lie" else []
    return Rollout(
        rollout_id=name,
        token_ids=_tokens(name, game, n_tokens),
        prompt_end=20,
        role=role,
        turn=turn,
        thinking=thinking,
        labels={"label": "honest" if kind == "honest" else "fabrication", "stakes": game % 3},
        annotations=(Annotation(token_start=36, token_end=60, label="audit_response"), *spans),
        tags=("audit",),
        prompt_set="games" if game % 2 == 0 else "single_turn",
    )


def activations(one: Rollout, layer: int) -> NDArray[np.float32]:
    """Noise that twins share up to the fork; a lie moves along its traits at the tokens of FIRST_MOVE."""
    game = int(one.rollout_id[1:].split("-")[0])
    shared = np.random.default_rng([1, game, layer]).standard_normal((one.n_tokens, WIDTH))
    own = np.random.default_rng([2, layer, *one.rollout_id.encode()]).standard_normal((one.n_tokens, WIDTH))
    values = np.concatenate([shared[:FORK], own[FORK:]]).astype(np.float32) * 0.3
    values[:, 0] += 30.0
    values[0] *= 8  # first tokens are enormous, as in real models
    if one.rollout_id.endswith("lie"):
        for trait, after in FIRST_MOVE.items():
            values[FORK + after :, 2 + TRAITS.index(trait)] += 3.0
    return values


def write(
    path: Path,
    rollouts: Sequence[Rollout],
    rows: Any,
    *,
    vocab: Mapping[int, bytes] | None,
    components: Sequence[str] = ("residual",),
    layers: Sequence[int] = LAYERS,
) -> datastore.Store:
    """Capture rollouts whose rows a function makes; a component beside the residual holds them in reverse order."""
    (plan,) = datastore.plan(
        path,
        rollouts,
        layers=layers,
        components=[ComponentSpec(name=name, width=WIDTH, dtype="float32") for name in components],
        provenance={"model": {"name": "toy/liar", "revision": "1", "hidden_size": WIDTH}},
        vocab=vocab,
    )
    with datastore.create(path, plan) as writer:
        for one in plan.rollouts:
            for layer in plan.layers:
                values = rows(one, layer)
                for name in components:
                    writer.put(name, layer, one.rollout_id, values if name == "residual" else values[:, ::-1])
        writer.commit()
    return datastore.open(path)


def vocabulary() -> dict[int, bytes]:
    """The bytes of every token id."""
    return {i: word.encode() for i, word in enumerate(WORDS)}


def plain_store(path: Path, *, pairs: int = 4, vocab: bool = True) -> datastore.Store:
    """Games without scores; without text too, if asked."""
    rollouts = [game_rollout(game, kind) for game in range(pairs) for kind in ("honest", "lie")]
    return write(path, rollouts, activations, vocab=vocabulary() if vocab else None)


def game_store(path: Path, *, pairs: int = 4) -> datastore.Store:
    """Games with a calibration and scores of three traits at two layers."""
    store = plain_store(path, pairs=pairs)
    calibrate.save(calibrate.fit(store))
    project.scores(store, directions())
    return datastore.open(path)


def long_store(path: Path, *, n_tokens: int = 14_000, traits: int = 11, others: int = 2) -> datastore.Store:
    """One long rollout, and short ones beside it, scored along many traits at two layers."""
    ids = np.random.default_rng(3).integers(0, len(WORDS), n_tokens).astype(np.int32)
    turn = (np.arange(n_tokens) // 500).astype(np.int32)
    role = np.where(turn % 2 == 0, USER, ASSISTANT).astype(np.int8)
    long = Rollout(rollout_id="long", token_ids=ids, prompt_end=500, role=role, turn=turn, labels={"label": "honest"})
    short = [
        Rollout(rollout_id=f"s{i}", token_ids=ids[:64] + 0, prompt_end=20, labels={"label": "honest"})
        for i in range(others)
    ]

    def rows(one: Rollout, layer: int) -> NDArray[np.float32]:
        random = np.random.default_rng([layer, *one.rollout_id.encode()])
        values = random.standard_normal((one.n_tokens, WIDTH)).cumsum(axis=0) / 30
        values[:, 0] += 30
        return values.astype(np.float32)

    store = write(path, [long, *short], rows, vocab=vocabulary())
    calibrate.save(calibrate.fit(store))
    project.scores(store, directions([f"set/trait {i}" for i in range(traits)]))
    return datastore.open(path)
