"""kill -9 at random instants: what was committed reads as before, nothing half-done reads at all, work is not redone.

Oracle: every cell's bytes before, and after the same work done by a process that nobody killed.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from datastore import storage
from datastore.codec import ChunkDecoder
from datastore.errors import CorruptError
from datastore.gc import collect, plan_collection
from datastore.planning import laid_down
from datastore.union import load_union
from datastore.verify import verify
from tests.faults.tasks import TASKS, Task
from tests.faults.zygote import Ended, Zygote

PRELOAD = ("tests.faults.tasks", "datastore.query", "datastore.compact", "datastore.merge", "datastore.gc")
WITH_TORCH = (*PRELOAD, "capture.importing", "capture.runner", "torch", "transformers")


class Rows(NamedTuple):
    """How many rows, and their bytes."""

    n: int
    data: bytes


Cells = dict[tuple[str, str, str, int], Rows]
"""By store, rollout, component and layer."""


@dataclass(slots=True)
class Counts:
    """What a campaign counted; all but the first three should be 0."""

    trials: int = 0
    kills: int = 0
    rows_lost: int = 0
    phantom_rows: int = 0
    chunks_redone: int = 0
    unreadable: int = 0
    not_resumed: int = 0
    leftovers: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing went wrong."""
        found = (self.rows_lost, self.phantom_rows, self.chunks_redone, self.unreadable, self.not_resumed)
        return not any((*found, self.leftovers))


class Chunk(NamedTuple):
    """A finished chunk of a plan: the plan's key and where it is below the plan's group."""

    plan: str
    path: str


def cells(root: Path, task: Task) -> Cells:
    """Return the bytes of every cell that counts of every store of a task, read with zarr-python."""
    found: Cells = {}
    for store in task.stores:
        if (root / store).exists():
            union, arrays = load_union(root / store), dict[Path, NDArray[Any]]()
            for name in union.rollout_ids:
                for layer, component in union.cells_of(name):
                    cell = union.cell(component, layer, name)
                    where = cell.capture.path / component
                    if where not in arrays:
                        arrays[where] = np.asarray(storage.zarr_array(where)[...])
                    rows = arrays[where][slice(*cell.tokens), cell.capture.layers.index(layer)]
                    found[store, name, component, layer] = Rows(len(rows), rows.tobytes())
    return found


def finished(root: Path, task: Task) -> dict[Chunk, tuple[int, int]]:
    """Return inode and time of each chunk of a plan that is there and decodes."""
    found = {}
    for store in task.stores:
        for group in _groups(root / store):
            for file in _whole_chunks(group):
                state = file.stat()
                chunk = Chunk(group.parent.name, file.relative_to(group).as_posix())
                found[chunk] = (state.st_ino, state.st_mtime_ns)
    return found


def _groups(store: Path) -> list[Path]:
    """Return the groups of the plans that are being filled."""
    return [group for directory in laid_down(store) if (group := directory / "group").is_dir()]


def _whole_chunks(group: Path) -> Iterator[Path]:
    for component in storage.attributes(group)["components"]:
        decoder = ChunkDecoder.of(storage.array_metadata(group / component["name"]))
        assert decoder is not None
        for file in (group / component["name"]).glob("c/*/*/0"):
            with suppress(CorruptError):
                decoder.decode_into(file.read_bytes(), np.empty((decoder.tokens, decoder.width), decoder.dtype))
                yield file


def _now(root: Path, task: Task) -> dict[Chunk, tuple[int, int]]:
    """Return inode and time of all chunks of plans and captures, by the plan that wrote them."""
    groups: dict[Path, str] = {}
    for store in task.stores:
        groups |= {group: group.parent.name for group in _groups(root / store)}
        for number in storage.numbered(root / store / "captures"):
            capture = root / store / "captures" / f"{number:04d}"
            groups[capture] = json.loads((capture / "zarr.json").read_text())["attributes"]["plan"]
    found = {}
    for group, plan in groups.items():
        for file in group.glob("*/c/*/*/0"):
            state = file.stat()
            found[Chunk(plan, file.relative_to(group).as_posix())] = (state.st_ino, state.st_mtime_ns)
    return found


