"""The arithmetic of scores: pure NumPy functions from stored bits and directions to per-token numbers.

A score is h · v/|v|, in float32. h are the stored bits, widened exactly; v is kept as it was fitted, normalised in
float64 and rounded once to float32. With u = 2⁻²⁴ and n the width, the float32 product differs from the exact one by at
most (n + 2) u Σ|h_i v_i|/|v| (Higham 2002, §3.1, whatever the order of summation; one u more where the stored dtype is
float64); the usual error is about √n times smaller. Norms are summed in float64 and rounded once.

Everything derived from scores (cosine, centred, smoothed, cleaned) is computed in float64 and rounded once to float32.
The token axis comes first, the direction axis last.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import convolve1d
from threadpoolctl import ThreadpoolController

from datastore.dtype import upcast
from datastore.errors import MisuseError

__all__ = [
    "TILE",
    "centred",
    "clean_norms",
    "clean_scores",
    "cosine",
    "ensemble",
    "less_baseline",
    "normalised",
    "one_blas_thread",
    "score_block",
    "scratch_for",
    "smooth",
    "token_norms",
    "unit",
    "unit_columns",
    "velocity",
]

Float32 = NDArray[np.float32]

TILE = 64
"""Rows widened at a time: 64 of 7168 float32 are 1.8 MB, which stay in the cache for the product that follows."""


def unit(vector: ArrayLike) -> Float32:
    """Return v/|v| as float32, normalised in float64.

    Raises
    ------
    MisuseError
        If the vector has no direction (zero, or not finite) or is not one-dimensional.
    """
    wide = np.asarray(vector, np.float64)
    peak = float(np.max(np.abs(wide), initial=0.0))
    if wide.ndim != 1 or not np.isfinite(peak) or peak == 0.0:
        raise MisuseError(
            f"a vector of shape {wide.shape} and largest magnitude {peak} has no direction to score along"
        )
    scaled = wide / peak  # squares of very large or small elements would overflow or vanish
    return np.asarray(scaled / np.linalg.norm(scaled), np.float32)


def unit_columns(vectors: Sequence[ArrayLike]) -> Float32:
    """Return the matrix that `score_block` takes, float32 (hidden, direction), from vectors of one width."""
    widths = {np.shape(vector) for vector in vectors}
    if len(widths) != 1:
        raise MisuseError(f"directions of widths {sorted(widths)} can't be scored together; group them by component")
    return np.ascontiguousarray(np.stack([unit(vector) for vector in vectors], axis=1))


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Keep BLAS to one thread in this process, so that the workers of a pool do not share cores with its own."""
    with _blas().limit(limits=1, user_api="blas"):
        yield


@cache
def _blas() -> ThreadpoolController:
    """The libraries that are loaded now, NumPy's among them, which multiplies; looking for them takes 3 ms."""
    return ThreadpoolController()


def scratch_for(width: int) -> Float32:
    """Return the buffer that `score_block` widens tiles into; one for each thread, kept between blocks."""
    return np.empty((TILE, width), np.float32)


def score_block(values: NDArray[Any], directions: Float32, out: Float32, *, scratch: Float32 | None = None) -> Float32:
    """Score a block of stored rows along every direction: the hot kernel.

    Rows are widened and multiplied tile by tile, so that the float32 copy never leaves the cache. Tiles are counted
    from the block's first row: the same block and the same directions give the same bits, in whatever process. Other
    company in the tile or in the matrix moves the last bits, within the bound above. Call it within `one_blas_thread`.

    Parameters
    ----------
    values : array of shape (tokens, hidden)
        Stored bits: bfloat16, float16, float32, or float64, which is rounded to float32.
    directions : float32 array of shape (hidden, direction)
        Unit vectors, from `unit_columns`.
    out : float32 array of shape (tokens, direction), C order
        Where the scores go. A row with a non-finite element gets non-finite scores, and no other row does.
    scratch : float32 array of shape (TILE, hidden), optional
        From `scratch_for`.

    Returns
    -------
    float32 array
        `out`.

    Raises
    ------
    MisuseError
        If the shapes do not fit together.
    """
    tokens, width = values.shape
    if directions.shape[0] != width or out.shape != (tokens, directions.shape[1]):
        raise MisuseError(
            f"activations of shape {values.shape}, directions of shape {directions.shape} and scores of shape "
            f"{out.shape} do not fit together; the directions are of another width or component"
        )
    buffer = scratch_for(width) if scratch is None else scratch
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, tokens, TILE):
            rows = values[start : start + TILE]
            np.matmul(_widened(rows, buffer[: len(rows)]), directions, out=out[start : start + TILE])
    return out


def token_norms(values: NDArray[Any]) -> Float32:
    """Euclidean norm of every row of (tokens, hidden), summed in float64, rounded once to float32."""
    norms = np.empty(len(values), np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, len(values), TILE):
            wide = upcast(values[start : start + TILE]).astype(np.float64)
            norms[start : start + TILE] = np.sqrt(np.einsum("th,th->t", wide, wide))
    return norms


def cosine(scores: ArrayLike, norms: ArrayLike) -> Float32:
    """Score over the token's norm, 0 where the norm is 0; `norms` is (tokens,)."""
    wide, length = _by_token(scores, norms)
    with np.errstate(divide="ignore", invalid="ignore"):
        return _rounded(np.where(length <= 0, 0.0, wide / length))


