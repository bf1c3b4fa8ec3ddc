"""Processes that start in milliseconds and may be killed: forks of one that has imported everything and done nothing.

python -m tests.faults.zygote MODULE...      reads requests as JSON lines, answers each when its process has ended
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, NoReturn, Self

ROOT = Path(__file__).parents[2]


class Ended(NamedTuple):
    """How a process ended: killed by us or with an exit code, after how long, and what it wrote."""

    killed: bool
    code: int
    seconds: float
    output: str


class Zygote:
    """A process that forks one process for each task. Used as a context manager it ends on leaving.

    `preload` is a library that stands before the C library in all of them.
    """

    def __init__(self, *modules: str, preload: Path | None = None) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "300", "NO_COLOR": "1"}
        if preload is not None:
            environment["LD_PRELOAD"] = str(preload)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote", *modules],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, task: str, *arguments: object, kill_after: float | None = None) -> Ended:
        """Run `module:function` with arguments of text in a process of its own; kill -9 it after so many seconds."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"task": task, "arguments": [str(one) for one in arguments], "kill_after": kill_after}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return Ended(*json.loads(self._process.stdout.readline()))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()


def serve(modules: list[str]) -> None:
    """Answer requests until there are no more."""
    for name in modules:
        import_module(name)
    gc.freeze()  # what is imported is shared with the forks and not touched again
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    for line in sys.stdin:
        print(json.dumps(_fork(**json.loads(line))), flush=True)


def _fork(task: str, arguments: list[str], kill_after: float | None) -> Ended:
    with tempfile.TemporaryFile() as log:
        began = time.monotonic()
        pid = os.fork()
        if not pid:
            _become(task, arguments, log.fileno())
        if kill_after is not None and signal.sigtimedwait({signal.SIGCHLD}, kill_after) is None:
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        seconds = time.monotonic() - began
        while signal.sigtimedwait({signal.SIGCHLD}, 0) is not None:
            pass
        log.seek(0)
        code = os.waitstatus_to_exitcode(status)
        return Ended(code == -signal.SIGKILL, code, seconds, log.read().decode(errors="replace"))


def _become(task: str, arguments: list[str], log: int) -> NoReturn:
    code: Any = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        module, _, function = task.partition(":")
        getattr(import_module(module), function)(*arguments)
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1:])
