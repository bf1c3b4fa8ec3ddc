"""The dask-backed Dataset: the same numbers, tasks of several whole chunks, each chunk read once."""

import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

import datastore
from datastore.chunked import task_lengths
from datastore.errors import AbsentError, MisuseError
from datastore.query import Store
from tests.datastore import making

COUNTS = (50, 60, 7, 80, 33)
CHUNK = 16
OPENED: Counter[str] = Counter()


def _opened(event: str, args: tuple[Any, ...]) -> None:
    if event == "open" and "/residual/c/" in str(args[0]):
        OPENED[str(args[0])] += 1


sys.addaudithook(_opened)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    making.capture(tmp_path / "run.zarr", making.rollouts(*COUNTS), (1, 5))
    return datastore.open(tmp_path / "run.zarr")


@pytest.fixture
def captures(tmp_path: Path) -> Store:
    """Three captures: two groups of rollouts, and a layer more of some of both."""
    path, made = tmp_path / "run.zarr", making.rollouts(*COUNTS)
    making.capture(path, made[:2], (1, 5))
    making.capture(path, made[2:], (1, 5))
    making.capture(path, made[1:4], (9,), components=(making.RESIDUAL,))
    return datastore.open(path)


def chunk_and_place(store: Store) -> list[tuple[int, int]]:
    """Of every token: the capture and chunk that hold its residual at layer 1, found token by token."""
    found = []
    for name in store.rollouts.index:
        for number, capture in enumerate(store.cells.captures):
            if name in capture.rollout_ids and 1 in capture.layers:
                start, stop = capture.ragged.range(capture.rollout_ids.index(name))
                found += [(number, token // CHUNK) for token in range(start, stop)]
    return found


def test_a_task_is_several_whole_chunks_of_one_layer_and_reads_each_once(store: Store) -> None:
    whole = store.dataset(chunks=40)
    n_tokens, tokens = sum(COUNTS), 2 * CHUNK
    assert whole.residual.chunks == (
        (tokens,) * 6 + (38,),
        (1, 1),
        (making.RESIDUAL.width,),
    )
    OPENED.clear()
    with dask.config.set(scheduler="threads"):
        values = whole.residual.sel(layer=5).compute()
    assert len(OPENED) == -(-n_tokens // CHUNK)
    assert set(OPENED.values()) == {1}
    plain = store.dataset()
    np.testing.assert_array_equal(values, plain.residual.sel(layer=5).values)
    assert whole.compute().identical(plain.compute())


@pytest.mark.parametrize("chunks", [1, 17, 60, 10**6, "auto"])
def test_captures_are_cut_where_their_chunks_are(captures: Store, chunks: Any) -> None:
    whole, plain = captures.dataset(chunks=chunks), captures.dataset()
    lengths = whole.chunks["token"]
    held = chunk_and_place(captures)
    captured = np.repeat(captures.captured("residual")[9].to_numpy(), captures.rollouts["n_tokens"]).tolist()
    for at in np.cumsum(lengths)[:-1].tolist():
        assert held[at] != held[at - 1] or captured[at] != captured[at - 1], "no chunk is in two tasks without need"
    most = 10**6 if chunks == "auto" else chunks
    for length, at in zip(lengths, np.cumsum(lengths) - lengths, strict=True):
        assert length <= most or len(set(held[at : at + length])) == 1
    for name in plain.data_vars:
        for layer in (1, 5):
            one = whole[name].sel(layer=layer)
            xr.testing.assert_identical(one.compute(), plain[name].sel(layer=layer).compute())
    one = whole.residual.sel(rollout=["1", "2"], layer=9)
    np.testing.assert_array_equal(one, plain.residual.sel(rollout=["1", "2"], layer=9))
    with pytest.raises(AbsentError, match=r"layer 9 of rollout '[04]' is not captured"):
        whole.residual.sel(layer=9).compute()


def test_sums_of_tasks_are_those_of_numpy(store: Store) -> None:
    rows = store.dataset(chunks=32).residual
    lazily = rows.groupby("rollout").mean()
    np.testing.assert_allclose(lazily, store.dataset().residual.groupby("rollout").mean(), rtol=1e-6)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 30))
def test_tasks_are_as_long_as_they_can_be(chunks: list[int], most: int) -> None:
    starts, n_tokens = np.cumsum([0, *chunks])[:-1], sum(chunks)
    lengths = task_lengths(starts, n_tokens, most=most)
    edges = np.cumsum([0, *lengths]).tolist()
    assert edges[-1] == n_tokens
    assert set(edges[:-1]) <= set(starts.tolist())
    for low, high in pairwise(edges):
        inside = [c for c, start in zip(chunks, starts, strict=True) if low <= start < high]
        assert high - low <= most or len(inside) == 1
        following = next((c for c, start in zip(chunks, starts, strict=True) if start == high), most)
        assert high == n_tokens or high - low + following > most


@pytest.mark.parametrize("chunks", [0, -5, 1.5, "many", {"token": 5}])
def test_chunks_that_are_none(store: Store, chunks: Any) -> None:
    with pytest.raises(MisuseError, match=r"chunks=.* is no number of tokens for a task; give 1 or more, or 'auto'"):
        store.dataset(chunks=chunks)


def test_without_dask_it_says_what_to_install(store: Store) -> None:
    words = f"import sys; sys.modules['dask'] = None; import datastore; datastore.open({str(store.path)!r}).dataset("
    plain = [subprocess.run([sys.executable, "-c", words + one], capture_output=True) for one in (")", "chunks=32)")]
    assert [one.returncode for one in plain] == [0, 1]
    assert b"MisuseError: dask is not installed; install activation-datastore[dask]" in plain[1].stderr
