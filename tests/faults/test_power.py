"""A sample of the power cuts that `make bench-faults` replays: after each, the last commit or the one before."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.datastore import making
from tests.faults.blackout import blackouts
from tests.faults.kills import PRELOAD
from tests.faults.power import cuts, recorded
from tests.faults.tasks import TASKS
from tests.faults.zygote import Zygote


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote(*PRELOAD, "tests.faults.power") as one:
        yield one


@pytest.mark.parametrize("name", ["growth", "gc"])
def test_everything_that_a_process_does_to_files_is_recorded(name: str, tmp_path: Path, zygote: Zygote) -> None:
    """What the recorder saw, replayed without loss, gives the very files that the process left."""
    task, before, run = TASKS[name], tmp_path / "before", tmp_path / "run"
    before.mkdir()
    task.begin(before)
    shutil.copytree(before, run)
    ended = zygote.run("tests.faults.power:record", run, tmp_path / "log", task.call, *task.arguments(run))
    assert ended.code == 0, ended.output
    ops = recorded(tmp_path / "log")
    *_, last = (cut.disk for cut in cuts(before, ops, random.Random(0), samples=0) if cut.how == "all")
    last.write(tmp_path / "replayed")
    assert making.on_disk(tmp_path / "replayed") == making.on_disk(run)
    assert {"rename", "fsync"} <= {op.name for op in ops}


def test_a_power_cut_leaves_the_last_commit_or_the_one_before(tmp_path: Path) -> None:
    counts = blackouts(tmp_path, ["capture", "gc", "drop"], seed=1, samples=1, every=10, resumed=2)
    assert {name: one.wrong for name, one in counts.items() if not one.ok} == {}
    assert sum(one.states for one in counts.values()) >= 6
