"""What holds of the model as a whole: how traits move together, and what a calibration says of its layers."""

import numpy as np
import pandas as pd
import panel as pn
import xarray as xr

import project
from view.frame import NUMBERS, Host, View
from view.plots import Heatmap, Lines
from view.summaries import calibration_tables
from view.tables import html, plain

__all__ = ["Calibration", "Correlation"]

MOST_LAG = 10


class Correlation(View):
    """Correlation of traits in the shown rollout, some tokens apart."""

    def __init__(self, page: Host) -> None:
        super().__init__(page)
        self.lag = pn.widgets.IntInput.from_param(
            page.state.param.lag, name="Lag, tokens (row first)", start=-MOST_LAG, end=MOST_LAG, width=170
        )
        self.matrix = Heatmap("correlation", page.look, x="")
        self.decay = Lines("correlation by lag", page.look, x="lag, tokens", y="correlation", height=280)
        self._found: xr.DataArray | None = None
        self._panel = pn.Column(self.lag, self.matrix.panel(), self.decay.panel(), sizing_mode="stretch_width")

    def panel(self) -> pn.Column:
        """Lag, matrix and decay."""
        return self._panel

    def update(self, changed: frozenset[str]) -> None:
        """Correlate anew, or show another lag."""
        state, model = self.state, self.model
        if not model.is_scored(state.rollout):
            self.decay.draw([], {})
            return
        if changed & (NUMBERS | {"rollout"}):
            rollout = (state.rollout,)
            scores, values = model.scores(rollout), model.treated(rollout, state.treatment)
            given = scores.assign(score=scores.score.copy(data=values.values)).isel(token=slice(4, None))
            self._found = project.lag_correlation(given, max_lag=MOST_LAG)
        found = self._found
        if found is None:
            return
        if changed & (NUMBERS | {"rollout", "lag"}):
            labels = list(map(str, found.direction.values))
            self.matrix.draw(
                found.sel(lag=state.lag).values, labels, columns=labels, unit="r", named_columns=True, limit=1.0
            )
            self.matrix.plot.title.text = f"Correlation in {state.rollout}, the column {state.lag} tokens later"
        if changed & (NUMBERS | {"rollout", "trait", "layer"}):
            one = str(model.directions["direction"].iloc[self.page.column()])
            curves = {str(other): found.sel(direction=one, other=other).values for other in found.other.values}
            self.decay.draw(found.lag.values, curves)
            self.decay.plot.title.text = f"{one} with each trait some tokens later"


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
