"""Tables and words of the page: Panel's Tabulator and HTML as this page uses them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import panel as pn
from bokeh.models import NumberFormatter

__all__ = ["choice", "clickable", "html", "plain"]

PAGE = 15
STYLE = """
.tabulator { font-size: 13px !important; }
.tabulator, .tabulator .tabulator-header, .tabulator .tabulator-header .tabulator-col, .tabulator .tabulator-row,
.tabulator .tabulator-tableholder .tabulator-table, .tabulator .tabulator-footer, .tabulator .tabulator-page,
.tabulator .tabulator-header input { background-color: var(--page, #ffffff) !important;
  color: var(--page-ink, #1a1a1a) !important; }
.tabulator .tabulator-header, .tabulator .tabulator-col, .tabulator .tabulator-row, .tabulator .tabulator-cell,
.tabulator .tabulator-header input, .tabulator .tabulator-footer {
  border-color: color-mix(in srgb, var(--page-ink, #1a1a1a), transparent 80%) !important; }
.tabulator .tabulator-page.active { font-weight: 700; text-decoration: underline; }
.tabulator .tabulator-row:hover { background-color: color-mix(in srgb, var(--page, #ffffff), #8a8a8a 25%) !important; }
.tabulator .tabulator-tableholder:focus-visible, .tabulator .tabulator-row:focus-visible {
  outline: 2px solid #1f6feb !important; outline-offset: -2px; }"""


CHOSEN = ".bk-btn.bk-active { box-shadow: inset 0 -3px 0 currentColor !important; }"
"""Which of some buttons is pressed, on dark paper too."""


def choice(parameter: Any, **more: Any) -> pn.widgets.RadioButtonGroup:
    """Return a row of buttons of which one is pressed, bound to a parameter of the state."""
    return pn.widgets.RadioButtonGroup.from_param(parameter, stylesheets=[CHOSEN], **more)


def html(text: str = "", **more: Any) -> pn.pane.HTML:
    """Return words that the page writes, in its own style."""
    settings: dict[str, Any] = {"sizing_mode": "stretch_width", "margin": (0, 5)}
    style = (Path(__file__).with_name("static") / "parts.css").read_text(encoding="utf-8")
    return pn.pane.HTML(text, stylesheets=[style], **{**settings, **more})


def clickable(
    table: pd.DataFrame,
    clicked: Callable[[int], None],
    *,
    titles: Mapping[str, str],
    page_size: int = PAGE,
    **more: Any,
) -> pn.widgets.Tabulator:
    """Return a table, a page of which is sent at a time; a click on a row gives its place in the table.

    Parameters
    ----------
    table : DataFrame
    clicked : callable
    titles : mapping of column to what stands above it
    page_size : int
    """
    made = plain(table, titles=titles, pagination="remote", page_size=page_size, css_classes=["clickable"], **more)
    made.on_click(lambda event: clicked(event.row))
    return made


def plain(table: pd.DataFrame, *, titles: Mapping[str, str], **more: Any) -> pn.widgets.Tabulator:
    """Return a table that is only read."""
    digits = {name: NumberFormatter(format="0,0.[0000]", nan_format="") for name in more.pop("numbers", ())}
    settings: dict[str, Any] = {
        "formatters": digits,
        "show_index": False,
        "disabled": True,
        "selectable": False,
        "layout": "fit_data_table",
        "theme": "simple",
        "sizing_mode": "stretch_width",
        "stylesheets": [STYLE],
        # what comes before a table is built is no fault here: static/browser.js keeps it until then
        "configuration": {"columnDefaults": {"headerSort": True}, "debugInitialization": False},
    }
    return pn.widgets.Tabulator(table, titles=dict(titles), **{**settings, **more})
