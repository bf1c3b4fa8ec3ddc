"""A store deleted or replaced under a process that uses it: one sentence, no hang, no mixture, nothing left behind.

Oracle: all rows of a store are one number, so whatever was made holds one number only; and what is at the path.
"""

from __future__ import annotations

import ast
import os
import random
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import datastore
from experiments.rawfiles import read_raw
from tests.faults import replacing
from tests.faults.zygote import Ended, Zygote

FIRST, OTHER = 2.0, 3.0
PRELOAD = ("tests.faults.replacing", "capture.exporting", "project.run", "calibrate.calibration", "torch", "dask.array")
TASKS = ("score", "calibrated", "exported")
MANNERS = ("deleted", "replaced")


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote(*PRELOAD) as running:
        yield running


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stores, never touched: each trial has links to their files."""
    made = tmp_path_factory.mktemp("stores")
    replacing.make(made / "first.zarr", FIRST)
    replacing.make(made / "other.zarr", OTHER)
    return made


@pytest.fixture
def root(stores: Path, tmp_path: Path) -> Path:
    return begin(stores, tmp_path)


def begin(stores: Path, root: Path) -> Path:
    (root / "out").mkdir(parents=True)
    for name, now in (("first.zarr", "run.zarr"), ("other.zarr", "other.zarr")):
        shutil.copytree(stores / name, root / now, copy_function=os.link)
    return root


def disturb(root: Path, manner: str) -> None:
    """Delete the store, or put another in its place."""
    if manner == "deleted":
        while (root / "run.zarr").exists():  # a directory that is written into meanwhile is not empty at once
            shutil.rmtree(root / "run.zarr", ignore_errors=True)
    else:
        (root / "run.zarr").rename(root / "away.zarr")
        (root / "other.zarr").rename(root / "run.zarr")


def run(zygote: Zygote, root: Path, task: str) -> Ended:
    return zygote.run(f"tests.faults.replacing:{task}", root / "run.zarr", root / "out", kill_after=120)


def one_sentence(ended: Ended, root: Path) -> bool:
    """Whether the output is one line that names the path and what to do, or what is gone while the rest is going."""
    lines = ended.output.strip().splitlines()
    cures = ("open the store again", "open it again", "check the path", "give another path", "run the same", "is lost")
    named = len(lines) == 1 and lines[0].startswith("error: ") and str(root / "run.zarr") in lines[0]
    return named and any(cure in lines[0] for cure in cures)


@pytest.mark.parametrize("manner", MANNERS)
@pytest.mark.parametrize("task", ["stream", "select"])
def test_a_reader_says_what_happened_to_its_store(manner: str, task: str, zygote: Zygote, root: Path) -> None:
    def meddle() -> None:
        while not (root / "out/begun").exists():
            time.sleep(0.001)
        disturb(root, manner)
        (root / "out/go").touch()

    meddler = threading.Thread(target=meddle)
    meddler.start()
    ended = run(zygote, root, task)
    meddler.join()
    assert not ended.killed
    assert ended.code == 1
    assert one_sentence(ended, root), ended.output
    assert f"was {manner} after the store was opened" in ended.output
    numbers = root / "out/numbers"
    assert task == "select" or ast.literal_eval(numbers.read_text()) == [FIRST]


@pytest.mark.parametrize("task", TASKS)
def test_work_on_a_store_that_goes_away_at_any_moment(task: str, zygote: Zygote, stores: Path, tmp_path: Path) -> None:
    before = begin(stores, tmp_path / "calm")
    calm = run(zygote, before, task)
    assert calm.code == 0, calm.output
    stopped, seconds = 0, calm.seconds
    for trial in range(40):
        if trial >= 4 and stopped:
            break
        manner = MANNERS[trial % 2]
        root = begin(stores, tmp_path / str(trial))
        moment = seconds * random.Random(trial).uniform(0.1, 0.9)
        meddler = threading.Timer(moment, disturb, (root, manner))
        meddler.start()
        ended = run(zygote, root, task)
        meddler.join()
        where = f"{manner} after {moment:.3f} of {seconds:.3f} s: {ended.output}"
        assert not ended.killed, where
        stopped += ended.code != 0
        seconds = seconds if ended.code else min(seconds, ended.seconds)  # the first may have had less of the machine
        assert ended.code == 0 or one_sentence(ended, root), where
        consistent(root, manner, where)
    assert stopped, "no trial met the work under way"


def consistent(root: Path, manner: str, where: str) -> None:
    """What is at the path, and what was made, is of one store."""
    if manner == "deleted":
        left = {one.relative_to(root / "run.zarr").parts[0] for one in (root / "run.zarr").rglob("*")}
        assert not left, f"{where}\nsomething was made where the store had been: {left}"
    else:
        store = datastore.open(root / "run.zarr")
        assert np.unique(store.select("residual").values).tolist() == [OTHER], where
        for kind in ("scores", "calibration"):
            assert not list((root / "run.zarr" / kind).glob("*.partial")), where
        for number in (root / "run.zarr/scores").glob("0*"):
            assert np.unique(store.scores().score.values).tolist() == [OTHER], f"{where}\n{number}"
        for number in (root / "run.zarr/calibration").glob("0*"):
            norm = store.calibration().norm.values
            assert np.allclose(norm, OTHER * replacing.WIDTH**0.5, rtol=1e-5), f"{where}\n{number}"
    for file in (root / "out").rglob("*.pt"):
        assert not file.name.startswith("."), where
        found = {float(n) for rows in read_raw(file).rows() for n in np.unique(rows.values.astype(np.float32))}
        assert len(found) == 1, f"{where}\n{file} holds {found}"
    files = list((root / "out").rglob("*.pt"))
    firsts = {float(next(iter(read_raw(file).rows())).values[0, 0]) for file in files}
    assert len(firsts) <= 1, f"{where}\nfiles of several stores: {firsts}"
