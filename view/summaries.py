"""Many rollouts at once: each one's mean and peak, percentiles, the strongest spans, what a calibration says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from datastore.errors import AbsentError
from project.derive import runs_of_rollouts
from project.spans import top_spans
from view.model import Model
from view.treatment import Treatment, treated

__all__ = [
    "Summary",
    "calibration_tables",
    "captured",
    "evenly",
    "percentiles",
    "sample",
    "strongest",
    "summarise",
]

Float64 = NDArray[np.float64]
SAMPLE = 200_000
"""Tokens that stand for all of a large store where percentiles are taken and groups compared."""
QUANTILES = np.linspace(0.0, 1.0, 201)
BATCH = 16


@dataclass(frozen=True, slots=True, eq=False)
class Summary:
    """Mean and peak of every scored rollout.

    Attributes
    ----------
    means, peaks : DataFrame
        A row for each rollout, a column for each direction; a peak is the value of the largest magnitude, with its
        sign, beyond the first four tokens (which dwarf all others in many models).
    """

    means: pd.DataFrame
    peaks: pd.DataFrame


def summarise(model: Model, how: Treatment, *, segment: str | None = "response") -> Summary:
    """Return the mean and peak of every scored rollout, read a run of rollouts at a time.

    Parameters
    ----------
    model : Model
    how : Treatment
        Smoothing is left out.
    segment : str, optional
        Only its tokens; all of a rollout that has none there.
    """
    plain = how.unsmoothed
    return model.keep(("summary", plain, segment), lambda: _summarise(model, plain, segment=segment))


def _summarise(model: Model, plain: Treatment, *, segment: str | None) -> Summary:
    labels = list(map(str, model.directions["direction"]))
    names: list[str] = []
    rows: list[tuple[Float64, Float64]] = []
    for block in model.in_blocks(model.scored):
        values = treated(model.read(block), plain, top_dims=model.top_dims)
        inside = np.ones(values.sizes["token"], bool) if segment is None else values.segment.values == segment
        for name, run in runs_of_rollouts(values):
            names.append(name)
            rows.append(_mean_and_peak(values.values[run], inside[run]))
    sides = zip(*rows, strict=True) if rows else ([], [])
    means, peaks = (np.array(side, np.float64).reshape(len(names), len(labels)) for side in sides)
    return Summary(*(pd.DataFrame(side, index=names, columns=labels) for side in (means, peaks)))


def _mean_and_peak(values: NDArray[np.float32], inside: NDArray[np.bool_]) -> tuple[Float64, Float64]:
    mine = values[inside] if inside.any() else values
    later = inside & (np.arange(len(values)) >= 4)
    beyond = np.nan_to_num(values[later] if later.any() else mine)
    peaks = np.take_along_axis(beyond, np.abs(beyond).argmax(axis=0)[np.newaxis], axis=0)[0]
    known = np.isfinite(mine).any(axis=0)
    sums = np.where(np.isfinite(mine), mine, 0).astype(np.float64).sum(axis=0)
    means = np.divide(sums, np.isfinite(mine).sum(axis=0), out=np.full(len(sums), np.nan), where=known)
    return means, np.where(known, peaks.astype(np.float64), np.nan)


def sample(model: Model, *, tokens: int = SAMPLE) -> list[str]:
    """Return scored rollouts, evenly spread over the store, of at most so many tokens; all where they are fewer."""
    return evenly(model, model.scored, tokens=tokens)


def evenly(model: Model, names: Sequence[str], *, tokens: int) -> list[str]:
    """Return some of these rollouts, evenly taken, of at most so many tokens; one at least, all of fewer tokens."""
    counts = model.rollouts["n_tokens"]
    total = int(counts.loc[list(names)].sum()) if len(names) else 0
    step = max(1, -(-total // tokens))
    kept: list[str] = []
    room = tokens
    for name in names[::step]:
        room -= int(counts[name])
        if room >= 0 or not kept:
            kept.append(name)
    return kept


def percentiles(model: Model, how: Treatment) -> tuple[NDArray[np.float32], int]:
    """Return quantiles of the values shown, (direction, 201), and of how many tokens they are."""
    return model.keep(("percentiles", how), lambda: _percentiles(model, how))


def _percentiles(model: Model, how: Treatment) -> tuple[NDArray[np.float32], int]:
    values = model.treated(tuple(sample(model)), how).values
    quantiles = np.nanquantile(values, QUANTILES, axis=0, method="linear")
    return np.ascontiguousarray(quantiles.T, dtype=np.float32), len(values)


def strongest(
    model: Model,
    how: Treatment,
    direction: str,
    *,
    by: str = "window",
    window: int = 10,
    rollout: str | None = None,
    most: int = 20,
    peaks: "pd.Series[float] | None" = None,
) -> pd.DataFrame:
    """Return the spans of the largest |mean|, of one rollout or of all.

    Of all, rollouts are looked at in the order of their peaks, and no further than the peak that is below what has been
    found: a mean can't exceed it.

    Parameters
    ----------
    direction : str
    by, window, most
        See `project.spans.top_spans`.
    rollout : str, optional
        Only this one.
    peaks : Series, optional
        Each rollout's largest value, needed without `rollout`.
    """
    plain = how.unsmoothed
    if rollout is not None:
        return _spans(model, plain, (rollout,), direction=direction, by=by, window=window, most=most)
    if peaks is None:
        return pd.DataFrame(columns=["rollout", "start", "stop", "mean", "text"])
    order = peaks.abs().sort_values(ascending=False).dropna()
    found = pd.DataFrame(columns=["rollout", "start", "stop", "mean", "text"])
    for first in range(0, len(order), BATCH):
        if len(found) >= most and float(found["mean"].abs().iloc[most - 1]) >= float(order.iloc[first]):
            break
        names = tuple(map(str, order.index[first : first + BATCH]))
        more = _spans(model, plain, names, direction=direction, by=by, window=window, most=most)
        both = pd.concat([found, more], ignore_index=True) if len(found) else more
        best = both["mean"].abs().sort_values(ascending=False, kind="stable").index
        found = both.loc[best][:most].reset_index(drop=True)
    return found


def _spans(
    model: Model, how: Treatment, names: tuple[str, ...], *, direction: str, by: str, window: int, most: int
) -> pd.DataFrame:
    scores = model.scores(names)
    beyond = np.where(scores.position.values[:, np.newaxis] < 4, np.nan, model.treated(names, how).values)
    given = scores.assign(score=scores.score.copy(data=beyond))
    return top_spans(model.store, given, direction, by=by, window=window, most=most)


def captured(model: Model) -> dict[str, pd.DataFrame]:
    """Return by component which rollouts are captured at which layers: bool, a row for each rollout."""
    return {component: model.store.captured(component) for component in model.store.components}


def calibration_tables(model: Model) -> Mapping[str, pd.DataFrame]:
    """Return by component what its newest calibration says of each layer; components without one are left out.

    Returns
    -------
    mapping of component to DataFrame
        Indexed by real layer number: norm (mean), norm_low and norm_high (5 % and 95 %), alignment, and the five
        largest dimensions with their ratio to the typical one.
    """
    found = {}
    for component in model.store.components:
        try:
            data = model.store.calibration(component)
        except AbsentError:
            continue
        found[component] = _by_layer(data)
    return found


def _by_layer(data: xr.Dataset) -> pd.DataFrame:
    layers = data["layer"].values.astype(int)
    table = pd.DataFrame({"norm": np.asarray(data["norm"].values, np.float64)}, index=pd.Index(layers, name="layer"))
    for name, quantile in (("norm_low", 0.05), ("norm_high", 0.95)):
        table[name] = data["norm_quantiles"].sel(quantile=quantile).values
    for name, source in (("alignment", "mean_alignment"), ("next_layer", "consecutive_cosine")):
        table[name] = data[source].values if source in data else np.nan
    for rank in range(data.sizes["rank"]):
        dims = data["top_dims"].values[:, rank]
        table[f"dim_{rank + 1}"] = dims
        ratios = data["dim_ratio"].values[np.arange(len(layers)), np.maximum(dims, 0)]
        table[f"ratio_{rank + 1}"] = np.where(dims >= 0, ratios, np.nan)
    return table
