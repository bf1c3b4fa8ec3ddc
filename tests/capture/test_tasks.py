"""Tasks in their file: what comes back after a server's end, whose clock stands since it last wrote; damage is said."""

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from capture.errors import CaptureError
from capture.messages import CaptureOrder
from capture.tasks import INTERRUPTED, Task, TaskFile
from tests.capture.cli import Command, command

__all__ = ["command"]

ORDER = CaptureOrder(experiment="e", prompt_set="p")


def task(name: str, *, created: float) -> Task:
    return Task(id=name, order=ORDER, tree="/e", variant="v", store="/e/p.zarr", created=created)


def written(one: Task, *, at: float) -> str:
    """A task's record as a server wrote it at some time."""
    return json.dumps(json.loads(one.record()) | {"saved": at})


def test_what_ran_or_waited_when_the_server_was_killed_has_ended_when_it_last_wrote(tmp_path: Path) -> None:
    running, waiting, done = task("a", created=1000.0), task("b", created=1003.0), task("c", created=900.0)
    running.begin()
    running.plan(rollouts=3, tokens=30, raw_bytes=300, skipped=0)
    done.end("completed", at=950.0)
    file = TaskFile(tmp_path / "tasks.sqlite")
    for one, at in ((running, 1008.0), (waiting, 1003.0), (done, 950.0)):
        file.save(one.id, one.created, written(one, at=at))
    file.close()
    again = {one.id: one for one in TaskFile(tmp_path / "tasks.sqlite").load()}
    assert list(again) == ["c", "a", "b"]
    assert {name: one.state for name, one in again.items()} == {
        "c": "completed",
        "a": "interrupted",
        "b": "interrupted",
    }
    assert {name: one.status().elapsed for name, one in again.items()} == {"c": 50.0, "a": 8.0, "b": 5.0}
    assert again["a"].error == INTERRUPTED
    assert (again["a"].order, again["a"].progress) == (ORDER, running.progress)


@pytest.mark.parametrize("record", ["{", "[]", "{}", '{"created": 1.0, "order": {}, "progress": {}}'])
def test_a_record_of_something_else_is_refused(record: str, tmp_path: Path) -> None:
    file = TaskFile(tmp_path / "tasks.sqlite")
    file.save("a", 1.0, record)
    with pytest.raises(CaptureError, match="a task in it can't be read: ") as caught:
        file.load()
    assert "\n" not in str(caught.value)


def damaged(path: Path) -> None:
    path.write_bytes(b"no database, and long enough not to be taken for an empty one" * 20)


def of_another_table(path: Path) -> None:
    with sqlite3.connect(path) as base:
        base.execute("CREATE TABLE tasks (x)")
    base.close()


@pytest.mark.parametrize("spoil", [damaged, of_another_table, Path.mkdir])
def test_a_file_that_can_not_keep_tasks_ends_the_server_before_a_model_is_loaded(
    spoil: Any, tmp_path: Path, command: Command
) -> None:
    (tmp_path / "trees").mkdir()
    spoil(tmp_path / "tasks")
    told = command(
        "serve", "--model", "m", "--port", 0, "--experiments-root", tmp_path / "trees", "--tasks", tmp_path / "tasks"
    )
    assert (told.code, "Traceback" in told.err) == (1, False)
    assert "can't keep the tasks" in " ".join(told.err.split())
    assert "move it away, or name another with --tasks" in " ".join(told.err.split())
