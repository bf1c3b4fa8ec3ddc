"""Calibration as the file that an experiment's viewer reads: the same keys, shapes and rounding, plus the layers."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from calibrate.formulas import PeakDims, consecutive_cosine, dim_magnitude, largest
from experiments.projections import AlignmentRange, MassiveAggregate, MassiveDim, numbers

__all__ = ["aggregate", "alignment_range", "massive_dims"]


def aggregate(
    layers: Sequence[int],
    mean: ArrayLike,
    *,
    layer_norms: ArrayLike,
    alignment: ArrayLike,
    top_k: int = 5,
    component_norms: Mapping[str, ArrayLike] | None = None,
) -> MassiveAggregate:
    """Build the `aggregate` of a massive-activations file.

    Parameters
    ----------
    layers : sequence of int
        Captured layers, ascending.
    mean : array of shape (layers, hidden)
        Mean activation over the pooled tokens: the response of each rollout, the prompt of one that has no response.
    layer_norms : array of shape (layers,)
        Mean token norm over the same tokens.
    alignment : array of shape (rollouts, layers)
        Mean alignment of each rollout; NaN where it has none, which is left out of the mean.
    top_k : int
        Dimensions kept for each layer.
    component_norms : mapping, optional
        `attn_norms`, `mlp_norms`: arrays like `layer_norms`.
    """
    means = np.asarray(mean, np.float64)
    top = largest(np.abs(means), top_k)
    magnitude = dim_magnitude(means)
    per_rollout = np.asarray(alignment, np.float64)
    known = ~np.isnan(per_rollout)
    with np.errstate(invalid="ignore"):
        aligned = np.where(known, per_rollout, 0.0).sum(axis=0) / known.sum(axis=0)
    cosines = _rounded(consecutive_cosine(means), 4)
    norms = {name: _by_layer(layers, values, 1) for name, values in (component_norms or {}).items()}
    return MassiveAggregate.model_validate(
        {
            "n_prompts": len(per_rollout),
            "mean_alignment_by_layer": _by_layer(layers, aligned, 4),
            "top_dims_by_layer": {layer: dims.tolist() for layer, dims in zip(layers, top, strict=True)},
            "dim_magnitude_by_layer": {int(dim): _rounded(magnitude[:, dim], 3) for dim in np.unique(top)},
            "layer_norms": _by_layer(layers, layer_norms, 1),
            "consecutive_cosine": dict(zip(layers[:-1], cosines, strict=True)),
            **norms,
        }
    )


def massive_dims(peaks: PeakDims) -> list[MassiveDim]:
    """Return one layer's dimensions with the largest peaks as the per-rollout entries of the file."""
    columns = (
        peaks.dims.tolist(),
        _rounded(peaks.peak, 2),
        _rounded(peaks.mean_abs, 4),
        _rounded(peaks.ratio, 1),
        peaks.massive.tolist(),
    )
    return [
        MassiveDim(dim=dim, max_val=peak, mean_val=mean, ratio=ratio, is_massive=massive)
        for dim, peak, mean, ratio, massive in zip(*columns, strict=True)
    ]


def alignment_range(spread: Mapping[str, float]) -> AlignmentRange:
    """Return `Spread.finalise()` of token cosines as the file's record, four decimals."""
    return AlignmentRange.model_validate({name: _rounded([value], 4)[0] for name, value in spread.items()})


def _by_layer(layers: Sequence[int], values: ArrayLike, decimals: int) -> dict[int, float | None]:
    return dict(zip(layers, _rounded(values, decimals), strict=True))


def _rounded(values: ArrayLike, decimals: int) -> list[float | None]:
    # Python's rounding, as in the files there are: NumPy's scales first and rounds some halves the other way
    return [None if x is None else round(x, decimals) for x in numbers(np.asarray(values, np.float64))]
