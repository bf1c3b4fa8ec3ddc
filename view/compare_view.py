"""The comparison: rollouts that share a prefix on the same axes, groups with bands, two stores."""

from html import escape
from typing import Any

import numpy as np
import pandas as pd
import panel as pn
import xarray as xr

from datastore.errors import AbsentError
from view import comparing
from view.frame import NUMBERS, Host, View
from view.group_view import Groups
from view.plots import Lines
from view.state import FIRST
from view.store_view import Stores
from view.tables import choice, clickable, html
from view.trajectories import called, texts_of
from view.treatment import Treatment, picked

__all__ = ["CompareView"]

PAIRS = {"a": "a", "b": "b", "fork": "fork at", "shared": "shared", "label_a": "a is", "label_b": "b is"}
MOVES = {
    "direction": "trait",
    "tokens_after": "tokens later",
    "moved_at": "at",
    "text": "token",
    "difference": "SD",
    "peak": "SD max",
}
NEAR = 12
FAR = 70


class CompareView(View):
    """The three comparisons, of which one is shown."""

    def __init__(self, page: Host) -> None:
        super().__init__(page)
        self._choice = choice(page.state.param.against, name="What is compared")
        self._parts: dict[str, View] = {"Pair": Pair(page), "Groups": Groups(page), "Stores": Stores(page)}
        self._stale = dict.fromkeys(self._parts, frozenset[str]())
        parts = [part.panel() for part in self._parts.values()]
        self._panel = pn.Column(self._choice, *parts, sizing_mode="stretch_width")

    def panel(self) -> pn.Column:
        """The choice, and what was chosen."""
        return self._panel

    def update(self, changed: frozenset[str]) -> None:
        """Draw the comparison that is shown."""
        shown = self.state.against
        for name, part in self._parts.items():
            self._stale[name] |= changed
            part.panel().visible = name == shown
        stale, self._stale[shown] = self._stale[shown], frozenset()
        self._parts[shown].update(stale)


