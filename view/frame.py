"""What every view of the page has: the page around it, and a way to do something slow after the page is drawn."""

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeVar

import panel as pn

from datastore.errors import DatastoreError
from experiments.errors import ExperimentError
from view.model import Model, Models
from view.plots import Look
from view.state import State

__all__ = ["ERRORS", "NUMBERS", "Host", "View", "later", "soon", "wait_for_browser"]

R = TypeVar("R")
NUMBERS = frozenset({"store", "mode", "smooth", "centred", "velocity", "clean"})
"""What changes the values that are drawn."""
ERRORS = (DatastoreError, ExperimentError)
"""What is told in a sentence above the views."""
_SHOWN: "weakref.WeakKeyDictionary[Any, threading.Event]" = weakref.WeakKeyDictionary()
"""By document, whether its browser has drawn it."""
PATIENCE_S = 180.0
"""Seconds until a browser that has not drawn the page is waited for no longer; its session ends about then."""


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

    def say(self, sentence: str) -> None:
        """Show a sentence above the views; nothing where it is empty."""

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
        self._newest: dict[str, object] = {}

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

    def later(self, compute: Callable[[], R], done: Callable[[R], None]) -> None:
        """Compute in a thread, then draw; what the same was asked for again meanwhile, or given up, is not drawn.

        Threads end in any order: what was asked for first must not replace what was asked for last.
        """
        name = done.__name__
        mine = self._newest[name] = object()
        later(compute, lambda found: done(found) if self._newest.get(name) is mine else None, failed=self.page.say)

    def give_up(self) -> None:
        """Draw nothing of what is still being computed."""
        self._newest.clear()


def soon(draw: Callable[[], None]) -> None:
    """Draw with the lock of the page's document held, which a widget's own callback may not hold."""
    doc: Any = pn.state.curdoc
    if doc is None or doc.session_context is None:
        draw()
    else:
        doc.add_next_tick_callback(draw)


def wait_for_browser() -> None:
    """Hold back what `later` finds for this document until its browser has drawn it.

    A change that is sent while the document itself is on its way is dropped by Bokeh's client, which takes it for a
    part of the document; made a moment after the document was written out, it would never be seen.
    """
    doc: Any = pn.state.curdoc
    if doc is not None and doc.session_context is not None:
        shown = _SHOWN[doc] = threading.Event()
        doc.on_event("document_ready", lambda _: shown.set())


def later(compute: Callable[[], R], done: Callable[[R], None], *, failed: Callable[[str], None]) -> None:
    """Compute in a thread, then draw, or say why not; at once where there is no server that would wait for it."""
    doc: Any = pn.state.curdoc
    if doc is None or doc.session_context is None:
        done(compute())
        return

    def work() -> None:
        try:
            then = partial(done, compute())
        except ERRORS as error:
            then = partial(failed, str(error))
        if doc in _SHOWN:
            _SHOWN[doc].wait(PATIENCE_S)
        if doc.session_context is not None and not doc.session_context.destroyed:
            doc.add_next_tick_callback(then)

    threading.Thread(target=work, daemon=True).start()
