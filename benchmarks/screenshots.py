"""Pictures of the viewer for the documents: `python -m benchmarks.screenshots docs/images [STORE]`."""

import sys
import tempfile
from pathlib import Path

from PIL import Image

from tests.view import stores
from tests.view.browser import Viewer, browser, running

PICTURES = {
    "compare": "?view=Compare&token=44",
    "transcript": "?view=Transcript&rollout=g0-lie&trait=bs/lying&token=44&theme=dark",
    "trajectories": "?view=Trajectories&rollout=g0-lie",
    "overview": "?view=Overview",
}
WIDTH, HEIGHT = 1280, 1000


def main(out: Path, store: Path | None = None) -> None:
    """Take a picture of every view, of a store or of games made for it."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, browser() as chromium:
        path = store or Path(scratch) / "games.zarr"
        if store is None:
            stores.game_store(path)
        with running([path]) as address:
            for name, query in PICTURES.items():
                page = chromium.new_page(viewport={"width": WIDTH, "height": HEIGHT})
                Viewer(page, address).open(query)
                page.wait_for_timeout(2500)
                target = out / f"{name}.png"
                page.screenshot(path=str(target))
                page.close()
                colours = Image.open(target).convert("RGB").quantize(128)  # a third of the bytes, to the eye the same
                colours.save(target, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(Path, sys.argv[2:3]))
