"""What a control does in each view: smoothing and velocity of groups and means, whole stores, parts of large ones."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import datastore
import project
from datastore.schema import Rollout
from tests.view import oracle, stores
from tests.view.browser import IMAGE, Viewer, becomes, click_plot, serving, shows, until, visiting

GAMES = 4
MANY, WHOLE = 2_050, 2_010
"""Rollouts of the large store, and how many of them are captured at both layers."""
KINDS = {"honest": "honest", "fabrication": "lie"}
Floats = NDArray[np.float64]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some games, and a store of more rollouts than one heatmap shows."""
    return stores.once(tmp_path_factory, "everywhere", _make)


def _make(root: Path) -> None:
    stores.game_store(root / "games.zarr", pairs=GAMES)
    many = [_short(i) for i in range(MANY)]
    for rollouts, layers in ((many[:WHOLE], (4, 8)), (many[WHOLE:], (4,))):
        store = stores.write(root / "many.zarr", rollouts, _rows, vocab=stores.vocabulary(), layers=layers)
    project.scores(store, stores.directions(("bs/lying",), layers=(4,)))


def _short(i: int) -> Rollout:
    ids = np.random.default_rng(i).integers(0, len(stores.WORDS), 7).astype(np.int32)
    return Rollout(rollout_id=f"r{i:04d}", token_ids=ids, prompt_end=2, labels={"label": "honest"})


def _rows(one: Rollout, layer: int) -> NDArray[np.float32]:
    return np.random.default_rng([layer, int(one.rollout_id[1:])]).standard_normal((7, stores.WIDTH)).astype(np.float32)


@pytest.fixture(scope="module")
def store(kept: Path) -> datastore.Store:
    """The games."""
    return datastore.open(kept / "games.zarr")


@pytest.fixture(scope="module")
def served(kept: Path) -> Iterator[tuple[Any, str]]:
    """One server and one browser."""
    with serving([kept / "games.zarr", kept / "many.zarr"]) as found:
        yield found


@pytest.fixture
def viewer(served: tuple[Any, str]) -> Iterator[Viewer]:
    """A new page."""
    with visiting(*served) as one:
        yield one


# -- more than a picture holds -----------------------------------------------------------------------------------------


def _image(viewer: Viewer, name: str, *, count: int) -> Floats:
    found = until(lambda: viewer.evaluate(IMAGE, name), lambda values: len(values) == count, page=viewer.page)
    assert len(found) == count
    return np.array(found, np.float64)


def test_more_rollouts_than_a_heatmap_holds_are_shown_in_parts(viewer: Viewer, kept: Path) -> None:
    many = datastore.open(kept / "many.zarr")
    names = list(map(str, many.rollouts.index))
    rows = np.asarray(many.select("residual", layers=4).values, np.float64).reshape(MANY, 7, stores.WIDTH)
    unit = np.asarray(stores.directions(("bs/lying",), layers=(4,))[0].values, np.float64)
    cosines = rows @ (unit / np.linalg.norm(unit)) / np.linalg.norm(rows, axis=2)
    wanted = cosines[:, 2:].mean(axis=1)
    wanted -= wanted.mean()
    viewer.open("?store=many.zarr&section=Heatmaps&smooth=1")
    np.testing.assert_allclose(_image(viewer, "trait-by-rollout", count=2000), wanted[:2000], atol=1e-6)
    viewer.page.get_by_text("Rollouts 1 to 2,000 of 2,050, in the store's order").wait_for()
    viewer.field("Rollouts shown").select_option("2,001 to 2,050")
    np.testing.assert_allclose(_image(viewer, "trait-by-rollout", count=50), wanted[2000:], atol=1e-6)
    viewer.page.get_by_text("Rollouts 2,001 to 2,050 of 2,050").wait_for()
    click_plot(viewer, "trait-by-rollout", 7.5, 0.5)
    becomes(viewer, viewer.field("Rollout").input_value, names[2007])
    address = until(lambda: viewer.page.evaluate("location.search"), lambda q: names[2007] in q, page=viewer.page)
    viewer.open(address)
    np.testing.assert_allclose(_image(viewer, "trait-by-rollout", count=50), wanted[2000:], atol=1e-6)


