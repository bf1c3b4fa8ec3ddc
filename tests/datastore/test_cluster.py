"""Tasks on real schedulers and workers: results, and one sentence for everything that a cluster can do wrong."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest

from datastore import cluster
from datastore.cluster import connected
from datastore.errors import CorruptError, DatastoreError, MisuseError
from tests.dask_processes import scheduler, wait_for_workers, worker


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A scheduler that gives a task up when it has killed one worker."""
    with scheduler(deaths=0) as (address, _):
        yield address


@pytest.fixture
def with_worker(address: str) -> Iterator[str]:
    with worker(address):
        wait_for_workers(address, 1)
        yield address


def squared(task: int, common: int, memory: int) -> tuple[int, int]:
    return common * task * task, memory


def too_much(task: int, common: None, memory: int) -> int:
    return int(np.zeros(1 << 60, np.uint8)[0])


def broken(task: int, common: None, memory: int) -> int:
    raise CorruptError("the chunk is broken")


def killed(task: int, common: None, memory: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does to a process that takes too much
    return 0


def slow(task: int, common: None, memory: int) -> int:
    time.sleep(600 * task)
    return task


def test_results_come_with_their_places(with_worker: str) -> None:
    with connected(scheduler=with_worker) as there:
        found = dict(there.map(squared, [3, 4, 5], common=2, memory=1000))
        assert found == {0: (18, 1000), 1: (32, 1000), 2: (50, 1000)}
        with pytest.raises(DatastoreError, match=r"a worker ran out of memory \(Unable to allocate 1.00 EiB"):
            list(there.map(too_much, [1], common=None, memory=1))
        with pytest.raises(CorruptError, match="the chunk is broken"):
            list(there.map(broken, [1], common=None, memory=1))


def test_a_task_that_kills_its_workers(with_worker: str) -> None:
    with (
        connected(scheduler=with_worker) as there,
        pytest.raises(DatastoreError, match=r"several workers died doing the same part .* perhaps for want of memory"),
    ):
        list(there.map(killed, [1], common=None, memory=1))


def test_a_scheduler_without_workers(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 1)
    with (
        pytest.raises(MisuseError, match=rf"{address} had no workers for 1 s; start some with `dask worker {address}`"),
        connected(scheduler=address),
    ):
        pass


def test_a_scheduler_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 1)
    with (
        pytest.raises(MisuseError, match=r"there is no dask scheduler at tcp://127\.0\.0\.1:1 .* or use --workers N"),
        connected(scheduler="tcp://127.0.0.1:1"),
    ):
        pass


def test_workers_that_all_leave_and_a_scheduler_that_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "LOST_SECONDS", 1)
    monkeypatch.setattr(cluster, "_LOOK_SECONDS", 0.1)
    with scheduler() as (address, process), ExitStack() as workers:
        one = workers.enter_context(worker(address))
        wait_for_workers(address, 1)
        with connected(scheduler=address) as there:
            results = there.map(slow, [0, 1], common=None, memory=1)
            assert next(results) == (0, 0)
            one.kill()
            with pytest.raises(DatastoreError, match=rf"scheduler at {address} has had no workers for 1 s"):
                next(results)
            results = there.map(slow, [0, 1], common=None, memory=1)
            monkeypatch.setattr(cluster, "LOST_SECONDS", 600)
            process.kill()
            with pytest.raises(DatastoreError, match=rf"the dask scheduler at {address} is gone; nothing was kept"):
                next(results)
