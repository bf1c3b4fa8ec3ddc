"""One layer's statistics: from what was kept at capture, and by a pass for rows of which nothing fitting was kept."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from calibrate.formulas import largest, mean_alignment, norm_quantiles, peak_dims
from calibrate.passes import Columns, Details, Key, Tick, details, sums
from calibrate.rows import Kept, Rows
from calibrate.selected import Flags, Selected
from datastore.errors import MisuseError
from datastore.stats import Moments

__all__ = ["QUANTILES", "LayerSums", "Settings", "look", "sum_layer"]

Floats = NDArray[np.float64]
QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to calibrate: dimensions to rank, the ratio that is massive, whether data may be read, and the allowance."""

    top_k: int
    threshold: float
    passes: bool
    memory: int
    tick: Tick


@dataclass(slots=True, kw_only=True, eq=False)
class LayerSums:
    """What one layer's moments and norms give.

    Attributes
    ----------
    total : Moments
        Of the tokens that are pooled.
    alignment : float64 array (row, segment)
        Mean cosine of a segment's tokens with their mean; NaN where there is none.
    dims, peak, mean_abs, ratio, massive : arrays (row, top_k)
        The dimensions with the largest peaks of each rollout; -1 and NaN where nothing is known of it by itself.
    norm, norm_quantiles : mean and quantiles of the token norms that are pooled
    nonfinite_tokens : int
        Tokens that are pooled and have a norm that is not finite.
    read : set of str
        Which of `total`, `rows`, `norms` needed the data.
    means : mapping of (row, segment) to float64 array
        Of segments that were summed up from several blocks.
    """

    total: Moments
    alignment: Floats
    dims: NDArray[np.int64]
    peak: Floats
    mean_abs: Floats
    ratio: Floats
    massive: Flags
    norm: float = np.nan
    norm_quantiles: Floats = field(default_factory=lambda: np.full(len(QUANTILES), np.nan))
    nonfinite_tokens: int = 0
    read: set[str] = field(default_factory=set)
    means: dict[Key, Floats] = field(default_factory=dict)

    @classmethod
    def empty(cls, selected: Selected, top_k: int) -> "LayerSums":
        """Sums of no token."""
        n = len(selected.counts)
        return cls(
            total=Moments.zero(selected.width),
            alignment=np.full((n, 2), np.nan),
            dims=np.full((n, top_k), -1, np.int64),
            peak=np.full((n, top_k), np.nan),
            mean_abs=np.full((n, top_k), np.nan),
            ratio=np.full((n, top_k), np.nan),
            massive=np.zeros((n, top_k), np.bool_),
        )


def sum_layer(selected: Selected, layer: int, *, settings: Settings) -> LayerSums:
    """Sum up one layer.

    Raises
    ------
    MisuseError
        It takes a pass and none may be made.
    """
    largest(np.zeros(selected.width), settings.top_k)  # a top_k that is none is said before any work
    into = LayerSums.empty(selected, settings.top_k)
    norms: list[NDArray[np.float32]] = []
    for first, source in selected.offsets():
        share = _Share(selected, source, first=first, into=into, settings=settings)
        norms += share.add(layer)
    lengths = np.concatenate(norms) if norms else np.zeros(0, np.float32)
    finite = lengths[np.isfinite(lengths)].astype(np.float64)
    into.nonfinite_tokens = len(lengths) - len(finite)
    into.norm = float(finite.mean()) if len(finite) else np.nan
    into.norm_quantiles = norm_quantiles(finite, QUANTILES)
    return into


