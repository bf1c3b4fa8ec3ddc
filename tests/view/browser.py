"""A real server process and a real Chromium for the tests of the page, and what they read from it."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from numpy.typing import NDArray

from tests import forked, house

__all__ = [
    "Viewer",
    "becomes",
    "browser",
    "click_plot",
    "running",
    "same",
    "serving",
    "settled",
    "shows",
    "until",
    "visiting",
]

T = TypeVar("T")
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--force-color-profile=srgb",
    # The last such list is the only one: what of Playwright's matters here, and the pages of which Chromium builds two
    # for every window, in case something is typed into its address bar: a fifth of what a page costs.
    "--disable-features=PaintHolding,AvoidUnnecessaryBeforeUnloadCheckSync,DestroyProfileOnBrowserClose,HttpsUpgrades,"
    "HttpsFirstBalancedModeAutoEnable,MediaRouter,ThirdPartyStoragePartitioning,OptimizationHints,PreconnectToSearch,"
    "NetworkTimeServiceQuerying,AimEnabled,LensOverlay,WebUIOmniboxPopup,WebUIOmniboxAimPopup,WebUIOmniboxFullPopup",
]
AXE = Path(__file__).parents[1] / "data" / "axe_core" / "axe.min.js"
PATIENCE = 90.0
"""Seconds until a test gives up; on a machine with nothing else to do none of them waits for even two."""
ENDING = 120.0

MODELS = """
const models = () => Bokeh.documents.flatMap((doc) => [...doc._all_models.values()]);
const figure = (name) => models().find((one) => one.type === "Figure" && one.name === name);
const plain = (values) => Array.from(values, (value) => (Number.isFinite(value) ? value : null));
"""
LINES = f"""(name) => {{ {MODELS}
  const found = {{}};
  for (const one of figure(name)?.renderers ?? []) {{
    if (one.type !== "GlyphRenderer" || one.glyph.type !== "Line" || !one.visible) continue;
    found[one.name] = plain(one.data_source.data[one.glyph.y.field]);
  }}
  return found;
}}"""
MARKS = f"""(name) => {{ {MODELS}
  const spans = figure(name).center.filter((one) => one.type === "Span" && one.visible);
  return Object.fromEntries(spans.map((one) => [one.name, one.location]));
}}"""
RANGE = f"""(name) => {{ {MODELS} const y = figure(name).y_range; return [y.start, y.end]; }}"""
IMAGE = f"""(name) => {{ {MODELS}
  const one = figure(name)?.renderers.find((renderer) => renderer.glyph?.type === "Image");
  return one ? plain(one.data_source.data.image[0]) : [];
}}"""
BANDS = f"""(name) => {{ {MODELS}
  const one = figure(name).renderers.find((renderer) => renderer.glyph?.type === "VStrip");
  const {{ x0, x1, label }} = one.data_source.data;
  return Array.from(x0, (start, i) => [start, x1[i], label[i]]);
}}"""
PIXEL = f"""([name, x, y]) => {{ {MODELS}
  const view = Bokeh.index.find_one(figure(name));
  const box = view.el.getBoundingClientRect();
  const frame = view.frame;
  return [box.left + frame.x_scale.compute(x), box.top + frame.y_scale.compute(y)];
}}"""


class Viewer:
    """One page in the browser, with what went wrong in it.

    Parameters
    ----------
    page : playwright.sync_api.Page
    address : str
        Of the server.
    """

    def __init__(self, page: Any, address: str) -> None:
        self.page, self.address = page, address
        page.set_default_timeout(1000 * PATIENCE)
        self.errors: list[str] = []
        self.foreign: list[str] = []
        self._listeners = {"console": self._heard, "pageerror": self._failed, "request": self._asked}
        for what, listener in self._listeners.items():
            page.on(what, listener)

    def leave(self) -> None:
        """Leave the page, for another visitor who finds nothing of this one in the browser; listen no longer."""
        self.page.evaluate("() => { try { localStorage.clear(); sessionStorage.clear(); } catch {} }")
        self.page.goto("about:blank")
        self.page.mouse.up()
        self.page.mouse.move(0, 0)
        self.page.context.clear_cookies()
        for what, listener in self._listeners.items():
            self.page.remove_listener(what, listener)

    def _failed(self, one: Any) -> None:
        self.errors.append(str(one))

    def _asked(self, one: Any) -> None:
        url = one.url
        if not url.startswith((self.address, "blob:", "data:", "file:", self.address.replace("http", "ws", 1))):
            self.foreign.append(url)

    def open(self, query: str = "", *, text: bool = True) -> "Viewer":
        """Go to an address and wait until the page is there."""
        self.page.goto(f"{self.address}/{query}")
        self.page.wait_for_function("window.Bokeh?.documents.length && Bokeh.documents[0].is_idle")
        if text:
            self.page.locator(".t").first.wait_for()
        return self

    def lines(self, name: str) -> dict[str, NDArray[np.float64]]:
        """Visible curves of a figure, by their names."""
        found = self.page.evaluate(LINES, name)
        return {name: np.array(values, np.float64) for name, values in found.items()}

    def marks(self, name: str) -> dict[str, float]:
        """Where the cursor and the fork of a figure are."""
        found: dict[str, float] = self.page.evaluate(MARKS, name)
        return found

    def evaluate(self, script: str, argument: Any = None) -> Any:
        """Run one of the scripts above."""
        return self.page.evaluate(script, argument)

    def field(self, label: str) -> Any:
        """The control of this name."""
        return self.page.get_by_label(label, exact=True)

    def button(self, name: str) -> Any:
        """The button of this name that is shown."""
        return self.page.get_by_role("button", name=name, exact=True).locator("visible=true").first

    def _heard(self, one: Any) -> None:
        """Keep errors and warnings, whoever complains."""
        if one.type in ("error", "warning"):
            self.errors.append(one.text)

    def rows(self, text: str | None = None, *, column: str | None = None) -> Any:
        """The rows of the tables that are shown; of the one that has such a column."""
        rows = self.page.locator(".tabulator-row:visible")
        if column is not None:
            rows = rows.filter(has=self.page.locator(f".tabulator-cell[tabulator-field={column}]"))
        return rows if text is None else rows.filter(has_text=text)

    def cells(self, row: Any) -> Any:
        """The cells of a row, without its number and the empty one that Panel puts last."""
        return row.locator(".tabulator-cell[tabulator-field]:not([tabulator-field=_index])")

    def colour(self, one: Any) -> str:
        """The background of the first element that is found; "" while there is none, or it is being replaced."""
        found: list[str] = one.evaluate_all("(all) => all.map((one) => getComputedStyle(one).backgroundColor)")
        return found[0] if found else ""

    def token(self, at: int) -> Any:
        """A token of the text."""
        return self.page.locator(f".t[data-i='{at}']")

    def violations(self) -> list[str]:
        """What axe-core finds serious or critical."""
        if not self.page.evaluate("'axe' in window"):
            self.page.add_script_tag(path=str(AXE))
        found = self.page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
        return [
            f"{one['id']}: {one['nodes'][0]['html'][:200]}" for one in found if one["impact"] in ("serious", "critical")
        ]


def until(read: Callable[[], T], right: Callable[[T], bool], *, page: Any = None) -> T:
    """Read again and again until it is right; return what was read, for an assertion to say what it was instead."""
    end = time.monotonic() + PATIENCE
    while True:
        found = read()
        if right(found) or time.monotonic() > end:
            return found
        page.wait_for_timeout(40) if page is not None else time.sleep(0.04)


def becomes(viewer: Viewer, read: Callable[[], object], wanted: object) -> None:
    """Wait until what is read from the page is this."""
    found = until(read, lambda found: bool(found == wanted), page=viewer.page)
    assert found == wanted, f"{found!r}, not {wanted!r}"


def settled(viewer: Viewer, read: Callable[[], T]) -> T:
    """Wait until what is read is the same four times in a row: tables that are filled above a plot push it down."""
    seen: list[T] = [read()]

    def still(found: T) -> bool:
        seen.append(found)
        return len(seen) > 4 and seen[-4:] == [found] * 4

    return until(read, still, page=viewer.page)


def same(viewer: Viewer, name: str, wanted: Mapping[str, Any], *, atol: float = 2e-6) -> None:
    """Wait until a figure shows exactly these curves."""
    close: dict[str, Any] = {"rtol": 2e-4, "atol": atol, "equal_nan": True}

    def right(found: Mapping[str, Any]) -> bool:
        return found.keys() == wanted.keys() and all(
            found[key].shape == wanted[key].shape and np.allclose(found[key], wanted[key], **close) for key in wanted
        )

    found = until(lambda: viewer.lines(name), right, page=viewer.page)
    assert found.keys() == wanted.keys(), f"{name} shows {list(found)}, not {list(wanted)}"
    for key in wanted:
        np.testing.assert_allclose(found[key], wanted[key], err_msg=f"{name}, {key}", **close)


def shows(viewer: Viewer, name: str, wanted: Mapping[str, Any], *, rtol: float = 2e-4, atol: float = 2e-6) -> None:
    """Wait until a figure shows these curves, whatever comes after their ends and whatever else it shows."""

    def right(found: Mapping[str, Any]) -> bool:
        sides = [(found.get(key, np.empty(0))[: len(values)], values) for key, values in wanted.items()]
        return all(a.shape == b.shape and np.allclose(a, b, rtol=rtol, atol=atol, equal_nan=True) for a, b in sides)

    found = until(lambda: viewer.lines(name), right, page=viewer.page)
    for key, values in wanted.items():
        assert key in found, f"{name} shows {list(found)}, and not {key}"
        close: dict[str, Any] = {"rtol": rtol, "atol": atol, "err_msg": f"{name}, {key}"}
        np.testing.assert_allclose(found[key][: len(values)], values, **close)


def click_plot(viewer: Viewer, name: str, x: float, y: float) -> None:
    """Click a place of a figure, once it stands still."""
    viewer.page.mouse.click(*settled(viewer, lambda: viewer.evaluate(PIXEL, [name, x, y])))


@contextlib.contextmanager
def running(stores: Sequence[Path], *options: str, anew: bool = True) -> Iterator[str]:
    """Serve stores on a free port in a process of its own; yield the address.

    The process starts anew, or is a fork of one that has imported everything.
    """
    words = [*map(str, stores), "--port", "0", *options]
    with contextlib.ExitStack() as left:
        said = left.enter_context(tempfile.TemporaryFile("w+"))  # a pipe that nobody reads would be full one day
        process: subprocess.Popen[str] | forked.Forked
        if anew:
            command = [sys.executable, "-m", "view", *words]
            process = subprocess.Popen(command, cwd=house.ROOT, stdout=subprocess.PIPE, stderr=said, text=True)
        else:
            process = forked.start("view", *words, errors=said)
        assert process.stdout is not None
        line = process.stdout.readline()
        try:
            if not line.startswith("serving http://"):
                said.seek(0)
                raise AssertionError(f"the server said {line!r} and {said.read()}")
            yield line.split()[1].rstrip("/")
        finally:
            process.terminate()
            process.communicate(timeout=ENDING)
        said.seek(0)
        told = said.read()
        assert f'File "{house.ROOT / "view"}/' not in told, told  # Bokeh's own, of visitors who left, are no fault


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """Start Chromium; without one, fail in CI and skip, loudly, elsewhere."""
    from playwright.sync_api import sync_playwright

    found = next((path for name in CHROMIUM if (path := shutil.which(name))), None)
    if found is None:
        why = "no Chromium is installed, so the page is NOT tested; install the package chromium and run again"
        if os.environ.get("CI"):
            pytest.fail(why)
        pytest.skip(why)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=FLAGS)
        yield chromium
        chromium.close()


@contextlib.contextmanager
def visiting(chromium: Any, address: str, *, height: int = 1500) -> Iterator[Viewer]:
    """Let a visitor see the page; at the end nothing may have gone wrong in it, and nothing left the machine.

    Each visitor loads the page anew, in the window that the one before has left: in one of its own the browser would
    compile all scripts again.
    """
    if not chromium.contexts:
        chromium.new_context(accept_downloads=True).new_page()
    (context,) = chromium.contexts
    (page,) = context.pages
    page.set_viewport_size({"width": 1280, "height": height})
    one = Viewer(page, address)
    try:
        yield one
        one.leave()
    except BaseException:
        context.close()  # the next visitor finds nothing of one who failed
        raise
    assert not one.errors, one.errors
    assert not one.foreign, one.foreign


@contextlib.contextmanager
def serving(stores: Sequence[Path]) -> Iterator[tuple[Any, str]]:
    """Start a browser, and a server of these stores; yield what `visiting` takes."""
    with browser() as chromium, running(stores, anew=False) as address:
        yield chromium, address
