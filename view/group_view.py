"""Groups of rollouts against each other: mean and bootstrap band by distance from the fork, turn, role, annotation."""

from dataclasses import replace

import numpy as np
import pandas as pd
import panel as pn

import project
from project import derive
from view import comparing
from view.frame import NUMBERS, Host, View
from view.plots import Lines
from view.summaries import sample, summarise
from view.tables import html, plain

__all__ = ["Groups"]

EFFECTS = {
    "direction": "trait",
    "n_reference": "n ref.",
    "n_other": "n others",
    "mean_reference": "mean ref.",
    "mean_other": "mean others",
    "difference": "change",
    "low": "95 % from",
    "high": "to",
    "effect_size": "effect d",
    "auroc": "AUROC",
}


class Groups(View):
    """Mean and band of each group, and a table of effect sizes."""

    def __init__(self, page: Host) -> None:
        super().__init__(page)
        w, state = pn.widgets, page.state
        self.label = w.Select(name="Group by", options=[], width=180)
        self.reference = w.Select(name="Compared with", options=[], width=180)
        self.per = w.Select.from_param(state.param.per, name="Along", width=180)
        self.plot = Lines("groups", page.look, x="tokens from the fork", height=320)
        self.effects = plain(pd.DataFrame(columns=list(EFFECTS)), titles=EFFECTS, numbers=list(EFFECTS)[1:])
        self.note = html()
        self._listening = True
        self.label.param.watch(lambda event: self._take(label=event.new, reference=""), "value")
        self.reference.param.watch(lambda event: self._take(reference=event.new), "value")
        controls = pn.Row(self.label, self.reference, self.per)
        titled = html(
            "<h2>Effect size by trait, over the rollouts' means</h2><p>Of the unsmoothed scores of their responses; "
            "positive where the others are above the reference.</p>",
            margin=(8, 5, 0, 5),
        )
        self._panel = pn.Column(
            controls, self.plot.panel(), self.note, titled, self.effects, sizing_mode="stretch_width"
        )

    def panel(self) -> pn.Column:
        """Choices, plot and table."""
        return self._panel

    def _take(self, **fields: str) -> None:
        if self._listening and all(value is not None for value in fields.values()):
            self.page.go(**fields)

    def update(self, changed: frozenset[str]) -> None:
        """Draw the groups anew."""
        state, model = self.state, self.model
        groups = model.groups(state.label)
        self._listening = False
        self.label.options, self.label.value = model.labels, state.label or None
        self.reference.options = sorted(set(groups.values()))
        self.reference.value = state.reference or None
        self._listening = True
        if not changed & (NUMBERS | {"trait", "layer", "label", "reference", "per", "against"}):
            return
        if not model.scored or not groups:
            self.give_up()
            self.plot.draw([], {})
            self.effects.value = pd.DataFrame(columns=list(EFFECTS))
            self.note.object = "<p>Groups need scores and a label of the rollouts.</p>"
            return
        self.later(self._curves, self._draw)
        if changed & (NUMBERS | {"label", "reference", "traits"}):
            self.later(self._effects, self._show)

    def _curves(self) -> tuple[str, pd.DataFrame, int]:
        """The table that is drawn: group, x, mean, low, high; of how many rollouts."""
        model, state = self.model, self.state
        names, groups, one, per = tuple(sample(model)), model.groups(state.label), self.page.column(), state.per
        how = state.treatment
        if per == "fork":  # curves that part at the fork, as those of a pair do, and are not blurred across it
            forks = model.forks(state.label, state.reference)
            values = model.treated(names, replace(how, smooth=1, velocity=False)).isel(direction=[one])
            values = comparing.smoothed_at_forks(values, how.smooth, forks=forks)
            values = derive.velocity(values) if how.velocity else values
            found = comparing.around_forks(values[:, 0], forks, groups)
            return per, found.rename(columns={"offset": "x"}), len(names)
        values = model.treated(names, how).isel(direction=[one])
        scores = model.scores(names).isel(direction=[one])
        given = scores.assign(score=scores.score.copy(data=values.values))
        found = project.compare(model.store, given, state.label, per=per)
        return per, found.rename(columns={per: "x"}), len(names)

    def _draw(self, result: tuple[str, pd.DataFrame, int]) -> None:
        per, table, count = result
        state = self.state
        if per != state.per or not len(table):
            self.plot.draw([], {})
            self.note.object = "<p>Nothing to average here.</p>" if per == state.per else ""
            return
        places = sorted(table["x"].unique())
        numeric = per in ("fork", "turn")
        x = np.array(places if numeric else range(len(places)), float)
        curves, bands = {}, {}
        for group, rows in table.groupby("group"):
            by = rows.set_index("x").reindex(places)
            curves[str(group)] = by["mean"].to_numpy()
            bands[str(group)] = (by["low"].to_numpy(), by["high"].to_numpy())
        self.plot.draw(x, curves, bands=bands, texts=[str(place) for place in places])
        self.plot.show_fork(0.0 if per == "fork" else None)
        self.plot.plot.xaxis[0].axis_label = "tokens from the fork" if per == "fork" else per
        self.plot.name_ticks(None if numeric else [str(place) for place in places])
        direction = self.model.directions["direction"].iloc[self.page.column()]
        self.plot.plot.title.text = f"{direction}: {state.treatment.unit}, mean and 95 % band over rollouts"
        every = len(self.model.scored)
        self.note.object = f"<p>{count} of {every} rollouts, evenly taken.</p>" if count < every else ""

    def _effects(self) -> pd.DataFrame:
        model, state = self.model, self.state
        means = summarise(model, state.treatment).means[model.drawn(state.traits)]
        return comparing.effects(means, model.groups(state.label), reference=state.reference)

    def _show(self, found: pd.DataFrame) -> None:
        self.effects.value = found
