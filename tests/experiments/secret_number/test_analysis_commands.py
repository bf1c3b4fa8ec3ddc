"""The commands that measure: what they print, write and draw; misuse is one sentence; the document has the numbers."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import project
from datastore import console
from experiments.secret_number import tables
from experiments.secret_number.analysis_commands import LYING
from experiments.secret_number.commands import app
from experiments.secret_number.figure import draw
from experiments.secret_number.report import DOCS, NUMBERS, PAGE
from experiments.vectors import find_directions, write_directions
from tests.experiments.secret_number import worlds

pytest.importorskip("matplotlib")


def run(*words: str | Path | int) -> int:
    with pytest.raises(SystemExit) as stopped:
        console.run(app, [str(word) for word in words])
    return int(str(stopped.value.code))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stores and vectors of both layers, as after capture and fit; steering that says that layer 1 moved more."""
    root = tmp_path_factory.mktemp("made")
    worlds.games(root / "games.zarr", worlds.falsity)
    learned = worlds.singles(root / "singles.zarr", worlds.falsity)
    fitted = project.fit_directions(learned, "lying", position="response[-1]", trait=LYING)
    write_directions(root / "extraction", [one.direction for one in fitted], variant="player")
    file = root / "steering" / LYING / "player/response_-1/steering/results.jsonl"
    file.parent.mkdir(parents=True)
    lines: list[dict[str, Any]] = [{"type": "header"}, {"type": "baseline", "result": {"trait_mean": 20.0}}]
    for layer, mean in ((0, 30.0), (1, 60.0)):
        vector = {"layer": layer, "method": "mean_diff", "position": "response[-1]", "weight": 2.0}
        result = {"trait_mean": mean, "coherence_mean": 95.0}
        lines.append({"result": result, "config": {"vectors": [vector]}})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return root


def asked(root: Path) -> tuple[str | Path, ...]:
    places = ("--vectors", root / "extraction", "--steering", root / "steering")
    return ("finding", root / "games.zarr", "--learned-on", root / "singles.zarr", *places)


def test_the_finding_is_of_the_layer_that_was_chosen_without_it(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plot = tmp_path / "deep" / "finding.json", tmp_path / "deep" / "finding.png"
    assert run(*asked(made), "--layers", "best", "--json", "--out", out, "--plot", plot) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(out.read_text(encoding="utf-8"))
    assert found["direction"]["layer"] == 1
    assert [row["layer"] for row in found["layers"]] == [0, 1]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert run(*asked(made), "--json") == 0
    fitted = {one.layer: one.facts["auroc"] for one in find_directions(made / "extraction").entries}
    assert fitted[json.loads(capsys.readouterr().out)["direction"]["layer"]] == max(fitted.values())
    panels = draw(found).axes
    assert len(panels) == 4
    (line, *_) = panels[0].get_lines()
    assert np.asarray(line.get_ydata()).tolist() == found["profile"]["claim"]["auroc"]


def test_the_finding_is_printed_with_its_caveat(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*asked(made)) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "finding: AUROC" in text
    assert "caveat:" in text
    assert "equal sentences beyond what was known before" in text
    assert "that decides the truth" in text
    assert "the false answer scores higher in" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--layers", "best,0"), r"must name one direction: 2 layers are selected"),
        (("--trait", "secret_number/guilt"), r"must name one direction: .*guilt"),
        (("--method", "gradient"), r"must name one direction"),
        (("--plot", "finding.docx"), r"finding.docx can't be drawn .*; name it OUT.png"),
    ],
)
def test_misuse_of_finding_is_a_sentence(
    made: Path, words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*asked(made), *words) == 2
    error = capsys.readouterr().err
    assert re.search(message, error.splitlines()[0]), error


def test_multiples_that_are_no_numbers_are_misuse(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("steer", "--learned-on", made / "singles.zarr", "--multiples", "1,much") == 2
    assert "--multiples '1,much' is no list of numbers; write it like -1,-0.5,0.5,1." in capsys.readouterr().err


def test_tables_are_filled_once_and_for_all() -> None:
    first = {"start": 4, "claim": None, "stop": -6, "stop, equal sentences": 0}
    found = {"profile": {place: {"first_separates": at, "offset": [*range(-6, 5)]} for place, at in first.items()}}
    page = "before\n<!-- table: first -->old<!-- end -->\nafter\n"
    once = tables.filled(page, {"finding": found})
    assert "| the answer's first token | +4 | nowhere |" in once
    assert "| the full stop | -6 or earlier | +0 |" in once, "nothing was read before that"
    assert once.startswith("before\n")
    assert once.endswith("<!-- end -->\nafter\n")
    assert "old" not in once
    assert tables.filled(once, {"finding": found}) == once


@pytest.mark.parametrize(
    ("at", "said"),
    [
        (None, "Around the token that decides the truth it separates nowhere."),
        (-2, "It first separates 2 tokens before the token that decides the truth, where reading began: 0.800. "
             "It reads 0.500 at that token and 1.000 at the full stop."),
        (0, "It first separates at the token that decides the truth: 0.500. It reads 1.000 at the full stop."),
        (1, "It first separates 1 token after the token that decides the truth: 0.900. "
            "It reads 0.500 at that token and 1.000 at the full stop."),
    ],
)  # fmt: skip
def test_a_score_that_separates_and_falls_back_is_said_to(at: int | None, said: str) -> None:
    curve = {"first_separates": at, "offset": [-2, -1, 0, 1], "auroc": [0.8, 0.6, 0.5, 0.9]}
    found = {"profile": {"claim": curve}, "readings": {"at the full stop": {"auroc": {"value": 1.0}}}}
    assert tables._begins(found) == said


def test_intervals_are_written_with_their_range() -> None:
    assert tables.interval({"value": 0.51234, "low": 0.4, "high": 0.6}) == "0.512 [0.400, 0.600]"
    assert tables.interval({"mean": 0.5, "low": 0.1, "high": 0.9}) == "0.500 [0.100, 0.900]"
    assert tables.interval({"value": 0.5, "low": None, "high": None}) == "0.500"
    assert tables.interval(None) == ""


def test_the_document_holds_the_numbers_of_the_report() -> None:
    """Every table and every result in words is what the committed numbers give, and no other AUROC is written."""
    page = (DOCS / PAGE).read_text(encoding="utf-8")
    report = json.loads((DOCS / NUMBERS).read_text(encoding="utf-8"))
    assert tables.filled(page, report) == page
    assert set(re.findall(r"<!-- table: (\w+) -->", page)) <= set(tables.BLOCKS)
    prose = re.sub(r"<!-- table: .*?<!-- end -->", "", page, flags=re.DOTALL)
    assert not re.findall(r"\b[01]\.\d{3}\b", prose)
    assert report["finding"]["verdict"][1:] in page
