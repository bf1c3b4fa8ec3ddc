"""Results come back as they were put, whole or not at all; a store that can't be written has a sibling."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from datastore import results, storage
from datastore.errors import CorruptError, DatastoreError, MisuseError, NotAStoreError, ReadOnlyError
from datastore.results import create_sibling, publish_result, read_results, sibling_of


@pytest.fixture
def store(tmp_path: Path) -> Path:
    storage.create_root(tmp_path / "run.zarr")
    return tmp_path / "run.zarr"


def table() -> xr.Dataset:
    return xr.Dataset(
        {
            "mean": (("layer", "hidden"), np.array([[1.5, np.nan], [0.0, -2.0]]), {"units": "1"}),
            "massive": (("layer", "hidden"), np.array([[True, False], [False, False]])),
            "count": ((), np.int64(7)),
            "empty": (("none", "hidden"), np.zeros((0, 2), np.float32)),
        },
        coords={
            "layer": ("layer", [10, 25]),
            "rollout_id": ("row", np.array(["71", "ünï"], dtype=object)),
            "kind": ("layer", ["statistics", "pass"]),
        },
        attrs={"component": "residual"},
    )


def test_a_result_is_read_back_as_it_was(store: Path) -> None:
    assert publish_result(store, "calibration", table(), attrs={"selection": {"ids": ["71"]}}) == 1
    assert publish_result(store, "calibration", table() * 1, attrs={}) == 2
    (first, got), (second, _) = read_results(store, "calibration")
    assert (first, second) == (1, 2)
    xr.testing.assert_identical(got.drop_attrs(), table().drop_attrs())
    assert got.attrs == {"component": "residual", "selection": {"ids": ["71"]}}
    assert got["mean"].attrs == {"units": "1"}
    assert [number for number, _ in read_results(store, "calibration", numbers=[2, 9])] == [2]
    assert read_results(store, "scores") == []


def test_plain_xarray_reads_it_too(store: Path) -> None:
    publish_result(store, "calibration", table(), attrs={})
    plain = xr.open_zarr(store / "calibration" / "0001", chunks=None)
    xr.testing.assert_equal(plain.drop_vars(["rollout_id", "kind"]), table().drop_vars(["rollout_id", "kind"]))
    assert set(plain.coords) == {"layer", "rollout_id", "kind"}
    assert plain["rollout_id"].values.tolist() == ["71", "ünï"]


@pytest.mark.parametrize("lost", ["mean", "mean/c/0/0"])
def test_what_is_lost_is_an_error_and_never_a_number(store: Path, lost: str) -> None:
    publish_result(store, "calibration", table(), attrs={})
    gone = store / "calibration" / "0001" / lost
    storage.remove(gone) if gone.is_dir() else gone.unlink()
    with pytest.raises(CorruptError, match="lacks"):
        read_results(store, "calibration")


@pytest.mark.parametrize(
    ("kind", "attrs", "message"),
    [
        ("captures", {}, "'captures' is no kind of result of a store"),
        ("notes", {}, "'notes' is no kind of result"),
        ("scores", {"x": float("nan")}, "attributes of a result must be JSON"),
        ("scores", {"x": object()}, "attributes of a result must be JSON"),
    ],
)
def test_misuse_writes_nothing(store: Path, kind: str, attrs: dict[str, object], message: str) -> None:
    with pytest.raises(MisuseError, match=message):
        publish_result(store, kind, table(), attrs=attrs)
    assert os.listdir(store / "scores") == ["zarr.json"]


@pytest.mark.parametrize("few", [0, 1000])
def test_a_failure_midway_leaves_nothing(store: Path, monkeypatch: pytest.MonkeyPatch, few: int) -> None:
    def full(path: Path, descriptor: int | None = None) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results, "FEW_FILES", few)
    monkeypatch.setattr(storage, "sync_file" if few else "sync_files", full)
    with pytest.raises((OSError, DatastoreError), match="No space left"):
        publish_result(store, "scores", table(), attrs={})
    assert os.listdir(store / "scores") == ["zarr.json"]


def test_every_file_and_directory_of_a_result_is_synced_before_its_rename(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, fsync, rename = set[str](), os.fsync, os.rename
    asked = dict[str, set[str]]()

    def remember(descriptor: int) -> None:
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        asked[str(target)] = {path.removeprefix(str(source)) for path in synced}
        rename(source, target)

    monkeypatch.setattr(os, "fsync", remember)
    monkeypatch.setattr(os, "rename", renamed)
    publish_result(store, "calibration", table(), attrs={})
    target = store / "calibration" / "0001"
    there = {str(path).removeprefix(str(target)) for path in [target, *target.rglob("*")]}
    above = {str(store), str(store / "calibration")}
    assert asked[str(target)] == there | above
    assert sum(name.endswith("zarr.json") for name in there) > 1


@pytest.fixture
def refusing(store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A store that this user may not write, also where the tests run as a user who may write everything."""
    if os.geteuid() == 0:
        create = storage.create_group

        def refuse(path: Path, attrs: dict[str, object]) -> None:
            if path.is_relative_to(store):
                raise PermissionError(13, "Permission denied", str(path))
            create(path, attrs)

        monkeypatch.setattr(storage, "create_group", refuse)
        yield store
        return
    for place in (store / "calibration", store):
        place.chmod(0o555)
    yield store
    for place in (store, store / "calibration"):
        place.chmod(0o755)


def test_a_store_that_cannot_be_written_says_where_to_put_results(refusing: Path, tmp_path: Path) -> None:
    with pytest.raises(ReadOnlyError, match=r"run.zarr can't be written.*give --out other.zarr"):
        publish_result(refusing, "calibration", table(), attrs={})
    sibling = tmp_path / "out" / "other.zarr"
    create_sibling(sibling, refusing)
    create_sibling(sibling, refusing)
    assert publish_result(sibling, "calibration", table(), attrs={}) == 1
    assert sibling_of(sibling) == refusing
    assert sibling_of(refusing) is None


def test_a_sibling_is_of_one_store(store: Path, tmp_path: Path) -> None:
    create_sibling(tmp_path / "other.zarr", store)
    with pytest.raises(MisuseError, match=r"holds results of .*run.zarr, not of .*else.zarr"):
        create_sibling(tmp_path / "other.zarr", tmp_path / "else.zarr")
    with pytest.raises(MisuseError, match=r"run\.zarr is a store of its own"):
        create_sibling(store, tmp_path / "else.zarr")
    (tmp_path / "notes").mkdir()
    with pytest.raises(NotAStoreError, match="is not an activation store"):
        create_sibling(tmp_path / "notes", store)
