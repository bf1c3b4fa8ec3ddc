"""Mean activations over chosen tokens of rollouts, one vector each: one pass over the chunks that hold those tokens."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from datastore.axis import Axis
from datastore.dtype import upcast
from datastore.errors import MisuseError
from datastore.lazy import chunk_reads, component_layout, sources
from datastore.query import Store
from datastore.stream import Block, map_blocks

__all__ = ["pooled_means"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def pooled_means(
    store: Store, component: str, layer: int, *, tokens: Mapping[str, Ints], memory: int = 10**9
) -> Floats:
    """Return the mean activation of each rollout over some of its tokens, summed in float64.

    Parameters
    ----------
    store : Store
    component : str
    layer : int
    tokens : mapping of rollout id to ascending positions
        At least one each.
    memory : int
        Bytes of chunks to hold at most.

    Returns
    -------
    float64 array (rollout, hidden)
        In the order of `tokens`.

    Raises
    ------
    MisuseError
        A rollout has no tokens.
    AbsentError
        The layer is not captured for a rollout.
    """
    empty = [name for name, positions in tokens.items() if not len(positions)]
    if empty:
        raise MisuseError(f"rollout {empty[0]!r} has no tokens to average; leave it out or choose another position")
    axis, owner = _axis(store, tokens)
    cells = store.cells
    reads = chunk_reads(cells, component, layer, axis=axis)
    places = {capture.number: place for place, capture in enumerate(cells.captures)}
    chunks = sources(cells, component, reads, whole=True)

    def sums(block: Block) -> list[tuple[int, Floats]]:
        place = places[block.capture]
        found = []
        chunk = block.tokens.start // component_layout(cells, place, component).tokens
        for low, high, at in reads[place, block.layer, chunk]:
            rows = upcast(block.values[low - block.tokens.start : high - block.tokens.start])
            run = int(np.searchsorted(axis.edges, at, side="right")) - 1
            found.append((int(owner[run]), rows.sum(axis=0, dtype=np.float64)))
        return found

    total = np.zeros((len(tokens), cells.components[component].width))
    for _, found in map_blocks(sums, chunks, memory=memory):
        for row, part in found:
            total[row] += part
    counts = np.array([len(positions) for positions in tokens.values()], np.float64)
    return np.asarray(total / counts[:, np.newaxis])


def _axis(store: Store, tokens: Mapping[str, Sequence[int] | Ints]) -> tuple[Axis, Ints]:
    """Return the chosen tokens as runs, and which row of the result each run belongs to."""
    rollout, start, stop, owner = [], [], [], []
    for row, (name, positions) in enumerate(tokens.items()):
        at = np.asarray(positions, np.int64)
        cuts = np.flatnonzero(np.diff(at) != 1) + 1
        for run in np.split(at, cuts):
            rollout.append(store.cells.index[name])
            start.append(int(run[0]))
            stop.append(int(run[-1]) + 1)
            owner.append(row)
    return Axis(*(np.asarray(values, np.int64) for values in (rollout, start, stop))), np.asarray(owner, np.int64)
