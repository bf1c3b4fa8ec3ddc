"""Scores from real dask schedulers and workers: the same bits as in one process, also when a worker is killed."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from distributed import Client

import datastore
import project
from datastore.errors import MisuseError
from project import distributed
from tests.project.stores import direction, rollout, write_store

ROOT = Path(__file__).parents[2]
DIRECTIONS = [
    direction("bs/lying", 10, width=256),
    direction("x/calm", 10, width=256),
    direction("x/calm", 20, width=256),
]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@pytest.fixture
def store(tmp_path: Path) -> datastore.Store:
    """A store of several result chunks: 30,000 tokens."""
    rollouts = [rollout(f"r{i}", 3000) for i in range(10)]
    return write_store(tmp_path / "run.zarr", rollouts, layers=(10, 20), width=256, most_tokens=1024)


def dask(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "dask", *arguments], env=ENVIRONMENT, cwd=ROOT, stderr=subprocess.DEVNULL
    )


@pytest.fixture
def scheduler() -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = dask("scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard", "--no-show")
    yield f"tcp://127.0.0.1:{port}"
    process.terminate()
    process.wait()


def worker(address: str) -> subprocess.Popen[bytes]:
    return dask("worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard", "--memory-limit", "0")


def test_a_killed_workers_tasks_are_done_again_and_the_bits_are_the_same(
    store: datastore.Store, scheduler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("project.tasks.CHUNK", 1024)
    monkeypatch.setattr("datastore.scores.CHUNK", 1024)
    workers = [worker(scheduler), worker(scheduler)]
    killed: list[int] = []

    def kill_one(done: int, total: int) -> None:
        if not killed:
            assert done < total, "midway"
            os.kill(workers[0].pid, signal.SIGKILL)
            killed.append(workers[0].wait())

    try:
        with Client(scheduler, set_as_default=False) as client:  # type: ignore[no-untyped-call]
            client.wait_for_workers(2, timeout=60)
        with distributed.cluster_runner(scheduler=scheduler, progress=kill_one) as runner:
            there = project.scores(store, DIRECTIONS, out=tmp_path / "there.zarr", runner=runner)
    finally:
        for one in workers:
            one.terminate()
            one.wait()
    here = project.scores(store, DIRECTIONS)
    assert killed == [-signal.SIGKILL]
    np.testing.assert_array_equal(there.score.values.view(np.uint32), here.score.values.view(np.uint32))
    np.testing.assert_array_equal(there.norm.values, here.norm.values)


def test_processes_of_this_machine(store: datastore.Store, tmp_path: Path) -> None:
    ticks: list[int] = []
    with distributed.cluster_runner(workers=1, progress=lambda done, total: ticks.append(done)) as runner:
        there = project.scores(store, DIRECTIONS, out=tmp_path / "there.zarr", runner=runner)
    here = project.scores(store, DIRECTIONS)
    np.testing.assert_array_equal(there.score.values.view(np.uint32), here.score.values.view(np.uint32))
    assert ticks[-1] == 30_000


def test_a_scheduler_that_is_not_there(store: datastore.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "CONNECT_SECONDS", 1)
    began = time.monotonic()
    with (
        pytest.raises(MisuseError, match=r"there is no dask scheduler at tcp://127\.0\.0\.1:1 "),
        distributed.cluster_runner(scheduler="tcp://127.0.0.1:1"),
    ):
        pass
    assert time.monotonic() - began < 60
