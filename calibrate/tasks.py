"""What a pass is cut into: some rollouts at one layer, which one process sums up or looks through by itself.

A task says all that it needs beside the job, and what it returns is small: the numbers of its rollouts, sums over them,
and the means of the few segments that lie in several chunks. Sums are cut the same way wherever they are made, so that
every process, and any number of them, gives the same bits.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from calibrate.formulas import mean_alignment, peak_dims
from calibrate.magnitudes import Window, median_bits
from calibrate.passes import Columns, Details, Key, Tick, details, sums
from calibrate.rows import Rows, Run
from calibrate.selected import Flags, Selected
from datastore.stats import Moments

__all__ = [
    "Job",
    "LookTask",
    "RowSums",
    "Runner",
    "SampleTask",
    "Settings",
    "SumTask",
    "Summing",
    "Task",
    "cut",
    "in_process",
]

R = TypeVar("R", covariant=True)
Floats = NDArray[np.float64]
TASK_BYTES = 1 << 28
"""Decoded bytes of a task: some fifty chunks. A rollout is never cut, so that its statistics stay in one process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to calibrate: dimensions to rank, the ratio that is massive, whether data may be read, and the allowance."""

    top_k: int
    threshold: float
    passes: bool
    memory: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Job:
    """What all tasks share; picklable."""

    selected: Selected
    settings: Settings


class Task(Protocol[R]):
    """Some rows of one source at one layer, and what is wanted of them."""

    @property
    def tokens(self) -> int:
        """Tokens that are read."""

    def do(self, job: Job, tick: Tick) -> R:
        """Do it; `tick` is told the tokens of each block."""


class Runner(Protocol):
    """Does tasks in whatever processes, and yields their results in the order of the tasks."""

    def __call__(self, job: Job, tasks: Sequence[Task[R]]) -> Iterator[R]:
        """Do the tasks."""


def in_process(tick: Tick) -> Runner:
    """Return the runner that does one task after the other with all threads of this process."""

    def run(job: Job, tasks: Sequence[Task[R]]) -> Iterator[R]:
        for task in tasks:
            yield task.do(job, tick)

    return run


def cut(source: Rows, layer: int, rows: Sequence[int], *, nbytes: int = 0, segments: int = 0) -> Iterator[list[int]]:
    """Yield runs of rows in the order that their tokens lie in.

    Parameters
    ----------
    nbytes : int
        A run ends when it holds as much; 0 for no limit.
    segments : int
        Segments that a run may have, or the one row that has more; 0 for no limit.
    """
    counts = source.table[["prompt", "response"]].to_numpy(np.int64)
    sizes = counts.sum(axis=1) * source.width * source.itemsize
    run: list[int] = []
    size = parts = 0
    for row in source.in_order(layer, rows):
        more = int((counts[row] > 0).sum())
        full = (nbytes and size >= nbytes) or (segments and parts + more > segments)
        if run and full:
            yield run
            run, size, parts = [], 0, 0
        run.append(row)
        size, parts = size + int(sizes[row]), parts + more
    if run:
        yield run


@dataclass(slots=True, kw_only=True, eq=False)
class RowSums:
    """What the moments of rows give for each of them, and their sum.

    Attributes
    ----------
    rows : list of int
        Of a source; the arrays are along them.
    total : Moments
        Of the tokens that are pooled.
    alignment : float64 array (row, segment)
        Mean cosine of a segment's tokens with their mean; NaN where there is none.
    dims, peak, mean_abs, ratio, massive : arrays (row, top_k)
        The dimensions with the largest peaks of each rollout; -1 and NaN where nothing is known of it by itself.
    means : mapping of (row, segment) to float64 array
        Of segments that were summed up from several blocks.
    norms : list of float32 arrays
        Of tokens that are pooled.
    """

    rows: list[int]
    total: Moments
    alignment: Floats
    dims: NDArray[np.int64]
    peak: Floats
    mean_abs: Floats
    ratio: Floats
    massive: Flags
    means: dict[Key, Floats] = field(default_factory=dict)
    norms: list[NDArray[np.float32]] = field(default_factory=list)

    @classmethod
    def empty(cls, rows: Sequence[int], width: int, top_k: int) -> Self:
        """Sums of no token."""
        n = len(rows)
        return cls(
            rows=list(rows),
            total=Moments.zero(width),
            alignment=np.full((n, 2), np.nan),
            dims=np.full((n, top_k), -1, np.int64),
            peak=np.full((n, top_k), np.nan),
            mean_abs=np.full((n, top_k), np.nan),
            ratio=np.full((n, top_k), np.nan),
            massive=np.zeros((n, top_k), np.bool_),
        )

    def merge(self, other: "RowSums") -> None:
        """Take over what another knows of some rows; this one is along all rows of the source."""
        for name in ("alignment", "dims", "peak", "mean_abs", "ratio", "massive"):
            getattr(self, name)[other.rows] = getattr(other, name)
        self.total = self.total + other.total
        self.means |= other.means
        self.norms += other.norms


class Summing:
    """Adds segments of some rows of one source, one after the other, to a `RowSums`."""

    def __init__(self, job: Job, source: int, rows: Sequence[int]) -> None:
        selected, settings = job.selected, job.settings
        here = selected.part(source)
        self.source, self.settings = selected.sources[source], settings
        self.counts, self.wanted = selected.counts[here], selected.wanted[here]
        self.pooled, self.aligned = selected.pooled[here], selected.aligned[here]
        self.into = RowSums.empty(rows, selected.width, settings.top_k)
        self._at = {row: i for i, row in enumerate(rows)}
        self._peaks: dict[int, list[Moments]] = {}

    def kept(self, rows: Sequence[int], moments: Moments) -> None:
        """Find all that the moments (row, segment, hidden) of some rows give, and pool them."""
        at = [self._at[row] for row in rows]
        self.into.alignment[at] = np.where(self.wanted[rows], _alignment(moments), np.nan)
        flags = self.aligned[rows]
        for which in np.unique(flags[flags.any(axis=1)], axis=0):
            here = (flags == which).all(axis=1)
            some: Any = slice(None) if here.all() else here  # a slice is no copy
            first, *others = (moments[some, segment] for segment in np.flatnonzero(which))
            self._rank([row for row, mine in zip(rows, here, strict=True) if mine], sum(others, start=first))
        self.into.total = self.into.total + moments.total(self.pooled[rows])

    def pool(self, row: int, segment: int, moments: Moments) -> None:
        """Count a segment in what is pooled, where it is."""
        if self.pooled[row, segment]:
            self.into.total = self.into.total + moments

    def one(self, row: int, segment: int, moments: Moments) -> None:
        """Find a segment's alignment, and its rollout's peaks once all that counts in them is there."""
        if self.wanted[row, segment]:
            self.into.alignment[self._at[row], segment] = _alignment(moments)
        if not self.aligned[row, segment]:
            return
        held = self._peaks.setdefault(row, [])
        held.append(moments)
        if len(held) == self.aligned[row].sum():
            del self._peaks[row]
            self._rank([row], sum(held[1:], start=held[0])[None])

    def _rank(self, rows: Sequence[int], moments: Moments) -> None:
        """Rank the dimensions of some rows by their peaks; moments (row, hidden)."""
        settings, at = self.settings, [self._at[row] for row in rows]
        ranked = peak_dims(*_magnitudes(moments), top_k=settings.top_k, threshold=settings.threshold)
        for name in ("dims", "peak", "mean_abs", "ratio", "massive"):
            getattr(self.into, name)[at] = getattr(ranked, name)


def _alignment(moments: Moments) -> Floats:
    """Mean cosine of the tokens with their mean, over the last axis; NaN of no token."""
    tokens = moments.count[..., 0] + moments.nonfinite[..., 0]  # the same for every dimension
    mean = _mean(moments) if moments.nonfinite.any() else moments.sum  # as long as its direction is the mean's
    with np.errstate(all="ignore"):
        return np.asarray(mean_alignment(moments.sum_unit, mean) / tokens)


def _mean(moments: Moments) -> Floats:
    """Mean of h, as `Moments.finalise` has it, without its other results."""
    with np.errstate(all="ignore"):
        return np.asarray(moments.sum / moments.count)


def _magnitudes(moments: Moments) -> tuple[Floats, Floats]:
    """max|h| and mean|h|, as `Moments.finalise` has them."""
    with np.errstate(all="ignore"):
        peaks = np.where(moments.count > 0, moments.max_abs.astype(np.float64), np.nan)
        return peaks, moments.sum_abs / moments.count


@dataclass(frozen=True, slots=True, kw_only=True)
class SumTask:
    """Sum up some rows from their data.

    Attributes
    ----------
    layer, source, rows
    tokens : int
    pooled, normed : frozenset of int
        Rows whose moments, and whose norms, are not in what was kept: they are pooled here.
    """

    layer: int
    source: int
    rows: tuple[int, ...]
    tokens: int
    pooled: frozenset[int]
    normed: frozenset[int]

    def do(self, job: Job, tick: Tick) -> RowSums:
        """Read the rows and sum them up."""
        summing = Summing(job, self.source, self.rows)
        into, memory = summing.into, job.settings.memory // 2
        for one in sums(summing.source, self.layer, self.rows, counts=summing.counts, memory=memory, tick=tick):
            if not summing.wanted[one.row, one.segment]:
                continue
            summing.one(one.row, one.segment, one.moments)
            if one.crossing:
                into.means[one.row, one.segment] = _mean(one.moments)
            if one.row in self.pooled:
                summing.pool(one.row, one.segment, one.moments)
            if one.row in self.normed and summing.pooled[one.row, one.segment]:
                into.norms.append(one.norms)
        return into


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleTask:
    """Find the median magnitude of each of a few runs of tokens.

    Attributes
    ----------
    layer, source
    runs : tuple of (row, first, last)
    tokens : int
        None: a sample is no part of the pass.
    """

    layer: int
    source: int
    runs: tuple[Run, ...]
    tokens: int = 0

    def do(self, job: Job, tick: Tick) -> list[int]:
        """Read the runs; return the codes of their medians."""
        values = job.selected.sources[self.source].peek(self.layer, self.runs)
        return [median_bits(one) for one in values if one.dtype == np.float32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LookTask:
    """Find in some rows what no moments tell.

    Attributes
    ----------
    layer, source, rows
    tokens : int
    dims : int64 array
        Dimensions to be tracked.
    means : mapping of (row, segment) to float64 array
        Those that were summed up; those that were kept at capture are read here.
    window : Window
        Where the median magnitude is looked for.
    """

    layer: int
    source: int
    rows: tuple[int, ...]
    tokens: int
    dims: NDArray[np.int64]
    means: Mapping[Key, Floats]
    window: Window

    def do(self, job: Job, tick: Tick) -> Details:
        """Read the rows and look."""
        selected, memory = job.selected, job.settings.memory
        here, source = selected.part(self.source), selected.sources[self.source]
        wanted = selected.wanted[here]
        found = Details.empty(Columns(self.dims, memory=memory // 8), window=self.window)
        means: dict[Key, Floats] = {
            (row, segment): mean[segment]
            for row, mean in source.means(self.layer, self.rows)
            for segment in np.flatnonzero(wanted[row]).tolist()
        }
        flags: dict[str, Any] = {"wanted": wanted, "pooled": selected.pooled[here]}
        means |= self.means
        details(source, self.layer, self.rows, **flags, means=means, into=found, memory=memory // 2, tick=tick)
        return found
