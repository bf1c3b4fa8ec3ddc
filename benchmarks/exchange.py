"""`python -m benchmarks.exchange`: import and export against loading, writing and torch.save; opening; a select.

Data: as in benchmarks.store, one .pt file a rollout, 2.1 GB before compression; BENCH_ROLLOUTS=2 makes less. Rates
are GB/s of those bytes. Import and export run as a user runs them, checks, hashes and syncs included.
"""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

import datastore
from benchmarks import store as store_bench
from benchmarks.measure import Row, alternate, peak_rss, show, size_of
from benchmarks.store import CPUS, LAYERS, WIDTH, Data, make_data, write
from capture import exporting, importing
from datastore import storage
from datastore.schema import ComponentSpec, Rollout
from experiments.rawfiles import write_raw

MANY, FEW = 10_000, 10
ROUNDS = 3


def make_tree(directory: Path, data: Data) -> None:
    """Write one .pt file a rollout in the users' form."""
    directory.mkdir()
    start = 0
    for one in data.rollouts:
        rows = data.rows[start : start + one.n_tokens]
        start += one.n_tokens
        record = {"token_ids": one.token_ids.tolist(), "prompt_end": one.prompt_end, "tokens": ["x"] * one.n_tokens}
        write_raw(directory / f"{one.rollout_id}.pt", {("residual", layer): rows for layer in LAYERS}, record)
    storage.sync_files(directory)


def load_all(directory: Path) -> None:
    """Load every file whole, one at a time, as users do."""
    import torch

    for file in sorted(directory.glob("*.pt")):
        torch.load(file, weights_only=True)


def import_all(source: Path, path: Path) -> None:
    """Import as the command does."""
    asked = importing.survey(source)
    importing.carry_out(asked, path, plan=lambda: importing.plans_of(asked, path))


def export_all(path: Path, directory: Path) -> None:
    """Export as the command does."""
    opened = datastore.open(path)
    exports = exporting.plan_of(opened, directory, form="pt", rollouts=[str(i) for i in opened.rollouts.index])
    exporting.carry_out(opened, directory, exports)


def save_all(source: Path, directory: Path, seconds: list[float]) -> None:
    """Save the same tensors, all in memory, with torch.save, and sync as export does; the time goes into `seconds`.

    Loading is not timed. Done file by file between the saves, it would give the disk time to take the last one unseen.
    """
    import torch

    directory.mkdir()
    parts = {file.name: torch.load(file, weights_only=True) for file in sorted(source.glob("*.pt"))}
    began = time.perf_counter()
    for name, one in parts.items():
        torch.save(one, directory / name)
    storage.sync_files(directory)
    seconds.append(time.perf_counter() - began)


def read_all(path: Path) -> None:
    """Read and decode every row of a store."""
    opened = datastore.open(path)
    for _ in opened.blocks("residual", layers=opened.layers):
        pass


def fresh(path: Path, work: Callable[[], None]) -> Callable[[], None]:
    """Return the work with what it makes removed first."""

    def run() -> None:
        for old in (path, path.with_name(f"{path.name}.plans")):
            shutil.rmtree(old, ignore_errors=True)
        work()

    return run


