"""Directions and scores of a store: which directions, the arithmetic of scores, and comparisons between rollouts."""

from experiments.direction import Direction
from project.criteria import Criteria
from project.ranking import RULES, Best, Rules, rank
from project.run import scores, stored_scores, work
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
from project.statistics import (
    Interval,
    auroc,
    bootstrap_auroc,
    bootstrap_difference,
    bootstrap_mean,
    effect_size,
    paired_effect_size,
)

__all__ = [
    "RULES",
    "Best",
    "Criteria",
    "Direction",
    "Interval",
    "Rules",
    "Selection",
    "auroc",
    "bootstrap_auroc",
    "bootstrap_difference",
    "bootstrap_mean",
    "centred",
    "clean_norms",
    "clean_scores",
    "cosine",
    "effect_size",
    "ensemble",
    "less_baseline",
    "normalised",
    "paired_effect_size",
    "rank",
    "score_block",
    "scores",
    "select",
    "smooth",
    "stored_scores",
    "token_norms",
    "unit",
    "unit_columns",
    "velocity",
    "work",
]
