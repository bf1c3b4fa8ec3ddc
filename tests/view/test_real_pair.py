"""The demo's own store in a browser: a lying game of the secret number and its honest twin, found as anyone would.

What the page says is read as a visitor reads it, by mouse and by keyboard alone, and compared with numbers that are
computed here from the scores and the token ids.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import datastore
import project
from tests import commands, house
from tests.view import stores
from tests.view.browser import Viewer, becomes, serving, shows, until, visiting

GAME = house.ROOT / "experiments" / "secret_number" / "data"
MOST_TABS = 300
RULES = ((3, 2), (2, 2), (3, 1), (2, 1), (1, 1))
"""Standard deviations, and for how many tokens in a row; the first rule by which anything moves is said."""
FOCUSED = """() => {
  let one = document.activeElement;
  while (one?.shadowRoot?.activeElement) one = one.shadowRoot.activeElement;
  return one; }"""
NAMED = """(one) => {
  const labels = Array.from(one.labels ?? [], (label) => label.textContent.trim());
  if (one === document.body) return "";
  return (one.getAttribute("aria-label") ?? labels[0] ?? one.textContent).trim().slice(0, 80); }"""
RING = """(one) => {
  const style = getComputedStyle(one);
  return [style.outlineStyle, style.outlineWidth, style.outlineColor, style.boxShadow, style.borderColor].join(); }"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> datastore.Store:
    """What `make demo` makes of the games: captured, calibrated, scored along the committed directions."""
    if not (GAME / "secret-number" / "model.safetensors").is_file():
        pytest.skip("the model of the secret-number game is not in this checkout")
    return datastore.open(stores.once(tmp_path_factory, "real", _make) / "run.zarr")


def _make(root: Path) -> None:
    path = str(root / "run.zarr")
    steps = [
        ["capture", "--store", path, "--experiment", str(GAME), "--prompt-set", "secret_number"],
        ["calibrate", path],
        ["project", path, "--vectors", str(GAME / "extraction"), "--steering", str(GAME / "steering")],
    ]
    for step in steps:
        more = ["--layers", "best,best+1,4,5"] if step[0] == "project" else []
        assert commands.here(*step, *more) == 0


@pytest.fixture(scope="module")
def served(store: datastore.Store) -> Iterator[tuple[Any, str]]:
    """One server and one browser."""
    with serving([store.path]) as found:
        yield found


@pytest.fixture
def viewer(served: tuple[Any, str]) -> Iterator[Viewer]:
    """A new page."""
    with visiting(*served) as one:
        yield one


def cosines(store: datastore.Store, name: str) -> dict[str, NDArray[np.float64]]:
    """Cosine of every token with every direction."""
    found = store.scores(rollouts=name)
    values = found.score.values.astype(np.float64) / found.norm.values
    return {str(label): values[:, j] for j, label in enumerate(found.direction.values)}


def parting(store: datastore.Store, a: str, b: str) -> int:
    """The first token at which two rollouts differ."""
    first, second = (store.tokens(name)["token_id"].tolist() for name in (a, b))
    return next(i for i, (x, y) in enumerate(zip(first, second, strict=False)) if x != y)


def heading(store: datastore.Store, a: str, b: str) -> str:
    """What is to be read above two rollouts: where they part, and which direction first differs, how soon, how far."""
    fork = parting(store, a, b)
    here, there = cosines(store, a), cosines(store, b)
    for beyond, run in RULES:
        moves = []
        for label, curve in here.items():
            spread = curve[4:fork].std()
            change = [(y - x) / spread for x, y in zip(curve[fork:], there[label][fork:], strict=False)]
            for i in range(len(change) - run + 1):
                seen = change[i : i + run]
                if min(seen) > beyond or max(seen) < -beyond:
                    moves.append((i, -max(map(abs, change)), label))
                    break
        if moves:
            after, _, label = min(moves)
            when = {0: "at once", 1: "1 token later"}.get(after, f"{after} tokens later")
            alone = " at that token alone" if run == 1 else ""
            return f"They part at token {fork}; {label} moves first, {when}, beyond {beyond} SD{alone}"
    raise AssertionError("nothing moves")


