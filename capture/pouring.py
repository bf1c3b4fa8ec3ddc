"""The rows of an export, chunk by chunk: each is decoded once, and its rows go to their files from where they lie.

Rollouts lie end to end on a capture's token axis, so that most begin and end inside a chunk, and all layers of one are
wanted in one file. Chunks therefore come in the order of tokens, all layers of a run of tokens together, and a chunk
that several rollouts share serves all of them. No rollout is ever in memory as a whole.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from datastore import stream
from datastore.axis import Axis
from datastore.cells import Cells
from datastore.errors import CorruptError
from datastore.lazy import chunk_reads, component_layout, sources
from datastore.stream import Block
from experiments.rawfile import Array
from experiments.rawfill import Filling

__all__ = ["Wanted", "arrays_of", "pour"]

MEMORY: Final = 256 << 20
"""Bytes of chunks held at a time."""
MOST_OPEN: Final = 64
"""Rollouts whose files are open together; at the edges of such a group a chunk is decoded twice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A rollout and which of its cells are wanted: component to layers."""

    rollout_id: str
    cells: Mapping[str, tuple[int, ...]]


@dataclass(slots=True, kw_only=True, eq=False)
class _Open:
    """A file that is being filled, and how many pieces are still to come."""

    filling: Future[Filling]
    left: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """Tokens `low` to `high` of a capture's axis, the first of them token `start` of a rollout."""

    file: _Open
    start: int
    low: int
    high: int


@dataclass(slots=True, kw_only=True, eq=False)
class _Work:
    """All that is under way: files in order, and the pieces of each run of rows that is still to be decoded."""

    files: list[_Open] = field(default_factory=list)
    pieces: dict[tuple[int, str, int, int], list[_Piece]] = field(default_factory=dict)


def arrays_of(cells: Cells, wanted: Wanted) -> dict[tuple[str, int], Array]:
    """Return width and dtype of a rollout's cells as stored."""
    rollout = np.array([cells.index[wanted.rollout_id]])
    found = {}
    for component, layers in wanted.cells.items():
        for layer in layers:
            layout = component_layout(cells, int(cells.found(component, layer, rollout)[0][0]), component)
            found[component, layer] = Array(layout.width, str(layout.dtype))
    return found


def pour(
    cells: Cells, asked: Sequence[Wanted], *, laid_out: Callable[[Wanted], Filling], memory: int = MEMORY
) -> Generator[Filling, None, None]:
    """Fill a file for each rollout; yield each when all of its rows are in it, for the caller to finish.

    Parameters
    ----------
    cells : Cells
    asked : sequence of Wanted
        Each rollout once.
    laid_out : callable
        Makes a rollout's file; called in a thread of its own, one at a time.
    memory : int
        Bytes of chunks to hold at most.

    Raises
    ------
    CorruptError
        A chunk is missing or does not decode. Files that were not yielded are deleted.
    DatastoreError
        A capture was deleted or replaced since the store was opened.
    """
    work = _Work()
    places = {capture.number: place for place, capture in enumerate(cells.captures)}
    ahead = ThreadPoolExecutor(1, thread_name_prefix="export-lay-out")
    try:
        chunks = _chunks(cells, asked, work=work, begin=lambda one: ahead.submit(laid_out, one))
        with closing(stream.map_blocks(lambda block: _put(block, work), chunks, memory=memory)) as results:
            for span, files in results:
                cells.check([places[span.capture]])
                for one in files:
                    one.left -= 1
                    if not one.left:
                        work.files.remove(one)
                        yield one.filling.result()
    except CorruptError:
        cells.check(places.values())
        raise
    finally:
        ahead.shutdown(wait=True, cancel_futures=True)
        for one in work.files:
            if not one.filling.cancelled() and one.filling.exception() is None:
                one.filling.result().abandon()


def _put(block: Block, work: _Work) -> list[_Open]:
    """Write a block's rows to their files; return the file of each piece."""
    first = block.tokens.start
    pieces = work.pieces.pop((block.capture, block.component, block.layer, first))
    for one in pieces:
        rows = block.values[one.low - first : one.high - first]
        one.file.filling.result().put(block.component, block.layer, rows, start=one.start)
    return [one.file for one in pieces]


def _chunks(
    cells: Cells, asked: Sequence[Wanted], *, work: _Work, begin: Callable[[Wanted], Future[Filling]]
) -> Iterator[stream.Source]:
    """Yield the chunks that hold what is wanted, a group of rollouts after another; note what each is for."""

    def place(one: Wanted) -> tuple[int, int]:
        rollout = cells.index[one.rollout_id]
        return int(cells.newest[rollout]), int(cells.described_at[rollout])

    order = sorted(asked, key=place)
    for first in range(0, len(order), MOST_OPEN):
        group = order[first : first + MOST_OPEN]
        files = [_Open(filling=begin(one)) for one in group]
        work.files += files
        wanted = dict.fromkeys((name, layer) for one in group for name, layers in one.cells.items() for layer in layers)
        found = [
            chunk
            for component, layer in wanted
            for chunk in _of_cell(cells, group, files, work=work, component=component, layer=layer)
        ]
        yield from (source for _, source in sorted(found, key=lambda one: one[0]))


def _of_cell(
    cells: Cells, group: Sequence[Wanted], files: Sequence[_Open], *, work: _Work, component: str, layer: int
) -> Iterator[tuple[tuple[int, int, int, str], stream.Source]]:
    """Yield the chunks that hold one component and layer of a group, each after its place in the order of reading."""
    members = [i for i, one in enumerate(group) if layer in one.cells.get(component, ())]
    rollouts = np.array([cells.index[group[i].rollout_id] for i in members])
    axis = Axis(rollouts, np.zeros(len(rollouts), np.int64), cells.counts[rollouts])
    reads = chunk_reads(cells, component, layer, axis=axis)
    for pieces, source in zip(reads.values(), sources(cells, component, reads, whole=False), strict=True):
        runs = np.searchsorted(axis.edges, [at for _, _, at in pieces], side="right") - 1
        made = [
            (members[run], _Piece(file=files[members[run]], start=at - int(axis.edges[run]), low=low, high=high))
            for run, (low, high, at) in zip(runs.tolist(), pieces, strict=True)
        ]
        for rows in source.slices:
            low, high = source.start + rows.start, source.start + rows.stop
            mine = [one for _, one in made if low <= one.low < high]
            work.pieces[source.capture, component, layer, low] = mine
            for one in mine:
                one.file.left += 1
        yield min((member, one.start, layer, component) for member, one in made), source
