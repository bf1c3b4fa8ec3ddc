"""Every kind of damage is found and named; what was repaired is filled again by the same capture."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import zarr

import datastore
from datastore import storage
from datastore.errors import NotAStoreError
from datastore.verify import Report, verify
from tests.datastore import making


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "run.zarr"
    making.capture(path, making.rollouts(5, 17, 3, 40, 9))
    return path


@pytest.fixture
def long(tmp_path: Path) -> Path:
    """A store whose rollouts are long enough for statistics per rollout."""
    path = tmp_path / "long.zarr"
    making.capture(path, making.rollouts(2000, 1700), layers=(3,), most_tokens=512, batch_tokens=4096)
    assert storage.attributes(path / "captures" / "0001")["statistics"] == "rollout"
    return path


def capture_of(store: Path) -> Path:
    return store / "captures" / "0001"


def chunk(store: Path, component: str, layer_index: int, index: int) -> Path:
    return storage.chunk_file(capture_of(store) / component, (index, layer_index, 0))


def only(report: Report) -> str:
    assert len(report.problems) == 1, [p.message for p in report.problems]
    return report.problems[0].message


def rewrite(path: Path, name: str, place: int, value: int) -> None:
    zarr.open_array(capture_of(path) / name, mode="r+")[place] = value


@pytest.mark.parametrize("full", [False, True])
def test_a_good_store_is_well(store: Path, long: Path, full: bool) -> None:
    for path, chunks in ((store, 2 * 2 * 5), (long, 2 * 8)):
        report = verify(path, full=full)
        assert report.ok
        assert (report.captures, report.chunks) == (1, chunks)
    assert verify(store).tokens == 74
    assert verify(store).raw_bytes == 74 * 2 * (16 * 2 + 6 * 4)


def test_a_store_without_captures_has_nothing_checked(tmp_path: Path) -> None:
    storage.create_root(tmp_path / "empty.zarr")
    assert "holds no capture, so nothing was checked" in only(verify(tmp_path / "empty.zarr"))


def test_a_path_that_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotAStoreError, match="does not exist"):
        verify(tmp_path / "none.zarr")


def test_a_flipped_bit_is_named_by_rollouts_layer_and_tokens(store: Path) -> None:
    file = chunk(store, "residual", 1, 2)
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    report = verify(store)
    plan = making.plans(store.parent / "other.zarr", making.rollouts(5, 17, 3, 40, 9))[0]
    names = tuple(plan.rollouts[p.row].rollout_id for p in plan.ragged.pieces(32, 48))
    problem = report.problems[0]
    assert (problem.component, problem.layer, problem.tokens, problem.rollouts) == ("residual", 5, (32, 48), names)
    assert "capture 1: residual at layer 5, tokens 32-48" in only(report)
    assert f"(rollouts {', '.join(names)})" in only(report)


@pytest.mark.parametrize("damage", ["truncate", "delete", "empty"])
def test_a_lost_chunk_is_named(store: Path, damage: str) -> None:
    file = chunk(store, "k_proj", 0, 4)
    if damage == "delete":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: 20 if damage == "truncate" else 0])
    assert "k_proj at layer 1, tokens 64-74" in only(verify(store))


def test_swapped_chunks_decode_and_are_noticed_only_by_full(store: Path) -> None:
    a, b = chunk(store, "residual", 0, 1), chunk(store, "residual", 1, 1)
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)
    assert verify(store).ok
    found = [(p.layer, p.tokens) for p in verify(store, full=True).problems]
    assert found == [(1, (16, 32)), (5, (16, 32))]


def test_all_problems_are_listed_not_only_the_first(store: Path) -> None:
    for index in (0, 3):
        chunk(store, "residual", 0, index).unlink()
    chunk(store, "k_proj", 1, 2).unlink()
    assert [(p.component, p.layer, p.tokens) for p in verify(store, full=True).problems] == [
        ("residual", 1, (0, 16)),
        ("residual", 1, (48, 64)),
        ("k_proj", 5, (32, 48)),
    ]


@pytest.mark.parametrize(
    ("name", "place", "value", "said"),
    [
        ("position", 3, 77, r"position of token 3 \(rollout .*\) is 77"),
        ("segment", 0, 1, "segment of token 0"),
        ("rollout", 10, 4, "rollout of token 10"),
        ("role", 2, 9, "role holds a code"),
        ("token_id", 6, 49, "the token ids of rollout"),
        ("layer", 0, 2, "the layer coordinate differs"),
        ("rollouts/token_start", 2, 1, "covered twice or never"),
    ],
)
def test_an_edited_coordinate_is_found(store: Path, name: str, place: int, value: int, said: str) -> None:
    rewrite(store, name, place, value)
    report = verify(store)
    assert any(re.search(said, p.message) for p in report.problems), [p.message for p in report.problems]
    assert not report.problems[0].repairable


def test_an_edited_shape_is_found(store: Path) -> None:
    file = capture_of(store) / "residual" / "zarr.json"
    meta = json.loads(file.read_text())
    meta["shape"][0] = 90
    file.write_text(json.dumps(meta))
    said = " ".join(p.message for p in verify(store).problems)
    assert "the metadata of residual and the consolidated metadata differ in shape" in said
    assert "residual is bfloat16 [90, 2, 16], and should be bfloat16 [74, 2, 16]" in said


def test_edited_statistics_are_found_per_capture_and_per_rollout(store: Path, long: Path) -> None:
    for path, place in ((store, (0, 1, 3)), (long, (1, 0, 0, 3))):
        sums = zarr.open_array(capture_of(path) / "stats" / "residual" / "sum", mode="r+")
        sums[place] = np.asarray(sums[place]) + 1.0
        assert verify(path).ok
        assert "differ from the bits in sum" in only(verify(path, full=True))
    row = making.plans(long.parent / "x.zarr", making.rollouts(2000, 1700), (3,), most_tokens=512, batch_tokens=4096)
    assert verify(long, full=True).problems[0].rollouts == (row[0].rollouts[1].rollout_id,)


def test_edited_norms_are_found(store: Path) -> None:
    norms = zarr.open_array(capture_of(store) / "stats" / "residual" / "norm", mode="r+")
    norms[20, 1] = 0.5
    assert "norms of 1 tokens differ" in only(verify(store, full=True))


def test_a_damaged_table_is_a_problem_and_not_a_traceback(store: Path) -> None:
    (capture_of(store) / "rollouts" / "n_tokens" / "c" / "0").write_bytes(b"x")
    assert "capture 1 can't be opened" in only(verify(store))


def test_damage_beside_the_captures_is_found(store: Path) -> None:
    group = store / "labels" / "0001"
    storage.create_group(group, {})
    storage.write_array(group / "a", np.arange(4), dims=("row",))
    assert verify(store).ok
    (group / "a" / "c" / "0").write_bytes(b"no")
    assert "labels/0001 is damaged" in only(verify(store))


def test_nonfinite_values_are_data_and_no_problem(tmp_path: Path) -> None:
    path = tmp_path / "nan.zarr"
    (plan,) = making.plans(path, making.rollouts(20), components=[making.RESIDUAL])
    with datastore.create(path, plan) as writer:
        for spec, layer, one in making.rows_of(plan):
            rows = making.values(spec, layer, one)
            rows[3, 2], rows[4] = np.nan, np.inf
            writer.put(spec.name, layer, one.rollout_id, rows)
        writer.commit()
    assert verify(path, full=True).ok


def test_repair_drops_what_is_broken_and_the_same_capture_fills_it_again(store: Path) -> None:
    asked = making.rollouts(5, 17, 3, 40, 9)
    before = {
        (c, n, one.rollout_id): making.read(store, c, n, one.rollout_id)
        for c in ("residual", "k_proj")
        for n in (1, 5)
        for one in asked
    }
    chunk(store, "residual", 1, 2).unlink()
    raw = bytearray(chunk(store, "k_proj", 0, 0).read_bytes())
    raw[-1] ^= 255
    chunk(store, "k_proj", 0, 0).write_bytes(raw)
    report = verify(store, repair=True)
    assert report.dropped == 1
    assert len(report.problems) == 2
    assert verify(store, full=True).ok  # what is broken no longer counts
    lost = {name for p in report.problems for name in p.rollouts}
    refilled = making.plans(store, asked)
    stored = {(r.rollout_id, c.name, n) for p in refilled for r in p.rollouts for c in p.components for n in p.layers}
    assert stored == {(name, p.component, p.layer) for p in report.problems for name in p.rollouts}
    assert {name for name, _, _ in stored} == lost
    making.capture(store, asked)
    assert verify(store, full=True).ok
    for (component, layer, name), rows in before.items():
        assert making.same_bits(making.read(store, component, layer, name), rows)
    assert verify(store, repair=True).dropped is None
