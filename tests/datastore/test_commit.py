"""What a commit adds: statistics against plain NumPy, however the work was divided; who commits, and when not."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

import datastore
from datastore import capture_group, maintenance, storage
from datastore.commit import committed_as
from datastore.errors import CorruptError, DatastoreError, PlanError
from datastore.planning import plans_directory
from datastore.schema import SEGMENTS, STATISTICS, ComponentSpec, Plan
from datastore.union import load_union
from tests.datastore import making

COUNTS = (5, 17, 3, 40, 9, 33)
NARROW = (ComponentSpec(name="residual", width=4, dtype="float32"),)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.zarr"


def expected(rows: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Return the statistics of rows (tokens, width) in float64, as a textbook has them."""
    wide = rows.astype(np.float64)
    finite = np.isfinite(wide)
    kept = np.where(finite, wide, 0)
    whole = finite.all(axis=1) & (kept != 0).any(axis=1)
    unit = kept[whole] / np.linalg.norm(kept[whole], axis=1, keepdims=True)
    return {
        "count": finite.sum(axis=0),
        "sum": kept.sum(axis=0),
        "sum_squares": (kept**2).sum(axis=0),
        "sum_abs": np.abs(kept).sum(axis=0),
        "max_abs": np.abs(kept).max(axis=0, initial=0),
        "sum_unit": unit.sum(axis=0),
        "nonfinite": (~finite).sum(axis=0),
    }


def put_all(path: Path, plan: Plan, rows: dict[str, NDArray[Any]], part: tuple[int, int] = (1, 1)) -> int | None:
    with datastore.create(path, plan, part=part) as writer:
        for name, values in rows.items():
            for layer in plan.layers:
                writer.put("residual", layer, name, values * (layer + 1))
        return writer.commit()


