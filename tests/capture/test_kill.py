"""Real captures of a small model, killed with SIGKILL at random points: the store is that of one never killed."""

import random
from pathlib import Path

from tests.capture import cli, stored
from tests.capture.cli import Command
from tests.capture.stories import command, worded

__all__ = ["command"]

KILLS = 3
WORDS = ("--components", "residual,resid_pre,mlp_out,attn_out", "--chunk-tokens", 16, "--batch-tokens", 512)


def test_killed_again_and_again_it_ends_byte_identical(command: Command, tmp_path: Path) -> None:
    whole, store, rng = tmp_path / "whole.zarr", tmp_path / "killed.zarr", random.Random(3)
    assert command("--store", whole, *WORDS).code == 0
    total = len(list(whole.glob("captures/0001/residual/c/*/*/*")))
    found, points = list[int](), sorted(rng.sample(range(1, total // 2), KILLS))
    for point in points:  # as soon as so many chunks are there, or one more than the process before had left
        process, least = cli.start(*worded("--store", store, *WORDS)), max([point, *found])
        cli.wait_for(lambda least=least: len(cli.chunks(store)) > least, process)  # type: ignore[misc]
        process.kill()
        process.communicate()
        found.append(len(cli.chunks(store)))
        assert stored.captures(store) == []
    assert found == sorted(set(found)), "every process went on where the one before was cut off"
    assert command("--store", store, *WORDS).code == 0
    assert cli.contents(store) == cli.contents(whole)
    assert cli.chunks(store) == []
