"""kill -9 of real processes at any instant: what is resumed is, to the byte, what was never interrupted."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import zarr

from datastore import storage
from datastore.gc import collect, plan_collection
from datastore.planning import laid_down
from tests.datastore import making

ROOT = Path(__file__).parents[2]
# Enough rows to be killed among: 3 layers x 2 components x 55 chunks, each with its statistics.
COUNTS = [7, 300, 41, 64, 200, 5, 90, 130, 33, 410, 380, 77]
LAYERS = (0, 3, 4)

PRODUCER = """
import sys
from pathlib import Path
import datastore
from tests.datastore import making, test_kill

store, part = Path(sys.argv[1]), tuple(int(n) for n in sys.argv[2].split("/"))
print("ready", flush=True)
for plan in making.plans(store, making.rollouts(*test_kill.COUNTS), test_kill.LAYERS, most_tokens=32):
    with datastore.create(store, plan, part=part, memory=8 << 10) as writer:
        for batch in writer.todo():
            for layer in plan.layers:
                for name in batch.stored:
                    one = plan.rollouts[plan.rows[name]]
                    for spec in plan.components:
                        writer.put(spec.name, layer, name, making.values(spec, layer, one))
        writer.commit()
"""


def start(store: Path, part: str = "1/1") -> subprocess.Popen[str]:
    """Start a producer in a process group of its own, and wait until its imports are done."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", PRODUCER, str(store), part],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def kill(process: subprocess.Popen[str], after: float) -> bool:
    """Kill it after so many seconds; return whether it was still running then."""
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


def finish(store: Path, part: str = "1/1") -> None:
    """Run a producer to its end."""
    process = start(store, part)
    _, errors = process.communicate()
    assert process.returncode == 0, errors


def finished(store: Path) -> dict[Path, tuple[int, int]]:
    """Return inode and time of each chunk of the plan that is there and decodes, read with zarr-python."""
    found: dict[Path, tuple[int, int]] = {}
    for group in (directory / "group" for directory in laid_down(store)):
        if not group.is_dir():
            continue  # killed after it was published
        for component in ("residual", "k_proj"):
            array = zarr.open_array(group / component, mode="r")
            size = array.chunks[0]
            for file in (group / component / "c").glob("*/*/0"):
                index, layer = int(file.parts[-3]), int(file.parts[-2])
                try:
                    array[index * size : (index + 1) * size, layer]
                except Exception:
                    continue
                found[file.relative_to(group)] = (file.stat().st_ino, file.stat().st_mtime_ns)
    return found


def assert_kept(store: Path, chunks: dict[Path, tuple[int, int]]) -> None:
    """Check that chunks which were finished are the very same files in the capture."""
    now = {p: (store / "captures/0001" / p).stat() for p in chunks}
    assert {p: (s.st_ino, s.st_mtime_ns) for p, s in now.items()} == chunks


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], float]:
    """Return the store that was never interrupted, and the seconds it took after its imports."""
    store = tmp_path_factory.mktemp("whole") / "run.zarr"
    process = start(store)
    began = time.monotonic()
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return making.on_disk(store), time.monotonic() - began


def damage(store: Path, choice: random.Random) -> None:
    """Cut a chunk and a partial of the plan short, as a power cut may leave them."""
    for pattern in ("group/residual/c/*/*/0", "partials/residual/*/*"):
        files = sorted(file for directory in laid_down(store) for file in directory.glob(pattern))
        if files:
            file = choice.choice(files)
            file.write_bytes(file.read_bytes()[: choice.randrange(file.stat().st_size)])


def assert_nothing_is_left(store: Path) -> None:
    """Check that no plan is left, and that what killed processes left of plans is what `gc` removes."""
    assert laid_down(store) == []
    collect(plan_collection(store, older_than=0))
    assert [file.name for file in store.parent.iterdir() if file.name.startswith(store.name)] == [store.name]


@pytest.mark.parametrize("seed", range(5))
def test_killed_again_and_again(tmp_path: Path, whole: tuple[dict[str, bytes], float], seed: int) -> None:
    """Four kills of one capture, then it is finished; with odd seeds a chunk and a partial are cut short as well."""
    choice, store, kills, longest = random.Random(seed), tmp_path / "run.zarr", 0, 0.6 * whole[1]
    kept: dict[Path, tuple[int, int]] = {}
    for attempt in itertools.count():
        killed = kill(start(store), choice.uniform(0, longest))
        kills, longest = kills + killed, longest if killed else 0.7 * longest
        if storage.numbered(store / "captures"):
            assert making.on_disk(store) == whole[0]
            store, kept = tmp_path / f"{attempt}" / "run.zarr", {}
            continue
        if kills >= 4:
            break
        if seed % 2:
            damage(store, choice)
        now = finished(store)
        assert seed % 2 or {p: now.get(p) for p in kept} == kept
        kept = now
    kept = finished(store)
    finish(store)
    assert_kept(store, kept)
    assert making.on_disk(store) == whole[0]
    assert_nothing_is_left(store)


@pytest.mark.parametrize("seed", range(2))
def test_two_parts_at_once_are_killed(tmp_path: Path, whole: tuple[dict[str, bytes], float], seed: int) -> None:
    """Both parts run side by side and are killed at other instants; started again, whichever ends last commits."""
    choice, store = random.Random(100 + seed), tmp_path / "run.zarr"
    parts: Sequence[str] = ("1/2", "2/2")
    both = [start(store, part) for part in parts]
    for process in both:
        kill(process, choice.uniform(0, whole[1] / 3))
    kept = finished(store)
    running = [start(store, part) for part in parts]
    failed = [errors for process in running if (errors := process.communicate()[1]) and process.returncode]
    assert failed == []
    assert_kept(store, kept)
    assert making.on_disk(store) == whole[0]
    assert_nothing_is_left(store)


def test_a_kill_between_publishing_and_cleaning_up_leaves_nothing_to_do(
    tmp_path: Path, whole: tuple[dict[str, bytes], float]
) -> None:
    """The plan's directory without its group is what such a kill leaves; the next plan of anything removes it."""
    store = tmp_path / "run.zarr"
    plan = making.plans(store, making.rollouts(*COUNTS), LAYERS, most_tokens=32)[0]
    finish(store)
    remains = tmp_path / "run.zarr.plans" / plan.key
    remains.mkdir(parents=True)
    (remains / "plan.json").write_text("{}")
    finish(store)  # nothing to do, so nothing is touched
    assert making.on_disk(store) == whole[0]
    making.capture(store, [making.rollout("new", 3)], layers=[9])
    assert not remains.exists()
