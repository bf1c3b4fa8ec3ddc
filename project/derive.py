"""What follows from scores, as functions of their labelled Dataset: cosine, centred, smoothed, cleaned, ensembles.

Each takes what `project.scores` or `Store.scores` returned, and gives labelled arrays back; what depends on a rollout's
tokens (its first one, its neighbours, its mean norm) is done rollout by rollout.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from datastore.errors import AbsentError, MisuseError
from experiments.projections import dim_set
from project import scoring

__all__ = [
    "centred",
    "cleaned",
    "cosine",
    "ensemble",
    "less_baseline",
    "normalised",
    "runs_of_rollouts",
    "smooth",
    "velocity",
]

Float32 = NDArray[np.float32]


def runs_of_rollouts(tokens: xr.Dataset | xr.DataArray) -> list[tuple[str, slice]]:
    """Return each rollout with its run of tokens, in order; a rollout whose tokens lie apart has several."""
    names = np.asarray(tokens["rollout"].values)
    if not len(names):
        return []
    edges = np.flatnonzero(np.concatenate([[True], names[1:] != names[:-1], [True]]))
    return [(str(names[a]), slice(int(a), int(b))) for a, b in pairwise(edges)]


def cosine(scores: xr.Dataset) -> xr.DataArray:
    """Score over the token's norm: the cosine of activation and direction; 0 where the norm is 0."""
    values, norms = scores.score.values, scores.norm.values
    columns = [scoring.cosine(values[:, [j]], norms[:, j]) for j in range(values.shape[1])]
    return _like(scores, np.concatenate(columns, axis=1) if columns else values, "cosine")


def normalised(scores: xr.Dataset) -> xr.DataArray:
    """Score over the mean norm of its rollout's response, or of the whole rollout where it has no response."""
    response = scores.segment.values == "response"
    out = np.empty_like(scores.score.values)
    for _, run in runs_of_rollouts(scores):
        for j in range(out.shape[1]):
            norms = scores.norm.values[run, j]
            out[run, j] = scoring.normalised(scores.score.values[run, j], norms, response=response[run])
    return _like(scores, out, "normalised")


def less_baseline(scores: xr.Dataset) -> xr.DataArray:
    """Score less its direction's baseline.

    Raises
    ------
    MisuseError
        A baseline is unknown.
    """
    return _like(scores, scoring.less_baseline(scores.score.values, scores.baseline.values), "score")


def centred(scores: xr.Dataset | xr.DataArray) -> xr.DataArray:
    """Score less the score at its rollout's first token."""
    return _by_rollout(scores, scoring.centred)


def smooth(scores: xr.Dataset | xr.DataArray, window: int = 5) -> xr.DataArray:
    """Moving average within each rollout, see `project.scoring.smooth`."""
    return _by_rollout(scores, lambda values: scoring.smooth(values, window))


def velocity(scores: xr.Dataset | xr.DataArray) -> xr.DataArray:
    """Score less the score at the token before; NaN at a rollout's first token."""

    def differences(values: Float32) -> Float32:
        nothing = np.full_like(values[:1], np.nan)
        return np.concatenate([nothing, scoring.velocity(values)])

    return _by_rollout(scores, differences)


def cleaned(scores: xr.Dataset, dims: str | Iterable[int], *, top_dims: Mapping[int, Sequence[int]]) -> xr.Dataset:
    """Take some dimensions' part out of scores and norms: p − Σ_d h_d v_d/|v| and √(|h|² − Σ_d h_d²).

    It works at every layer that was scored, and on the difference of two runs: the formula of the score is linear.

    Parameters
    ----------
    scores : Dataset
    dims : str or ints
        `none`, `all`, `top5-3layers`, or the dimensions themselves.
    top_dims : mapping of layer to dimensions
        Of the calibration, see `project.cleaning.top_dims`.

    Raises
    ------
    AbsentError
        The activations at a dimension were not kept beside the scores.
    """
    chosen = dim_set(dims, top_dims)
    score, norm = scores.score.values.copy(), scores.norm.values.copy()
    of_norms = scores.get("norm_dim_value", scores.dim_value).values  # a difference has the norms of one of the two
    for j in range(score.shape[1]):
        place = (scores.dim_component.values == scores.component.values[j]) & (
            scores.dim_layer.values == scores.layer.values[j]
        )
        here = np.flatnonzero(place & np.isin(scores.dim.values, chosen))
        lacking = sorted(set(chosen) - set(scores.dim.values[here].tolist()))
        if lacking:
            raise AbsentError(
                f"the activations at dimensions {lacking} of layer {int(scores.layer.values[j])} were not kept beside "
                "the scores; calibrate the store, then project it again, or name the dimensions when projecting"
            )
        at = scores.dim_value.values[:, here]
        score[:, [j]] = scoring.clean_scores(score[:, [j]], at, scores.dim_unit.values[here][:, [j]])
        norm[:, j] = scoring.clean_norms(norm[:, j], of_norms[:, here])
    attrs = {**scores.attrs, "cleaned_dims": list(chosen)}
    return scores.assign(score=scores.score.copy(data=score), norm=scores.norm.copy(data=norm)).assign_attrs(attrs)


def ensemble(scores: xr.Dataset, weights: Mapping[str, float], *, name: str = "ensemble") -> xr.DataArray:
    """Weighted sum of directions, weights scaled to sum to 1.

    Parameters
    ----------
    weights : mapping of direction label to weight
        Labels as in `scores.direction`, such as `bs/lying@20`.

    Raises
    ------
    MisuseError
        A label is not there, or a weight is not finite.
    """
    unknown = [label for label in weights if label not in scores.direction.values]
    if unknown or not weights:
        raise MisuseError(
            f"direction {unknown[0] if unknown else '(none given)'!r} has no scores here; there are "
            f"{', '.join(map(str, scores.direction.values))}"
        )
    kept = scores.score.sel(direction=list(weights))
    values = scoring.ensemble(kept.values, list(weights.values()))
    summed: xr.DataArray = kept.isel(direction=0, drop=True).reset_coords(drop=True).copy(data=values).rename(name)
    return summed


def _by_rollout(scores: xr.Dataset | xr.DataArray, fn: Callable[[Float32], Float32]) -> xr.DataArray:
    array: xr.DataArray = scores.score if isinstance(scores, xr.Dataset) else scores
    out = np.empty_like(array.values)
    for _, run in runs_of_rollouts(array):
        out[run] = fn(array.values[run])
    return array.copy(data=out)


def _like(scores: xr.Dataset, values: Float32, name: str) -> xr.DataArray:
    labelled: xr.DataArray = scores.score.copy(data=values).rename(name)
    return labelled
