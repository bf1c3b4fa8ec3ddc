"""The trajectories of one rollout: a line for each trait, layer or component, with turns, annotations and norms."""

from collections.abc import Sequence
from html import escape
from itertools import pairwise

import numpy as np
import pandas as pd
import panel as pn

from view.frame import NUMBERS, Host, View
from view.model import Model
from view.plots import ROLES, Lines
from view.tables import html
from view.transcript import annotation_colours
from view.treatment import picked

__all__ = ["Trajectories", "bands_of", "called", "texts_of"]

Band = tuple[float, float, str, float, str]
MOST_NORMS = 10


class Trajectories(View):
    """Scores over the tokens of the shown rollout, and the tokens' norms."""

    def __init__(self, page: Host) -> None:
        super().__init__(page)
        self.scores = Lines("scores", page.look, height=380, tapped=self._pin)
        self.norms = Lines("norms", page.look, height=190, y="norm", tapped=self._pin)
        self.norms.plot.x_range = self.scores.plot.x_range
        self.legend = html()
        self._panel = pn.Column(self.scores.panel(), self.legend, self.norms.panel(), sizing_mode="stretch_width")

    def panel(self) -> pn.Column:
        """The two plots."""
        return self._panel

    def _pin(self, x: float) -> None:
        self.page.go(token=int(np.clip(round(x), 0, max(0, self.model.length(self.state.rollout) - 1))))

    def update(self, changed: frozenset[str]) -> None:
        """Draw the curves anew where they changed, else move the cursor."""
        state = self.state
        if not state.rollout:
            self.scores.draw([], {})
            self.norms.draw([], {})
            return
        if changed & {"store", "rollout"}:
            self._draw_rollout()
        trait = frozenset[str]() if state.lines == "trait" else {"trait"}
        if changed & (NUMBERS | {"rollout", "traits", "layer", "lines"} | trait):
            self._draw_scores()
        at = state.token if state.token >= 0 else None
        self.scores.show_cursor(at)
        self.norms.show_cursor(at)

    def _draw_rollout(self) -> None:
        model, rollout = self.model, self.state.rollout
        bands = bands_of(model, rollout)
        self.scores.show_bands(bands)
        self.norms.show_bands(bands)
        shown = dict.fromkeys((label, colour) for *_, colour, _, label in bands)
        marks = [
            f'<span class="key"><i style="background:{colour}"></i>{escape(label)}</span>' for label, colour in shown
        ]
        self.legend.object = '<div class="keys">' + "".join(marks) + "</div>"
        norms = dict(list(model.norms(rollout).items())[:MOST_NORMS])
        self.norms.draw(_positions(model, rollout), norms, texts=texts_of(model, rollout))

    def _draw_scores(self) -> None:
        model, state = self.model, self.state
        values = model.values(state.rollout, state.treatment)
        texts = texts_of(model, state.rollout)
        if not values.shape[1]:
            self.scores.draw(_positions(model, state.rollout), {}, texts=texts)
            return
        table = model.directions
        chosen = picked(table, by=state.lines, trait=state.trait, traits=state.traits, layer=state.layer_number)
        labels = _labels(table, chosen)
        curves = {label: values[:, j] for label, j in zip(labels, chosen, strict=True)}
        self.scores.plot.yaxis[0].axis_label = state.treatment.unit
        shown, where = called(table, chosen)
        self.scores.plot.title.text = f"Scores of {state.rollout}{where}"
        self.scores.draw(_positions(model, state.rollout), curves, texts=texts, shown=shown)


def called(table: pd.DataFrame, chosen: Sequence[int]) -> tuple[list[str], str]:
    """Return what a legend calls some directions, and what its title says of them all.

    Where all are at one layer the title names it and the legend the traits alone, which stay what they are when
    another layer is chosen.
    """
    labels, layers = _labels(table, chosen), {int(table["layer"].iloc[j]) for j in chosen}
    traits = [str(table["trait"].iloc[j]) for j in chosen]
    if len(layers) != 1 or len(set(traits)) < len(traits):
        return labels, ""
    return traits, f" at layer {layers.pop()}"


def _labels(table: pd.DataFrame, chosen: Sequence[int]) -> list[str]:
    return [str(table["direction"].iloc[j]) for j in chosen]


def _positions(model: Model, rollout: str) -> "np.ndarray[tuple[int], np.dtype[np.int32]]":
    return np.arange(model.length(rollout), dtype=np.int32)


def texts_of(model: Model, rollout: str) -> list[str]:
    """Return the text of each token for a hover; its id where it has no text."""
    return model.keep(("texts", rollout), lambda: _texts(model, rollout))


def _texts(model: Model, rollout: str) -> list[str]:
    tokens = model.tokens(rollout)
    pairs = zip(tokens["text"].tolist(), tokens["token_id"].tolist(), strict=True)
    return [repr(text)[1:-1] if isinstance(text, str) else f"id {number}" for text, number in pairs]


def bands_of(model: Model, rollout: str) -> list[Band]:
    """Return what is shaded behind the curves of a rollout: (from, to, colour, opacity, label).

    The prompt, turns by role, reasoning, and annotated spans; a band covers its tokens, whose points are at their
    positions.
    """
    tokens = model.tokens(rollout)
    bands = [
        (start - 0.5, stop - 0.5, "#8a8a8a", 0.10, "prompt") for start, stop in _runs(tokens["segment"] == "prompt")
    ]
    role, turn = tokens["role"].to_numpy(), tokens["turn"].to_numpy()
    for name, colour in ROLES.items():
        if name != "none":
            inside = role == name
            bands += [(a - 0.5, b - 0.5, colour, 0.12, name) for a, b in _runs(pd.Series(inside), breaks=turn)]
    bands += [(a - 0.5, b - 0.5, "#7f3c8d", 0.12, "thinking") for a, b in _runs(tokens["thinking"])]
    colours = annotation_colours(model)
    for one in model.annotations(rollout):
        bands.append((one.start - 0.5, one.stop - 0.5, colours[one.label], 0.25, one.label))
    return bands


def _runs(
    inside: "pd.Series[bool]", *, breaks: "np.ndarray[tuple[int], np.dtype[np.int64]] | None" = None
) -> list[tuple[int, int]]:
    """Return the runs of true values, cut where `breaks` changes."""
    flags = inside.to_numpy(bool)
    key = np.where(flags, 1 if breaks is None else breaks.astype(np.int64) + 2, 0)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], key, [0]])))
    return [(int(a), int(b)) for a, b in pairwise(edges.tolist()) if flags[a]]
