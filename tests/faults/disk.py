"""A disk that is full, at random points: what is committed stays, the message says how much room, and it goes on.

The disk is a small tmpfs, which takes the right to mount; where there is none, a limit on the size of files stands for
it in the tests of the writer.
"""

from __future__ import annotations

import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from datastore.verify import verify
from tests.faults.kills import PRELOAD, WITH_TORCH, cells
from tests.faults.tasks import TASKS, Task
from tests.faults.zygote import Zygote

PAGE = 4096
ROOM = re.compile(r"[\d,]{2,} bytes")


@dataclass(slots=True)
class Counts:
    """What a campaign counted; from `rows_lost` on all should be 0."""

    trials: int = 0
    full: int = 0
    rows_lost: int = 0
    phantom_rows: int = 0
    unreadable: int = 0
    no_bytes_named: int = 0
    not_resumed: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing went wrong."""
        found = (self.rows_lost, self.phantom_rows, self.unreadable, self.no_bytes_named, self.not_resumed)
        return not any(found)


@contextmanager
def small_disk(at: Path, pages: int) -> Iterator[None]:
    """Mount a disk of so many pages.

    Raises
    ------
    PermissionError
        This process may not.
    """
    at.mkdir(parents=True)
    _mount(at, f"size={pages * PAGE},nr_inodes=0")
    try:
        yield
    finally:
        subprocess.run(["umount", str(at)], check=True, capture_output=True)
        at.rmdir()


def _mount(at: Path, options: str) -> None:
    try:
        words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(at)]
        subprocess.run(words, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise PermissionError(f"no disk can be mounted here ({error})") from error


def may_mount(at: Path) -> bool:
    """Whether a disk can be mounted at all."""
    with suppress(PermissionError), small_disk(at, 16):
        return True
    shutil.rmtree(at, ignore_errors=True)
    return False


def pages_of(root: Path) -> int:
    """Return the pages that the files below a directory take in memory."""
    return sum(-(-file.lstat().st_size // PAGE) for file in root.rglob("*") if file.is_file())


class Shortage:
    """One task on disks that are too small by a random amount."""

    def __init__(self, task: Task, root: Path, zygote: Zygote) -> None:
        self.task, self.root, self.zygote, self.counts = task, root, zygote, Counts()
        (root / "before").mkdir(parents=True)
        task.begin(root / "before")
        self.before = cells(root / "before", task)
        shutil.copytree(root / "before", root / "after")
        ended = zygote.run(task.call, *task.arguments(root / "after"))
        assert ended.code == 0, ended.output
        self.after = cells(root / "after", task)
        self.least, self.most = pages_of(root / "before"), pages_of(root / "before") + pages_of(root / "after")

    def trial(self, choice: random.Random) -> None:
        """Run the task on a disk that is too small, look, make room, run it again."""
        self.counts.trials += 1
        here, counts = self.root / "disk", self.counts
        with small_disk(here, choice.randrange(self.least + 1, self.most)):
            shutil.copytree(self.root / "before", here, dirs_exist_ok=True)
            ended = self.zygote.run(self.task.call, *self.task.arguments(here))
            if ended.code:
                counts.full += 1
                named = ROOM.search(ended.output) is not None
                counts.no_bytes_named += not named
                if not named:
                    counts.wrong.append(f"{self.task.name}: {ended.output[-400:]}")
                self._look(here)
            _mount(here, f"remount,size={64 * self.most * PAGE}")
            again = self.zygote.run(self.task.call, *self.task.arguments(here))
            whole = all(verify(here / store, full=True).ok for store in self.task.stores)
            taken = "is there already" in again.output and self.task.name == "merge"
            if (again.code and not taken) or not whole or cells(here, self.task) != self.after:
                counts.not_resumed += 1
                counts.wrong.append(f"{self.task.name}: once there was room: {again.output[-400:]}")

    def _look(self, here: Path) -> None:
        try:
            found = cells(here, self.task)
        except Exception as error:
            self.counts.unreadable += 1
            self.counts.wrong.append(f"{self.task.name}: {error}")
            return
        lost = [rows.n for key, rows in self.before.items() if found.get(key) not in (rows, self.after.get(key))]
        phantom = [rows.n for key, rows in found.items() if rows not in (self.before.get(key), self.after.get(key))]
        self.counts.rows_lost += sum(lost)
        self.counts.phantom_rows += sum(phantom)


def shortages(root: Path, trials: dict[str, int], *, seed: int) -> dict[str, Counts]:
    """Run out of space in each task named so many times, and return what was counted for each."""
    choice, found = random.Random(seed), {}
    with Zygote(*(WITH_TORCH if "import" in trials else PRELOAD)) as zygote:
        for name, n in trials.items():
            one = Shortage(TASKS[name], root / name, zygote)
            for _ in range(n):
                one.trial(choice)
            found[name] = one.counts
            shutil.rmtree(root / name)
    return found