class Pair(View):
    """Rollouts aligned at their common prefix: their curves, what they differ by, and what moves first."""

    def __init__(self, page: Host) -> None:
        super().__init__(page)
        self.curves = Lines("rollouts", page.look, height=250, tapped=self._pin)
        self.difference = Lines("difference", page.look, height=250, tapped=self._pin)
        self.difference.plot.x_range = self.curves.plot.x_range
        self.pairs = clickable(pd.DataFrame(columns=list(PAIRS)), self._choose, titles=PAIRS, page_size=6)
        self.moves = clickable(
            pd.DataFrame(columns=list(MOVES)),
            self._look_at,
            titles=MOVES,
            page_size=8,
            numbers=("difference", "peak", "tokens_after", "moved_at"),
        )
        self.texts = html()
        self._found = pd.DataFrame(columns=list(PAIRS))
        self._moves = pd.DataFrame(columns=[*MOVES, "peak_at"])
        self._chosen = False
        self._looked_at: tuple[Any, ...] = ()
        self._heading = html()
        upper = pn.Row(
            pn.Column(html("<h2>Pairs that share a prefix</h2>", margin=0), self.pairs, width=418),
            pn.Column(self._heading, self.moves, min_width=420),
            sizing_mode="stretch_width",
        )
        self._panel = pn.Column(
            upper, self.curves.panel(), self.difference.panel(), self.texts, sizing_mode="stretch_width"
        )

    def panel(self) -> pn.Column:
        """Pairs, curves, difference, texts."""
        return self._panel

    def _pin(self, x: float) -> None:
        self.page.go(token=int(np.clip(round(x), 0, max(0, self.model.length(self.state.rollout) - 1))))

    def _choose(self, row: int) -> None:
        one = self._found.iloc[row]
        self.page.go(rollout=str(one["a"]), others=[str(one["b"])], token=int(one["fork"]))

    def _look_at(self, row: int) -> None:
        """Show the trait and layer of a row in the upper plot and in the text, where it moved or else differs most."""
        table = self.model.directions.set_index("direction")
        one = self._moves.iloc[row]
        places = [int(place) for place in (one["moved_at"], one["peak_at"]) if pd.notna(place)]
        at = {"token": places[0]} if places else {}
        direction = table.loc[one["direction"]]
        self.page.go(trait=str(direction["trait"]), layer=str(direction["layer"]), **at)

    def update(self, changed: frozenset[str]) -> None:
        """Find the pairs when they are asked for first; draw those that are compared."""
        state, model = self.state, self.model
        if changed & {"store", "label", "reference"}:
            label, reference = state.label or None, state.reference or None
            self.later(lambda: model.pairs(label, reference), self._show_pairs)
        if changed & {"store", "rollout", "others"}:  # what a reader chose is not replaced by what is found later
            self._chosen = "store" not in changed or bool(state.others)
        if changed & (NUMBERS | {"rollout", "others", "trait", "traits", "layer"}):
            self._draw()
        at = state.token if state.token >= 0 else None
        self.curves.show_cursor(at)
        self.difference.show_cursor(at)

    def _show_pairs(self, found: pd.DataFrame) -> None:
        self._found = found
        shown = found[list(PAIRS)].copy()
        shown["shared"] = [f"{share:.0%}" for share in shown["shared"]]
        self.pairs.value = shown
        if not self._chosen and len(found):
            shows = self.state.rollout
            mine = found if shows == self.model.first else found[(found["a"] == shows) | (found["b"] == shows)]
            if len(mine):
                self._offer(mine.iloc[0])

    def _offer(self, one: "pd.Series[Any]") -> None:
        """Show the best pair, at its fork, and by what moves first in it unless a trait or a layer was chosen."""
        state, model, names = self.state, self.model, (str(one["a"]), str(one["b"]))
        fields: dict[str, Any] = {}
        if state.token < 0 or state.rollout != names[0]:
            fields["token"] = int(one["fork"])
        if state.trait == next(iter(model.traits), "") and state.layer == FIRST and all(map(model.is_scored, names)):
            first = self._find_moves(names)[0]["direction"].iloc[0]
            direction = model.directions.set_index("direction").loc[first]
            fields |= {"trait": str(direction["trait"]), "layer": str(direction["layer"])}
        self.page.go(rollout=names[0], others=[names[1]], **fields)

    def _draw(self) -> None:
        model, state = self.model, self.state
        names = tuple(name for name in state.rollouts if model.is_scored(name))
        if len(names) < 2:
            self._clear("" if model.scored else "These rollouts have no scores.")
            return
        fork = model.fork(names)
        how = state.treatment
        aligned = comparing.smoothed_apart(self._unsmoothed(names, fork=fork), how.smooth)
        if how.velocity:
            before = np.full_like(aligned.values[:, :1], np.nan)
            aligned = aligned.copy(data=np.concatenate([before, np.diff(aligned.values, axis=1)], axis=1))
        one, table = self.page.column(), model.directions
        x = aligned.position.values
        texts = texts_of(model, names[0])
        texts = [*texts, *[""] * (len(x) - len(texts))][: len(x)]
        labels = model.groups(state.label)
        curves = {_called(name, labels): aligned.values[i, :, one] for i, name in enumerate(names)}
        self.curves.plot.title.text = f"{table['direction'].iloc[one]}: {how.unit}"
        self.curves.draw(x, curves, texts=texts)
        if self._looked_at != (model, names):  # and not again what a reader has zoomed into
            self._looked_at = (model, names)
            self.curves.look_at(*_around(fork, len(x)))
        chosen = picked(table, traits=state.traits, layer=state.layer_number)
        changes = {str(table["direction"].iloc[j]): aligned.values[1, :, j] - aligned.values[0, :, j] for j in chosen}
        shown, where = called(table, chosen)
        self.difference.plot.title.text = f"{names[1]} less {names[0]}{where}"
        self.difference.draw(x, changes, texts=texts, shown=shown)
        for plot in (self.curves, self.difference):
            plot.show_fork(fork - 0.5)
            plot.fit_height()
        self._show_moves(names)
        self.texts.object = _side_by_side(model, names[:2], fork=fork)

    def _unsmoothed(self, names: tuple[str, ...], *, fork: int) -> xr.DataArray:
        model, state = self.model, self.state
        how = Treatment(mode=state.mode, clean=state.clean, centred=state.centred, smooth=1)
        return comparing.aligned_curves(model.scores(names), model.treated(names, how), names, fork=fork)

    def _clear(self, why: str) -> None:
        for plot in (self.curves, self.difference):
            plot.draw([], {})
            plot.show_fork(None)
        self._moves = self.moves.value = pd.DataFrame(columns=list(MOVES))
        self._looked_at = ()
        self._heading.object = f"<h2>{escape(why or 'Choose a pair, or name rollouts to compare with')}</h2>"
        self.texts.object = ""

    def _find_moves(self, two: tuple[str, ...]) -> tuple[pd.DataFrame, float, int]:
        """Return where each direction moves, and the first of the rules by which any does."""
        model = self.model
        aligned = self._unsmoothed(two, fork=model.fork(two)).sel(direction=model.drawn(self.state.traits))
        for threshold, run in comparing.MOVED:
            found = comparing.first_moves(aligned, threshold=threshold, run=run)
            if found["moved_at"].notna().any():
                break
        return found, threshold, run

    def _show_moves(self, names: tuple[str, ...]) -> None:
        model, two = self.model, names[:2]
        found, threshold, run = self._find_moves(two)
        texts = texts_of(model, two[1])
        found["text"] = [texts[int(at)] if pd.notna(at) else "" for at in found["moved_at"]]
        self._moves, self.moves.value = found, found[list(MOVES)]
        said = _said(found, threshold=threshold, run=run)
        self._heading.object = (
            f"<h2>They part at token {model.fork(two)}; {escape(said)}</h2>"
            "<p>A click on a row shows that trait below, where it moved.</p>"
        )


