"""Token axes against a plain list of (rollout, position)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datastore.axis import Axis

Tokens = list[tuple[int, int]]


@st.composite
def axes(draw: st.DrawFn) -> Axis:
    runs = draw(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6), st.integers(0, 5)), max_size=6))
    rollout, start, length = np.array(runs, dtype=np.int64).reshape(-1, 3).T
    return Axis.of(rollout, start, start + length)


def tokens(axis: Axis) -> Tokens:
    return list(zip(axis.spread(axis.rollout).tolist(), axis.positions().tolist(), strict=True))


@given(axes(), st.slices(40))
def test_a_slice_is_that_of_a_list(axis: Axis, key: slice) -> None:
    assert tokens(axis.take(key)) == tokens(axis)[key]


@given(axes(), st.data())
def test_an_array_of_places_is_that_of_a_list(axis: Axis, data: st.DataObject) -> None:
    n = axis.n_tokens
    places = data.draw(st.lists(st.integers(-n, n - 1), max_size=12)) if n else []
    assert tokens(axis.take(np.array(places, dtype=np.int64))) == [tokens(axis)[i] for i in places]


@given(axes(), st.integers(0, 8), st.integers(0, 12))
def test_within_keeps_the_positions_between(axis: Axis, start: int, stop: int) -> None:
    bounds: list[Any] = [np.full(len(axis.rollout), n) for n in (start, stop)]
    assert tokens(axis.within(*bounds)) == [(r, p) for r, p in tokens(axis) if start <= p < stop]


@given(st.lists(axes(), min_size=1, max_size=3))
def test_joined_axes_lie_end_to_end(parts: list[Axis]) -> None:
    assert tokens(Axis.joined(parts)) == [one for part in parts for one in tokens(part)]


@given(axes(), axes())
def test_axes_are_the_same_when_their_tokens_are(a: Axis, b: Axis) -> None:
    assert a.same(b) == (tokens(a) == tokens(b))


def test_a_token_outside_is_an_error() -> None:
    axis = Axis.of(np.array([0]), np.array([0]), np.array([3]))
    with pytest.raises(IndexError, match=r"token 3 is outside an axis of 3 tokens"):
        axis.take(np.array([0, 3]))
