"""Rows in any order against the rows themselves: the bits, the bound on memory, parts, interruptions, a full disk."""

from __future__ import annotations

import os
import random
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import datastore
from datastore import storage
from datastore.dtype import numpy_dtype
from datastore.errors import DatastoreError, PlanError
from datastore.planning import plans_directory
from datastore.schema import Codec, ComponentSpec, Plan
from tests.datastore import making
from tests.synthetic import activations

COUNTS = (5, 17, 3, 40, 9, 33)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.zarr"


def assert_holds(path: Path, plan: Plan) -> None:
    for spec, layer, one in making.rows_of(plan):
        assert making.same_bits(making.read(path, spec.name, layer, one.rollout_id), making.values(spec, layer, one))


def pieces(plan: Plan, seed: int, most: int) -> list[tuple[ComponentSpec, int, str, int, int]]:
    """Return all rows of a plan in pieces of up to `most` tokens, in a random order."""
    found = [
        (spec, layer, one.rollout_id, start, min(start + most, one.n_tokens))
        for spec, layer, one in making.rows_of(plan)
        for start in range(0, one.n_tokens, most)
    ]
    random.Random(seed).shuffle(found)
    return found


@settings(max_examples=15)
@given(
    counts=st.lists(st.integers(1, 50), min_size=1, max_size=5),
    most_tokens=st.sampled_from([1, 4, 16, 1024]),
    memory=st.sampled_from([1, 1 << 12, 1 << 30]),
    codec=st.sampled_from(["zstd", "lz4", "none"]),
    piece=st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_rows_in_any_order_come_back_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory, counts: list[int], seed: int, piece: int, memory: int, **options: Any
) -> None:
    """Pieces in any order, also with memory for one chunk only, when all others wait on disk."""
    path = tmp_path_factory.mktemp("writer") / "run.zarr"
    options["codec"] = Codec(name=options["codec"])
    (plan,) = making.plans(path, making.rollouts(*counts), **options)
    with datastore.create(path, plan, memory=memory) as writer:
        for spec, layer, name, start, stop in pieces(plan, seed, piece):
            rows = making.values(spec, layer, plan.rollouts[plan.rows[name]])[start:stop]
            writer.put(spec.name, layer, name, rows, start=start)
            rows[:] = 0  # it is the caller's again
        assert writer.commit() == 1
    assert_holds(path, plan)
    assert not plans_directory(path).exists()


@pytest.mark.parametrize("memory", [1, 1 << 30])
def test_rows_that_are_lent_come_back_to_the_bit(path: Path, memory: int) -> None:
    """Whole chunks in the caller's memory beside ones put together, strided rows, and chunks begun by copies."""
    counts = (100, 37, 64)
    (plan,) = making.plans(path, making.rollouts(*counts))
    with datastore.create(path, plan, memory=memory) as writer:
        for number, (spec, layer, one) in enumerate(making.rows_of(plan)):
            rows, lend = making.values(spec, layer, one), number % 3 != 2
            begun = 5 if number % 2 else 0
            writer.put(spec.name, layer, one.rollout_id, rows[:begun])
            given = np.repeat(rows, 2, axis=0)[::2] if number % 4 == 3 else rows
            writer.put(spec.name, layer, one.rollout_id, given[begun:], start=begun, copy=not lend)
        writer.commit()
    assert_holds(path, plan)
    making.capture(path.parent / "copied" / "run.zarr", making.rollouts(*counts))
    assert making.on_disk(path) == making.on_disk(path.parent / "copied" / "run.zarr")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_special_bits_and_any_strides(path: Path, dtype: str) -> None:
    """NaN with payloads, infinities, negative zero, all-NaN and all-zero chunks; transposed and strided rows."""
    spec = ComponentSpec(name="residual", width=8, dtype=dtype)
    (plan,) = making.plans(path, making.rollouts(48), [0], components=(spec,))
    random_bits = np.random.default_rng(0).integers(0, 256, 48 * 8 * spec.itemsize, dtype=np.uint8)
    rows = random_bits.view(numpy_dtype(dtype)).reshape(48, 8).copy()
    rows[16:32], rows[32:48] = np.nan, 0
    with datastore.create(path, plan) as writer:
        writer.put("residual", 0, "0", np.asfortranarray(rows)[:20])
        writer.put("residual", 0, "0", np.repeat(rows[20:], 2, axis=0)[::2], start=20)
        writer.commit()
    assert making.same_bits(making.read(path, "residual", 0, "0"), rows)


