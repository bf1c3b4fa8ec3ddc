"""The table of rollouts with each one's mean and peak scores, and the strongest spans; a click goes there."""

from typing import Any

import numpy as np
import pandas as pd
import panel as pn
from bokeh.models import HTMLTemplateFormatter

from view.frame import NUMBERS, Host, View
from view.summaries import Summary, strongest, summarise
from view.tables import clickable, html
from view.treatment import picked

__all__ = ["RolloutTable", "Spans", "rollout_rows"]

MOST_LABELS = 6
MOST_TRAITS = 12
BAR = """<span style="position:relative;display:inline-block;width:60px;height:10px;border-left:1px solid #8a8a8a;
margin-right:6px"><i style="position:absolute;left:0;height:10px;width:<%= Math.min(60, 60 * Math.abs(value) / {scale})
%>px;background:<%= value < 0 ? '#2b83e2' : '#e66101' %>"></i></span><%= value === null || isNaN(value) ? '' :
value.toPrecision(3) %>"""
SPANS = {"rollout": "rollout", "start": "from", "stop": "to", "mean": "mean", "text": "text"}


def rollout_rows(table: pd.DataFrame, labels: list[str]) -> pd.DataFrame:
    """Return what the table shows of every rollout: rollout, tokens, the first label; set, tags, other labels."""
    shown = pd.DataFrame({"rollout": [str(name) for name in table.index]})
    shown["n_tokens"] = table["n_tokens"].to_numpy()
    names = [name for name in labels if name != "prompt_set"][:MOST_LABELS]
    columns = {name: [value if pd.notna(value) else "" for value in table[name]] for name in names}
    for label in names[:1]:
        shown[label] = columns[label]
    shown["prompt_set"] = table["prompt_set"].astype(str).to_numpy()
    shown["tags"] = [", ".join(map(str, tags)) for tags in table["tags"]]
    for label in names[1:]:
        shown[label] = columns[label]
    return shown


def _short(direction: str, traits: list[str]) -> str:
    """Leave a trait's category out, where its name is no other trait's as well."""
    trait = next((one for one in traits if direction.startswith(f"{one}@")), "")
    name = trait.rpartition("/")[2]
    alone = [one.rpartition("/")[2] for one in traits].count(name) == 1
    return name + direction.removeprefix(trait) if trait and alone else direction


class RolloutTable(View):
    """All rollouts, a page at a time; scores are added when they have been read."""

    def __init__(self, page: Host) -> None:
        super().__init__(page)
        self._summary: Summary | None = None
        self._titles = {"prompt_set": "set", "n_tokens": "tokens"}
        self.table = clickable(pd.DataFrame({"rollout": []}), self._choose, titles=self._titles, page_size=15)
        self.table.header_filters = True
        self.note = html()
        self._panel = pn.Column(self.note, self.table, sizing_mode="stretch_width")

    def panel(self) -> pn.Column:
        """The table."""
        return self._panel

    def _choose(self, row: int) -> None:
        self.page.go(rollout=str(self.table.value["rollout"].iloc[row]))

    def update(self, changed: frozenset[str]) -> None:
        """Show other rollouts or other scores; nothing where only the token changed."""
        if not changed & {"store", "mode", "clean", "centred", "velocity", "traits", "layer"}:
            return
        if "store" in changed:
            self._summary = None
            self.give_up()
            self._show()
        model, how = self.model, self.state.treatment
        if model.scored:
            self.later(lambda: summarise(model, how), self._add)

    def _add(self, found: Summary) -> None:
        self._summary = found
        self._show()

    def _show(self) -> None:
        model = self.model
        rows = rollout_rows(model.rollouts, model.labels)
        formatters: dict[str, Any] = {}
        titles = dict(self._titles)
        if self._summary is not None:
            means, peaks = (side.reindex(rows["rollout"]) for side in (self._summary.means, self._summary.peaks))
            for j in picked(model.directions, traits=self.state.traits, layer=self.state.layer_number)[:MOST_TRAITS]:
                direction = str(model.directions["direction"].iloc[j])
                for what, side in (("mean", means), ("peak", peaks)):
                    column = f"{direction} {what}"
                    values = side[direction].to_numpy()
                    rows.insert(list(rows).index("prompt_set"), column, values)  # before what is rarely looked for
                    scale = float(np.nanmax(np.abs(values), initial=0.0)) or 1.0
                    titles[column] = f"{_short(direction, model.traits)} {what}"
                    formatters[column] = HTMLTemplateFormatter(template=BAR.format(scale=scale))
        self.table.param.update(value=rows, formatters=formatters, titles=titles)
        self.note.object = self._said(len(rows))

    def _said(self, count: int) -> str:
        model = self.model
        if not count:
            return "<p>This store holds no rollouts. Capture some: <code>python -m capture --store …</code></p>"
        if not model.scored:
            return (
                "<p>This store has no scores; text and norms are shown. Make scores of your directions: "
                f"<code>python -m project {model.path.name} --vectors DIR</code></p>"
            )
        tokens = int(model.rollouts["n_tokens"].sum())
        partly = "" if len(model.scored) == count else f", {len(model.scored)} of them scored"
        return f"<p>{count:,} rollouts{partly}, {tokens:,} tokens. A click on a row shows that rollout.</p>"


class Spans(View):
    """The spans of the largest mean score, of the shown rollout or of all; a click goes there."""

    def __init__(self, page: Host) -> None:
        super().__init__(page)
        w, state = pn.widgets, page.state
        self.by = w.Select.from_param(state.param.spans, name="Spans of", options=["window", "clause"], width=140)
        self.window = w.IntInput.from_param(state.param.window, name="Window, tokens", start=1, end=100, width=140)
        self.scope = w.Select.from_param(state.param.scope, name="In", width=160)
        self.table = clickable(
            pd.DataFrame(columns=list(SPANS)), self._choose, titles=SPANS, page_size=20, numbers=["mean"]
        )
        self._heading = html()
        controls = pn.Row(self.by, self.window, self.scope)
        self._panel = pn.Column(controls, self._heading, self.table, sizing_mode="stretch_width")

    def panel(self) -> pn.Column:
        """Choices and spans."""
        return self._panel

    def _choose(self, row: int) -> None:
        one = self.table.value.iloc[row]
        self.page.go(rollout=str(one["rollout"]), token=int(one["start"]), view="Transcript")

    def update(self, changed: frozenset[str]) -> None:
        """Find the spans anew."""
        wanted = NUMBERS | {"trait", "layer", "spans", "window", "scope"}
        if self.state.scope == "this rollout":
            wanted |= {"rollout"}
        if not changed & wanted:
            return
        state, model, at = self.state, self.model, self.page.column()
        if at < 0 or (state.scope == "this rollout" and not model.is_scored(state.rollout)):
            self.give_up()
            self._show(pd.DataFrame(columns=list(SPANS)))
            return
        direction, how = str(model.directions["direction"].iloc[at]), state.treatment
        one = state.rollout if state.scope == "this rollout" else None
        by, window = state.spans, state.window
        self._heading.object = (
            f"<p>Strongest spans of {direction}: {how.unit}, not smoothed, the first four tokens left out.</p>"
        )

        def find() -> pd.DataFrame:
            peaks = None if one is not None else summarise(model, how, segment=None).peaks[direction]
            return strongest(model, how, direction, by=by, window=window, rollout=one, peaks=peaks)

        self.later(find, self._show)

    def _show(self, found: pd.DataFrame) -> None:
        self.table.value = found
