"""`python -m PACKAGE` as processes of their own that start in milliseconds: forks of one that has imported it.

Each has its own arguments, environment, output, signals and exit code, and ends as the interpreter ends; only what it
would have imported is there already. One that is given its whole environment is a fork of another process, which has
imported only what reads no variable of it. What is about importing starts anew.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import IO, Any, NoReturn

ROOT = Path(__file__).parents[1]
IMPORTED = {
    "capture": ("capture.commands", "capture.loading", "capture.importing", "transformers"),
    "view": ("view.commands", "view.server", "view.api", "view.page", "panel.io.fastapi", "uvicorn", "dask.array"),
}
"""What a package's forks find imported."""
BARE = ("torch", "torch._dynamo", "torch.distributed.tensor", "torch.export", "datastore.writer", "datastore.console")
"""Without huggingface_hub, which reads HF_HOME and others when it is imported."""


class Forked:
    """A running fork: what tests use of `subprocess.Popen`."""

    def __init__(self, pid: int, end: socket.socket, out: IO[str], err: IO[str] | None) -> None:
        self.pid, self._end, self.stdout, self.stderr = pid, end, out, err
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self._look(0.0)

    def wait(self, timeout: float | None = None) -> int:
        code = self._look(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(f"the fork {self.pid}", timeout or 0.0)
        return code

    def _look(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            self._end.settimeout(timeout)
            with contextlib.suppress(TimeoutError, BlockingIOError):
                said = self._end.recv(64)
                self.returncode = int(said)
                self._end.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        found: list[str] = []
        reader = threading.Thread(target=lambda: found.append(self.stderr.read() if self.stderr else ""))
        reader.start()
        with self.stdout:
            out = self.stdout.read()
        reader.join()
        if self.stderr:
            self.stderr.close()
        self.wait(timeout)
        return out, found[0]


@cache
def _server(imported: tuple[str, ...]) -> socket.socket:
    ours, theirs = socket.socketpair()
    with theirs:
        words = [sys.executable, "-m", "tests.forked", str(theirs.fileno()), *imported]
        process = subprocess.Popen(words, cwd=ROOT, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


def start(
    module: str,
    *words: object,
    errors: IO[str] | None = None,
    environment: Mapping[str, str] | None = None,
    **environ: str,
) -> Forked:
    """Start `python -m module` with these words in the project's directory.

    Its variables are those of this process with `environ`, or just those of `environment`. What it says of errors goes
    into a file, or into a pipe where none is given.
    """
    server = _server(IMPORTED[module] if environment is None else BARE)
    end, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    out, into_out = os.pipe()
    err, into_err = os.pipe() if errors is None else (None, os.dup(errors.fileno()))
    request = {"module": module, "words": [str(one) for one in words], "environ": environ, "environment": environment}
    asked = json.dumps(request).encode()
    with theirs:
        server.sendall(len(asked).to_bytes(4, "little"))
        socket.send_fds(server, [asked[:1]], [into_out, into_err, theirs.fileno()])
        server.sendall(asked[1:])
    os.close(into_out)
    os.close(into_err)
    return Forked(int(end.recv(32)), end, os.fdopen(out), None if err is None else os.fdopen(err))


# -- in the process that forks ---------------------------------------------------------------------------------------


def _serve(control: socket.socket) -> dict[str, Any]:
    """Fork for every request; return it in the fork."""
    look, ends = selectors.DefaultSelector(), dict[int, socket.socket]()
    wake, woken = socket.socketpair()
    woken.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
    look.register(control, selectors.EVENT_READ)
    look.register(wake, selectors.EVENT_READ)
    while True:
        for key, _ in look.select():
            if key.fileobj is wake:
                wake.recv(4096)
                _report(ends)
                continue
            size = control.recv(4)
            if not size:
                os._exit(0)
            first, descriptors, _, _ = socket.recv_fds(control, 1, 3)
            left = int.from_bytes(size, "little") - 1
            asked = json.loads(first + control.recv(left, socket.MSG_WAITALL))
            pid = os.fork()
            if not pid:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                look.close()
                for one in (control, wake, woken, *ends.values()):
                    one.close()
                return {**asked, "descriptors": descriptors}
            ends[pid] = socket.socket(fileno=descriptors[2])
            ends[pid].sendall(b"%d" % pid)
            os.close(descriptors[0])
            os.close(descriptors[1])


def _report(ends: dict[int, socket.socket]) -> None:
    for pid in list(ends):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            with ends.pop(pid) as end, contextlib.suppress(OSError):
                end.sendall(b"%d" % os.waitstatus_to_exitcode(status))


def main() -> NoReturn:
    """Import, serve, and become what is asked for."""
    for name in sys.argv[2:]:
        import_module(name)
    gc.freeze()  # what is imported is shared with the forks
    asked = _serve(socket.socket(fileno=int(sys.argv[1])))
    out, err, end = asked["descriptors"]
    os.dup2(out, 1)
    os.dup2(err, 2)
    for one in (out, err, end):
        os.close(one)
    if asked["environment"] is not None:
        os.environ.clear()
        os.environ.update(asked["environment"])
    os.environ.update(asked["environ"])
    sys.argv = [asked["module"], *asked["words"]]
    runpy.run_module(asked["module"], run_name="__main__", alter_sys=True)
    sys.exit(0)


if __name__ == "__main__":
    main()
