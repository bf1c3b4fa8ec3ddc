"""Every kind of damage is found and named; what was repaired is filled again by the same capture."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import datastore
from datastore import storage
from datastore.errors import NotAStoreError
from datastore.maintenance import drop
from datastore.verify import Report, verify
from tests.datastore import making


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stores that the tests copy: one with statistics per capture, one whose rollouts are long enough for more."""
    path = tmp_path_factory.mktemp("made")
    making.capture(path / "run.zarr", making.rollouts(5, 17, 3, 40, 9))
    long = path / "long.zarr"
    making.capture(long, making.rollouts(2000, 1700), layers=(3,), most_tokens=512, batch_tokens=4096)
    assert storage.attributes(capture_of(long))["statistics"] == "rollout"
    return path


@pytest.fixture
def store(tmp_path: Path, made: Path) -> Path:
    return Path(shutil.copytree(made / "run.zarr", tmp_path / "run.zarr"))


@pytest.fixture
def long(tmp_path: Path, made: Path) -> Path:
    return Path(shutil.copytree(made / "long.zarr", tmp_path / "long.zarr"))


def capture_of(store: Path) -> Path:
    return store / "captures" / "0001"


def chunk(store: Path, component: str, layer_index: int, index: int) -> Path:
    return storage.chunk_file(capture_of(store) / component, (index, layer_index, 0))


def only(report: Report) -> str:
    assert len(report.problems) == 1, [p.message for p in report.problems]
    return report.problems[0].message


def rewrite(path: Path, name: str, place: Any, value: Any) -> None:
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
    assert "holds no capture that counts, so nothing was checked" in only(verify(tmp_path / "empty.zarr"))


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


def edit(name: str, place: Any, value: Any) -> Callable[[Path], None]:
    return lambda store: rewrite(store, name, place, value)


def edit_json(name: str, **new: Any) -> Callable[[Path], None]:
    def damage(store: Path) -> None:
        file = capture_of(store) / name / "zarr.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | new))

    return damage


def edit_attribute(**new: Any) -> Callable[[Path], None]:
    def damage(store: Path) -> None:
        storage.set_attributes(capture_of(store), storage.attributes(capture_of(store)) | new)

    return damage


def overwrite(name: str, content: bytes = b"no") -> Callable[[Path], None]:
    def damage(store: Path) -> None:
        (capture_of(store) / name).write_bytes(content)

    return damage


def swap(a: tuple[int, int], b: tuple[int, int]) -> Callable[[Path], None]:
    def damage(store: Path) -> None:
        first, second = (chunk(store, "residual", *one) for one in (a, b))
        content = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(content)

    return damage


# What is done to a store; what is said of it, some of it only by a full check; what is dropped: captures, or cells.
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a chunk emptied": (overwrite("residual/c/2/1/0", b""), r"residual at layer 5, tokens 32-48 .* is broken"),
    "a chunk too large": (
        overwrite("k_proj/c/0/0/0", bytes(9999)),
        "9,999 bytes, where at most 404 can be; it was not read",
    ),
    "chunks of two layers swapped": (swap((0, 1), (1, 1)), "at layer 1, tokens 16-32 .* norms of 16 tokens are not"),
    "chunks of one layer swapped": (swap((0, 1), (0, 2)), "at layer 1, tokens 32-48 .* norms of 16 tokens are not"),
    "shape": (edit_json("residual", shape=[90, 2, 16]), r"consolidated metadata differ in shape"),
    "dtype": (edit_json("residual", data_type="float16"), r"residual is float16 \[74, 2, 16\], and should be bfloat16"),
    "chunk grid": (
        edit_json("k_proj", chunk_grid={"name": "regular", "configuration": {"chunk_shape": [1 << 40, 1, 6]}}),
        "k_proj has chunks of .*, which no capture has",
    ),
    "codecs": (edit_json("k_proj", codecs=[{"name": "unheard-of"}]), "differ in codecs"),
    "no metadata of an array": (overwrite("residual/zarr.json"), "zarr.json can't be read"),
    "no metadata of a capture": (overwrite("zarr.json"), "capture 1 can't be opened: .*zarr.json can't be read"),
    "attributes gone": (edit_json("", attributes={}), "capture 1 can't be opened: .* is no capture"),
    "not consolidated": (edit_json("", consolidated_metadata=None), "not consolidated"),
    "layers": (edit_attribute(layers=[1, 7]), "the layer coordinate differs"),
    "layers not ascending": (edit_attribute(layers=[5, 1]), r"layers \[5, 1\] are not ascending"),
    "token count": (edit_attribute(n_tokens=7), "adds up to 74 tokens, its metadata says 7"),
    "batches": (edit_attribute(batches=[["0"]]), "the batches of its table are not those of its metadata"),
    "nonfinite": (edit_attribute(nonfinite={"residual": 3, "k_proj": 0}), "0 values that are not finite, .* says 3"),
    "position": (edit("position", 3, 77), r"position of token 3 is 77, not"),
    "segment": (edit("segment", 0, 1), "segment of token 0 is 1, not 0"),
    "rollout": (edit("rollout", 10, 4), "rollout of token 10 is 4"),
    "role": (edit("role", 2, 9), "role holds codes that are none"),
    "token ids": (edit("token_id", 6, 49), "the token ids of rollout '.' have sha256"),
    "layer coordinate": (edit("layer", 0, 2), "the layer coordinate differs"),
    "token_start": (edit("rollouts/token_start", 2, 1), "covered twice or never"),
    "n_tokens": (edit("rollouts/n_tokens", 2, 10), "adds up to"),
    "an id twice": (edit("rollouts/rollout_id", 0, "1"), "a rollout id is in its table twice"),
    "table": (overwrite("rollouts/n_tokens/c/0"), "capture 1 can't be opened: .*n_tokens does not decode"),
    "a label": (overwrite("rollouts/labels/length/c/0"), "labels/length does not decode"),
    "turn": (overwrite("turn/c/0"), "turn does not decode"),
    "vocab": (edit("vocab/token_id", 0, 77), "token ids have no bytes in vocab"),
    "vocab offsets": (edit("vocab/offset", 1, 77), "offsets of vocab do not tile"),
    "norm": (edit("stats/residual/norm", (20, 1), 0.5), "tokens 16-32 .* the norms of 1 tokens are not those written"),
    "norms lost": (overwrite("stats/residual/norm/c/0/1"), "the statistics of residual at layer 5 are lost"),
    "a sum": (edit("stats/residual/sum", (0, 1, 3), 1e3), "layer 5 of all its rollouts, prompt, .* bits: sum$"),
    "a sum lost": (overwrite("stats/k_proj/max_abs/c/0/0/0"), "the statistics of k_proj at layer 1 are lost"),
}
ONLY_FULL = {"chunks of two layers swapped", "chunks of one layer swapped", "nonfinite", "norm", "a sum"}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named_repaired_and_filled_again_by_the_same_capture(store: Path, what: str) -> None:
    asked = making.rollouts(5, 17, 3, 40, 9)
    damage, said = DAMAGE[what]
    damage(store)
    quick = [p.message for p in verify(store).problems]
    assert (not quick) == (what in ONLY_FULL), quick
    report = verify(store, full=True, repair=True)
    assert any(re.search(said, p.message) for p in report.problems), [p.message for p in report.problems]
    assert report.dropped == 1
    left = [p.message for p in verify(store, full=True).problems]
    assert left in ([], [f"{store} holds no capture that counts, so nothing was checked"])
    making.capture(store, asked)
    assert verify(store, full=True).ok
    opened = datastore.open(store)
    assert set(opened.rollouts.index) == {one.rollout_id for one in asked}
    for one in asked:
        assert opened.tokens(one.rollout_id)["position"].tolist() == list(range(one.n_tokens))
        assert opened.tokens(one.rollout_id)["token_id"].tolist() == one.token_ids.tolist()
        for spec in making.BOTH:
            for layer in (1, 5):
                found = making.read(store, spec.name, layer, one.rollout_id)
                assert making.same_bits(found, making.values(spec, layer, one))