class Campaign:
    """Trials of one task: begin, kill, look, go on, until it is done.

    Parameters
    ----------
    task : Task
    root : Path
        A directory of its own.
    zygote : Zygote
    """

    def __init__(self, task: Task, root: Path, zygote: Zygote) -> None:
        self.task, self.root, self.zygote = task, root, zygote
        (root / "before").mkdir(parents=True)
        task.begin(root / "before")
        self.before = cells(root / "before", task)
        shutil.copytree(root / "before", root / "after")
        ended = self._run(root / "after")
        assert ended.code == 0, ended.output
        self.seconds, self.after = ended.seconds, cells(root / "after", task)
        self.counts = Counts()

    def _run(self, directory: Path, kill_after: float | None = None) -> Ended:
        return self.zygote.run(self.task.call, *self.task.arguments(directory), kill_after=kill_after)

    def trial(self, choice: random.Random, most_kills: int) -> None:
        """Kill the task at most so many times, and let it end."""
        here, counts = self.root / f"trial-{self.counts.trials}", self.counts
        counts.trials += 1
        shutil.copytree(self.root / "before", here)
        for attempt in range(most_kills + 1):
            chunks = finished(here, self.task)
            ended = self._run(here, choice.uniform(0, 1.1 * self.seconds) if attempt < most_kills else None)
            counts.kills += ended.killed
            if not attempt and not ended.killed:
                self.seconds = ended.seconds  # as long as it takes now: other work comes and goes
            self._look(here)
            now = _now(here, self.task)
            redone = [chunk for chunk, state in chunks.items() if now.get(chunk, state) != state]
            counts.chunks_redone += len(redone)
            if not ended.killed:
                self._done(here, ended)
                break
        shutil.rmtree(here)

    def _look(self, here: Path) -> None:
        """Count the cells that are lost, and those that nobody committed."""
        try:
            found = cells(here, self.task)
        except Exception as error:
            self.counts.unreadable += 1
            self.counts.wrong.append(f"{self.task.name}: {error}")
            return
        for key, rows in self.before.items():
            if found.get(key) not in (rows, self.after.get(key)):
                self.counts.rows_lost += rows.n
        for key, rows in found.items():
            if rows not in (self.before.get(key), self.after.get(key)):
                self.counts.phantom_rows += rows.n

    def _done(self, here: Path, ended: Ended) -> None:
        taken = "is there already" in ended.output and self.task.name == "merge"  # killed after its rename
        bad = [store for store in self.task.stores if not verify(here / store, full=True).ok]
        if (ended.code and not taken) or bad or cells(here, self.task) != self.after:
            self.counts.not_resumed += 1
            self.counts.wrong.append(f"{self.task.name}: exit {ended.code}, damaged {bad}: {ended.output[-600:]}")
        for store in self.task.stores:
            collect(plan_collection(here / store, older_than=0))
        stray = [path for path in here.rglob("*") if ".partial" in path.name or path.name.endswith(".plans")]
        self.counts.leftovers += len(stray)
        self.counts.wrong += [f"{self.task.name}: left {path.relative_to(here)}" for path in stray[:3]]


def campaign(root: Path, kills: dict[str, int], *, seed: int, most_kills: int = 3) -> dict[str, Counts]:
    """Kill each task named at least so many times and return what was counted for each."""
    choice, found = random.Random(seed), {}
    with Zygote(*(WITH_TORCH if {"import", "model"} & kills.keys() else PRELOAD)) as zygote:
        for name, wanted in kills.items():
            one = Campaign(TASKS[name], root / name, zygote)
            while one.counts.kills < wanted and one.counts.trials < 4 * wanted:
                one.trial(choice, min(most_kills, wanted - one.counts.kills))
            found[name] = one.counts
            shutil.rmtree(root / name)
    return found