def _said(moves: pd.DataFrame, *, threshold: float, run: int) -> str:
    """Return in words which trait moves first, or that none does and which differs most."""
    first = moves.iloc[0] if len(moves) else None
    if first is not None and pd.notna(first["moved_at"]):
        after = int(first["tokens_after"])
        when = "at once" if after == 0 else f"{after} token{'' if after == 1 else 's'} later"
        alone = " at that token alone" if run == 1 else ""
        return f"{first['direction']} moves first, {when}, beyond {threshold:g} SD{alone}"
    if first is None or pd.isna(first["peak"]):
        return "no trait is scored in both after it"
    return f"no trait moves beyond {threshold:g} SD, most {first['direction']} by {abs(first['peak']):.1f} SD"


def _around(fork: int, length: int) -> tuple[int, int]:
    """What is looked at first: what follows the fork, and some of what is before it."""
    return max(0, fork - max(30, length - fork)), length - 1


def _called(name: str, labels: "dict[str, str]") -> str:
    return f"{name} ({labels[name]})" if name in labels else name


def _side_by_side(model: Any, names: tuple[str, ...], *, fork: int) -> str:
    """Return the last shared words and how each rollout goes on, as HTML."""
    cells = []
    for name in names:
        try:
            texts = [text if isinstance(text, str) else "⟨?⟩" for text in model.tokens(name)["text"]]
        except AbsentError:
            texts = []
        before, after = "".join(texts[max(0, fork - NEAR) : fork]), "".join(texts[fork : fork + FAR])
        cells.append(
            f"<div><h3>{escape(name)}</h3><p><span class='shared'>{'…' if fork > NEAR else ''}{escape(before)}</span>"
            f"<mark>{escape(after)}</mark>{'…' if len(texts) > fork + FAR else ''}</p></div>"
        )
    return f"<div class='sides'>{''.join(cells)}</div>"