def test_statistics_in_chunks_are_the_bytes_that_zarr_python_writes(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of five rollouts a chunk, so that the last one is padded; the numbers are those of one chunk for all."""
    counts = (700, 690, 1400, 650, 720)
    for where, rows in ((path.with_name("whole.zarr"), 5), (path, 2)):
        monkeypatch.setattr(capture_group, "STATS_ROW_BYTES", rows * len(SEGMENTS) * 4 * 8)
        (plan,) = making.plans(where, making.rollouts(*counts), components=NARROW, batch_tokens=5000, most_tokens=64)
        with datastore.create(where, plan) as writer:
            making.fill(writer)
            assert writer.commit() == 1
    found, whole = (
        {name: zarr.open_array(one / "captures/0001/stats/residual" / name, mode="r") for name in (*STATISTICS, "norm")}
        for one in (path, path.with_name("whole.zarr"))
    )
    assert [one["sum"].chunks[0] for one in (found, whole)] == [2, 5]
    for name, array in found.items():
        values = np.asarray(array[...])
        np.testing.assert_array_equal(values, np.asarray(whole[name][...]))
        again = path.with_name("again") / name
        shutil.copytree(path / "captures/0001/stats/residual" / name, again)
        shutil.rmtree(again / "c")
        zarr.open_array(again, mode="r+").with_config({"write_empty_chunks": True})[...] = values
        files = sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
        stored = path / "captures/0001/stats/residual" / name
        assert files == sorted(p.relative_to(stored) for p in stored.rglob("*") if p.is_file())
        assert all((again / file).read_bytes() == (stored / file).read_bytes() for file in files)


@pytest.mark.parametrize(("counts", "level"), [(COUNTS, "capture"), ((700, 690, 1400), "rollout")])
def test_statistics_are_those_of_the_stored_rows(path: Path, counts: tuple[int, ...], level: str) -> None:
    (plan,) = making.plans(path, making.rollouts(*counts), components=NARROW, batch_tokens=5000, most_tokens=64)
    random = np.random.default_rng(0)
    rows = {r.rollout_id: random.standard_normal((r.n_tokens, 4)).astype(np.float32) for r in plan.rollouts}
    rows["1"][2, 1], rows["2"][0] = np.nan, 0
    rows["0"][4, 3] = -np.inf
    assert put_all(path, plan, rows) == 1
    group = path / "captures" / "0001"
    attrs = storage.attributes(group)
    assert attrs["statistics"] == level
    assert attrs["nonfinite"] == {"residual": 4}
    where = [{"component": "residual", "layer": n, "rollout_id": i, "position": p} for n in (1, 5) for i, p in
             sorted((("1", 2), ("0", 4)), key=lambda one: plan.rows[one[0]])]  # fmt: skip
    assert attrs["nonfinite_tokens"] == where
    found = {name: np.asarray(zarr.open_array(group / "stats" / "residual" / name)[...]) for name in STATISTICS}
    for index, layer in enumerate(plan.layers):
        whole = {name: values * (layer + 1) for name, values in rows.items()}
        for segment in range(len(SEGMENTS)):
            pieces = {r.rollout_id: whole[r.rollout_id][r.segment == segment] for r in plan.rollouts}
            for row, one in enumerate(plan.rollouts):
                part = np.concatenate(list(pieces.values())) if level == "capture" else pieces[one.rollout_id]
                place = (segment, index) if level == "capture" else (row, segment, index)
                for name, values in expected(part).items():
                    np.testing.assert_allclose(found[name][place], values, rtol=1e-12, atol=1e-12, err_msg=name)
        norms = np.concatenate([np.linalg.norm(whole[r.rollout_id].astype(np.float64), axis=1) for r in plan.rollouts])
        norms[np.isinf(norms)] = np.inf
        stored = np.asarray(zarr.open_array(group / "stats" / "residual" / "norm")[:, index])
        np.testing.assert_allclose(stored, norms, rtol=1e-6)


def test_statistics_may_be_left_out(path: Path) -> None:
    making.capture(path, making.rollouts(*COUNTS), statistics=False)
    assert storage.attributes(path / "captures" / "0001")["statistics"] == "none"
    assert not (path / "captures" / "0001" / "stats").exists()


@pytest.mark.parametrize("level", ["capture", "rollout"])
def test_partials_that_are_missing_or_damaged_are_computed_again_to_the_bit(tmp_path: Path, level: str) -> None:
    """Whole, cut off, empty, another chunk's, and gone: the finished stores are the same to the byte."""
    asked = making.rollouts(*((700, 690) if level == "rollout" else COUNTS))

    def captured(path: Path, harm: bool) -> dict[str, bytes]:
        (plan,) = making.plans(path, asked, components=NARROW)
        assert plan.stats_level == level
        with datastore.create(path, plan) as writer:
            making.fill(writer)
            writer.flush()
            if harm:
                files = sorted(p for p in (plans_directory(path) / plan.key / "partials").rglob("*") if p.is_file())
                whole = files[3].read_bytes()
                files[0].unlink()
                files[1].write_bytes(files[1].read_bytes()[:-1])
                files[2].write_bytes(b"")
                files[4].write_bytes(whole)
                files[5].write_bytes(b"0000" + files[5].read_bytes()[4:])
            writer.commit()
        return making.on_disk(path)

    assert captured(tmp_path / "harmed" / "run.zarr", True) == captured(tmp_path / "whole" / "run.zarr", False)


def test_a_commit_that_was_killed_is_done_again(tmp_path: Path) -> None:
    """All that a commit writes before its rename may be there already, with temporary files between."""
    making.capture(tmp_path / "one" / "run.zarr", making.rollouts(*COUNTS))
    path = tmp_path / "two" / "run.zarr"
    (plan,) = making.plans(path, making.rollouts(*COUNTS))
    directory = plans_directory(path) / plan.key
    with datastore.create(path, plan) as writer:
        making.fill(writer)
        writer.flush()
    saved = tmp_path / "saved"
    shutil.copytree(directory, saved)
    with datastore.create(path, plan) as writer:
        assert writer.commit() == 1
    committed = making.on_disk(path)
    shutil.copytree(path / "captures" / "0001", saved / "group", dirs_exist_ok=True)
    shutil.rmtree(path)
    storage.create_root(path)
    for leftover in ("zarr.1.partial", "stats/residual/norm/c/0/0.2.partial", "residual/c/0/0/0.3.partial"):
        (saved / "group" / leftover).write_bytes(b"half")
    directory.parent.mkdir(exist_ok=True)
    shutil.copytree(saved, directory)
    with datastore.create(path, making.plans(path, making.rollouts(*COUNTS))[0]) as writer:
        assert writer.todo() == []
        assert writer.commit() == 1
    assert making.on_disk(path) == committed == making.on_disk(tmp_path / "one" / "run.zarr")


def test_statistics_are_combined_while_later_rows_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a rollout to each chunk of the sums, those of the first one are there before the last one's rows."""
    monkeypatch.setattr(capture_group, "STATS_ROW_BYTES", 1)
    early, late = tmp_path / "early" / "run.zarr", tmp_path / "late" / "run.zarr"
    (plan,) = making.plans(early, making.rollouts(700, 690, 1400), components=NARROW)
    assert plan.stats_level == "rollout"
    sums = plans_directory(early) / plan.key / "group" / "stats" / "residual" / "sum" / "c"
    with datastore.create(early, plan) as writer:
        rows = sorted(making.rows_of(plan), key=lambda one: plan.rows[one[2].rollout_id])
        for spec, layer, one in rows[: -len(rows) // 3]:
            writer.put(spec.name, layer, one.rollout_id, making.values(spec, layer, one))
        end = time.monotonic() + 60
        while not (sums / "0" / "0" / "0" / "0").exists():
            assert time.monotonic() < end
            time.sleep(0.01)
        assert not (sums / "2").exists()
        making.fill(writer)
        assert writer.commit() == 1
    (plan,) = making.plans(late, making.rollouts(700, 690, 1400), components=NARROW)
    with datastore.create(late, plan) as writer:
        making.fill(writer)
    with datastore.create(late, plan) as writer:  # which has written no chunk, and combines all at the end
        assert writer.commit() == 1
    assert making.on_disk(early) == making.on_disk(late)


def test_a_finished_chunk_that_is_lost_is_filled_again(path: Path) -> None:
    """Part 1 is done; then a chunk of it disappears. Nothing is published; part 1 fills it when it is run again."""
    (plan,) = making.plans(path, making.rollouts(*COUNTS))
    lost = plans_directory(path) / plan.key / "group" / "k_proj" / "c" / "1" / "0" / "0"

    def run(part: tuple[int, int]) -> int | None:
        with datastore.create(path, plan, part=part) as writer:
            making.fill(writer)
            return writer.commit()

    assert run((1, 2)) is None
    lost.unlink()
    with pytest.raises(
        CorruptError,
        match="the chunk of k_proj at layer 1, tokens 16-32, was written and is gone, so nothing was committed",
    ):
        run((2, 2))
    assert storage.numbered(path / "captures") == []
    assert run((1, 2)) == 1
    assert set(load_union(path).rollout_ids) == set(plan.rows)


def test_a_damaged_chunk_of_a_done_part_takes_the_part_back(path: Path) -> None:
    (plan,) = making.plans(path, making.rollouts(*COUNTS))
    harmed = plans_directory(path) / plan.key / "group" / "residual" / "c" / "0" / "1" / "0"
    with datastore.create(path, plan, part=(1, 2)) as writer:
        making.fill(writer)
        assert writer.commit() is None
    harmed.write_bytes(harmed.read_bytes()[:-1])
    with datastore.create(path, plan, part=(1, 2)) as writer:
        assert not harmed.exists()
        with datastore.create(path, plan, part=(2, 2)) as other:
            making.fill(other)
            assert other.commit() is None  # part 1 is being filled again
        making.fill(writer)
        assert writer.commit() == 1


def test_a_part_that_is_not_filled_is_not_done(path: Path) -> None:
    (plan,) = making.plans(path, making.rollouts(*COUNTS))
    with (
        datastore.create(path, plan, part=(2, 2)) as writer,
        pytest.raises(PlanError, match=r"14 of \d+ chunks|16 of \d+"),
    ):
        writer.commit()


def test_two_captures_of_one_store_at_once_both_succeed(path: Path) -> None:
    """Eight different captures, filled and committed from eight threads at the same moment."""
    ready = threading.Barrier(8)

    def run(index: int) -> int | None:
        (plan,) = making.plans(path, [making.rollout(f"r{index}", 20)], [index])
        with datastore.create(path, plan, threads=1) as writer:
            making.fill(writer)
            writer.flush()
            ready.wait()
            return writer.commit()

    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(run, range(8)))
    assert sorted(n for n in numbers if n) == list(range(1, 9))
    union = load_union(path)
    assert sorted(union.rollout_ids) == [f"r{i}" for i in range(8)]
    for index, number in enumerate(numbers):
        assert union.cell("residual", index, f"r{index}").capture.number == number


def test_whoever_is_last_commits_once(path: Path) -> None:
    """Four parts end at the same moment: one publishes, the others say that a part is not done."""
    (plan,) = making.plans(path, making.rollouts(200, 180))
    ready = threading.Barrier(4)

    def run(part: int) -> int | None:
        with datastore.create(path, plan, part=(part, 4), threads=1) as writer:
            making.fill(writer)
            writer.flush()
            ready.wait()
            return writer.commit()

    with ThreadPoolExecutor(4) as pool:
        numbers = list(pool.map(run, range(1, 5)))
    assert [n for n in numbers if n is not None] == [1]
    assert storage.numbered(path / "captures") == [1]


def test_a_part_started_again_while_another_commits(path: Path) -> None:
    """Its plan is gone when it wants to commit: it returns the number that the other one published."""
    (plan,) = making.plans(path, making.rollouts(100))
    with datastore.create(path, plan, part=(1, 2)) as writer:
        making.fill(writer)
        writer.commit()
    with datastore.create(path, plan, part=(1, 2)) as again:
        with datastore.create(path, plan, part=(2, 2)) as other:
            making.fill(other)
            assert other.commit() == 1
        assert again.commit() == 1
    assert not plans_directory(path).exists()


def test_a_plan_that_is_nowhere(path: Path) -> None:
    (plan,) = making.plans(path, making.rollouts(5))
    storage.create_root(path)
    with pytest.raises(
        DatastoreError, match=r"the plan \w{16} is neither on disk nor among the captures of .*; plan again"
    ):
        committed_as(path, plan)


def test_a_number_that_was_in_use_does_not_come_back(path: Path) -> None:
    """What `dropped/` says of capture 2 must never hit another capture."""
    making.capture(path, making.rollouts(5))
    making.capture(path, making.rollouts(5, 6)[1:])
    maintenance.drop(path, rollouts=["1"])
    shutil.rmtree(path / "captures" / "0002")
    assert making.capture(path, making.rollouts(5, 6)[1:]) == [3]
    assert set(load_union(path).rollout_ids) == {"0", "1"}


def test_readers_see_whole_captures_only(path: Path) -> None:
    making.capture(path, making.rollouts(5))
    (plan,) = making.plans(path, making.rollouts(5), [9])
    with datastore.create(path, plan) as writer:
        making.fill(writer)
        writer.flush()
        assert load_union(path).layers == (1, 5)
        assert [p.name for p in sorted((path / "captures").iterdir())] == ["0001", "zarr.json"]
        writer.commit()
    assert load_union(path).layers == (1, 5, 9)


def test_nothing_of_a_process_or_a_moment_is_in_a_capture(tmp_path: Path) -> None:
    """Two stores captured apart differ in the one line that says when."""
    for name in ("a", "b"):
        making.capture(tmp_path / name / "run.zarr", making.rollouts(*COUNTS))
    assert making.on_disk(tmp_path / "a") == making.on_disk(tmp_path / "b")
    text = (tmp_path / "a" / "run.zarr" / "captures" / "0001" / "zarr.json").read_text()
    assert str(os.getpid()) not in json.loads(text)["attributes"]["created"]
    members = json.loads(text)["consolidated_metadata"]["metadata"]
    assert list(members) == sorted(members)
    assert "residual" in members