def test_what_is_captured_of_many_rollouts_is_shown_in_parts(viewer: Viewer) -> None:
    viewer.open("?store=many.zarr&section=Captured")
    assert _image(viewer, "captured-residual", count=2 * 2000).tolist() == [1.0] * 4000
    viewer.field("Rollouts shown").select_option("2,001 to 2,050")
    found = _image(viewer, "captured-residual", count=2 * 50).reshape(2, 50)
    assert found.tolist() == [[1.0] * 50, [1.0] * (WHOLE - 2000) + [0.0] * (MANY - WHOLE)]
    viewer.page.get_by_text("residual: 99% of rollouts x layers").wait_for()


def test_a_store_that_one_heatmap_holds_has_no_parts(viewer: Viewer) -> None:
    viewer.open("?section=Captured&part=7")
    assert _image(viewer, "captured-residual", count=3 * 2 * GAMES).tolist() == [1.0] * 24
    assert viewer.field("Rollouts shown").is_hidden()


# -- smoothing and velocity of what is averaged ------------------------------------------------------------------------


def _apart(curve: Floats, window: int) -> Floats:
    """Smooth what is before the fork and after it by themselves."""
    half, out = window // 2, []
    for side in (curve[: stores.FORK], curve[stores.FORK :]):
        out += [side[max(0, i - half) : i + half + 1].mean() for i in range(len(side))]
    return np.array(out)


@pytest.mark.parametrize(("smooth", "velocity"), [(9, False), (9, True), (1, True)])
def test_curves_of_groups_are_smoothed_on_either_side_of_the_fork(
    viewer: Viewer, store: datastore.Store, smooth: int, velocity: bool
) -> None:
    viewer.open("?view=Compare&against=Groups&trait=bs/lying&smooth=1")
    field = viewer.field("Smoothing, tokens")
    field.fill(str(smooth))
    field.press("Enter")
    if velocity:
        viewer.field("Velocity (change per token)").check()
    wanted = {}
    for group, kind in KINDS.items():
        rows = []
        for game in range(GAMES):
            curve = _apart(oracle.drawn(store, f"g{game}-{kind}", "bs/lying@4", smooth=1), smooth)
            rows.append(np.concatenate([[np.nan], np.diff(curve)]) if velocity else curve)
        inside = np.array(rows)[:, stores.FORK - 24 :]
        wanted[group] = np.array([inside[:, i : i + 4].mean() for i in range(0, inside.shape[1], 4)])
    read = partial(viewer.lines, "groups")

    def right(found: dict[str, Floats]) -> bool:
        return all(
            len(found.get(one, ())) >= 14 and np.allclose(found[one][:14], wanted[one], atol=2e-6) for one in KINDS
        )

    found = until(read, right, page=viewer.page)
    for group, curve in wanted.items():
        np.testing.assert_allclose(found[group][:14], curve, atol=2e-6)


def test_means_and_effect_sizes_are_of_the_velocity(viewer: Viewer, store: datastore.Store) -> None:
    viewer.open("?traits=bs/lying&smooth=9")
    viewer.field("Velocity (change per token)").check()
    means = {
        name: oracle.drawn(store, name, "bs/lying@4", smooth=1, velocity=True)[20:].mean()
        for name in map(str, store.rollouts.index)
    }
    cells = viewer.cells(viewer.rows("g1-lie"))
    shown = until(
        cells.all_inner_texts,
        lambda texts: len(texts) == 8 and abs(float(texts[3] or 0) - means["g1-lie"]) < 1e-5,
        page=viewer.page,
    )
    assert float(shown[3]) == pytest.approx(means["g1-lie"], rel=6e-3)
    viewer.page.get_by_text("Means and peaks are not smoothed").wait_for()
    viewer.button("Compare").click()
    viewer.button("Groups").click()
    a, b = (np.array([means[f"g{game}-{kind}"] for game in range(GAMES)]) for kind in KINDS.values())
    effect = (b.mean() - a.mean()) / np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2)
    becomes(viewer, viewer.rows("@").count, 2)  # of the one trait that is drawn, at both layers
    cells = viewer.cells(viewer.rows("bs/lying@4"))
    size = until(lambda: cells.nth(8).inner_text(), bool, page=viewer.page)
    assert float(size.replace(",", "")) == pytest.approx(effect, rel=1e-2)


