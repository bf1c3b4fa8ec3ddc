"""`python -m benchmarks.calibrate`: calibration from the statistics against .pt files, and its pass against projection.

Data: that of `benchmarks.store`, twice as much: 4.2 GB. The `.pt` path is the users': one file a rollout, loaded whole,
each layer cast to float32, both rankings of dimensions, alignment and norms found with torch.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

import calibrate
import datastore
from benchmarks.measure import Row, alternate, peak_rss, show
from benchmarks.store import CPUS, LAYERS, WIDTH, Data, make_data, save_pt, write
from experiments.direction import Direction
from project.run import scores

ROUNDS, ROLLOUTS = 3, 16
LAYER = LAYERS[4]


def calibrate_pt(directory: Path) -> None:
    """Make the users' calibration of all layers from their files, with float32 sums."""
    import torch

    sums: dict[int, torch.Tensor] = {}
    for file in sorted(directory.glob("*.pt")):
        layers = torch.load(file, weights_only=True)["prompt"]["activations"]
        for layer, components in layers.items():
            values = components["residual"].float()
            values.abs().amax(dim=0).topk(5)
            values.abs().mean(dim=0)
            mean = values.mean(dim=0)
            lengths = values.norm(dim=-1)
            ((values / (lengths[:, None] + 1e-8)) @ (mean / (mean.norm() + 1e-8))).mean()
            sums[layer] = sums.get(layer, torch.zeros(WIDTH)) + values.sum(dim=0)
    for total in sums.values():
        total.abs().topk(5)


def directions(n: int) -> list[Direction]:
    """Make random unit directions of the layer."""
    rng = np.random.default_rng(3)
    return [
        Direction(
            values=rng.standard_normal(WIDTH, np.float32),
            trait=f"bench/{i}",
            layer=LAYER,
            method="random",
            position="response[:]",
        )
        for i in range(n)
    ]


def bench(root: Path, data: Data) -> list[Row]:
    """Measure all of it in the same rounds."""
    write(root / "run.zarr", data, statistics=True)
    save_pt(root / "pt", data)
    store = datastore.open(root / "run.zarr")
    wanted = directions(22)
    seconds = alternate(
        {
            "statistics": lambda: calibrate.fit(store, passes=False),
            "pt": lambda: calibrate_pt(root / "pt"),
            "pass": lambda: calibrate.fit(store, layers=LAYER),
            "projection": lambda: scores(store, wanted, out=root / "scores.zarr"),
        },
        rounds=ROUNDS,
        before=lambda: shutil.rmtree(root / "scores.zarr", ignore_errors=True),
    )
    return _rows(seconds, layer_bytes=data.layer_bytes)


def _rows(seconds: dict[str, float], *, layer_bytes: int) -> list[Row]:
    rate = {name: layer_bytes / one / 1e9 for name, one in seconds.items()}
    return [
        Row(
            what=f"calibration of {len(LAYERS)} layers from the statistics",
            value=seconds["statistics"],
            unit="s",
            rival="full pass over .pt files",
            rival_value=seconds["pt"],
            ratio=seconds["pt"] / seconds["statistics"],
            target=100,
        ),
        Row(
            what="calibration of one layer with its pass",
            value=rate["pass"],
            unit="GB/s",
            rival="projection of 22 directions",
            rival_value=rate["projection"],
            ratio=rate["pass"] / rate["projection"],
            target=0.8,
        ),
    ]


def bench_memory(root: Path) -> Row:
    """Peak memory of a process that calibrates all layers with its pass."""
    peak = peak_rss("calibrate", str(root / "run.zarr"), "--memory", "1GB", "--json")
    return Row(
        what="peak memory, calibrate 4.2 GB with --memory 1GB",
        value=peak / 1e9,
        unit="GB",
        rival="the allowance",
        rival_value=1.0,
        ratio=peak / 1e9,
        target=1.0,
        at_most=True,
    )


def main(arguments: list[str]) -> None:
    """Run the benchmark."""
    with tempfile.TemporaryDirectory(prefix="bench-calibrate-", dir=os.environ.get("BENCH_DIR")) as directory:
        root, data = Path(directory), make_data(ROLLOUTS)
        rows = bench(root, data)
        del data
        rows.append(bench_memory(root))
    show(f"calibrate, {CPUS} cores", rows, as_json="--json" in arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
