"""A server's life with the users' own lines: killed in the middle, ended in the middle, begun again, a whole store."""

import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import kimi
from tests.capture import cli, served, stored
from tests.capture.cli import Command, command
from tests.capture.served import Server
from tests.house import ROOT

__all__ = ["command"]

LAYERS = "10,15,20,25,30,35,40,45,50"
ACCEPTED = {"status": "starting", "prompt_set": served.PROMPT_SET, "layers": LAYERS, "n_prompt_ids": 22, "ahead": 0}


def in_the_middle(server: Server, task_id: str) -> None:
    """Wait until a capture has stored some rollouts, not all."""
    server.wait(lambda: server.client.status(task_id).progress.raw_bytes > 0)
    assert server.client.status(task_id).status == "running"


def gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=30)[1]


def can_listen(port: int) -> bool:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", port))
        return True


def assert_ends_by_kill(server: Server, task_id: str) -> None:
    """Nothing of it is left by a plain kill, and the log says what was interrupted."""
    children, port = server.children(), server.port
    assert server.end(signal.SIGTERM) == 0
    assert gone(children)
    assert can_listen(port)
    assert "ERROR" not in server.log
    assert f"task {task_id}: interrupted: " in server.log


def assert_made_at_once(command: Command, tree: Path, store: Path, *, alone: Path) -> None:
    """The store is, byte for byte, what the command makes that nobody interrupts."""
    words = ("--layers", LAYERS, "--ids", ",".join(served.IDS), "--chunk-tokens", 128, "--batch-tokens", 256)
    told = command("--experiment", tree, "--prompt-set", served.PROMPT_SET, "--store", alone, *words)
    assert told.code == 0, told.err
    assert cli.contents(store) == cli.contents(alone)


# The end of a server whose orderly end hangs: the real timer, a process for the model, and nothing that ever finishes.
HANGING = """
import asyncio, subprocess, sys, time
from capture import serving
from capture.modelprocess import ModelProcess

class Holder:
    def kill(self):
        process.kill()

async def hang():
    global process
    process = await ModelProcess.start()
    print(process.pid, flush=True)
    serving.LONGEST_END = 0.2
    serving._leave_in_time(Holder())
    time.sleep(600)

asyncio.run(hang())
"""


def test_a_server_whose_end_hangs_leaves_all_the_same() -> None:
    done = subprocess.run([sys.executable, "-c", HANGING], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    with suppress(psutil.NoSuchProcess):
        assert gone([psutil.Process(int(done.stdout))])


def test_the_page_shows_the_line_that_is_typed_here() -> None:
    shown = re.search(
        r"-H 'Content-Type: application/json' -d '(.*?)'\n", (ROOT / "docs/server.md").read_text(), re.DOTALL
    )
    typed = re.search(r"-d '(.*)'$", served.CAPTURE_LINE, re.DOTALL)
    assert shown
    assert typed
    assert json.loads(shown[1]) == json.loads(typed[1])
    assert len(json.loads(typed[1])["prompt_ids"]) == 22


@pytest.fixture
def start() -> Iterator[Callable[..., Server]]:
    """Start servers, of which none is left behind where a test fails."""
    started: list[Server] = []

    def begin(*words: Any, **options: Any) -> Server:
        started.append(Server(*words, **options))
        return started[-1]

    yield begin
    for one in started:
        one.kill()


def test_the_users_lines_make_a_whole_store_however_the_server_ends(
    start: Callable[..., Server], command: Command, tmp_path: Path
) -> None:
    root = tmp_path / "experiments"
    model = kimi.save_kimi(tmp_path / "kimi", num_hidden_layers=61)
    tree = served.make_tree(root, model)
    store = tree / "inference" / "kimi_k2" / f"{served.PROMPT_SET}.zarr"

    first = start(model, root, "--chunk-tokens", 128)
    assert first.type(served.HEALTH_LINE) == {"status": "ok", "model": str(model), "loaded": False, "active_evals": 0}
    answer = first.type(served.CAPTURE_LINE)  # before the model is there: it waits
    assert answer == {"task_id": answer["task_id"], **ACCEPTED, "store": str(store)}
    in_the_middle(first, answer["task_id"])
    assert first.type(served.HEALTH_LINE)["loaded"] is True
    assert all(word in first.log for word in ("from_pretrained", "Fused", "ready"))
    children, port = first.children(), first.port
    assert children
    first.end(signal.SIGKILL)
    assert gone(children), "the process with the model does not outlive the server"
    finished = {file: file.stat().st_mtime_ns for file in cli.chunks(store)}
    assert finished
    assert stored.captures(store) == []

    second = start(model, root, "--chunk-tokens", 128, port=port)
    killed = second.type(served.STATUS_LINE.format(task_id=answer["task_id"]))
    assert killed["status"] == "interrupted"
    assert "send the same request again to go on" in killed["error"]
    again = second.type(served.CAPTURE_LINE)
    assert second.client.status(again["task_id"]).resumes == answer["task_id"]
    before = second.client.status(answer["task_id"]).elapsed
    second.wait(lambda: second.client.status(again["task_id"]).progress.rollouts > len(finished) // 9)
    assert second.client.status(answer["task_id"]).elapsed == before, "the clock of what has ended stands still"
    assert_ends_by_kill(second, again["task_id"])
    assert stored.captures(store) == []
    assert all(file.stat().st_mtime_ns == at for file, at in finished.items()), "a finished chunk is not written again"

    third = start(model, root, "--chunk-tokens", 128, port=port)
    assert third.type(served.STATUS_LINE.format(task_id=again["task_id"]))["status"] == "interrupted"
    last = third.client.wait(third.type(served.CAPTURE_LINE)["task_id"])
    assert (last.status, last.captures, last.progress.rollouts, last.progress.of) == ("completed", [1], 22, 22)
    assert third.end(signal.SIGINT) == 0

    assert_made_at_once(command, tree, store, alone=tmp_path / "alone.zarr")
