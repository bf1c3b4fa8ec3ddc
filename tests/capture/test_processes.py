"""Captures as processes of their own: parts side by side, two at once, the same part twice, Ctrl-C."""

import signal
from pathlib import Path

import pytest

from tests.capture import cli, stored
from tests.capture.cli import Command
from tests.capture.stories import command, worded
from tests.forked import Forked

__all__ = ["command"]

# Thousands of small chunks, so that there is time to meddle.
LONG = ("--components", "residual,mlp_out,attn_out,k_proj", "--chunk-tokens", 16, "--batch-tokens", 512)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "run.zarr"


def finished(process: Forked) -> cli.Result:
    out, err = process.communicate(timeout=200)
    return cli.Result(process.wait(), out, err)


def test_parts_side_by_side_make_the_store_that_one_process_makes(
    command: Command, store: Path, tmp_path: Path
) -> None:
    words = ("--chunk-tokens", 64, "--batch-tokens", 1024)
    processes = [cli.start(*worded("--store", store, *words, "--part", f"{i}/2")) for i in (1, 2)]
    results = [finished(process) for process in processes]
    assert [result.code for result in results] == [0, 0], results
    assert sum("this part is done" in result.out for result in results) <= 1
    assert command("--store", tmp_path / "alone.zarr", *words).code == 0
    assert cli.contents(store) == cli.contents(tmp_path / "alone.zarr")


def test_two_different_captures_of_one_store_at_once_both_succeed(
    command: Command, store: Path, tmp_path: Path
) -> None:
    choices = (("--ids", "1-0,2-0", "--layers", "0-2"), ("--ids", "5-1,6-1", "--layers", "1-4"))
    processes = [cli.start(*worded("--store", store, *words)) for words in choices]
    results = [finished(process) for process in processes]
    assert [result.code for result in results] == [0, 0], results
    assert stored.captures(store) == [1, 2]
    for i, words in enumerate(choices):
        alone = tmp_path / f"alone{i}.zarr"
        assert command("--store", alone, *words).code == 0
        stored.assert_same(stored.rows(store), stored.rows(alone))


def test_the_same_part_twice_is_refused_and_ctrl_c_leaves_what_is_finished(
    command: Command, store: Path, tmp_path: Path
) -> None:
    process = cli.start(*worded("--store", store, *LONG))
    cli.wait_for(lambda: len(cli.chunks(store)) > 10, process)
    second = command("--store", store, *LONG)
    assert second.code == 1
    assert f"is being filled by process {process.pid} on " in second.err
    process.send_signal(signal.SIGINT)
    stopped = finished(process)
    assert stopped.code == 130
    assert stopped.err.startswith("error: stopped; nothing half-done was committed, and the chunks that are finished")
    assert stored.captures(store) == []
    left = cli.chunks(store)
    assert left
    times = {file: file.stat().st_mtime_ns for file in left}
    moved = {store / "captures/0001" / file.relative_to(file.parents[4]): at for file, at in times.items()}
    assert command("--store", store, *LONG).code == 0
    assert {file: file.stat().st_mtime_ns for file in moved} == moved, "a finished chunk is not written again"
    assert command("--store", tmp_path / "whole.zarr", *LONG).code == 0
    assert cli.contents(store) == cli.contents(tmp_path / "whole.zarr")
