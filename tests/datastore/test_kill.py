"""kill -9 of real processes at any instant: what is resumed is, to the byte, what was never interrupted."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zarr

import datastore
from datastore import storage
from datastore.gc import collect, plan_collection
from datastore.planning import laid_down
from tests.datastore import making
from tests.faults.zygote import Zygote

# Enough rows to be killed among: 3 layers x 2 components x 55 chunks, each with its statistics.
COUNTS = [7, 300, 41, 64, 200, 5, 90, 130, 33, 410, 380, 77]
LAYERS = (0, 3, 4)

PRODUCE = "tests.datastore.test_kill:produce"


def produce(store: str, part: str) -> None:
    """Write all that is left to do of a part of the plan, and commit it."""
    numbers = tuple(int(number) for number in part.split("/"))
    for plan in making.plans(Path(store), making.rollouts(*COUNTS), LAYERS, most_tokens=32):
        with datastore.create(store, plan, part=(numbers[0], numbers[1]), memory=8 << 10) as writer:
            for batch in writer.todo():
                for layer in plan.layers:
                    for name in batch.stored:
                        one = plan.rollouts[plan.rows[name]]
                        for spec in plan.components:
                            writer.put(spec.name, layer, name, making.values(spec, layer, one))
            writer.commit()


@pytest.fixture(scope="module")
def zygotes() -> Iterator[tuple[Zygote, Zygote]]:
    """Start processes that have imported everything, as many as run side by side."""
    module = PRODUCE.partition(":")[0]
    with Zygote(module) as one, Zygote(module) as other:
        yield one, other


def finish(zygote: Zygote, store: Path, part: str = "1/1") -> None:
    """Run a producer to its end."""
    ended = zygote.run(PRODUCE, store, part)
    assert ended.code == 0, ended.output


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
def whole(tmp_path_factory: pytest.TempPathFactory, zygotes: tuple[Zygote, Zygote]) -> tuple[dict[str, bytes], float]:
    """Return the store that was never interrupted, and the seconds it took after its imports."""
    store = tmp_path_factory.mktemp("whole") / "run.zarr"
    ended = zygotes[0].run(PRODUCE, store, "1/1")
    assert ended.code == 0, ended.output
    return making.on_disk(store), ended.seconds


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
def test_killed_again_and_again(
    tmp_path: Path, whole: tuple[dict[str, bytes], float], zygotes: tuple[Zygote, Zygote], seed: int
) -> None:
    """Four kills of one capture, then it is finished; with odd seeds a chunk and a partial are cut short as well."""
    choice, store, kills, longest = random.Random(seed), tmp_path / "run.zarr", 0, 0.6 * whole[1]
    kept: dict[Path, tuple[int, int]] = {}
    for attempt in itertools.count():
        killed = zygotes[0].run(PRODUCE, store, "1/1", kill_after=choice.uniform(0, longest)).killed
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
    finish(zygotes[0], store)
    assert_kept(store, kept)
    assert making.on_disk(store) == whole[0]
    assert_nothing_is_left(store)


@pytest.mark.parametrize("seed", range(2))
def test_two_parts_at_once_are_killed(
    tmp_path: Path, whole: tuple[dict[str, bytes], float], zygotes: tuple[Zygote, Zygote], seed: int
) -> None:
    """Both parts run side by side and are killed at other instants; started again, whichever ends last commits."""
    choice, store = random.Random(100 + seed), tmp_path / "run.zarr"
    parts: Sequence[str] = ("1/2", "2/2")
    first = choice.uniform(0, whole[1] / 3)
    ends = (first, first + choice.uniform(0, whole[1] / 3))
    with ThreadPoolExecutor(len(parts)) as pool:
        for ended in pool.map(
            lambda zygote, part, after: zygote.run(PRODUCE, store, part, kill_after=after), zygotes, parts, ends
        ):
            assert ended.killed or ended.code == 0, ended.output
    kept = finished(store)
    with ThreadPoolExecutor(len(parts)) as pool:
        list(pool.map(finish, zygotes, [store] * len(parts), parts))
    assert_kept(store, kept)
    assert making.on_disk(store) == whole[0]
    assert_nothing_is_left(store)


def test_a_kill_between_publishing_and_cleaning_up_leaves_nothing_to_do(
    tmp_path: Path, whole: tuple[dict[str, bytes], float], zygotes: tuple[Zygote, Zygote]
) -> None:
    """The plan's directory without its group is what such a kill leaves; the next plan of anything removes it."""
    store = tmp_path / "run.zarr"
    plan = making.plans(store, making.rollouts(*COUNTS), LAYERS, most_tokens=32)[0]
    finish(zygotes[0], store)
    remains = tmp_path / "run.zarr.plans" / plan.key
    remains.mkdir(parents=True)
    (remains / "plan.json").write_text("{}")
    finish(zygotes[0], store)  # nothing to do, so nothing is touched
    assert making.on_disk(store) == whole[0]
    making.capture(store, [making.rollout("new", 3)], layers=[9])
    assert not remains.exists()
