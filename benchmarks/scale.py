"""`python -m benchmarks.scale`: calibrate and project 88 GB within 1 GB of memory.

A store of 50 rollouts, 685,000 tokens, 9 layers of width 7168, bfloat16: 88.4 GB, about 61 GB stored. Where that is
more than `--distinct` GB, the layers beyond them are hard links to the first ones; give more than the memory of the
machine, so that every byte is read from the disk. `--tokens N` makes it smaller, `--keep DIR` keeps the store for the
next run.
"""

import argparse
import math
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np

import datastore
from benchmarks.measure import chill, peak_rss, size_of
from datastore import console, layout, storage
from datastore.planning import lay_down
from datastore.schema import ComponentSpec, Plan, Rollout
from experiments.direction import Direction
from experiments.vectors import write_flat
from tests.synthetic import activations

WIDTH, LAYERS, ROLLOUTS, TOKENS = 7168, tuple(range(10, 55, 5)), 50, 685_000
SCORED = (LAYERS[4], LAYERS[5])
TRAITS = 11
FAR = 1 << 24
"""Tokens of the stream of rows between one layer's and the next one's, so that no two chunks are equal."""


def plan_of(store: Path, tokens: int) -> Plan:
    """Plan the whole capture."""
    counts = np.full(ROLLOUTS, tokens // ROLLOUTS) + np.arange(ROLLOUTS) - ROLLOUTS // 2
    rollouts = [
        Rollout(rollout_id=str(i), token_ids=np.arange(n, dtype=np.int32), prompt_end=int(n) // 2)
        for i, n in enumerate(counts)
    ]
    component = ComponentSpec(name="residual", width=WIDTH, dtype="bfloat16")
    (plan,) = datastore.plan(store, rollouts, layers=LAYERS, components=[component], batch_tokens=1)
    return plan


def build(store: Path, *, tokens: int, distinct: float) -> None:
    """Write the first layers, link the others to them in turn, and commit, which decodes and sums up every chunk.

    Commands read layer by layer: between a file and the next link to it lie all the distinct bytes.
    """
    plan = plan_of(store, tokens)
    stored = plan.n_tokens * WIDTH * 2 / 1.43 / 1e9  # GB a layer
    own = min(len(LAYERS), max(1, math.ceil(distinct / stored)))
    with datastore.create(store, plan) as writer:
        for one in plan.rollouts:
            start, stop = plan.ragged.range(plan.rows[one.rollout_id])
            for layer in LAYERS[:own]:
                rows = activations(stop - start, WIDTH, seed=0, start=layer * FAR + start)
                writer.put("residual", layer, one.rollout_id, rows)
        if own == len(LAYERS):
            writer.commit()
            return
    group = lay_down(store, plan) / "group" / "residual" / "c"
    for index in range(layout.n_chunks(plan.n_tokens, plan.chunk_tokens["residual"])):
        for i in range(own, len(LAYERS)):
            target = group / str(index) / str(i) / "0"
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(group / str(index) / str(i % own) / "0", target)
    with datastore.create(store, plan) as writer:
        writer.commit()


def vectors_file(root: Path) -> Path:
    """Write 11 random traits at every layer as one file."""
    random = np.random.default_rng(0)
    made = [
        Direction(trait=f"bench/t{i}", layer=layer, values=random.standard_normal(WIDTH).astype(np.float32))
        for i in range(TRAITS)
        for layer in LAYERS
    ]
    return write_flat(root / "vectors.npz", made)


def timed(what: str, gigabytes: float, work: Callable[[], int]) -> dict[str, object]:
    """Run a command; return its rate, peak memory of all its processes, seconds, and seconds of a core."""
    began, before = time.perf_counter(), os.times()
    peak = work()
    seconds, after = time.perf_counter() - began, os.times()
    cores = after.children_user + after.children_system - before.children_user - before.children_system
    rates = {"GB/s": gigabytes / seconds, "GB per core second": gigabytes / cores}
    return {"what": what, "GB": gigabytes, **rates, "peak_GB": peak / 1e9, "seconds": seconds, "core seconds": cores}


def measured(root: Path, *, tokens: int, distinct: float) -> list[dict[str, object]]:
    """Build the store, unless it is there, and run the commands on it, its files cold."""
    store = root / "run.zarr"
    rows: list[dict[str, object]] = []
    layer = tokens * WIDTH * 2 / 1e9
    if not any((store / "captures").glob("[0-9]*")):
        began = time.perf_counter()
        build(store, tokens=tokens, distinct=distinct)
        storage.sync_files(root)  # a result waits for everything that is not on the disk yet
        rows.append({"what": "build", "GB": layer * len(LAYERS), "seconds": time.perf_counter() - began})
    vectors = vectors_file(root)
    array = store / "captures" / "0001" / "residual"
    memory = ("--memory", "1GB")
    chill([array])
    whole = partial(peak_rss, "calibrate", str(store), *memory, every=0.2)
    rows.append(timed("calibrate 9 layers", layer * len(LAYERS), whole))
    for layers in (SCORED, LAYERS):
        chill([array])
        out = ("--out", str(root / f"scores{len(layers)}.zarr"))
        words = (str(store), "--vectors", str(vectors), "--layers", ",".join(map(str, layers)), *memory, *out)
        what = f"project {TRAITS} traits on each of {len(layers)} layers"
        rows.append(timed(what, layer * len(layers), partial(peak_rss, "project", *words, every=0.2)))
    return [*rows, {"what": "stored, links counted each time", "GB": size_of(array) / 1e9}]


def main() -> None:
    """Build, calibrate, project all rollouts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--distinct", type=float, default=30.0, metavar="GB")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    if asked.keep is not None:
        asked.keep.mkdir(parents=True, exist_ok=True)
    place = nullcontext(asked.keep) if asked.keep is not None else tempfile.TemporaryDirectory(prefix="bench-scale-")
    with place as directory:
        rows = measured(Path(str(directory)), tokens=asked.tokens, distinct=asked.distinct)
    if asked.json:
        console.emit_json({"rows": rows})
        return
    for row in rows:
        shown = [f"{key} {value:.3g}" for key, value in row.items() if isinstance(value, float)]
        print(f"{row['what']}: {', '.join(shown)}")


if __name__ == "__main__":
    main()
