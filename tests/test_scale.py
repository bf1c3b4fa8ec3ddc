"""What docs/scale.md tells of clusters and buckets, as far as one machine can run it."""

import functools
import http.server
import os
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
import numpy as np
import pytest
import xarray as xr
import zarr
from dask_jobqueue.slurm import SLURMCluster
from distributed import Client
from numpy.typing import NDArray

import calibrate
import datastore
from calibrate.distributed import cluster_runner
from datastore.cluster import connected
from datastore.errors import MisuseError
from datastore.union import load_union
from tests.calibrate.stores import build, random_rows
from tests.dask_processes import scheduler, wait_for_workers, worker
from tests.datastore import making

COUNTS = (50, 60, 7, 80, 33)
SBATCH = """#!/bin/sh
# Runs the job that SLURM would queue, and says its number.
job=$(mktemp) && cp "$1" "$job" && cp "$1" "$JOBS"
setsid sh "$job" > "$JOBS/log" 2>&1 &
echo "Submitted batch job $!"
"""
SCANCEL = """#!/bin/sh
kill -- -"$1"
"""


def where_it_ran(block: NDArray[Any]) -> NDArray[np.int64]:
    """Return the number of the process, after long enough that another one takes the next block."""
    time.sleep(0.05)
    return np.full((1, 1, 1), os.getpid())


def total(block: NDArray[Any]) -> NDArray[np.float64]:
    """Return a block's float64 sums over tokens."""
    return np.asarray(block.astype(np.float64).sum(axis=0, keepdims=True))


def rows_at(path: Path, layer: int) -> NDArray[Any]:
    """Return the residuals at a layer as they were put, in the order of the first capture."""
    made = {one.rollout_id: one for one in making.rollouts(*COUNTS)}
    order = load_union(path).captures[0].rollout_ids
    return np.concatenate([making.values(making.RESIDUAL, layer, made[name]) for name in order])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    making.capture(tmp_path / "run.zarr", making.rollouts(*COUNTS), (1, 5))
    return tmp_path / "run.zarr"


def test_a_dask_backed_dataset_is_computed_by_two_worker_processes(path: Path) -> None:
    store = datastore.open(path)
    rows = store.dataset(chunks=16).residual
    with ExitStack() as stack:
        address, _ = stack.enter_context(scheduler())
        for _ in range(2):
            stack.enter_context(worker(address))
        wait_for_workers(address, 2)
        with Client(address):  # type: ignore[no-untyped-call]
            there = rows.compute()
            tasks = rows.data.map_blocks(where_it_ran, chunks=(1, 1, 1), dtype=np.int64).compute()
            sums = rows.data.map_blocks(total, chunks=(1, 1, 16), dtype=np.float64).sum(axis=0).compute()
    for i, layer in enumerate((1, 5)):
        want = rows_at(path, layer).astype(np.float32)
        names = load_union(path).captures[0].rollout_ids
        first, here = there.sel(layer=layer), store.dataset().residual.sel(layer=layer).compute()
        np.testing.assert_array_equal(first.values, here.values)
        by_capture = np.concatenate([first.values[first["rollout"].values == name] for name in names])
        np.testing.assert_array_equal(by_capture.view(np.uint32), want.view(np.uint32))
        np.testing.assert_allclose(sums[i], want.astype(np.float64).sum(axis=0), rtol=1e-12)
    ran = set(tasks.reshape(-1).tolist())
    assert len(ran) == 2, "both workers did some"
    assert os.getpid() not in ran


@pytest.fixture
def calibrated(tmp_path: Path) -> datastore.Store:
    rows = random_rows(1, (40, 90, 60, 33), (1, 4), width=32)
    return build(tmp_path / "run.zarr", {"residual": rows}, {str(i): 20 for i in range(4)})


def assert_same(a: calibrate.Calibration, b: calibrate.Calibration) -> None:
    for name in a.data.variables:
        np.testing.assert_array_equal(a.data[name].values, b.data[name].values, err_msg=str(name))


