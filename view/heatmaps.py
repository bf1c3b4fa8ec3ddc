"""Heatmaps of the overview: trait by token, trait by rollout, layer by token; and what is captured."""

from typing import Any

import numpy as np
import pandas as pd
import panel as pn

from view.frame import NUMBERS, Host, View
from view.plots import Heatmap
from view.summaries import Summary, captured, summarise
from view.tables import html
from view.transcript import scales_of
from view.treatment import picked

__all__ = ["Captured", "Heatmaps"]

MOST_ROLLOUTS = 2000
"""That one heatmap shows: more than a screen has columns for."""


class Part:
    """The choice of which rollouts a heatmap shows, where they are more than it holds, and the words that say so.

    Parameters
    ----------
    page : Host
    """

    def __init__(self, page: Host) -> None:
        self._page, self._listening = page, True
        self.choice = pn.widgets.Select(name="Rollouts shown", options=[], width=180, visible=False)
        self.choice.param.watch(self._take, "value")
        self.note = html()

    def _take(self, event: Any) -> None:
        if self._listening and event.new:
            self._page.go(part=event.new)

    def of(self, count: int) -> slice:
        """Return which of so many rollouts are shown, and say so."""
        parts = max(1, -(-count // MOST_ROLLOUTS))
        edges = [(i * MOST_ROLLOUTS, min(count, (i + 1) * MOST_ROLLOUTS)) for i in range(parts)]
        at = min(self._page.state.part, parts)
        self._listening = False
        self.choice.options = {f"{start + 1:,} to {stop:,}": i for i, (start, stop) in enumerate(edges, start=1)}
        self.choice.value = at
        self._listening = True
        self.choice.visible = parts > 1
        start, stop = edges[at - 1]
        self.note.object = (
            f"<p>Rollouts {start + 1:,} to {stop:,} of {count:,}, in the store's order; the others are chosen above. "
            "Overview, Rollouts lists all, with filters.</p>"
            if parts > 1
            else ""
        )
        return slice(start, stop)


class Heatmaps(View):
    """Scores as colours."""

    def __init__(self, page: Host) -> None:
        super().__init__(page)
        look = page.look
        self.tokens = Heatmap("trait by token", look, tapped=lambda x, _: self._pin(x))
        self.layers = Heatmap("layer by token", look, tapped=lambda x, _: self._pin(x))
        self.rollouts = Heatmap("trait by rollout", look, x="rollout", tapped=lambda x, _: self._go(x))
        self.part = Part(page)
        self._summary: Summary | None = None
        self._names: list[str] = []
        parts = [self.tokens.panel(), self.layers.panel(), self.part.choice, self.part.note, self.rollouts.panel()]
        self._panel = pn.Column(*parts, sizing_mode="stretch_width")

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
        if "store" in changed and not model.scored:
            self._no_rollouts()
        elif changed & {"store", "mode", "clean", "centred", "velocity", "traits", "layer"} and model.scored:
            how = state.treatment
            self.later(lambda: summarise(model, how), self._draw_rollouts)
        elif "part" in changed and self._summary is not None:
            self._draw_rollouts(self._summary)
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

    def _no_rollouts(self) -> None:
        self.give_up()
        self._summary, self._names = None, []
        self.part.of(0)
        self.rollouts.draw(np.empty((0, 0), np.float32), [], named_columns=True)

    def _draw_rollouts(self, found: Summary) -> None:
        table, state = self.model.directions, self.state
        chosen = picked(table, traits=state.traits, layer=state.layer_number)
        labels = [str(table["direction"].iloc[j]) for j in chosen]
        self._summary = found
        every = found.means[labels]
        shown = every.iloc[self.part.of(len(every))]
        self._names = [str(name) for name in shown.index]
        centred = shown.to_numpy() - np.nanmean(every.to_numpy(), axis=0)
        self.rollouts.draw(centred.T, labels, columns=self._names, unit=state.mode, named_columns=True)
        self.rollouts.plot.title.text = "Mean of each rollout less the mean of all"


class Captured(View):
    """Which rollouts are captured at which layers, by component."""

    def __init__(self, page: Host) -> None:
        super().__init__(page)
        self._plots: dict[str, Heatmap] = {}
        self._there: dict[str, pd.DataFrame] = {}
        self.part = Part(page)
        self._note = html()
        self._panel = pn.Column(self._note, self.part.choice, self.part.note, sizing_mode="stretch_width")

    def panel(self) -> pn.Column:
        """A heatmap for each component."""
        return self._panel

    def update(self, changed: frozenset[str]) -> None:
        """Draw the store's cells."""
        if "store" in changed:
            self._there = captured(self.model)
        elif "part" not in changed:
            return
        there = self._there
        rows_shown = self.part.of(len(self.model.rollouts))
        for component, cells in there.items():
            if component not in self._plots:
                self._plots[component] = Heatmap(f"captured {component}", self.look, x="rollout")
                self._panel.append(self._plots[component].panel())
            shown = cells.iloc[rows_shown]
            rows = [f"layer {layer}" for layer in cells.columns]
            names = [str(name) for name in shown.index]
            plot = self._plots[component]
            plot.draw(shown.to_numpy(float).T, rows, columns=names, unit="captured", named_columns=True, limit=1.0)
        for name, plot in self._plots.items():
            plot.plot.visible = name in there
        share = {name: float(cells.to_numpy().mean()) if cells.size else 0.0 for name, cells in there.items()}
        said = "; ".join(f"{name}: {value:.0%} of rollouts x layers" for name, value in share.items())
        self._note.object = f"<p>{said or 'Nothing is captured.'}</p>"
