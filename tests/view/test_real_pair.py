"""A real pair of the secret-number game: two continuations of one prefix, computed by the model that told them."""

import re
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from numpy.typing import NDArray

import datastore
import project
from experiments.direction import Direction
from tests import house
from tests.view.browser import Viewer, browser, running, until

GAME = house.ROOT / "experiments" / "secret_number" / "data"
LAYER = 2


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> datastore.Store:
    """The game's rollouts, scored along two random directions: here only the arithmetic and the fork matter."""
    if not (GAME / "secret-number" / "model.safetensors").is_file():
        pytest.skip("the model of the secret-number game is not in this checkout")
    path = tmp_path_factory.mktemp("real") / "run.zarr"
    what = ["--experiment", str(GAME), "--prompt-set", "secret_number", "--layers", str(LAYER)]
    command = [sys.executable, "-m", "capture", "--store", str(path), *what]
    subprocess.run(command, cwd=house.ROOT, check=True, capture_output=True, timeout=300)
    opened = datastore.open(path)
    project.scores(opened, directions(opened))
    return datastore.open(path)


def directions(store: datastore.Store) -> list[Direction]:
    """Two random directions of the model's width."""
    width = store.cells.components["residual"].width
    rows = np.random.default_rng(0).standard_normal((2, width)).astype(np.float32)
    names = ("random/first", "random/second")
    return [
        Direction(trait=name, layer=LAYER, values=row, method="random", position="response[:]")
        for name, row in zip(names, rows, strict=True)
    ]


def curve_of(viewer: Viewer, name: str, length: int) -> NDArray[np.float64]:
    """A rollout's curve, NaN as long as it is not drawn."""
    curve = viewer.lines("rollouts").get(name, np.empty(0))
    return curve[:length] if len(curve) >= length else np.full(length, np.nan)


def test_a_lying_rollout_parts_from_its_honest_twin_where_the_game_says(store: datastore.Store) -> None:
    table = store.rollouts
    with browser() as chromium, running([store.path]) as address:
        viewer = Viewer(chromium.new_page(viewport={"width": 1280, "height": 1500}), address)
        viewer.open("?view=Compare&smooth=1&mode=raw")
        until(lambda: viewer.rows().count(), lambda count: count > 0, page=viewer.page)
        row = viewer.rows().nth(2)
        cells = viewer.cells(row).all_inner_texts()
        a, b, fork = cells[0], cells[1], int(cells[2])
        viewer.cells(row).first.click()
        assert table["pair"][a] == table["pair"][b] != ""
        assert fork == table["fork"][a] == table["fork"][b]  # as the generator recorded it, not found from the tokens
        assert [cells[4], cells[5]] == [table["classification"][a], table["classification"][b]]
        assert cells[4] == "honest" != cells[5]
        (unit,) = [one.values / one.norm for one in directions(store) if one.trait == "random/first"]
        for name in (a, b):
            rows = np.asarray(store.select("residual", rollouts=name, layers=LAYER).values, np.float64)
            wanted, called = rows @ np.asarray(unit, np.float64), f"{name} ({table['classification'][name]})"
            read = partial(curve_of, viewer, called, len(rows))
            found = until(read, partial(np.allclose, wanted, rtol=1e-4, atol=1e-4), page=viewer.page)
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
        assert viewer.marks("difference")["fork"] == fork - 0.5
        sides = viewer.page.locator(".sides mark").all_inner_texts()
        ends = ["".join(store.tokens(name)["text"].tolist()[fork:]) for name in (a, b)]
        assert [side.split() for side in sides] == [end.split() for end in ends]
        assert re.search(f"They part at token {fork};", viewer.page.locator("h2", has_text="They part").inner_text())
        assert viewer.errors == []
        assert viewer.foreign == []
