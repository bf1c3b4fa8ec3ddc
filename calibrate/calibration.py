"""Calibrate a selection: massive dimensions, alignment, norms and spreads of every layer, as one labelled Dataset."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from calibrate import formulas
from calibrate.layer import QUANTILES, LayerSums, look_layers, sum_layers
from calibrate.passes import PERCENTILES, Details, Tick
from calibrate.rows import StoreRows
from calibrate.selected import Chosen, Selected, Selection, resolve
from calibrate.tasks import TASK_BYTES, Job, Runner, Settings, in_process
from datastore.errors import AbsentError
from datastore.schema import SEGMENTS

__all__ = ["Calibration", "fit"]

Floats = NDArray[np.float64]
DEFAULT_MEMORY = 1_000_000_000
STATISTICS, PASS = "statistics", "pass"
_LAYER, _HIDDEN, _RANKED = ("layer",), ("layer", "hidden"), ("layer", "rank")
_ROLLOUT, _ALIGNED, _TRACKED = ("row", "layer", "rank"), ("row", "segment", "layer"), ("layer", "tracked_dim")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Calibration:
    """The result of `fit`.

    Attributes
    ----------
    data : Dataset
        Named results with the coordinates `layer` (real layer numbers), `segment`, `rollout_id` along `row`. The
        attribute `source` of each says whether it follows from the statistics kept at capture or took a pass over the
        data, `long_name` what it is; the attributes of the Dataset say of what it is: component, stores and captures,
        selection.
    """

    data: xr.Dataset

    @property
    def layers(self) -> tuple[int, ...]:
        """Real layer numbers, ascending."""
        return tuple(int(n) for n in self.data["layer"].values)

    @property
    def component(self) -> str:
        """The component that was calibrated."""
        return str(self.data.attrs["component"])

    @property
    def sources(self) -> dict[str, str]:
        """By name of the result, `statistics` or `pass`."""
        return {str(name): str(one.attrs["source"]) for name, one in self.data.data_vars.items()}

    def __repr__(self) -> str:
        took = sum(source == PASS for source in self.sources.values())
        return (
            f"Calibration({self.component}, layers {', '.join(map(str, self.layers))}, {self.data.sizes['row']} "
            f"rollouts, {self.data.attrs['n_tokens']} tokens; {len(self.sources) - took} results from the statistics "
            f"kept at capture, {took} from a pass)"
        )


def fit(
    selection: Selection | Iterable[Selection | Chosen],
    *,
    component: str = "residual",
    layers: int | Sequence[int] | None = None,
    rollouts: Any = None,
    segment: str | Sequence[str] | None = None,
    top_k: int = 5,
    threshold: float = formulas.MASSIVE_RATIO,
    passes: bool = True,
    memory: int = DEFAULT_MEMORY,
    tick: Tick | None = None,
    runner: Runner | None = None,
) -> Calibration:
    """Calibrate a selection.

    What follows from the statistics kept at capture is taken from them. The rest (extremes of the alignment, the median
    magnitude, percentiles) takes one streaming pass; rows of which nothing was kept, or only a sum with others, take
    one more before it.

    Parameters
    ----------
    selection : Store, path, DataArray, or several of them
        A store, what `Store.select` returned, or stores of one model that are pooled. A store in a list may be a pair
        with the ids that are wanted of it.
    component : str
        For stores; an array is of one.
    layers : int or ints, optional
        Real layer numbers; default those that all the rollouts have.
    rollouts : ids or a rollout table, optional
        Default all.
    segment : "prompt", "response" or both, optional
        The tokens that count. Default: what is pooled are the responses, and the prompt of a rollout that has no
        response; what is found for each rollout is of its prompt, and of the response where it has no prompt.
    top_k : int
        Dimensions to rank for each layer.
    threshold : float
        Peak over the median dimension's peak above which a dimension is massive.
    passes : bool
        Whether data may be read; else only what follows from the statistics is found.
    memory : int
        Bytes to stay under.
    tick : callable, optional
        Told the number of tokens × layers of each block that is done.
    runner : callable, optional
        Makes the passes elsewhere, see `calibrate.distributed`; the results are the same to the bit.

    Returns
    -------
    Calibration

    Raises
    ------
    AbsentError
        Something asked for is not captured; the message lists what is.
    ConflictError
        The stores are of different widths or models.
    MisuseError
        The selection has no tokens, or a pass is needed and none may be made.
    CorruptError
        A chunk is missing or does not decode.
    """
    selected = resolve(selection, component=component, layers=layers, rollouts=rollouts, segment=segment)
    settings = Settings(top_k=top_k, threshold=threshold, passes=passes, memory=memory)
    job, run = Job(selected=selected, settings=settings), runner or in_process(tick or (lambda tokens: None))
    found = sum_layers(job, run)
    table = _Table(selected, found, threshold=threshold)
    table.add_moments(top_k)
    table.add_rollouts()
    table.add_norms()
    if passes:
        nbytes = TASK_BYTES if runner else 0
        table.add_details(look_layers(job, run, dims=table.tracked, sums=found, nbytes=nbytes))
    request = {"layers": layers, "rollouts": rollouts, "segment": segment, "top_k": top_k, "threshold": threshold}
    return Calibration(data=table.dataset(_asked(request)))


def _asked(request: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked for, as JSON; the rollouts that it came to stand in the result."""
    plain = {name: None if value is None else np.asarray(value).tolist() for name, value in request.items()}
    return plain | {"rollouts": "all" if request["rollouts"] is None else "named"}


