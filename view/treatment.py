"""How scores are turned into what is drawn: cleaned, divided, centred, smoothed or differenced; and which lines."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import xarray as xr

from datastore.errors import AbsentError, MisuseError
from project import derive

__all__ = ["CLEANING", "LINES", "MODES", "UNITS", "Treatment", "picked", "treated"]

MODES = ("cosine", "normalised", "raw")
CLEANING = ("none", "top5-3layers", "all")
LINES = ("trait", "layer", "component")
UNITS = {"cosine": "cosine of token and direction", "normalised": "score / mean norm", "raw": "score"}
TopDims = Callable[[str], Mapping[int, Sequence[int]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Treatment:
    """What is done to scores, in this order: cleaning, mode, centring, smoothing, velocity.

    Attributes
    ----------
    mode : str
        `cosine`, `normalised` (over the mean norm of the response) or `raw`.
    clean : str
        Which massive dimensions are taken out: `none`, `top5-3layers`, `all`.
    centred : bool
        Less the value at the first token.
    smooth : int
        Tokens of the moving average; 1 for none.
    velocity : bool
        Less the value at the token before.
    """

    mode: str = "cosine"
    clean: str = "none"
    centred: bool = False
    smooth: int = 5
    velocity: bool = False

    def __post_init__(self) -> None:
        for what, value, known in (("mode", self.mode, MODES), ("clean", self.clean, CLEANING)):
            if value not in known:
                raise MisuseError(f"{what} {value!r} is not known; choose one of {', '.join(known)}")
        if not 1 <= self.smooth <= 25:
            raise MisuseError(f"a smoothing window of {self.smooth} tokens is not between 1 and 25; give one that is")

    @property
    def unsmoothed(self) -> "Treatment":
        """The same without smoothing, for what is a mean or a maximum already."""
        return replace(self, smooth=1)

    @property
    def unit(self) -> str:
        """What one unit of the values is."""
        return UNITS[self.mode] + (" per token" if self.velocity else "")


def treated(scores: xr.Dataset, how: Treatment, *, top_dims: TopDims) -> xr.DataArray:
    """Return the values that are drawn, (token, direction), by the formulas of `project.derive`.

    Raises
    ------
    AbsentError
        Cleaning is asked for, and no calibration names massive dimensions, or their activations were not kept.
    """
    if how.clean != "none":
        scores = _cleaned(scores, how.clean, top_dims)
    if how.mode == "cosine":
        values = derive.cosine(scores)
    elif how.mode == "normalised":
        values = derive.normalised(scores)
    else:
        values = scores.score
    if how.centred:
        values = derive.centred(values)
    if how.smooth > 1:
        values = derive.smooth(values, how.smooth)
    return derive.velocity(values) if how.velocity else values


def _cleaned(scores: xr.Dataset, rule: str, top_dims: TopDims) -> xr.Dataset:
    score, norm = scores.score.values.copy(), scores.norm.values.copy()
    for component in dict.fromkeys(map(str, scores.component.values)):
        named = top_dims(component)
        if not named:
            raise AbsentError(
                f"no calibration of {component} says which dimensions are massive, so nothing can be cleaned; run "
                "python -m calibrate STORE, then python -m project STORE --vectors DIR again"
            )
        mine = np.flatnonzero(scores.component.values == component)
        kept = derive.cleaned(scores.isel(direction=mine), rule, top_dims=named)
        score[:, mine], norm[:, mine] = kept.score.values, kept.norm.values
    return scores.assign(score=scores.score.copy(data=score), norm=scores.norm.copy(data=norm))


def picked(
    directions: pd.DataFrame,
    *,
    by: str = "trait",
    trait: str | None = None,
    traits: Sequence[str] = (),
    layer: int | None = None,
) -> list[int]:
    """Return which directions are drawn, as places in the table.

    Parameters
    ----------
    directions : DataFrame
        trait, layer, component, in order.
    by : str
        `trait`: a line for each of `traits` (all where empty); `layer`: one for each layer of `trait`; `component`:
        one for each component of `trait`.
    trait : str, optional
        The first one where it is left out, or has no scores.
    traits : sequence of str
    layer : int, optional
        Of several layers of a trait the nearest one is taken; the first where it is left out.
    """
    if not len(directions):
        return []
    if by not in LINES:
        raise MisuseError(f"lines by {by!r} are not known; choose one of {', '.join(LINES)}")
    table = directions.reset_index(drop=True)
    one = trait if trait in set(table["trait"]) else str(table["trait"].iloc[0])
    mine = table[table["trait"] == one]
    if by == "layer":
        return [int(i) for i in mine.index[mine["component"] == mine["component"].iloc[0]]]
    if by == "component":
        return [_nearest(group, layer) for _, group in mine.groupby("component", sort=False)]
    wanted = [name for name in dict.fromkeys(table["trait"]) if not traits or name in set(traits)]
    return [_nearest(table[table["trait"] == name], layer) for name in wanted]


def _nearest(group: pd.DataFrame, layer: int | None) -> int:
    if layer is None:
        return int(group.index[0])
    return int(group.index[int(np.argmin(np.abs(group["layer"].to_numpy() - layer)))])
