"""The page in a real browser, against a real server: every control is used, and what it does is checked with numbers.

The numbers come from the activations by the oracle of these tests; curves are read from Bokeh's models in the browser,
colours from the document.
"""

import csv
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import datastore
from tests.view import oracle, stores
from tests.view.browser import (
    BANDS,
    IMAGE,
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


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stores of the same games, the second of half of them; one without scores; one without a tokenizer."""
    root = tmp_path_factory.mktemp("page")
    stores.game_store(root / "games.zarr")
    stores.game_store(root / "others.zarr", pairs=2)
    stores.plain_store(root / "plain.zarr", pairs=1)
    stores.plain_store(root / "ids.zarr", pairs=1, vocab=False)
    return root


@pytest.fixture(scope="module")
def served(kept: Path) -> Iterator[tuple[Any, str]]:
    """One server and one browser for all tests of this file."""
    names = ("games.zarr", "others.zarr", "plain.zarr", "ids.zarr")
    with serving([kept / name for name in names]) as found:
        yield found


@pytest.fixture
def viewer(served: tuple[Any, str]) -> Iterator[Viewer]:
    """A new page; at the end nothing may have gone wrong in it, and nothing may have left the machine."""
    with visiting(*served) as one:
        yield one


@pytest.fixture(scope="module")
def store(kept: Path) -> datastore.Store:
    """The games."""
    return datastore.open(kept / "games.zarr")


def test_the_controls_of_the_curves_draw_what_they_say(viewer: Viewer, store: datastore.Store) -> None:
    viewer.open("?view=Trajectories&rollout=g1-lie")
    first = [f"{trait}@4" for trait in sorted(stores.TRAITS)]

    def curves(labels: list[str], **how: Any) -> dict[str, Any]:
        return {label: oracle.drawn(store, "g1-lie", label, **how) for label in labels}

    same(viewer, "scores", curves(first))
    viewer.field("Scores as").select_option("raw")
    same(viewer, "scores", curves(first, mode="raw"))
    viewer.field("Scores as").select_option("normalised")
    same(viewer, "scores", curves(first, mode="normalised"))
    viewer.field("Centred on the first token").check()
    same(viewer, "scores", curves(first, mode="normalised", centred=True))
    viewer.field("Centred on the first token").uncheck()
    viewer.field("Velocity (change per token)").check()
    same(viewer, "scores", curves(first, mode="normalised", velocity=True))
    viewer.field("Velocity (change per token)").uncheck()
    viewer.field("Scores as").select_option("cosine")
    smoothing = viewer.field("Smoothing, tokens")
    smoothing.fill("1")
    smoothing.press("Enter")
    same(viewer, "scores", curves(first, smooth=1))
    viewer.field("Layer").select_option("8")
    same(viewer, "scores", curves([f"{trait}@8" for trait in sorted(stores.TRAITS)], smooth=1))
    viewer.field("mood/calm").uncheck()
    same(viewer, "scores", curves(["bs/evasion@8", "bs/lying@8"], smooth=1))
    viewer.field("One line for each").select_option("layer")
    viewer.field("Trait").select_option("bs/lying")
    same(viewer, "scores", curves(["bs/lying@4", "bs/lying@8"], smooth=1))
    viewer.field("One line for each").select_option("component")
    same(viewer, "scores", curves(["bs/lying@8"], smooth=1))


def test_cleaning_takes_dimensions_out_at_every_layer(viewer: Viewer, store: datastore.Store) -> None:
    viewer.open("?view=Trajectories&rollout=g1-lie&mode=raw&smooth=1&lines=layer&trait=bs/lying")
    calibration = store.calibration()
    top = calibration["top_dims"].values
    often = [dim for dim in set(top.ravel().tolist()) if sum(dim in row for row in top.tolist()) >= 3]
    for rule, dims in (("top5-3layers", often), ("all", sorted(set(top.ravel().tolist())))):
        viewer.field("Massive dimensions taken out").select_option(rule)
        wanted = {}
        for layer in (4, 8):
            rows = np.asarray(store.select("residual", rollouts="g1-lie", layers=layer).values, np.float64)
            (vector,) = [d for d in stores.directions() if (d.trait, d.layer) == ("bs/lying", layer)]
            unit = np.asarray(vector.values, np.float64) / np.linalg.norm(np.asarray(vector.values, np.float64))
            rows[:, dims] = 0.0  # what is left of h . v without them
            wanted[f"bs/lying@{layer}"] = rows @ unit
        same(viewer, "scores", wanted)


def test_bands_marks_and_the_range_of_the_curves(viewer: Viewer, store: datastore.Store) -> None:
    viewer.open("?view=Trajectories&rollout=g0-lie&mode=raw&smooth=1")
    bands = {tuple(one) for one in settled(viewer, lambda: viewer.evaluate(BANDS, "scores"))}
    assert {(-0.5, 19.5, "prompt"), (7.5, 19.5, "user"), (29.5, 35.5, "tool"), (19.5, 25.5, "thinking")} <= bands
    assert (41.5, 47.5, "false_claim") in bands
    values = np.array([oracle.drawn(store, "g0-lie", f"{t}@4", mode="raw", smooth=1) for t in stores.TRAITS])
    low, high = settled(viewer, lambda: viewer.evaluate(RANGE, "scores"))
    assert low <= values[:, 4:].min()
    assert values[:, 4:].max() <= high < values[:, 0].max()  # the first token is eight times as large
    norms = {f"residual@{n}": oracle.score(store, "g0-lie", "bs/lying@4")[1] for n in (4,)}
    shows(viewer, "norms", norms, rtol=1e-5)
    assert set(viewer.lines("norms")) == {"residual@4", "residual@8", "residual@12"}
    click_plot(viewer, "scores", 44, (low + high) / 2)
    becomes(viewer, lambda: viewer.marks("scores").get("cursor"), 44)
    becomes(viewer, lambda: viewer.marks("norms").get("cursor"), 44)
    viewer.page.locator(".t.pinned[data-i='44']").wait_for()


def test_tokens_are_shaded_by_the_trait(viewer: Viewer, store: datastore.Store) -> None:
    viewer.open("?view=Transcript&rollout=g2-lie&trait=bs/lying&smooth=1")
    for trait, layer in (("bs/lying", "4"), ("bs/evasion", "8")):
        viewer.field("Trait").select_option(trait)
        viewer.field("Layer").select_option(layer)
        values = oracle.drawn(store, "g2-lie", f"{trait}@{layer}", smooth=1)
        for token in (10, 39, 45, 60, 71):
            wanted = oracle.shade_of(float(values[token]), values)
            found = until(partial(viewer.colour, viewer.token(token)), partial(near, wanted=wanted), page=viewer.page)
            assert near(found, wanted), (trait, token, found, wanted)
    becomes(viewer, viewer.page.locator(".legend .name").inner_text, "bs/evasion@8")
    assert until(viewer.page.locator(".legend .unit").inner_text, lambda unit: "cosine" in unit, page=viewer.page)


def near(found: str, wanted: str) -> bool:
    """Whether two colours are the same but for a rounding of the opacity; what can't be seen has any colour."""
    if not found:
        return False
    (*a, first), (*b, second) = ([float(number) for number in re.findall(r"[\d.]+", one)] for one in (found, wanted))
    return abs(first - second) < 0.006 and (a == b or second < 0.006)


@pytest.mark.parametrize("query", ["?view=Transcript&token=70", "?view=Trajectories&token=70", "?token=70"])
def test_the_pinned_token_is_in_sight(viewer: Viewer, query: str) -> None:
    viewer.page.set_viewport_size({"width": 1280, "height": 500})
    viewer.open(f"{query}&rollout=g0-lie")
    seen = """() => { let found = null;
      const look = (root) => { found ??= root.querySelector(".t.pinned");
        for (const one of root.querySelectorAll("*")) if (one.shadowRoot) look(one.shadowRoot); };
      look(document);
      const [mine, box] = [found, found.closest(".words")].map((one) => one.getBoundingClientRect());
      return box.height > 0 && mine.top >= box.top && mine.bottom <= box.bottom; }"""
    viewer.page.locator(".t.pinned").wait_for(state="attached")
    assert until(lambda: viewer.evaluate(seen), bool, page=viewer.page)


def test_the_text_is_all_there_with_its_blocks_and_spans(viewer: Viewer, store: datastore.Store) -> None:
    viewer.open("?view=Transcript&rollout=g0-lie")
    becomes(viewer, viewer.page.locator(".t").all_text_contents, store.tokens("g0-lie")["text"].tolist())
    titles = viewer.page.locator(".title").all_text_contents()
    assert titles[0] == "system · turn 0"
    assert "assistant · turn 2 · thinking, 6 tokens" in titles
    marked = viewer.page.locator(".t.marked").evaluate_all("(all) => all.map((one) => Number(one.dataset.i))")
    assert marked == list(range(36, 60))
    assert viewer.page.locator(".tag").all_text_contents() == ["audit_response", "false_claim"]
    thinking = viewer.page.locator("details.thinking")
    viewer.field("Fold thinking").check()
    becomes(viewer, lambda: thinking.get_attribute("open"), None)
    viewer.field("Fold thinking").uncheck()
    assert until(lambda: thinking.get_attribute("open"), lambda found: found is not None, page=viewer.page) is not None
    thinking.locator("summary").click()
    becomes(viewer, lambda: thinking.get_attribute("open"), None)


def test_pointing_pinning_and_stepping(viewer: Viewer, store: datastore.Store) -> None:
    viewer.open("?view=Transcript&rollout=g0-lie&smooth=1")
    page = viewer.page
    page.locator(".t[data-i='50']").hover()
    card = page.locator(".card")
    tokens = store.tokens("g0-lie")
    page.locator(".card[data-at='50']").wait_for()
    facts = card.locator("dd").all_text_contents()
    assert facts[1:4] == [str(tokens["token_id"][50]), "50", "assistant, turn 4, response"]
    rows = until(lambda: cells_of(card), lambda rows: len(rows) == 6 and all(map(len, rows)), page=page)
    found = {row[0]: float(row[1]) for row in rows}
    wanted = {label: oracle.drawn(store, "g0-lie", label, smooth=1)[50] for label in found}
    assert len(found) == 6
    np.testing.assert_allclose(list(found.values()), list(wanted.values()), rtol=1e-3)
    every = np.concatenate(
        [oracle.drawn(store, name, "bs/lying@4", smooth=1) for name in map(str, store.rollouts.index)]
    )
    share = until(lambda: shares(card).get("bs/lying@4", ""), bool, page=page)
    assert abs(float(share) - 100 * (every < wanted["bs/lying@4"]).mean()) <= 1.5
    page.locator(".t[data-i='50']").click()
    page.locator(".t.pinned[data-i='50']").wait_for()
    for key, at in (("ArrowRight", "51"), ("ArrowRight", "52"), ("ArrowLeft", "51")):
        page.keyboard.press(key)
        page.locator(f".t.pinned[data-i='{at}']").wait_for()
    assert until(lambda: "token=51" in page.evaluate("location.search"), bool, page=page)


def test_searching_the_text(viewer: Viewer, store: datastore.Store) -> None:
    viewer.open("?view=Transcript&rollout=g0-lie&token=51")
    page, tokens, text = viewer.page, store.tokens("g0-lie"), store.text("g0-lie").lower()
    page.locator(".t.pinned[data-i='51']").wait_for()
    page.get_by_label("Search the text").fill("DID ")
    page.locator(".count", has_text=f"{text.count('did ')} found").wait_for()

    def pinned() -> int:
        return int(page.locator(".t.pinned").get_attribute("data-i") or -1)

    page.get_by_label("Next match").click()
    first = until(pinned, lambda at: at != 51, page=page)
    assert tokens["text"][first] == "did "
    page.get_by_label("Search the text").press("Enter")
    assert until(pinned, lambda at: at > first, page=page) > first
    page.get_by_label("Match before").click()
    page.locator(f".t.pinned[data-i='{first}']").wait_for()
    assert until(lambda: page.evaluate("location.search"), lambda q: f"token={first}" in q, page=page)
    page.get_by_label("Search the text").press("ArrowRight")  # in the field it moves the caret, not the token
    assert pinned() == first


def shares(card: Any) -> dict[str, str]:
    """The percentiles that the card shows."""
    return {row[0]: row[2] for row in cells_of(card) if len(row) > 2}


def cells_of(card: Any) -> list[list[str]]:
    """What the card says of the scores of a token."""
    return [row.split("\t") for row in card.locator("tbody tr").all_inner_texts()]


def test_choosing_rollouts_and_stores(viewer: Viewer, kept: Path) -> None:
    viewer.open("?view=Transcript")
    rollout = viewer.field("Rollout")
    becomes(viewer, rollout.input_value, "g0-honest")
    viewer.button("next →").click()
    becomes(viewer, rollout.input_value, "g0-lie")
    viewer.button("← before").click()
    becomes(viewer, rollout.input_value, "g0-honest")
    rollout.fill("")
    rollout.press_sequentially("g3-l")
    viewer.page.get_by_text("g3-lie", exact=True).click()
    wanted = datastore.open(kept / "games.zarr").tokens("g3-lie")["text"].tolist()
    becomes(viewer, viewer.page.locator(".t").all_text_contents, wanted)
    viewer.field("Store").select_option("ids.zarr")
    shown = datastore.open(kept / "ids.zarr").tokens("g0-honest")["token_id"].tolist()
    becomes(viewer, viewer.page.locator(".t").all_text_contents, [f"⟨{number}⟩" for number in shown])


def test_a_pair_is_offered_and_compared(viewer: Viewer, store: datastore.Store) -> None:
    viewer.open("?view=Compare&rollout=g1-honest&trait=bs/lying&smooth=1")
    others = viewer.field("Compare with (ids, by commas)")
    becomes(viewer, others.input_value, "g1-lie")
    row = viewer.rows("g2-honest", column="fork")
    wanted = ["g2-honest", "g2-lie", "40", "56%", "honest", "fabrication"]
    becomes(viewer, lambda: viewer.cells(row).all_inner_texts()[:6], wanted)
    viewer.cells(row).first.click()
    curves = [oracle.drawn(store, name, "bs/lying@4", smooth=1) for name in ("g2-honest", "g2-lie")]
    same(viewer, "rollouts", {"g2-honest (honest)": curves[0], "g2-lie (fabrication)": curves[1]})
    labels = [f"{trait}@4" for trait in sorted(stores.TRAITS)]
    changes = {
        label: oracle.drawn(store, "g2-lie", label, smooth=1) - oracle.drawn(store, "g2-honest", label, smooth=1)
        for label in labels
    }
    same(viewer, "difference", changes)
    becomes(
        viewer, lambda: [viewer.marks(one).get("fork") for one in ("rollouts", "difference")], [stores.FORK - 0.5] * 2
    )
    said = re.compile(r"They part at token 40; bs/lying@\d moves first, 2 tokens later, beyond 3 SD$")
    viewer.page.locator("h2", has_text=said).wait_for()
    moved = viewer.cells(viewer.rows("bs/evasion@4"))
    planted = ("8", "9", "10")  # 9 tokens after
    assert until(moved.nth(1).inner_text, planted.__contains__, page=viewer.page) in planted
    texts = [store.tokens(name)["text"].tolist() for name in ("g2-honest", "g2-lie")]
    ends = ["".join(text[stores.FORK :]).split() for text in texts]
    becomes(viewer, lambda: [side.split() for side in viewer.page.locator(".sides mark").all_inner_texts()], ends)
    others.fill("")
    others.press_sequentially("g0-lie, g1-lie")
    others.press("Enter")
    names = ("g2-honest (honest)", "g0-lie (fabrication)", "g1-lie (fabrication)")
    becomes(viewer, lambda: tuple(viewer.lines("rollouts")), names)


def test_a_click_on_a_trait_shows_it_where_it_moved(viewer: Viewer, store: datastore.Store) -> None:
    viewer.open("?view=Compare&rollout=g2-honest&rollout=g2-lie&trait=bs/lying&smooth=1")
    moved = viewer.cells(viewer.rows("bs/evasion@4"))
    at = int(until(moved.nth(2).inner_text, str.isdigit, page=viewer.page))
    assert at - stores.FORK in (8, 9, 10)
    moved.first.click()
    assert until(lambda: viewer.page.evaluate("location.search"), lambda q: f"token={at}" in q, page=viewer.page)
    becomes(viewer, viewer.field("Trait").input_value, "bs/evasion")
    curves = [oracle.drawn(store, name, "bs/evasion@4", smooth=1) for name in ("g2-honest", "g2-lie")]
    same(viewer, "rollouts", {"g2-honest (honest)": curves[0], "g2-lie (fabrication)": curves[1]})
    seen = np.concatenate([curve[stores.FORK - 32 :] for curve in curves])  # what is shown, and so what has the height
    wanted = (seen.min() - 0.15 * np.ptp(seen), seen.max() + 0.15 * np.ptp(seen))
    fits = pytest.approx(wanted, rel=1e-3)
    assert until(lambda: tuple(viewer.evaluate(RANGE, "rollouts")), lambda f: f == fits, page=viewer.page) == fits


def test_groups_with_bands_and_effect_sizes(viewer: Viewer, store: datastore.Store) -> None:
    viewer.open("?view=Compare&against=Groups&trait=bs/lying&smooth=1")
    page = viewer.page
    lies = [f"g{i}-lie" for i in range(4)]

    def binned(names: list[str], start: int) -> float:
        inside = np.arange(stores.FORK + start, stores.FORK + start + 4)
        return float(np.mean([oracle.drawn(store, name, "bs/lying@4", smooth=1)[inside] for name in names]))

    curve = np.array([binned(lies, start) for start in range(-24, 29, 4)])
    shows(viewer, "groups", {"fabrication": curve}, rtol=1e-3)
    becomes(viewer, lambda: set(viewer.lines("groups")), {"honest", "fabrication"})
    row = viewer.cells(viewer.rows("bs/lying@4", column="effect_size"))
    cells = until(row.all_inner_texts, lambda texts: len(texts) == 10 and bool(texts[9]), page=page)
    means = {
        kind: np.array([oracle.drawn(store, f"g{i}-{kind}", "bs/lying@4", smooth=1)[20:].mean() for i in range(4)])
        for kind in ("honest", "lie")
    }
    a, b = means["honest"], means["lie"]
    effect = (b.mean() - a.mean()) / np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2)
    assert float(cells[8].replace(",", "")) == pytest.approx(effect, rel=1e-2)
    assert cells[1:3] == ["4", "4"]
    assert cells[9] == "1"
    viewer.field("Along").select_option("turn")
    by_turn = until(lambda: viewer.lines("groups"), partial(long, count=5), page=page)
    last = np.concatenate([oracle.drawn(store, name, "bs/lying@4", smooth=1)[36:] for name in lies])
    assert by_turn["fabrication"][4] == pytest.approx(last.mean(), rel=1e-4)
    viewer.field("Along").select_option("annotation")
    by_label = until(lambda: viewer.lines("groups"), partial(long, count=2), page=page)
    spans = np.concatenate([oracle.drawn(store, name, "bs/lying@4", smooth=1)[42:48] for name in lies])
    assert by_label["fabrication"][1] == pytest.approx(spans.mean(), rel=1e-4)
    viewer.field("Compared with").select_option("fabrication")
    flipped = until(lambda: row.nth(8).inner_text(), lambda text: text.startswith("-"), page=page)
    assert float(flipped.replace(",", "")) == pytest.approx(-effect, rel=1e-2)
    viewer.field("Group by").select_option("stakes")
    becomes(viewer, lambda: set(viewer.lines("groups")), {"0", "1", "2"})


