"""Calibration as the file that an experiment's viewer reads: the same keys, shapes and rounding, plus the layers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike

from calibrate.formulas import PeakDims, consecutive_cosine, dim_magnitude, largest
from datastore.errors import MisuseError
from experiments.projections import (
    AlignmentRange,
    MassiveActivations,
    MassiveAggregate,
    MassiveDim,
    MassivePrompt,
    PerLayerStats,
    massive_paths,
    numbers,
    write_json,
)

__all__ = ["aggregate", "alignment_range", "massive_dims", "massive_file", "per_layer_file", "write_experiment"]

_COMPONENT_KEYS = {"attn_contribution": "attn_norms", "mlp_contribution": "mlp_norms"}


def massive_file(
    data: xr.Dataset,
    *,
    experiment: str = "",
    model_variant: str = "",
    prompt_set: str = "",
    calibration: bool = False,
    per_prompt: Mapping[str, MassivePrompt] | None = None,
) -> MassiveActivations:
    """Return a calibration as the massive-activations file of a prompt set.

    Parameters
    ----------
    data : Dataset
        `Calibration.data`, or what the store kept of it.
    experiment, model_variant, prompt_set : str
        What the file says of itself.
    calibration : bool
        Whether the set was made for calibrating.
    per_prompt : mapping of rollout id to MassivePrompt, optional
        From `calibrate.per_token.per_rollout`.
    """
    norms: dict[str, ArrayLike] = {}
    if "component_norm" in data:
        captured = [str(name) for name in data["component"].values]
        known = [name for name in captured if name in _COMPONENT_KEYS]
        norms = {_COMPONENT_KEYS[name]: data["component_norm"].values[captured.index(name)] for name in known}
    models = {str(capture["model"]) for one in data.attrs["sources"] for capture in one.get("captures", {}).values()}
    layers = [int(layer) for layer in data["layer"].values]
    made = aggregate(
        layers,
        data["mean"].values,
        layer_norms=data["norm"].values,
        alignment=data["rollout_alignment"].values,
        top_k=data.sizes["rank"],
        component_norms={key: values for key, values in norms.items() if not np.isnan(values).all()},
    )
    return MassiveActivations(
        experiment=experiment,
        model=", ".join(sorted(models)) or "unknown",
        model_variant=model_variant,
        prompt_set=prompt_set,
        is_calibration=calibration,
        layers=layers,
        aggregate=made,
        **({} if per_prompt is None else {"per_prompt": dict(per_prompt)}),
    )


def per_layer_file(data: xr.Dataset, *, experiment: str = "", model_variant: str = "") -> PerLayerStats:
    """Return how the recommended dimensions behave at each layer, as the `per_layer_stats.json` of a variant.

    Raises
    ------
    MisuseError
        The calibration was made without a pass over the data.
    """
    if "percentiles" not in data:
        raise MisuseError("percentiles take a pass over the data, and this calibration made none; leave --no-pass out")
    dims = [int(dim) for dim in data["recommended_dims"].values]
    tracked = [int(dim) for dim in data["tracked_dim"].values]
    places = [tracked.index(dim) for dim in dims]
    p5 = [float(one) for one in data["percentile"].values].index(5.0)
    low = data["percentiles"].values[:, p5][:, places] / data["dim_base"].values[:, None]
    columns = {
        "ratio": data["dim_ratio"].values[:, dims],
        "cv": data["cv"].values[:, dims],
        "p5_ratio": low,
        "pct_above_10x": data["share_above_10x"].values[:, places],
    }
    layers = [int(layer) for layer in data["layer"].values]
    listed: dict[str, Any] = {key: [_rounded(row, 4) for row in values] for key, values in columns.items()}
    per_layer = {
        layer: {dim: {key: listed[key][i][j] for key in columns} for j, dim in enumerate(dims)}
        for i, layer in enumerate(layers)
    }
    return PerLayerStats.model_validate(
        {
            "experiment": experiment,
            "model_variant": model_variant,
            "n_tokens": int(data.attrs["n_tokens"]),
            "n_layers": len(layers),
            "layers": layers,
            "massive_dims": dims,
            "per_layer": per_layer,
        }
    )


def write_experiment(
    data: xr.Dataset,
    experiment: Path,
    *,
    variant: str,
    prompt_set: str,
    per_prompt: Mapping[str, MassivePrompt] | None = None,
) -> list[Path]:
    """Write a calibration to every place of an experiment tree where a tool looks for it; return the files.

    They are the prompt set's own file, the two places of `calibration.json`, and `per_layer_stats.json` where the
    calibration has what goes into it. What was found in each rollout goes into the prompt set's own file.
    """
    about: dict[str, Any] = {"experiment": experiment.resolve().name, "model_variant": variant}
    own = prompt_set.strip("_").startswith("calibration")
    record = massive_file(data, **about, prompt_set=prompt_set, calibration=own)
    paths = massive_paths(experiment, variant=variant, prompt_set=prompt_set, calibration=True)
    written = [write_json(path, record) for path in dict.fromkeys(paths)]
    if per_prompt is not None:
        detailed = massive_file(data, **about, prompt_set=prompt_set, calibration=own, per_prompt=per_prompt)
        write_json(paths[0], detailed)
    if "percentiles" in data and data.sizes["recommended"]:
        stats = per_layer_file(data, experiment=about["experiment"], model_variant=variant)
        written.append(write_json(paths[1].with_name("per_layer_stats.json"), stats))
    return written


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
