"""The campaign of power cuts: each state that a disk may be left in is opened, and some of them are gone on with.

Oracle: what the store read as after each operation of the recorded process, nothing being lost.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import datastore
from datastore.verify import verify
from tests.faults.kills import PRELOAD, WITH_TORCH, Cells, cells
from tests.faults.power import Cut, cuts, recorded
from tests.faults.tasks import TASKS, Task
from tests.faults.zygote import Zygote

State = tuple[Cells, dict[str, str]]


@dataclass(slots=True)
class Counts:
    """What a campaign counted; all from `mixtures` on should be 0."""

    operations: int = 0
    cuts: int = 0
    states: int = 0
    gone_on: int = 0
    mixtures: int = 0
    unreadable: int = 0
    commits_lost: int = 0
    not_resumed: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing went wrong."""
        return not any((self.mixtures, self.unreadable, self.commits_lost, self.not_resumed))


def state(root: Path, task: Task) -> State:
    """Return what the stores of a task hold: every cell, and the tables with their labels."""
    there = [store for store in task.stores if (root / store).exists()]
    tables = {store: str(datastore.open(root / store).rollouts.sort_index().to_json()) for store in there}
    return cells(root, task), {store: table for store, table in tables.items() if table != "{}"}


def _unlike(found: State, after: State) -> str:
    rows = [key for key in found[0].keys() | after[0].keys() if found[0].get(key) != after[0].get(key)]
    return f"{len(rows)} cells differ from the end, {sorted(rows)[:2]}; tables differ: {found[1] != after[1]}"


class Blackout:
    """One recorded task, and the power cuts of it.

    Parameters
    ----------
    task : Task
    root : Path
        A directory of its own.
    zygote : Zygote
    """

    def __init__(self, task: Task, root: Path, zygote: Zygote) -> None:
        self.task, self.root, self.zygote, self.counts = task, root, zygote, Counts()
        (root / "before").mkdir(parents=True)
        task.begin(root / "before")
        shutil.copytree(root / "before", root / "run")
        words = (root / "run", root / "log", task.call, *task.arguments(root / "run"))
        ended = zygote.run("tests.faults.power:record", *words)
        assert ended.code == 0, ended.output
        self.ops = recorded(root / "log")
        self.counts.operations = len(self.ops)
        self.after = state(root / "run", task)
        self._seen: dict[int, State | None] = {}
        self.allowed = [state(root / "before", task)]

    def run(self, choice: random.Random, *, samples: int, every: int, resumed: int) -> Counts:
        """Open what is left by cuts after every so many operations, and go on with so many of them."""
        for cut in self._cuts(random.Random(0), samples=0, every=every):
            if cut.how == "all":
                found = self._state(cut)
                if found is not None and found not in self.allowed:
                    self.allowed.append(found)
        places = range(0, len(self.ops), every)
        going_on = set(choice.sample(places, min(resumed, len(places))))
        for cut in self._cuts(choice, samples=samples, every=every):
            self._look(cut)
            if cut.after in going_on and cut.how in ("entries only", "some"):
                going_on.discard(cut.after)
                self._go_on(cut)
        return self.counts

    def _cuts(self, choice: random.Random, *, samples: int, every: int) -> Iterator[Cut]:
        return cuts(self.root / "before", self.ops, choice, samples=samples, every=every)

    def _state(self, cut: Cut) -> State | None:
        """Return what the stores read as after a cut, None where they can't be read; each state is looked at once."""
        numbers = [cut.disk.find(store) for store in self.task.stores]
        key = hash(tuple(None if n is None else cut.disk.fingerprint(n) for n in numbers))
        if key not in self._seen:
            here = self.root / "here"
            here.mkdir()
            for store, number in zip(self.task.stores, numbers, strict=True):
                if number is not None:
                    cut.disk.write(here / store, number)
            try:
                self._seen[key] = state(here, self.task)
            except Exception as error:
                self._seen[key] = None
                self.counts.wrong.append(f"{self.task.name}, {cut.how} of {cut.after} operations: {error}")
            shutil.rmtree(here)
            self.counts.states += 1
        return self._seen[key]

    def _look(self, cut: Cut) -> None:
        self.counts.cuts += 1
        found = self._state(cut)
        self.counts.unreadable += found is None
        if found is not None and found not in self.allowed:
            self.counts.mixtures += 1
            what = _unlike(found, self.after)
            self.counts.wrong.append(f"{self.task.name}, {cut.how} of {cut.after} operations: {what}")
        elif found is not None:
            self.counts.commits_lost += cut.done and found != self.after

    def _go_on(self, cut: Cut) -> None:
        """Do the same once more with what is left."""
        here = self.root / "resumed"
        cut.disk.write(here)
        ended = self.zygote.run(self.task.call, *self.task.arguments(here))
        self.counts.gone_on += 1
        taken = "is there already" in ended.output and self.task.name == "merge"
        whole = all(verify(here / store, full=True).ok for store in self.task.stores)
        over = self.task.name == "drop" and "nothing to drop" in ended.output
        if (ended.code and not taken and not over) or not whole or state(here, self.task) != self.after:
            self.counts.not_resumed += 1
            what = f"{self.task.name}, {cut.how} of {cut.after} operations: exit {ended.code}: {ended.output[-600:]}"
            self.counts.wrong.append(what)
        shutil.rmtree(here)


def blackouts(
    root: Path, names: list[str], *, seed: int, samples: int = 3, every: int = 1, resumed: int = 10
) -> dict[str, Counts]:
    """Cut the power of each task named and return what was counted for each."""
    choice, found = random.Random(seed), {}
    with Zygote(*(WITH_TORCH if {"import", "label"} & set(names) else PRELOAD), "tests.faults.power") as zygote:
        for name in names:
            one = Blackout(TASKS[name], root / name, zygote)
            found[name] = one.run(choice, samples=samples, every=every, resumed=resumed)
            shutil.rmtree(root / name)
    return found
