"""Rows on their way from a GPU to the writer: two pinned slabs of host memory, a copy stream, one thread.

While one batch computes, the rows of the one before are copied, handed on, compressed and written. With both slabs
taken the next batch waits: that is all the memory there is. A slab is filled again as soon as its rows were handed on,
so whoever takes them must copy them.
"""

import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

__all__ = ["Slab", "Staging"]

SLABS = 2


class Slab:
    """Pinned memory for the rows of one batch; parts of it are given out in order."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        self._used = 0
        self._events: list[Any] = []

    def begin(self, n_bytes: int) -> None:
        """Make room, and forget what was here."""
        if self._memory is None or self._memory.numel() < n_bytes:
            self._memory = None  # the old one goes first: both together may be too much
            self._memory = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        self._used, self._events = 0, []

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return the next part of the slab as a tensor."""
        assert self._memory is not None
        n_bytes = torch.Size(shape).numel() * dtype.itemsize
        part = self._memory[self._used : self._used + n_bytes]
        self._used += n_bytes
        return part.view(dtype).view(shape)

    def filled_after(self, event: Any) -> None:
        """The slab's rows are there once this event has happened."""
        self._events.append(event)

    def wait(self) -> None:
        """Wait until the rows are there."""
        for event in self._events:
            event.synchronize()


class Staging:
    """Hands batches of rows on in a thread of its own, in order, `SLABS` at most on their way.

    What fails in the thread is raised by the next call of any method. Used as a context manager; leaving it without an
    error waits for everything.
    """

    def __init__(self) -> None:
        self._free: queue.SimpleQueue[Slab] = queue.SimpleQueue()
        for _ in range(SLABS):
            self._free.put(Slab())
        self._work: queue.SimpleQueue[tuple[Slab, Callable[[], object]] | None] = queue.SimpleQueue()
        self._streams: dict[torch.device, Any] = {}
        self._failure: BaseException | None = None
        self.used = False
        """Whether any slab was ever given out."""
        self._pending = 0
        self._idle = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="capture-staging", daemon=True)
        self._thread.start()

    def stream(self, device: torch.device) -> Any:
        """Return the stream of copies from a device."""
        if device not in self._streams:
            make: Any = torch.cuda.Stream
            self._streams[device] = make(device)
        return self._streams[device]

    def slab(self, n_bytes: int) -> Slab:
        """Return a slab with room for so much, as soon as one is free."""
        self.used = True
        slab = self._free.get()
        try:
            self._raise_failure()
            slab.begin(n_bytes)
        except BaseException:
            self._free.put(slab)
            raise
        return slab

    def give_back(self, slab: Slab) -> None:
        """Take back a slab whose rows are not wanted."""
        self._free.put(slab)

    def hand_on(self, slab: Slab, work: Callable[[], object]) -> None:
        """Do `work` once the slab's rows are there, after all that was handed on before; then the slab is free."""
        self._raise_failure()
        with self._idle:
            self._pending += 1
        self._work.put((slab, work))

    def flush(self) -> None:
        """Wait until everything is handed on."""
        with self._idle:
            self._idle.wait_for(lambda: self._pending == 0)
        self._raise_failure()

    def close(self) -> None:
        """Stop the thread once it has done what it was given."""
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            slab, work = item
            try:
                slab.wait()
                if self._failure is None:
                    work()
            except BaseException as error:
                self._failure = error
            finally:
                self._free.put(slab)
                del item, work
                with self._idle:
                    self._pending -= 1
                    self._idle.notify_all()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._failure = self._failure or error  # what waits is then not handed on
        try:
            if error is None:
                self.flush()
        finally:
            self.close()
