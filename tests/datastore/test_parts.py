"""Who fills what: living and dead holders, and what is done."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datastore import parts
from datastore.errors import BusyError, PlanError
from datastore.parts import Holder


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "key" / "group").mkdir(parents=True)
    (tmp_path / "key" / "parts").mkdir()
    return tmp_path / "key" / "parts"


def rewrite(record: Path, **changes: object) -> None:
    record.write_text(Holder.model_validate_json(record.read_bytes()).model_copy(update=changes).model_dump_json())


def test_the_same_part_is_refused_while_its_holder_lives(directory: Path) -> None:
    record = parts.acquire(directory, (1, 2), start=0, stop=10)
    with pytest.raises(
        BusyError, match=rf"part 1/2 of this plan is being filled by process {os.getpid()} on \S+ \(part 1/2\)"
    ):
        parts.acquire(directory, (1, 2), start=0, stop=10)
    parts.acquire(directory, (2, 2), start=10, stop=20)
    with pytest.raises(
        BusyError, match=r"part 1/1 .*so it is not started twice; wait for it or stop it, and if .*delete"
    ):
        parts.acquire(directory, (1, 1), start=0, stop=20)
    parts.release(record)
    parts.acquire(directory, (1, 2), start=0, stop=10)


@pytest.mark.parametrize(
    "changes",
    [{"boot_id": "another boot"}, {"started": 1.0}, {"pid": 2**22 + 1}],
    ids=["the machine was started again", "the number belongs to another process", "no such process"],
)
def test_a_dead_holder_is_recognised(directory: Path, changes: dict[str, object]) -> None:
    rewrite(parts.acquire(directory, (1, 1), start=0, stop=10), **changes)
    parts.acquire(directory, (1, 1), start=0, stop=10)


def test_another_machine_can_not_be_asked(directory: Path) -> None:
    rewrite(parts.acquire(directory, (1, 1), start=0, stop=10), host="elsewhere", pid=1)
    with pytest.raises(
        BusyError, match=r"process 1 on elsewhere .*if that process is gone from another machine, delete"
    ):
        parts.acquire(directory, (1, 1), start=0, stop=10)


def test_a_killed_process_that_nobody_has_asked_about_is_dead(directory: Path) -> None:
    record = parts.acquire(directory, (1, 1), start=0, stop=10)
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    rewrite(record, pid=process.pid, started=psutil.Process(process.pid).create_time())
    assert Holder.model_validate_json(record.read_bytes()).alive
    process.send_signal(signal.SIGKILL)
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert not Holder.model_validate_json(record.read_bytes()).alive
    process.communicate()


def test_a_record_that_another_process_wrote_stays(directory: Path) -> None:
    record = parts.acquire(directory, (1, 1), start=0, stop=10)
    rewrite(record, pid=1)
    parts.release(record)
    assert record.exists()


def test_a_plan_that_is_gone_is_said_to_be_done(directory: Path) -> None:
    (directory.parent / "group").rmdir()
    with pytest.raises(
        PlanError, match="the plan key was carried out by another process meanwhile; nothing is left to do"
    ):
        parts.acquire(directory, (1, 1), start=0, stop=10)
    (directory / "lock").unlink()
    directory.rmdir()
    with pytest.raises(PlanError, match="plan again to see what is missing"):
        parts.acquire(directory, (1, 1), start=0, stop=10)


def _hold(directory: Path, held: object, leave: object) -> None:
    with parts.locked(directory):
        held.set()  # type: ignore[attr-defined]
        leave.wait()  # type: ignore[attr-defined]


def test_the_lock_of_a_killed_process_is_free(directory: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held, leave = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(directory, held, leave))
    process.start()
    assert held.wait(60)
    process.kill()
    process.join()
    with parts.locked(directory):
        pass


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)).map(sorted), max_size=6))
def test_what_is_unfinished_is_what_no_part_covers(
    tmp_path_factory: pytest.TempPathFactory, ranges: list[list[int]]
) -> None:
    directory = tmp_path_factory.mktemp("parts")
    for start, stop in ranges:
        parts.mark_done(directory, start=start, stop=stop)
    (directory / "cut off.done").write_text("[1")
    covered = {token for start, stop in ranges for token in range(start, stop)}
    left = [token for start, stop in parts.unfinished(directory, 30) for token in range(start, stop)]
    assert left == [token for token in range(30) if token not in covered]


def test_a_lost_chunk_takes_back_what_says_its_part_is_done(directory: Path) -> None:
    for start in (0, 10, 20):
        parts.mark_done(directory, start=start, stop=start + 10)
    parts.reopen(directory, start=12, stop=14)
    assert parts.unfinished(directory, 30) == [(10, 20)]
