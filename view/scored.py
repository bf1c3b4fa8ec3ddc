"""Scores as a request asks for them: which directions and rollouts, how many numbers that is, cleaned and scaled."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from datastore.errors import AbsentError
from datastore.scores import Column, Place, known_columns
from project.cleaning import top_dims
from project.derive import cleaned, cosine, normalised, runs_of_rollouts
from project.modeldiff import difference
from view.asking import picked_layers
from view.request import known_rollouts
from view.shelf import Served

__all__ = ["Mode", "Wanted", "by_rollout", "in_mode", "read", "wanted"]

Mode = Literal["raw", "cosine", "normalised"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Wanted:
    """What is to be read, before anything is.

    Attributes
    ----------
    served : Served
    directions : DataFrame
        Rows of `Served.directions`.
    tokens : mapping of rollout id to its number of tokens
    """

    served: Served
    directions: pd.DataFrame
    tokens: Mapping[str, int]

    @property
    def n_values(self) -> int:
        """Scores that are read."""
        return sum(self.tokens.values()) * len(self.directions)


def wanted(
    served: Served,
    *,
    labels: Sequence[str] | None = None,
    traits: Sequence[str] | None = None,
    layers: str | None = None,
    rollouts: list[str] | None = None,
) -> Wanted:
    """Find the directions and the rollouts that are asked for; default all that have scores.

    Raises
    ------
    AbsentError
        Something has no scores; the message lists what has.
    """
    there = sorted({int(layer) for layer in served.directions()["layer"]})
    table = served.pick(labels=labels, traits=traits, layers=picked_layers(layers, there))
    cells = served.now().cells
    if rollouts is not None:
        names = known_rollouts(served.now(), rollouts)
    else:
        known = known_columns(served.results(), cells)
        keys = zip(table["component"], table["layer"], table["sha256"], strict=True)
        having: set[str] = set().union(
            *(known.get(Column("score", Place(str(c), int(n)), str(sha)), ()) for c, n, sha in keys)
        )
        names = [name for name in cells.index if name in having]
    if not names:
        raise AbsentError(
            f"the scores of store {served.name!r} are of rows that were replaced or dropped since; project it again"
        )
    return Wanted(
        served=served, directions=table, tokens={name: int(cells.counts[cells.index[name]]) for name in names}
    )


def read(asked: Wanted, *, less: Served | None = None, clean: str = "none") -> xr.Dataset:
    """Read scores, less those of another store, cleaned of massive dimensions.

    Parameters
    ----------
    asked : Wanted
    less : Served, optional
        Only rollouts, directions and layers that both scored are left.
    clean : str
        `none`, `top5-3layers`, `all`, or dimensions by commas.

    Raises
    ------
    AbsentError, MisuseError
        A rollout has no scores, cleaning lacks what it needs, or the two stores have nothing in common.
    """
    served = asked.served
    found = served.scores(asked.directions, rollouts=list(asked.tokens))
    if less is not None:
        same = wanted(less, traits=list(asked.directions["trait"].unique()))
        both = [name for name in same.tokens if name in asked.tokens]
        theirs = less.scores(same.directions, rollouts=both or list(same.tokens))
        found = difference(theirs, found)
    if clean == "none":
        return found
    for component in dict.fromkeys(found.component.values.tolist()):
        dims = top_dims(served.now(), component, out=served.beside)
        if not dims and clean in ("all", "top5-3layers"):
            raise AbsentError(
                f"{component} of store {served.name!r} was never calibrated, so no dimensions are known to clean; run "
                "python -m calibrate STORE, project again, or name the dimensions"
            )
        columns = np.flatnonzero(found.component.values == component)
        part = cleaned(found.isel(direction=columns), clean, top_dims=dims)
        score, norm = found.score.values.copy(), found.norm.values.copy()
        score[:, columns], norm[:, columns] = part.score.values, part.norm.values
        found = found.assign(score=found.score.copy(data=score), norm=found.norm.copy(data=norm))
    return found


def in_mode(scores: xr.Dataset, mode: Mode) -> xr.DataArray:
    """Return the scores raw, as cosines, or over their rollout's mean norm."""
    if mode == "cosine":
        return cosine(scores)
    found: xr.DataArray = normalised(scores) if mode == "normalised" else scores.score
    return found


def by_rollout(values: xr.DataArray) -> dict[str, NDArray[np.float32]]:
    """Return each rollout's values, (token, direction)."""
    return {name: values.values[run] for name, run in runs_of_rollouts(values)}
