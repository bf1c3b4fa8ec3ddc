"""Buffers of a few rows that each thread keeps and uses again: fresh memory costs more than the work done in it."""

import threading
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

__all__ = ["scratch"]

TILE_VALUES = 1 << 18
"""Values in a buffer at most, if a row is not wider. Smaller ones fit the nearest cache, and two threads that work in
them are slower all the same: after each call of NumPy they wait for the interpreter's lock."""
_kept = threading.local()


def scratch(name: str, width: int, dtype: DTypeLike) -> NDArray[Any]:
    """Return this thread's buffer of that name, (rows, width); what it holds is left from its last use."""
    shape = max(1, TILE_VALUES // max(1, width)), width
    held: NDArray[Any] | None = _kept.__dict__.get(name)
    if held is None or held.shape != shape or held.dtype != dtype:
        held = _kept.__dict__[name] = np.empty(shape, dtype)
    return held