def long(lines: dict[str, Any], *, count: int) -> bool:
    """Whether both groups have a value at so many places."""
    return [len(lines.get(name, ())) for name in ("honest", "fabrication")] == [count, count]


def test_two_stores(viewer: Viewer) -> None:
    viewer.open("?view=Compare&against=Stores&rollout=g1-lie&mode=raw&smooth=1")
    viewer.field("Compared with the store").select_option("others.zarr")
    # the same games captured again: the difference is nothing, over all four rollouts that both hold
    same(viewer, "store-difference", {f"{trait}@4": np.zeros(72) for trait in sorted(stores.TRAITS)}, atol=1e-5)
    becomes(viewer, viewer.cells(viewer.rows("bs/lying@4")).nth(1).inner_text, "4")
    viewer.field("Compared with the store").select_option("plain.zarr")
    viewer.page.get_by_text("is not scored in both stores").wait_for()


def test_the_table_of_rollouts(viewer: Viewer, store: datastore.Store) -> None:
    viewer.open("?smooth=1&traits=bs/lying")
    page = viewer.page
    row = viewer.cells(viewer.rows("g1-lie"))
    ids_shown = page.locator(".tabulator-cell[tabulator-field=rollout]:visible")
    mean = oracle.drawn(store, "g1-lie", "bs/lying@4", smooth=1)[20:].mean()
    text = until(lambda: row.all_inner_texts(), lambda cells: len(cells) == 8 and bool(cells[3]), page=page)
    assert text[:3] + text[5:] == ["g1-lie", "72", "fabrication", "single_turn", "audit", "1"]
    assert float(text[3]) == pytest.approx(mean, rel=6e-3)
    page.get_by_role("columnheader", name="lying@4 mean").locator(".tabulator-col-sorter").click()
    means = {
        name: oracle.drawn(store, name, "bs/lying@4", smooth=1)[20:].mean() for name in map(str, store.rollouts.index)
    }
    ranked = sorted(means, key=lambda name: means[name])
    assert ranked != list(means)
    becomes(viewer, ids_shown.all_inner_texts, ranked)
    page.get_by_label("Filter label").fill("fabr")
    page.get_by_label("Filter label").press("Enter")
    becomes(viewer, lambda: sorted(ids_shown.all_inner_texts()), [f"g{i}-lie" for i in range(4)])
    viewer.cells(viewer.rows("g3-lie")).first.click()
    becomes(viewer, viewer.field("Rollout").input_value, "g3-lie")


