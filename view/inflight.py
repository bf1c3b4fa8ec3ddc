"""A common limit for the memory of all answers that are being made or sent: who does not fit waits, or is sent away."""

import math
import threading
import time

from starlette.types import ASGIApp, Receive, Scope, Send

from datastore.errors import DatastoreError

__all__ = ["SHARE", "Budget", "BusyError", "InFlight", "Share"]

SHARE = "answers_share"


class BusyError(DatastoreError):
    """Other answers take the memory that this one needs.

    Attributes
    ----------
    retry_after : int
        Seconds.
    """

    def __init__(self, sentence: str, *, retry_after: int) -> None:
        super().__init__(sentence)
        self.retry_after = retry_after


class Budget:
    """Bytes that all answers in flight may hold together.

    One answer alone is let through whatever its size: how large one may be is `Limits`' business.

    Parameters
    ----------
    total : int
        Bytes.
    patience : float
        Seconds that a request waits for room.
    waiting : int
        Requests that may wait at once; a waiting one holds a thread, and those that ask for little need threads too.
    """

    def __init__(self, total: int = 512 * 2**20, *, patience: float = 10.0, waiting: int = 16) -> None:
        self.total, self.patience, self.most_waiting = total, patience, waiting
        self.used = self.peak = self.waiting = 0
        self._changed = threading.Condition()

    def take(self, size: int) -> None:
        """Reserve bytes, when there is room for them.

        Raises
        ------
        BusyError
            There was none for too long, or too many wait already.
        """
        with self._changed:
            if not self._fits(size):
                self._wait(size)
            self.used += size
            self.peak = max(self.peak, self.used)

    def give(self, size: int) -> None:
        """Free what was reserved."""
        with self._changed:
            self.used -= size
            self._changed.notify_all()

    def _fits(self, size: int) -> bool:
        return self.used == 0 or self.used + size <= self.total

    def _wait(self, size: int) -> None:
        began = time.monotonic()
        if self.waiting < self.most_waiting:
            self.waiting += 1
            try:
                if self._changed.wait_for(lambda: self._fits(size), self.patience):
                    return
            finally:
                self.waiting -= 1
        waited = time.monotonic() - began
        raise BusyError(
            f"this answer takes {size / 2**20:.0f} MiB, and other answers hold {self.used / 2**20:.0f} of the "
            f"{self.total / 2**20:.0f} MiB that all may hold together, so nothing was read after waiting "
            f"{waited:.0f} s; ask again in a while, or for less",
            retry_after=max(1, math.ceil(self.patience / 2)),
        )


class Share:
    """What one request holds of the budget.

    Parameters
    ----------
    budget : Budget
    """

    def __init__(self, budget: Budget) -> None:
        self._budget, self._held = budget, 0

    def take(self, size: int) -> None:
        """Reserve bytes for as long as the request lasts, all that it needs at once."""
        self._budget.take(size)
        self._held += size

    def give_back(self) -> None:
        """Free everything."""
        if self._held:
            self._budget.give(self._held)
            self._held = 0


class InFlight:
    """Gives each request a share of the budget, and takes it back when the last byte was sent or nobody listens.

    Parameters
    ----------
    app : ASGI application
    budget : Budget
    """

    def __init__(self, app: ASGIApp, *, budget: Budget) -> None:
        self._app, self._budget = app, budget

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        share = Share(self._budget)
        try:
            await self._app({**scope, SHARE: share}, receive, send)
        finally:
            share.give_back()
