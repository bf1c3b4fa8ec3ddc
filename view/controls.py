"""The controls: above the page the store, the view and the theme; beside it what is shown and how."""

from typing import Any

import panel as pn

from view.frame import Host
from view.state import FIRST, VIEWS
from view.tables import choice, html
from view.treatment import CLEANING, LINES, MODES

__all__ = ["Controls"]

WIDTH = 230
TOO_MANY = 2000
"""Rollout ids that are offered while one is typed."""
TRAITS_IN = {
    "Overview": ("Rollouts", "Heatmaps", "Correlation"),
    "Trajectories": ("trait",),
    "Compare": ("Pair", "Groups", "Stores"),
}
"""Where a list of traits chooses what is drawn: by view, then by section, comparison or kind of line."""
NOT_SMOOTHED = {
    "Rollouts": "Means and peaks are not smoothed; the text is.",
    "Heatmaps": "Means of rollouts are not smoothed; tokens are.",
    "Spans": "Spans are means already, and not smoothed; the text is.",
    "Pair": "Curves and text are smoothed; what moves first is told from scores that are not.",
    "Groups": "Curves are smoothed; effect sizes are of scores that are not.",
    "Stores": "Curves are smoothed; the table is of scores that are not.",
    "Calibration": "Scores are in the text alone here.",
    "Captured": "Scores are in the text alone here.",
}
"""What smoothing leaves as it is, said below its control."""
LOOK = "const url = new URL(location.href); url.searchParams.set('theme', {theme!r}); location.assign(url);"


