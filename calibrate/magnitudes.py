"""The median magnitude of many elements, counted block by block: all of them, or those in a window around the median.

Counting every element takes longer than decoding it. A few tokens from everywhere tell well where the median is, so
that only the few elements near it are counted one by one, and of the others only how many lie below. What comes of it
is exact: where the median turns out to lie outside the window, it says so, and all elements have to be counted.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from calibrate.formulas import magnitude_bits, magnitude_counts, magnitude_median
from calibrate.scratch import scratch

__all__ = ["ALL", "Magnitudes", "Window", "median_bits", "window_around"]

MARGIN, ERRORS = 2, 4
"""A window reaches so many codes, which are 0.4 to 0.8 % wide, and so many standard errors from the samples' mean."""
MOST = 128
"""Codes of a window at most: those of a factor of two. A wider one gains nothing."""


@dataclass(frozen=True, slots=True)
class Window:
    """Magnitudes from code `low` to below `high`, as `magnitude_counts` orders them."""

    low: int
    high: int


ALL = Window(0, 0x7F80)
"""All magnitudes that are finite."""


def median_bits(values: NDArray[Any]) -> int:
    """Return the code of the median magnitude of a few tokens' elements."""
    codes = magnitude_bits(values).reshape(-1)
    return int(np.partition(codes, len(codes) // 2)[len(codes) // 2])


def window_around(medians: Sequence[int]) -> Window:
    """Return the window in which the median of everything is expected, from those of samples; ALL of a single one."""
    if len(medians) < 2:
        return ALL
    reach = MARGIN + math.ceil(ERRORS * float(np.std(medians, ddof=1)) / math.sqrt(len(medians)))
    middle = round(float(np.mean(medians)))
    found = Window(max(0, middle - reach), min(ALL.high, middle + reach + 1))
    return found if found.high - found.low <= MOST else ALL


@dataclass(slots=True, kw_only=True, eq=False)
class Magnitudes:
    """Elements by magnitude: a monoid over blocks, for one window.

    Attributes
    ----------
    window : Window
    below : int
        Elements below it.
    counts : int64 array (window.high - window.low,)
        Elements in it, by code.
    """

    window: Window
    below: int
    counts: NDArray[np.int64]

    @classmethod
    def none(cls, window: Window) -> Self:
        """The count of no element."""
        return cls(window=window, below=0, counts=np.zeros(window.high - window.low, np.int64))

    def add(self, values: NDArray[Any]) -> None:
        """Count the elements of a block (tokens, hidden)."""
        if self.window == ALL:
            self.counts += magnitude_counts(values)[: ALL.high]
            return
        low, size = np.uint16(self.window.low), np.uint16(len(self.counts))
        codes, near = scratch("codes", values.shape[1], np.uint16), scratch("near", values.shape[1], np.bool_)
        for start in range(0, len(values), len(codes)):
            tile = values[start : start + len(codes)]
            over, flags = codes[: len(tile)], near[: len(tile)]
            np.subtract(magnitude_bits(tile, out=over), low, out=over)  # what is below wraps round, to 2¹⁵ and more
            self.below += int(np.count_nonzero(np.less(over.view(np.int16), 0, out=flags)))
            places = np.flatnonzero(np.less(over, size, out=flags))
            self.counts += np.bincount(over.reshape(-1)[places], minlength=len(self.counts))

    def merge(self, other: "Magnitudes") -> None:
        """Add what another counted in the same window."""
        self.below += other.below
        self.counts += other.counts

    def median(self, total: int) -> float | None:
        """Return the lower median of `total` finite elements, NaN where there is none, None if outside the window."""
        if self.window == ALL:
            return magnitude_median(self.counts)
        place = (total - 1) // 2 - self.below
        if not 0 <= place < int(self.counts.sum()):
            return None
        code = self.window.low + int(np.searchsorted(np.cumsum(self.counts), place, side="right"))
        return float(np.array(code << 16, np.uint32).view(np.float32))
