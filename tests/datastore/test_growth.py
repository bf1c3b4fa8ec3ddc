"""Compact, merge and gc: the union reads as before, nothing else is left. Oracle: rows and tables as they were put."""

import errno
import os
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import datastore
from datastore import storage
from datastore.compact import compact, plan_compaction
from datastore.errors import ConflictError, DatastoreError, MisuseError, NotAStoreError
from datastore.gc import collect, plan_collection
from datastore.labels import add_annotations, add_labels
from datastore.maintenance import drop
from datastore.merge import merge, plan_merge
from datastore.planning import plans_directory
from datastore.schema import Annotation
from datastore.union import load_union
from datastore.verify import verify
from tests.datastore import making

ASKED = making.rollouts(5, 17, 3, 40, 9)


def cells(store: Path) -> dict[tuple[str, str, int], bytes]:
    """Return the bytes of every cell that counts."""
    union = load_union(store)
    return {
        (name, component, layer): making.read(store, component, layer, name).tobytes()
        for name in union.rollout_ids
        for layer, component in union.cells_of(name)
    }


def tables(store: Path) -> tuple[pd.DataFrame, list[Any], dict[str, pd.DataFrame]]:
    opened = datastore.open(store)
    tokens = {name: opened.tokens(name) for name in opened.rollouts.index}
    spans = sorted(opened.annotations.itertuples(index=False, name=None))
    return opened.rollouts.sort_index().sort_index(axis=1), spans, tokens


def same(before: tuple[Any, ...], after: tuple[Any, ...]) -> None:
    pd.testing.assert_frame_equal(before[0], after[0])
    assert before[1] == after[1]
    assert before[2].keys() == after[2].keys()
    for name, tokens in before[2].items():
        pd.testing.assert_frame_equal(tokens, after[2][name])


def grown(path: Path) -> Path:
    """A store grown in every direction: rollouts, layers, a component, a replacement, a drop, labels, annotations."""
    making.capture(path, ASKED[:2])
    making.capture(path, ASKED[2:4])
    making.capture(path, ASKED[4:], layers=(1,), components=[making.RESIDUAL])
    making.capture(path, ASKED[:4], layers=(7,))
    making.capture(path, ASKED[1:2], layers=(5,), replace=True, version=1)
    drop(path, rollouts=["2"], layers=[5])
    add_labels(path, {"0": {"length": 50, "mood": "good"}, "3": {"right": True}})
    add_annotations(path, {"4": [Annotation(token_start=2, token_end=5, label="late")]})
    return path


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return grown(tmp_path / "run.zarr")


def captures(store: Path) -> list[int]:
    return storage.numbered(store / "captures")


def test_a_compacted_store_reads_as_before(store: Path) -> None:
    rows, before, on_disk = cells(store), tables(store), making.on_disk(store)
    planned = plan_compaction(store)
    assert making.on_disk(store) == on_disk
    numbers = compact(planned)
    assert captures(store) == [3, *numbers]  # it was one capture already, and nothing in it was wasted
    assert len(numbers) == len(planned.plans) == 2
    assert cells(store) == rows
    same(before, tables(store))
    assert verify(store, full=True).ok
    assert not plan_compaction(store).plans
    assert not list(plans_directory(store).glob("*"))


def test_layers_added_after_compaction_are_computed_in_the_same_company(store: Path) -> None:
    wanted = {name: load_union(store).newest(name)[0].computed_with(name)[1] for name in ("0", "1", "3")}
    compact(plan_compaction(store))
    plans = making.plans(store, [ASKED[0], ASKED[1], ASKED[3]], layers=(9,), components=[making.RESIDUAL])
    found = {name: b.members for plan in plans for b in plan.batches for name in b.stored}
    assert found == wanted


def test_many_captures_of_one_rollout_become_one(tmp_path: Path) -> None:
    path = tmp_path / "many.zarr"
    asked = [making.rollout(f"r{i:02}", 3 + i % 4) for i in range(30)]
    for one in asked:
        making.capture(path, [one], components=[making.RESIDUAL])
    rows = cells(path)
    assert len(captures(path)) == 30
    assert compact(plan_compaction(path)) == [31] == captures(path)
    assert cells(path) == rows
    assert verify(path, full=True).ok


def test_large_captures_are_left_alone(store: Path) -> None:
    rows = cells(store)
    assert not plan_compaction(store, smaller_than=1).plans
    largest = max(c.ragged.n_tokens * len(c.layers) * 56 for c in load_union(store).captures)
    planned = plan_compaction(store, smaller_than=largest)
    compact(planned)
    assert cells(store) == rows


