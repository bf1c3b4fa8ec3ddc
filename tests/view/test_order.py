"""What is computed in threads ends in any order: the page shows what was asked for last, and what its reader chose."""

import threading
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import panel as pn
import pytest
from bokeh.document import Document
from bokeh.events import DocumentReady
from numpy.typing import NDArray
from panel.io.state import set_curdoc

import datastore
from datastore.errors import AbsentError
from tests.view import oracle, stores
from view import frame
from view.model import Models
from view.page import Page

pytestmark = [
    pytest.mark.filterwarnings("ignore:Widget.name is deprecated:PendingDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:button_type is deprecated:PendingDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame"),
]
GAMES = 3


class Threads:
    """Threads that compute at once, and hand over what they found when a test says so, in the order that it says."""

    def __init__(self) -> None:
        self._found: list[Callable[[], None]] = []

    def later(self, compute: Callable[[], Any], done: Callable[[Any], None], *, failed: Callable[[str], None]) -> None:
        """Stand in for `view.frame.later`."""
        try:
            self._found.append(partial(done, compute()))
        except AbsentError as error:
            self._found.append(partial(failed, str(error)))

    def end(self, *, last_first: bool = False) -> None:
        """Hand over all that was asked for until now; what that asks for in turn is left."""
        found, self._found = self._found, []
        for one in reversed(found) if last_first else found:
            one()


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> list[datastore.Store]:
    """Games with scores, the same games without any, and a rollout that shares its beginning with none."""
    root = tmp_path_factory.mktemp("order")
    games = stores.game_store(root / "games.zarr", pairs=GAMES)
    plain = stores.plain_store(root / "plain.zarr", pairs=1)
    rollouts = [stores.game_rollout(0, kind) for kind in ("honest", "lie")] + [stores.game_rollout(1, "lie")]
    alone = stores.write(root / "alone.zarr", rollouts, stores.activations, vocab=stores.vocabulary())
    return [games, plain, alone]


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Threads:
    """In place of real ones."""
    held = Threads()
    monkeypatch.setattr(frame, "later", held.later)
    monkeypatch.setattr("view.page.later", held.later)
    return held


def page_of(opened: list[datastore.Store], query: str) -> Page:
    return Page(Models(opened), query=query)


def table(page: Page, column: str) -> pd.DataFrame:
    """The table of the page that has such a column."""
    tables: list[pd.DataFrame] = [one.value for one in page.panel().select(pn.widgets.Tabulator)]
    (found,) = [one for one in tables if column in one]
    return found


def curve(page: Page, figure: str, name: str) -> NDArray[np.float64]:
    """A curve of a figure."""
    (plot,) = [one.object for one in page.panel().select(pn.pane.Bokeh) if one.object.name == figure]
    (line,) = [one for one in plot.renderers if one.name == name]
    return np.asarray(line.data_source.data["y"], np.float64)


def means(store: datastore.Store, mode: str) -> NDArray[np.float64]:
    names = map(str, store.rollouts.index)
    return np.array([oracle.drawn(store, n, "bs/lying@4", smooth=1, mode=mode)[20:].mean() for n in names])


def test_means_of_the_last_choice_are_shown_whatever_ends_last(opened: list[datastore.Store], threads: Threads) -> None:
    page = page_of(opened, "?traits=bs/lying&smooth=1&mode=normalised")
    page.go(mode="raw")
    threads.end(last_first=True)
    found = table(page, "bs/lying@4 mean")["bs/lying@4 mean"]
    np.testing.assert_allclose(found, means(opened[0], "raw"), rtol=1e-4)


def test_spans_of_the_last_choice_are_shown_whatever_ends_last(opened: list[datastore.Store], threads: Threads) -> None:
    page = page_of(opened, "?section=Spans&rollout=g0-lie&trait=bs/lying&smooth=1&window=3")
    page.go(window=8)
    threads.end(last_first=True)
    found = table(page, "start")
    assert set(found["stop"] - found["start"]) == {8}