class Controls:
    """Widgets bound to the page's state.

    Parameters
    ----------
    page : Host
    """

    def __init__(self, page: Host) -> None:
        self.page = page
        state = page.state
        w = pn.widgets
        fixed: dict[str, Any] = {"width": WIDTH, "margin": (2, 5)}
        self.store = w.Select.from_param(
            state.param.store, name="Store", description=None, options=page.models.names, width=200
        )
        self.view = choice(state.param.view, name="View", options=list(VIEWS), margin=(18, 10))
        self.rollout = w.AutocompleteInput(name="Rollout", case_sensitive=False, min_characters=1, **fixed)
        self.before = w.Button(name="← before", width=WIDTH // 2 - 6, margin=(2, 5), css_classes=["before"])
        self.after = w.Button(name="next →", width=WIDTH // 2 - 6, margin=(2, 5), css_classes=["after"])
        self.others = w.TextInput(name="Compare with (ids, by commas)", **fixed)
        self.trait = w.Select(name="Trait", options=[], **fixed)
        self.layer = w.Select(name="Layer", options=[FIRST], **fixed)
        self.lines = w.Select.from_param(state.param.lines, name="One line for each", options=list(LINES), **fixed)
        self.mode = w.Select.from_param(state.param.mode, name="Scores as", options=list(MODES), **fixed)
        self.clean = w.Select.from_param(
            state.param.clean, name="Massive dimensions taken out", options=list(CLEANING), **fixed
        )
        self.smooth = w.IntInput.from_param(state.param.smooth, name="Smoothing, tokens", start=1, end=25, **fixed)
        self.centred = w.Checkbox.from_param(state.param.centred, name="Centred on the first token", **fixed)
        self.velocity = w.Checkbox.from_param(state.param.velocity, name="Velocity (change per token)", **fixed)
        self.folded = w.Checkbox.from_param(state.param.folded, name="Fold thinking", **fixed)
        self.traits = w.CheckBoxGroup(name="Traits drawn", **fixed)
        self._titled = html("<h2>Traits drawn</h2>", margin=(6, 5, 0, 5))
        self.note = html()
        self._asked = w.Button(
            name="The store has changed: reload", button_type="warning", visible=False, margin=(18, 5)
        )
        self._bind()

    def _bind(self) -> None:
        self._listening = True
        self.rollout.param.watch(self._choose, "value")
        self.others.param.watch(self._compare, "value")
        self.traits.param.watch(self._draw_traits, "value")
        self.trait.param.watch(lambda event: self._take("trait", event.new), "value")
        self.layer.param.watch(lambda event: self._take("layer", event.new), "value")
        self.before.on_click(lambda _: self._step(-1))
        self.after.on_click(lambda _: self._step(1))
        self._asked.on_click(lambda _: self.page.reload())

    # -- what the reader does --------------------------------------------------------------------------------------

    def _take(self, field: str, value: str | None) -> None:
        if self._listening and value:
            self.page.go(**{field: value})

    def _choose(self, event: Any) -> None:
        if self._listening and event.new:
            self.page.go(rollout=event.new)

    def _compare(self, event: Any) -> None:
        if self._listening:
            self.page.go(others=[name for part in event.new.split(",") if (name := part.strip())])

    def _draw_traits(self, event: Any) -> None:
        if self._listening:
            every = len(event.new) == len(self.traits.options)
            self.page.go(traits=[] if every else list(event.new))

    def _step(self, by: int) -> None:
        ids = self.page.model.rollouts.index
        if len(ids):
            at = list(ids).index(self.page.state.rollout)
            self.page.go(rollout=str(ids[(at + by) % len(ids)]))

    # -- what the page says ----------------------------------------------------------------------------------------

    def update(self, changed: frozenset[str]) -> None:
        """Show the state in the widgets that are not bound to it by themselves."""
        state, model = self.page.state, self.page.model
        self._listening = False
        try:
            if "store" in changed:
                ids = [str(name) for name in model.rollouts.index]
                self.rollout.options = ids if len(ids) <= TOO_MANY else ids[:TOO_MANY]
                self.rollout.restrict = len(ids) <= TOO_MANY
                self.trait.options = model.traits
                layers = sorted({int(layer) for layer in model.directions["layer"]})
                self.layer.options = [FIRST, *map(str, layers)]
                self.traits.options = model.traits
            self.rollout.value = state.rollout
            self.trait.value = state.trait or None
            self.layer.value = state.layer if state.layer in self.layer.options else FIRST
            self.others.value = ", ".join(state.others)
            self.traits.value = list(state.traits or model.traits)
            self._show_what_works()
        finally:
            self._listening = True

    def _show_what_works(self) -> None:
        """Show only the controls that change something in the view that is shown, or in the text below it."""
        state = self.page.state
        view = state.view
        inside = {"Overview": state.section, "Compare": state.against}.get(view, state.lines)
        self.lines.visible = view == "Trajectories"
        self.others.visible = (view, inside) == ("Compare", "Pair")
        self._titled.visible = self.traits.visible = inside in TRAITS_IN.get(view, ())
        said = NOT_SMOOTHED.get(inside, "")
        self.note.object = f"<p>{said}</p>" if said else ""

    def offer_reload(self, changed: bool) -> None:
        """Show the button that opens the store anew, or hide it."""
        self._asked.visible = changed

    # -- layout ----------------------------------------------------------------------------------------------------

    @property
    def header(self) -> pn.Row:
        """What stands above the page."""
        dark = self.page.look.dark
        theme = pn.widgets.Button(name="Light" if dark else "Dark", margin=(18, 5), css_classes=["theme"])
        theme.js_on_click(code=LOOK.format(theme="light" if dark else "dark"))
        title = html("<h1>Activations</h1>", margin=(8, 10), width=120, height=50, sizing_mode="fixed")
        return pn.Row(
            title,
            self.store,
            self.view,
            pn.layout.HSpacer(),
            self._asked,
            *([theme] if self.page.alone else []),
            sizing_mode="stretch_width",
            css_classes=["header"],
        )

    @property
    def sidebar(self) -> pn.Column:
        """What stands beside the page."""
        return pn.Column(
            self.rollout,
            pn.Row(self.before, self.after, margin=0),
            self.others,
            self.trait,
            self.layer,
            self.mode,
            self.clean,
            self.smooth,
            self.note,
            self.centred,
            self.velocity,
            self.folded,
            self.lines,
            self._titled,
            self.traits,
            width=WIDTH + 20,
            css_classes=["sidebar"],
        )
