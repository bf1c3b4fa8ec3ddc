"""Every control of the page is used by some test: the list is the page's own, and what no other file uses is here."""

import ast
import csv
import re
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import panel as pn
import pytest
from numpy.typing import NDArray

import datastore
import project
from experiments.direction import Direction
from tests.view import oracle, stores
from tests.view.browser import (
    IMAGE,
    PIXEL,
    RANGE,
    Viewer,
    becomes,
    click_plot,
    same,
    serving,
    settled,
    shows,
    until,
    visiting,
)
from view.model import Models
from view.page import Page
from view.state import VIEWS, State

GAMES = 9
NAMES = ("games.zarr", "others.zarr", "parts.zarr")
FIRST = [f"{trait}@4" for trait in sorted(stores.TRAITS)]
TRANSCRIPT = Path(__file__).parents[2] / "view" / "static" / "transcript.js"
CURVES, OTHERS = "test_the_controls_of_the_curves_draw_what_they_say", "test_choosing_rollouts_and_stores"
PAIR, GROUPS = "test_a_pair_is_offered_and_compared", "test_groups_with_bands_and_effect_sizes"
SPANS, MODEL = "test_heatmaps_and_spans", "test_correlation_and_what_holds_of_the_model"
TEXT, CHOICES = "test_searching_the_text", "test_views_sections_and_comparisons_are_chosen"
USED = {
    "Store": OTHERS,
    "View": CHOICES,
    "Rollout": OTHERS,
    "← before": OTHERS,
    "next →": OTHERS,
    "Compare with (ids, by commas)": PAIR,
    "Trait": CURVES,
    "Layer": CURVES,
    "Scores as": CURVES,
    "Massive dimensions taken out": "test_cleaning_takes_dimensions_out_at_every_layer",
    "Smoothing, tokens": CURVES,
    "Centred on the first token": CURVES,
    "Velocity (change per token)": CURVES,
    "Fold thinking": "test_the_text_is_all_there_with_its_blocks_and_spans",
    "One line for each": CURVES,
    "Traits drawn": "test_traits_are_drawn_and_left_out",
    "The store has changed: reload": "test_a_store_that_changed_offers_to_be_reloaded",
    "Dark": "test_dark_and_light",
    "Section": CHOICES,
    "What is compared": CHOICES,
    "Group by": GROUPS,
    "Compared with": GROUPS,
    "Along": GROUPS,
    "Compared with the store": "test_two_stores",
    "Spans of": SPANS,
    "Window, tokens": SPANS,
    "In": SPANS,
    "Lag, tokens (row first)": MODEL,
    "Correlation in": "test_correlations_of_all_rollouts_are_pooled_within_each",
    "Rollouts shown": "test_more_rollouts_than_a_heatmap_holds_are_shown_in_parts",
    "PNG": "test_every_plot_is_saved",
    "SVG": "test_every_plot_is_saved",
    "CSV": "test_every_plot_is_saved",
    "Search the text": TEXT,
    "Match before": TEXT,
    "Next match": TEXT,
}
"""Each control, and the test that uses it and says what must come of it."""


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More games than one page of the table holds; two of them in another store; one game with two components."""
    root = tmp_path_factory.mktemp("controls")
    stores.game_store(root / "games.zarr", pairs=GAMES)
    stores.game_store(root / "others.zarr", pairs=2)
    rollouts = [stores.game_rollout(0, kind) for kind in ("honest", "lie")]
    components = ("residual", "attn_out")
    made = stores.write(
        root / "parts.zarr", rollouts, stores.activations, vocab=stores.vocabulary(), components=components
    )
    project.scores(made, [_of(component) for component in components])
    return root


def _of(component: str) -> Direction:
    values = np.random.default_rng(5).standard_normal(stores.WIDTH).astype(np.float32)
    return Direction(trait="bs/lying", layer=4, values=values, component=component, method="probe", position="all")


@pytest.fixture(scope="module")
def store(kept: Path) -> datastore.Store:
    """The games."""
    return datastore.open(kept / "games.zarr")


@pytest.fixture(scope="module")
def served(kept: Path) -> Iterator[tuple[Any, str]]:
    """One server and one browser."""
    with serving([kept / name for name in NAMES]) as found:
        yield found


@pytest.fixture
def viewer(served: tuple[Any, str]) -> Iterator[Viewer]:
    """A new page."""
    with visiting(*served) as one:
        yield one


# -- the list --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Widget.name is deprecated:PendingDeprecationWarning")
@pytest.mark.filterwarnings("ignore:button_type is deprecated:PendingDeprecationWarning")
@pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame")
def test_every_control_is_used_by_a_test(store: datastore.Store) -> None:
    page = Page(Models([store]))
    for view in VIEWS:
        page.go(view=view)
    for section in State.param.section.objects:
        page.go(view="Overview", section=section)
    whole = page.panel()
    names = {str(one.name) for one in whole.select(pn.widgets.Widget) if not isinstance(one, pn.widgets.Tabulator)}
    names -= {""}  # the list of traits has its heading above it
    names |= set(re.findall(r'(?:find|before|after)\.setAttribute\("aria-label", "([^"]+)"', TRANSCRIPT.read_text()))
    assert names | {"Traits drawn"} == set(USED)
    tests = {
        node.name
        for file in Path(__file__).parent.glob("test_*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    }
    assert set(USED.values()) <= tests
    figures = {one.object.name for one in whole.select(pn.pane.Bokeh)}
    assert figures == {name for names in FIGURES.values() for name in names}


# -- choices ---------------------------------------------------------------------------------------------------------


def test_views_sections_and_comparisons_are_chosen(viewer: Viewer) -> None:
    viewer.open()
    page = viewer.page
    shown = {
        "Overview": ("section", {"Heatmaps": "trait-by-token", "Spans": "", "Correlation": "correlation"}),
        "Compare": ("against", {"Groups": "groups", "Stores": "store-difference", "Pair": "rollouts"}),
    }
    more = {"Calibration": "norm-by-layer", "Captured": "captured-residual", "Rollouts": ""}
    for view, (field, choices) in shown.items():
        viewer.button(view).click()
        for choice, figure in (choices | (more if view == "Overview" else {})).items():
            viewer.button(choice).click()
            first = State.param[field].default == choice
            wanted = "" if first else choice
            becomes(viewer, partial(asked, viewer, field), wanted)
            if figure:
                assert until(partial(visible, viewer, figure), bool, page=page), choice
    viewer.button("Transcript").click()
    becomes(viewer, page.locator(".bk-Figure:visible").count, 0)
    viewer.button("Trajectories").click()
    assert until(lambda: visible(viewer, "scores"), bool, page=page)


def asked(viewer: Viewer, field: str) -> str:
    """What the address says of a field; nothing where it is as at first."""
    found: str = viewer.page.evaluate("(name) => new URLSearchParams(location.search).get(name) ?? ''", field)
    return found


def visible(viewer: Viewer, figure: str) -> bool:
    """Whether a figure has a place on the screen."""
    script = """(name) => { const one = Bokeh.documents[0].get_model_by_name(name);
      return one !== null && (Bokeh.index.find_one(one)?.el.getBoundingClientRect().width ?? 0) > 100; }"""
    found: bool = viewer.evaluate(script, figure)
    return found


def test_traits_are_drawn_and_left_out(viewer: Viewer, store: datastore.Store) -> None:
    viewer.open("?view=Trajectories&rollout=g1-lie&smooth=1")
    curves = {label: oracle.drawn(store, "g1-lie", label, smooth=1) for label in FIRST}
    for trait in ("bs/lying", "mood/calm"):
        viewer.field(trait).uncheck()
    same(viewer, "scores", {"bs/evasion@4": curves["bs/evasion@4"]})
    viewer.field("bs/lying").check()
    same(viewer, "scores", {label: curves[label] for label in ("bs/evasion@4", "bs/lying@4")})
    viewer.field("mood/calm").check()
    same(viewer, "scores", curves)
    becomes(viewer, partial(asked, viewer, "traits"), "")


def test_a_line_for_each_component(viewer: Viewer, kept: Path) -> None:
    viewer.open("?store=parts.zarr&view=Trajectories&rollout=g0-lie&smooth=1&mode=raw")
    viewer.field("One line for each").select_option("component")
    made = datastore.open(kept / "parts.zarr")
    wanted = {}
    for component in ("residual", "attn_out"):
        rows = np.asarray(made.select(component, rollouts="g0-lie", layers=4).values, np.float64)
        unit = np.asarray(_of(component).values, np.float64)
        wanted[component] = rows @ (unit / np.linalg.norm(unit))

    def named(lines: dict[str, Any]) -> bool:
        found = [[len(curve) for name, curve in lines.items() if component in name] for component in wanted]
        return found == [[72], [72]]

    found = until(partial(viewer.lines, "scores"), named, page=viewer.page)
    assert len(found) == 2
    for component, curve in wanted.items():
        (name,) = [name for name in found if component in name]
        np.testing.assert_allclose(found[name], curve, rtol=2e-4, atol=1e-5)


def test_smoothing_steps_up_and_down(viewer: Viewer, store: datastore.Store) -> None:
    viewer.open("?view=Trajectories&rollout=g1-lie&traits=bs/lying")
    for name, window in (("more", 6), ("less", 5), ("less", 4)):
        viewer.page.get_by_label(name, exact=True).locator("visible=true").first.click()
        wanted = "" if window == 5 else str(window)  # 5 is as at first
        becomes(viewer, partial(asked, viewer, "smooth"), wanted)
    for _ in range(2):
        viewer.page.get_by_label("less", exact=True).locator("visible=true").first.click()
    same(viewer, "scores", {"bs/lying@4": oracle.drawn(store, "g1-lie", "bs/lying@4", smooth=3)})
    becomes(viewer, partial(asked, viewer, "smooth"), "2")


# -- curves ----------------------------------------------------------------------------------------------------------


def entry(viewer: Viewer, name: str) -> Any:
    """The line of a legend that is shown."""
    return viewer.page.locator(".bk-item").filter(has_text=name).locator("visible=true").first


def test_a_click_in_the_legend_hides_a_curve_and_shows_it_again(viewer: Viewer, store: datastore.Store) -> None:
    viewer.open("?view=Trajectories&rollout=g1-lie&smooth=1")
    curves = {label: oracle.drawn(store, "g1-lie", label, smooth=1) for label in FIRST}
    same(viewer, "scores", curves)
    entry(viewer, "bs/lying").click()
    rest = {label: curve for label, curve in curves.items() if label != "bs/lying@4"}
    same(viewer, "scores", rest)
    names = lambda: entry(viewer, "bs/lying").get_attribute("class") or ""  # noqa: E731
    assert "bk-inactive" in until(names, lambda found: "bk-inactive" in found, page=viewer.page)
    viewer.field("Scores as").select_option("raw")  # what is hidden stays hidden when other numbers are drawn
    same(viewer, "scores", {label: oracle.drawn(store, "g1-lie", label, smooth=1, mode="raw") for label in rest})
    entry(viewer, "bs/lying").click()
    same(viewer, "scores", {label: oracle.drawn(store, "g1-lie", label, smooth=1, mode="raw") for label in FIRST})


def test_a_group_is_hidden_with_its_band(viewer: Viewer) -> None:
    viewer.open("?view=Compare&against=Groups&trait=bs/lying&smooth=1")
    page = viewer.page
    until(lambda: set(viewer.lines("groups")), lambda names: len(names) == 2, page=page)
    becomes(viewer, lambda: viewer.evaluate(AREAS, "groups"), 2)
    entry(viewer, "honest").click()
    becomes(viewer, lambda: set(viewer.lines("groups")), {"fabrication"})
    becomes(viewer, lambda: viewer.evaluate(AREAS, "groups"), 1)


AREAS = """(name) => Bokeh.documents[0].get_model_by_name(name).renderers
  .filter((one) => one.glyph?.type === "VArea" && one.visible).length"""
WIDTH = """(name) => { const x = Bokeh.documents[0].get_model_by_name(name).x_range; return [x.start, x.end]; }"""


def test_a_plot_is_moved_reset_and_zoomed_into(viewer: Viewer) -> None:
    viewer.open("?view=Trajectories&rollout=g1-lie&smooth=1")
    page = viewer.page
    until(lambda: viewer.lines("scores"), bool, page=page)
    width, heights = (partial(viewer.evaluate, script, "scores") for script in (WIDTH, RANGE))
    whole, (low, high) = settled(viewer, lambda: (width(), heights()))
    x, y = settled(viewer, lambda: viewer.evaluate(PIXEL, ["scores", 30, (low + high) / 2]))

    def drag() -> None:
        page.mouse.move(x, y)
        page.mouse.down()
        page.mouse.move(x + 40, y + 30, steps=4)
        page.mouse.move(x + 120, y + 60, steps=4)
        page.mouse.up()

    drag()  # pan is what a drag does at first
    moved = until(width, lambda found: found != whole, page=page)
    assert moved[0] < whole[0]
    assert moved[1] - moved[0] == pytest.approx(whole[1] - whole[0])
    tool(viewer, "Reset").click()
    becomes(viewer, width, whole)
    tool(viewer, "Box Zoom").click()
    drag()
    boxed = until(width, lambda found: found != whole, page=page)
    assert boxed[0] == pytest.approx(30, abs=1)
    assert boxed[1] < whole[1]
    assert until(heights, lambda found: found != [low, high], page=page) != [low, high]
    page.wait_for_timeout(
        400
    )  # two clicks of one button within 0.3 s are a double click to Bokeh, which resets nothing
    tool(viewer, "Reset").click()
    becomes(viewer, width, whole)
    becomes(viewer, heights, [low, high])


@pytest.mark.parametrize(
    ("query", "name", "bounds"),
    [
        ("?view=Compare&rollout=g1-honest&rollout=g1-lie", "rollouts", [0, 71]),
        ("?view=Compare&rollout=g1-honest&rollout=g1-lie", "difference", [0, 71]),
        ("?section=Heatmaps", "trait-by-token", [0, 72]),
        ("?section=Heatmaps", "layer-by-token", [0, 72]),  # so low that its tools must stand above it
        ("?section=Correlation", "correlation-by-lag", [-10, 10]),
    ],
)
def test_what_was_zoomed_into_is_whole_again(viewer: Viewer, query: str, name: str, bounds: list[float]) -> None:
    page = viewer.open(query + "&smooth=1").page
    assert until(partial(drawn, viewer, name), bool, page=page)
    width, heights = (partial(viewer.evaluate, script, name) for script in (WIDTH, RANGE))
    (left, right), (low, high) = settled(viewer, lambda: (width(), heights()))
    corners = [(left + share * (right - left), low + share * (high - low)) for share in (0.3, 0.7)]
    start, stop = settled(viewer, lambda: [viewer.evaluate(PIXEL, [name, *corner]) for corner in corners])
    page.mouse.move(*start)
    tool(viewer, "Box Zoom").click()
    page.mouse.move(*start)
    page.mouse.down()
    page.mouse.move(*stop, steps=6)
    page.mouse.up()
    inside = until(width, lambda found: found != [left, right], page=page)
    assert left < inside[0] < inside[1] < right
    assert until(heights, lambda found: found != [low, high], page=page) != [low, high]
    tool(viewer, "Reset").click()
    becomes(viewer, width, bounds)
    becomes(viewer, heights, [low, high])


def tool(viewer: Viewer, name: str) -> Any:
    """A tool of the first plot that is shown."""
    return viewer.page.locator(f"[title='{name}']").locator("visible=true").first


def test_a_point_of_a_curve_says_what_it_is(viewer: Viewer, store: datastore.Store) -> None:
    viewer.open("?view=Trajectories&rollout=g1-lie&smooth=1&traits=bs/lying")
    curve = oracle.drawn(store, "g1-lie", "bs/lying@4", smooth=1)
    same(viewer, "scores", {"bs/lying@4": curve})
    tips = viewer.page.locator(".bk-Tooltip:visible")
    read = "all => all.map(one => [...one.shadowRoot.children].map(part => part.innerText ?? '').join(' '))"

    token = str(store.tokens("g1-lie")["text"][50]).strip()

    def pointed() -> list[str]:
        x, y = viewer.evaluate(PIXEL, ["scores", 50, float(curve[50])])
        viewer.page.mouse.move(x, y + 40)  # away and there again: a move of before the plot was drawn is no help
        viewer.page.mouse.move(x, y)
        found: list[str] = tips.evaluate_all(read)
        return found

    whole = lambda texts: bool(texts) and all(part in texts[0] for part in ("@4", token))  # noqa: E731
    said = until(pointed, whole, page=viewer.page)[0]
    assert "bs/lying@4" in said
    assert token in said
    words = re.findall(r"-?\d+(?:\.\d+)?", said.split("@4")[1].replace("\u2212", "-"))
    numbers = [float(word) for word in words]
    assert 50 in numbers
    assert any(number == pytest.approx(curve[50], abs=2e-3) for number in numbers)


@pytest.mark.parametrize(
    ("view", "figure"), [("Trajectories", "norms"), ("Compare", "rollouts"), ("Compare", "difference")]
)
def test_a_click_in_any_curve_pins_its_token(viewer: Viewer, view: str, figure: str) -> None:
    viewer.open(f"?view={view}&rollout=g1-honest&rollout=g1-lie&smooth=1")
    until(lambda: viewer.lines(figure), bool, page=viewer.page)
    if view == "Compare":
        viewer.rows(column="fork").first.wait_for()  # the pairs are above the plots
    low, high = viewer.evaluate(RANGE, figure)
    click_plot(viewer, figure, 47, (low + high) / 2)
    viewer.page.locator(".t.pinned[data-i='47']").wait_for()
    becomes(viewer, lambda: viewer.marks(figure).get("cursor"), 47)


def test_columns_that_come_while_a_table_is_built_are_shown(viewer: Viewer) -> None:
    viewer.open()
    until(viewer.rows().count, bool, page=viewer.page)  # the page's own part in the browser is there
    script = """async () => {
      const box = document.body.appendChild(document.createElement("div"));
      const columns = ["a", "b"].map((field) => ({ title: field, field }));
      const table = new Tabulator(box, { data: [{ a: 1, b: 2 }], columns: [columns[0]], debugInitialization: false });
      const early = !table.initialized;
      table.setColumns(columns);
      await new Promise((built) => table.on("tableBuilt", built));
      const found = table.getColumns().map((one) => one.getField());
      box.remove();
      return [early, ...found]; }"""
    assert viewer.evaluate(script) == [True, "a", "b"]


# -- the overview ----------------------------------------------------------------------------------------------------


def test_the_table_is_filtered_and_paged(viewer: Viewer, store: datastore.Store) -> None:
    viewer.open("?traits=bs/lying")
    page, table = viewer.page, store.rollouts
    ids = page.locator(".tabulator-cell[tabulator-field=rollout]:visible")
    becomes(viewer, ids.all_inner_texts, list(map(str, table.index[:15])))
    page.locator(".tabulator-page[data-page='2']").click()
    becomes(viewer, ids.all_inner_texts, list(map(str, table.index[15:])))
    ids.last.click()
    becomes(viewer, viewer.field("Rollout").input_value, str(table.index[-1]))
    kinds: dict[str, tuple[str, Any]] = {
        "set": ("single", table.index[table["prompt_set"] == "single_turn"]),
        "tags": ("audit", table.index),
        "tokens": ("72", table.index),
        "rollout": ("g8", ["g8-honest", "g8-lie"]),
    }
    for title, (typed, names) in kinds.items():
        field = page.get_by_label(f"Filter {title}", exact=True)
        field.fill(typed)
        field.press("Enter")
        becomes(viewer, ids.all_inner_texts, [str(name) for name in names][:15])
        field.fill("")
        field.press("Enter")
        until(ids.count, lambda count: count == 15, page=page)


def test_the_heatmaps_show_layers_and_rollouts_and_go_there(viewer: Viewer, store: datastore.Store) -> None:
    viewer.open("?section=Heatmaps&rollout=g0-lie&trait=bs/lying&smooth=1")
    page = viewer.page
    curves = [oracle.drawn(store, "g0-lie", f"bs/lying@{layer}", smooth=1) for layer in (4, 8)]
    wanted = np.array([curve - np.median(curve[4:]) for curve in curves])
    np.testing.assert_allclose(matrix(viewer, "layer-by-token", 2), wanted, rtol=1e-3, atol=1e-6)
    names = list(map(str, store.rollouts.index))
    means = np.array([[oracle.drawn(store, n, label, smooth=1)[20:].mean() for n in names] for label in FIRST])
    found = matrix(viewer, "trait-by-rollout", 3)
    np.testing.assert_allclose(found, means - means.mean(axis=1, keepdims=True), rtol=1e-3, atol=1e-6)
    click_plot(viewer, "layer-by-token", 61.5, 0.5)
    page.locator(".t.pinned[data-i='61']").wait_for()
    click_plot(viewer, "trait-by-rollout", 5.5, 1.5)
    becomes(viewer, viewer.field("Rollout").input_value, names[5])


def matrix(viewer: Viewer, name: str, rows: int) -> NDArray[np.float64]:
    """The numbers of a heatmap that has been drawn."""
    found = until(lambda: viewer.evaluate(IMAGE, name), lambda values: len(values) > 1, page=viewer.page)
    return np.array(found, np.float64).reshape(rows, -1)


def test_clauses_are_ranked_by_their_mean(viewer: Viewer, store: datastore.Store) -> None:
    viewer.open("?section=Spans&spans=clause&rollout=g0-lie&trait=bs/lying&smooth=1")
    curve = oracle.drawn(store, "g0-lie", "bs/lying@4", smooth=1)
    curve[:4] = 0.0
    texts = [str(text) for text in store.tokens("g0-lie")["text"]]
    ends = [i + 1 for i, text in enumerate(texts) if text.strip()[-1:] in tuple(".!?;,")]
    edges = [0, *ends, *([len(texts)] if ends[-1:] != [len(texts)] else [])]
    spans = [(a, b, curve[a:b]) for a, b in pairwise(edges) if b > 4]
    best = max(spans, key=lambda span: abs(span[2][-(span[1] - max(span[0], 4)) :].mean()))
    cells = until(
        viewer.cells(viewer.rows().first).all_inner_texts, lambda c: len(c) > 4 and bool(c[4]), page=viewer.page
    )
    assert cells[:3] == ["g0-lie", str(best[0]), str(best[1])]
    assert float(cells[3]) == pytest.approx(best[2].mean(), abs=1e-4)
    assert cells[4].split() == "".join(texts[best[0] : best[1]]).split()


def test_correlations_are_those_of_numpy(viewer: Viewer, store: datastore.Store) -> None:
    viewer.open("?section=Correlation&rollout=g0-lie&trait=bs/lying&smooth=1&lag=2")
    labels = [f"{trait}@{layer}" for trait in sorted(stores.TRAITS) for layer in (4, 8)]
    curves = np.array([oracle.drawn(store, "g0-lie", label, smooth=1)[4:] for label in labels])

    def together(lag: int) -> NDArray[np.float64]:
        """Row now, column `lag` tokens later."""
        n = curves.shape[1] - abs(lag)
        first, second = curves[:, max(0, -lag) :][:, :n], curves[:, max(0, lag) :][:, :n]
        whole: NDArray[np.float64] = np.corrcoef(first, second)
        return whole[: len(labels), len(labels) :]

    np.testing.assert_allclose(matrix(viewer, "correlation", 6), together(2), rtol=1e-4, atol=1e-5)
    row = labels.index("bs/lying@4")
    by_lag = np.array([together(lag)[row] for lag in range(-10, 11)])
    same(viewer, "correlation-by-lag", dict(zip(labels, by_lag.T, strict=True)), atol=1e-5)


def test_calibration_is_drawn_at_the_true_layers(viewer: Viewer, store: datastore.Store) -> None:
    viewer.open("?section=Calibration")
    shows(viewer, "alignment-by-layer", {"residual": store.calibration()["mean_alignment"].values}, rtol=1e-5)
    rows = {
        layer: np.concatenate(
            [
                np.asarray(store.select("residual", rollouts=name, layers=layer).values, np.float64)[20:]
                for name in map(str, store.rollouts.index)
            ]
        )
        for layer in stores.LAYERS
    }
    sizes = {layer: np.abs(values).mean(axis=0) for layer, values in rows.items()}
    ratios = [size[0] / np.median(size) for size in sizes.values()]
    shows(viewer, "massive-dimensions", {"residual dim 0": np.array(ratios)}, rtol=0.02)
    script = "(name) => Bokeh.documents[0].get_model_by_name(name).renderers[1].data_source.data.x"
    becomes(viewer, lambda: list(viewer.evaluate(script, "norm-by-layer")), list(stores.LAYERS))
    means = [np.linalg.norm(values, axis=1).mean() for values in rows.values()]
    shows(viewer, "norm-by-layer", {"residual": np.array(means)}, rtol=1e-3)


# -- groups by role --------------------------------------------------------------------------------------------------


def test_groups_along_the_roles(viewer: Viewer, store: datastore.Store) -> None:
    viewer.open("?view=Compare&against=Groups&trait=bs/lying&smooth=1")
    viewer.field("Along").select_option("role")
    own = [*range(20, 30), *range(36, 72)]
    places = {"assistant": own, "system": range(8), "tool": range(30, 36), "user": range(8, 20)}
    wanted = {}
    for kind, group in (("honest", "honest"), ("lie", "fabrication")):
        curves = [oracle.drawn(store, f"g{game}-{kind}", "bs/lying@4", smooth=1) for game in range(GAMES)]
        wanted[group] = np.array([np.concatenate([c[list(at)] for c in curves]).mean() for at in places.values()])
    shows(viewer, "groups", wanted, rtol=1e-3)
    assert len(viewer.lines("groups")["honest"]) == 4


# -- what is saved ---------------------------------------------------------------------------------------------------

FIGURES = {
    "?view=Trajectories&rollout=g0-lie&smooth=1": ["scores", "norms"],
    "?view=Compare&rollout=g0-honest&rollout=g0-lie&smooth=1": ["rollouts", "difference"],
    "?view=Compare&against=Groups": ["groups"],
    "?view=Compare&against=Stores": ["store-difference"],
    "?section=Heatmaps": ["trait-by-token", "layer-by-token", "trait-by-rollout"],
    "?section=Correlation": ["correlation", "correlation-by-lag"],
    "?section=Calibration": ["norm-by-layer", "alignment-by-layer", "massive-dimensions"],
    "?section=Captured": ["captured-residual"],
}
"""Every plot of the page, by where it is."""


@pytest.mark.parametrize("query", FIGURES)
def test_every_plot_is_saved(viewer: Viewer, query: str, tmp_path: Path) -> None:
    viewer.open(query)
    page = viewer.page
    for place, name in enumerate(FIGURES[query]):
        assert until(partial(drawn, viewer, name), bool, page=page), name
        for kind in ("PNG", "SVG", "CSV") if name in ("norms", "correlation") else ("CSV",):
            with page.expect_download() as waiting:
                page.get_by_role("button", name=kind, exact=True).locator("visible=true").nth(place).click()
            path = tmp_path / waiting.value.suggested_filename
            waiting.value.save_as(path)
            assert path.name == f"{name}.{kind.lower()}"
            if kind == "CSV":
                _check_table(path, viewer.lines(name), viewer.evaluate(IMAGE, name))
            else:
                assert path.read_bytes()[:4] == (b"\x89PNG" if kind == "PNG" else b"<svg")


def drawn(viewer: Viewer, name: str) -> bool:
    """Whether a plot shows anything."""
    return any(map(len, viewer.lines(name).values())) or len(viewer.evaluate(IMAGE, name)) > 1


def _check_table(path: Path, curves: dict[str, NDArray[np.float64]], image: list[float]) -> None:
    rows = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))
    heads, body = rows[0], rows[1:]
    for name, curve in curves.items():
        column = [float(row[heads.index(name)] or "nan") for row in body]
        np.testing.assert_allclose(column, curve, rtol=1e-5, equal_nan=True)
    if not curves:
        numbers = [float(value or "nan") for row in body for value in row[1:]]
        np.testing.assert_allclose(numbers, np.array(image, np.float64), rtol=1e-5, equal_nan=True)