def test_the_files_are_those_that_zarr_python_writes(path: Path, tmp_path: Path) -> None:
    """Chunk by chunk the same bytes, the padded last chunk too."""
    (plan,) = making.plans(path, making.rollouts(*COUNTS))
    making.capture(path, making.rollouts(*COUNTS))
    for spec in making.BOTH:
        source = path / "captures" / "0001" / spec.name
        array = zarr.open_array(source, mode="r")
        copy = zarr.create_array(
            tmp_path / spec.name, shape=array.shape, chunks=array.chunks, dtype=array.metadata.data_type,  # type: ignore[union-attr]
            compressors=array.compressors, fill_value=array.fill_value, config={"write_empty_chunks": True},
        )  # fmt: skip
        copy[...] = array[...]
        ours, theirs = making.on_disk(source / "c"), making.on_disk(tmp_path / spec.name / "c")
        assert ours == theirs
        assert len(ours) == plan.n_tokens // 16 * 2 + 2


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_parts_give_the_store_that_one_process_gives(tmp_path: Path, parts: int) -> None:
    making.capture(tmp_path / "one" / "run.zarr", making.rollouts(*COUNTS))
    path = tmp_path / "many" / "run.zarr"
    numbers = []
    for part in random.Random(parts).sample(range(1, parts + 1), parts):
        (plan,) = making.plans(path, making.rollouts(*COUNTS))
        with datastore.create(path, plan, part=(part, parts)) as writer:
            needed = {name for batch in writer.todo() for name in batch.stored}
            for spec, layer, one in making.rows_of(plan):
                assert writer.wants(one.rollout_id) <= (one.rollout_id in needed)
                if one.rollout_id in needed:
                    writer.put(spec.name, layer, one.rollout_id, making.values(spec, layer, one))
            numbers.append(writer.commit())
    assert numbers == [None] * (parts - 1) + [1]
    assert making.on_disk(path) == making.on_disk(tmp_path / "one" / "run.zarr")


def test_only_what_is_missing_is_asked_for(path: Path) -> None:
    """Cut off in the middle: finished chunks are not asked for, and rows of them are ignored."""
    (plan,) = making.plans(path, making.rollouts(*COUNTS))
    rows = making.rows_of(plan)
    with datastore.create(path, plan) as writer:
        assert writer.todo() == list(plan.batches)
        for spec, layer, one in [
            r for r in rows if r[2].rollout_id in (*plan.batches[0].stored, *plan.batches[1].stored)
        ]:
            writer.put(spec.name, layer, one.rollout_id, making.values(spec, layer, one))
        writer.flush()
        before = writer.progress()
    assert (before.chunks, before.chunks_total) == (2 * 2 * 2, 2 * 2 * 7)  # 34 of 107 tokens are there
    with datastore.create(path, plan) as writer:
        assert writer.progress() == before
        assert writer.todo() == list(plan.batches[1:])
        for spec, layer, one in rows:
            finished = not writer.wants(one.rollout_id)
            values = making.values(spec, layer, one)
            writer.put(spec.name, layer, one.rollout_id, np.zeros_like(values) if finished else values)
        writer.commit()
    assert_holds(path, plan)


