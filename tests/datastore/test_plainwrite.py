"""Groups and small arrays that are written without zarr-python: the files are those that zarr-python writes."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray
from zarr.storage import LocalStore

from datastore import storage
from datastore.codec import zarr_codecs
from datastore.schema import Codec
from tests.datastore import making

ARRAYS: dict[str, NDArray[Any]] = {
    "int64": np.arange(-5, 700),
    "int32": np.arange(12, dtype=np.int32).reshape(3, 4),
    "uint8": np.arange(256, dtype=np.uint8),
    "bool": np.array([True, False, True]),
    "float32": np.random.default_rng(0).standard_normal((22, 300)).astype(np.float32),
    "float64": np.array([[np.nan, 1.5], [-np.inf, 0.0]]),
    "fill value": np.full(10, np.nan, np.float32),
    "scalar": np.array(7.5),
    "text": np.array(["a", "", "ä\n", "x" * 1000, "日本"], object),
    "text of fixed width": np.array([["one", "two"], ["three", ""]]),
    "none": np.zeros((0, 3), np.float32),
    "no text": np.array([], object),
    "several chunks": np.arange(storage.TABLE_CHUNK + 5, dtype=np.int32),
    "backwards": np.arange(50, dtype=np.int64)[::-2],
    "other byte order": np.arange(5, dtype=">i4"),
}


def by_zarr(path: Path, values: NDArray[Any], *, dims: list[str], attrs: dict[str, Any]) -> None:
    text = values.dtype.kind in "OU"
    name = "string" if text else str(values.dtype)
    fill: Any = "" if text else np.nan if values.dtype.kind == "f" else 0
    array = zarr.create_array(
        LocalStore(path),
        shape=values.shape,
        dtype=name,
        chunks=tuple(max(1, min(n, storage.TABLE_CHUNK)) for n in values.shape),
        dimension_names=dims,
        fill_value=fill,
        attributes=attrs,
        filters=None,
        config={"write_empty_chunks": True},
        **zarr_codecs(Codec(), name),
    )
    if values.size:
        array[...] = values.astype(object) if text else values


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_is_written_as_zarr_python_writes_it(name: str, tmp_path: Path) -> None:
    values = ARRAYS[name]
    dims, attrs = [f"axis{i}" for i in range(values.ndim)], {"what": "ä", "n": [1, 2.5, None]}
    storage.write_array(tmp_path / "ours", values, dims=dims, attrs=attrs)
    by_zarr(tmp_path / "zarr", values, dims=dims, attrs=attrs)
    ours = making.on_disk(tmp_path / "ours")
    assert ours == making.on_disk(tmp_path / "zarr")
    assert len(ours) >= 1 + (values.size > 0)


def test_numbers_are_not_taken_for_text(tmp_path: Path) -> None:
    """What zarr-python turns into text it still turns into text."""
    values = np.array(["a", 1, 2.5], object)
    storage.write_array(tmp_path / "ours", values, dims=["x"])
    by_zarr(tmp_path / "zarr", values, dims=["x"], attrs={})
    assert making.on_disk(tmp_path / "ours") == making.on_disk(tmp_path / "zarr")


def test_a_group_is_consolidated_as_zarr_python_does_it(tmp_path: Path) -> None:
    for name in ("ours", "zarr"):
        storage.create_group(tmp_path / name, {"title": "ü", "list": [1, {"a": None}]})
        storage.create_group(tmp_path / name / "b", {"x": 1})
        storage.create_group(tmp_path / name / "b" / "deeper", {})
        storage.write_array(tmp_path / name / "b" / "deeper" / "values", np.arange(3), dims=["x"])
        storage.write_array(tmp_path / name / "a", np.arange(3.0), dims=["x"], attrs={"unit": "m"})
    storage.consolidate(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zarr.consolidate_metadata(LocalStore(tmp_path / "zarr"))
    ours, theirs = (json.loads((tmp_path / name / "zarr.json").read_text()) for name in ("ours", "zarr"))
    assert ours == theirs
    assert list(ours["consolidated_metadata"]["metadata"]) == ["a", "b", "b/deeper", "b/deeper/values"]
    before = (tmp_path / "ours" / "zarr.json").read_bytes()
    storage.consolidate(tmp_path / "ours")
    assert (tmp_path / "ours" / "zarr.json").read_bytes() == before


def test_a_group_or_array_is_not_written_over(tmp_path: Path) -> None:
    storage.create_group(tmp_path / "one", {})
    with pytest.raises(FileExistsError):
        storage.create_group(tmp_path / "one", {})
    with pytest.raises(FileExistsError):
        storage.write_array(tmp_path / "one", np.arange(3), dims=["x"])
