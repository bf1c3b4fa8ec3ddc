"""Massive activations and norms of a store: the formulas, and the file that an experiment's viewer reads."""

from calibrate.export import aggregate, alignment_range, massive_dims
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

__all__ = [
    "PeakDims",
    "Spread",
    "above_peak_threshold",
    "aggregate",
    "alignment_range",
    "consecutive_cosine",
    "dim_magnitude",
    "dim_spread",
    "magnitude_counts",
    "magnitude_median",
    "massive_dims",
    "mean_alignment",
    "norm_quantiles",
    "peak_dims",
    "recommended_dims",
    "token_cosines",
]