def test_heatmaps_and_spans(viewer: Viewer, store: datastore.Store) -> None:
    viewer.open("?rollout=g0-lie&trait=bs/lying&smooth=1")
    page = viewer.page
    viewer.button("Heatmaps").click()
    lying = oracle.drawn(store, "g0-lie", "bs/lying@4", smooth=1)
    wanted = lying - np.median(lying[4:])
    image = until(lambda: viewer.evaluate(IMAGE, "trait-by-token"), lambda found: len(found) == 3 * 72, page=page)
    np.testing.assert_allclose(np.array(image, float).reshape(3, 72)[1], wanted, rtol=1e-3, atol=1e-6)
    becomes(viewer, lambda: len(viewer.evaluate(IMAGE, "layer-by-token")), 2 * 72)
    becomes(viewer, lambda: len(viewer.evaluate(IMAGE, "trait-by-rollout")), 3 * 8)
    click_plot(viewer, "trait-by-token", 44.5, 1.5)
    page.locator(".t.pinned[data-i='44']").wait_for()
    viewer.button("Spans").click()
    window = viewer.field("Window, tokens")
    window.fill("8")
    window.press("Enter")
    means = np.convolve(lying, np.ones(8) / 8, mode="valid")
    means[:4] = 0
    best = int(np.argmax(np.abs(means)))
    first = viewer.cells(viewer.rows().first)
    cells = until(first.all_inner_texts, lambda c: len(c) > 3 and c[1:3] == [str(best), str(best + 8)], page=page)
    assert cells[:3] == ["g0-lie", str(best), str(best + 8)]
    assert float(cells[3]) == pytest.approx(means[best], abs=1e-4)
    viewer.field("In").select_option("all rollouts")
    peaks = {}
    for name in map(str, store.rollouts.index):
        values = np.convolve(oracle.drawn(store, name, "bs/lying@4", smooth=1), np.ones(8) / 8, mode="valid")
        peaks[name] = np.abs(values[4:]).max()
    top = max(peaks, key=lambda name: peaks[name])
    becomes(viewer, lambda: first.all_inner_texts()[:1], [top])
    span = until(first.all_inner_texts, lambda cells: len(cells) > 4 and cells[0] == top, page=page)
    viewer.field("Spans of").select_option("clause")
    found = until(first.all_inner_texts, lambda cells: len(cells) > 4 and cells != span, page=page)
    assert found[4].strip()[-1:] in tuple(".!?;,")
    first.nth(4).click()
    assert until(lambda: page.evaluate("location.search"), lambda q: "view=Transcript" in q, page=page)