def test_groups_of_the_last_choice_are_shown_whatever_ends_last(
    opened: list[datastore.Store], threads: Threads
) -> None:
    page = page_of(opened, "?view=Compare&against=Groups&trait=bs/lying&smooth=1&mode=raw")
    page.go(mode="cosine")
    threads.end(last_first=True)
    inside = slice(stores.FORK + 8, stores.FORK + 12)
    lies = [oracle.drawn(opened[0], f"g{i}-lie", "bs/lying@4", smooth=1)[inside].mean() for i in range(GAMES)]
    assert curve(page, "groups", "fabrication")[(24 + 8) // 4] == pytest.approx(np.mean(lies), rel=1e-4)
    effects = table(page, "mean_other").set_index("direction")
    assert effects["mean_other"]["bs/lying@4"] == pytest.approx(means(opened[0], "cosine")[1::2].mean(), rel=1e-4)


def test_nothing_of_a_store_that_was_left_is_shown(opened: list[datastore.Store], threads: Threads) -> None:
    for query in ("?section=Spans", "?view=Compare&against=Groups", "?section=Heatmaps", "?section=Rollouts"):
        page = page_of(opened, query + "&rollout=g0-lie&smooth=1")
        page.go(store="plain.zarr")
        threads.end()
        whole = page.panel()
        for one in whole.select(pn.widgets.Tabulator):
            assert not {"mean", "effect_size", "bs/lying@4 mean"} & set(one.value) or not len(one.value), query
        for plot in (one.object for one in whole.select(pn.pane.Bokeh)):
            if plot.name == "trait-by-rollout":
                (image,) = [one for one in plot.renderers if one.name != "cursor"]
                assert image.data_source.data["image"][0].size == 0
            assert not any(getattr(one, "visible", False) for one in plot.renderers if one.name == "fabrication")


def test_the_first_pair_is_offered_to_who_has_chosen_nothing(opened: list[datastore.Store], threads: Threads) -> None:
    page = page_of(opened, "?view=Compare")
    assert page.state.others == []
    threads.end()
    first = table(page, "fork").iloc[0]
    assert (page.state.rollout, page.state.others) == (first["a"], [first["b"]])
    assert (first["label_a"], first["label_b"]) == ("honest", "fabrication")
    assert (page.state.token, page.state.trait) == (stores.FORK, "bs/lying")  # at the fork, by what moves first there
    page.go(others=[])  # cleared by the reader, and not filled again by what comes of another label
    page.go(label="stakes", reference="")
    threads.end()
    assert page.state.others == []


@pytest.mark.parametrize(
    "chosen", [{"rollout": "g2-lie"}, {"rollout": "g1-lie", "others": ["g2-honest"]}, {"others": ["g1-lie"]}]
)
def test_a_reader_who_was_faster_than_the_pairs_keeps_what_was_chosen(
    opened: list[datastore.Store], threads: Threads, chosen: dict[str, Any]
) -> None:
    page = page_of(opened, "?view=Compare")
    page.go(**chosen)
    threads.end()
    threads.end()
    assert {name: getattr(page.state, name) for name in chosen} == chosen
    assert len(table(page, "fork")) == GAMES


@pytest.mark.parametrize("asked", ["trait=mood/calm", "layer=4", "token=50"])
def test_a_pair_is_offered_with_the_trait_and_the_token_that_were_asked_for(
    opened: list[datastore.Store], threads: Threads, asked: str
) -> None:
    page = page_of(opened, f"?view=Compare&rollout=g1-honest&{asked}")
    threads.end()
    assert page.state.others == ["g1-lie"]
    name, _, value = asked.partition("=")
    assert str(getattr(page.state, name)) == value
    assert page.state.trait == {"trait": value, "layer": "bs/evasion"}.get(name, "bs/lying")


def test_a_rollout_of_the_address_is_kept_where_it_is_in_no_pair(
    opened: list[datastore.Store], threads: Threads
) -> None:
    page = page_of(opened, "?store=alone.zarr&view=Compare&rollout=g1-lie")
    threads.end()
    assert (page.state.rollout, page.state.others) == ("g1-lie", [])


def test_a_part_that_was_zoomed_into_stays_when_another_trait_is_chosen(opened: list[datastore.Store]) -> None:
    page = page_of(opened, "?view=Compare&rollout=g1-honest&rollout=g1-lie&trait=bs/lying&smooth=1")
    (plot,) = [one.object for one in page.panel().select(pn.pane.Bokeh) if one.object.name == "rollouts"]
    assert (plot.x_range.start, plot.x_range.end) == (stores.FORK - 32, 71)
    plot.x_range.update(start=50, end=60)
    page.go(trait="mood/calm")
    assert (plot.x_range.start, plot.x_range.end) == (50, 60)
    page.go(rollout="g2-honest", others=["g2-lie"])
    assert (plot.x_range.start, plot.x_range.end) == (stores.FORK - 32, 71)


def test_what_fails_in_a_thread_is_said(opened: list[datastore.Store], threads: Threads) -> None:
    page = page_of(opened, "?section=Rollouts")
    threads.end()

    def fail() -> str:
        raise AbsentError("the store was taken away")

    page._views["Overview"].later(fail, page.say)
    threads.end()
    assert "the store was taken away" in str(page.notice.object)


def test_nothing_is_handed_over_before_the_browser_has_drawn_the_page() -> None:
    """What is found while the document is on its way to the browser would be lost on the way."""
    document, session = Document(), SimpleNamespace(destroyed=False)
    document._session_context = lambda: session  # as a server sets it, but for the session
    found = list[str]()
    with set_curdoc(document):
        frame.wait_for_browser()
        frame.later(lambda: "found", found.append, failed=found.append)
    (thread,) = [one for one in threading.enumerate() if one.name.endswith("(work)")]
    thread.join(0.5)
    assert (thread.is_alive(), document.session_callbacks) == (True, [])
    document.callbacks.trigger_event(DocumentReady())
    thread.join()
    (then,) = document.session_callbacks
    then.callback()
    assert found == ["found"]
