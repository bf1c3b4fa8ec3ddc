"""Chunk arithmetic against counting by hand."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datastore import layout
from datastore.errors import PlanError
from datastore.layout import Piece, Ragged

counts = st.lists(st.integers(1, 40), min_size=1, max_size=12)
powers = st.sampled_from([1, 2, 4, 8, 16, 64])


@pytest.mark.parametrize(
    ("width", "itemsize", "limits", "expected"),
    [
        (7168, 2, {}, 512),
        (64, 4, {}, 1024),
        (4096, 2, {}, 1024),
        (4097, 2, {}, 512),
        (64, 4, {"most_tokens": 100}, 64),
        (10**9, 8, {}, 1),
        (1, 1, {"most_tokens": 1}, 1),
    ],
)
def test_tokens_of_a_chunk(width: int, itemsize: int, limits: dict[str, int], expected: int) -> None:
    assert layout.chunk_tokens(width, itemsize, **limits) == expected


def test_a_chunk_has_positive_sizes() -> None:
    with pytest.raises(
        PlanError, match=r"a chunk needs positive sizes, but width=0, itemsize=2.*give sizes of at least 1"
    ):
        layout.chunk_tokens(0, 2)


@given(st.integers(0, 500), st.integers(0, 500), powers)
def test_chunks_of_a_range_are_those_of_its_tokens(start: int, stop: int, chunk: int) -> None:
    assert list(layout.chunks_of(start, stop, chunk)) == sorted({token // chunk for token in range(start, stop)})


@given(st.integers(1, 500), powers)
def test_chunk_ranges_tile_the_axis(n_tokens: int, chunk: int) -> None:
    ranges = [layout.chunk_range(k, chunk, n_tokens) for k in range(layout.n_chunks(n_tokens, chunk))]
    assert [token for a, b in ranges for token in range(a, b)] == list(range(n_tokens))


@given(st.integers(1, 500), st.integers(1, 9), powers)
def test_parts_tile_the_axis_and_share_no_chunk(n_tokens: int, parts: int, stride: int) -> None:
    ranges = [layout.part_range(i, parts, n_tokens=n_tokens, stride=stride) for i in range(1, parts + 1)]
    assert [token for a, b in ranges for token in range(a, b)] == list(range(n_tokens))
    chunks = [k for a, b in ranges for k in layout.chunks_of(a, b, stride)]
    assert len(set(chunks)) == len(chunks)
    sizes = [len(layout.chunks_of(a, b, stride)) for a, b in ranges]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("part", [0, 4])
def test_a_part_is_one_of_the_parts(part: int) -> None:
    with pytest.raises(PlanError, match=rf"part {part}/3 does not exist; parts are numbered from 1 to 3"):
        layout.part_range(part, 3, n_tokens=10, stride=1)


@given(counts, st.integers(1, 100))
def test_batches_hold_each_rollout_once_within_the_budget(lengths: list[int], budget: int) -> None:
    groups = layout.batches(lengths, budget=budget)
    flat = [i for group in groups for i in group]
    assert sorted(flat) == list(range(len(lengths)))
    assert [lengths[i] for i in flat] == sorted(lengths)
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= budget
    for first, second in pairwise(groups):  # none could have taken the next rollout
        assert (len(first) + 1) * lengths[second[0]] > budget


def test_a_batch_holds_something() -> None:
    with pytest.raises(PlanError, match="a batch of 0 tokens holds nothing; give at least 1"):
        layout.batches([1], budget=0)


@given(counts, st.data())
def test_ragged_against_a_list_of_rows(lengths: list[int], data: st.DataObject) -> None:
    rows = [row for row, n in enumerate(lengths) for _ in range(n)]
    ragged = Ragged(lengths)
    assert (ragged.n_tokens, len(ragged)) == (len(rows), len(lengths))
    assert [ragged.row_at(token) for token in range(len(rows))] == rows
    start = data.draw(st.integers(0, len(rows)))
    stop = data.draw(st.integers(0, len(rows)))
    tokens = list(range(start, stop))
    expected = [
        Piece(row, min(mine), max(mine) + 1)
        for row in range(len(lengths))
        if (mine := [token for token in tokens if rows[token] == row])
    ]
    assert ragged.pieces(start, stop) == expected
    some = data.draw(st.sets(st.sampled_from(range(len(lengths)))))
    covered = [token for a, b in ragged.tokens_of(some) for token in range(a, b)]
    assert covered == [token for token, row in enumerate(rows) if row in some]


def test_ragged_refuses_empty_rollouts_and_tokens_outside() -> None:
    with pytest.raises(PlanError, match="rollout 1 of the plan has 0 tokens; leave out rollouts without tokens"):
        Ragged([3, 0, 2])
    with pytest.raises(IndexError, match=r"token 5 is outside \[0, 5\)"):
        Ragged(np.array([3, 2])).row_at(5)
