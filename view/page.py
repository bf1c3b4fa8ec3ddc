"""The page: one Bokeh document for each visitor, with the controls beside the four views and the text below them."""

from collections.abc import Callable, Mapping
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import panel as pn

from datastore.query import Store
from view.browser import Browser
from view.compare_view import CompareView
from view.controls import Controls
from view.frame import ERRORS, NUMBERS, View, later, soon, wait_for_browser
from view.model import Model, Models
from view.overview import Overview
from view.plots import Look
from view.state import FIELDS, VIEWS, State, from_query, to_query
from view.summaries import percentiles
from view.tables import html
from view.trajectories import Trajectories
from view.transcript import Transcript, numbers_of, text_of
from view.treatment import picked

__all__ = ["Page", "app", "document"]

STATIC = Path(__file__).with_name("static")
WATCHED = [*FIELDS, "others"]
LOOK_AGAIN_MS = 5000


class Page:
    """One visitor's page.

    Parameters
    ----------
    models : Models
    query : str or mapping
        Of the address.
    dark : bool
    alone : bool
        It has the browser's window, and so its address, for itself; in a notebook it has not.
    """

    def __init__(
        self, models: Models, *, query: str | Mapping[str, Any] = "", dark: bool = False, alone: bool = True
    ) -> None:
        self.models, self.look, self.alone = models, Look(dark=dark), alone
        self.state = State(store=models.names[0])
        self.notice = html("", css_classes=["notice"], sizing_mode="stretch_width", visible=False)
        self.text = Transcript(dark=dark, sizing_mode="stretch_width")
        self.browser = Browser(address=alone, width=0, height=0, margin=0)
        self.controls = Controls(self)
        self._makers: dict[str, Callable[[Page], View]] = {
            "Overview": Overview,
            "Trajectories": Trajectories,
            "Compare": CompareView,
        }
        self._views: dict[str, View] = {}
        self._stale: dict[str, frozenset[str]] = {}
        self._main = pn.Column(sizing_mode="stretch_width", css_classes=["main"], min_width=600)
        self._quiet, self._due = False, frozenset[str]()
        self._restore(query)
        self.text.param.watch(self._pinned, "pinned")
        self.browser.param.watch(self._went, "query")
        self.state.param.watch(self._changed, WATCHED)
        self.update(frozenset(WATCHED))

    # -- state -----------------------------------------------------------------------------------------------------

    @property
    def model(self) -> Model:
        """The store that is shown, as it was when it was opened."""
        return self.models[self.state.store]

    def _restore(self, query: str | Mapping[str, Any]) -> None:
        values, wrong = from_query(query)
        missing = [f"{name} of the address can't be read" for name in wrong]
        if values.get("store") not in (None, *self.models.names):
            missing.append(f"the store {values.pop('store')!r} is not served here")
        self.state.param.update(**values)
        missing += self.fit()
        self.say("; ".join(missing) + "; something else is shown." if missing else "")

    def fit(self) -> list[str]:
        """Replace what the store does not have; return a sentence for each thing asked for that is not there."""
        model, state = self.model, self.state
        ids, traits = model.rollouts.index, model.traits
        missing = []
        wanted = [name for name in (state.rollout, *state.others) if name]
        missing += [f"the store has no rollout {name!r}" for name in wanted if name not in ids]
        missing += [
            f"there are no scores of the trait {name!r}"
            for name in (state.trait, *state.traits)
            if name and name not in traits
        ]
        shown = state.rollout if state.rollout in ids else model.first
        label = state.label if state.label in model.labels else next(iter(model.labels), "")
        fields = {
            "rollout": shown,
            "others": [name for name in state.others if name in ids and name != shown],
            "trait": state.trait if state.trait in traits else next(iter(traits), ""),
            "traits": [name for name in state.traits if name in traits],
            "label": label,
            "reference": state.reference
            if state.reference in model.groups(label).values()
            else (model.reference(label) or ""),
        }
        token = state.token if state.token < model.length(shown) else -1
        quiet, self._quiet = self._quiet, True
        try:
            state.param.update(**fields, token=token)
        finally:
            self._quiet = quiet
        return missing

    def _changed(self, *events: Any) -> None:
        if self._quiet:
            return
        changed = frozenset(event.name for event in events)
        self._quiet = True
        try:
            before = {name: getattr(self.state, name) for name in WATCHED}
            missing = self.fit()
            if "rollout" in changed and "token" not in changed:
                self.state.token = -1
            changed |= {name for name in WATCHED if getattr(self.state, name) != before[name]}
        finally:
            self._quiet = False
        self.say("; ".join(missing) + "." if missing else "")
        self._due |= changed
        soon(self._update_due)

    def _update_due(self) -> None:
        """Draw what several changes asked for, once."""
        due, self._due = self._due, frozenset()
        if due:
            self.update(due)

    def _pinned(self, event: Any) -> None:
        self.state.token = event.new

    def say(self, sentence: str) -> None:
        """Show a sentence above the views; nothing where it is empty."""
        self.notice.object = f'<div role="status">{escape(sentence)}</div>' if sentence else ""
        self.notice.visible = bool(sentence)

    def go(self, **fields: Any) -> None:
        """Look at something else."""
        self.state.param.update(**fields)

    # -- drawing ---------------------------------------------------------------------------------------------------

    def update(self, changed: frozenset[str]) -> None:
        """Draw what depends on these fields, in the view that is shown; the others when they are shown."""
        self.controls.update(changed)
        try:
            self._show_view(changed)
            self._show_text(changed)
        except ERRORS as error:
            self.say(str(error))
        self.browser.query = self._query()

    def _query(self) -> str:
        return to_query(self.state) + ("&theme=dark" if self.look.dark else "")

    def _went(self, event: Any) -> None:
        """Show what the address says, when the reader stepped back or forward."""
        if event.new != self._query():
            values, _ = from_query(event.new)
            known = {name: State.param[name].default for name in WATCHED if name != "store"} | values
            if known.get("store", self.state.store) in self.models.names:
                self.state.param.update(**known)

    def _show_view(self, changed: frozenset[str]) -> None:
        name = self.state.view
        for other in VIEWS:
            self._stale[other] = self._stale.get(other, frozenset(WATCHED)) | changed
        new = name in self._makers and name not in self._views
        if new:
            self._views[name] = self._makers[name](self)
        for other, view in self._views.items():
            view.panel().visible = other == name
        if name in self._views:
            stale, self._stale[name] = self._stale[name], frozenset()
            self._views[name].update(stale)
        if new:  # drawn before it is sent: the browser would be told of changes to what it does not know yet
            self._main.append(self._views[name].panel())

    def column(self) -> int:
        """The direction that shades the text, as a place in the table of directions; -1 where there is none."""
        table = self.model.directions
        chosen = picked(table, by="trait", traits=[self.state.trait], layer=self.state.layer_number)
        return chosen[0] if chosen else -1

    def _show_text(self, changed: frozenset[str]) -> None:
        state, model = self.state, self.model
        fields: dict[str, Any] = {"compact": state.view != "Transcript", "folded": state.folded, "pinned": state.token}
        if changed & {"store", "rollout"}:
            fields["text"] = text_of(model, state.rollout) if state.rollout else {"texts": [], "blocks": []}
        fields["column"] = self.column()
        try:
            if changed & (NUMBERS | {"rollout"}):
                fields["numbers"] = self._numbers()
        finally:
            self.text.visible = bool(state.rollout)
            self.text.param.update(**fields)

    def _numbers(self) -> dict[str, Any]:
        """Values of the shown rollout; percentiles follow when they are known."""
        model, state = self.model, self.state
        how, rollout = state.treatment, state.rollout
        if not rollout or not model.is_scored(rollout):
            return {}
        values, labels = model.values(rollout, how), list(map(str, model.directions["direction"]))
        known = model.kept(("percentiles", how))
        if known is None:
            add = partial(self._add_percentiles, model, how)
            later(lambda: percentiles(model, how), add, failed=self.say)
        return numbers_of(values, labels, unit=how.unit, quantiles=known)

    def _add_percentiles(self, model: Model, how: Any, found: Any) -> None:
        if model is self.model and how == self.state.treatment and self.text.numbers:
            quantiles, sampled = found
            extra = {"quantiles": quantiles.reshape(-1), "steps": quantiles.shape[1], "sampled": sampled}
            self.text.numbers = {**self.text.numbers, **extra}

    # -- the whole -------------------------------------------------------------------------------------------------

    def panel(self) -> pn.Column:
        """The whole page."""
        main = pn.Column(
            self.notice, self._main, self.text, sizing_mode="stretch_width", min_width=600, margin=(0, 14, 0, 0)
        )
        body = pn.Row(self.controls.sidebar, main, sizing_mode="stretch_width")
        return pn.Column(
            self.controls.header,
            body,
            self.browser,
            sizing_mode="stretch_width",
            css_classes=["page", "dark" if self.look.dark else "light"],
        )

    def look_again(self) -> None:
        """Offer to reload where the store has changed since it was opened."""
        try:
            self.controls.offer_reload(self.model.changed())
        except ERRORS as error:  # it was taken away, or is no store any more
            self.say(str(error))

    def reload(self) -> None:
        """Show the store as it is now."""
        self.models.reopen(self.state.store)
        missing = self.fit()
        self.say("; ".join(missing) + "; something else is shown." if missing else "")
        self.controls.offer_reload(False)
        self._due |= frozenset(WATCHED)
        soon(self._update_due)


def app(*stores: Store | str | Path) -> pn.viewable.Viewable:
    """Return the viewer as a Panel object, for a notebook; all that draws it goes along, so that no network is needed.

    Parameters
    ----------
    stores : Store or path
    """
    import datastore

    pn.extension("tabulator", inline=True)
    opened = [store if isinstance(store, Store) else datastore.open(store) for store in stores]
    return Page(Models(opened), alone=False).panel()


def document(models: Models) -> pn.viewable.Viewable:
    """Return the page of one visitor, as the address says; for the server."""
    given = dict(pn.state.session_args or {})
    dark = given.pop("theme", [b""])[0] == b"dark"
    pn.config.raw_css = [*pn.config.raw_css, _css(dark=dark)]
    wait_for_browser()
    page = Page(models, query=given, dark=dark)
    pn.state.add_periodic_callback(page.look_again, LOOK_AGAIN_MS)
    return page.panel()


def _css(*, dark: bool) -> str:
    colours = ":root { --page: #1b1e23; --page-ink: #e8e8e8; color-scheme: dark; }" if dark else ""
    return (STATIC / "page.css").read_text(encoding="utf-8") + colours
