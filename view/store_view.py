"""Two stores of the same rollouts, such as of two models: the difference token by token, and by trait."""

from typing import Any

import numpy as np
import pandas as pd
import panel as pn

from datastore.errors import MisuseError
from project.modeldiff import difference
from view.frame import NUMBERS, Host, View
from view.model import Model
from view.plots import Lines
from view.store_diff import Compared, compared
from view.tables import html, plain
from view.trajectories import bands_of, texts_of
from view.treatment import picked, treated

__all__ = ["Stores"]

TABLE = {
    "direction": "trait",
    "n_rollouts": "rollouts",
    "mean_a": "mean here",
    "mean_b": "mean there",
    "effect_size": "effect size d",
    "paired_effect_size": "paired effect size",
    "cosine": "cosine of the change",
}


class Stores(View):
    """The other store less this one."""

    def __init__(self, page: Host) -> None:
        super().__init__(page)
        self.other = pn.widgets.Select(name="Compared with the store", options=[], width=240)
        self.plot = Lines("store difference", page.look, height=320)
        self.table = plain(pd.DataFrame(columns=list(TABLE)), titles=TABLE, numbers=list(TABLE)[1:])
        self.note, self.words = html(), html()
        self._listening = True
        self.other.param.watch(self._take, "value")
        parts = (self.other, self.note, self.plot.panel(), self.words, self.table)
        self._panel = pn.Column(*parts, sizing_mode="stretch_width")

    def panel(self) -> pn.Column:
        """The choice, the difference and the table."""
        return self._panel

    def _take(self, event: Any) -> None:
        if self._listening and event.new:
            self.page.go(other_store=event.new)

    def update(self, changed: frozenset[str]) -> None:
        """Draw the difference of the shown rollout, and the table."""
        state = self.state
        names = [name for name in self.page.models.names if name != state.store]
        shown = state.other_store if state.other_store in names else next(iter(names), "")
        self._listening = False
        self.other.options, self.other.value = names, shown or None
        self._listening = True
        if not shown:
            self._nothing("Only one store is shown; name two to compare them: python -m view a.zarr b.zarr")
            return
        other = self.page.models[shown]
        if changed & (NUMBERS | {"rollout", "traits", "layer", "other_store", "against"}):
            self._draw(other)
        if changed & (NUMBERS | {"other_store", "traits"}):
            model, how = self.model, state.treatment
            self.later(lambda: compared(model, other, how), self._show)
        self.plot.show_cursor(state.token if state.token >= 0 else None)

    def _nothing(self, why: str) -> None:
        self.give_up()
        self.note.object = f"<p>{why}</p>"
        self.plot.draw([], {})
        self.table.value = pd.DataFrame(columns=list(TABLE))
        self.words.object = ""

    def _draw(self, other: Model) -> None:
        state, model = self.state, self.model
        rollout = (state.rollout,)
        try:
            if not (model.is_scored(state.rollout) and other.is_scored(state.rollout)):
                raise MisuseError(f"rollout {state.rollout} is not scored in both stores.")
            change = difference(model.scores(rollout), other.scores(rollout))
        except MisuseError as error:
            self.note.object = f"<p>{error}</p>"
            self.plot.draw([], {})
            return
        self.note.object = ""
        values = treated(change, state.treatment, top_dims=model.top_dims)
        labels = set(map(str, values.direction.values))
        table = model.directions[model.directions["direction"].isin(labels)]
        chosen = picked(table, traits=state.traits, layer=state.layer_number)
        curves = {str(values.direction.values[j]): values.values[:, j] for j in chosen}
        self.plot.show_bands(bands_of(model, state.rollout))
        self.plot.plot.title.text = f"{other.name} less {model.name}: {state.treatment.unit}, {state.rollout}"
        self.plot.draw(np.arange(len(values)), curves, texts=texts_of(model, state.rollout))

    def _show(self, found: Compared) -> None:
        table = found.table
        self.table.value = table[table["direction"].isin(self.model.drawn(self.state.traits))]
        read = "" if found.read == found.common else f" of {found.read} of them, evenly taken,"
        self.words.object = (
            f"<h2>What moved, over the responses of {found.common} rollouts that both hold</h2>"
            "<p>Means and effect sizes are of unsmoothed scores. The cosine is that of the mean change of the "
            f"activations,{read} as they are stored, with the trait: near 0 the models moved elsewhere.</p>"
        )