class _Table:
    """The Dataset while it is filled."""

    def __init__(self, selected: Selected, found: Sequence[LayerSums], *, threshold: float) -> None:
        self.selected, self.found, self.threshold = selected, found, threshold
        self.variables: dict[str, xr.Variable] = {}
        self.coords: dict[str, Any] = {}
        self.tracked: NDArray[np.int64] = np.zeros(0, np.int64)

    def add(self, name: str, dims: tuple[str, ...], values: Any, *, source: str, what: str) -> None:
        """Add one result."""
        self.variables[name] = xr.Variable(dims, np.asarray(values), {"source": source, "long_name": what})

    def _source(self, part: str) -> str:
        return PASS if any(part in one.read for one in self.found) else STATISTICS

    def add_moments(self, top_k: int) -> None:
        """Add what the pooled moments give, and choose the dimensions to be tracked."""
        every = [one.total.finalise() for one in self.found]
        stacked = {name: np.stack([one[name] for one in every]) for name in every[0]}
        mean, mean_abs, max_abs = stacked["mean"], stacked["mean_abs"], stacked["max_abs"]
        ratio = formulas.peak_ratio(max_abs)
        massive = (ratio > self.threshold) & (max_abs > 0)
        base, relative, cv = formulas.dim_spread(mean_abs, stacked["rms"])
        top = formulas.largest(np.abs(mean), top_k)
        cosine = np.append(formulas.consecutive_cosine(mean), np.nan)
        self.tracked = np.unique(np.concatenate([top.reshape(-1), np.flatnonzero(massive.any(axis=0))]))
        peaked = formulas.largest(max_abs, top_k)
        results: list[tuple[str, tuple[str, ...], Any, str]] = [
            ("count", _HIDDEN, stacked["count"].astype(np.int64), "tokens whose element is finite"),
            ("nonfinite", _HIDDEN, stacked["nonfinite"].astype(np.int64), "tokens whose element is not finite"),
            ("mean", _HIDDEN, mean, "mean activation"),
            ("std", _HIDDEN, stacked["std"], "population standard deviation"),
            ("mean_abs", _HIDDEN, mean_abs, "mean magnitude"),
            ("max_abs", _HIDDEN, max_abs, "largest magnitude"),
            ("peak_ratio", _HIDDEN, ratio, "largest magnitude over that of the median dimension"),
            ("massive", _HIDDEN, massive, f"peak_ratio above {self.threshold:g}"),
            ("peak_dims", _RANKED, peaked, "dimensions of the largest magnitude, largest first"),
            ("top_dims", _RANKED, top, "dimensions of the largest |mean|, largest first"),
            ("dim_magnitude", _HIDDEN, formulas.dim_magnitude(mean), "|mean| over its mean over dimensions"),
            ("dim_base", _LAYER, base, "mean magnitude of the median dimension"),
            ("dim_ratio", _HIDDEN, relative, "mean magnitude over dim_base"),
            ("cv", _HIDDEN, cv, "standard deviation of the magnitude over its mean"),
            ("consecutive_cosine", _LAYER, cosine, "cosine of the mean with that of the next layer here"),
        ]
        for name, dims, values, what in results:
            self.add(name, dims, values, source=self._source("total"), what=what)
        recommended = formulas.recommended_dims(top)
        what = "dimensions among the first five top_dims of three layers or more"
        self.add("recommended_dims", ("recommended",), recommended, source=self._source("total"), what=what)

    def add_rollouts(self) -> None:
        """Add what is found for each rollout by itself, and its mean over rollouts."""
        source, flags = self._source("rows"), self.selected.aligned
        alignment = np.stack([one.rows("alignment") for one in self.found], axis=-1)
        of_rollout = _mean_known(np.where(flags[..., None], alignment, np.nan), axis=1)
        self.add("alignment", _ALIGNED, alignment, source=source, what="mean cosine of the tokens with their mean")
        what = "that of the segment that counts for a rollout, or the mean of both"
        self.add("rollout_alignment", ("row", "layer"), of_rollout, source=source, what=what)
        what = "mean over rollouts of rollout_alignment"
        self.add("mean_alignment", _LAYER, _mean_known(of_rollout, axis=0), source=source, what=what)
        described = {
            "dims": "dimensions of the largest magnitude in a rollout",
            "peak": "largest magnitude there",
            "mean_abs": "mean magnitude there",
            "ratio": "peak over that of the rollout's median dimension",
            "massive": f"ratio above {self.threshold:g}",
        }
        for name, what in described.items():
            values = np.stack([one.rows(name) for one in self.found], axis=1)
            self.add(f"rollout_{name}", _ROLLOUT, values, source=source, what=what)

    def add_norms(self) -> None:
        """Add norms of tokens, of this component and of those captured beside it."""
        source = self._source("norms")
        self.add("norm", _LAYER, [one.norm for one in self.found], source=source, what="mean token norm")
        quantiles = np.stack([one.norm_quantiles for one in self.found])
        self.add("norm_quantiles", ("layer", "quantile"), quantiles, source=source, what="quantiles of the token norms")
        bad = [one.nonfinite_tokens for one in self.found]
        what = "tokens whose norm is not finite, left out of the norms"
        self.add("nonfinite_tokens", _LAYER, bad, source=source, what=what)
        self.coords["quantile"] = list(QUANTILES)
        names, norms = _component_norms(self.selected, own=[one.norm for one in self.found])
        if names:
            what = "mean token norm of each captured component; NaN where none is kept"
            self.add("component_norm", ("component", "layer"), norms, source=source, what=what)
            self.coords["component"] = np.array(names, dtype=object)

    def add_details(self, looked: Sequence[Details]) -> None:
        """Add what only a pass finds."""
        n, layers = len(self.selected.counts), len(looked)
        spread = {name: np.full((n, len(SEGMENTS), layers), np.nan) for name in ("min", "max", "std")}
        for i, one in enumerate(looked):
            for (row, segment), seen in one.spreads.items():
                final = seen.finalise()
                for name, values in spread.items():
                    values[row, segment, i] = final[name]
        for name, values in spread.items():
            what = f"{name} of the tokens' cosines with their mean"
            self.add(f"alignment_{name}", _ALIGNED, values, source=PASS, what=what)
        totals = self.variables["count"].values.sum(axis=1).tolist()
        median = np.array([one.magnitudes.median(n) for one, n in zip(looked, totals, strict=True)], np.float64)
        peaks = self.variables["max_abs"].values
        self.add("magnitude_median", _LAYER, median, source=PASS, what="median magnitude of all elements")
        what = "max_abs above 100 and above 1000 x magnitude_median (Sun et al. 2024)"
        self.add("massive_sun", _HIDDEN, formulas.above_peak_threshold(peaks, median), source=PASS, what=what)
        base = self.variables["dim_base"].values
        finished = [one.columns.finish(float(b)) for one, b in zip(looked, base, strict=True)]
        dims = ("layer", "percentile", "tracked_dim")
        what = "percentiles of the magnitude of the tracked dimensions"
        self.add("percentiles", dims, np.stack([q for q, _ in finished]), source=PASS, what=what)
        what = "per cent of tokens whose magnitude there exceeds 10 x dim_base"
        self.add("share_above_10x", _TRACKED, np.stack([s for _, s in finished]), source=PASS, what=what)
        self.coords |= {"percentile": list(PERCENTILES), "tracked_dim": self.tracked}

    def dataset(self, asked: dict[str, Any]) -> xr.Dataset:
        """Return the Dataset with coordinates and provenance."""
        selected = self.selected
        tables = [source.table for source in selected.sources]
        which = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
        along = {
            "rollout_id": np.array([str(name) for table in tables for name in table.index], dtype=object),
            "token_sha256": np.array([str(sha) for table in tables for sha in table["token_sha256"]], dtype=object),
            "source": which,
            "prompt_tokens": selected.counts[:, 0],
            "response_tokens": selected.counts[:, 1],
        }
        coords = self.coords | {name: ("row", values) for name, values in along.items()}
        coords |= {"layer": list(selected.layers), "segment": np.array(SEGMENTS, dtype=object)}
        attrs = {
            "component": selected.component,
            "tokens": selected.rule,
            "n_tokens": selected.tokens,
            "selection": asked,
            "sources": [source.describe() for source in selected.sources],
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "version": _version(),
        }
        return xr.Dataset(self.variables, coords=coords, attrs=attrs)


