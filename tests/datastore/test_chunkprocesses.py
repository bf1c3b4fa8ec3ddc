"""Chunks written by processes: the files are those that threads write, whoever fails or is killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil
import pytest

import datastore
from datastore.chunkprocesses import prepare
from datastore.errors import DatastoreError, PlanError
from datastore.planning import laid_down
from datastore.schema import Plan
from datastore.writer import Writer
from tests.datastore import making

COUNTS = (30, 50, 7, 100, 64)
ROOT = Path(__file__).parents[2]
PATIENCE = 60.0
T = TypeVar("T")


def until(look: Callable[[], T]) -> T:
    """Look again and again until what is seen is true, or for a minute."""
    end = time.monotonic() + PATIENCE
    while not (seen := look()) and time.monotonic() < end:
        time.sleep(0.02)
    return seen


def planned(path: Path) -> Plan:
    (plan,) = making.plans(path, making.rollouts(*COUNTS))
    return plan


def workers(process: int | None = None) -> list[psutil.Process]:
    """Return the living processes of writers below one."""
    return [one for one in psutil.Process(process).children(recursive=True) if living(one)]


def living(one: psutil.Process) -> bool:
    """Whether it is a process of a writer and neither gone nor a zombie."""
    try:
        return one.status() != psutil.STATUS_ZOMBIE and "datastore.chunkprocesses" in one.cmdline()
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module")
def by_threads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("threads") / "run.zarr"
    making.capture(path, making.rollouts(*COUNTS))
    return making.on_disk(path)


@pytest.mark.parametrize("memory", [1, 8 << 10, 1 << 30])  # one chunk at a time, some put aside on disk, all in memory
def test_the_files_are_those_that_threads_write(tmp_path: Path, memory: int, by_threads: dict[str, bytes]) -> None:
    path = tmp_path / "run.zarr"
    with datastore.create(path, planned(path), memory=memory, processes=2) as writer:
        making.fill(writer)
        state = writer.progress()
        assert writer.commit() == 1
        assert state.chunks_total == writer.progress().chunks
    assert making.on_disk(path) == by_threads
    assert until(lambda: not workers())


def test_a_caller_s_rows_are_its_own_again_and_lent_ones_are_copied(
    tmp_path: Path, by_threads: dict[str, bytes]
) -> None:
    path = tmp_path / "run.zarr"
    with datastore.create(path, planned(path), processes=1) as writer:
        for number, (spec, layer, one) in enumerate(making.rows_of(writer.plan)):
            rows = making.values(spec, layer, one)
            writer.put(spec.name, layer, one.rollout_id, rows, copy=bool(number % 2))
            if number % 2:
                rows[:] = 0
        writer.commit()
    assert making.on_disk(path) == by_threads


def test_a_file_in_the_working_directory_hides_no_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_threads: dict[str, bytes]
) -> None:
    (tmp_path / "zarr.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.zarr"
    with datastore.create(path, planned(path), processes=1) as writer:
        fill_and_commit(writer)
    assert making.on_disk(path) == by_threads


def refused(path: Path, processes: int) -> DatastoreError:
    """What a writer says of an array in whose place a file lies."""
    with datastore.create(path, planned(path), processes=processes) as writer:
        (directory,) = laid_down(path)
        (directory / "group" / "residual" / "c").write_bytes(b"")
        with pytest.raises(DatastoreError) as caught:
            fill_and_commit(writer)
    return caught.value


def fill_and_commit(writer: Writer) -> None:
    making.fill(writer)
    writer.commit()


def test_an_error_of_the_disk_is_told_as_by_threads(tmp_path: Path) -> None:
    ours, theirs = refused(tmp_path / "a" / "run.zarr", 2), refused(tmp_path / "b" / "run.zarr", 0)
    assert type(ours) is type(theirs)
    # What is left depends on how many other chunks were written before the error was seen.
    here = r"/[ab]/run|residual/c/.*partial|[0-9,]+ are free|[0-9,]+ bytes before compression"
    one, other = (re.sub(here, "", str(error)) for error in (ours, theirs))
    assert one == other


def fill_while_one_is_killed(writer: Writer) -> None:
    until(lambda: len(workers()) == 3)
    rows = making.rows_of(writer.plan)
    for number, (spec, layer, one) in enumerate(rows):
        writer.put(spec.name, layer, one.rollout_id, making.values(spec, layer, one))
        if number == len(rows) // 2:
            writer.flush()
            workers()[-1].kill()
    writer.commit()


def test_a_process_that_is_killed_is_told_and_the_next_capture_goes_on(
    tmp_path: Path, by_threads: dict[str, bytes]
) -> None:
    path = tmp_path / "run.zarr"
    with datastore.create(path, planned(path), processes=2) as writer, pytest.raises(DatastoreError) as caught:
        fill_while_one_is_killed(writer)
    said = str(caught.value)
    assert "was ended by SIGKILL, as the system does with SIGKILL when memory runs out" in said
    assert "what is finished is kept, run the same command again to go on" in said
    assert until(lambda: not workers())
    (plan,) = making.plans(path, making.rollouts(*COUNTS))
    with datastore.create(path, plan, processes=2) as writer:
        assert 0 < writer.progress().chunks < writer.progress().chunks_total
        making.fill(writer)
        writer.commit()
    assert making.on_disk(path) == by_threads


PRODUCER = """
import sys, time
from pathlib import Path
import datastore
from tests.datastore import making, test_chunkprocesses

