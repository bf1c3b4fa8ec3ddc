"""Tables of the page: Panel's Tabulator as this page uses it."""

from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
import panel as pn

__all__ = ["clickable", "plain"]

PAGE = 15


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
    made = plain(table, titles=titles, pagination="remote", page_size=page_size, **more)
    made.on_click(lambda event: clicked(event.row))
    return made


def plain(table: pd.DataFrame, *, titles: Mapping[str, str], **more: Any) -> pn.widgets.Tabulator:
    """Return a table that is only read."""
    settings: dict[str, Any] = {
        "show_index": False,
        "disabled": True,
        "selectable": False,
        "layout": "fit_data_table",
        "theme": "simple",
        "sizing_mode": "stretch_width",
        "configuration": {"columnDefaults": {"headerSort": True}},
    }
    return pn.widgets.Tabulator(table, titles=dict(titles), **{**settings, **more})
