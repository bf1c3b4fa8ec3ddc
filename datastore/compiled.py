"""The sums of `stats` over bfloat16 rows as one compiled loop (numba): the same bits, each row read once.

NumPy passes over a tile a dozen times and asks for the interpreter lock after every pass; sixteen threads then spend
most of their time waiting for memory and for each other. The loop holds no lock and adds in NumPy's order: row after
row, and the squares of one row in the pairs of NumPy's own sum. `stats` tries it against NumPy before its first use.
"""

import functools
from typing import Any

import numba
import numpy as np

__all__ = ["add_tiles", "leaves"]

_LEAF = 128
_OPTIONS: Any = {"nogil": True, "cache": True, "error_model": "numpy"}


@numba.njit(**_OPTIONS)  # type: ignore[untyped-decorator,unused-ignore]
def _leaf(y: Any, start: int, n: int) -> Any:
    """Sum of at most 128 elements in the order of NumPy's inner loop: eight sums side by side."""
    if n < 8:
        total = -0.0
        for i in range(start, start + n):
            total += y[i]
        return total
    r0, r1, r2, r3 = y[start], y[start + 1], y[start + 2], y[start + 3]
    r4, r5, r6, r7 = y[start + 4], y[start + 5], y[start + 6], y[start + 7]
    whole = n - n % 8
    for i in range(start + 8, start + whole, 8):
        r0 += y[i]
        r1 += y[i + 1]
        r2 += y[i + 2]
        r3 += y[i + 3]
        r4 += y[i + 4]
        r5 += y[i + 5]
        r6 += y[i + 6]
        r7 += y[i + 7]
    total = ((r0 + r1) + (r2 + r3)) + ((r4 + r5) + (r6 + r7))
    for i in range(start + whole, start + n):
        total += y[i]
    return total


@numba.njit(**_OPTIONS)  # type: ignore[untyped-decorator,unused-ignore]
def _pairwise(y: Any, ends: Any, stack: Any) -> Any:
    """Sum of all elements: leaves from left to right, two sums joined as often as `ends` says after each leaf."""
    top, start = 0, 0
    for k in range(len(ends)):
        stack[top] = _leaf(y, start, ends[k, 0] - start)
        start = ends[k, 0]
        for _ in range(ends[k, 1]):
            top -= 1
            stack[top] = stack[top] + stack[top + 1]
        top += 1
    return stack[0]


@numba.njit(**_OPTIONS)  # type: ignore[untyped-decorator,unused-ignore]
def _widen(bits: Any, x: Any, squares: Any, top: Any, wide: Any) -> None:
    """Put a row of bfloat16 and its squares into float64, and raise the bits of the largest magnitudes."""
    single = wide.view(np.float32)
    for j in range(len(bits)):
        wide[j] = np.uint32(bits[j]) << np.uint32(16)
        top[j] = max(top[j], bits[j] & np.uint16(0x7FFF))
    for j in range(len(bits)):
        x[j] = h = np.float64(single[j])
        squares[j] = h * h


@numba.njit(**_OPTIONS)  # type: ignore[untyped-decorator,unused-ignore]
def _add_row(x: Any, unit: Any, tile: Any) -> None:
    for j in range(x.shape[1]):
        h = x[0, j]
        tile[0, j] += h
        tile[1, j] += abs(h)
        tile[2, j] += h * h
        tile[3, j] += unit[0] * h


@numba.njit(**_OPTIONS)  # type: ignore[untyped-decorator,unused-ignore]
def _add_four(x: Any, unit: Any, tile: Any) -> None:
    """Add four rows one after the other, so that the sums are loaded and stored once."""
    for j in range(x.shape[1]):
        a, b, c, d = x[0, j], x[1, j], x[2, j], x[3, j]
        tile[0, j] = (((tile[0, j] + a) + b) + c) + d
        tile[1, j] = (((tile[1, j] + abs(a)) + abs(b)) + abs(c)) + abs(d)
        tile[2, j] = (((tile[2, j] + a * a) + b * b) + c * c) + d * d
        tile[3, j] = (((tile[3, j] + unit[0] * a) + unit[1] * b) + unit[2] * c) + unit[3] * d


@numba.njit(  # type: ignore[untyped-decorator,unused-ignore]
    "boolean(Array(uint16, 2, 'C', readonly=True), int64, float64, float64, int64[:, ::1], uint16[::1], "
    "float64[:, ::1], float32[::1])",
    **_OPTIONS,
)
def add_tiles(values: Any, rows: int, low: float, high: float, ends: Any, top: Any, sums: Any, norms: Any) -> bool:
    """Add the tiles of some rows to sums, and set the rows' norms; False where NumPy has to do it all.

    Parameters
    ----------
    values : uint16 array (n, width)
        Bits of bfloat16 rows.
    rows : int
        Rows of a tile.
    low, high : float
        A row whose sum of squares is beyond them is NumPy's, unless it is zero; so is one with what is not finite.
    ends : int64 array (leaves, 2)
        `leaves(width)`.
    top : uint16 array (width,)
        Bits of the largest magnitudes so far, raised in place.
    sums : float64 array (4, width)
        Sums of h, |h|, h² and h / |h| so far, added to in place; like `top` of no use any more where False is returned.
    norms : float32 array (n,)
    """
    n, width = values.shape
    tile, x, unit = np.empty((4, width)), np.empty((4, width)), np.empty(4)
    squares, wide, stack = np.empty(width), np.empty(width, np.uint32), np.empty(64)
    for begin in range(0, n, rows):
        tile[:] = 0.0
        stop = min(begin + rows, n)
        for first in range(begin, stop, 4):
            count = 4 if first + 4 <= stop else 1
            for i in range(first, min(first + 4, stop)):
                r = i - first if count == 4 else 0
                _widen(values[i], x[r], squares, top, wide)
                total = _pairwise(squares, ends, stack)
                if total != 0.0 and not low <= total <= high:
                    return False
                norms[i] = np.float32(np.sqrt(total))
                unit[r] = 1.0 / np.sqrt(total) if total != 0.0 else 0.0
                if count == 1:
                    _add_row(x, unit, tile)
            if count == 4:
                _add_four(x, unit, tile)
        for k in range(4):
            for j in range(width):
                sums[k, j] += tile[k, j]
    return True


@functools.cache
def leaves(width: int) -> Any:
    """Where NumPy's pairwise sum of `width` elements ends its leaves, and how many sums it joins after each."""
    found: list[list[int]] = []

    def split(start: int, n: int) -> None:
        if n <= _LEAF:
            found.append([start + n, 0])
            return
        half = n // 2 - (n // 2) % 8
        split(start, half)
        split(start + half, n - half)
        found[-1][1] += 1

    split(0, width)
    return np.array(found, np.int64).reshape(-1, 2)