def test_correlation_and_what_holds_of_the_model(viewer: Viewer, store: datastore.Store) -> None:
    viewer.open("?rollout=g0-lie&trait=bs/lying&smooth=1")
    page = viewer.page
    viewer.button("Correlation").click()
    same_token = until(lambda: viewer.evaluate(IMAGE, "correlation"), lambda f: len(f) == 36, page=page)
    np.testing.assert_allclose(np.array(same_token, float).reshape(6, 6).diagonal(), 1.0, rtol=1e-5)
    viewer.field("Lag, tokens (row first)").fill("2")
    viewer.field("Lag, tokens (row first)").press("Enter")
    other = lambda found: len(found) == 36 and found != same_token  # noqa: E731
    later = until(lambda: viewer.evaluate(IMAGE, "correlation"), other, page=page)
    assert later[0] < 1
    viewer.button("Calibration").click()
    shows(viewer, "norm-by-layer", {"residual": store.calibration()["norm"].values}, rtol=1e-5)
    viewer.button("Captured").click()
    becomes(viewer, lambda: viewer.evaluate(IMAGE, "captured-residual"), [1.0] * (3 * 8))


def test_plots_are_saved(viewer: Viewer, store: datastore.Store, tmp_path: Path) -> None:
    viewer.open("?view=Trajectories&rollout=g1-lie&smooth=1&traits=bs/lying")
    same(viewer, "scores", {"bs/lying@4": oracle.drawn(store, "g1-lie", "bs/lying@4", smooth=1)})
    saved = {}
    for kind in ("png", "svg", "csv"):
        with viewer.page.expect_download() as waiting:
            viewer.button(kind.upper()).click()
        saved[kind] = tmp_path / waiting.value.suggested_filename
        waiting.value.save_as(saved[kind])
        assert saved[kind].name == f"scores.{kind}"
    rows = list(csv.DictReader(saved["csv"].read_text(encoding="utf-8").splitlines()))
    wanted = oracle.drawn(store, "g1-lie", "bs/lying@4", smooth=1)
    np.testing.assert_allclose([float(row["bs/lying@4"]) for row in rows], wanted, rtol=1e-4)
    assert [int(row["position"]) for row in rows] == list(range(72))
    assert saved["png"].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    drawing = saved["svg"].read_text(encoding="utf-8")
    assert drawing.startswith("<svg")
    assert ">bs/lying<" in drawing
    assert "at layer 4" in drawing


