"""A disk that fails a call: what is committed stays, one sentence names the file and the error, and it goes on after.

Oracle: every cell's bytes and every result's before, and after the same work on a disk that does not fail.
"""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from datastore import storage
from datastore.verify import verify
from tests.faults.eio import KINDS, compiled
from tests.faults.kills import PRELOAD, WITH_TORCH, Cells, cells
from tests.faults.tasks import TASKS, Task
from tests.faults.zygote import Ended, Zygote

ANALYSES = ("calibrate.commands", "calibrate.tasks", "project.commands", "project.run", "project.export")
ASIDE = re.compile(r"\.[0-9a-f]{32}(?=/|\.partial|\b)|\.partial|(?<=/)\.(?=[^/ ]+\.writing)|\.writing")
"""What a temporary name has that the file's own has not."""
FULL = ("create", "write", "sync", "rename")
"""Kinds that also fail for want of room."""
DONE_BEFORE = {"merge": "is there already", "drop": "none of this is captured"}
"""What a command says that finds its work done."""

Results = dict[tuple[str, str, int], tuple[tuple[str, bytes], ...]]
"""The chunks of each calibration and of each scores, by store, kind and number."""


class Fault(NamedTuple):
    """Which call fails, and how."""

    kind: str
    at: int
    error: int
    lasting: bool

    def __str__(self) -> str:
        more = " and all that follow" if self.lasting else ""
        return f"{self.kind} {self.at}{more} ({errno.errorcode[self.error]})"