def test_a_schedulers_file_stands_for_its_address(
    calibrated: datastore.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "scheduler.json"
    with scheduler(file=file) as (address, _), worker(str(file)):
        wait_for_workers(address, 1)
        with cluster_runner(scheduler=str(file)) as runner:
            assert_same(calibrate.fit(calibrated, runner=runner), calibrate.fit(calibrated))
    monkeypatch.setattr("datastore.cluster.CONNECT_SECONDS", 1)
    for name, text in (("scheduler.json", None), ("gone.json", None), ("cut.json", '{"addr'), ("odd.json", "[]")):
        other = tmp_path / name
        if text is not None:
            other.write_text(text)
        with (
            pytest.raises(MisuseError, match=rf"there is no dask scheduler at .*{name} \("),
            connected(scheduler=str(other)),
        ):
            pass


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`sbatch` and `scancel` that run jobs on this machine; the directory that keeps their scripts."""
    tools, jobs = tmp_path / "bin", tmp_path / "jobs"
    tools.mkdir()
    jobs.mkdir()
    for name, text in (("sbatch", SBATCH), ("scancel", SCANCEL)):
        (tools / name).write_text(text)
        (tools / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("JOBS", str(jobs))
    monkeypatch.setattr("datastore.cluster.CONNECT_SECONDS", 60)  # a worker of a busy machine may come and go at first
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    monkeypatch.chdir(tmp_path)
    return jobs


def test_jobs_as_slurm_would_get_them(calibrated: datastore.Store, slurm: Path) -> None:
    """Everything of SLURM but its queue: dask-jobqueue's own script is submitted, run, and cancelled."""
    asked: dict[str, Any] = {"cores": 2, "processes": 2, "memory": "4GB", "walltime": "00:10:00", "interface": "lo"}
    with SLURMCluster(**asked, scheduler_options={"dashboard": False}) as cluster:
        script = cluster.job_script()
        cluster.scale(jobs=1)
        wait_for_workers(cluster.scheduler_address, 1)
        with cluster_runner(scheduler=cluster.scheduler_address) as runner:
            found = calibrate.fit(calibrated, runner=runner)
            workers = list(cluster.scheduler_info["workers"].values())
    assert_same(found, calibrate.fit(calibrated))
    assert workers
    assert {one["nthreads"] for one in workers} == {1}, "one thread a worker"
    ordered = {line for line in script.splitlines() if line.startswith("#SBATCH")}
    assert ordered == {
        "#SBATCH -J dask-worker",
        "#SBATCH -n 1",
        "#SBATCH --cpus-per-task=2",
        "#SBATCH --mem=4G",
        "#SBATCH -t 00:10:00",
    }
    assert "--nthreads 1 --memory-limit 1.86GiB --nworkers 2 --nanny" in script
    (kept,) = slurm.glob("*.sh")
    assert ordered <= set(kept.read_text().splitlines())


@pytest.fixture
def served(path: Path) -> Iterator[str]:
    """The store's directory over HTTP, as a bucket that anyone may read."""

    class Silent(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

    handler = functools.partial(Silent, directory=str(path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_plain_zarr_reads_a_capture_from_a_bucket(path: Path, served: str) -> None:
    want = rows_at(path, 5).view(np.uint16)
    array = zarr.open_array(f"{served}/captures/0001/residual", mode="r")
    np.testing.assert_array_equal(np.asarray(array[:, 1]).view(np.uint16), want)
    with xr.open_zarr(f"{served}/captures/0001", chunks=None) as found:
        np.testing.assert_array_equal(found.residual.sel(layer=5).values.view(np.uint16), want)
    memory = fsspec.filesystem("memory")
    memory.put(str(path), "/bucket/run.zarr", recursive=True)
    with xr.open_zarr("memory://bucket/run.zarr/captures/0001", chunks=None) as found:
        np.testing.assert_array_equal(found.residual.sel(layer=5).values.view(np.uint16), want)
    memory.rm("/bucket", recursive=True)


def test_a_store_in_a_bucket_is_not_opened_by_its_address(served: str) -> None:
    with pytest.raises(MisuseError, match="is an address, and a store is read by path"):
        datastore.open(f"{served}/")
