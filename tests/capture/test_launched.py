"""The parts that launchers hand out: what their variables mean, and four real processes of which some are killed."""

import re
import time
from pathlib import Path

import pytest

from capture.errors import RequestError
from capture.processes import Launched, launched
from tests import kimi
from tests.capture import cli, served, stored
from tests.capture.cli import Command, command
from tests.forked import Forked

__all__ = ["command"]

N = 4
WORDS = ("--chunk-tokens", "32", "--batch-tokens", "256", "--components", "residual,mlp_out")


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
        (
            {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
            Launched(by="torchrun", part=(6, 8), local=1, neighbours=4),
        ),
        # A batch script itself: one process, whatever --ntasks says.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}, None),
        (
            {
                "SLURM_PROCID": "3",
                "SLURM_STEP_NUM_TASKS": "4",
                "SLURM_LOCALID": "1",
                "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
            },
            Launched(by="SLURM", part=(4, 4), local=1, neighbours=2),
        ),
        # srun torchrun: the inner launcher counts.
        (
            {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"},
            Launched(by="torchrun", part=(2, 4), local=1, neighbours=1),
        ),
    ],
)
def test_what_launchers_say(environ: dict[str, str], expected: Launched | None) -> None:
    assert launched(environ) == expected


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "4", "WORLD_SIZE": "4"}, r"RANK=4 is not a process of WORLD_SIZE=4; .* give --part I/N"),
        ({"RANK": "x", "WORLD_SIZE": "4"}, r"RANK='x' is not a number"),
    ],
)
def test_variables_that_contradict_each_other_are_refused(environ: dict[str, str], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        launched(environ)


def test_a_device_that_was_asked_for_stays() -> None:
    one = Launched(by="torchrun", part=(2, 4), local=1, neighbours=4)
    assert one.device("cpu") == "cpu"
    assert Launched(by="SLURM", part=(2, 4), local=1, neighbours=1).device("auto") == "auto"


def start(tree: Path, store: Path, rank: int) -> Forked:
    """Start one process as torchrun starts it."""
    words = ["--experiment", tree, "--prompt-set", served.PROMPT_SET, "--store", store, *WORDS]
    return cli.start(*words, RANK=str(rank), WORLD_SIZE=str(N))


def test_four_processes_of_which_two_are_killed_and_run_again_alone(command: Command, tmp_path: Path) -> None:
    model = kimi.save_kimi(tmp_path / "kimi", num_hidden_layers=12)
    tree, store = served.make_tree(tmp_path / "experiments", model), tmp_path / "run.zarr"
    processes = [start(tree, store, rank) for rank in range(N)]
    end = time.monotonic() + 300
    while len(cli.chunks(store)) < 8:  # some are at work; two of them die there
        assert time.monotonic() < end
        time.sleep(0.005)
    for rank in (1, 2):
        processes[rank].kill()
    results = [process.communicate(timeout=300) for process in processes]
    codes = [process.returncode for process in processes]
    assert (codes[0], codes[3]) == (0, 0), results
    assert (codes[1], codes[2]) == (-9, -9)
    for rank in (0, 3):
        assert f"part {rank + 1}/4, as torchrun says" in results[rank][1]
        assert "this part is done; the capture is committed when its other parts are done" in results[rank][0]
    assert stored.captures(store) == []

    second = start(tree, store, 1)
    assert (second.communicate(timeout=300), second.returncode)[1] == 0
    assert stored.captures(store) == []
    third = start(tree, store, 2)
    out, err = third.communicate(timeout=300)
    assert third.returncode == 0, err
    assert re.search(r"captured \d+ rollouts", out)
    assert stored.captures(store) == [1]

    alone = tmp_path / "alone.zarr"
    told = command("--experiment", tree, "--prompt-set", served.PROMPT_SET, "--store", alone, *WORDS, "--part", "1/1")
    assert told.code == 0, told.err
    assert cli.contents(store) == cli.contents(alone)
