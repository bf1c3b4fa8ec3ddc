"""The model of a server: loaded in the background, replaced on request, loaded again if its process is lost."""

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from capture.errors import CaptureError
from capture.modelprocess import Answer, ModelProcess

__all__ = ["BusyModelError", "ModelHolder", "NoModelError", "Setup"]

LOG = logging.getLogger("capture")


class NoModelError(CaptureError):
    """No model is loaded."""


class BusyModelError(CaptureError):
    """The model does something else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """The model to hold, and how captures are made with it; see the options of `serve`."""

    model: str
    revision: str | None
    dtype: str | None
    device: str
    layers: str | None
    memory: int
    batch_tokens: int | None
    chunk_tokens: int
    trust_remote_code: bool
    adapter: str | None = None
    quantize: str | None = None
    expert_workspace: int = 2 << 30


class ModelHolder:
    """One model in one process. All methods run on the server's event loop.

    Attributes
    ----------
    state : {"loading", "loaded", "none"}
    facts : mapping
        `n_layers`, `highest` (layer that is loaded), `components`; empty until the config is read.
    lost : Future of str
        Set once there is no model and none is on its way though there should be one; why.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.state: Literal["loading", "loaded", "none"] = "loading"
        self.facts: Mapping[str, Any] = {}
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._process: ModelProcess | None = None
        self._ready = asyncio.Event()
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def name(self) -> str | None:
        """Name of the model that is loaded or on its way."""
        return None if self.state == "none" else self.setup.model

    @property
    def busy(self) -> bool:
        """Whether it does something, or is being loaded."""
        return self._lock.locked()

    def start(self) -> None:
        """Begin to load it."""
        self._spawn(self._load_anew())

    async def stop(self) -> None:
        """End the process, at once."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._process is not None:
            await self._process.end()
        self._process = None

    def kill(self) -> None:
        """Kill the process and wait for nothing; any thread may."""
        if self._process is not None:
            self._process.kill()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _load_anew(self) -> None:
        try:
            async with self._lock:
                self._process = await ModelProcess.start()
                await self._describe(self._process, self.setup)
                await self._load(self._process)
        except CaptureError as error:
            self.state = "none"
            if not self.lost.done():
                self.lost.set_result(str(error))

    async def _watch(self, process: ModelProcess) -> None:
        """Load the model again when its process ends without having been asked to."""
        how = await process.ended()
        if process is self._process:
            LOG.error("%s; the model is loaded again", how)
            self.state = "loading"
            self._ready.clear()
            await self._load_anew()

    async def _describe(self, process: ModelProcess, setup: Setup) -> None:
        LOG.info("loading %s in process %d", setup.model, process.pid)
        self.facts = await process.ask("describe", setup=asdict(setup))

    async def _load(self, process: ModelProcess) -> None:
        facts = await process.ask("load")
        self.state = "loaded"
        self._ready.set()
        self._spawn(self._watch(process))
        LOG.info(
            "ready: %s, %d layers on %s in %.0f s",
            self.setup.model,
            facts["n_layers"],
            facts["device"],
            facts["seconds"],
        )

    async def replace(self, name: str, *, quantize: str | None = None) -> None:
        """Load another model in the place of this one, once it is known that there is such a model.

        Raises
        ------
        BusyModelError
            This one does something, or is being loaded.
        FailedRequest
            There is no such model (then this one stays), or it can't be loaded (then there is none).
        """
        if self.busy:
            raise BusyModelError(f"the model {self.name} is busy or being loaded; wait for it")
        async with self._lock:
            await self._replace(replace(self.setup, model=name, revision=None, adapter=None, quantize=quantize))

    async def _replace(self, setup: Setup) -> None:
        facts, fresh = self.facts, await ModelProcess.start()
        try:
            await self._describe(fresh, setup)
        except BaseException:
            self.facts = facts
            await fresh.end()
            raise
        old, self._process, self.setup, self.state = self._process, fresh, setup, "loading"
        self._ready.clear()
        try:
            if old is not None:
                await old.end()  # its memory is needed for the new one
            await self._load(fresh)
        except BaseException:
            self.state = "none"
            await fresh.end()
            raise

    @asynccontextmanager
    async def held(self) -> AsyncIterator[ModelProcess]:
        """Wait until the model is loaded and does nothing, and have it alone."""
        while True:
            await self._ready.wait()
            async with self._lock:
                if self._ready.is_set() and self._process is not None:
                    yield self._process
                    return

    async def ask(self, do: str, **asked: Any) -> Answer:
        """Let it do something now.

        Raises
        ------
        NoModelError, BusyModelError, FailedRequest
        """
        if self.state != "loaded":
            raise NoModelError("no model is loaded yet; wait until /health says that it is, or POST /model/load")
        if self.busy:
            raise BusyModelError("the model is busy; wait for what it does, or cancel it")
        async with self.held() as process:
            return await process.ask(do, **asked)
