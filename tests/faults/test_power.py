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
from tests.faults.power import Disk, cuts, recorded
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


def test_a_plan_can_be_read_after_a_power_cut_while_it_is_committed(tmp_path: Path, zygote: Zygote) -> None:
    """Its metadata, which the commit writes anew, is the old or the new, whatever else the disk has kept."""
    task, before, run = TASKS["capture"], tmp_path / "before", tmp_path / "run"
    before.mkdir()
    task.begin(before)
    shutil.copytree(before, run)
    ended = zygote.run("tests.faults.power:record", run, tmp_path / "log", task.call, *task.arguments(run))
    assert ended.code == 0, ended.output
    seen: set[bytes] = set()
    for cut in cuts(before, recorded(tmp_path / "log"), random.Random(0), samples=1):
        documents = dict(_documents(cut.disk))
        unreadable = [path for path, content in documents.items() if not content.strip().endswith(b"}")]
        assert not unreadable, f"{cut.how} of {cut.after} operations"
        seen |= {content for path, content in documents.items() if path.endswith("/group/zarr.json")}
    assert len(seen) >= 3, "before, with the attributes, and consolidated"


def _documents(disk: Disk, at: int = 0, path: str = "") -> Iterator[tuple[str, bytes]]:
    """Yield path and content of the metadata of groups of plans that a reader may open."""
    for name, number in disk.entries[at].items():
        if number in disk.entries:
            yield from _documents(disk, number, f"{path}/{name}")
        elif name == "zarr.json" and ".plans/" in path and ".partial" not in path:
            yield f"{path}/{name}", disk.content[number]


def test_a_power_cut_leaves_the_last_commit_or_the_one_before(tmp_path: Path) -> None:
    counts = blackouts(tmp_path, ["capture", "gc", "drop"], seed=1, samples=1, every=10, resumed=2)
    assert {name: one.wrong for name, one in counts.items() if not one.ok} == {}
    assert sum(one.states for one in counts.values()) >= 6
