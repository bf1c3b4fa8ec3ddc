"""Two stores by trait: how far the second model is from the first, and whether along the trait. No drawing."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from datastore.errors import DatastoreError
from project.modeldiff import model_diff
from project.statistics import effect_size, paired_effect_size
from view.model import Model
from view.summaries import evenly, summarise
from view.treatment import Treatment

__all__ = ["COLUMNS", "Compared", "compared"]

COLUMNS = ("direction", "n_rollouts", "mean_a", "mean_b", "effect_size", "paired_effect_size", "cosine")
MOST_BYTES = 256 * 2**20
"""Of activations that are read of each store and layer for the cosines."""


class Compared(NamedTuple):
    """Two stores by direction.

    Attributes
    ----------
    table : DataFrame
        `COLUMNS`, a row for each direction that both scored. Means and effect sizes are of the rollouts' mean scores,
        treated as the page says; cosine is that of the mean change of the activations, as they are stored, with the
        direction.
    common, read : int
        Rollouts that both hold with the same tokens, and those of them whose activations the cosines are from.
    """

    table: pd.DataFrame
    common: int
    read: int


def compared(a: Model, b: Model, how: Treatment) -> Compared:
    """Compare the rollouts that both stores hold with the same tokens, over their responses.

    Parameters
    ----------
    a, b : Model
    how : Treatment
        Smoothing is left out.
    """
    hashes = b.rollouts["token_sha256"].to_dict()
    names = [name for name in a.scored if b.is_scored(name) and hashes[name] == a.rollouts["token_sha256"][name]]
    if not names:
        return Compared(pd.DataFrame(columns=list(COLUMNS)), 0, 0)
    first, second = (summarise(model, how).means.loc[names] for model in (a, b))
    both = [name for name in first.columns if name in second.columns]
    sample = tuple(evenly(a, names, tokens=_most_tokens(a)))
    cosines = a.keep(("cosines", b, sample, tuple(both)), lambda: _cosines(a, b, sample, directions=both))
    rows = []
    for direction in both:
        pair = pd.DataFrame({"a": first[direction], "b": second[direction]}).dropna()
        x, y = pair["a"].to_numpy(), pair["b"].to_numpy()
        rows.append((direction, len(x), x.mean(), y.mean(), effect_size(x, y), paired_effect_size(x, y)))
    table = pd.DataFrame(rows, columns=list(COLUMNS[:-1]))
    return Compared(table.assign(cosine=[cosines[name] for name in table["direction"]]), len(names), len(sample))


def _most_tokens(model: Model) -> int:
    specs = model.store.cells.components.values()
    return max(1, MOST_BYTES // max((spec.width * 4 for spec in specs), default=4))


def _cosines(a: Model, b: Model, names: Sequence[str], *, directions: Sequence[str]) -> dict[str, float]:
    """Return by direction the cosine of the mean change with it; NaN where too little is captured to say."""
    found = dict.fromkeys(directions, np.nan)
    table = a.directions[a.directions["direction"].isin(directions)]
    for _, mine in table.groupby(["component", "layer"], sort=False):  # the activations of a layer are read once
        labels = list(map(str, mine["direction"]))
        try:
            moved = model_diff(a.store, b.store, [a.along(name) for name in labels], rollouts=list(names))
        except DatastoreError:  # no rollout has a response that both captured at this layer
            continue
        found |= dict(zip(labels, map(float, moved["cosine"]), strict=True))
    return found
