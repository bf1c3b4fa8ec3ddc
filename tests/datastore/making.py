"""Small stores for tests: rollouts and rows that are a function of their names, their captures, and what is on disk."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

import datastore
from datastore.dtype import numpy_dtype
from datastore.schema import Annotation, ComponentSpec, Plan, Rollout
from datastore.union import load_union
from datastore.writer import Writer

RESIDUAL = ComponentSpec(name="residual", width=16, dtype="bfloat16", hook="model.layers.{layer}")
KEYS = ComponentSpec(name="k_proj", width=6, dtype="float32", hook="model.layers.{layer}.self_attn.k_proj")
BOTH = (RESIDUAL, KEYS)
MODEL = {"model": {"name": "toy", "revision": "1", "dtype": "bfloat16", "hidden_size": 16}}


def rollout(name: str, n_tokens: int, *, tokens: int = 0, **known: Any) -> Rollout:
    """Return a rollout whose tokens are a function of its name, its length and the variant `tokens`."""
    random = np.random.default_rng([zlib.crc32(name.encode()), n_tokens, tokens])
    given: dict[str, Any] = {"prompt_end": n_tokens // 2, "labels": {"length": n_tokens, "name": name}} | known
    return Rollout(rollout_id=name, token_ids=random.integers(0, 50, n_tokens, dtype=np.int32), **given)


def rollouts(*counts: int) -> list[Rollout]:
    """Return rollouts "0", "1" and so on with these numbers of tokens, some with annotations and tags."""
    span = (Annotation(token_start=0, token_end=1, label="first"),)
    return [
        rollout(
            str(i), n, role=np.full(n, i % 5), turn=np.full(n, i), annotations=span * (i % 2), tags=("a", "b")[: i % 3]
        )
        for i, n in enumerate(counts)
    ]


def values(spec: ComponentSpec, layer: int, one: Rollout, *, version: int = 0) -> NDArray[Any]:
    """Return the rows of one rollout, a function of everything that names them."""
    seed = zlib.crc32(f"{spec.name}/{layer}/{one.rollout_id}/{one.token_sha256}/{version}".encode())
    rows = np.random.default_rng(seed).standard_normal((one.n_tokens, spec.width)) * 3
    return rows.astype(numpy_dtype(spec.dtype))


def plans(path: Path, asked: Sequence[Rollout], layers: Iterable[int] = (1, 5), **options: Any) -> tuple[Plan, ...]:
    """Plan with chunks of 16 tokens, batches of 40 and both components."""
    given: dict[str, Any] = {
        "components": BOTH,
        "provenance": MODEL,
        "batch_tokens": 40,
        "most_tokens": 16,
        "vocab": {i: bytes([65 + i % 26]) for i in range(50)},
    } | options
    return datastore.plan(path, asked, layers=layers, **given)


def rows_of(plan: Plan) -> list[tuple[ComponentSpec, int, Rollout]]:
    """Return all cells of a plan, in the order in which a model gives them."""
    return [(spec, n, plan.rollouts[plan.rows[i]]) for b in plan.batches for n in plan.layers for i in b.stored
            for spec in plan.components]  # fmt: skip


def fill(writer: Writer, *, version: int = 0) -> None:
    """Put all rows of a writer's plan."""
    for spec, layer, one in rows_of(writer.plan):
        writer.put(spec.name, layer, one.rollout_id, values(spec, layer, one, version=version))


def capture(path: Path, asked: Sequence[Rollout], layers: Iterable[int] = (1, 5), **options: Any) -> list[int]:
    """Plan, fill and commit; return the numbers of the captures."""
    version, numbers = options.pop("version", 0), []
    for plan in plans(path, asked, layers, **options):
        with datastore.create(path, plan) as writer:
            fill(writer, version=version)
            number = writer.commit()
            assert number is not None
            numbers.append(number)
    return numbers


def read(path: Path, component: str, layer: int, rollout_id: str) -> NDArray[Any]:
    """Read one cell with the union and zarr-python, nothing of ours between."""
    cell = load_union(path).cell(component, layer, rollout_id)
    start, stop = cell.tokens
    array = zarr.open_array(cell.capture.path / component, mode="r")
    return np.asarray(array[start:stop, cell.capture.layers.index(layer), :])


def same_bits(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """Whether two arrays have the same dtype, shape and bytes."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def on_disk(path: Path) -> dict[str, bytes]:
    """Return every file below `path`, the one timestamp of each capture blotted out."""
    found = {}
    for file in sorted(path.rglob("*")):
        if file.is_file():
            raw = file.read_bytes()
            if file.name == "zarr.json":
                meta = json.loads(raw)
                if "created" in meta.get("attributes", {}):
                    raw = raw.replace(meta["attributes"]["created"].encode(), b"NOW")
            found[file.relative_to(path).as_posix()] = raw
    return found
