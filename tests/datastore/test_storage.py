"""The one file that touches Zarr: whole or not there, damaged is an error, and plain zarr-python agrees."""

from __future__ import annotations

import errno
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from datastore import storage
from datastore.errors import CorruptError, MisuseError, NotAStoreError
from datastore.schema import FORMAT, FORMAT_VERSION

text = st.lists(st.text(max_size=5), max_size=6).map(lambda items: np.array(items, dtype=object))
numbers = st.lists(st.integers(-(2**40), 2**40), max_size=6).map(lambda items: np.array(items, dtype=np.int64))


def test_a_new_store_is_a_zarr_group_with_its_members(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run.zarr"
    storage.create_root(path)
    before = path.stat().st_ino
    storage.create_root(path)
    assert path.stat().st_ino == before
    group = zarr.open_group(path, mode="r")
    assert dict(group.attrs) == {"format": FORMAT, "version": FORMAT_VERSION}
    assert sorted(group.group_keys()) == sorted(storage.ROOT_GROUPS)
    assert [p.name for p in path.parent.iterdir()] == ["run.zarr"]


def test_one_store_is_created_by_many(tmp_path: Path) -> None:
    ready = threading.Barrier(8)

    def create(_: int) -> None:
        ready.wait()
        storage.create_root(tmp_path / "run.zarr")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(create, range(8)))
    storage.open_root(tmp_path / "run.zarr")
    assert [p.name for p in tmp_path.iterdir()] == ["run.zarr"]


def test_what_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(
        NotAStoreError, match=r"nowhere does not exist, so there is no store to read; check the path, or"
    ):
        storage.open_root(tmp_path / "nowhere")
    for name, content in {"cut": "{", "list": "[]", "other": '{"attributes": {"format": "x"}}'}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "zarr.json").write_text(content)
        with pytest.raises(NotAStoreError, match=rf"{name} exists and is not an activation store"):
            storage.create_root(tmp_path / name)


