"""What users hand over that is broken: one sentence each from the command, and what can be done is done."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import datastore
from datastore import console
from experiments.vectors import write_directions
from project.commands import app
from tests.project.stores import GOLDEN, direction, golden_store, rollout, write_store

STEERING = "steering/alignment/deception/instruct/response__5/steering"
BEST = 3
"""The layer whose run at coherence 80 is the golden tree's best; the next best is at layer 5."""
Answer = tuple[int, dict[str, Any], str]
Lines = list[str]


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """The project command: exit code, what it printed as JSON, and its other words."""

    def run(*words: str | Path) -> Answer:
        with pytest.raises(SystemExit) as stopped:
            console.run(app, [str(word) for word in (*words, "--json")])
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return int(str(stopped.value.code)), json.loads(printed.out or "{}"), " ".join(printed.err.split())

    return run


@pytest.fixture
def golden(tmp_path: Path) -> datastore.Store:
    return golden_store(tmp_path / "run.zarr")


def cut_mid_line(lines: Lines) -> Lines:
    """The best run's line ends in its middle, as a file does whose writer was killed."""
    return [line[:90] if '"trait_mean": 70' in line else line for line in lines]


def null_coherence(lines: Lines) -> Lines:
    return [line.replace('"coherence_mean": 80', '"coherence_mean": null') for line in lines]


def no_header(lines: Lines) -> Lines:
    return [line for line in lines if '"type": "header"' not in line]


@pytest.mark.parametrize(
    ("broken", "layer", "notes"),
    [
        (cut_mid_line, 5, ["results.jsonl, line 4: the line is cut off after 90 characters"]),
        (null_coherence, 5, []),
        (no_header, BEST, []),
    ],
)
def test_a_broken_steering_file_counts_as_far_as_it_goes(
    broken: Callable[[Lines], Lines],
    layer: int,
    notes: Sequence[str],
    golden: datastore.Store,
    tmp_path: Path,
    ask: Callable[..., Answer],
) -> None:
    place = tmp_path / STEERING
    place.mkdir(parents=True)
    lines = (GOLDEN / STEERING / "results.jsonl").read_text().splitlines()
    (place / "results.jsonl").write_text("\n".join(broken(lines)))
    words = (golden.path, "--vectors", GOLDEN, "--layers", "best", "--force-model", "--dry-run")
    assert [row["layer"] for row in ask(*words, "--steering", GOLDEN)[1]["directions"]] == [BEST]
    code, said, err = ask(*words, "--steering", tmp_path / "steering")
    assert (code, [row["layer"] for row in said["directions"]]) == (0, [layer])
    told = " ".join([err, *map(str, said.get("notes", ()))])
    for note in notes:
        assert note in told


def test_no_such_trait_names_those_that_are_there(golden: datastore.Store, ask: Callable[..., Answer]) -> None:
    code, said, _ = ask(golden.path, "--vectors", GOLDEN, "--force-model", "--layers", "3", "--traits", "bs/lying")
    assert code == 1
    assert said["skipped"][0]["why"] == "there are no vectors of trait 'bs/lying'; there are alignment/deception"
    assert not list((golden.path / "scores").glob("0*"))


@pytest.mark.parametrize(
    ("values", "why"),
    [
        (np.zeros(24), "is all zeros"),
        (np.full(24, np.nan), "has 24 non-finite values among 24, so every score would be NaN"),
    ],
)
def test_a_vector_without_direction_is_skipped_and_the_others_are_scored(
    values: Any, why: str, tmp_path: Path, ask: Callable[..., Answer]
) -> None:
    store = write_store(tmp_path / "run.zarr", [rollout("a", 5)])
    write_directions(tmp_path / "v", [direction("x/good", 10), direction("x/bad", 10)], variant="base")
    (file,) = (tmp_path / "v/x/bad").rglob("layer10.pt")
    torch.save(torch.from_numpy(values).float(), file)
    code, said, _ = ask(store.path, "--vectors", tmp_path / "v", "--layers", "10")
    assert (code, [row["trait"] for row in said["directions"]]) == (0, ["x/good"])
    assert why in said["skipped"][0]["why"]


def test_a_vector_that_changed_is_named_and_scored_anew(tmp_path: Path, ask: Callable[..., Answer]) -> None:
    store = write_store(tmp_path / "run.zarr", [rollout("a", 5)])
    words = (store.path, "--vectors", tmp_path / "v", "--layers", "10")
    write_directions(tmp_path / "v", [direction("x/good", 10)], variant="base")
    assert ask(*words)[1]["computed"]["directions"] == 1
    (file,) = (tmp_path / "v").rglob("layer10.pt")
    torch.save(torch.from_numpy(direction("x/other", 10).values.copy()), file)
    code, said, err = ask(*words)
    assert (code, said["computed"]["directions"]) == (0, 1)
    assert err.startswith("warning: direction x/good (layer 10, residual, probe)")
    assert "has changed since scores/0001" in err