def test_an_address_restores_what_was_looked_at(viewer: Viewer, store: datastore.Store) -> None:
    viewer.open("?view=Trajectories&rollout=g1-lie")
    viewer.field("Scores as").select_option("raw")
    viewer.field("Layer").select_option("8")
    viewer.field("Trait").select_option("mood/calm")
    viewer.field("bs/evasion").uncheck()
    viewer.token(45).click()
    page = viewer.page
    address = until(lambda: page.evaluate("location.search"), lambda q: "token=45" in q, page=page)
    wanted = {label: oracle.drawn(store, "g1-lie", label, mode="raw") for label in ("bs/lying@8", "mood/calm@8")}
    same(viewer, "scores", wanted)
    viewer.open(address)
    same(viewer, "scores", wanted)
    becomes(viewer, viewer.field("Trait").input_value, "mood/calm")
    becomes(viewer, lambda: page.locator(".t.pinned").get_attribute("data-i"), "45")
    becomes(viewer, lambda: viewer.marks("scores").get("cursor"), 45)
    becomes(viewer, lambda: page.evaluate("location.search"), address)
    viewer.button("Transcript").click()
    assert until(lambda: page.evaluate("location.search"), lambda q: "view=Transcript" in q, page=page)
    page.go_back()
    assert until(lambda: "bk-active" in (viewer.button("Trajectories").get_attribute("class") or ""), bool, page=page)