def test_a_store_that_changed_meanwhile_is_not_compacted(store: Path) -> None:
    planned = plan_compaction(store)
    drop(store, rollouts=["0"])
    rows = cells(store)
    with pytest.raises(DatastoreError, match=r"was changed while it was compacted.*run compact again"):
        compact(planned)
    assert cells(store) == rows


def test_gc_deletes_what_no_longer_counts_and_nothing_else(store: Path) -> None:
    drop(store, rollouts=["2", "3"], layers=[1, 5])  # all of capture 2
    making.capture(store, ASKED[4:], layers=(1,), components=[making.RESIDUAL], replace=True)  # instead of capture 3
    rows, on_disk = cells(store), making.on_disk(store)
    planned = plan_collection(store)
    assert [one.path.name for one in planned.removals] == ["0002", "0003"]
    files = [f for n in ("0002", "0003") for f in (store / "captures" / n).rglob("*") if f.is_file()]
    assert planned.n_bytes == sum(f.stat().st_size for f in files)
    assert making.on_disk(store) == on_disk
    collect(planned)
    assert captures(store) == [1, 4, 5, 6]
    assert cells(store) == rows
    assert not plan_collection(store).removals
    making.capture(store, ASKED)  # a number that was in use does not come back
    assert captures(store)[-1] >= 7


def test_gc_keeps_labels_and_spans_that_only_a_superseded_capture_has(tmp_path: Path) -> None:
    """Captured again without them, a rollout keeps what it was given; compacting brings it along."""
    path, span = tmp_path / "run.zarr", Annotation(token_start=0, token_end=2, label="early")
    making.capture(path, [making.rollout("a", 5, labels={"mood": "good", "size": 1}), making.rollout("b", 5)])
    making.capture(path, [making.rollout("c", 5, annotations=(span,))])
    making.capture(path, [making.rollout("d", 5, labels={})])
    bare = [making.rollout(name, 5, labels={"size": 2} if name == "a" else {}) for name in "abcd"]
    making.capture(path, bare, replace=True, version=1)
    rows, before = cells(path), tables(path)
    assert (before[0].at["a", "mood"], before[0].at["a", "size"]) == ("good", 2)
    planned = plan_collection(path)
    assert [one.path.name for one in planned.removals] == ["0003"]
    collect(planned)
    same(before, tables(path))
    compact(plan_compaction(path))
    assert (captures(path), cells(path)) == ([5], rows)
    same(before, tables(path))


def test_gc_removes_what_a_killed_process_left_of_a_plan(store: Path) -> None:
    """A plan that was being laid down, one that was carried out and not cleared away, and their directory."""
    plans = plans_directory(store)
    (plans / "ab.cd.partial" / "group").mkdir(parents=True)
    (plans / "ab.cd.partial" / "plan.json").write_text("{}")
    (plans / "ef" / "parts").mkdir(parents=True)
    (plans / "ef" / "plan.json").write_text("{}")
    planned = plan_collection(store, older_than=0)
    assert {one.path.name for one in planned.removals} == {"ab.cd.partial", "ef"}
    assert (plans / "ef").exists()
    collect(planned)
    assert not plans.exists()


def test_what_counts_again_is_not_deleted(store: Path) -> None:
    """Dropping the capture that superseded another, between the plan and the deletion, uncovers the other."""
    making.capture(store, ASKED[4:], layers=(1,), components=[making.RESIDUAL], replace=True, version=3)
    planned = plan_collection(store)
    assert [one.path.name for one in planned.removals] == ["0003"]
    storage.create_group(store / "dropped/0002", {"dropped": [{"captures": captures(store)[-1:]}]})
    rows = cells(store)
    collect(planned)
    assert 3 in captures(store)
    assert cells(store) == rows


def test_a_drop_while_a_compaction_commits_waits_for_it(store: Path) -> None:
    """The look at the store and the rename that follows are one: what is dropped then stays dropped."""
    planned = plan_compaction(store)
    dropping = threading.Thread(target=lambda: drop(store, rollouts=["0"]))
    with suppress(DatastoreError):  # where the drop was first
        compact(planned, tick=lambda done, of: dropping.start() if done == of else None)
    dropping.join()
    assert "0" not in load_union(store).rollout_ids


def test_gc_removes_old_leftovers_and_spares_young_ones(store: Path) -> None:
    places = [store / "captures" / "0003.ab.partial", store.with_name("run.zarr.ab.partial"), store / "x.partial"]
    for place in places[:2]:
        (place / "c").mkdir(parents=True)
    places[2].write_bytes(b"x" * 10)
    (store.parent / "other.partial").mkdir()
    assert not plan_collection(store).removals
    for old in (*places, *(p / "c" for p in places[:2])):
        os.utime(old, (time.time() - 7200,) * 2)
    planned = plan_collection(store)
    assert {one.path for one in planned.removals} == set(places)
    collect(planned)
    assert not any(place.exists() for place in places)
    assert (store.parent / "other.partial").exists()


