"""Heatmaps of the overview: trait by token, trait by rollout, layer by token; and what is captured."""

import numpy as np
import panel as pn

from view.frame import NUMBERS, Host, View, later
from view.plots import Heatmap
from view.summaries import Summary, captured, summarise
from view.tables import html
from view.transcript import scales_of
from view.treatment import picked

__all__ = ["Captured", "Heatmaps"]

MOST_ROLLOUTS = 2000


class Heatmaps(View):
    """Scores as colours."""

    def __init__(self, page: Host) -> None:
        super().__init__(page)
        look = page.look
        self.tokens = Heatmap("trait by token", look, tapped=lambda x, _: self._pin(x))
        self.layers = Heatmap("layer by token", look, tapped=lambda x, _: self._pin(x))
        self.rollouts = Heatmap("trait by rollout", look, x="rollout", tapped=lambda x, _: self._go(x))
        self._names: list[str] = []
        plots = (self.tokens, self.layers, self.rollouts)
        self._panel = pn.Column(*(plot.panel() for plot in plots), sizing_mode="stretch_width")

    def panel(self) -> pn.Column:
        """Three heatmaps."""
        return self._panel

    def _pin(self, x: int) -> None:
        if 0 <= x < self.model.length(self.state.rollout):
            self.page.go(token=x)

    def _go(self, x: int) -> None:
        if 0 <= x < len(self._names):
            self.page.go(rollout=self._names[x])

    def update(self, changed: frozenset[str]) -> None:
        """Draw what changed."""
        state, model = self.state, self.model
        if changed & (NUMBERS | {"rollout", "trait", "traits", "layer"}):
            self._draw_tokens()
        if changed & {"store", "mode", "clean", "centred", "traits", "layer"} and model.scored:
            how = state.treatment
            later(lambda: summarise(model, how), self._draw_rollouts)
        at = state.token if state.token >= 0 else None
        self.tokens.show_cursor(at)
        self.layers.show_cursor(at)

    def _draw_tokens(self) -> None:
        state, model = self.state, self.model
        values, table, how = model.values(state.rollout, state.treatment), model.directions, state.treatment
        for plot, by in ((self.tokens, "trait"), (self.layers, "layer")):
            chosen = picked(table, by=by, trait=state.trait, traits=state.traits, layer=state.layer_number)
            chosen = chosen if values.shape[1] else []
            rows = [str(table["direction"].iloc[j]) for j in chosen]
            shown = values[:, chosen] - scales_of(values)[0][chosen]
            plot.draw(shown.T, rows, unit=how.mode, skip=4)
            what = "Traits" if by == "trait" else f"Layers of {state.trait}"
            plot.plot.title.text = f"{what}, {state.rollout}: values less each row's median"

    def _draw_rollouts(self, found: Summary) -> None:
        table, state = self.model.directions, self.state
        chosen = picked(table, traits=state.traits, layer=state.layer_number)
        labels = [str(table["direction"].iloc[j]) for j in chosen]
        means = found.means[labels].iloc[:MOST_ROLLOUTS]
        self._names = [str(name) for name in means.index]
        more = f" (the first {MOST_ROLLOUTS} of {len(found.means)})" if len(found.means) > MOST_ROLLOUTS else ""
        centred = means.to_numpy() - np.nanmean(means.to_numpy(), axis=0)
        self.rollouts.draw(centred.T, labels, columns=self._names, unit=state.mode, named_columns=True)
        self.rollouts.plot.title.text = f"Mean of each rollout less the mean of all{more}"


class Captured(View):
    """Which rollouts are captured at which layers, by component."""

    def __init__(self, page: Host) -> None:
        super().__init__(page)
        self._plots: dict[str, Heatmap] = {}
        self._note = html()
        self._panel = pn.Column(self._note, sizing_mode="stretch_width")

    def panel(self) -> pn.Column:
        """A heatmap for each component."""
        return self._panel

    def update(self, changed: frozenset[str]) -> None:
        """Draw the store's cells."""
        if "store" not in changed:
            return
        there = captured(self.model)
        for component, cells in there.items():
            if component not in self._plots:
                self._plots[component] = Heatmap(f"captured {component}", self.look, x="rollout")
                self._panel.append(self._plots[component].panel())
            shown = cells.iloc[:MOST_ROLLOUTS]
            rows = [f"layer {layer}" for layer in cells.columns]
            names = [str(name) for name in shown.index]
            plot = self._plots[component]
            plot.draw(shown.to_numpy(float).T, rows, columns=names, unit="captured", named_columns=True, limit=1.0)
        for name, plot in self._plots.items():
            plot.plot.visible = name in there
        share = {name: float(cells.to_numpy().mean()) if cells.size else 0.0 for name, cells in there.items()}
        said = "; ".join(f"{name}: {value:.0%} of rollouts x layers" for name, value in share.items())
        self._note.object = f"<p>{said or 'Nothing is captured.'}</p>"