def _mean_known(values: Floats, *, axis: int) -> Floats:
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(known, values, 0.0).sum(axis=axis) / known.sum(axis=axis))


def _component_norms(selected: Selected, *, own: Sequence[float]) -> tuple[list[str], Floats]:
    """Mean norms of every component of the stores, from what was kept; NaN where one of them lacks it."""
    stores = [source for source in selected.sources if isinstance(source, StoreRows)]
    if len(stores) < len(selected.sources):
        return [], np.empty((0, 0))
    names = sorted(set.intersection(*(set(source.store.components) for source in stores)))
    norms = [
        own if name == selected.component else [_kept_norm(selected, name, layer) for layer in selected.layers]
        for name in names
    ]
    return names, np.array(norms)


def _kept_norm(selected: Selected, component: str, layer: int) -> float:
    total, count = 0.0, 0
    for first, source in selected.offsets():
        assert isinstance(source, StoreRows)
        here = slice(first, first + len(source.table))
        try:
            kept = source.store.norms(component, rollouts=source.ids, layers=layer).values
        except AbsentError:
            return float("nan")
        pooled = kept[np.repeat(selected.pooled[here].reshape(-1), selected.counts[here].reshape(-1))]
        finite = pooled[np.isfinite(pooled)].astype(np.float64)
        total, count = total + float(finite.sum()), count + len(finite)
    return total / count if count else float("nan")


@cache
def _version() -> str:
    try:
        return version("activation-datastore")
    except PackageNotFoundError:
        return "unknown"
