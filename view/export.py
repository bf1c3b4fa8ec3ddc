"""A page in one file: the text and the curves of some rollouts, for someone who has neither the store nor a server."""

import base64
import mimetypes
import re
from collections.abc import Sequence
from html import escape
from io import StringIO
from pathlib import Path
from typing import Any

import panel as pn
from bokeh.resources import INLINE

from datastore.errors import MisuseError, ReadOnlyError
from datastore.query import Store
from view import comparing
from view.model import Model
from view.plots import Lines, Look
from view.tables import html
from view.trajectories import bands_of, texts_of
from view.transcript import Transcript, numbers_of, text_of
from view.treatment import Treatment, picked

__all__ = ["page_of", "write_page"]

MOST_TOKENS = 200_000
PANELS_OWN = re.compile(r"https://cdn\.holoviz\.org/panel/[^/\"]+/dist/([\w./-]+\.(?:css|ico|png))(?:\?v=[\w.]+)?")
STATIC = Path(__file__).with_name("static")


def write_page(store: Store, rollouts: Sequence[str], *, out: Path, how: Treatment | None = None) -> None:
    """Write one self-contained HTML file with these rollouts.

    Parameters
    ----------
    store : Store
    rollouts : sequence of str
    out : Path
        The file.
    how : Treatment, optional
        What is done to the scores; the page's first settings by default.

    Raises
    ------
    MisuseError
        There are no rollouts, or more tokens than a browser shows well.
    ReadOnlyError
        The file can't be written.
    """
    model = Model(store)
    total = sum(model.length(name) for name in rollouts)
    if not rollouts or total > MOST_TOKENS:
        raise MisuseError(
            f"{len(rollouts)} rollouts of {total:,} tokens do not make a page, which holds 1 to {MOST_TOKENS:,}; name "
            "fewer with --ids"
        )
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise ReadOnlyError(f"{out} can't be written as a file; name one in a directory that is there with --out")
    pn.extension("tabulator")
    title = f"{', '.join(list(rollouts)[:3])}{', …' if len(rollouts) > 3 else ''} · {model.name}"
    text = StringIO()
    page_of(model, rollouts, how=how or Treatment()).save(text, title=title, resources=INLINE)
    out.write_text(_bundled(text.getvalue()), encoding="utf-8")


def _bundled(page: str) -> str:
    """Put the style sheets and pictures that Panel leaves on its own network into the page."""
    dist = Path(pn.__file__).with_name("dist")

    def inside(found: re.Match[str]) -> str:
        file = dist / found[1]
        kind = mimetypes.guess_type(file.name)[0] or "text/plain"
        content = base64.b64encode(file.read_bytes() if file.is_file() else b"").decode("ascii")
        return f"data:{kind};base64,{content}"

    return PANELS_OWN.sub(inside, page)


def page_of(model: Model, rollouts: Sequence[str], *, how: Treatment) -> pn.Column:
    """Return the page: the curves of rollouts that are compared, then every rollout's curves and text."""
    look = Look(dark=False)
    scored = [name for name in rollouts if model.is_scored(name)]
    parts: list[Any] = [html(f"<h1>{escape(model.name)}</h1>"), html(_css())]
    if len(scored) > 1:
        parts.append(_together(model, tuple(scored), how=how, look=look))
    parts += [_one(model, name, how=how, look=look) for name in rollouts]
    return pn.Column(*parts, sizing_mode="stretch_width", css_classes=["page", "light"])


def _css() -> str:
    return f"<style>{(STATIC / 'page.css').read_text(encoding='utf-8')}</style>"


def _together(model: Model, names: tuple[str, ...], *, how: Treatment, look: Look) -> pn.Column:
    fork = model.fork(names)
    aligned = comparing.aligned_curves(model.scores(names), model.treated(names, how), names, fork=fork)
    plots = []
    for j in picked(model.directions):
        plot = Lines(f"{model.directions['direction'].iloc[j]} of all", look, y=how.unit, height=240)
        plot.draw(aligned.position.values, {name: aligned.values[i, :, j] for i, name in enumerate(names)})
        plot.show_fork(fork - 0.5)
        plots.append(plot.panel(static=True))
    return pn.Column(html(f"<h2>The same up to token {fork}</h2>"), *plots, sizing_mode="stretch_width")


def _one(model: Model, name: str, *, how: Treatment, look: Look) -> pn.Column:
    values = model.values(name, how)
    labels = list(map(str, model.directions["direction"])) if values.shape[1] else []
    text = Transcript(
        text=text_of(model, name),
        numbers=numbers_of(values, labels, unit=how.unit),
        column=0 if labels else -1,
        compact=False,
        sizing_mode="stretch_width",
    )
    parts: list[Any] = [html(f"<h2>{escape(name)}</h2>")]
    if labels:
        shade = pn.widgets.Select(
            name="Shaded by", options={label: str(j) for j, label in enumerate(labels)}, width=260
        )
        shade.jscallback(args={"text": text}, value="text.data.column = Number(cb_obj.value)")
        plot = Lines(f"scores of {name}", look, y=how.unit)
        chosen = picked(model.directions)
        plot.draw(range(len(values)), {labels[j]: values[:, j] for j in chosen}, texts=texts_of(model, name))
        plot.show_bands(bands_of(model, name))
        parts += [plot.panel(static=True), shade]
    return pn.Column(*parts, text, sizing_mode="stretch_width")