def test_dark_and_light(viewer: Viewer) -> None:
    viewer.open("?view=Trajectories&rollout=g1-lie")
    paper = partial(viewer.colour, viewer.page.locator("body"))
    light, dark = "rgb(255, 255, 255)", "rgb(27, 30, 35)"
    becomes(viewer, paper, light)
    viewer.button("Dark").click()
    viewer.button("Light").wait_for()
    viewer.page.locator(".t").first.wait_for()
    becomes(viewer, paper, dark)
    becomes(viewer, viewer.field("Rollout").input_value, "g1-lie")
    viewer.button("Compare").click()
    becomes(viewer, partial(viewer.colour, viewer.rows("g2-lie")), dark)
    viewer.button("Light").click()
    viewer.button("Dark").wait_for()
    becomes(viewer, paper, light)


@pytest.mark.parametrize(
    "query",
    [
        "?",
        "?theme=dark",
        "?view=Transcript&token=45&theme=dark",
        "?view=Trajectories",
        "?view=Compare",
        "?view=Compare&theme=dark",
    ],
)
def test_no_serious_barrier(viewer: Viewer, query: str) -> None:
    viewer.open(query)
    viewer.page.wait_for_timeout(1000)  # names are given every 0.7 s; looking for what lacks one takes a second
    assert until(viewer.violations, lambda found: not found, page=viewer.page) == []


def test_it_fits_a_small_and_a_large_window(viewer: Viewer) -> None:
    viewer.open("?view=Compare&rollout=g1-honest")
    fits = "document.scrollingElement.scrollWidth <= innerWidth"
    for width in (1280, 2560):
        viewer.page.set_viewport_size({"width": width, "height": 1000})
        assert until(lambda: viewer.page.evaluate(fits), bool, page=viewer.page)
