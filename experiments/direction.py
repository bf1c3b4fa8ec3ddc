"""A trait direction as a record: what is known of it before its file is opened, and with its numbers.

Also the naming of a position as a directory, which the vector tree and the steering tree share.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from experiments.errors import ExperimentError

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["Direction", "DirectionEntry", "directions_of", "directory_of_position", "position_of_directory"]

_FLOATS = (ml_dtypes.bfloat16, np.float16, np.float32, np.float64)
_FRAME = r"(?:turn(?P<turn>_\d+)?_)?(?P<frame>prompt|response|thinking|system|tool_call|tool_result|all)"
_POSITION_DIRECTORY = re.compile(_FRAME + r"(?P<cut>_all|_-?\d+|__-?\d+|_-?\d+_|_-?\d+_-?\d+)")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DirectionEntry:
    """What is known of a direction before its file is opened.

    Attributes
    ----------
    trait : str
        `category/name`.
    layer : int
        Decoder block it was extracted at.
    component, method, position : str
        Which tensor, how it was fitted, over which tokens.
    file : str
        Path of the file.
    key : str or None
        Name inside a file that holds several.
    variant : str or None
        Model variant of the experiment that it was extracted from.
    baseline : float or None
        Score of the midpoint between the classes at extraction; None where nobody wrote it down (never 0 for unknown).
    model, applied_model : str or None
        Model it was extracted from, and the one that it was made for.
    delta, coefficient : float or None
        What the best steering run reached with it, where a manifest says so.
    facts : mapping
        Everything else written about it (bias, accuracy and the like).
    """

    trait: str
    layer: int
    component: str = "residual"
    method: str = "given"
    position: str = ""
    file: str = ""
    key: str | None = None
    variant: str | None = None
    baseline: float | None = None
    model: str | None = None
    applied_model: str | None = None
    delta: float | None = None
    coefficient: float | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        where = f" in {self.file}" if self.file else ""
        return f"direction {self.trait} (layer {self.layer}, {self.component}, {self.method}){where}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Direction(DirectionEntry):
    """A direction with its numbers, which can't be zero, non-finite or of another shape than [hidden].

    Attributes
    ----------
    values : ndarray of float32 or float64, shape [hidden]
        The vector as stored, widened exactly and never rounded; read-only.

    Raises
    ------
    ExperimentError
        If no score follows from the values.
    """

    values: NDArray[Any]

    def __post_init__(self) -> None:
        values = np.asarray(self.values)
        if values.ndim != 1 or values.size == 0:
            raise ExperimentError(f"{self} has shape {values.shape}; a direction is one vector of shape [hidden]")
        if values.dtype not in _FLOATS:
            raise ExperimentError(f"{self} holds {values.dtype}; a direction is bfloat16, float16, float32 or float64")
        bad = int(np.count_nonzero(~np.isfinite(values.astype(np.float64))))
        if bad:
            raise ExperimentError(
                f"{self} has {bad} non-finite values among {values.size}, so every score would be NaN; extract it again"
            )
        if not values.any():
            raise ExperimentError(f"{self} is all zeros, so it points nowhere; extract it again or leave the trait out")
        wide = values.astype(np.float64 if values.dtype == np.float64 else np.float32)
        wide.flags.writeable = False
        object.__setattr__(self, "values", wide)

    @property
    def norm(self) -> float:
        """Euclidean norm, in float64."""
        return float(np.linalg.norm(self.values.astype(np.float64)))

    @property
    def sha256(self) -> str:
        """Hash of the numbers as little-endian float64: the same in whatever file and dtype they are kept exactly."""
        return hashlib.sha256(self.values.astype("<f8").tobytes()).hexdigest()


def directions_of(array: "xr.DataArray") -> list[Direction]:
    """Return the directions of a labelled array.

    Parameters
    ----------
    array : DataArray of shape (direction, hidden)
        With coordinates `trait` and `layer` along its first dimension; `component`, `method`, `position`, `baseline`
        and `model` where they are known.

    Raises
    ------
    ExperimentError
        If it has another number of dimensions, no trait or layer, or values that are no direction.
    """
    missing = [name for name in ("trait", "layer") if name not in array.coords]
    if array.ndim != 2 or missing:
        raise ExperimentError(
            f"directions are a DataArray of dimensions (direction, hidden) with coordinates trait and layer along the "
            f"first; this one has dimensions {tuple(map(str, array.dims))} and lacks {' and '.join(missing) or 'none'}"
        )
    known = [n for n in ("trait", "component", "method", "position", "baseline", "model") if n in array.coords]
    return [
        Direction(layer=int(row["layer"]), values=row.values, **{name: row[name].item() for name in known})
        for row in array
    ]


def directory_of_position(position: str) -> str:
    """Return the directory name of a position: `response[:5]` is `response__5`.

    Examples
    --------
    >>> directory_of_position("prompt[-1]"), directory_of_position("response[:]")
    ('prompt_-1', 'response_all')
    """
    return position.replace("[:]", "_all").replace("[", "_").replace("]", "").replace(":", "_")


def position_of_directory(name: str) -> str:
    """Return the position that a directory name stands for; a name outside the grammar stands for itself.

    The naming loses brackets and colons, so it can't be inverted in general: `response_2_7` comes from
    `response[2:7]` and would come from `response[2_7]` and from a frame `response_2` as well. This reads it as the one
    form that is a position; where `metadata.json` names the position, that is believed instead.

    Examples
    --------
    >>> position_of_directory("response__5"), position_of_directory("turn_2_response_-5_")
    ('response[:5]', 'turn[2]:response[-5:]')
    """
    found = _POSITION_DIRECTORY.fullmatch(name)
    if found is None:
        return name
    cut = found["cut"][1:]
    inside = ":" if cut == "all" else cut.replace("_", ":")
    has_turn, turn = name.startswith("turn"), found["turn"]
    prefix = f"turn[{turn[1:]}]:" if turn else "turn:" if has_turn else ""
    return f"{prefix}{found['frame']}[{inside}]"