# -- correlation of a whole store --------------------------------------------------------------------------------------


def _together(curves: Sequence[Floats], lag: int) -> Floats:
    """Pearson, row now and column `lag` tokens later, of pairs that lie in one rollout."""
    now = np.concatenate([one[:, max(0, -lag) : one.shape[1] - max(0, lag)] for one in curves], axis=1)
    then = np.concatenate([one[:, max(0, lag) : one.shape[1] - max(0, -lag)] for one in curves], axis=1)
    whole: Floats = np.corrcoef(now, then)
    return whole[: len(now), len(now) :]


def test_correlations_of_all_rollouts_are_pooled_within_each(viewer: Viewer, store: datastore.Store) -> None:
    viewer.open("?section=Correlation&rollout=g0-lie&trait=bs/lying&smooth=1&lag=2")
    labels = [f"{trait}@{layer}" for trait in sorted(stores.TRAITS) for layer in (4, 8)]
    viewer.field("Correlation in").select_option("all rollouts")
    viewer.page.wait_for_function(
        """() => Bokeh.documents[0].get_model_by_name("correlation").title.text
          === "Correlation in 8 rollouts, the column 2 tokens later" """
    )
    curves = [
        np.array([oracle.drawn(store, name, label, smooth=1)[4:] for label in labels])
        for name in map(str, store.rollouts.index)
    ]
    found = _image(viewer, "correlation", count=36).reshape(6, 6)  # drawn before its title
    np.testing.assert_allclose(found, _together(curves, 2), rtol=1e-4, atol=1e-5)
    row = labels.index("bs/lying@4")
    by_lag = np.array([_together(curves, lag)[row] for lag in range(-10, 11)])
    shows(viewer, "correlation-by-lag", dict(zip(labels, by_lag.T, strict=True)), rtol=1e-4, atol=1e-5)
    viewer.field("mood/calm").uncheck()
    part = _image(viewer, "correlation", count=16).reshape(4, 4)
    np.testing.assert_allclose(part, _together(curves, 2)[:4, :4], rtol=1e-4, atol=1e-5)


# -- what is shown where -----------------------------------------------------------------------------------------------

SHOWN = {
    "?view=Trajectories": {"One line for each", "Traits drawn"},
    "?view=Trajectories&lines=layer": {"One line for each"},
    "?view=Transcript": set[str](),
    "?view=Compare": {"Compare with (ids, by commas)", "Traits drawn"},
    "?view=Compare&against=Groups": {"Traits drawn"},
    "?section=Spans": set[str](),
    "?section=Correlation": {"Traits drawn"},
    "?section=Calibration": set[str](),
}
"""Controls of the side that do something in one view and nothing in another, by where they are shown."""


@pytest.mark.parametrize("query", SHOWN)
def test_a_control_is_shown_where_it_does_something(viewer: Viewer, query: str) -> None:
    viewer.open(query)
    fields = {name: viewer.field(name) for name in ("One line for each", "Compare with (ids, by commas)")}
    fields["Traits drawn"] = viewer.page.get_by_role("heading", name="Traits drawn")
    becomes(viewer, lambda: {name for name, field in fields.items() if field.is_visible()}, SHOWN[query])
