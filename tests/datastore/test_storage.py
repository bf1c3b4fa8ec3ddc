"""Regions of arrays: what zarr-python reads, and an error in the place of what is missing or damaged."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datastore import storage
from datastore.dtype import numpy_dtype
from datastore.errors import CorruptError
from datastore.schema import DTYPES


@settings(max_examples=40)
@given(
    data=st.data(),
    dtype=st.sampled_from(["float32", "float64", "int32", "int64", "bool", "bfloat16"]),
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=4),
)
def test_a_region_of_any_array_is_what_zarr_reads(data: st.DataObject, dtype: str, shape: list[int]) -> None:
    chunks = [data.draw(st.integers(1, n)) for n in shape]
    region = [slice(*sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n))))) for n in shape]
    plain = numpy_dtype(dtype) if dtype in DTYPES else np.dtype(dtype)
    values = np.random.default_rng(len(shape)).integers(-9, 9, shape).astype(plain)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "array")
        storage.create_array(path, shape=shape, dtype=dtype, chunks=chunks, dims=[f"d{i}" for i in range(len(shape))])
        storage.zarr_array(path, "r+")[...] = values
        found = storage.read_region(path, region)
        through_zarr = storage.zarr_array(path)[tuple(region)]
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, values[tuple(region)])
    np.testing.assert_array_equal(found, through_zarr)


def test_a_damaged_or_lost_chunk_of_a_region_is_an_error(tmp_path: Path) -> None:
    storage.write_array(tmp_path / "array", np.arange(10.0), dims=("row",))
    chunk = tmp_path / "array" / "c" / "0"
    raw = bytearray(chunk.read_bytes())
    raw[len(raw) // 2] ^= 1
    chunk.write_bytes(bytes(raw))
    with pytest.raises(CorruptError, match=r"array does not decode \(its bytes were changed or cut off"):
        storage.read_region(tmp_path / "array", [slice(0, 3)])
    chunk.unlink()
    with pytest.raises(CorruptError, match="is missing; what it holds is lost"):
        storage.read_region(tmp_path / "array", [slice(0, 3)])


def test_an_array_in_the_place_of_another_is_read_anew(tmp_path: Path) -> None:
    for values in (np.arange(4.0), np.arange(9, dtype=np.int64)):
        storage.remove(tmp_path / "array")
        storage.write_array(tmp_path / "array", values, dims=("row",))
        np.testing.assert_array_equal(storage.read_region(tmp_path / "array", [slice(1, 3)]), values[1:3])
