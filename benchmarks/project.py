"""`python -m benchmarks.project`: scores and calibration of a store against their parts alone and the .pt path.

Data: realistic bfloat16 activations of width 7168 on 9 layers, 34 rollouts of about 2,000 tokens, 10 GB before
compression, between the 6 and the 84 GB of the runs that this is for; half as many where the memory would not hold the
.pt files, which are to be warm, or `--rollouts N`. Rates are GB/s of the bytes of the layers that were asked for; files
are warm but where it says cold. Every rival is measured in the same rounds. What a projection costs once, however
small, follows from half of the rollouts beside all of them.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import psutil
from numpy.typing import NDArray

import calibrate
import datastore
import project
from benchmarks.calibrate import calibrate_pt
from benchmarks.measure import Row, alternate, chill, show
from benchmarks.store import CPUS, LAYERS, TOKENS, WIDTH, Data, decode_all, make_data, save_pt, write
from datastore import console, storage
from datastore.codec import ChunkDecoder
from experiments.direction import Direction
from project.distributed import cluster_runner
from project.scoring import one_blas_thread, score_block, scratch_for, unit_columns

ROLLOUTS, DIRECTIONS, ROUNDS = 34, 22, 5
LAYER = LAYERS[4]
RE_PROJECTION = "re-projection vs .pt path"


def directions(number: int, layer: int = LAYER) -> list[Direction]:
    """Make random directions at a layer."""
    random = np.random.default_rng(layer)
    made = [random.standard_normal(WIDTH).astype(np.float32) for _ in range(number)]
    return [Direction(trait=f"bench/t{i}", layer=layer, method="probe", values=v) for i, v in enumerate(made)]


def fresh(path: Path) -> None:
    """Remove the scores that a round left, and have the disk done with them before the next is timed."""
    for result in (path / "scores").glob("[0-9]*"):
        shutil.rmtree(result)
    storage.sync_files(path)


def projecting(path: Path, given: list[Direction], **settings: Any) -> Callable[[], object]:
    """Return a task that opens the store, projects, keeps the scores and reads them back."""
    return lambda: project.scores(datastore.open(path), given, **settings)


def multiply_all(values: NDArray[Any], matrix: NDArray[np.float32], tokens: int) -> None:
    """Multiply decoded chunks on all cores, one BLAS thread each."""

    def work(mine: int) -> None:
        scratch = scratch_for(WIDTH)
        for start in range(mine * tokens, len(values), CPUS * tokens):
            piece = values[start : start + tokens]
            score_block(piece, matrix, np.empty((len(piece), matrix.shape[1]), np.float32), scratch=scratch)

    with one_blas_thread(), ThreadPoolExecutor(CPUS) as pool:
        list(pool.map(work, range(CPUS)))


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """What projecting a layer can't do without, each alone on all cores: decoding its chunks, and multiplying.

    Attributes
    ----------
    data : Data
    decoder : ChunkDecoder
    encoded : list of bytes
        The chunks of the layer.
    """

    data: Data
    decoder: ChunkDecoder
    encoded: list[bytes]

    @classmethod
    def of(cls, path: Path, data: Data) -> Self:
        """Read the chunks of the layer."""
        array = path / "captures" / "0001" / "residual"
        decoder = ChunkDecoder.of(storage.array_metadata(array))
        assert decoder is not None
        return cls(data, decoder, [file.read_bytes() for file in array.glob(f"c/*/{LAYERS.index(LAYER)}/0")])

    def decode(self) -> None:
        """Decode the layer into buffers that are used again."""
        decode_all(self.decoder, self.encoded, self.data.rows.dtype)

    def multiply(self, number: int) -> Callable[[], None]:
        """Return a task that multiplies the decoded layer with so many directions."""
        matrix = unit_columns([one.values for one in directions(number)])
        return lambda: multiply_all(self.data.rows, matrix, self.decoder.tokens)


def project_pt(directory: Path, matrix: NDArray[np.float32]) -> None:
    """Load every file whole and project one layer along all directions in float32, as users do."""
    import torch

    columns = torch.from_numpy(matrix)
    for file in sorted(directory.glob("*.pt")):
        layers = torch.load(file, weights_only=True)["prompt"]["activations"]
        layers[LAYER]["residual"].float() @ columns


def bench_projection(root: Path, data: Data) -> list[Row]:
    """One layer and two, against the parts alone, the .pt path, and twice one layer."""
    path = root / "run.zarr"
    given, more = directions(DIRECTIONS), directions(DIRECTIONS, LAYERS[5])
    matrix, parts_of = unit_columns([one.values for one in given]), Parts.of(path, data)
    table = datastore.open(path).rollouts
    half = table.iloc[: len(table) // 2]  # as they lie on the token axis
    tasks = {
        "one": projecting(path, given),
        "half": projecting(path, given, rollouts=half),
        "two": projecting(path, [*given, *more]),
        "decode": parts_of.decode,
        "multiply": parts_of.multiply(DIRECTIONS),
        "pt": lambda: project_pt(root / "pt", matrix),
    }
    seconds = alternate(tasks, rounds=ROUNDS, before=lambda: fresh(path))
    rate = {name: data.layer_bytes / s / 1e9 for name, s in seconds.items()}
    parts = 1 / (1 / rate["decode"] + 1 / rate["multiply"])
    share = int(half["n_tokens"].sum()) / int(table["n_tokens"].sum())
    each = (seconds["one"] - seconds["half"]) / (1 - share)  # of the whole layer, without what a run costs once

    def cold() -> None:
        fresh(path)
        chill([path / "captures", root / "pt"])

    slow = alternate({name: tasks[name] for name in ("one", "pt")}, rounds=ROUNDS - 3, before=cold)
    far = {name: data.layer_bytes / s / 1e9 for name, s in slow.items()}
    what = f"projection of {DIRECTIONS} directions on 1 layer"
    alone = f"decode {rate['decode']:.2f} then multiply {rate['multiply']:.2f}"
    bound = f".pt files loaded whole; those parts alone {parts / rate['pt']:.1f} x"
    once = f"half of the rollouts; once a run {1e3 * (seconds['one'] - each):.0f} ms"
    return [
        Row.of(what, rate["one"], "GB/s", alone, parts, 0.7),
        Row.of(once, share * data.layer_bytes / seconds["half"] / 1e9, "GB/s", "the same parts", parts),
        Row.of(RE_PROJECTION, rate["one"], "GB/s", bound, rate["pt"], 6.0),
        Row.of("the same, files cold", far["one"], "GB/s", ".pt files loaded whole", far["pt"], None),
        Row.of("two layers", seconds["two"], "s", "twice one layer", 2 * seconds["one"], 1.05, at_most=True),
    ]


def bench_growing(root: Path, data: Data) -> Row:
    """Adding a direction to 22 that are computed, against computing 23; beside it the least that the parts allow.

    Both decode the same chunks, so that only the multiplication is saved.
    """
    path, given, parts = root / "run.zarr", directions(DIRECTIONS + 1), Parts.of(root / "run.zarr", data)
    alone = {"decode": parts.decode, "added": parts.multiply(1), "anew": parts.multiply(DIRECTIONS + 1)}
    seconds: list[dict[str, float]] = []
    for _ in range(ROUNDS):
        fresh(path)
        projecting(path, given[:-1])()
        storage.sync_files(path)
        grown = alternate({"added": projecting(path, given)}, rounds=1)
        fresh(path)
        seconds.append(grown | alternate({"anew": projecting(path, given)}, rounds=1))
    middle = {name: float(np.median([one[name] for one in seconds])) for name in ("added", "anew")}
    least = alternate(alone, rounds=ROUNDS)
    floor = (least["decode"] + least["added"]) / (least["decode"] + least["anew"])
    against = f"projecting 23 anew; the parts alone {floor:.2f} x"
    return Row.of("adding 1 direction to 22", middle["added"], "s", against, middle["anew"], 0.5, at_most=True)


def bench_distributed(root: Path, data: Data) -> Row:
    """Two dask processes, started before, against the in-process pool."""
    path, given = root / "run.zarr", directions(DIRECTIONS)
    with cluster_runner(workers=2) as runner:
        fresh(path)
        projecting(path, given, runner=runner)()  # workers import on their first task
        tasks = {"dask": projecting(path, given, runner=runner), "pool": projecting(path, given)}
        seconds = alternate(tasks, rounds=ROUNDS, before=lambda: fresh(path))
    rate = {name: data.layer_bytes / s / 1e9 for name, s in seconds.items()}
    return Row.of("dask.distributed, 2 processes", rate["dask"], "GB/s", "the in-process pool", rate["pool"], 0.5)


def bench_calibration(root: Path, data: Data) -> list[Row]:
    """Calibration from what was kept, against the full pass over .pt files; with its pass, against projection."""
    path = root / "run.zarr"
    seconds = alternate(
        {
            "kept": lambda: calibrate.fit(datastore.open(path), passes=False),
            "pt": lambda: calibrate_pt(root / "pt"),
            "pass": lambda: calibrate.fit(datastore.open(path), layers=LAYER),
            "one": projecting(path, directions(DIRECTIONS)),
        },
        rounds=ROUNDS - 2,
        before=lambda: fresh(path),
    )
    rate = {name: data.layer_bytes / seconds[name] / 1e9 for name in ("pass", "one")}
    speed = {name: 1 / seconds[name] for name in ("kept", "pt")}
    return [
        Row.of(
            "calibrations from the statistics, 9 layers", speed["kept"], "/s", "the pass over .pt", speed["pt"], 100
        ),
        Row.of("calibration of 1 layer with its pass", rate["pass"], "GB/s", "projection of it", rate["one"], 0.8),
    ]


@contextmanager
def workplace() -> Iterator[Path]:
    """A directory for stores and files, removed in the end."""
    with tempfile.TemporaryDirectory(prefix="bench-project-", dir=os.environ.get("BENCH_DIR")) as directory:
        yield Path(directory)


def rollouts_that_fit() -> int:
    """Return how many rollouts to make: the .pt files take at most half of the memory, so that they stay warm."""
    pt = ROLLOUTS * TOKENS * WIDTH * 2 * len(LAYERS)
    return ROLLOUTS if 2 * pt <= psutil.virtual_memory().total else ROLLOUTS // 2


def main(arguments: list[str]) -> None:
    """Run the benchmark."""
    wanted = int(arguments[arguments.index("--rollouts") + 1]) if "--rollouts" in arguments else rollouts_that_fit()
    as_json = "--json" in arguments
    with workplace() as root:
        data = make_data(wanted)
        needed, free = 1.8 * data.all_bytes, shutil.disk_usage(root).free
        if free < needed:
            sys.exit(
                f"error: the store and the .pt files take {needed / 1e9:.0f} GB, and {root.parent} has "
                f"{free / 1e9:.0f}; name another place with BENCH_DIR, or fewer than {wanted} --rollouts"
            )
        write(root / "run.zarr", data, statistics=True)
        save_pt(root / "pt", data)
        rows = [*bench_projection(root, data), bench_growing(root, data), bench_distributed(root, data)]
        rows += bench_calibration(root, data)
    show(f"projection, {CPUS} cores, {data.all_bytes / 1e9:.1f} GB", rows, as_json=as_json)
    if not as_json:
        (ratio,) = (row.ratio for row in rows if row.what == RE_PROJECTION)
        console.stdout().print(f"{RE_PROJECTION}: {ratio:.1f} x")


if __name__ == "__main__":
    main(sys.argv[1:])
