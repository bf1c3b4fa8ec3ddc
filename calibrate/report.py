"""A calibration as a small document for a person or a script: one entry a layer."""

from typing import Any

import numpy as np

from calibrate.calibration import PASS, STATISTICS, Calibration

__all__ = ["summary"]

_MOST = 8


def summary(calibration: Calibration) -> dict[str, Any]:
    """Return the main results as plain JSON; what is undefined, or was not looked for, is None."""
    data = calibration.data
    sources = calibration.sources
    return {
        "component": calibration.component,
        "layers": list(calibration.layers),
        "rollouts": data.sizes["row"],
        "tokens": int(data.attrs["n_tokens"]),
        "of": str(data.attrs["tokens"]),
        "by_layer": [_layer(calibration, i) for i in range(len(calibration.layers))],
        "recommended_dims": [int(dim) for dim in data["recommended_dims"].values],
        "nonfinite_tokens": [int(n) for n in data["nonfinite_tokens"].values],
        "sources": {kind: [name for name, source in sources.items() if source == kind] for kind in (STATISTICS, PASS)},
    }


def _layer(calibration: Calibration, i: int) -> dict[str, Any]:
    data = calibration.data.isel(layer=i)
    massive = np.flatnonzero(data["massive"].values)
    ratio = data["peak_ratio"].values
    ranked = massive[np.argsort(-ratio[massive], kind="stable")][:_MOST]
    sun = [int(dim) for dim in np.flatnonzero(data["massive_sun"].values)] if "massive_sun" in data else None
    return {
        "layer": int(data["layer"]),
        "norm": _number(data["norm"]),
        "mean_alignment": _number(data["mean_alignment"]),
        "consecutive_cosine": _number(data["consecutive_cosine"]),
        "top_dims": [int(dim) for dim in data["top_dims"].values],
        "massive": {int(dim): _number(ratio[dim]) for dim in ranked},
        "massive_sun": sun,
    }


def _number(value: Any) -> float | None:
    plain = float(value)
    return plain if np.isfinite(plain) else None