class _Share:
    """One source's share of a layer."""

    def __init__(self, selected: Selected, source: Rows, *, first: int, into: LayerSums, settings: Settings) -> None:
        here = slice(first, first + len(source.table))
        self.source, self.first, self.into, self.settings = source, first, into, settings
        self.counts, self.wanted = selected.counts[here], selected.wanted[here]
        self.pooled, self.aligned = selected.pooled[here], selected.aligned[here]
        self._peaks: dict[int, list[Moments]] = {}

    def add(self, layer: int) -> list[NDArray[np.float32]]:
        """Add the source's rows, and return the norms of those that are pooled."""
        rows = [int(row) for row in np.flatnonzero(self.wanted.any(axis=1))]
        if not rows:
            return []
        kept = self.source.kept(layer, rows)
        summed = self._uses_sums(kept)
        for row, segment, moments in kept.by_row:
            self._one(row, segment, moments)
            self._pool(row, segment, moments)
        if summed:
            for segment, moments in kept.together:
                if self._pooled_together(kept.summed, segment):
                    self.into.total = self.into.total + moments
        norms = self._kept_norms(layer, [row for row in rows if row not in set(kept.unknown)])
        return [*norms, *self._read(layer, kept, summed=summed)]

    def _read(self, layer: int, kept: Kept, *, summed: bool) -> Iterator[NDArray[np.float32]]:
        """Sum up from their data the rows that are not kept each by itself; yield the norms that are not kept."""
        unknown = set(kept.unknown)
        todo = sorted({*kept.unknown, *kept.summed})
        needed = kept.unknown or (kept.summed and not summed)
        if needed and not self.settings.passes:
            raise MisuseError(
                f"the statistics kept at capture do not tell {len(todo)} of these rollouts apart at layer {layer}, so "
                "a pass over their data is needed; leave --no-pass (passes=False) out, or select whole captures"
            )
        if not todo or not self.settings.passes:
            return
        self.into.read |= {"rows"} | ({"total"} if needed else set()) | ({"norms"} if unknown else set())
        settings = self.settings
        found = sums(self.source, layer, todo, counts=self.counts, memory=settings.memory // 2, tick=settings.tick)
        for one in found:
            if not self.wanted[one.row, one.segment]:
                continue
            self._one(one.row, one.segment, one.moments)
            if one.crossing:
                key = (self.first + one.row, one.segment)
                self.into.means[key] = one.moments.finalise()["mean"]
            if one.row in unknown or not summed:
                self._pool(one.row, one.segment, one.moments)
            if one.row in unknown and self.pooled[one.row, one.segment]:
                yield one.norms

    def _pool(self, row: int, segment: int, moments: Moments) -> None:
        if self.pooled[row, segment]:
            self.into.total = self.into.total + moments

    def _one(self, row: int, segment: int, moments: Moments) -> None:
        """Find a segment's alignment, and its rollout's peaks once all that counts in them is there."""
        at = self.first + row
        if self.wanted[row, segment]:
            found = moments.finalise()
            self.into.alignment[at, segment] = mean_alignment(found["mean_unit"], found["mean"])
        if not self.aligned[row, segment]:
            return
        held = self._peaks.setdefault(row, [])
        held.append(moments)
        if len(held) == self.aligned[row].sum():
            del self._peaks[row]
            total, settings = sum(held[1:], start=held[0]).finalise(), self.settings
            peaks, means = total["max_abs"], total["mean_abs"]
            ranked = peak_dims(peaks, means, top_k=settings.top_k, threshold=settings.threshold)
            for name in ("dims", "peak", "mean_abs", "ratio", "massive"):
                getattr(self.into, name)[at] = getattr(ranked, name)

    def _uses_sums(self, kept: Kept) -> bool:
        """Whether sums of whole captures answer: each segment counts in all of their rollouts or in none."""
        return all(len({bool(v) for v in self._pools(kept.summed, segment)}) < 2 for segment in (0, 1))

    def _pooled_together(self, rows: Sequence[int], segment: int) -> bool:
        return bool(self._pools(rows, segment).any())

    def _pools(self, rows: Sequence[int], segment: int) -> Flags:
        part = np.asarray(rows, np.int64)
        flags: Flags = self.pooled[part, segment][self.counts[part, segment] > 0]
        return flags

    def _kept_norms(self, layer: int, rows: list[int]) -> list[NDArray[np.float32]]:
        if not rows:
            return []
        spread = np.repeat(self.pooled[rows].reshape(-1), self.counts[rows].reshape(-1))
        return [self.source.norms(layer, rows)[spread]]


def look(
    selected: Selected, layer: int, *, dims: NDArray[np.int64], means: dict[Key, Floats], settings: Settings
) -> Details:
    """Make the pass over one layer that finds what no moments tell.

    Parameters
    ----------
    selected, layer, settings
        As for `sum_layer`.
    dims : int64 array
        Dimensions to be tracked.
    means : mapping of (row, segment) to float64 array
        Of `LayerSums`; those that were kept at capture are read again.
    """
    allowance = settings.memory // 8
    columns = Columns(dims, memory=allowance)
    found = Details(spreads={}, magnitude_counts=np.zeros(1 << 15, np.int64), columns=columns)
    for first, source in selected.offsets():
        here = slice(first, first + len(source.table))
        wanted, pooled = selected.wanted[here], selected.pooled[here]
        own = {(row - first, segment): mean for (row, segment), mean in means.items() if here.start <= row < here.stop}
        for rows in _groups(wanted, most=max(1, allowance // (8 * selected.width))):
            part = Details(spreads={}, magnitude_counts=found.magnitude_counts, columns=found.columns)
            kept = source.kept(layer, rows)
            known = own | {
                (row, segment): moments.finalise()["mean"]
                for row, segment, moments in kept.by_row
                if wanted[row, segment]
            }
            details(
                source,
                layer,
                rows,
                wanted=wanted,
                pooled=pooled,
                means=known,
                into=part,
                memory=settings.memory // 2,
                tick=settings.tick,
            )
            found.spreads.update({(first + row, segment): spread for (row, segment), spread in part.spreads.items()})
    return found


def _groups(wanted: Flags, *, most: int) -> Iterator[list[int]]:
    """Yield runs of rows whose means, one a segment, are at most so many together."""
    group: list[int] = []
    held = 0
    for row in np.flatnonzero(wanted.any(axis=1)).tolist():
        size = int(wanted[row].sum())
        if group and held + size > most:
            yield group
            group, held = [], 0
        group, held = [*group, row], held + size
    if group:
        yield group
