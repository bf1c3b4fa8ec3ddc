"""Directions and scores of a store: which directions, the pass that scores, and comparisons between rollouts.

Names are loaded when first used, so that a command's help does not wait for Zarr or xarray.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from experiments.direction import Direction
    from project.criteria import Criteria
    from project.fit import Fitted, fit_directions
    from project.groups import Family, aligned, compare, families, lag_correlation, rollout_correlation
    from project.modeldiff import difference, model_diff
    from project.positions import tokens_at
    from project.ranking import RULES, Best, Rules, rank
    from project.run import Work, scores, stored_scores, work
    from project.scoring import (
        centred,
        clean_norms,
        clean_scores,
        cosine,
        ensemble,
        less_baseline,
        normalised,
        score_block,
        smooth,
        token_norms,
        unit,
        unit_columns,
        velocity,
    )
    from project.selection import Selection, select
    from project.spans import top_spans
    from project.statistics import (
        Interval,
        auroc,
        bootstrap_auroc,
        bootstrap_difference,
        bootstrap_mean,
        effect_size,
        paired_effect_size,
    )

_HOMES = {
    "experiments.direction": ("Direction",),
    "project.criteria": ("Criteria",),
    "project.fit": ("Fitted", "fit_directions"),
    "project.groups": ("Family", "aligned", "compare", "families", "lag_correlation", "rollout_correlation"),
    "project.modeldiff": ("difference", "model_diff"),
    "project.positions": ("tokens_at",),
    "project.ranking": ("RULES", "Best", "Rules", "rank"),
    "project.run": ("Work", "scores", "stored_scores", "work"),
    "project.scoring": (
        "centred",
        "clean_norms",
        "clean_scores",
        "cosine",
        "ensemble",
        "less_baseline",
        "normalised",
        "score_block",
        "smooth",
        "token_norms",
        "unit",
        "unit_columns",
        "velocity",
    ),
    "project.selection": ("Selection", "select"),
    "project.spans": ("top_spans",),
    "project.statistics": (
        "Interval",
        "auroc",
        "bootstrap_auroc",
        "bootstrap_difference",
        "bootstrap_mean",
        "effect_size",
        "paired_effect_size",
    ),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "RULES",
    "Best",
    "Criteria",
    "Direction",
    "Family",
    "Fitted",
    "Interval",
    "Rules",
    "Selection",
    "Work",
    "aligned",
    "auroc",
    "bootstrap_auroc",
    "bootstrap_difference",
    "bootstrap_mean",
    "centred",
    "clean_norms",
    "clean_scores",
    "compare",
    "cosine",
    "difference",
    "effect_size",
    "ensemble",
    "families",
    "fit_directions",
    "lag_correlation",
    "less_baseline",
    "model_diff",
    "normalised",
    "paired_effect_size",
    "rank",
    "rollout_correlation",
    "score_block",
    "scores",
    "select",
    "smooth",
    "stored_scores",
    "token_norms",
    "tokens_at",
    "top_spans",
    "unit",
    "unit_columns",
    "velocity",
    "work",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'project' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
