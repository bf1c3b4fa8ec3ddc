"""Stores for the tests of calibration, built from rows given, cut into chunks and captures as a test likes."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

import datastore
from datastore import schema
from datastore.schema import ComponentSpec, Rollout

Rows = Mapping[str, Mapping[int, NDArray[Any]]]
"""Rollout id -> layer -> rows (tokens, width)."""


def kept(level: str) -> AbstractContextManager[object]:
    """Let captures keep their statistics for each rollout or only as a whole, whatever that costs."""
    return patch.object(schema, "STATS_SHARE", {"rollout": 1e9, "capture": 0.0, "none": 0.0}[level])


def random_rows(
    seed: int, lengths: Sequence[int], layers: Sequence[int], *, width: int = 16, dtype: Any = ml_dtypes.bfloat16
) -> Rows:
    """Rows of rollouts "0", "1", ... with one large dimension, each layer with its own mean."""
    rng = np.random.default_rng(seed)
    scale = np.where(np.arange(width) == 3, 300.0, 1.0)

    def make(n: int, layer: int) -> NDArray[Any]:
        centre = np.random.default_rng((seed, layer)).standard_normal(width)
        return (scale * (centre + rng.standard_normal((n, width)))).astype(dtype)

    return {str(i): {layer: make(n, layer) for layer in layers} for i, n in enumerate(lengths)}


def build(
    path: Path,
    components: Mapping[str, Rows],
    prompt_ends: Mapping[str, int],
    *,
    level: str = "rollout",
    most_tokens: int = 8,
    captures: Sequence[Sequence[str]] | None = None,
    model: str = "toy/it",
) -> datastore.Store:
    """Write a store, the rollouts of each of `captures` in a capture of its own."""
    first = next(iter(components.values()))
    layers = sorted(next(iter(first.values())))
    for names in captures or [list(first)]:
        rollouts = [
            Rollout(
                rollout_id=name,
                token_ids=np.arange(len(first[name][layers[0]]), dtype=np.int32) + int(name),
                prompt_end=prompt_ends[name],
            )
            for name in names
        ]
        some = {name: next(iter(rows.values()))[layers[0]] for name, rows in components.items()}
        specs = [ComponentSpec(name=name, width=v.shape[1], dtype=v.dtype.name) for name, v in some.items()]
        with kept(level):
            plans = datastore.plan(
                path,
                rollouts,
                layers=layers,
                components=specs,
                provenance={"model": {"name": model, "hidden_size": specs[0].width}},
                most_tokens=most_tokens,
                statistics=level != "none",
            )
            for plan in plans:
                _fill(path, plan, components)
    return datastore.open(path)


def _fill(path: Path, plan: datastore.Plan, components: Mapping[str, Rows]) -> None:
    with datastore.create(path, plan) as writer:
        for component in plan.components:
            for layer in plan.layers:
                for rollout in plan.rollouts:
                    name = rollout.rollout_id
                    writer.put(component.name, layer, name, components[component.name][name][layer])
        writer.commit()
