"""What every view of the page has: the page around it, and a way to do something slow after the page is drawn."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import panel as pn

from view.model import Model, Models
from view.plots import Look
from view.state import State

__all__ = ["NUMBERS", "Host", "View", "later", "soon"]

R = TypeVar("R")
NUMBERS = frozenset({"store", "mode", "smooth", "centred", "velocity", "clean"})
"""What changes the values that are drawn."""


class Host(Protocol):
    """What a view knows of the page around it."""

    state: State
    models: Models
    look: Look
    alone: bool

    @property
    def model(self) -> Model:
        """The store that is shown, as it was when it was opened."""

    def go(self, **fields: Any) -> None:
        """Look at something else."""

    def reload(self) -> None:
        """Show the store as it is now."""

    def column(self) -> int:
        """The direction of the chosen trait and layer, as a place in the table of directions; -1 without any."""


class View(ABC):
    """One of the page's views.

    Parameters
    ----------
    page : Host
    """

    def __init__(self, page: Host) -> None:
        self.page = page

    @property
    def state(self) -> State:
        """What the reader is looking at."""
        return self.page.state

    @property
    def model(self) -> Model:
        """The store that is looked at."""
        return self.page.model

    @property
    def look(self) -> Look:
        """Light or dark."""
        return self.page.look

    @abstractmethod
    def panel(self) -> pn.viewable.Viewable:
        """What is drawn; the same object at every call."""

    @abstractmethod
    def update(self, changed: frozenset[str]) -> None:
        """Draw what depends on these fields of the state."""


def soon(draw: Callable[[], None]) -> None:
    """Draw with the lock of the page's document held, which a widget's own callback may not hold."""
    doc: Any = pn.state.curdoc
    if doc is None or doc.session_context is None:
        draw()
    else:
        doc.add_next_tick_callback(draw)


def later(compute: Callable[[], R], done: Callable[[R], None]) -> None:
    """Compute in a thread, then draw; at once where there is no server that would wait for it."""
    doc: Any = pn.state.curdoc
    if doc is None or doc.session_context is None:
        done(compute())
        return

    def work() -> None:
        found = compute()
        if doc.session_context is not None and not doc.session_context.destroyed:
            doc.add_next_tick_callback(lambda: done(found))

    threading.Thread(target=work, daemon=True).start()
