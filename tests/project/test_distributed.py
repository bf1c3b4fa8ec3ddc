"""Scores from real dask schedulers and workers: the same bits as in one process, also when a worker is killed."""

import os
import signal
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

import datastore
import project
from project import distributed
from tests.dask_processes import scheduler, wait_for_workers, worker
from tests.project.stores import direction, rollout, write_store

DIRECTIONS = [
    direction("bs/lying", 10, width=256),
    direction("x/calm", 10, width=256),
    direction("x/calm", 20, width=256),
]


@pytest.fixture
def store(tmp_path: Path) -> datastore.Store:
    """A store of several result chunks: 30,000 tokens."""
    rollouts = [rollout(f"r{i}", 3000) for i in range(10)]
    return write_store(tmp_path / "run.zarr", rollouts, layers=(10, 20), width=256, most_tokens=1024)


def test_a_killed_workers_tasks_are_done_again_and_the_bits_are_the_same(
    store: datastore.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("project.tasks.CHUNK", 1024)
    monkeypatch.setattr("datastore.scores.CHUNK", 1024)
    killed: list[int] = []
    with ExitStack() as stack:
        address, _ = stack.enter_context(scheduler())
        workers = [stack.enter_context(worker(address)) for _ in range(2)]
        wait_for_workers(address, 2)

        def kill_one(done: int, total: int) -> None:
            if not killed:
                assert done < total, "midway"
                os.kill(workers[0].pid, signal.SIGKILL)
                killed.append(workers[0].wait())

        runner = stack.enter_context(distributed.cluster_runner(scheduler=address, progress=kill_one))
        there = project.scores(store, DIRECTIONS, out=tmp_path / "there.zarr", runner=runner)
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
