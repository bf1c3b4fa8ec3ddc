"""Every number of the report, from the model on: the commands a person would type, run one after the other."""

import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datastore import console
from datastore.errors import DatastoreError
from experiments.secret_number.places import AUDIT, DATA, MODELS, QUESTION_SET

__all__ = ["DOCS", "TRAITS", "make"]

DOCS = Path(__file__).parents[2] / "docs"
PAGE, NUMBERS, FIGURE = "secret_number.md", "secret_number.json", "secret_number.png"
LIED = "classification=fabrication"
PROMISED = "assurance == 'I promise.' or assurance == 'You can trust me.'"
TRAITS = (
    ("lying", LIED, "mean_diff", "all"),
    ("lying", LIED, "probe", "1-5"),
    ("assurance", PROMISED, "mean_diff", "all"),
)
"""Trait, label, method and layers of the directions that are learned; the first are steered and reported. At layer 0
the full stop says so little of what went before that a probe finds nothing to hold on to."""
STEERED = ("--methods", "mean_diff", "--multiples=-0.5,-0.25,0.25,0.5")


def make(out: Path, *, games: int, steered: int, write: bool = False) -> dict[str, Any]:
    """Run everything, and write `report.json` and the figure into `out`.

    Parameters
    ----------
    out : Path
        What an interrupted run with the same model and sizes has left there is used; all else in it is deleted.
    games, steered : int
        Held-out games to measure on, and to play for each steering run.
    write : bool
        Put vectors, steering results, numbers and figure into the checkout, and fill the document's tables.

    Raises
    ------
    DatastoreError
        One of the commands failed; its own message stands above.
    """
    _begin(out, games=games, steered=steered)
    held, made = out / "games", ["--vectors", out / "extraction", "--steering", out / "steering"]
    questions, stores = out / "questions.zarr", {"finding": out / "games.zarr", "bundled": out / "bundled.zarr"}
    _captured(questions, experiment=DATA, prompt_set=QUESTION_SET)
    report: dict[str, Any] = {"games": games, "steered_games": steered}
    report["fitted"] = _kept(out, "fitted", lambda: _fitted(questions, out / "extraction"))
    steer = ["--learned-on", questions, "--vectors", out / "extraction", "--out", out / "steering", "--json"]
    steer += [*STEERED, "--games", steered]
    report["steering"] = _kept(out, "steering", lambda: _answer("experiments.secret_number", "steer", *steer))
    report["steering"].pop("files", None)
    if not held.exists():
        _run("experiments.secret_number", "play", "--out", held, "--games", games, "--model", DATA / MODELS["player"])
    _captured(stores["finding"], experiment=held, prompt_set=AUDIT)
    _captured(stores["bundled"], experiment=DATA, prompt_set=AUDIT)
    learned = ["--learned-on", questions, *made, "--json"]
    asked: dict[str, list[object]] = {
        "finding": [stores["finding"], *learned, "--plot", out / FIGURE],
        "bundled": [stores["bundled"], *learned],
        "probe": [stores["finding"], *learned, "--method", "probe"],
    }
    for name, words in asked.items():
        report[name] = _answer("experiments.secret_number", "finding", *words)
    report["model_diff"] = _model_diff(out, held, stores["finding"], layer=report["finding"]["direction"]["layer"])
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if write:
        _write(out, report)
    return report


def _begin(out: Path, *, games: int, steered: int) -> None:
    """Go on in a directory that was begun with the same model and sizes; empty any other."""
    weights = hashlib.sha256((DATA / MODELS["player"] / "model.safetensors").read_bytes()).hexdigest()
    inputs, file = {"model_sha256": weights, "games": games, "steered": steered}, out / "inputs.json"
    if not file.is_file() or json.loads(file.read_text(encoding="utf-8")) != inputs:
        shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(inputs) + "\n", encoding="utf-8")


def _kept(out: Path, name: str, make: Callable[[], Any]) -> Any:
    """Return what an earlier run has left, or make it; what takes minutes is not made twice."""
    file = out / f"{name}.json"
    if not file.is_file():
        file.write_text(json.dumps(make(), indent=1) + "\n", encoding="utf-8")
    return json.loads(file.read_text(encoding="utf-8"))


def _captured(store: Path, *, experiment: Path, prompt_set: str, variant: str | None = None) -> None:
    """Capture the residual stream at all layers, and the embedding."""
    source = ["--experiment", experiment, "--prompt-set", prompt_set, "--store", store]
    source += ["--model-variant", variant, "--responses-from", "player"] if variant else []
    _run("capture", *source)
    _run("capture", *source, "--components", "resid_pre", "--layers", 0)


def _fitted(questions: Path, out: Path) -> list[dict[str, Any]]:
    rows = []
    for name, label, method, layers in TRAITS:
        about = ["--trait", f"secret_number/{name}", "--method", method, "--position", "response[-1]"]
        place = ["--out", out, "--variant", "player", "--layers", layers, "--json"]
        found = _answer("project", "fit", questions, "--label", label, *about, *place)
        rows += [{**row, "method": method, "file": Path(row["file"]).name} for row in found["fitted"]]
    return rows


def _model_diff(out: Path, held: Path, store: Path, *, layer: int) -> list[dict[str, Any]]:
    """Compare the player with the variant trained on games without a lie, over the same games."""
    import datastore
    import project
    from experiments.vectors import find_directions, load_direction

    other, honest = out / "honest.zarr", DATA / MODELS["honest"]
    source = ["--experiment", held, "--prompt-set", AUDIT, "--model", honest, "--store", other]
    _run("capture", *source)
    entries = find_directions(out / "extraction").entries
    given = [load_direction(one) for one in entries if one.layer == layer and one.method == "mean_diff"]
    table = project.model_diff(datastore.open(store), datastore.open(other), given)
    rows: list[dict[str, Any]] = json.loads(table.to_json(orient="records"))
    return rows


def _write(out: Path, report: dict[str, Any]) -> None:
    """Put what was made where it is kept, and fill the document's tables."""
    from experiments.secret_number.tables import filled

    for name in ("extraction", "steering"):
        shutil.rmtree(DATA / name, ignore_errors=True)
        shutil.copytree(out / name, DATA / name)
    shutil.copy(out / FIGURE, DOCS / FIGURE)
    (DOCS / NUMBERS).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    page = DOCS / PAGE
    page.write_text(filled(page.read_text(encoding="utf-8"), report), encoding="utf-8")


def _run(module: str, *words: object) -> str:
    line = [sys.executable, "-m", module, *map(str, words)]
    console.stderr().print("$ python", *line[1:], style="dim", soft_wrap=True)
    began = time.monotonic()
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise DatastoreError(f"python -m {module} {words[0]} failed with code {done.returncode}, so there is no report")
    console.stderr().print(f"  {time.monotonic() - began:.0f} s", style="dim")
    return done.stdout


def _answer(module: str, *words: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_run(module, *words))
    return found
