"""bfloat16 as a Zarr v3 data type, the stored dtypes by name, and the exact way from stored bits to float32.

Importing this module registers `BFloat16` with zarr-python, and `datastore.zarr_plugin` imports it with zarr itself, so
any program that has this distribution installed opens such arrays with `zarr.open`, without importing this package. The
name, the `bytes` layout and the forms of the fill value are those of the `bfloat16` page of zarr-extensions.
"""

import re
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal, Self, TypeGuard, overload

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from zarr.core.common import JSON, ZarrFormat
from zarr.core.dtype.common import (
    DataTypeValidationError,
    DTypeJSON,
    DTypeSpec_V2,
    DTypeSpec_V3,
    HasEndianness,
    HasItemSize,
)
from zarr.core.dtype.wrapper import TBaseDType, ZDType
from zarr.dtype import data_type_registry

from datastore.errors import MisuseError

__all__ = ["BFloat16", "numpy_dtype", "register", "upcast", "zarr_dtype"]

_BFLOAT16: Final[np.dtype[Any]] = np.dtype(ml_dtypes.bfloat16)
_NUMPY: Final[dict[str, np.dtype[Any]]] = {
    "bfloat16": _BFLOAT16,
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}
_NAMED_BITS: Final = {"NaN": 0x7FC0, "Infinity": 0x7F80, "-Infinity": 0xFF80}
_HEX = re.compile(r"0x[0-9a-fA-F]{4}")


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return the NumPy dtype of a stored dtype's name; `bfloat16` is that of ml_dtypes.

    Raises
    ------
    MisuseError
        If activations are not stored in a dtype of that name.

    Examples
    --------
    >>> numpy_dtype("bfloat16").itemsize
    2
    """
    if name not in _NUMPY:
        raise MisuseError(f"activations are not stored as {name!r}; choose one of {', '.join(_NUMPY)}")
    return _NUMPY[name]


def register() -> None:
    """Make bfloat16 known to zarr-python; done again, it does nothing."""
    data_type_registry.register("bfloat16", BFloat16)


def zarr_dtype(name: str) -> "BFloat16 | str":
    """Return what `zarr.create_array` takes as the data type `name`, whether or not our entry point is installed."""
    return BFloat16() if name == "bfloat16" else name


def upcast(values: NDArray[Any], out: NDArray[Any] | None = None) -> NDArray[Any]:
    """Return stored values as float32, every one exactly; float64 stays float64.

    A bfloat16 is the upper half of a float32, and ml_dtypes widens it by shifting the bits: payloads of NaN and
    subnormal numbers stay what they are (proved over all 65,536 values by a test).

    Parameters
    ----------
    values : ndarray
        bfloat16, float16, float32 or float64, any shape and strides.
    out : ndarray, optional
        Where to put the result: float32 (float64 for float64 values), the shape of `values`.

    Returns
    -------
    ndarray
        `out`, or a new array; float32 and float64 values come back as they are, not copied, when `out` is None.
    """
    wide = np.dtype(np.float64 if values.dtype == np.float64 else np.float32)
    if values.dtype.name not in _NUMPY:
        raise MisuseError(
            f"values of dtype {values.dtype} are not stored activations; choose one of {', '.join(_NUMPY)}"
        )
    if out is not None and (out.dtype != wide or out.shape != values.shape):
        raise MisuseError(
            f"{values.dtype} values of shape {values.shape} do not fit exactly into {out.dtype} of shape {out.shape}; "
            f"give an `out` of dtype {wide} and the same shape"
        )
    if out is None:
        if values.dtype == wide:
            return values
        out = np.empty(values.shape, wide)
    np.copyto(out, values)
    return out


@dataclass(frozen=True, kw_only=True)
class BFloat16(ZDType[np.dtype[Any], ml_dtypes.bfloat16], HasEndianness, HasItemSize):
    """The registered Zarr v3 data type `bfloat16`, held in memory as `ml_dtypes.bfloat16`.

    `HasEndianness` makes zarr-python write the byte order into the `bytes` codec, which other readers ask for.
    ml_dtypes has no byte-swapped form, so arrays of the big-endian order are refused rather than read wrong.

    Raises
    ------
    DataTypeValidationError
        If the byte order is big-endian.
    """

    dtype_cls: ClassVar[type[np.dtype[Any]]] = type(_BFLOAT16)
    _zarr_v3_name: ClassVar[Literal["bfloat16"]] = "bfloat16"

    def __post_init__(self) -> None:
        if self.endianness == "big":
            raise DataTypeValidationError(
                "this array stores bfloat16 in big-endian order, which NumPy can't hold; rewrite it as little-endian"
            )

    @property
    def item_size(self) -> int:
        """Bytes per value."""
        return 2

    @classmethod
    def from_native_dtype(cls, dtype: TBaseDType) -> Self:
        """Return the data type of a NumPy dtype."""
        if cls._check_native_dtype(dtype):
            return cls()
        raise DataTypeValidationError(f"NumPy dtype {dtype} is not bfloat16; give {_BFLOAT16!r} of ml_dtypes")

    def to_native_dtype(self) -> np.dtype[Any]:
        """Return the NumPy dtype."""
        return _BFLOAT16

    @classmethod
    def _from_json_v2(cls, data: DTypeJSON) -> Self:
        raise DataTypeValidationError(f"Zarr v2 has no bfloat16, so {data!r} does not name it; use Zarr v3")

    @classmethod
    def _from_json_v3(cls, data: DTypeJSON) -> Self:
        if data in ("bfloat16", {"name": "bfloat16"}, {"name": "bfloat16", "configuration": {}}):
            return cls()
        raise DataTypeValidationError(f"data type {data!r} is not 'bfloat16', which has no configuration")

    @overload
    def to_json(self, zarr_format: Literal[2]) -> DTypeSpec_V2: ...

    @overload
    def to_json(self, zarr_format: Literal[3]) -> DTypeSpec_V3: ...

    def to_json(self, zarr_format: ZarrFormat) -> DTypeSpec_V2 | DTypeSpec_V3:
        """Return the name that stands in the array's metadata."""
        if zarr_format != 3:
            raise DataTypeValidationError(f"Zarr v{zarr_format} has no bfloat16; create the array with zarr_format=3")
        return self._zarr_v3_name

    def _check_scalar(self, data: object) -> TypeGuard[float | np.number[Any] | ml_dtypes.bfloat16]:
        return isinstance(data, int | float | np.integer | np.floating | ml_dtypes.bfloat16)

    def cast_scalar(self, data: object) -> ml_dtypes.bfloat16:
        """Return a number as bfloat16, rounded to nearest even; a bfloat16 keeps its bits."""
        if isinstance(data, ml_dtypes.bfloat16):
            return data
        if self._check_scalar(data):
            return ml_dtypes.bfloat16(data)
        raise TypeError(f"{data!r} of type {type(data).__name__} is not a number, so it can't be a bfloat16")

    def default_scalar(self) -> ml_dtypes.bfloat16:
        """Return 0, as zarr-python's own floats do."""
        return _from_bits(0)

    def from_json_scalar(self, data: JSON, *, zarr_format: ZarrFormat) -> ml_dtypes.bfloat16:
        """Return the fill value written as a number, "NaN", "Infinity", "-Infinity" or four hex digits ("0x7fc1")."""
        if isinstance(data, str):
            if data in _NAMED_BITS:
                return _from_bits(_NAMED_BITS[data])
            if _HEX.fullmatch(data):
                return _from_bits(int(data, 16))
        elif isinstance(data, int | float) and not isinstance(data, bool):
            return ml_dtypes.bfloat16(data)
        raise TypeError(
            f"{data!r} is not a bfloat16 fill value; "
            "write a number, 'NaN', 'Infinity', '-Infinity' or '0x' and 4 hex digits"
        )

    def to_json_scalar(self, data: object, *, zarr_format: ZarrFormat) -> float | str:
        """Return the fill value as JSON; a NaN other than 0x7fc0 is in hex, the one form that keeps its bits."""
        value = self.cast_scalar(data)
        bits = int(np.asarray(value, _BFLOAT16).view(np.uint16)[()])
        if bits & 0x7FFF > _NAMED_BITS["Infinity"] and bits != _NAMED_BITS["NaN"]:
            return f"0x{bits:04x}"
        return next((name for name, known in _NAMED_BITS.items() if known == bits), float(value))


def _from_bits(bits: int) -> ml_dtypes.bfloat16:
    scalar: ml_dtypes.bfloat16 = np.array(bits, np.uint16).view(_BFLOAT16)[()]
    return scalar


# The one thing done at import: there is no moment between this and the first array opened that is surely ours.
register()
