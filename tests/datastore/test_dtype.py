"""bfloat16 as a Zarr data type: bits, fill values, metadata, other readers. Oracles: bits, zarr-python, tensorstore."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tensorstore
import zarr
from zarr.core.dtype.common import DataTypeValidationError
from zarr.dtype import data_type_registry

from datastore.dtype import BFloat16, numpy_dtype, upcast
from datastore.errors import MisuseError

BF16 = np.dtype(ml_dtypes.bfloat16)
EVERY = np.arange(1 << 16, dtype=np.uint16).view(BF16)


@pytest.fixture(autouse=True)
def registered() -> None:
    """Register as the entry point does; an installed distribution needs no such call."""
    data_type_registry.register("bfloat16", BFloat16)


def bits(value: Any) -> int:
    return int(np.asarray(value, BF16).view(np.uint16)[()])


def array(path: Path, values: np.ndarray, **options: Any) -> zarr.Array[Any]:
    options = {"chunks": values.shape, "fill_value": float("nan"), "config": {"write_empty_chunks": True}, **options}
    made = zarr.create_array(path, shape=values.shape, dtype=values.dtype, **options)
    made[...] = values
    return made


def test_upcast_is_the_shifted_bits_for_every_bfloat16() -> None:
    expected = np.arange(1 << 16, dtype=np.uint32) << 16
    np.testing.assert_array_equal(upcast(EVERY).view(np.uint32), expected)
    out = np.empty(EVERY[::-2].shape, np.float32)
    assert upcast(EVERY[::-2], out) is out
    np.testing.assert_array_equal(out.view(np.uint32), expected[::-2])


def test_upcast_of_float16_equals_the_standard_formula() -> None:
    values = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    with np.errstate(invalid="ignore"):  # signalling NaNs among all the bit patterns
        wide = upcast(values)
    raw = np.arange(1 << 16)
    exponent, fraction = (raw >> 10) & 31, raw & 1023
    magnitude = np.where(exponent == 0, fraction * 2.0**-24, (1024 + fraction) * 2.0 ** (exponent - 25))
    finite = exponent < 31
    np.testing.assert_array_equal(wide[finite], np.where(raw >> 15, -magnitude, magnitude)[finite])
    np.testing.assert_array_equal(np.isnan(wide), (exponent == 31) & (fraction > 0))


def test_upcast_leaves_float32_and_float64_alone() -> None:
    for dtype in (np.float32, np.float64):
        values = np.linspace(-1, 1, 7, dtype=dtype)
        assert upcast(values) is values


def test_upcast_refuses_a_lossy_or_foreign_dtype() -> None:
    with pytest.raises(MisuseError, match=r"float64 values of shape \(2,\) do not fit exactly into float32"):
        upcast(np.zeros(2), np.zeros(2, np.float32))
    with pytest.raises(MisuseError, match="values of dtype int32 are not stored activations; choose one of bfloat16"):
        upcast(np.zeros(2, np.int32))


def test_numpy_dtype_knows_the_stored_dtypes() -> None:
    names = ("bfloat16", "float16", "float32", "float64")
    assert [numpy_dtype(name).name for name in names] == list(names)
    assert [numpy_dtype(name).itemsize for name in names] == [2, 2, 4, 8]
    with pytest.raises(MisuseError, match="activations are not stored as 'int8'; choose one of bfloat16, float16"):
        numpy_dtype("int8")


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("NaN", 0x7FC0),
        ("Infinity", 0x7F80),
        ("-Infinity", 0xFF80),
        ("0x7fc1", 0x7FC1),
        ("0xFFC0", 0xFFC0),
        ("0x7f80", 0x7F80),
        (1, 0x3F80),
        (-1.5, 0xBFC0),
        (0.0, 0x0000),
        (-0.0, 0x8000),
        (1.00390625, 0x3F80),  # halfway between two values: rounds to the even one
        (1.01171875, 0x3F82),
    ],
)
def test_fill_value_forms(written: float | str, expected: int) -> None:
    data_type = BFloat16()
    value = data_type.from_json_scalar(written, zarr_format=3)
    assert bits(value) == expected
    again = data_type.to_json_scalar(value, zarr_format=3)
    json.dumps(again, allow_nan=False)
    assert bits(data_type.from_json_scalar(again, zarr_format=3)) == expected


def test_every_value_survives_json_as_a_fill_value() -> None:
    data_type = BFloat16()
    for raw in [*range(0, 1 << 16, 7), 0x7F81, 0x7FC0, 0x7FFF, 0xFF81, 0xFFFF]:
        form = json.loads(json.dumps(data_type.to_json_scalar(EVERY[raw], zarr_format=3), allow_nan=False))
        assert bits(data_type.from_json_scalar(form, zarr_format=3)) == raw


@pytest.mark.parametrize("written", ["nan", "inf", "0x7fc", "0x7fc00000", "0x-fff", "", None, True, [1]])
def test_other_fill_values_are_refused(written: Any) -> None:
    with pytest.raises(TypeError, match="is not a bfloat16 fill value; write a number, 'NaN'"):
        BFloat16().from_json_scalar(written, zarr_format=3)


def test_refusals_name_what_is_wrong() -> None:
    with pytest.raises(DataTypeValidationError, match="big-endian order, which NumPy can't hold"):
        BFloat16(endianness="big")
    with pytest.raises(DataTypeValidationError, match="NumPy dtype float16 is not bfloat16"):
        BFloat16.from_native_dtype(np.dtype(np.float16))
    with pytest.raises(DataTypeValidationError, match="which has no configuration"):
        BFloat16.from_json({"name": "bfloat16", "configuration": {"bits": 16}}, zarr_format=3)
    with pytest.raises(DataTypeValidationError, match="Zarr v2 has no bfloat16"):
        BFloat16.from_json({"name": "<V2", "object_codec_id": None}, zarr_format=2)
    with pytest.raises(DataTypeValidationError, match="create the array with zarr_format=3"):
        BFloat16().to_json(zarr_format=2)
    with pytest.raises(TypeError, match="'1' of type str is not a number"):
        BFloat16().cast_scalar("1")


def test_metadata_on_disk(tmp_path: Path) -> None:
    array(tmp_path / "a", EVERY.reshape(64, 1024))
    metadata = json.loads((tmp_path / "a" / "zarr.json").read_text())
    assert metadata["data_type"] == "bfloat16"
    assert metadata["fill_value"] == "NaN"
    assert metadata["codecs"][0] == {"name": "bytes", "configuration": {"endian": "little"}}


@pytest.mark.parametrize("name", ["bfloat16", {"name": "bfloat16"}, {"name": "bfloat16", "configuration": {}}])
def test_the_forms_of_the_name(name: Any) -> None:
    assert BFloat16.from_json(name, zarr_format=3) == BFloat16()


def test_every_bit_pattern_through_zarr(tmp_path: Path) -> None:
    values = EVERY.reshape(64, 1024)
    array(tmp_path / "a", values, chunks=(24, 1000))
    opened = zarr.open_array(tmp_path / "a", mode="r")
    assert opened.dtype == BF16
    np.testing.assert_array_equal(np.asarray(opened[...]).view(np.uint16), values.view(np.uint16))
    np.testing.assert_array_equal(np.asarray(opened[5:30, ::3]).view(np.uint16), values[5:30, ::3].view(np.uint16))
    picked = np.asarray(opened.oindex[np.array([1, 60]), np.array([3, 999])])
    np.testing.assert_array_equal(picked.view(np.uint16), values[np.ix_([1, 60], [3, 999])].view(np.uint16))


def test_unwritten_tokens_hold_the_nan_of_the_specification(tmp_path: Path) -> None:
    opened = zarr.create_array(tmp_path / "a", shape=(4,), chunks=(2,), dtype=BF16, fill_value=float("nan"))
    assert set(np.asarray(opened[...]).view(np.uint16).tolist()) == {0x7FC0}


@pytest.mark.parametrize("shards", [None, (48, 1000)])
def test_tensorstore_reads_it_without_our_code(tmp_path: Path, shards: tuple[int, int] | None) -> None:
    values = EVERY.reshape(64, 1024)
    array(tmp_path / "a", values, chunks=(24, 1000), shards=shards)
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(tmp_path / "a")}}
    opened = tensorstore.open(spec, open=True).result()
    assert opened.dtype.name == "bfloat16"
    assert bits(opened.fill_value) == 0x7FC0
    np.testing.assert_array_equal(opened.read().result().view(np.uint16), values.view(np.uint16))


def test_zarr_reads_what_tensorstore_wrote(tmp_path: Path) -> None:
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(tmp_path / "a")},
        "metadata": {"shape": [64, 1024], "data_type": "bfloat16", "fill_value": "0x7fc1"},
    }
    values = EVERY.reshape(64, 1024)
    tensorstore.open(spec, create=True).result().write(values).result()
    opened = zarr.open_array(tmp_path / "a", mode="r")
    assert bits(opened.fill_value) == 0x7FC1
    np.testing.assert_array_equal(np.asarray(opened[...]).view(np.uint16), values.view(np.uint16))
