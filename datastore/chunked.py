"""A store's Dataset over dask: where its token axis is cut so that a task reads several chunks, each of them whole."""

from itertools import pairwise

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from datastore.axis import Axis
from datastore.cells import Cells
from datastore.errors import MisuseError
from datastore.lazy import component_layout

__all__ = ["chunked", "task_lengths"]

Ints = NDArray[np.int64]
AUTO_BYTES = 1 << 27
"""Decoded bytes of a task where the reader names no number of tokens: what dask itself takes for a good size."""


def chunked(dataset: xr.Dataset, cells: Cells, axis: Axis, *, chunks: object) -> xr.Dataset:
    """Return a store's Dataset with its components as dask arrays; a task is a run of tokens of one layer.

    Parameters
    ----------
    dataset : Dataset
    cells : Cells
    axis : Axis
        Its token axis.
    chunks : int or "auto"
        Tokens of a task at most, but at least a chunk's; "auto" for 128 MiB.

    Raises
    ------
    MisuseError
        `chunks` is none of that, or dask is not installed.
    """
    starts, widest = _boundaries(cells, axis)
    most = max(1, AUTO_BYTES // widest) if chunks == "auto" else chunks
    if not isinstance(most, int) or most < 1:
        raise MisuseError(f"chunks={chunks!r} is no number of tokens for a task; give 1 or more, or 'auto'")
    edges = [0, *_unlike(cells, axis).tolist(), axis.n_tokens]
    lengths = [
        length
        for low, high in pairwise(edges)
        for length in task_lengths(starts[(starts >= low) & (starts < high)] - low, high - low, most=most)
    ]
    try:
        return dataset.chunk({"token": tuple(lengths), "layer": 1})
    except ImportError as error:
        raise MisuseError("dask is not installed; install activation-datastore[dask], or leave chunks out") from error


def task_lengths(starts: Ints, n_tokens: int, *, most: int) -> list[int]:
    """Return the lengths of tasks that begin where chunks begin, each as long as it can be.

    Parameters
    ----------
    starts : int64 array, ascending
        Tokens at which a chunk begins; a task also begins at 0.
    n_tokens : int
    most : int
        Tokens of a task at most; one that holds a single chunk may be longer.

    Examples
    --------
    >>> task_lengths(np.array([0, 4, 8, 12]), 13, most=9)
    [8, 5]
    >>> task_lengths(np.array([0, 4, 8, 12]), 13, most=1)
    [4, 4, 4, 1]
    """
    edges = np.append(starts, n_tokens)
    lengths = []
    at = 0
    while at < n_tokens:
        last = int(np.searchsorted(edges, at + most, side="right")) - 1
        following = int(np.searchsorted(edges, at, side="right"))
        end = int(edges[max(last, following)])
        lengths.append(end - at)
        at = end
    return lengths


def _boundaries(cells: Cells, axis: Axis) -> tuple[Ints, int]:
    """Return where chunks begin of the component whose chunks are the longest, and the bytes of the widest row."""
    starts, longest, widest = np.zeros(0, np.int64), 0, 1
    for name, spec in cells.components.items():
        widest = max(widest, spec.width * 4)
        holder, row = (values[axis.rollout] for values in cells.where(name, cells.layers_of(name)[0]))
        size = max(component_layout(cells, place, name).tokens for place in np.unique(holder[holder >= 0]).tolist())
        if size > longest:
            longest, starts = size, _chunk_starts(cells, name, axis, holder=holder, row=row)
    return starts, widest


def _unlike(cells: Cells, axis: Axis) -> Ints:
    """Return where rollouts meet that are not captured at the same layers: what is not there must not spoil a task."""
    there = [
        cells.where(name, layer)[0][axis.rollout] >= 0 for name in cells.components for layer in cells.layers_of(name)
    ]
    changed = np.any([one[1:] != one[:-1] for one in there], axis=0)
    unlike: Ints = axis.edges[1:-1][changed]
    return unlike


def _chunk_starts(cells: Cells, component: str, axis: Axis, *, holder: Ints, row: Ints) -> Ints:
    """Return the tokens of an axis at which chunks of a component begin, as it lies at its first layer."""
    found = [np.zeros(1, np.int64)]
    for place in np.unique(holder).tolist():
        runs = np.flatnonzero(holder == place)
        begin, stop = axis.edges[runs], axis.edges[runs + 1]
        if place < 0:  # not captured at this layer
            found.append(begin)
            continue
        size = component_layout(cells, place, component).tokens
        low = cells.captures[place].ragged.starts[row[runs]] + axis.start[runs]
        first = -(-low // size) * size - low + begin  # where the first chunk begins in each run, or behind it
        n = np.maximum(0, -(-(stop - first) // size))
        steps = np.arange(int(n.sum())) - np.repeat(np.cumsum(n) - n, n)
        apart = np.r_[True, (low[1:] != low[:-1] + (stop - begin)[:-1]) | (begin[1:] != stop[:-1])]
        found += [np.repeat(first, n) + steps * size, begin[apart]]
    starts: Ints = np.unique(np.concatenate(found))
    return starts[starts < axis.n_tokens]
