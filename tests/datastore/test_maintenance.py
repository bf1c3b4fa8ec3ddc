"""Dropping: what no longer counts is gone for readers and planned again; nothing is deleted. Oracle: sets of cells."""

from pathlib import Path

import pytest

import datastore
from datastore.errors import AbsentError, MisuseError, NotAStoreError
from datastore.maintenance import drop, plan_drop
from datastore.union import load_union
from tests.datastore import making


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "run.zarr"
    making.capture(path, making.rollouts(5, 17, 3))
    return path


def cells(store: Path) -> set[tuple[str, int, str]]:
    union = load_union(store)
    return {(name, *cell) for name in union.rollout_ids for cell in union.cells_of(name)}


def test_a_product_is_dropped_and_nothing_else(store: Path) -> None:
    before = cells(store)
    files = making.on_disk(store / "captures")
    gone = {("1", 5, "residual"), ("2", 5, "residual")}
    planned = plan_drop(store, rollouts=["1", "2"], layers=[5], components=["residual"])
    assert (set(planned.rollouts), planned.cells) == ({"1", "2"}, 2)
    assert cells(store) == before
    assert drop(store, rollouts=["1", "2"], layers=[5], components=["residual"]) == 1
    assert cells(store) == before - gone
    assert making.on_disk(store / "captures") == files
    with pytest.raises(AbsentError, match="residual at layer 5 of rollout '1' is not captured"):
        datastore.open(store).select("residual", rollouts="1", layers=5)


def test_a_rollout_dropped_whole_is_gone_and_can_come_back(store: Path) -> None:
    drop(store, rollouts=["1"])
    assert set(datastore.open(store).rollouts.index) == {"0", "2"}
    (again,) = making.plans(store, making.rollouts(5, 17, 3))
    assert [r.rollout_id for r in again.rollouts] == ["1"]
    making.capture(store, making.rollouts(5, 17, 3))
    assert set(datastore.open(store).rollouts.index) == {"0", "1", "2"}


def test_a_drop_does_not_touch_later_captures(store: Path) -> None:
    drop(store, layers=[1])
    making.capture(store, making.rollouts(5), layers=(1,))
    assert {c for c in cells(store) if c[1] == 1} == {("0", 1, "residual"), ("0", 1, "k_proj")}


def test_what_is_not_there_can_not_be_dropped(store: Path, tmp_path: Path) -> None:
    with pytest.raises(AbsentError, match=r"rollouts 9 can't be dropped, because .* it holds 2, 0, 1"):
        drop(store, rollouts=["9"])
    with pytest.raises(AbsentError, match="layers 7 can't be dropped"):
        drop(store, layers=[7])
    with pytest.raises(AbsentError, match="components mlp_out can't be dropped"):
        drop(store, components=["mlp_out"])
    with pytest.raises(MisuseError, match="nothing is named to drop"):
        drop(store)
    drop(store, rollouts=["1"], layers=[1])
    with pytest.raises(MisuseError, match="there is nothing to drop"):
        drop(store, rollouts=["1"], layers=[1])
    with pytest.raises(NotAStoreError):
        drop(tmp_path, rollouts=["1"])
    assert not list(store.parent.glob("*.partial"))
