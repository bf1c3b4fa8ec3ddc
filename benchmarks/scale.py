"""`python -m benchmarks.scale`: calibrate and project 88 GB within 1 GB of memory.

A store of 50 rollouts, 685,000 tokens, 9 layers of width 7168, bfloat16: 88.4 GB, about 61 GB stored. Where that is
more than `--distinct` GB, files beyond them are hard links to the first ones; give more than the memory of the machine,
so that every byte is read from the disk. `--tokens N` makes it smaller, `--keep DIR` keeps the store for the next run.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np

import datastore
from benchmarks.measure import chill, peak_rss, size_of
from datastore import console, layout
from datastore.planning import lay_down
from datastore.schema import ComponentSpec, Plan, Rollout
from experiments.direction import Direction
from experiments.vectors import write_flat
from tests.synthetic import activations

WIDTH, LAYERS, ROLLOUTS, TOKENS = 7168, tuple(range(10, 55, 5)), 50, 685_000
SCORED = (LAYERS[4], LAYERS[5])
TRAITS = 11


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
    """Write the first chunks, link the others to them, and commit, which decodes and sums up every one of them."""
    plan = plan_of(store, tokens)
    chunk = plan.chunk_tokens["residual"]
    chunks = layout.n_chunks(plan.n_tokens, chunk)
    own = min(chunks, max(1, int(distinct * 1e9 / (chunk * WIDTH * 2 * len(LAYERS) / 1.43))))
    with datastore.create(store, plan) as writer:
        for one in plan.rollouts:
            start, stop = plan.ragged.range(plan.rows[one.rollout_id])
            rows = min(stop, own * chunk) - start
            for layer in LAYERS if rows > 0 else ():
                writer.put("residual", layer, one.rollout_id, activations(rows, WIDTH, seed=layer, start=start))
        if own == chunks:
            writer.commit()
            return
    group = lay_down(store, plan) / "group" / "residual" / "c"
    for index in range(own, chunks):
        for i in range(len(LAYERS)):
            target = group / str(index) / str(i) / "0"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            os.link(group / str(index % own) / str(i) / "0", target)
    with datastore.create(store, plan) as writer:
        writer.commit()


def vectors_file(root: Path) -> Path:
    """Write 11 random traits at two layers as one file."""
    random = np.random.default_rng(0)
    made = [
        Direction(trait=f"bench/t{i}", layer=layer, values=random.standard_normal(WIDTH).astype(np.float32))
        for i in range(TRAITS)
        for layer in SCORED
    ]
    return write_flat(root / "vectors.npz", made)


def timed(what: str, gigabytes: float, work: Callable[[], int]) -> dict[str, object]:
    """Run a command; return its rate, peak memory of all its processes, and seconds."""
    began = time.perf_counter()
    peak = work()
    seconds = time.perf_counter() - began
    return {"what": what, "GB": gigabytes, "GB/s": gigabytes / seconds, "peak_GB": peak / 1e9, "seconds": seconds}


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
        root = Path(str(directory))
        store = root / "run.zarr"
        rows: list[dict[str, object]] = []
        layer = asked.tokens * WIDTH * 2 / 1e9
        if not store.exists() or not any((store / "captures").glob("[0-9]*")):
            began = time.perf_counter()
            build(store, tokens=asked.tokens, distinct=asked.distinct)
            rows.append({"what": "build", "GB": layer * len(LAYERS), "seconds": time.perf_counter() - began})
        vectors = vectors_file(root)
        array = store / "captures" / "0001" / "residual"
        chill([array])
        memory = ("--memory", "1GB")
        rows.append(timed("calibrate", layer * len(LAYERS), lambda: peak_rss("calibrate", str(store), *memory)))
        chill([array])
        layers = ",".join(map(str, SCORED))
        words = (str(store), "--vectors", str(vectors), "--layers", layers, *memory, "--out", str(root / "scores.zarr"))
        rows.append(timed(f"project {TRAITS} traits on 2 layers", layer * 2, lambda: peak_rss("project", *words)))
        rows.append({"what": "stored, links counted each time", "GB": size_of(array) / 1e9})
    if asked.json:
        console.emit_json({"rows": rows})
        return
    for row in rows:
        shown = [f"{key} {value:.3g}" for key, value in row.items() if isinstance(value, float)]
        print(f"{row['what']}: {', '.join(shown)}")


if __name__ == "__main__":
    main()
