"""The formulas of calibration: massive dimensions, alignment, norms and spreads, as pure functions of float64 arrays.

Two kinds, kept apart because they cost differently. Most follow from the moments written at capture (count, sum, sum of
squares, sum|h|, max|h|, sum h/|h| per dimension): these take arrays whose last axis is hidden, any axes before it. The
others need the values themselves: `magnitude_counts`, `Spread.of`, `share_above` and `percentiles` take blocks of
tokens, and the first two add up over any split of the data. Each docstring says which kind it is.

h is an activation vector of a token, h_d its element at dimension d, means run over tokens.
"""

from dataclasses import dataclass
from typing import Any, Self

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, NDArray

from datastore.dtype import upcast
from datastore.errors import MisuseError

__all__ = [
    "PeakDims",
    "Spread",
    "above_peak_threshold",
    "consecutive_cosine",
    "dim_magnitude",
    "dim_spread",
    "largest",
    "lower_median",
    "magnitude_bits",
    "magnitude_counts",
    "magnitude_median",
    "mean_alignment",
    "norm_quantiles",
    "peak_dims",
    "peak_ratio",
    "percentiles",
    "recommended_dims",
    "share_above",
    "token_cosines",
]

Floats = NDArray[np.float64]

MASSIVE_RATIO = 100.0
"""Peak over the median dimension's peak above which a dimension is called massive."""
MASSIVE_MAGNITUDE = 100.0
MASSIVE_FACTOR = 1000.0
"""Sun, Chen, Kolter & Liu 2024, "Massive Activations in Large Language Models": magnitude above 100 and 1000 times the
median magnitude."""
_MAGNITUDES = 1 << 15
_TILE = 1 << 18
"""Elements counted at a time: NumPy counts integers of 8 bytes, which have to stay in the cache (5 x faster so)."""


def lower_median(values: ArrayLike) -> Floats:
    """Median over the last axis; of an even number of values the lower of the middle two, NaN if any is NaN."""
    array = np.asarray(values, np.float64)
    middle = (array.shape[-1] - 1) // 2
    median = np.partition(array, middle, axis=-1)[..., middle]
    return np.asarray(np.where(np.isnan(array).any(axis=-1), np.nan, median))


def largest(values: ArrayLike, top_k: int) -> NDArray[np.int64]:
    """Indices of the `top_k` largest over the last axis, largest first; the lower index first on ties, NaN last."""
    array = np.asarray(values, np.float64)
    if not 1 <= top_k <= array.shape[-1]:
        raise MisuseError(f"top_k is {top_k}, which is none of the 1 to {array.shape[-1]} dimensions there are")
    rows = (_largest(row, top_k) for row in array.reshape(-1, array.shape[-1]))
    return np.array([*rows], np.int64).reshape(*array.shape[:-1], top_k)