path = Path(sys.argv[1])
with datastore.create(path, test_chunkprocesses.planned(path), processes=2) as writer:
    making.fill(writer)
    writer.flush()
    print("filled", flush=True)
    time.sleep(600)
"""


def test_the_processes_end_with_a_caller_that_is_killed(tmp_path: Path, by_threads: dict[str, bytes]) -> None:
    path = tmp_path / "run.zarr"
    producer = subprocess.Popen(
        [sys.executable, "-c", PRODUCER, str(path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert producer.stdout is not None
    with producer.stdout:
        assert producer.stdout.readline() == "filled\n"
        theirs = workers(producer.pid)
        assert len(theirs) == 3
        producer.send_signal(signal.SIGKILL)
        producer.wait()
    assert until(lambda: not any(map(living, theirs)))
    with datastore.create(path, planned(path)) as writer:
        assert writer.todo() == []
        writer.commit()
    assert making.on_disk(path) == by_threads


@pytest.mark.parametrize(("threads", "processes"), [(2, 2), (None, -1)])
def test_threads_or_processes(tmp_path: Path, threads: int | None, processes: int) -> None:
    path = tmp_path / "run.zarr"
    with pytest.raises(PlanError, match="can't write together; give one of them"):
        datastore.create(path, planned(path), threads=threads, processes=processes)


def test_a_system_without_memory_files_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.zarr"
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(PlanError, match="has no memory files, so processes can't share chunks; write in threads"):
        datastore.create(path, planned(path), processes=1)


def test_a_writer_that_is_left_leaves_no_process(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    writer: Writer = datastore.create(path, planned(path), processes=3)
    assert until(lambda: len(workers()) == 4)
    writer.close()
    assert until(lambda: not workers())


def test_a_process_that_is_prepared_is_the_next_writer_s(tmp_path: Path, by_threads: dict[str, bytes]) -> None:
    prepare(compiled=True)
    prepare(compiled=True)
    (first,) = workers()
    path = tmp_path / "run.zarr"
    with datastore.create(path, planned(path), processes=2) as writer:
        assert until(lambda: len(workers()) == 3)
        assert first in workers()
        fill_and_commit(writer)
    assert making.on_disk(path) == by_threads
    assert until(lambda: not workers())


def test_a_prepared_process_that_was_killed_is_replaced(tmp_path: Path, by_threads: dict[str, bytes]) -> None:
    prepare(compiled=False)
    (first,) = workers()
    first.kill()
    assert until(lambda: not workers())
    path = tmp_path / "run.zarr"
    with datastore.create(path, planned(path), processes=1) as writer:
        fill_and_commit(writer)
    assert making.on_disk(path) == by_threads


UNUSED = """
from datastore import chunkprocesses

chunkprocesses.prepare(compiled=False)
print(chunkprocesses._First.spare._process.pid, flush=True)
"""


def test_a_prepared_process_that_nobody_needs_ends_with_its_caller() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    said = subprocess.run([sys.executable, "-c", UNUSED], env=environment, capture_output=True, text=True, check=True)
    assert until(lambda: not psutil.pid_exists(int(said.stdout)))
    assert said.stderr == ""
