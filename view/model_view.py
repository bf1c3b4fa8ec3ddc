"""What holds of the model as a whole: how traits move together, and what a calibration says of its layers."""

from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd
import panel as pn
import xarray as xr

import project
from view.frame import NUMBERS, Host, View
from view.model import Model
from view.plots import SINK, Heatmap, Lines
from view.summaries import calibration_tables, sample
from view.tables import html, plain
from view.treatment import Treatment

__all__ = ["Calibration", "Correlation"]

MOST_LAG = 10
MOST_TOKENS = 50_000
"""That stand for all where traits are correlated in all rollouts."""
Asked = tuple[Model, tuple[str, ...], Treatment]


class Correlation(View):
    """Correlation of traits some tokens apart, in the shown rollout or in all."""

    def __init__(self, page: Host) -> None:
        super().__init__(page)
        self.lag = pn.widgets.IntInput.from_param(
            page.state.param.lag, name="Lag, tokens (row first)", start=-MOST_LAG, end=MOST_LAG, width=170
        )
        self.scope = pn.widgets.Select.from_param(page.state.param.scope, name="Correlation in", width=160)
        self.matrix = Heatmap("correlation", page.look, x="")
        self.decay = Lines("correlation by lag", page.look, x="lag, tokens", y="correlation", height=280)
        self._found: Correlated | None = None
        self._asked: Asked | None = None
        controls = pn.Row(self.lag, self.scope)
        self._panel = pn.Column(controls, self.matrix.panel(), self.decay.panel(), sizing_mode="stretch_width")

    def panel(self) -> pn.Column:
        """Choices, matrix and decay."""
        return self._panel

    def update(self, changed: frozenset[str]) -> None:
        """Correlate anew, or show another lag."""
        state, model = self.state, self.model
        every = state.scope == "all rollouts"
        if not (model.scored if every else model.is_scored(state.rollout)):
            self._found = self._asked = None
            self.matrix.draw(np.empty((0, 0), np.float32), [])
            self.decay.draw([], {})
            return
        if changed & (NUMBERS | {"scope"} | (frozenset() if every else {"rollout"})):
            names, how = tuple(sample(model, tokens=MOST_TOKENS)) if every else (state.rollout,), state.treatment
            self._asked = (model, names, how)
            find = partial(_correlated, *self._asked)
            self.later(find, self._take) if every else self._take(find())
        elif changed & {"lag", "trait", "traits", "layer"}:
            self._draw()

    def _take(self, found: "Correlated") -> None:
        if found.asked == self._asked:  # and not what was asked before it
            self._found = found
            self._draw()

    def _draw(self) -> None:
        """Show a lag of what was found, and how the chosen trait goes with the others."""
        state, model = self.state, self.model
        if self._found is None:
            return
        (_, names, _), found = self._found
        labels = model.drawn(state.traits)
        now = found.sel(lag=state.lag, direction=labels, other=labels).values
        self.matrix.draw(now, labels, columns=labels, unit="r", named_columns=True, limit=1.0)
        inside = names[0] if len(names) == 1 else f"{len(names):,} rollouts"
        part = f" of {len(model.scored):,}, evenly taken" if 1 < len(names) < len(model.scored) else ""
        self.matrix.plot.title.text = f"Correlation in {inside}{part}, the column {state.lag} tokens later"
        one = str(model.directions["direction"].iloc[self.page.column()])
        self.decay.draw(found.lag.values, {name: found.sel(direction=one, other=name).values for name in labels})
        self.decay.plot.title.text = f"{one} with each trait some tokens later"


class Correlated(NamedTuple):
    """Correlations by lag, and what they are of."""

    asked: Asked
    values: xr.DataArray


def _correlated(model: Model, names: tuple[str, ...], how: Treatment) -> Correlated:
    scores, values = model.scores(names), model.treated(names, how)
    given = scores.assign(score=scores.score.copy(data=values.values))
    beyond = given.isel(token=np.flatnonzero(scores.position.values >= SINK))
    return Correlated((model, names, how), project.lag_correlation(beyond, max_lag=MOST_LAG))


class Calibration(View):
    """Massive dimensions, norms and alignment of every layer, at its true number."""

    def __init__(self, page: Host) -> None:
        super().__init__(page)
        self.norms = Lines("norm by layer", page.look, x="layer", y="token norm", height=230)
        self.alignment = Lines("alignment by layer", page.look, x="layer", y="mean cosine with the mean", height=230)
        self.massive = Lines("massive dimensions", page.look, x="layer", y="times the median dimension", height=230)
        self.table = plain(pd.DataFrame(), titles={})
        self.note = html()
        plots = [plot.panel() for plot in (self.norms, self.alignment, self.massive)]
        self._panel = pn.Column(self.note, *plots, self.table, sizing_mode="stretch_width")

    def panel(self) -> pn.Column:
        """Three plots over the layers, and their numbers."""
        return self._panel

    def update(self, changed: frozenset[str]) -> None:
        """Draw the newest calibrations."""
        if "store" not in changed:
            return
        tables = calibration_tables(self.model)
        name = self.model.path.name
        self.note.object = "" if tables else f"<p>No calibration yet: <code>python -m calibrate {name}</code></p>"
        layers = sorted({int(layer) for table in tables.values() for layer in table.index})
        whole = {component: table.reindex(layers) for component, table in tables.items()}
        x = np.array(layers, float)
        self.norms.draw(
            x,
            {component: table["norm"].to_numpy() for component, table in whole.items()},
            bands={c: (table["norm_low"].to_numpy(), table["norm_high"].to_numpy()) for c, table in whole.items()},
        )
        self.alignment.draw(x, {component: table["alignment"].to_numpy() for component, table in whole.items()})
        self.massive.draw(x, _massive(whole, layers))
        rows = [table.reset_index().assign(component=component) for component, table in tables.items()]
        self.table.value = pd.concat(rows, ignore_index=True).round(4) if rows else pd.DataFrame()


def _massive(
    tables: dict[str, pd.DataFrame], layers: list[int]
) -> dict[str, "np.ndarray[tuple[int], np.dtype[np.float64]]"]:
    """Return a curve for each dimension that is among the five largest of any layer: its ratio there, else NaN."""
    curves: dict[str, np.ndarray[tuple[int], np.dtype[np.float64]]] = {}
    for component, table in tables.items():
        for rank in range(1, 6):
            if f"dim_{rank}" not in table:
                continue
            for i, (dim, ratio) in enumerate(zip(table[f"dim_{rank}"], table[f"ratio_{rank}"], strict=True)):
                if pd.notna(dim) and dim >= 0:
                    curve = curves.setdefault(f"{component} dim {int(dim)}", np.full(len(layers), np.nan))
                    curve[i] = ratio
    strongest = sorted(curves, key=lambda name: -np.nanmax(curves[name]))[:8]
    return {name: curves[name] for name in strongest}
