"""Calibration on real dask schedulers and workers: the same bits as in one process, also when a worker is killed."""

import os
import signal
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import calibrate
import datastore
from calibrate.distributed import cluster_runner
from calibrate.passes import Tick
from calibrate.selected import resolve
from calibrate.tasks import Job, Settings
from datastore.errors import CorruptError
from tests.calibrate.stores import build, random_rows
from tests.dask_processes import scheduler, wait_for_workers, worker

LENGTHS, LAYERS = (400, 90, 1, 700, 60, 333, 512, 120), (1, 4)
ENDS = {str(i): n // 3 for i, n in enumerate(LENGTHS)}
CAPTURES = (("3", "0", "5"), ("1", "2", "4", "6", "7"))


@pytest.fixture(autouse=True)
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks of some 200 tokens."""
    for module in ("layer", "calibration"):
        monkeypatch.setattr(f"calibrate.{module}.TASK_BYTES", 200 * 32 * 2)


def store(path: Path, level: str = "rollout") -> datastore.Store:
    rows = random_rows(9, LENGTHS, LAYERS, width=32)
    return build(path, {"residual": rows}, ENDS, level=level, most_tokens=64, captures=CAPTURES)


@dataclass(frozen=True)
class Waiting:
    """A task that is done a second after a file is there, or that makes the file; its result is its name."""

    tokens: int
    file: Path
    waits: bool

    def do(self, job: Job, tick: Tick) -> int:
        if not self.waits:
            self.file.touch()
            return self.tokens
        while not self.file.exists():
            time.sleep(0.1)
        time.sleep(1)
        return self.tokens


def assert_same_bits(a: calibrate.Calibration, b: calibrate.Calibration) -> None:
    assert set(a.data.variables) == set(b.data.variables)
    for name in a.data.variables:
        np.testing.assert_array_equal(a.data[name].values, b.data[name].values, err_msg=str(name))
    assert a.sources == b.sources


def test_a_killed_workers_tasks_are_done_again_and_the_bits_are_the_same(tmp_path: Path) -> None:
    """Nothing was kept of these rollouts, so that both passes are made there, and every sum crosses processes."""
    opened = store(tmp_path / "run.zarr", "none")
    killed: list[int] = []
    ticks: list[int] = []
    with ExitStack() as stack:
        address, _ = stack.enter_context(scheduler())
        workers = [stack.enter_context(worker(address)) for _ in range(2)]
        wait_for_workers(address, 2)

        def kill_one(tokens: int) -> None:
            ticks.append(tokens)
            if not killed:
                os.kill(workers[0].pid, signal.SIGKILL)
                killed.append(workers[0].wait())

        runner = stack.enter_context(cluster_runner(scheduler=address, tick=kill_one))
        there = calibrate.fit(opened, runner=runner)
        some = calibrate.fit(opened, rollouts=["7", "0", "2"], segment="response", layers=4, runner=runner)
    assert killed == [-signal.SIGKILL]
    assert len(ticks) > 2 * 2 * 5, "two passes over two layers in several tasks"
    assert_same_bits(there, calibrate.fit(opened))
    assert_same_bits(some, calibrate.fit(opened, rollouts=["7", "0", "2"], segment="response", layers=4))
    with pytest.raises(AssertionError):  # the comparison can fail
        assert_same_bits(there, calibrate.fit(opened, segment="response"))


def test_processes_of_this_machine_and_their_errors(tmp_path: Path) -> None:
    opened = store(tmp_path / "run.zarr")
    ticks: list[int] = []
    job = Job(selected=resolve(opened), settings=Settings(top_k=1, threshold=1, passes=True, memory=1))
    with cluster_runner(workers=2, tick=ticks.append) as runner:
        late = [Waiting(1, tmp_path / "done", True), Waiting(2, tmp_path / "done", False)]
        assert list(runner(job, late)) == [1, 2], "the second is done first"
        ticks.clear()
        there = calibrate.fit(opened, runner=runner)
        assert_same_bits(there, calibrate.fit(opened))
        assert sum(ticks) == sum(LENGTHS) * len(LAYERS)
        (tmp_path / "run.zarr/captures/0002/residual/c/1/1/0").unlink()
        with pytest.raises(CorruptError, match=r"residual at layer 4 of rollout .* is missing"):
            calibrate.fit(opened, runner=runner)


def test_the_command_on_a_cluster(tmp_path: Path, run: Any) -> None:
    path = store(tmp_path / "run.zarr").path
    here = run(path, "--json").json["calibrations"]
    ran = run(path, "--json", "--workers", "1")
    assert (ran.code, ran.json["calibrations"]) == (0, here)
    one, two = (datastore.open(path).calibration(number=n) for n in (1, 2))
    assert one.drop_attrs().identical(two.drop_attrs())


def test_a_cluster_that_is_not_there_is_one_sentence(tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datastore.cluster.CONNECT_SECONDS", 1)
    ran = run(store(tmp_path / "run.zarr").path, "--scheduler", "tcp://127.0.0.1:1")
    assert ran.code == 2
    assert "there is no dask scheduler at tcp://127.0.0.1:1" in ran.err
    assert "Traceback" not in ran.err
