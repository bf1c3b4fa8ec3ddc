"""Massive activations and norms of a store: what follows from its statistics, one streaming pass, and the users' file.

>>> import calibrate
>>> calibrate.fit("run.zarr").data["top_dims"]     # doctest: +SKIP

Names are loaded when first used, so that a command's help does not wait for Zarr or xarray.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calibrate.calibration import Calibration, fit
    from calibrate.export import (
        aggregate,
        alignment_range,
        massive_dims,
        massive_file,
        per_layer_file,
        write_experiment,
    )
    from calibrate.formulas import (
        PeakDims,
        Spread,
        above_peak_threshold,
        consecutive_cosine,
        dim_magnitude,
        dim_spread,
        magnitude_counts,
        magnitude_median,
        mean_alignment,
        norm_quantiles,
        peak_dims,
        recommended_dims,
        token_cosines,
    )
    from calibrate.keeping import save
    from calibrate.plot import draw, save_plot

_HOMES = {
    "calibrate.export": (
        "aggregate",
        "alignment_range",
        "massive_dims",
        "massive_file",
        "per_layer_file",
        "write_experiment",
    ),
    "calibrate.calibration": (
        "Calibration",
        "fit",
    ),
    "calibrate.formulas": (
        "PeakDims",
        "Spread",
        "above_peak_threshold",
        "consecutive_cosine",
        "dim_magnitude",
        "dim_spread",
        "magnitude_counts",
        "magnitude_median",
        "mean_alignment",
        "norm_quantiles",
        "peak_dims",
        "recommended_dims",
        "token_cosines",
    ),
    "calibrate.plot": (
        "draw",
        "save_plot",
    ),
    "calibrate.keeping": ("save",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Calibration",
    "PeakDims",
    "Spread",
    "above_peak_threshold",
    "aggregate",
    "alignment_range",
    "consecutive_cosine",
    "dim_magnitude",
    "dim_spread",
    "draw",
    "fit",
    "magnitude_counts",
    "magnitude_median",
    "massive_dims",
    "massive_file",
    "mean_alignment",
    "norm_quantiles",
    "peak_dims",
    "per_layer_file",
    "recommended_dims",
    "save",
    "save_plot",
    "token_cosines",
    "write_experiment",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'calibrate' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
