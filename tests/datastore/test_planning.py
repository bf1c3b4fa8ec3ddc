"""What is planned: what the store lacks, in full products, in the company of before; found again on disk."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import datastore
from datastore import maintenance
from datastore.errors import BusyError, ConflictError, NewerFormatError, NotAStoreError, PlanError, ReadOnlyError
from datastore.planning import lay_down, plans_directory
from datastore.schema import Plan
from datastore.union import load_union
from tests.datastore import making
from tests.unwritable import read_only

OTHER_MODEL = {"model": {"name": "other", "revision": "2", "dtype": "bfloat16"}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.zarr"


@pytest.fixture
def place() -> Iterator[Path]:
    """Return a directory that other users can look into."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def cells(plans: tuple[Plan, ...]) -> list[tuple[str, int, str]]:
    """Return every cell planned, sorted; a cell that is planned twice is there twice."""
    return sorted((s.name, n, r.rollout_id) for p in plans for s in p.components for n in p.layers for r in p.rollouts)


def company(plan: Plan) -> list[tuple[tuple[str, ...], list[str]]]:
    return [(batch.members, sorted(batch.company)) for batch in plan.batches]


request = st.tuples(
    st.lists(st.sampled_from("012"), min_size=1, unique=True),
    st.lists(st.sampled_from([0, 3]), min_size=1, unique=True),
    st.lists(st.sampled_from(making.BOTH), min_size=1, unique=True),
)


@settings(max_examples=15)
@given(st.lists(request, min_size=2, max_size=3))
def test_what_is_planned_is_what_is_missing(
    tmp_path_factory: pytest.TempPathFactory, requests: list[tuple[list[str], list[int], list[Any]]]
) -> None:
    path, have = tmp_path_factory.mktemp("plan") / "run.zarr", set[tuple[str, int, str]]()
    for names, layers, specs in requests:
        asked = [making.rollout(name, 4) for name in names]
        missing = {(s.name, n, name) for s in specs for n in layers for name in names} - have
        assert cells(making.plans(path, asked, layers, components=tuple(specs))) == sorted(missing)
        making.capture(path, asked, layers, components=tuple(specs))
        have |= missing


def test_no_order_of_input_matters(path: Path) -> None:
    asked = making.rollouts(5, 17, 5, 40)
    layers = (n for n in (5, 1))
    one, other = making.plans(path, asked, (1, 5)), making.plans(path, asked[::-1], layers)
    assert [p.key for p in one] == [p.key for p in other]


def test_batches_lie_in_order_of_length_within_the_budget(path: Path) -> None:
    (plan,) = making.plans(path, making.rollouts(5, 17, 3, 40, 9))
    assert [batch.members for batch in plan.batches] == [("2", "0", "4"), ("1",), ("3",)]
    assert plan.chunk_tokens == {"residual": 16, "k_proj": 16}
    assert making.plans(path, making.rollouts(3, 2))[0].chunk_tokens == {"residual": 8, "k_proj": 8}


def test_layers_added_later_are_computed_in_the_same_company(path: Path) -> None:
    asked = making.rollouts(5, 17, 3, 40, 9)
    making.capture(path, asked)
    (plan,) = making.plans(path, asked[:2], layers=[7])
    assert company(plan) == [(("2", "0", "4"), ["2", "4"]), (("1",), [])]
    for batch in plan.batches:
        for name in batch.members:
            assert np.array_equal(plan.tokens(batch, name), asked[int(name)].token_ids)


def test_a_batch_that_was_halved_is_halved_for_layers_added_later(path: Path) -> None:
    asked = making.rollouts(5, 17, 3, 40, 9)
    (plan,) = making.plans(path, asked)
    with datastore.create(path, plan) as writer:
        batch = plan.batches[0]
        writer.halved(batch, [batch.of(["2"]), batch.of(["0", "4"])])
        making.fill(writer)
        writer.commit()
    (later,) = making.plans(path, asked[:1], layers=[7])
    assert company(later) == [(("0", "4"), ["4"])]


def test_a_company_that_was_replaced_keeps_its_tokens(path: Path) -> None:
    asked = making.rollouts(5, 3)
    making.capture(path, asked)
    making.capture(path, [making.rollout("1", 4, tokens=1)], replace=True)
    (plan,) = making.plans(path, asked[:1], layers=[7])
    assert company(plan) == [(("1", "0"), ["1"])]
    assert np.array_equal(plan.tokens(plan.batches[0], "1"), asked[1].token_ids)


