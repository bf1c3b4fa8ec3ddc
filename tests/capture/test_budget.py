"""The token budget: what two forwards took, extrapolated, remembered for this model and device and no other.

Four real processes that each measure something else still fill one plan.
"""

import json
import os
import shutil
from pathlib import Path

import pytest

from capture import budget
from capture.budget import Measured, batch_tokens
from capture.components import find_components
from datastore.planning import laid_down, read_plan
from tests import forked, kimi
from tests.capture import cli, served, stored, tiny
from tests.capture.cli import Command, command
from tests.forked import Forked

__all__ = ["command"]

GB = 1 << 30
WORDS = ("--prompt-set", served.PROMPT_SET, "--chunk-tokens", "64", "--device", "auto", "--layers", "0,1")


@pytest.mark.parametrize(
    ("measured", "host", "tokens"),
    [
        (Measured(fixed=0, per_token=1e6, row=1, free=10 * GB), 1000 * GB, 8192),
        (Measured(fixed=6 * GB, per_token=1e6, row=1, free=10 * GB), 1000 * GB, 2048),
        (Measured(fixed=0, per_token=1, row=1, free=100 * GB), 1000 * GB, 16_384),
        (Measured(fixed=0, per_token=1e9, row=1, free=1 * GB), 1000 * GB, 512),
        (Measured(fixed=0, per_token=1, row=1 << 20, free=100 * GB), 8 * GB, 1024),
    ],
    ids=["the device's memory", "less what a batch takes at all", "the most", "the least", "rows in the host's memory"],
)
def test_the_budget_is_what_fits(measured: Measured, host: int, tokens: int) -> None:
    assert batch_tokens(measured, host_bytes=host) == tokens


def test_a_forward_is_measured() -> None:
    model = tiny.tiny_model("llama", hidden_size=256, intermediate_size=2048)
    found = budget.measure(model, find_components(model), layers=[0, 2], components=["residual"], sizes=(256, 2048))
    assert found.row == 2 * 256 * 4
    assert found.per_token >= 1
    assert found.free > 0
    assert batch_tokens(found) >= 512


def test_it_is_remembered_for_its_key_alone(tmp_path: Path) -> None:
    key = {"model": "a", "device": "x", "layers": [0, 1]}
    found = Measured(fixed=1.0, per_token=1e6, row=8, free=10 * GB)
    assert budget.recall(key, directory=tmp_path) is None
    assert budget.remember(key, found, directory=tmp_path) == batch_tokens(found)
    assert budget.recall(dict(reversed(key.items())), directory=tmp_path) == batch_tokens(found)
    assert budget.recall(key | {"device": "y"}, directory=tmp_path) is None
    (tmp_path / "budgets.json").write_text("{")
    assert budget.recall(key, directory=tmp_path) is None
    assert budget.remember(key, found, directory=tmp_path) == batch_tokens(found), "a damaged file stops nobody"


def test_the_first_that_remembers_decides(tmp_path: Path) -> None:
    key, more = {"model": "a"}, Measured(fixed=0, per_token=1, row=1, free=100 * GB)
    less = Measured(fixed=0, per_token=1e9, row=1, free=GB)
    assert budget.remember(key, less, directory=tmp_path) == 512
    assert budget.remember(key, more, directory=tmp_path) == 512
    assert budget.remember({"model": "b"}, more, directory=tmp_path) == 16_384
    assert (budget.recall(key, directory=tmp_path), budget.recall({"model": "b"}, directory=tmp_path)) == (512, 16_384)


def test_a_budget_that_can_not_be_remembered_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "home").write_text("no directory")
    found = Measured(fixed=0, per_token=1, row=1, free=100 * GB)
    assert budget.remember({}, found, directory=tmp_path / "home") == 16_384
    assert "parts of one capture may find different ones; give each the same --batch-tokens" in caplog.text


def start(tree: Path, store: Path, rank: int, *, home: Path, meeting: Path, expected: int) -> Forked:
    """Start one part of four, which measures by itself."""
    meeting.mkdir(exist_ok=True)
    words = [meeting, expected, "--experiment", tree, "--store", store, *WORDS]
    mine = {"RANK": str(rank), "WORLD_SIZE": "4", "HF_HUB_OFFLINE": "1", "HF_HOME": str(home)}
    return forked.start("tests.capture.measuring", *words, environment={**os.environ, **mine})


def test_four_processes_that_measure_different_budgets_fill_one_plan(command: Command, tmp_path: Path) -> None:
    tree = served.make_tree(tmp_path / "experiments", kimi.save_kimi(tmp_path / "kimi"))
    store, home, meeting = tmp_path / "run.zarr", tmp_path / "home", tmp_path / "met"
    together = [start(tree, store, rank, home=home, meeting=meeting, expected=3) for rank in range(3)]
    for process in together:
        out, err = process.communicate(timeout=300)
        assert process.wait() == 0, err
        assert "the capture is committed when its other parts are done" in out
    assert len(list(meeting.iterdir())) == 3, "each of them measured"
    (remembered,) = json.loads((home / "activation_cache" / "budgets.json").read_text()).values()
    tokens = remembered["batch_tokens"]
    assert tokens in (512, 1024, 2048)
    (plan,) = laid_down(store)
    assert read_plan(plan).batch_tokens == tokens

    # A process that was killed had almost laid a plan of another budget down, before all of them.
    died = tmp_path / "died.zarr"
    asked = ("--experiment", tree, *WORDS, "--batch-tokens")
    assert command(*asked, 2 * tokens, "--store", died, "--part", "1/4").code == 0
    (left,) = laid_down(died)
    (left / "plan.json").write_text(read_plan(left).model_copy(update={"created": "2000"}).model_dump_json())
    shutil.move(left, plan.with_name(f"{left.name}.0123.partial"))

    # The last one comes from where nothing is remembered: it goes on with the plan, and measures nothing.
    late = start(tree, store, 3, home=tmp_path / "elsewhere", meeting=tmp_path / "alone", expected=1)
    assert (late.communicate(timeout=300), late.wait())[1] == 0
    assert not list((tmp_path / "alone").iterdir())
    assert stored.captures(store) == [1]
    alone = tmp_path / "alone.zarr"
    assert command(*asked, tokens, "--store", alone).code == 0
    assert cli.contents(store) == cli.contents(alone)