def bench_rates(root: Path, data: Data) -> list[Row]:
    """Import against the lower of loading and writing; export against torch.save of the same tensors."""
    tree, saves = root / "tree", list[float]()
    import_all(tree, root / "from.zarr")
    seconds = alternate(
        {
            "load": lambda: load_all(tree),
            "write": fresh(root / "w.zarr", lambda: write(root / "w.zarr", data, statistics=True)),
            "import": fresh(root / "i.zarr", lambda: import_all(tree, root / "i.zarr")),
            "save": fresh(root / "s", lambda: save_all(tree, root / "s", saves)),
            "export": fresh(root / "e", lambda: export_all(root / "from.zarr", root / "e")),
            "read": lambda: read_all(root / "from.zarr"),
        },
        rounds=ROUNDS,
        before=lambda: storage.sync_files(root),
    )
    seconds["save"] = sorted(saves)[len(saves) // 2]
    rate = {name: data.all_bytes / s / 1e9 for name, s in seconds.items()}
    slower = min("load", "write", key=rate.__getitem__)
    named = {"load": "torch.load of the files alone", "write": "the writer alone"}[slower]
    return [
        Row.of("import", rate["import"], "GB/s", named, rate[slower], 0.8),
        Row.of("export, synced", rate["export"], "GB/s", "torch.save of the same tensors, synced", rate["save"], 0.8),
        Row.of("reading the rows alone", rate["read"], "GB/s", "torch.save of the same tensors, synced", rate["save"]),
        Row.of("torch.load of the files alone", rate["load"], "GB/s", "the writer alone", rate["write"]),
    ]


def bench_memory(root: Path) -> list[Row]:
    """Memory of an import and an export beyond the largest file, and beyond a process that does neither."""
    largest = max(size_of(file) for file in (root / "tree").glob("*.pt"))
    idle = peak_rss("benchmarks.exchange", "idle")
    came = peak_rss("benchmarks.exchange", "import", str(root / "tree"), str(root / "m.zarr"))
    went = peak_rss("benchmarks.exchange", "export", str(root / "from.zarr"), str(root / "m"))
    rows = []
    for name, peak in (("an import", came), ("an export", went)):
        beyond = (peak - largest) / 1e9
        only = "that of a process that only imports the modules"
        rows += [
            Row.of(f"memory of {name} beyond the largest file", beyond, "GB", "allowed", 1.0, 1.0, at_most=True),
            Row.of(f"memory of {name}", peak / 1e9, "GB", only, idle / 1e9),
        ]
    return rows


def bench_opening(root: Path) -> list[Row]:
    """Open a store of many rollouts and of few; select one rollout and layer of the many."""
    for n in (MANY, FEW):
        _small_store(root / f"{n}.zarr", n)
    seconds = {n: _cold_open(root / f"{n}.zarr") for n in (MANY, FEW)}
    opened, times = datastore.open(root / f"{MANY}.zarr"), list[float]()
    random = np.random.default_rng(0)
    for name in random.integers(0, MANY, 300):
        began = time.perf_counter()
        _ = opened.select("residual", rollouts=str(name), layers=5).values
        times.append(time.perf_counter() - began)
    p50, p99 = np.percentile(times, [50, 99])
    return [
        Row.of(
            f"opening {MANY} rollouts beyond {FEW}",
            seconds[MANY] - seconds[FEW],
            "s",
            "allowed",
            0.3,
            1.0,
            at_most=True,
        ),
        Row.of("select of one rollout x layer, p99", float(p99) * 1e3, "ms", "p50", float(p50) * 1e3),
    ]


def _small_store(path: Path, n: int) -> None:
    rollouts = [Rollout(rollout_id=str(i), token_ids=np.full(20, i % 100), labels={"n": i}) for i in range(n)]
    spec = ComponentSpec(name="residual", width=64, dtype="bfloat16")
    for plan in datastore.plan(path, rollouts, layers=[0, 5], components=[spec]):
        rows = np.ones((20, 64), ml_dtypes.bfloat16)
        with datastore.create(path, plan) as writer:
            for layer in plan.layers:
                for one in plan.rollouts:
                    writer.put("residual", layer, one.rollout_id, rows)
            writer.commit()


def _cold_open(path: Path) -> float:
    """Open and look at the rollout table, in this process but with nothing remembered; the median of five."""
    from datastore.cells import opened

    times = []
    for _ in range(5):
        opened.cache_clear()
        began = time.perf_counter()
        assert len(datastore.open(path).rollouts)
        times.append(time.perf_counter() - began)
    return sorted(times)[2]


def main(arguments: Sequence[str]) -> None:
    """Run the benchmark, or one part of it in a process of its own."""
    if arguments[:1] == ["idle"]:
        time.sleep(0.5)
        return
    if arguments[:1] == ["import"]:
        import_all(Path(arguments[1]), Path(arguments[2]))
        return
    if arguments[:1] == ["export"]:
        export_all(Path(arguments[1]), Path(arguments[2]))
        return
    rollouts = int(os.environ.get("BENCH_ROLLOUTS", store_bench.ROLLOUTS))
    with tempfile.TemporaryDirectory(prefix="bench-exchange-", dir=os.environ.get("BENCH_DIR")) as directory:
        root, data = Path(directory), make_data(rollouts)
        make_tree(root / "tree", data)
        rows = bench_rates(root, data)
        del data
        rows += [*bench_memory(root), *bench_opening(root)]
    show(f"import and export, {CPUS} cores, width {WIDTH}", rows, as_json="--json" in arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
