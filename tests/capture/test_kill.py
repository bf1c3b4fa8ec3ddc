"""Real captures of a small model, killed with SIGKILL at random instants: the store is that of one never killed."""

import random
import time
from pathlib import Path

from tests.capture import cli, stored
from tests.capture.cli import Command
from tests.capture.stories import command, worded

__all__ = ["command"]

KILLS = 3
WORDS = ("--components", "residual,resid_pre,mlp_out,attn_out", "--chunk-tokens", 16, "--batch-tokens", 512)


def test_killed_again_and_again_it_ends_byte_identical(command: Command, tmp_path: Path) -> None:
    whole, store, rng = tmp_path / "whole.zarr", tmp_path / "killed.zarr", random.Random(3)
    began = time.monotonic()
    assert command("--store", whole, *WORDS).code == 0
    seconds = time.monotonic() - began
    found: list[int] = []
    for _ in range(KILLS):
        process = cli.start(*worded("--store", store, *WORDS))
        before = len(found) and found[-1]
        cli.wait_for(lambda before=before: len(cli.chunks(store)) > before, process)  # type: ignore[misc]
        time.sleep(rng.uniform(0, seconds / (KILLS + 2)))
        process.kill()
        process.communicate()
        found.append(len(cli.chunks(store)))
        assert stored.captures(store) == []
    assert found == sorted(set(found)), "every process went on where the one before was cut off"
    assert command("--store", store, *WORDS).code == 0
    assert cli.contents(store) == cli.contents(whole)
    assert cli.chunks(store) == []