def test_a_ragged_remainder_is_several_full_products(path: Path) -> None:
    asked = making.rollouts(5, 6, 7)
    making.capture(path, asked[:1], [1], components=(making.RESIDUAL,))
    plans = making.plans(path, asked, [1, 2])
    assert len({p.key for p in plans}) == len(plans) == 3
    whole = {(s.name, n, r.rollout_id) for s in making.BOTH for n in (1, 2) for r in asked}
    assert set(cells(plans)) == whole - {("residual", 1, "0")}
    assert len(cells(plans)) == len(whole) - 1
    making.capture(path, asked, [1, 2])
    assert making.plans(path, asked, [1, 2]) == ()


def test_the_same_request_finds_its_plan_again(path: Path) -> None:
    asked = making.rollouts(5, 17)
    (plan,) = making.plans(path, asked)
    datastore.create(path, plan).close()
    (found,) = making.plans(path, asked[::-1])
    assert (found.key, found.vocab, found.batches[0].members) == (plan.key, plan.vocab, plan.batches[0].members)
    (other,) = making.plans(path, [making.rollout("0", 5, labels={}), asked[1]])
    assert other.key != plan.key  # another label is another request: its table would say something else


def test_dropped_and_captured_again_is_another_plan(path: Path) -> None:
    asked = making.rollouts(5)
    (first,) = making.plans(path, asked)
    making.capture(path, asked)
    maintenance.drop(path, rollouts=["0"])
    (again,) = making.plans(path, asked)
    assert again.key != first.key
    assert making.capture(path, asked) == [2]


def test_a_plan_that_another_process_carried_out_is_refused(path: Path) -> None:
    asked = making.rollouts(5)
    (plan,) = making.plans(path, asked)
    making.capture(path, asked)
    with pytest.raises(
        PlanError, match=r"this plan was carried out already, by another process, as capture 1 of .*plan again"
    ):
        datastore.create(path, plan)
    assert not plans_directory(path).exists() or not list(plans_directory(path).iterdir())


def test_other_tokens_under_a_known_name(path: Path) -> None:
    making.capture(path, making.rollouts(5))
    other = [making.rollout("0", 6, tokens=1)]
    with pytest.raises(
        ConflictError,
        match=r"rollout '0' is in .*run\.zarr with 5 tokens \(sha256 \w{12}\) and now has 6 tokens \(sha256 \w{12}\); "
        "nothing was captured, use another id, or --replace",
    ):
        making.plans(path, other)
    assert making.capture(path, other, replace=True) == [2]
    assert load_union(path).newest("0")[0].counts.tolist() == [6]


def test_another_model_under_a_known_name(path: Path) -> None:
    making.capture(path, making.rollouts(5))
    with pytest.raises(
        ConflictError,
        match=r"'0' is in .* from model toy and is now asked for from model other with other weights or dtype",
    ):
        making.plans(path, making.rollouts(5), [9], provenance=OTHER_MODEL)


def test_a_conflict_that_arose_meanwhile_is_found_at_commit(path: Path) -> None:
    (plan,) = making.plans(path, making.rollouts(5))
    with datastore.create(path, plan) as writer:
        making.fill(writer)
        making.capture(path, [making.rollout("0", 6, tokens=1)])
        with pytest.raises(ConflictError, match="rollout '0' is in"):
            writer.commit()
    assert [c.number for c in load_union(path).captures] == [1]