def normalised(scores: ArrayLike, norms: ArrayLike, *, response: ArrayLike | None = None) -> Float32:
    """Score over the mean norm of the rollout's response tokens, or of all its tokens where it has no response.

    Parameters
    ----------
    scores, norms : arrays of shape (tokens, ...) and (tokens,)
        Of one rollout.
    response : bool array of shape (tokens,), optional
        Which tokens are the response.

    Returns
    -------
    float32 array of the scores' shape
        The scores themselves where the mean norm is 0 or there are no tokens.
    """
    length = np.asarray(norms, np.float64)
    chosen = np.ones(len(length), bool) if response is None else np.asarray(response, bool)
    counted = length[chosen] if chosen.any() else length
    mean = float(counted.mean()) if counted.size else 0.0
    wide = np.asarray(scores, np.float64)
    return _rounded(wide / mean if mean != 0 else wide)


def less_baseline(scores: ArrayLike, baselines: ArrayLike) -> Float32:
    """Subtract each direction's baseline, so that 0 is the midpoint between its classes at extraction.

    Raises
    ------
    MisuseError
        If a baseline is unknown (NaN): there is no midpoint to centre on, and 0 would pass for one.
    """
    known = np.asarray(baselines, np.float64)
    if np.isnan(known).any():
        raise MisuseError(
            f"{int(np.isnan(known).sum())} of {known.size} directions have no baseline, so their scores can't be "
            "centred; leave out --centered or write the baselines into metadata.json"
        )
    return _rounded(np.asarray(scores, np.float64) - known)


def centred(scores: ArrayLike) -> Float32:
    """Subtract the value at the first token, which dominates the scale of many models; one rollout's scores."""
    wide = np.asarray(scores, np.float64)
    return _rounded(wide - wide[:1]) if len(wide) else _rounded(wide)


def velocity(scores: ArrayLike) -> Float32:
    """Difference of each token's value and the one before; one value less than there are tokens."""
    return _rounded(np.diff(np.asarray(scores, np.float64), axis=0))


def smooth(scores: ArrayLike, window: int) -> Float32:
    """Centred moving average over tokens; at the ends over as many as there are.

    The window reaches `window // 2` tokens to each side, so an even window is one token wider than it says. Fewer
    tokens than `window` are not smoothed.

    Raises
    ------
    MisuseError
        If the window is less than 1.
    """
    if window < 1:
        raise MisuseError(f"a smoothing window of {window} tokens averages nothing; give 1 or more")
    wide = np.asarray(scores, np.float64)
    if len(wide) < window or window == 1:
        return _rounded(wide)
    ones = np.ones(2 * (window // 2) + 1)
    counts = convolve1d(np.ones(len(wide)), ones, mode="constant")
    sums = convolve1d(wide, ones, axis=0, mode="constant")
    return _rounded(sums / counts.reshape(-1, *[1] * (wide.ndim - 1)))


def clean_scores(scores: ArrayLike, at_dims: ArrayLike, vectors_at_dims: ArrayLike) -> Float32:
    """Take the contribution of some dimensions out of the scores: p − Σ_d h_d v_d/|v|.

    |v| stays that of the whole vector. The formula is linear: for a difference of two runs, give the difference of the
    scores and the difference of the activations.

    Parameters
    ----------
    scores : array of shape (tokens, direction)
    at_dims : array of shape (tokens, dims)
        Activations at the dimensions.
    vectors_at_dims : array of shape (dims, direction)
        Rows of the unit vectors at the dimensions.
    """
    taken = np.asarray(at_dims, np.float64) @ np.asarray(vectors_at_dims, np.float64)
    return _rounded(np.asarray(scores, np.float64) - taken)


def clean_norms(norms: ArrayLike, at_dims: ArrayLike) -> Float32:
    """Norms without some dimensions: √max(0, |h|² − Σ_d h_d²); `at_dims` is (tokens, dims).

    Where nearly all of |h| lies in the dimensions the difference of squares cancels: the result is then known to about
    2⁻¹² |h|, since |h| is a float32.
    """
    left = np.asarray(norms, np.float64) ** 2 - (np.asarray(at_dims, np.float64) ** 2).sum(axis=-1)
    return _rounded(np.sqrt(np.maximum(left, 0.0)))


def ensemble(scores: ArrayLike, weights: ArrayLike) -> Float32:
    """Weighted sum over the last axis, weights scaled to sum to 1 (equal ones where they sum to 0).

    Raises
    ------
    MisuseError
        If there is not one finite weight for each direction.
    """
    wide, given = np.asarray(scores, np.float64), np.asarray(weights, np.float64)
    if given.shape != wide.shape[-1:] or not np.isfinite(given).all():
        raise MisuseError(f"weights {given.tolist()} are not one finite number for each of {wide.shape[-1]} directions")
    total = float(given.sum())
    shares = given / total if total != 0 else np.full(len(given), 1 / len(given))
    return _rounded(wide @ shares)


def _widened(rows: NDArray[Any], buffer: Float32) -> Float32:
    if rows.dtype == np.float64:
        np.copyto(buffer, rows, casting="same_kind")
        return buffer
    return upcast(rows, buffer)


def _by_token(scores: ArrayLike, norms: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    wide, length = np.asarray(scores, np.float64), np.asarray(norms, np.float64)
    if length.shape != wide.shape[:1]:
        raise MisuseError(
            f"{length.shape} norms do not belong to scores of shape {wide.shape}; give one for each token"
        )
    return wide, length.reshape(-1, *[1] * (wide.ndim - 1))


def _rounded(values: NDArray[Any]) -> Float32:
    return np.asarray(values, np.float32)
