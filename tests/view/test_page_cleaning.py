"""Massive dimensions taken out of what two rollouts, or two stores, differ by: every rule, against numpy.

The stores are made so that the rules differ: three dimensions are massive at all three layers, four at one or two.
"""

from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import calibrate
import datastore
import project
from datastore.schema import Rollout
from experiments.direction import Direction
from tests.view import stores
from tests.view.browser import Viewer, becomes, same, serving, until, visiting

LOUD = {4: (0, 20, 21, 22, 23), 8: (0, 20, 21, 22, 24), 12: (0, 20, 21, 25, 26)}
"""The massive dimensions that are put into each layer."""
RULES: Mapping[str, tuple[int, ...]] = {
    "none": (),
    "top5-3layers": (0, 20, 21),  # among the five largest at three layers or more
    "all": (0, 20, 21, 22, 23, 24, 25, 26),
}
ROUNDING = 2e-5  # float32, of norms from which nearly all was taken out
CLEAN = "Massive dimensions taken out"
TRAITS = ("bs/lying", "mood/calm")
Floats = NDArray[np.float64]


def directions() -> list[Direction]:
    """Random directions, so that every massive dimension counts in every score."""
    return [
        Direction(
            trait=trait,
            layer=layer,
            values=np.random.default_rng([i, layer]).standard_normal(stores.WIDTH).astype(np.float32),
            method="probe",
            position="response[:5]",
        )
        for i, trait in enumerate(TRAITS)
        for layer in (4, 8)
    ]


def rows_of(model: int, *, loud: Mapping[int, tuple[int, ...]] = LOUD) -> Any:
    """What a model computes: the games' activations, massive dimensions that are its own in size, and some noise."""

    def rows(one: Rollout, layer: int) -> NDArray[np.float32]:
        values = stores.activations(one, layer).copy()
        values[:, 0] -= 30.0
        random = np.random.default_rng([model, layer, *one.rollout_id.encode()])
        values += 0.1 * random.standard_normal(values.shape).astype(np.float32)
        for rank, dim in enumerate(loud[layer]):
            size = (1 + model / 3) * (14.0 - 2 * rank)
            values[:, dim] += size * (1 + 0.3 * random.standard_normal(len(values))).astype(np.float32)
        return values

    return rows


def store_of(path: Path, rows: Any) -> datastore.Store:
    """Two games, calibrated and then scored."""
    rollouts = [stores.game_rollout(game, kind) for game in range(2) for kind in ("honest", "lie")]
    store = stores.write(path, rollouts, rows, vocab=stores.vocabulary())
    calibrate.save(calibrate.fit(store))
    project.scores(store, directions())
    return datastore.open(path)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, datastore.Store]:
    """The same games of two models; and of a third one, in which another dimension is massive."""
    root = tmp_path_factory.mktemp("clean")
    other = {layer: (9, *dims[1:]) for layer, dims in LOUD.items()}
    made = {"one": rows_of(0), "two": rows_of(1), "odd": rows_of(2, loud=other)}
    return {name: store_of(root / f"{name}.zarr", rows) for name, rows in made.items()}


@pytest.fixture(scope="module")
def served(kept: dict[str, datastore.Store]) -> Iterator[tuple[Any, str]]:
    """One server and one browser."""
    with serving([store.path for store in kept.values()]) as found:
        yield found


@pytest.fixture
def viewer(served: tuple[Any, str]) -> Iterator[Viewer]:
    """A new page."""
    with visiting(*served) as one:
        yield one


def cleaned(store: datastore.Store, rollout: str, label: str, dims: tuple[int, ...]) -> tuple[Floats, Floats]:
    """Return score and norm of the activations in which these dimensions are 0."""
    trait, _, layer = label.rpartition("@")
    (vector,) = [one for one in directions() if (one.trait, one.layer) == (trait, int(layer))]
    unit = np.asarray(vector.values, np.float64)
    rows = np.array(store.select("residual", rollouts=rollout, layers=int(layer)).values, np.float64)
    rows[:, list(dims)] = 0.0
    return rows @ (unit / np.linalg.norm(unit)), np.linalg.norm(rows, axis=1)


def test_the_rules_take_out_what_is_massive(kept: dict[str, datastore.Store]) -> None:
    """Else the tests below would prove less than they seem to."""
    top = kept["one"].calibration()["top_dims"].values
    assert [set(row.tolist()) for row in top] == [set(LOUD[layer]) for layer in stores.LAYERS]