@pytest.mark.parametrize(
    ("asked", "options", "message"),
    [
        ([], {}, "there are no rollouts to capture: the input is empty, or nothing was selected from it"),
        (making.rollouts(2) * 2, {}, "rollout id '0' is there more than once in the input; .* rename one of them"),
        (making.rollouts(2), {"layers": []}, "nothing is asked for: give at least one layer and one component"),
        (making.rollouts(2), {"components": ()}, "nothing is asked for"),
        (making.rollouts(2), {"batch_tokens": 0}, "a batch of 0 tokens holds nothing"),
    ],
)
def test_a_request_that_contradicts_itself(path: Path, asked: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        making.plans(path, asked, **options)


def test_a_path_that_is_something_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory" / "zarr.json").write_text('{"attributes": null}')
    for name in ("file", "directory"):
        with pytest.raises(
            NotAStoreError, match=rf"{name} exists and is not an activation store .*nothing was read or"
        ):
            making.plans(tmp_path / name, making.rollouts(2))
    (tmp_path / "empty").mkdir()
    assert making.capture(tmp_path / "empty", making.rollouts(2)) == [1]


def test_a_store_of_a_newer_version(path: Path) -> None:
    making.capture(path, making.rollouts(2))
    root = path / "zarr.json"
    meta = json.loads(root.read_text())
    meta["attributes"]["version"] = 2
    root.write_text(json.dumps(meta))
    with pytest.raises(NewerFormatError, match="has format version 2, and this release reads up to 1; upgrade"):
        making.plans(path, making.rollouts(2))


def test_another_environment_does_not_go_on(path: Path) -> None:
    def planned(threads: int) -> tuple[Plan, ...]:
        return making.plans(path, making.rollouts(5), provenance=making.MODEL | {"environment": {"threads": threads}})

    one, other = planned(1)[0], planned(2)[0]
    datastore.create(path, one).close()
    with pytest.raises(
        PlanError, match=r"begun with threads 1 and now has 2, so its rows .*; go on with 1, or delete .*begin"
    ):
        datastore.create(path, other)
    assert planned(2)[0].provenance["environment"] == {"threads": 1}  # what was begun goes on as it was


def test_a_directory_that_can_not_be_written(place: Path) -> None:
    (plan,) = making.plans(place / "run.zarr", making.rollouts(2))
    with (
        read_only(place),
        pytest.raises(
            ReadOnlyError, match=r"run\.zarr can't be written \(Permission denied: .*nothing was captured; choose"
        ),
    ):
        datastore.create(place / "run.zarr", plan)


def test_a_store_without_room_beside_it(place: Path) -> None:
    making.capture(place / "run.zarr", making.rollouts(2))
    (plan,) = making.plans(place / "run.zarr", making.rollouts(2), [9])
    with read_only(place), pytest.raises(ReadOnlyError, match=r"run\.zarr\.plans can't be written"):
        datastore.create(place / "run.zarr", plan)


def test_a_store_that_can_not_be_written_is_found_before_any_work(place: Path) -> None:
    making.capture(place / "run.zarr", making.rollouts(2))
    (plan,) = making.plans(place / "run.zarr", making.rollouts(2), [9])
    plans_directory(place / "run.zarr").mkdir(mode=0o777)
    plans_directory(place / "run.zarr").chmod(0o777)
    with (
        read_only(place / "run.zarr" / "captures"),
        pytest.raises(ReadOnlyError, match="captures can't be written by this user, so no capture could be committed"),
    ):
        datastore.create(place / "run.zarr", plan)


def test_a_killed_lay_down_is_done_again(path: Path) -> None:
    (plan,) = making.plans(path, making.rollouts(5))
    aside = plans_directory(path) / f"{plan.key}.0.partial"
    (aside / "group").mkdir(parents=True)
    datastore.create(path, plan).close()
    assert lay_down(path, plan) == plans_directory(path) / plan.key
    assert making.capture(path, making.rollouts(5)) == [1]


def test_a_plan_that_a_killed_process_had_almost_laid_down_counts_once(path: Path) -> None:
    (plan,) = making.plans(path, making.rollouts(5, 9))
    with datastore.create(path, plan):
        pass
    laid = plans_directory(path) / plan.key
    almost = laid.with_name(f"{plan.key}.0123.partial")  # all is in it, and it was not renamed yet
    shutil.copytree(laid, almost)
    found = making.plans(path, making.rollouts(5, 9))
    assert [one.key for one in found] == [plan.key]
    making.capture(path, making.rollouts(5, 9))
    assert making.plans(path, making.rollouts(5, 9)) == ()


def test_the_same_part_twice_is_refused(path: Path) -> None:
    (plan,) = making.plans(path, making.rollouts(40, 30))
    with datastore.create(path, plan, part=(1, 2)):
        with pytest.raises(BusyError, match=rf"being filled by process {os.getpid()}"):
            datastore.create(path, plan, part=(1, 2))
        datastore.create(path, plan, part=(2, 2)).close()
    datastore.create(path, plan, part=(1, 2)).close()
