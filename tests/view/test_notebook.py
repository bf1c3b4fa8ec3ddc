"""`view.app` in a real notebook: executed by a real kernel, and what its cells put out shown by a real browser."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

import datastore
from tests import house
from tests.view import oracle, stores
from tests.view.browser import Viewer, becomes, browser, same

CELLS = (
    "import view\nshown = view.app({path!r})\nshown",
    # a reader's click comes to the kernel as a change of the widget's value
    "import panel as pn\n"
    "by_name = {{one.name: one for one in shown.select(pn.widgets.Widget)}}\n"
    "by_name['View'].value = 'Trajectories'\n"
    "by_name['Rollout'].value = 'g1-lie'\n"
    "by_name['Smoothing, tokens'].value = 1\n"
    "shown",
)
SHEET = "<!doctype html><meta charset='utf-8'><body>{}</body>"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> datastore.Store:
    """Two games."""
    return stores.game_store(tmp_path_factory.mktemp("notebook") / "games.zarr", pairs=2)


@pytest.fixture(scope="module")
def outputs(store: datastore.Store) -> list[list[Any]]:
    """What each cell of the notebook put out."""
    made: Any = nbformat.v4
    notebook = made.new_notebook(cells=[made.new_code_cell(cell.format(path=str(store.path))) for cell in CELLS])
    NotebookClient(
        notebook, timeout=600, startup_timeout=300, resources={"metadata": {"path": str(house.ROOT)}}
    ).execute()
    return [list(cell["outputs"]) for cell in notebook["cells"]]


def bundle(outputs: Sequence[Any]) -> dict[str, Any]:
    """The result of a cell, by MIME type."""
    (found,) = [one["data"] for one in outputs if one["output_type"] == "execute_result"]
    return dict(found)


def test_a_cell_shows_the_page(outputs: list[list[Any]], store: datastore.Store) -> None:
    assert [one["output_type"] for cell in outputs for one in cell if one["output_type"] in ("error", "stream")] == []
    text = bundle(outputs[0])["text/html"]
    assert "application/vnd.holoviews_exec.v0+json" in bundle(outputs[0])  # so that the kernel hears of what is clicked
    start = text.index("docs_json = ") + len("docs_json = ")
    documents, _ = json.JSONDecoder().raw_decode(text[start:])
    (document,) = documents.values()
    assert document["roots"]
    assert "g0-honest" in json.dumps(document)
    assert set(map(str, store.rollouts.index)) <= set(json.dumps(document).split('"'))


def test_what_the_cells_put_out_is_drawn(outputs: list[list[Any]], store: datastore.Store, tmp_path: Path) -> None:
    parts = []
    for one in (*outputs[0], *outputs[1]):
        if one["output_type"] == "display_data" or one in outputs[1]:
            data = one["data"]
            script = data.get("application/javascript", "")
            parts.append(data.get("text/html", f"<script>{script}</script>" if script else ""))
    file = tmp_path / "notebook.html"
    file.write_text(SHEET.format("\n".join(parts)), encoding="utf-8")
    with browser() as chromium:
        viewer = Viewer(chromium.new_page(viewport={"width": 1280, "height": 1500}), file.as_uri())
        viewer.page.goto(file.as_uri())
        viewer.page.locator(".t").first.wait_for()
        becomes(viewer, viewer.page.locator(".t").all_text_contents, store.tokens("g1-lie")["text"].tolist())
        labels = [f"{trait}@4" for trait in sorted(stores.TRAITS)]
        same(viewer, "scores", {label: oracle.drawn(store, "g1-lie", label, smooth=1) for label in labels})
        assert np.isfinite(viewer.lines("scores")["bs/lying@4"]).all()
        assert viewer.errors == []
        assert viewer.foreign == []  # a notebook without a network shows it too
