"""Pictures of the page for the documents: `python -m benchmarks.screenshots docs/images [STORE]`.

Of the secret-number game, captured and scored as the demo does; what is shown is asked of the store: the pair that
Compare offers first, and where it parts.
"""

import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from PIL import Image

import datastore
from tests import house
from tests.view.browser import Viewer, browser, running
from view.comparing import aligned_curves, first_moves
from view.model import Model
from view.treatment import Treatment

GAME = "experiments/secret_number/data"
WIDTH, MOST_HEIGHT = 1280, 1400
COLOURS = 256


def demo_store(path: Path) -> datastore.Store:
    """Capture, calibrate and score the game's rollouts along its directions, by the commands of the README."""
    steps = [
        ["capture", "--store", path, "--experiment", GAME, "--prompt-set", "secret_number"],
        ["calibrate", path],
        [
            "project",
            path,
            "--vectors",
            f"{GAME}/extraction",
            "--steering",
            f"{GAME}/steering",
            "--layers",
            "best,best+1,4,5",
        ],
    ]
    for step in steps:
        subprocess.run([sys.executable, "-m", *map(str, step)], cwd=house.ROOT, check=True, stdout=subprocess.DEVNULL)
    return datastore.open(path)


def pictures(store: datastore.Store) -> Mapping[str, Mapping[str, Any]]:
    """Return the addresses of the pictures: of the pair that is offered first, at what moves most in it."""
    model = Model(store)
    label = model.labels[0]
    best = model.pairs(label, model.reference(label)).iloc[0]
    honest, lie, fork = str(best["a"]), str(best["b"]), int(best["fork"])
    at = {**_most_moved(model, (honest, lie), fork=fork), "token": fork}
    return {
        "compare": {"view": "Compare", "rollout": [honest, lie], **at},
        "transcript": {"view": "Transcript", "rollout": lie, **at, "theme": "dark"},
        "trajectories": {"view": "Trajectories", "rollout": lie, **at},
        "overview": {"view": "Overview", "rollout": lie, **at},
    }


def _most_moved(model: Model, pair: tuple[str, str], *, fork: int) -> dict[str, str]:
    """Return trait and layer whose difference after the fork is largest, over the spread before it."""
    values = model.treated(pair, Treatment(smooth=1))
    moves = first_moves(aligned_curves(model.scores(pair), values, pair, fork=fork))
    most = str(moves["direction"].iloc[int(moves["peak"].abs().argmax())])
    row = model.directions[model.directions["direction"] == most].iloc[0]
    return {"trait": str(row["trait"]), "layer": str(row["layer"])}


def take(chromium: Any, address: str, query: Mapping[str, Any], *, width: int = WIDTH) -> bytes:
    """Return a picture of the page at an address, as high as what it shows."""
    page = chromium.new_page(viewport={"width": width, "height": 800})
    Viewer(page, address).open("?" + urlencode(query, doseq=True))
    page.wait_for_timeout(2500)
    height = min(MOST_HEIGHT, int(page.evaluate("document.scrollingElement.scrollHeight")))
    page.set_viewport_size({"width": width, "height": height})
    page.wait_for_timeout(800)
    found: bytes = page.screenshot()
    page.close()
    return found


def main(out: Path, store: Path | None = None) -> None:
    """Take a picture of every view, of a store or of the game captured for it."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, browser() as chromium:
        shown = demo_store(Path(scratch) / "run.zarr") if store is None else datastore.open(store)
        with running([shown.path]) as address:
            for name, query in pictures(shown).items():
                target = out / f"{name}.png"
                target.write_bytes(take(chromium, address, query))
                colours = (
                    Image.open(target).convert("RGB").quantize(COLOURS)
                )  # a third of the bytes, to the eye the same
                colours.save(target, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(Path, sys.argv[2:3]))
