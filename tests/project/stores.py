"""Small stores for the tests of projection: ragged rollouts of random activations, by the store's own writer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import datastore
from datastore.dtype import numpy_dtype
from datastore.schema import ComponentSpec, Rollout
from experiments.direction import Direction

__all__ = ["GOLDEN", "direction", "exact", "golden_store", "rollout", "values_of", "write_store"]

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "toy_experiment"


def rollout(name: str, n_tokens: int, *, seed: int = 0, **extra: Any) -> Rollout:
    """Make a rollout of random tokens, half of it response."""
    random = np.random.default_rng([seed, *name.encode()])
    ids = random.integers(0, 50, n_tokens).astype(np.int32)
    return Rollout(rollout_id=name, token_ids=ids, **{"prompt_end": n_tokens // 2, **extra})


def values_of(
    name: str, layer: int, *, n_tokens: int, width: int, dtype: str = "bfloat16", seed: int = 0
) -> NDArray[Any]:
    """The activations that `write_store` gives a rollout at a layer."""
    random = np.random.default_rng([seed, layer, *name.encode()])
    values = random.standard_normal((n_tokens, width))
    values[:, width // 3] += 40.0  # a massive dimension
    return values.astype(numpy_dtype(dtype))


def write_store(
    path: Path,
    rollouts: Sequence[Rollout],
    *,
    layers: Sequence[int] = (10, 15, 20),
    width: int = 24,
    dtype: str = "bfloat16",
    components: Sequence[str] = ("residual",),
    most_tokens: int = 16,
    statistics: bool = True,
    replace: bool = False,
    seed: int = 0,
    given: Mapping[tuple[str, int], NDArray[Any]] | None = None,
    model: str = "toy/it",
) -> datastore.Store:
    """Capture rollouts into a store and open it."""
    specs = [ComponentSpec(name=name, width=width, dtype=dtype) for name in components]
    plans = datastore.plan(
        path,
        rollouts,
        layers=layers,
        components=specs,
        most_tokens=most_tokens,
        statistics=statistics,
        replace=replace,
        provenance={"model": {"name": model, "revision": "1", "hidden_size": width}},
    )
    for plan in plans:
        with datastore.create(path, plan) as writer:
            for one in plan.rollouts:
                for layer in plan.layers:
                    for spec in plan.components:
                        made = (given or {}).get((one.rollout_id, layer))
                        if made is None:
                            made = values_of(
                                one.rollout_id, layer, n_tokens=one.n_tokens, width=width, dtype=dtype, seed=seed
                            )
                        writer.put(spec.name, layer, one.rollout_id, made)
            writer.commit()
    return datastore.open(path)


def direction(trait: str, layer: int, *, width: int = 24, seed: int = 0, **extra: Any) -> Direction:
    """Make a direction of random numbers."""
    values = np.random.default_rng([seed, layer, *trait.encode()]).standard_normal(width).astype(np.float32)
    return Direction(
        trait=trait, layer=layer, values=values, **{"method": "probe", "position": "response[:5]", **extra}
    )


def exact(values: NDArray[Any], vector: NDArray[Any]) -> NDArray[np.float64]:
    """The score in float64."""
    wide = np.asarray(vector, np.float64)
    found: NDArray[np.float64] = values.astype(np.float64) @ (wide / np.linalg.norm(wide))
    return found


def golden_store(path: Path) -> datastore.Store:
    """A store of the golden tree's raw rows: rollouts 1 to 3, layers 1, 3 and 5."""
    import ml_dtypes
    import torch  # seconds to load

    rollouts, given = [], {}
    for name in ("1", "2", "3"):
        raw = torch.load(GOLDEN / "inference/instruct/raw/residual/set1" / f"{name}.pt", weights_only=True)
        halves = [raw["prompt"], raw["response"]]
        ids = np.array([i for half in halves for i in half["token_ids"]], np.int32)
        rollouts.append(
            Rollout(rollout_id=name, token_ids=ids, prompt_end=len(halves[0]["token_ids"]), prompt_set="set1")
        )
        for layer in (1, 3, 5):
            rows = torch.cat([half["activations"][layer]["residual"] for half in halves])
            given[name, layer] = rows.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return write_store(path, rollouts, layers=(1, 3, 5), width=64, given=given)
