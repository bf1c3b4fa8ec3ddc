"""The page: one Bokeh document for each visitor."""

from collections.abc import Sequence
from typing import Any

import panel as pn

from datastore.query import Store

__all__ = ["app", "document"]


def app(*stores: Store) -> Any:
    """Return the viewer as a Panel object, for a notebook."""
    return pn.Column(*(pn.pane.Str(str(store)) for store in stores))


def document(stores: Sequence[Store]) -> Any:
    """Return the page of one visitor."""
    return app(*stores)