def test_gc_spares_unfinished_plans_unless_told_and_those_at_work_always(store: Path) -> None:
    (plan,) = making.plans(store, [making.rollout("new", 4)])
    with datastore.create(store, plan):
        assert not plan_collection(store, plans=True).removals
    assert not plan_collection(store).removals
    planned = plan_collection(store, plans=True)
    assert [one.why for one in planned.removals] == ["an unfinished plan that no process fills"]
    collect(planned)
    assert not (plans_directory(store) / plan.key).exists()


def test_merged_stores_read_as_both(tmp_path: Path) -> None:
    a, b, out = grown(tmp_path / "a.zarr"), tmp_path / "b.zarr", tmp_path / "out.zarr"
    making.capture(b, [ASKED[0], making.rollout("more", 8)], layers=(1, 9))
    add_labels(b, {"more": {"mood": "bad"}})
    drop(b, rollouts=["more"], layers=[9])
    rows = cells(a) | cells(b)
    before = making.on_disk(a), making.on_disk(b)
    storage.create_group(a / "scores" / "0001", {})
    before = making.on_disk(a), before[1]
    planned = plan_merge(a, b, out)
    assert not out.exists()
    assert (planned.rollouts, planned.shared) == (6, ("0",))
    assert planned.left_out == (a / "scores" / "0001",)
    merge(planned)
    assert cells(out) == rows
    assert (making.on_disk(a), making.on_disk(b)) == before
    assert verify(out, full=True).ok
    merged = datastore.open(out).rollouts
    assert merged.loc["more", "mood"] == "bad"
    assert merged.loc["0", "length"] == 50
    drop(out, rollouts=["0"])
    assert cells(a) | cells(b) == rows  # links, and nothing that is linked is ever written


def test_what_contradicts_itself_is_not_merged(tmp_path: Path) -> None:
    a, b, c, out = (tmp_path / f"{name}.zarr" for name in ("a", "b", "c", "out"))
    making.capture(a, [ASKED[0]])
    making.capture(b, [making.rollout("0", 5, tokens=1)])
    model = {"model": {"name": "other", "revision": "2", "dtype": "bfloat16", "hidden_size": 16}}
    making.capture(c, [ASKED[0]], provenance=model)
    with pytest.raises(ConflictError, match=r"rollout '0' has 5 tokens .* and 5 .*; nothing was merged"):
        plan_merge(a, b, out)
    with pytest.raises(ConflictError, match=r"rollout '0' is of model toy in .* and of model other"):
        plan_merge(a, c, out)
    with pytest.raises(MisuseError, match="can't be merged with itself"):
        plan_merge(a, a, out)
    with pytest.raises(MisuseError, match="is there already, and a merge makes a new store"):
        plan_merge(a, b, c)
    with pytest.raises(NotAStoreError):
        plan_merge(a, tmp_path, out)
    assert not out.exists()


def test_statistics_of_a_compacted_store_are_those_of_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    for one in ASKED:
        making.capture(path, [one], components=[making.RESIDUAL], layers=(1,))
    (number,) = compact(plan_compaction(path))
    rows = np.concatenate([making.values(making.RESIDUAL, 1, one).astype(np.float64) for one in ASKED])
    group = path / "captures" / f"{number:04d}" / "stats" / "residual"
    np.testing.assert_allclose(
        storage.read_array(group / "sum").sum(axis=(0, 1)), rows.sum(axis=0), rtol=1e-9, atol=1e-9
    )
    assert int(storage.read_array(group / "count").sum()) == rows.size


def test_a_merge_that_must_copy_stops_at_the_first_error_and_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between file systems nothing can be linked, and `copytree` would collect the errors of all files."""
    a, b, out = grown(tmp_path / "a.zarr"), tmp_path / "b.zarr", tmp_path / "out.zarr"
    making.capture(b, [making.rollout("more", 8)])

    def full(*paths: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), paths[1])

    monkeypatch.setattr(os, "link", full)
    planned = plan_merge(a, b, out)
    merge(planned)
    assert verify(out, full=True).ok  # copied
    shutil.rmtree(out)
    monkeypatch.setattr(shutil, "copy2", full)
    with pytest.raises(DatastoreError, match=r"zarr\.json could not be written \(No space left on device\): [\d,]+ by"):
        merge(planned)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zarr", "b.zarr"]