def _largest(row: Floats, top_k: int) -> NDArray[np.intp]:
    upper = np.partition(row, len(row) - top_k)[len(row) - top_k :]  # NaN counts as the largest here
    places = np.arange(len(row)) if np.isnan(upper).any() else np.flatnonzero(row >= upper[0])
    return places[np.argsort(-row[places], kind="stable")[:top_k]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PeakDims:
    """The dimensions with the largest peaks, arrays of shape (..., top_k), largest first.

    Attributes
    ----------
    dims : int64
        Indices on the hidden axis.
    peak, mean_abs : float64
        max|h_d| and mean|h_d| over tokens, in the activation's unit.
    ratio : float64
        Peak over the median dimension's peak; infinite where that is 0, NaN where nothing was counted.
    massive : bool
        Ratio above the threshold.
    """

    dims: NDArray[np.int64]
    peak: Floats
    mean_abs: Floats
    ratio: Floats
    massive: NDArray[np.bool_]


def peak_dims(max_abs: ArrayLike, mean_abs: ArrayLike, *, top_k: int = 5, threshold: float = MASSIVE_RATIO) -> PeakDims:
    """Rank dimensions by max|h_d| against the lower median over dimensions. Follows from moments.

    Raises
    ------
    MisuseError
        If `top_k` is not between 1 and the width.
    """
    peaks, means = np.asarray(max_abs, np.float64), np.asarray(mean_abs, np.float64)
    dims = largest(peaks, top_k)
    peak = _taken(peaks, dims)
    ratio = _over_median(peak, lower_median(peaks))
    return PeakDims(
        dims=dims,
        peak=peak,
        mean_abs=_taken(means, dims),
        ratio=ratio,
        massive=(ratio > threshold) & (peak > 0),
    )


def _taken(values: Floats, dims: NDArray[np.int64]) -> Floats:
    """Take along the last axis; `take_along_axis` of a single row takes longer than ranking it."""
    return np.asarray(values[dims] if values.ndim == 1 else np.take_along_axis(values, dims, -1))


def peak_ratio(max_abs: ArrayLike) -> Floats:
    """max|h_d| over its lower median over dimensions, infinite where that is 0. Follows from moments."""
    peaks = np.asarray(max_abs, np.float64)
    return _over_median(peaks, lower_median(peaks))


def _over_median(peaks: Floats, median: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = peaks / median[..., None]
    return np.where((peaks == 0) & np.isnan(ratio), np.inf, ratio)


def above_peak_threshold(max_abs: ArrayLike, median_magnitude: ArrayLike) -> NDArray[np.bool_]:
    """Say which dimensions are massive by Sun et al. 2024: max|h_d| > 100 and > 1000 × the median magnitude.

    The peaks follow from moments; the median over all elements of the layer's output needs a pass (`magnitude_median`).

    Parameters
    ----------
    max_abs : array of shape (..., hidden)
    median_magnitude : array of shape (...)
    """
    peaks = np.asarray(max_abs, np.float64)
    median = np.asarray(median_magnitude, np.float64)[..., None]
    return (peaks > MASSIVE_MAGNITUDE) & (peaks > MASSIVE_FACTOR * median)


def dim_magnitude(mean: ArrayLike) -> Floats:
    """|mean h_d| over its mean over dimensions, of the shape of `mean`; NaN where the mean is zero. From moments."""
    magnitude = np.abs(np.asarray(mean, np.float64))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(magnitude / magnitude.mean(axis=-1, keepdims=True))


def mean_alignment(mean_unit: ArrayLike, mean: ArrayLike) -> Floats:
    """Mean cosine of the tokens with their mean, mean(h/|h|) · mean(h) / |mean(h)|. Follows from moments.

    A token that is zero counts as cosine 0. Minimum, maximum and spread of the cosines need a pass (`token_cosines`).
    """
    unit, direction = np.asarray(mean_unit, np.float64), np.asarray(mean, np.float64)
    return _ratio(_dot(unit, direction), np.sqrt(_dot(direction, direction)))


def consecutive_cosine(mean: ArrayLike) -> Floats:
    """Cosine of the means of neighbouring captured layers, shape (layers - 1,), from means (layers, hidden)."""
    means = np.asarray(mean, np.float64)
    norms = np.linalg.norm(means, axis=-1)
    return _ratio((means[:-1] * means[1:]).sum(axis=-1), norms[:-1] * norms[1:])


def dim_spread(mean_abs: ArrayLike, rms: ArrayLike) -> tuple[Floats, Floats, Floats]:
    """How large and how steady each dimension is. Follows from moments.

    Returns
    -------
    base : float64 array of shape (...)
        Lower median over dimensions of mean|h_d|.
    ratio : float64 array of shape (..., hidden)
        mean|h_d| / base.
    cv : float64 array of shape (..., hidden)
        Population standard deviation of |h_d| over its mean; differences below 1e-8 of the mean are not resolved.
    """
    means, squares = np.asarray(mean_abs, np.float64), np.asarray(rms, np.float64) ** 2
    base = lower_median(means)
    deviation = np.sqrt(np.maximum(squares - means * means, 0.0))
    return base, _ratio(means, base[..., None]), _ratio(deviation, means)


def recommended_dims(top_dims: ArrayLike, *, layers: int = 3) -> NDArray[np.int64]:
    """Dimensions that are among the first five of at least `layers` layers, ascending; `top_dims` is (layer, k)."""
    dims, counts = np.unique(np.asarray(top_dims, np.int64)[:, :5], return_counts=True)
    return dims[counts >= layers]


def norm_quantiles(norms: ArrayLike, quantiles: ArrayLike) -> Floats:
    """Quantiles of the finite token norms, interpolated linearly. Follows from the norms written at capture."""
    array = np.asarray(norms)
    finite = np.sort(array[np.isfinite(array)]).astype(np.float64)  # several places are found sooner in their order
    wanted = np.asarray(quantiles, np.float64)
    return np.quantile(finite, wanted) if finite.size else np.full(wanted.shape, np.nan)


def magnitude_counts(values: NDArray[Any]) -> NDArray[np.int64]:
    """Count the elements of a block by the upper 15 magnitude bits of their float32 form. Needs a pass; adds up.

    bfloat16 has no other bits, so that quantiles of it are exact; of the other dtypes they are exact to 2⁻⁷ relative.
    Elements that are not finite are left out.

    Returns
    -------
    int64 array of shape (32768,)
        By magnitude, ascending.
    """
    counts = np.zeros(_MAGNITUDES, np.int64)
    flat = np.ascontiguousarray(values).reshape(-1)
    for start in range(0, flat.size, _TILE):
        counts += np.bincount(magnitude_bits(flat[start : start + _TILE]), minlength=_MAGNITUDES)
    counts[0x7F80:] = 0
    return counts


def magnitude_bits(values: NDArray[Any], out: NDArray[np.uint16] | None = None) -> NDArray[np.uint16]:
    """Return the upper 15 magnitude bits of every element's float32 form, which order as magnitudes do."""
    if values.dtype == ml_dtypes.bfloat16:
        return np.bitwise_and(values.view(np.uint16), np.uint16(0x7FFF), out=out)
    with np.errstate(over="ignore"):  # a float64 beyond float32 counts as not finite
        wide = np.ascontiguousarray(upcast(values), np.float32)
    upper = (wide.view(np.uint32) >> 16).astype(np.uint16)
    return np.bitwise_and(upper, np.uint16(0x7FFF), out=out)


def magnitude_median(counts: NDArray[np.int64]) -> float:
    """Lower median of |h_td| over all elements counted by `magnitude_counts`; NaN where there is none."""
    total = int(counts.sum())
    if total == 0:
        return float("nan")
    code = int(np.searchsorted(np.cumsum(counts), (total - 1) // 2, side="right"))
    return float(np.array(code << 16, np.uint32).view(np.float32))


def token_cosines(values: NDArray[Any], mean: ArrayLike) -> Floats:
    """Cosine of every token of a block (tokens, hidden) with a mean (hidden,), in float64. Needs a pass."""
    wide, direction = upcast(values).astype(np.float64), np.asarray(mean, np.float64)
    return _ratio(wide @ direction, np.linalg.norm(wide, axis=-1) * np.linalg.norm(direction), empty=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Mean, extremes and spread of numbers seen in blocks: a monoid, the same for any split to float64 rounding.

    Deviations are summed about the running mean (Chan, Golub & LeVeque 1979), since cosines near 1 differ by less than
    a difference of squares resolves.
    """

    count: int = 0
    mean: float = 0.0
    deviation: float = 0.0
    least: float = np.inf
    most: float = -np.inf

    @classmethod
    def of(cls, values: ArrayLike) -> Self:
        """The spread of one block of numbers."""
        array = np.asarray(values, np.float64).reshape(-1)
        if array.size == 0:
            return cls()
        mean = float(array.mean())
        about = float(((array - mean) ** 2).sum())
        return cls(count=array.size, mean=mean, deviation=about, least=float(array.min()), most=float(array.max()))

    def __add__(self, other: Self) -> Self:
        count = self.count + other.count
        if self.count == 0 or other.count == 0:
            return self if other.count == 0 else other
        apart = other.mean - self.mean
        return type(self)(
            count=count,
            mean=self.mean + apart * other.count / count,
            deviation=self.deviation + other.deviation + apart**2 * self.count * other.count / count,
            least=min(self.least, other.least),
            most=max(self.most, other.most),
        )

    def finalise(self) -> dict[str, float]:
        """`mean`, `min`, `max` and `std` (with ddof 1, NaN for one number); all NaN where nothing was seen."""
        if self.count == 0:
            return dict.fromkeys(("mean", "min", "max", "std"), float("nan"))
        std = float(np.sqrt(self.deviation / (self.count - 1))) if self.count > 1 else float("nan")
        return {"mean": self.mean, "min": self.least, "max": self.most, "std": std}


def share_above(values: NDArray[Any], base: float, *, factor: float = 10.0) -> Floats:
    """Per cent of tokens with |h_d| > factor × base, for each column of (tokens, dims). Needs a pass."""
    above = np.abs(upcast(values)).astype(np.float64) > factor * base
    return np.asarray(100.0 * above.mean(axis=0) if len(values) else np.full(values.shape[1:], np.nan))


def percentiles(values: NDArray[Any], wanted: ArrayLike) -> Floats:
    """Percentiles of |h_d| for each column of (tokens, dims), shape (wanted, dims), interpolated linearly.

    Needs a pass, and the few columns asked for of all tokens at once: 685,000 tokens × 5 dims are 27 MB.
    """
    magnitudes = np.abs(upcast(values)).astype(np.float64)
    asked = np.atleast_1d(np.asarray(wanted, np.float64))
    return np.percentile(magnitudes, asked, axis=0) if len(values) else np.full((len(asked), values.shape[1]), np.nan)


def _dot(a: Floats, b: Floats) -> Floats:
    """Dot products over the last axis, of few arrays several times as fast as a product and its sum."""
    return np.asarray(np.einsum("...d,...d->...", a, b))


def _ratio(above: Floats, below: Floats, *, empty: float = np.nan) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        quotient = np.asarray(above / below)
    return np.where(np.broadcast_to(below, quotient.shape) == 0, empty, quotient)