@dataclass(slots=True)
class Counts:
    """What a campaign counted; from `rows_lost` on all should be 0."""

    trials: int = 0
    failed: int = 0
    done_all_the_same: int = 0
    rows_lost: int = 0
    phantom_rows: int = 0
    unreadable: int = 0
    not_told: int = 0
    not_resumed: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing went wrong."""
        return not any((self.rows_lost, self.phantom_rows, self.unreadable, self.not_told, self.not_resumed))


def results(root: Path, task: Task) -> Results:
    """Return the bytes of all results of the stores of a task."""
    found = {}
    for store in task.stores:
        for kind in ("calibration", "scores"):
            for number in storage.numbered(root / store / kind):
                at = root / store / kind / f"{number:04d}"
                files = sorted(file for file in at.rglob("*") if file.is_file() and file.name != "zarr.json")
                found[store, kind, number] = tuple((str(file.relative_to(at)), file.read_bytes()) for file in files)
    return found


class Failing:
    """One task on a disk of which one call fails, or all from one on."""

    def __init__(self, task: Task, root: Path, zygote: Zygote) -> None:
        self.task, self.root, self.zygote, self.counts = task, root.resolve(), zygote, Counts()
        self.here = self.root / "disk"
        (root / "before").mkdir(parents=True)
        task.begin(self.root / "before")
        self.before = self._state(self.root / "before")
        ended, self.seen, _ = self._run(None)
        assert ended.code == 0, ended.output
        self.after = self._state(self.here)
        shutil.rmtree(self.here)

    def _state(self, at: Path) -> tuple[Cells, Results]:
        return cells(at, self.task), results(at, self.task)

    def _run(self, fault: Fault | None) -> tuple[Ended, dict[str, int], list[str]]:
        """Begin anew and run the task; return how it ended, the calls seen and the paths of those that failed."""
        shutil.copytree(self.root / "before", self.here)
        one = fault or Fault(KINDS[0], 0, errno.EIO, lasting=False)
        words = json.dumps([str(self.here), KINDS.index(one.kind), one.at, one.error, one.lasting])
        log = self.root / "log.json"
        ended = self.zygote.run("tests.faults.eio:under", log, words, self.task.call, *self.task.arguments(self.here))
        told: dict[str, Any] = json.loads(log.read_text())
        return ended, told["seen"], told["failed"]

    def faults(self, choice: random.Random) -> Iterator[Fault]:
        """Yield faults, each kind in its turn, at any of the calls that the task makes without one."""
        while True:
            for kind in KINDS:
                if self.seen[kind]:
                    error = errno.ENOSPC if kind in FULL and choice.random() < 0.3 else errno.EIO
                    yield Fault(kind, choice.randint(1, self.seen[kind]), error, choice.random() < 0.5)

    def trial(self, fault: Fault) -> None:
        """Let the fault happen, look, run the task again without it."""
        counts, task = self.counts, self.task
        counts.trials += 1
        ended, _, paths = self._run(fault)
        path = paths[0].removeprefix(str(self.here)) if paths else ""
        if ended.code:
            counts.failed += 1
            if not one_sentence(ended, paths, fault.error, self.here):
                counts.not_told += 1
                self._note(fault, f"{path}: exit {ended.code}: {ended.output[-1500:]}")
        else:
            counts.done_all_the_same += bool(paths)
        self._look(fault, path)
        again = self.zygote.run(task.call, *task.arguments(self.here))
        taken = DONE_BEFORE.get(task.name, "\n") in again.output  # it failed after its rename
        whole = all(verify(self.here / store, full=True).ok for store in task.stores)
        if (again.code and not taken) or not whole or not self._same(self._state(self.here)):
            counts.not_resumed += 1
            self._note(fault, f"{path}: then {again.code}, whole {whole}: {ended.output[-700:]} {again.output[-700:]}")
        shutil.rmtree(self.here)

    def _same(self, found: tuple[Cells, Results]) -> bool:
        """Whether it is all there that should be at the end; what was published may be published once more."""
        want = {key[:2]: files for key, files in self.after[1].items()}
        return found[0] == self.after[0] and {key[:2]: files for key, files in found[1].items()} == want

    def _look(self, fault: Fault, path: str) -> None:
        try:
            found, kept = self._state(self.here)
        except Exception as error:
            self.counts.unreadable += 1
            self._note(fault, f"{path}: {error}")
            return
        (before, old), (after, new) = self.before, self.after
        lost = sum(rows.n for key, rows in before.items() if found.get(key) not in (rows, after.get(key)))
        phantom = sum(rows.n for key, rows in found.items() if rows not in (before.get(key), after.get(key)))
        whole = [*old.values(), *new.values()]
        lost += sum(kept.get(key) != files for key, files in old.items())
        phantom += sum(files not in whole for files in kept.values())
        self.counts.rows_lost += lost
        self.counts.phantom_rows += phantom
        if lost or phantom:
            self._note(fault, f"{path}: {lost} lost, {phantom} made up")

    def _note(self, fault: Fault, what: str) -> None:
        self.counts.wrong.append(f"{self.task.name}: {fault}: {what}")


def one_sentence(ended: Ended, paths: list[str], error: int, root: Path) -> bool:
    """Whether a process failed with one sentence that names one of the files, or what holds it, and the error."""
    lines = [line for line in ended.output.splitlines() if line.startswith("error: ")]
    if ended.code != 1 or len(lines) != 1 or "Traceback" in ended.output or os.strerror(error) not in lines[0]:
        return False
    said, places = ASIDE.sub("", lines[0]), {Path(ASIDE.sub("", path)) for path in paths}
    holders = {up for place in places for up in place.parents if up.is_relative_to(root)}
    names = [str(one) for one in places | {up for up in holders if len(up.relative_to(root).parts) > 1}]
    aside = [str(up) for path in paths for up in Path(path).parents if up.suffix == ".partial"]
    return any(name in said for name in names) or any(name in lines[0] for name in aside)


def io_errors(root: Path, trials: dict[str, int], *, seed: int) -> dict[str, Counts]:
    """Fail each task named so many times, and return what was counted for each."""
    choice, found = random.Random(seed), {}
    root.mkdir(parents=True, exist_ok=True)
    modules = {*(WITH_TORCH if {"import", "project"} & trials.keys() else PRELOAD), *ANALYSES, "tests.faults.eio"}
    with Zygote(*sorted(modules), preload=compiled(root)) as zygote:
        for name, n in trials.items():
            one = Failing(TASKS[name], root / name, zygote)
            faults = one.faults(choice)
            for _ in range(n):
                one.trial(next(faults))
            found[name] = one.counts
            shutil.rmtree(root / name)
    return found