def test_only_what_is_in_doubt_is_dropped(store: Path) -> None:
    asked = making.rollouts(5, 17, 3, 40, 9)
    rewrite(store, "position", 3, 77)  # of one rollout
    overwrite("residual/c/2/1/0")(store)
    report = verify(store, repair=True)
    assert [(len(p.rollouts) > 0, p.component, p.layer) for p in report.problems] == [
        (True, None, None),
        (True, "residual", 5),
    ]
    plans = making.plans(store, asked)
    again = {(r.rollout_id, c.name, n) for p in plans for r in p.rollouts for c in p.components for n in p.layers}
    one, some = (set(p.rollouts) for p in report.problems)
    whole = {(name, c, n) for name in one for c in ("residual", "k_proj") for n in (1, 5)}
    assert again == whole | {(name, "residual", 5) for name in some}


def test_statistics_per_rollout_name_the_rollout(long: Path) -> None:
    rewrite(long, "stats/residual/sum", (1, 0, 0, 3), 1e9)
    assert verify(long).ok
    assert "layer 3 of rollout" in only(verify(long, full=True))
    plans = making.plans(long.parent / "x.zarr", making.rollouts(2000, 1700), (3,), most_tokens=512, batch_tokens=4096)
    assert verify(long, full=True).problems[0].rollouts == (plans[0].rollouts[1].rollout_id,)


@pytest.mark.parametrize("name", ["notes.txt", "residual/c/9/0/0", "residual/c/0/00/0", "residual/c/0/0/0.x.partial"])
def test_a_file_that_does_not_belong_is_named_and_no_row_is_dropped(store: Path, name: str) -> None:
    file = capture_of(store) / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"x")
    report = verify(store, repair=True)
    assert f"capture 1: {name} does not belong to it; delete it" in only(report)
    assert report.dropped is None
    file.unlink()
    assert verify(store).ok


def test_a_link_is_named(store: Path) -> None:
    file = chunk(store, "residual", 0, 0)
    file.rename(store.parent / "elsewhere")
    file.symlink_to(store.parent / "elsewhere")
    found, unread = verify(store).problems  # no reader follows it
    assert "residual/c/0/0/0 is a link" in found.message
    assert "it is a link, which a store does not hold" in unread.message


def test_damage_beside_the_captures_is_found(store: Path) -> None:
    group = store / "labels" / "0001"
    storage.create_group(group, {})
    storage.write_array(group / "a", np.arange(4), dims=("row",))
    assert verify(store).ok
    (group / "a" / "c" / "0").write_bytes(b"no")
    assert "labels/0001 is damaged" in only(verify(store))


def test_a_damaged_drop_is_found_and_the_captures_are_still_checked(store: Path) -> None:
    drop(store, rollouts=["1"])
    (store / "dropped" / "0001" / "zarr.json").write_text("{")
    report = verify(store)
    assert "dropped/0001 is damaged" in only(report)
    assert report.chunks == 20


def test_prompts_without_rows_are_part_of_the_hash(tmp_path: Path) -> None:
    path = tmp_path / "responses.zarr"
    prefixed = [making.rollout("a", 9, prompt_end=0, prefix=np.arange(4)), making.rollout("b", 5)]
    making.capture(path, prefixed)
    assert verify(path, full=True).ok
    rewrite(path, "prefix/token_id", 2, 7)
    assert "the token ids of rollout 'a' have sha256" in only(verify(path))


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