def test_a_halved_batch_is_halved_when_it_goes_on(path: Path) -> None:
    (plan,) = making.plans(path, making.rollouts(5, 3, 9))
    with datastore.create(path, plan) as writer:
        (batch,) = writer.todo()
        halves = [batch.of(batch.members[:1]), batch.of(batch.members[1:])]
        writer.halved(batch, halves)
        writer.halved(halves[1], [halves[1].of(halves[1].members[:1]), halves[1].of(halves[1].members[1:])])
    with datastore.create(path, plan) as writer:
        assert [b.members for b in writer.todo()] == [("1",), ("0",), ("2",)]
        making.fill(writer)
        writer.commit()
    notes = storage.attributes(path / "captures" / "0001")["provenance"]["notes"]
    assert notes["halved"] == [
        {"batch": ["0", "2"], "into": [["0"], ["2"]]},
        {"batch": ["1", "0", "2"], "into": [["1"], ["0", "2"]]},
    ]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"component": "mlp_out"}, "component 'mlp_out' is not in this plan, which has residual, k_proj"),
        ({"layer": 9}, r"layer 9 is not in this plan, which has layers \[1, 5\]"),
        ({"rollout_id": "x"}, "rollout 'x' is not in this plan of 1 rollouts"),
        ({"values": np.zeros((5, 16), np.float32)}, "residual of rollout '0' is float32 and the plan stores bfloat16; "
         "values are never cast, plan the dtype that the model computes in"),
        ({"values": np.zeros((5, 16), np.uint16)}, "is uint16 and the plan stores bfloat16"),
        ({"rows": (6, 16)}, r"got rows of shape \(6, 16\) at position 0; it has 5 tokens of width 16"),
        ({"rows": (5, 15)}, r"got rows of shape \(5, 15\) at position 0"),
        ({"rows": (2, 16), "start": 4}, r"got rows of shape \(2, 16\) at position 4"),
        ({"rows": (2, 16), "start": -1}, r"got rows of shape \(2, 16\) at position -1"),
        ({"rows": (16,)}, r"got rows of shape \(16,\)"),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit(path: Path, call: dict[str, Any], message: str) -> None:
    (plan,) = making.plans(path, making.rollouts(5))
    given: dict[str, Any] = {"component": "residual", "layer": 1, "rollout_id": "0", "start": 0} | call
    values = given.pop("values", np.zeros(given.pop("rows", (5, 16)), numpy_dtype("bfloat16")))
    with datastore.create(path, plan) as writer, pytest.raises(PlanError, match=message):
        writer.put(given["component"], given["layer"], given["rollout_id"], values, start=given["start"])


def test_missing_rows_are_named(path: Path) -> None:
    (plan,) = making.plans(path, making.rollouts(5, 40))
    with datastore.create(path, plan) as writer:
        for spec, layer, one in making.rows_of(plan):
            if (layer, one.rollout_id) != (5, "1"):
                writer.put(spec.name, layer, one.rollout_id, making.values(spec, layer, one))
        with pytest.raises(
            PlanError,
            match=r"6 of 12 chunks are not filled, the first is residual at layer 5, tokens 0-16 of rollouts 0, 1; "
            "nothing was committed, put the missing rows and commit again",
        ):
            writer.commit()
        for spec in making.BOTH:
            writer.put(spec.name, 5, "1", making.values(spec, 5, plan.rollouts[1]))
        assert writer.commit() == 1


def test_threads_must_be_there(path: Path) -> None:
    (plan,) = making.plans(path, making.rollouts(5))
    with pytest.raises(PlanError, match="0 threads write nothing; give at least 1"):
        datastore.create(path, plan, threads=0)


