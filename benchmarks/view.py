"""How long a reader waits: first paint and every kind of control, in a browser, on long rollouts and large stores.

`python -m benchmarks.view`. A control is timed from the click to the second animation frame after its effect is there.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

import datastore
import project
from datastore import console
from datastore.schema import ComponentSpec, Rollout
from tests.view import stores
from tests.view.browser import Viewer, browser, running

ROUNDS = 3
MANY, EACH = 10_000, 68
PAINTED = "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))"
COLUMN = """(column) => [...Bokeh.documents[0]._all_models.values()].some((one) => one.data?.column === column)"""
UNIT = "(unit) => Bokeh.documents[0].get_model_by_name('scores')?.left[0].axis_label === unit"


def many_rollouts(path: Path) -> None:
    """Write a store of 10,000 rollouts and 680,000 tokens, scored along 11 traits at two layers."""
    random = np.random.default_rng(0)
    pool = random.standard_normal((EACH, stores.WIDTH)).astype(np.float32)
    rollouts = [
        Rollout(
            rollout_id=str(i),
            token_ids=random.integers(0, len(stores.WORDS), EACH).astype(np.int32),
            prompt_end=20,
            labels={"label": "honest" if i % 2 else "fabrication"},
        )
        for i in range(MANY)
    ]
    (plan,) = datastore.plan(
        path,
        rollouts,
        layers=stores.LAYERS[:2],
        components=[ComponentSpec(name="residual", width=stores.WIDTH, dtype="float32")],
        provenance={"model": {"name": "toy/liar"}},
        vocab=stores.vocabulary(),
    )
    with datastore.create(path, plan) as writer:
        for i, one in enumerate(plan.rollouts):
            for layer in plan.layers:
                rows: NDArray[np.float32] = pool * np.float32(1 + (i % 7) / 10)
                writer.put("residual", layer, one.rollout_id, rows)
        writer.commit()
    project.scores(datastore.open(path), stores.directions([f"set/trait {i}" for i in range(11)]))


def timed(viewer: Viewer, act: Callable[[], object], seen: tuple[str, Any] | None = None) -> float:
    """Return the seconds from an act to the frame in which its effect is painted."""
    began = time.perf_counter()
    act()
    if seen is not None:
        viewer.page.wait_for_function(seen[0], arg=seen[1], polling="raf")
    viewer.page.evaluate(PAINTED)
    return time.perf_counter() - began


def controls(viewer: Viewer) -> dict[str, Callable[[], float]]:
    """What a reader does on a long rollout."""
    page = viewer.page

    def choose(label: str, value: str, seen: tuple[str, Any]) -> float:
        return timed(viewer, lambda: viewer.field(label).select_option(value), seen)

    def pin(at: int) -> float:
        token = page.locator(f".t[data-i='{at}']")
        return timed(viewer, token.click, ("() => location.search.includes('token=')", None))

    return {
        "mode": lambda: choose("Scores as", "raw", (UNIT, "score")),
        "mode back": lambda: choose("Scores as", "cosine", (UNIT, "cosine of token and direction")),
        "trait": lambda: choose("Trait", "set/trait 3", (COLUMN, 8)),
        "layer": lambda: choose("Layer", "8", (COLUMN, 9)),
        "layer back": lambda: choose("Layer", "first", (COLUMN, 8)),
        "trait back": lambda: choose("Trait", "set/trait 0", (COLUMN, 0)),
        "pin a token": lambda: pin(30),
        "to the transcript": lambda: timed(viewer, viewer.button("Transcript").click),
        "to the trajectories": lambda: timed(viewer, viewer.button("Trajectories").click),
    }


def measure(chromium: Any, address: str, queries: dict[str, str]) -> dict[str, list[float]]:
    """Time the first paint of some addresses, and the controls on the first of them."""
    found: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        for what, query in queries.items():
            page = chromium.new_page(viewport={"width": 1280, "height": 1000})
            viewer = Viewer(page, address)
            found.setdefault(f"first paint: {what}", []).append(timed(viewer, partial(viewer.open, query)))
            page.wait_for_timeout(1500)
            if query.startswith("?store=long"):
                for name, act in controls(viewer).items():
                    found.setdefault(name, []).append(act())
                    page.wait_for_timeout(600)
            page.close()
    return found


def main() -> None:
    """Print the medians."""
    queries = {
        "14,000 tokens, 11 traits x 2 layers": "?store=long.zarr&rollout=long&view=Trajectories",
        "its transcript": "?store=short.zarr&view=Transcript",
        "table of 10,000 rollouts": "?store=many.zarr",
        "table of 8 rollouts": "?store=short.zarr",
    }
    with tempfile.TemporaryDirectory() as scratch, browser() as chromium:
        root = Path(scratch)
        stores.long_store(root / "long.zarr")
        stores.game_store(root / "short.zarr")
        many_rollouts(root / "many.zarr")
        with running([root / f"{name}.zarr" for name in ("long", "short", "many")]) as address:
            found = measure(chromium, address, queries)
    table = Table("what", "median ms", "smallest", "largest", title="what a reader waits for")
    for what, seconds in found.items():
        numbers = (statistics.median(seconds), min(seconds), max(seconds))
        table.add_row(what, *(f"{1000 * one:.0f}" for one in numbers))
    console.stdout().print(table)


if __name__ == "__main__":
    main()
