"""Every layer's statistics: from what was kept at capture, and by tasks for rows of which nothing fitting was kept."""

import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from calibrate.formulas import largest, norm_quantiles
from calibrate.magnitudes import ALL, Window, window_around
from calibrate.passes import Columns, Details
from calibrate.rows import Kept, Memory, Run
from calibrate.selected import Flags, Selected
from calibrate.tasks import TASK_BYTES, Job, LookTask, RowSums, Runner, SampleTask, Summing, SumTask, cut
from datastore.errors import MisuseError
from datastore.stats import Moments

__all__ = ["QUANTILES", "LayerSums", "look_layers", "sum_layers"]

Floats = NDArray[np.float64]
SAMPLES, SAMPLE_TOKENS = 6, 32
SAMPLED_FROM = 1 << 13
"""Tokens from which on a sample, which reads as many chunks, is worth its time."""
_THREADS, _EACH = 4, 32 << 20
"""That read what was kept of layers, and what each holds at most: a chunk of every statistic, and what comes of it."""
QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)


@dataclass(slots=True, kw_only=True, eq=False)
class LayerSums:
    """What one layer's moments and norms give.

    Attributes
    ----------
    sources : list of RowSums
        By source; each is along all rows of it.
    read : set of str
        Which of `total`, `rows`, `norms` needed the data.
    norm, norm_quantiles : mean and quantiles of the token norms that are pooled
    nonfinite_tokens : int
        Tokens that are pooled and have a norm that is not finite.
    """

    sources: list[RowSums]
    read: set[str] = field(default_factory=set)
    norm: float = np.nan
    norm_quantiles: Floats = field(default_factory=lambda: np.full(len(QUANTILES), np.nan))
    nonfinite_tokens: int = 0

    @classmethod
    def empty(cls, job: Job) -> "LayerSums":
        """Sums of no token."""
        selected = job.selected
        every = [RowSums.empty(range(len(s.table)), selected.width, job.settings.top_k) for s in selected.sources]
        return cls(sources=every)

    @property
    def total(self) -> Moments:
        """Moments of all tokens that are pooled."""
        first, *others = (one.total for one in self.sources)
        return sum(others, start=first)

    def rows(self, name: str) -> NDArray[np.generic]:
        """Return an array of `RowSums` along the rows of all sources."""
        return np.concatenate([getattr(one, name) for one in self.sources])

    def finish(self) -> None:
        """Find what the norms give, and let them go."""
        norms = [part for one in self.sources for part in one.norms]
        lengths = np.concatenate(norms) if norms else np.zeros(0, np.float32)
        finite = lengths[np.isfinite(lengths)].astype(np.float64)
        self.nonfinite_tokens = len(lengths) - len(finite)
        self.norm = float(finite.mean()) if len(finite) else np.nan
        self.norm_quantiles = norm_quantiles(lengths, QUANTILES)
        for one in self.sources:
            one.norms.clear()


