"""Doing tasks: chunks are decoded and scored in the same threads, and a task writes its own chunks of the result.

In one process all tasks share one stream of chunks; on a cluster each has its own. The blocks and the arithmetic are
the same, one BLAS thread each, so the scores are too, to the bit.
"""

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import chain, tee
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from xarray.core import indexing

from datastore.axis import Axis
from datastore.cells import Cells
from datastore.dtype import upcast
from datastore.lazy import NormArray, Reads, RolloutSource, chunk_reads, sources
from datastore.scores import Place, span, write_columns
from datastore.stream import Block, map_blocks
from project.scoring import one_blas_thread, score_block, scratch_for, token_norms
from project.tasks import Job, Task

__all__ = ["run_tasks"]

Float32 = NDArray[np.float32]
_local = threading.local()


class _Found(NamedTuple):
    """What comes of one block; None where it is not wanted."""

    scores: Float32 | None
    norms: Float32 | None
    dims: Float32 | None


class _Step(NamedTuple):
    """One chunk of one task, and where its pieces go: (first, last) on the capture's axis and place in the task."""

    task: Task
    place: Place
    source: RolloutSource
    pieces: Sequence[tuple[int, int, int]]


def run_tasks(
    job: Job,
    tasks: Sequence[Task],
    *,
    memory: int,
    threads: int | None = None,
    done: Callable[[Task], None] | None = None,
) -> int:
    """Do tasks in order and write their chunks of the result; return the bytes of the chunks that were decoded.

    Parameters
    ----------
    job : Job
    tasks : sequence of Task
    memory : int
        Bytes of chunks to hold at most.
    threads : int, optional
        One a core by default.
    done : callable, optional
        Called with every task when its chunks are written.

    Raises
    ------
    CorruptError
        If a chunk of the store is missing or does not decode.
    """
    kernel = _Kernel(job)
    decoded = 0
    with one_blas_thread():
        # one walk over the steps: it feeds the stream, a few chunks ahead, and says where the results go
        ahead, due = tee((task, list(kernel.steps(task))) for task in tasks)
        fed = (step.source for _, steps in ahead for step in steps)
        results = map_blocks(kernel.score, fed, memory=memory, threads=threads)
        try:
            for task, steps in due:
                out = kernel.buffers(task)
                for step in steps:
                    at, found = next(results)
                    kernel.place(step, found, out, first=at.tokens.start)
                    decoded += step.source.nbytes
                kernel.write(task, out)
                if done is not None:
                    done(task)
        finally:
            results.close()
    return decoded


class _Kernel:
    """A job, resolved: which columns each place fills and from what."""

    def __init__(self, job: Job) -> None:
        self.job, self.group = job, job.group
        self.columns = {
            kind: {
                place: [j for j, c in enumerate(self.group.of(kind)) if c.place == place] for place in job.group.places
            }
            for kind in ("score", "norm", "dim")
        }
        self.spans = {kind: {at: span(mine) for at, mine in found.items()} for kind, found in self.columns.items()}
        dims = self.group.of("dim")
        self.dims = {place: [int(dims[j].key) for j in self.columns["dim"][place]] for place in job.group.places}
        self.without_norms = {c.number for c in job.cells.captures if c.attrs.get("statistics", "none") == "none"}

    def steps(self, task: Task) -> Iterator[_Step]:
        """Yield the chunks of a task, place by place."""
        axis = self.job.axis.take(slice(task.start, task.stop))
        return chain.from_iterable(self._steps_at(task, place, axis) for place in self.group.places)

    def _steps_at(self, task: Task, place: Place, axis: Axis) -> Iterator[_Step]:
        whole: Reads = chunk_reads(self.job.cells, place.component, place.layer, axis=axis)
        if not (self.columns["score"][place] or self.columns["dim"][place]):
            captures = self.job.cells.captures
            whole = {key: pieces for key, pieces in whole.items() if captures[key[0]].number in self.without_norms}
        made = sources(self.job.cells, place.component, whole, whole=True)
        for source, pieces in zip(made, whole.values(), strict=True):
            yield _Step(task, place, source, pieces)

    def score(self, block: Block) -> _Found:
        """Compute everything that is wanted of a block; runs in the decoding threads."""
        place = Place(block.component, block.layer)
        matrix = self.job.matrices.get(place)
        scores = norms = dims = None
        if matrix is not None:
            scores = np.empty((len(block.values), matrix.shape[1]), np.float32)
            score_block(block.values, matrix, scores, scratch=_scratch(matrix.shape[0]))
        if self.columns["norm"][place] and block.capture in self.without_norms:
            norms = token_norms(block.values)
        if self.dims[place]:
            dims = np.asarray(upcast(block.values[:, self.dims[place]]), np.float32)
        return _Found(scores, norms, dims)

    def buffers(self, task: Task) -> dict[str, Float32]:
        """Return the task's part of every array, norms that were kept at capture filled in."""
        tokens = task.stop - task.start
        out = {kind: np.full((tokens, len(self.group.of(kind))), np.nan, np.float32) for kind in self.columns}
        axis = self.job.axis.take(slice(task.start, task.stop))
        for place, columns in self.columns["norm"].items():
            if columns:
                out["norm"][:, columns[0]] = _kept_norms(self.job.cells, place, axis=axis, without=self.without_norms)
        return out

    def place(self, step: _Step, found: _Found, out: dict[str, Float32], *, first: int) -> None:
        """Copy what came of a block, whose first token is `first` on the capture's axis, to where it belongs."""
        for kind, values in (("score", found.scores), ("norm", found.norms), ("dim", found.dims)):
            if values is None:
                continue
            columns = self.spans[kind][step.place]
            wide = values.reshape(len(values), -1)
            for low, high, at in step.pieces:
                out[kind][at : at + high - low, columns] = wide[low - first : high - first]

    def write(self, task: Task, out: dict[str, Float32]) -> None:
        """Write the task's whole chunks of every array that has columns."""
        for kind, values in out.items():
            if values.shape[1]:
                write_columns(Path(self.job.path), kind, values, start=task.start)


def _kept_norms(cells: Cells, place: Place, *, axis: Axis, without: Collection[int]) -> Float32:
    """Return the tokens' norms as kept at capture, NaN where a capture kept none."""
    holder, _ = cells.found(place.component, place.layer, axis.rollout)
    kept = np.array([cells.captures[one].number not in without for one in holder.tolist()], dtype=bool)
    out = np.full(axis.n_tokens, np.nan, np.float32)
    if kept.any():
        part = Axis(axis.rollout[kept], axis.start[kept], axis.stop[kept])
        array = NormArray(cells, place.component, layers=[place.layer], axis=part)
        values = array[indexing.BasicIndexer((slice(None), slice(None)))]
        out[np.repeat(kept, axis.lengths)] = values[:, 0]
    return out


def _scratch(width: int) -> Float32:
    kept: dict[int, Any] = _local.__dict__.setdefault("scratch", {})
    if width not in kept:
        kept[width] = scratch_for(width)
    found: Float32 = kept[width]
    return found