@given(text | numbers, st.data())
def test_small_arrays_come_back(
    tmp_path_factory: pytest.TempPathFactory, values: NDArray[Any], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("array") / "a"
    storage.write_array(path, values, dims=("row",), attrs={"unit": "one"})
    assert storage.read_array(path).tolist() == values.tolist()
    assert storage.attributes(path) == {"unit": "one"}
    assert zarr.open_array(path, mode="r").metadata.dimension_names == ("row",)  # type: ignore[union-attr]


def test_values_that_equal_the_fill_value_are_written(tmp_path: Path) -> None:
    """Absent is never zero: an array of zeros, NaN or empty texts has all of its chunks."""
    for name, values in {"n": np.zeros(5), "f": np.full(5, np.nan), "t": np.array([""] * 3, dtype=object)}.items():
        storage.write_array(tmp_path / name, values, dims=("row",))
        assert (tmp_path / name / "c" / "0").exists()


def test_a_missing_or_damaged_array_is_an_error(tmp_path: Path) -> None:
    storage.write_array(tmp_path / "a", np.arange(5), dims=("row",))
    chunk = tmp_path / "a" / "c" / "0"
    raw = bytearray(chunk.read_bytes())
    raw[len(raw) // 2] ^= 1
    chunk.write_bytes(raw)
    with pytest.raises(CorruptError, match=r"a does not decode \(.*\); what it holds is lost"):
        storage.read_array(tmp_path / "a")
    chunk.unlink()
    with pytest.raises(CorruptError, match=r"a lacks 1 of 1 chunks; what they hold is lost"):
        storage.read_array(tmp_path / "a")
    (tmp_path / "a" / "zarr.json").unlink()
    with pytest.raises(CorruptError, match=r"the array .*a is missing; what it holds is lost"):
        storage.read_array(tmp_path / "a")
    with pytest.raises(CorruptError, match=r"zarr.json can't be read \(.*what it describes is lost"):
        storage.attributes(tmp_path / "a")
    (tmp_path / "a" / "zarr.json").write_text("[]")
    with pytest.raises(CorruptError, match="holds no JSON object"):
        storage.attributes(tmp_path / "a")


def test_attributes_are_replaced_and_nothing_else(tmp_path: Path) -> None:
    storage.write_array(tmp_path / "a", np.arange(5), dims=("row",), attrs={"x": 1})
    before = json.loads((tmp_path / "a" / "zarr.json").read_text())
    storage.set_attributes(tmp_path / "a", {"y": 2})
    assert json.loads((tmp_path / "a" / "zarr.json").read_text()) == before | {"attributes": {"y": 2}}


def test_a_number_is_taken_once(tmp_path: Path) -> None:
    """Sixteen groups published at the same moment: sixteen numbers in a row."""
    (tmp_path / "into").mkdir()
    ready = threading.Barrier(16)

    def publish(index: int) -> int:
        storage.create_group(tmp_path / f"{index}.partial", {"index": index})
        ready.wait()
        return storage.publish(tmp_path / f"{index}.partial", tmp_path / "into")

    with ThreadPoolExecutor(16) as pool:
        taken = list(pool.map(publish, range(16)))
    assert sorted(taken) == storage.numbered(tmp_path / "into") == list(range(1, 17))
    for index, number in enumerate(taken):
        assert storage.attributes(tmp_path / "into" / f"{number:04d}") == {"index": index}


def test_numbers_go_on_above_what_was_in_use(tmp_path: Path) -> None:
    (tmp_path / "into" / "0002").mkdir(parents=True)
    (tmp_path / "into" / "zarr.json").write_text("{}")
    storage.create_group(tmp_path / "a", {})
    assert storage.publish(tmp_path / "a", tmp_path / "into", above=9998) == 9999
    storage.create_group(tmp_path / "b", {})
    assert storage.publish(tmp_path / "b", tmp_path / "into") == 10000
    assert storage.numbered(tmp_path / "into") == [2, 9999, 10000]
    with pytest.raises(FileNotFoundError):
        storage.publish(tmp_path / "nothing", tmp_path / "into")


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    storage.write_atomic(tmp_path / "a", b"one", durable=True)
    storage.write_atomic(tmp_path / "a", b"two")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a", b"two")]
    with pytest.raises(FileNotFoundError):
        storage.write_atomic(tmp_path / "gone" / "a", b"x")
    assert not (tmp_path / "gone").exists()


def test_discarding_and_clearing(tmp_path: Path) -> None:
    (tmp_path / "plan" / "group").mkdir(parents=True)
    storage.discard(tmp_path / "plan")
    storage.discard(tmp_path / "plan")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "0.ab.partial").write_text("half")
    (tmp_path / "0").write_text("whole")
    storage.clear_leftovers(tmp_path)
    storage.clear_leftovers(tmp_path / "nowhere")
    assert [p.name for p in tmp_path.iterdir()] == ["0"]


def test_a_store_on_another_file_system_than_its_plans(tmp_path: Path) -> None:
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is one file system only")
    (tmp_path / "captures").mkdir()
    with pytest.raises(
        MisuseError, match=r"are on different file systems, so a capture could not be renamed into the store"
    ):
        storage.check_writable(tmp_path, elsewhere)


def test_room_is_asked_of_the_nearest_directory_that_is_there(tmp_path: Path) -> None:
    assert storage.free_bytes(tmp_path / "a" / "b") > 0


def test_a_rename_that_failed_is_named_with_both_its_ends(tmp_path: Path) -> None:
    error = OSError(errno.EIO, os.strerror(errno.EIO), str(tmp_path / "a"), None, str(tmp_path / "b"))
    said = str(storage.disk_error(error, tmp_path, 7))
    assert said.startswith(f"{tmp_path / 'a'} -> {tmp_path / 'b'} could not be read or written (Input/output error): 7")