def test_what_two_stores_differ_by_is_cleaned(viewer: Viewer, kept: dict[str, datastore.Store]) -> None:
    viewer.open("?store=one.zarr&view=Compare&against=Stores&rollout=g1-lie&smooth=1")
    drawn = set()
    for mode, layer, rule in product(("raw", "cosine"), ("4", "8"), RULES):
        viewer.field("Scores as").select_option(mode)
        viewer.field("Layer").select_option(layer)
        viewer.field(CLEAN).select_option(rule)
        wanted = {}
        for label in (f"{trait}@{layer}" for trait in TRAITS):
            here, norm = cleaned(kept["one"], "g1-lie", label, RULES[rule])
            there, _ = cleaned(kept["two"], "g1-lie", label, RULES[rule])
            wanted[label] = (there - here) / (norm if mode == "cosine" else 1.0)
        same(viewer, "store-difference", wanted, atol=ROUNDING)
        drawn.add(wanted[f"bs/lying@{layer}"].round(4).tobytes())
    assert len(drawn) == 12  # each choice has an effect of its own


def test_how_far_two_stores_moved_along_a_trait(viewer: Viewer, kept: dict[str, datastore.Store]) -> None:
    viewer.open("?store=one.zarr&view=Compare&against=Stores&rollout=g1-lie&smooth=1&mode=raw")
    names = list(map(str, kept["one"].rollouts.index))
    for one in directions():
        sides = []
        for name in ("one", "two"):
            rows = [kept[name].select("residual", rollouts=rollout, layers=one.layer).values for rollout in names]
            sides.append(np.array([np.asarray(row, np.float64)[20:].mean(axis=0) for row in rows]))
        change, along = (sides[1] - sides[0]).mean(axis=0), np.asarray(one.values, np.float64)
        cells = viewer.cells(viewer.rows(f"{one.trait}@{one.layer}"))
        shown = until(cells.all_inner_texts, lambda texts: len(texts) == 7 and bool(texts[6]), page=viewer.page)
        wanted = change @ along / np.linalg.norm(change) / np.linalg.norm(along)
        assert float(shown[6]) == pytest.approx(wanted, abs=1e-4)
        means = [(side @ along / np.linalg.norm(along)).mean() for side in sides]
        assert [float(text.replace(",", "")) for text in shown[2:4]] == pytest.approx(means, rel=1e-3, abs=1e-3)
    viewer.field("mood/calm").uncheck()
    becomes(viewer, viewer.rows("@").count, 2)


def test_what_two_rollouts_differ_by_is_cleaned(viewer: Viewer, kept: dict[str, datastore.Store]) -> None:
    pair = ("g0-honest", "g0-lie")
    viewer.open("?store=one.zarr&view=Compare&rollout=g0-honest&rollout=g0-lie&smooth=1&trait=bs/lying&layer=8")
    for mode, rule in product(("raw", "cosine"), RULES):
        viewer.field("Scores as").select_option(mode)
        viewer.field(CLEAN).select_option(rule)
        curves: dict[str, list[Floats]] = {}
        for trait in TRAITS:
            sides = [cleaned(kept["one"], name, f"{trait}@8", RULES[rule]) for name in pair]
            curves[trait] = [score / norm if mode == "cosine" else score for score, norm in sides]
        changes = {f"{trait}@8": b - a for trait, (a, b) in curves.items()}
        same(viewer, "difference", changes, atol=ROUNDING)
        names = ("g0-honest (honest)", "g0-lie (fabrication)")
        same(viewer, "rollouts", dict(zip(names, curves["bs/lying"], strict=True)), atol=ROUNDING)


def test_means_and_effects_are_cleaned(viewer: Viewer, kept: dict[str, datastore.Store]) -> None:
    viewer.open("?store=one.zarr&mode=raw&smooth=1&traits=bs/lying&clean=all")
    means = {
        name: cleaned(kept["one"], name, "bs/lying@4", RULES["all"])[0][20:].mean()
        for name in map(str, kept["one"].rollouts.index)
    }
    for name, mean in means.items():
        row = viewer.cells(viewer.rows(name))
        shown = until(row.all_inner_texts, lambda cells: len(cells) == 8 and bool(cells[3]), page=viewer.page)
        assert float(shown[3]) == pytest.approx(mean, rel=6e-3)
    viewer.button("Compare").click()
    viewer.button("Groups").click()
    row = viewer.cells(viewer.rows("bs/lying@4"))
    cells = until(row.all_inner_texts, lambda cells: len(cells) > 8 and bool(cells[8]), page=viewer.page)
    a, b = (np.array([means[f"g{game}-{kind}"] for game in range(2)]) for kind in ("honest", "lie"))
    effect = (b.mean() - a.mean()) / np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2)
    assert float(cells[8].replace(",", "")) == pytest.approx(effect, rel=1e-2)


def test_what_was_calibrated_otherwise_is_said(viewer: Viewer) -> None:
    viewer.open("?store=one.zarr&view=Compare&against=Stores&rollout=g1-lie&other_store=odd.zarr&smooth=1")
    viewer.field(CLEAN).select_option("all")
    viewer.page.get_by_text("were not kept beside the scores").wait_for()
    viewer.field(CLEAN).select_option("none")
    until(lambda: viewer.lines("store-difference"), lambda lines: len(lines) == 2, page=viewer.page)
    viewer.page.get_by_text("were not kept beside the scores").wait_for(state="hidden")