@contextmanager
def files_of_at_most(limit: int) -> Iterator[None]:
    """Let every larger write fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_loses_nothing_and_the_same_goes_on(path: Path) -> None:
    """The error comes from a background thread, says what is needed, and nothing half is left."""
    spec = ComponentSpec(name="residual", width=4096, dtype="float32")
    (plan,) = making.plans(path, making.rollouts(16, 16, 16), [0], components=(spec,))
    rows = {name: making.values(spec, 0, plan.rollouts[row]) for name, row in plan.rows.items()}
    with datastore.create(path, plan, threads=1) as writer:
        writer.put("residual", 0, "0", rows["0"])
        writer.flush()
        with files_of_at_most(100_000):
            writer.put("residual", 0, "1", rows["1"])
            with pytest.raises(
                DatastoreError,
                match=rf"could not be written \(File too large\): {524_288 + plan.table_bytes:,} bytes before "
                r"compression are still to write and [\d,]+ are free; what is finished is kept, make room and "
                r"run the same command again to go on",
            ):
                writer.flush()
            with pytest.raises(DatastoreError, match="could not be written"):
                writer.put("residual", 0, "2", rows["2"])
            with pytest.raises(DatastoreError, match="could not be written"):
                writer.commit()
    assert not list(plans_directory(path).rglob("group/**/*.partial"))
    with datastore.create(path, plan) as writer:
        assert not writer.wants("0")
        for name in ("1", "2"):
            writer.put("residual", 0, name, rows[name])
        assert writer.commit() == 1
    assert_holds(path, plan)


def test_a_full_disk_while_chunks_are_put_aside(path: Path) -> None:
    spec = ComponentSpec(name="residual", width=4096, dtype="float32")
    (plan,) = making.plans(path, making.rollouts(32), [0, 1], components=(spec,))
    values = {layer: making.values(spec, layer, plan.rollouts[0]) for layer in (0, 1)}
    with datastore.create(path, plan, memory=1) as writer:
        writer.put("residual", 0, "0", values[0][:8])
        with (
            files_of_at_most(100_000),
            pytest.raises(DatastoreError, match=rf"File too large\): {1_048_576 + plan.table_bytes:,} bytes before"),
        ):
            writer.put("residual", 1, "0", values[1][:8])
        for layer in (0, 1):
            writer.put("residual", layer, "0", values[layer])
        assert writer.commit() == 1
    assert_holds(path, plan)


def test_memory_stays_within_the_allowance(path: Path) -> None:
    """Buffers of open, busy and free chunks together, counted while rows come layer by layer, in disk-bound order."""
    width, tokens = 512, 2048
    spec = ComponentSpec(name="residual", width=width, dtype="bfloat16")
    asked = [making.rollout(str(i), n) for i, n in enumerate((tokens, tokens + 300, tokens + 600))]
    (plan,) = making.plans(path, asked, range(12), components=(spec,), most_tokens=1024, batch_tokens=10**6)
    chunk, memory = 1024 * width * 2, 12 << 20
    with datastore.create(path, plan, memory=memory, threads=2) as writer:
        seen = 0
        for name in ("0", "1", "2"):
            rows = activations(plan.rollouts[plan.rows[name]].n_tokens, width, seed=1)
            for layer in range(12):
                writer.put("residual", layer, name, rows)
                seen = max(seen, writer._assembly._allocated)
        assert chunk * 4 <= seen <= memory - 2 * 2 * chunk  # the rest is for the two threads that compress
        assert writer.commit() == 1
    for layer in (0, 11):
        assert making.same_bits(making.read(path, "residual", layer, "2"), rows)


def test_nothing_is_left_behind(path: Path) -> None:
    """No thread, open file, record of a holder or chunk put aside, after leaving without a commit and after one."""
    (plan,) = making.plans(path, making.rollouts(*COUNTS))
    making.capture(path.with_name("warm.zarr"), making.rollouts(2))  # zarr-python's own threads are there now
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with datastore.create(path, plan, memory=1) as writer:
        for spec, layer, one in making.rows_of(plan):
            writer.put(spec.name, layer, one.rollout_id, making.values(spec, layer, one)[:1])
        assert list(plans_directory(path).glob("*/spill-0/*"))
    directory = plans_directory(path) / plan.key
    assert not list(directory.glob("spill-*"))
    assert not list(directory.glob("parts/*.json"))
    with datastore.create(path, plan) as writer:
        making.fill(writer)
        writer.commit()
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == (threads, files)
    assert sorted(p.name for p in path.parent.iterdir()) == ["run.zarr", "warm.zarr"]


def test_a_writer_that_nobody_holds_any_more_gives_its_part_back(path: Path) -> None:
    """An interrupted notebook cell loses its writer without closing it."""
    import gc

    (plan,) = making.plans(path, making.rollouts(5))
    writer = datastore.create(path, plan)
    os.close(writer._disk)
    del writer
    gc.collect()
    datastore.create(path, plan).close()
