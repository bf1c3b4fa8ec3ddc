"""A server's handle on the process that holds its model: start it, ask it, cancel, end it."""

import asyncio
import contextlib
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any

from capture.errors import CaptureError

__all__ = ["Answer", "CancelledRequest", "EndedError", "FailedRequest", "ModelProcess"]

Answer = dict[str, Any]
LONGEST_LINE = 64 * 1024 * 1024


class FailedRequest(CaptureError):
    """The process says why it could not do what it was asked.

    Attributes
    ----------
    refused : bool
        The request is at fault, not the model or the machine.
    """

    def __init__(self, text: str, *, refused: bool) -> None:
        super().__init__(text)
        self.refused = refused


class CancelledRequest(CaptureError):
    """The request was cancelled."""


class EndedError(CaptureError):
    """The process ended before it answered."""


class ModelProcess:
    """One child process. What it is asked it does one after another, in order.

    It leads a process group of its own, so that a Ctrl-C at the terminal reaches only the server, and it ends by itself
    when the server's end of its standard input closes.
    """

    def __init__(self, child: asyncio.subprocess.Process) -> None:
        self._child = child
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Answer]] = {}
        self._events: dict[int, Callable[[Mapping[str, Any]], None]] = {}
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def start(cls) -> "ModelProcess":
        """Start the process; it holds no model yet."""
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "capture.worker",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=LONGEST_LINE,
            start_new_session=True,
        )
        return cls(child)

    async def ended(self) -> str:
        """Wait until the process is gone, and say how it ended."""
        return await asyncio.shield(self._reading)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._child.pid

    def begin(
        self, do: str, *, on_event: Callable[[Mapping[str, Any]], None] = lambda _: None, **asked: Any
    ) -> tuple[int, "asyncio.Future[Answer]"]:
        """Ask for something; return its number, to cancel it by, and its answer to come.

        The answer raises FailedRequest, CancelledRequest or EndedError.
        """
        number = next(self._numbers)
        future = self._waiting[number] = asyncio.get_running_loop().create_future()
        self._events[number] = on_event
        if self._reading.done():
            future.set_exception(EndedError("the process that holds the model has ended; load a model again"))
        else:
            self._write({"id": number, "do": do, **asked})
        return number, future

    async def ask(self, do: str, **asked: Any) -> Answer:
        """Ask for something and wait for the answer."""
        return await self.begin(do, **asked)[1]

    def cancel(self, number: int) -> None:
        """Let a request stop at the next module of the model, or the next batch; its answer raises CancelledRequest."""
        self._write({"id": number, "do": "cancel"})

    async def end(self) -> None:
        """Kill the process and wait until it is gone, and its memory with it."""
        self.kill()
        await self._child.wait()
        await self._reading

    def kill(self) -> None:
        """Kill the process and wait for nothing; any thread may."""
        if self._child.returncode is None:  # else its number may be another's by now
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._child.pid, signal.SIGKILL)

    def _write(self, asked: Mapping[str, Any]) -> None:
        assert self._child.stdin is not None
        if self._child.returncode is None and not self._child.stdin.is_closing():
            self._child.stdin.write(json.dumps(asked).encode() + b"\n")

    async def _read(self) -> str:
        assert self._child.stdout is not None
        async for line in self._child.stdout:
            self._take(json.loads(line))
        ended = _how_it_ended(await self._child.wait())
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(EndedError(ended))
                future.exception()  # nobody may be waiting any more
        return ended

    def _take(self, said: Mapping[str, Any]) -> None:
        if "event" in said:
            self._events[said["id"]](said["event"])
            return
        future = self._waiting.pop(said["id"])
        del self._events[said["id"]]
        if future.done():
            return
        if "ok" in said:
            future.set_result(said["ok"])
        elif said["why"] == "cancelled":
            future.set_exception(CancelledRequest("cancelled"))
        else:
            future.set_exception(FailedRequest(said["error"], refused=said["why"] == "refused"))


def _how_it_ended(code: int) -> str:
    if code >= 0:
        how = f"returned {code}"
    else:
        how = f"was ended by {signal.Signals(-code).name}"
        how += ", as the system does when memory runs out" if -code == signal.SIGKILL else ""
    return f"the process that holds the model {how}; what is finished is kept, send the same request again to go on"