def sum_layers(job: Job, run: Runner) -> list[LayerSums]:
    """Sum up every layer.

    Raises
    ------
    MisuseError
        It takes a pass and none may be made.
    """
    selected = job.selected
    largest(np.zeros(selected.width), job.settings.top_k)  # a top_k that is none is said before any work
    found = {layer: LayerSums.empty(job) for layer in selected.layers}
    own = threading.local()

    def keep(layer: int) -> list[SumTask]:
        memory: Memory = own.__dict__.setdefault("memory", {})
        sources = range(len(selected.sources))
        return [task for source in sources for task in _keep(job, layer, source, memory=memory, into=found[layer])]

    threads = min(_THREADS, len(os.sched_getaffinity(0)), max(1, job.settings.memory // _EACH))
    with ThreadPoolExecutor(threads) as pool:
        tasks = [task for of_layer in pool.map(keep, found) for task in of_layer]
    for task, part in zip(tasks, run(job, tasks), strict=True):
        found[task.layer].sources[task.source].merge(part)
    for one in found.values():
        one.finish()
    return list(found.values())


def _keep(job: Job, layer: int, source: int, *, memory: Memory, into: LayerSums) -> list[SumTask]:
    """Add what was kept of one source, and return what has to be summed up from its data."""
    selected = job.selected
    rows = selected.rows(source)
    summing = Summing(job, source, rows)
    origin = summing.source
    kept = origin.kept(layer, rows, memory=memory)
    summed = _uses_sums(summing, kept)
    for some, moments in kept.by_row:
        summing.kept(some, moments)
    if summed:
        for segment, moments in kept.together:
            if _pools(summing, kept.summed, segment).any():
                summing.into.total = summing.into.total + moments
    known = [row for row in rows if row not in set(kept.unknown)]
    if known:
        spread = np.repeat(summing.pooled[known].reshape(-1), summing.counts[known].reshape(-1))
        summing.into.norms.append(origin.norms(layer, known)[spread])
    into.sources[source].merge(summing.into)
    return _to_read(job, layer, source, kept=kept, summed=summed, into=into)


def _to_read(job: Job, layer: int, source: int, *, kept: Kept, summed: bool, into: LayerSums) -> list[SumTask]:
    """Return tasks for the rows that are not kept each by itself."""
    unknown, todo = frozenset(kept.unknown), sorted({*kept.unknown, *kept.summed})
    needed = kept.unknown or (kept.summed and not summed)
    if needed and not job.settings.passes:
        raise MisuseError(
            f"the statistics kept at capture do not tell {len(todo)} of these rollouts apart at layer {layer}, so "
            "a pass over their data is needed; leave --no-pass (passes=False) out, or select whole captures"
        )
    if not todo or not job.settings.passes:
        return []
    into.read |= {"rows"} | ({"total"} if needed else set()) | ({"norms"} if unknown else set())
    origin, counts = job.selected.sources[source], job.selected.counts[job.selected.part(source)].sum(axis=1)
    return [
        SumTask(
            layer=layer,
            source=source,
            rows=tuple(rows),
            tokens=int(counts[rows].sum()),
            pooled=unknown.intersection(rows) if summed else frozenset(rows),
            normed=unknown.intersection(rows),
        )
        for rows in cut(origin, layer, todo, nbytes=TASK_BYTES)
    ]


def _uses_sums(summing: Summing, kept: Kept) -> bool:
    """Whether sums of whole captures answer: each segment counts in all of their rollouts or in none."""
    return all(len({bool(v) for v in _pools(summing, kept.summed, segment)}) < 2 for segment in (0, 1))


def _pools(summing: Summing, rows: Sequence[int], segment: int) -> Flags:
    part = np.asarray(rows, np.int64)
    flags: Flags = summing.pooled[part, segment][summing.counts[part, segment] > 0]
    return flags


def look_layers(
    job: Job, run: Runner, *, dims: NDArray[np.int64], sums: Sequence[LayerSums], nbytes: int
) -> list[Details]:
    """Make the pass that finds what no moments tell.

    Parameters
    ----------
    job : Job
    run : callable
    dims : int64 array
        Dimensions to be tracked.
    sums : sequence of LayerSums
        By layer; the means that they hold are let go.
    nbytes : int
        Of a task; 0 for as few tasks as the allowance permits. How it is cut does not show in the results.

    Returns
    -------
    list of Details
        By layer, with keys (row, segment) that count the rows of all sources end to end.
    """
    selected, memory = job.selected, job.settings.memory // 8
    cuts = {"nbytes": nbytes, "segments": max(1, memory // (8 * selected.width))}
    tasks = [
        task
        for layer, one in zip(selected.layers, sums, strict=True)
        for source in range(len(selected.sources))
        for task in _look_tasks(selected, layer, source, dims=dims, sums=one.sources[source], cuts=cuts)
    ]
    found: dict[int, Details] = {}
    windows = _windows(job, run)
    while windows:
        empty = {layer: Details.empty(Columns(dims, memory=memory), window=one) for layer, one in windows.items()}
        found |= empty
        due = [replace(task, window=windows[task.layer]) for task in tasks if task.layer in windows]
        for task, part in zip(due, run(job, due), strict=True):
            found[task.layer].merge(part, first=selected.part(task.source).start)
        totals = {layer: int(one.total.count.sum()) for layer, one in zip(selected.layers, sums, strict=True)}
        windows = {layer: ALL for layer in windows if found[layer].magnitudes.median(totals[layer]) is None}
    return [found[layer] for layer in selected.layers]


def _windows(job: Job, run: Runner) -> dict[int, Window]:
    """Return for each layer where its median magnitude is looked for; a sample of a small selection gains nothing."""
    selected, medians = job.selected, {layer: list[int]() for layer in job.selected.layers}
    if selected.tokens >= SAMPLED_FROM:
        runs = _spread_out(selected)
        tasks = [
            SampleTask(layer=layer, source=source, runs=mine)
            for layer in selected.layers
            for source, mine in enumerate(runs)
            if mine
        ]
        for task, found in zip(tasks, run(job, tasks), strict=True):
            medians[task.layer] += found
    return {layer: window_around(found) for layer, found in medians.items()}


def _spread_out(selected: Selected) -> list[tuple[Run, ...]]:
    """Return short runs spread evenly over all tokens that are pooled, by source."""
    rollouts, segments = np.nonzero(selected.pooled)
    lengths = selected.counts[rollouts, segments]
    edges = np.cumsum(lengths)
    runs: list[list[Run]] = [[] for _ in selected.sources]
    for token in ((np.arange(SAMPLES) + 0.5) / SAMPLES * edges[-1]).astype(np.int64).tolist():
        at = int(np.searchsorted(edges, token, side="right"))
        source = next(i for i in reversed(range(len(runs))) if selected.part(i).start <= rollouts[at])
        before = int(selected.counts[rollouts[at], : segments[at]].sum())
        first = min(token - int(edges[at] - lengths[at]), max(0, int(lengths[at]) - SAMPLE_TOKENS)) + before
        last = min(first + SAMPLE_TOKENS, before + int(lengths[at]))
        runs[source].append((int(rollouts[at]) - selected.part(source).start, first, last))
    return [tuple(mine) for mine in runs]


def _look_tasks(
    selected: Selected, layer: int, source: int, *, dims: NDArray[np.int64], sums: RowSums, cuts: Mapping[str, int]
) -> list[LookTask]:
    """Return tasks for all rows; the means of one, which its process holds, are within the allowance."""
    origin, counts = selected.sources[source], selected.counts[selected.part(source)].sum(axis=1)
    tasks = [
        LookTask(
            layer=layer,
            source=source,
            rows=tuple(rows),
            tokens=int(counts[rows].sum()),
            dims=dims,
            means={key: mean for key, mean in sums.means.items() if key[0] in set(rows)},
            window=ALL,
        )
        for rows in cut(origin, layer, selected.rows(source), **cuts)
    ]
    sums.means.clear()
    return tasks