def test_a_newcomer_finds_where_a_lie_parts_from_its_honest_twin(viewer: Viewer, store: datastore.Store) -> None:
    """From the first page, by nothing but what stands on it: Compare, the first pair, the heading; then the groups."""
    page, table = viewer.open().page, store.rollouts
    page.get_by_text("Compare", exact=True).click()
    page.get_by_text("Pairs that share a prefix").wait_for()
    first = viewer.cells(viewer.rows(column="fork").first)
    a, b, fork, _, kind_a, kind_b = until(first.all_inner_texts, lambda cells: len(cells) == 6, page=page)
    first.first.click()
    assert [kind_a, kind_b] == [table["classification"][a], table["classification"][b]]
    assert kind_a == "honest" != kind_b
    assert int(fork) == parting(store, a, b) == table["fork"][a] == table["fork"][b]  # as the generator recorded it
    becomes(viewer, page.locator("h2", has_text="They part at token").inner_text, heading(store, a, b))
    ends = ["".join(store.tokens(name)["text"].tolist()[int(fork) :]).split() for name in (a, b)]
    becomes(viewer, lambda: [side.split() for side in page.locator(".sides mark").all_inner_texts()], ends)
    becomes(viewer, lambda: viewer.marks("difference").get("fork"), int(fork) - 0.5)
    assert f"rollout={a}&rollout={b}" in address(viewer, f"rollout={a}&rollout={b}")
    page.get_by_text("Groups", exact=True).click()
    scores = store.scores()
    scores = scores.assign(score=scores.score / scores.norm)
    wanted = project.compare(store, scores, "classification", segment="response").set_index(["direction", "group"])
    for label in map(str, scores.direction.values):
        row = viewer.cells(viewer.rows(label, column="effect_size"))
        cells = until(row.all_inner_texts, lambda cells: len(cells) > 9 and bool(cells[9]), page=page)
        # the page sets the others against the honest ones, project.compare the honest ones against the others
        assert float(cells[8].replace(",", "")) == pytest.approx(-wanted["effect_size"][label, "honest"], abs=1e-3)
        assert float(cells[9]) == pytest.approx(1 - wanted["auroc"][label, "honest"], abs=1e-3)


def test_the_curves_of_a_pair_are_those_of_its_activations(viewer: Viewer, store: datastore.Store) -> None:
    one = store.scores(rollouts=str(store.rollouts.index[0])).isel(direction=0)
    viewer.open(f"?view=Compare&smooth=1&mode=raw&trait={one.trait.values}&layer={int(one.layer)}")
    row = viewer.cells(viewer.rows(column="fork").nth(2))
    a, b = until(row.all_inner_texts, lambda cells: len(cells) == 6, page=viewer.page)[:2]
    row.first.click()
    kinds = store.rollouts["classification"]
    folder = GAME / "extraction" / str(one.trait.values)
    (file,) = folder.rglob(f"{one.method.values}/layer{int(one.layer)}.pt")
    vector = torch.load(file, weights_only=True).to(torch.float64).numpy()
    wanted = {}
    for name in (a, b):
        rows = np.asarray(store.select("residual", rollouts=name, layers=int(one.layer)).values, np.float64)
        wanted[f"{name} ({kinds[name]})"] = rows @ (vector / np.linalg.norm(vector))
    shows(viewer, "rollouts", wanted, rtol=1e-4, atol=1e-4)


# -- by keyboard alone -----------------------------------------------------------------------------------------------


def tab_to(viewer: Viewer, wanted: str, *, key: str = "Tab") -> Any:
    """Press Tab until what is called so has the focus; every stop on the way must be seen to have it."""
    page = viewer.page
    passed = []
    for _ in range(MOST_TABS):
        page.keyboard.press(key)
        one = page.evaluate_handle(FOCUSED)
        passed.append(name := one.evaluate(NAMED))
        if passed[-1] and re.fullmatch(wanted, name):
            return one
    raise AssertionError(f"{wanted} is not reached by {key}, but {passed}")


