"""The generator of activations: a function of (seed, token), finite, and as hard to compress as real ones."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datastore.codec import encode
from datastore.dtype import upcast
from datastore.schema import DTYPES, Codec
from tests.synthetic import activations


@given(st.integers(0, 3000), st.integers(0, 2100), st.sampled_from(sorted(DTYPES)))
def test_a_piece_is_the_same_piece_of_the_whole(start: int, length: int, dtype: str) -> None:
    whole = activations(5100, 4, seed=1, dtype=dtype)
    piece = activations(length, 4, seed=1, dtype=dtype, start=start)
    np.testing.assert_array_equal(piece, whole[start : start + length])


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_values_look_like_activations(dtype: str) -> None:
    values = activations(3000, 256, seed=2, dtype=dtype)
    wide = upcast(values).astype(np.float64)
    assert values.dtype.name == dtype
    assert np.isfinite(wide).all()
    assert len(np.unique(wide, axis=0)) == 3000
    assert (activations(3000, 256, seed=3, dtype=dtype) != values).mean() > 0.9
    means = np.sort(np.abs(wide.mean(axis=0)))
    assert means[-4] > 50 > 1 > means[-5]


@pytest.mark.parametrize("width", [1024, 7168])
def test_they_compress_as_real_ones_do(width: int) -> None:
    values = activations(512, width, seed=4)
    assert 1.42 <= values.nbytes / len(encode(values, Codec())) <= 1.46
