"""Activations like real ones for tests and benchmarks: per-channel scales, a few outlier channels, as hard to compress.

Byte-shuffled and compressed with zstd level 1 in blocks of 512 KiB, the bfloat16 values shrink 1.42 to 1.44 times, as
published residual streams do. Every token is its own function of (seed, token), so a stream can be made piece by piece.
"""

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datastore.dtype import numpy_dtype

__all__ = ["activations"]

_BLOCK = 1024
_SPREAD = 0.75
_MANTISSA = {"bfloat16": 7, "float16": 10, "float32": 23, "float64": 52}


def activations(
    n_tokens: int, width: int, *, seed: int, dtype: str = "bfloat16", outliers: int = 4, start: int = 0
) -> NDArray[Any]:
    """Return the activations of tokens `start` to `start + n_tokens` of an endless stream.

    A pool of 1024 random rows is put in another order for every 1024 tokens, and each row's mantissas are xored with
    another number each time: no two of 131,072 neighbours are equal, and nothing repeats within a compressed block.
    Filling costs about as much as copying.

    Parameters
    ----------
    n_tokens, width : int
        Shape of the result.
    seed : int
        Another seed is another stream.
    dtype : str
        A stored dtype's name.
    outliers : int
        Channels some hundred times larger than the others, at most `width`.
    start : int
        Token of the stream to begin with.

    Returns
    -------
    ndarray
        Shape (n_tokens, width), all finite.

    Examples
    --------
    >>> whole = activations(300, 8, seed=1)
    >>> bool((whole[100:] == activations(200, 8, seed=1, start=100)).all())
    True
    """
    pool = _pool(width, seed, dtype, outliers)
    values = np.empty((n_tokens, width), numpy_dtype(dtype))
    bits = values.view(pool.dtype)
    for block in range(start // _BLOCK, -(-(start + n_tokens) // _BLOCK)):
        first, last = max(start, block * _BLOCK), min(start + n_tokens, (block + 1) * _BLOCK)
        inside = slice(first - block * _BLOCK, last - block * _BLOCK)
        order = np.random.default_rng((seed, block)).permutation(_BLOCK)
        masks = (37 * order + block) % (1 << _MANTISSA[dtype])
        part = bits[first - start : last - start]
        np.take(pool, order[inside], axis=0, out=part, mode="clip")
        np.bitwise_xor(part, masks[inside].astype(pool.dtype)[:, np.newaxis], out=part)
    return values


@lru_cache(maxsize=4)
def _pool(width: int, seed: int, dtype: str, outliers: int) -> NDArray[Any]:
    """Return 1024 rows as unsigned integers: normal values, log-normal scales over channels, large outlier channels."""
    random = np.random.default_rng(seed)
    scales = np.exp(_SPREAD * random.standard_normal(width, np.float32)) * np.float32(0.3)
    centres = np.zeros(width, np.float32)
    centres[random.choice(width, min(outliers, width), replace=False)] = 100 * (1 + np.arange(min(outliers, width)))
    rows = centres + (scales + centres / 20) * random.standard_normal((_BLOCK, width), np.float32)
    stored = rows.astype(numpy_dtype(dtype))
    pool: NDArray[Any] = stored.view(np.dtype(f"u{stored.itemsize}"))
    return pool