def seen(viewer: Viewer, one: Any) -> bool:
    """Whether an element looks otherwise with the focus than without, once it has changed from one to the other."""
    focused = one.evaluate(RING)
    one.evaluate("(one) => one.blur()")
    left = until(lambda: one.evaluate(RING), lambda found: found != focused, page=viewer.page)
    one.evaluate("(one) => one.focus({focusVisible: true})")
    return bool(focused != left)


def address(viewer: Viewer, wanted: str) -> str:
    """The query of the address, once it says so."""
    return until(lambda: str(viewer.page.evaluate("location.search")), lambda q: wanted in q, page=viewer.page)


def press(viewer: Viewer, *keys: str) -> None:
    for key in keys:
        viewer.page.keyboard.press(key)


def test_the_whole_way_by_keyboard(viewer: Viewer, store: datastore.Store) -> None:
    page, keyboard = viewer.open().page, viewer.page.keyboard
    name = str(store.rollouts.index[5])
    assert seen(viewer, tab_to(viewer, "Rollout"))
    keyboard.press("Control+A")
    keyboard.type(name)
    page.get_by_text(name, exact=True).locator("visible=true").first.wait_for()
    press(viewer, "ArrowDown", "Enter")
    assert f"rollout={name}" in address(viewer, f"rollout={name}")
    becomes(viewer, page.locator(".t").all_text_contents, store.tokens(name)["text"].tolist())
    assert seen(viewer, tab_to(viewer, "Trait"))
    before, chosen = page.locator(".legend .name").inner_text(), viewer.field("Trait").input_value()
    keyboard.press("ArrowDown")
    trait = str(until(viewer.field("Trait").input_value, lambda value: value != chosen, page=page))
    shaded = until(page.locator(".legend .name").inner_text, lambda text: text.startswith(trait), page=page)
    assert shaded.startswith(trait)
    assert shaded != before
    assert seen(viewer, tab_to(viewer, "Text of the rollout"))
    for key, at in (("ArrowRight", 0), ("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1)):
        keyboard.press(key)
        page.locator(f".t.pinned[data-i='{at}']").wait_for(state="attached")
    assert "token=1" in address(viewer, "token=1")
    becomes(viewer, lambda: page.locator(".card").get_attribute("data-at"), "1")
    assert seen(viewer, tab_to(viewer, "Compare", key="Shift+Tab"))
    keyboard.press("Enter")
    assert "view=Compare" in address(viewer, "view=Compare")
    pairs = viewer.rows(column="fork")
    until(pairs.count, lambda count: count > 1, page=page)
    words = until(viewer.cells(pairs.first).all_inner_texts, lambda cells: len(cells) == 6, page=page)
    a, b, fork = words[:3]
    second = until(viewer.cells(pairs.nth(1)).all_inner_texts, lambda cells: len(cells) == 6, page=page)[:3]
    row = tab_to(viewer, f"0{re.escape(''.join(words).strip())}")
    assert seen(viewer, row)
    keyboard.press("Enter")
    assert f"rollout={a}&rollout={b}" in address(viewer, f"rollout={a}&rollout={b}")
    assert f"token={fork}" in address(viewer, f"token={fork}")
    page.locator("h2", has_text=f"They part at token {fork};").wait_for()
    press(viewer, "ArrowDown", "Enter")
    assert f"rollout={second[0]}&rollout={second[1]}" in address(viewer, f"rollout={second[0]}&rollout={second[1]}")


def test_every_stop_of_the_keyboard_is_seen(viewer: Viewer) -> None:
    viewer.open("?view=Compare")
    until(viewer.rows().count, lambda count: count > 1, page=viewer.page)
    viewer.page.locator("h2", has_text="They part at token").wait_for()  # the pair that is offered is there
    unseen, names = [], []
    for _ in range(MOST_TABS):
        viewer.page.keyboard.press("Tab")
        one = viewer.page.evaluate_handle(FOCUSED)
        if one.evaluate("(one) => one === document.body"):
            break
        names.append(one.evaluate(NAMED))
        if not seen(viewer, one):
            unseen.append(names[-1])
    assert unseen == []
    assert {"Store", "Compare", "Rollout", "Trait", "Layer"} <= set(names)
