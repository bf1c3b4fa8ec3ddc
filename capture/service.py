"""A server's work without HTTP: which captures were asked for, one after another, and their states in a file."""

import asyncio
import contextlib
import logging
import secrets
import sqlite3
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from capture.errors import CaptureError
from capture.layerspec import parse_layers
from capture.messages import CaptureOrder
from capture.modelholder import BusyModelError, ModelHolder, NoModelError
from capture.modelprocess import CancelledRequest, EndedError, FailedRequest, ModelProcess
from capture.roots import Roots, Target, missing_ids, same_model
from capture.tasks import INTERRUPTED, Task, TaskFile

__all__ = ["BusyStoreError", "ClosingError", "Service", "UnknownTaskError"]

LOG = logging.getLogger("capture")
GRACE = 3.0
"""Seconds that a running capture has to put its writer in order when the server ends."""

SAVED_EVERY = 2.0
"""Seconds between writes of a running task's progress to the file."""

SHOWN_IDS = 10

_CANCELLED = (
    "cancelled; nothing half-done was committed and what is finished is kept, send the same request again to go on"
)


class BusyStoreError(CaptureError):
    """A capture into the same store waits or runs.

    Attributes
    ----------
    task_id : str
    """

    def __init__(self, text: str, *, task_id: str) -> None:
        super().__init__(text)
        self.task_id = task_id


class ClosingError(CaptureError):
    """The server is ending."""


class UnknownTaskError(CaptureError):
    """There is no such task."""


class Service:
    """The queue of captures over one model. All methods run on the server's event loop.

    Parameters
    ----------
    model : ModelHolder
    roots : Roots
    tasks : Path
        The file of the tasks.
    """

    def __init__(self, model: ModelHolder, *, roots: Roots, tasks: Path) -> None:
        self.model = model
        self.roots = roots
        self.closing = False
        self._file_path = tasks
        self._file: TaskFile | None = None
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="capture-tasks")
        self._tasks: dict[str, Task] = {}
        self._running: tuple[Task, ModelProcess, int] | None = None
        self._wake = asyncio.Event()
        self._runner: asyncio.Task[None] | None = None

    # -- its life --------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Read the tasks, begin to load the model, and carry out what is asked for.

        Raises
        ------
        CaptureError
            The file of the tasks can't be used.
        """
        loop = asyncio.get_running_loop()
        try:
            self._file = await loop.run_in_executor(self._disk, TaskFile, self._file_path)
            self._tasks = {task.id: task for task in await loop.run_in_executor(self._disk, self._file.load)}
        except (sqlite3.Error, CaptureError) as error:
            if self._file is not None:
                await loop.run_in_executor(self._disk, self._file.close)
            raise CaptureError(
                f"{self._file_path} can't keep the tasks ({error}); move it away, or name another with --tasks"
            ) from error
        self.model.start()
        self._runner = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Stop what runs, keep what is finished, and end the model's process; takes little more than GRACE seconds."""
        self.closing = True
        if self._running is not None:
            task, process, number = self._running
            process.cancel(number)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(GRACE):
                    while not task.over:
                        await task.changed.wait()
        if self._runner is not None:
            self._runner.cancel()
            await asyncio.gather(self._runner, return_exceptions=True)
        await self.model.stop()
        for task in self.waiting:
            task.end("interrupted", error=INTERRUPTED)
            self._save(task)
            LOG.info(_said(task))
        if self._file is not None:
            await asyncio.get_running_loop().run_in_executor(self._disk, self._file.close)
        self._disk.shutdown()

    def _save(self, task: Task) -> "asyncio.Future[None]":
        assert self._file is not None
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self._disk, self._file.save, task.id, task.created, task.record())

    def refuse_if_closing(self) -> None:
        """Take nothing more on once the server ends.

        Raises
        ------
        ClosingError
        """
        if self.closing:
            raise ClosingError("the server is ending; send the request again when it has started anew")

    # -- tasks -----------------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> list[Task]:
        """Tasks that have not ended, in order."""
        return [task for task in self._tasks.values() if not task.over]

    def tasks(self) -> list[Task]:
        """Return all tasks, newest first."""
        return list(reversed(self._tasks.values()))

    def task(self, task_id: str) -> Task:
        """Return a task.

        Raises
        ------
        UnknownTaskError
        """
        if task_id not in self._tasks:
            raise UnknownTaskError(f"there is no task {task_id!r}; GET /tasks lists those that there are")
        return self._tasks[task_id]

    def ahead(self, task: Task) -> int:
        """How many captures are before a task in the queue."""
        return 0 if task.over else self.waiting.index(task)

    async def cancel(self, task_id: str) -> Task:
        """Cancel a task that waits or runs; what it has finished is kept. One that has ended stays as it is."""
        task = self.task(task_id)
        if self._running is not None and self._running[0] is task:
            _, process, number = self._running
            process.cancel(number)
        elif not task.over:
            task.end("cancelled", error=_CANCELLED)
            await self._save(task)
        return task

    # -- taking captures on ----------------------------------------------------------------------------------------

    async def submit(self, order: CaptureOrder) -> Task:
        """Accept a capture.

        Raises
        ------
        RequestError, ExperimentError, FailedRequest
            What is asked for does not exist, leads out of the roots or is of another model.
        BusyStoreError
            A capture into the same store waits or runs.
        NoModelError
        """
        self.refuse_if_closing()
        if self.model.name is None:
            raise NoModelError("no model is loaded; load one with POST /model/load")
        target = await asyncio.to_thread(self.roots.target, order)
        self._refuse_other_model(target)
        self._refuse_layers(order)
        if missing := await asyncio.to_thread(missing_ids, target, order):
            raise FailedRequest(_missing(missing, order, target), refused=True)
        # From here to the entry in the table nothing is awaited: of two requests at once, one finds the other.
        self.refuse_if_closing()
        self._refuse_same_store(target.store)
        task = Task(
            id=secrets.token_hex(4),
            order=order,
            tree=str(target.tree),
            variant=target.variant,
            store=str(target.store),
            resumes=self._resumed(target.store, order),
        )
        self._tasks[task.id] = task
        await self._save(task)
        LOG.info("task %s: capture of %s into %s", task.id, order.prompt_set, task.store)
        self._wake.set()
        return task

    def _refuse_other_model(self, target: Target) -> None:
        if not same_model(target.model, self.model.setup.model):
            raise FailedRequest(
                f"variant {target.variant!r} is {target.model}, and this server holds {self.model.setup.model}; start "
                "one with the other model, or POST /model/load",
                refused=True,
            )
        if target.lora != self.model.setup.adapter:
            raise FailedRequest(
                f"variant {target.variant!r} is {target.model} with {_adapter(target.lora)}, and this server holds it "
                f"with {_adapter(self.model.setup.adapter)}, so what it captures would not be that variant's; "
                "start one with the --adapter that the variant has",
                refused=True,
            )

    def _refuse_layers(self, order: CaptureOrder) -> None:
        facts = self.model.facts
        if not facts:
            return  # the config is not read yet; the process will check
        highest = max(parse_layers(order.layers or "all", facts["n_layers"]))
        if highest > facts["highest"]:
            raise FailedRequest(
                f"layer {highest} is not loaded: this server holds layers 0 to {facts['highest']} of "
                f"{facts['n_layers']}; start it with other --layers",
                refused=True,
            )
        names = [name.strip() for name in order.components.split(",") if name.strip()]
        absent = [name for name in names if name not in facts["components"]]
        if absent or not names:
            raise FailedRequest(
                f"the model has no component {absent[0] if absent else order.components!r}; it has "
                f"{', '.join(facts['components'])}",
                refused=True,
            )

    def _refuse_same_store(self, store: Path) -> None:
        for task in self.waiting:
            if task.store == str(store):
                raise BusyStoreError(
                    f"task {task.id} captures into {store} already; watch it at /eval/status/{task.id}, or cancel it",
                    task_id=task.id,
                )

    def _resumed(self, store: Path, order: CaptureOrder) -> str | None:
        before = next((task for task in self.tasks() if task.store == str(store)), None)
        if before is None or before.state == "completed" or before.order != order:
            return None
        return before.id

    # -- carrying them out -----------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            if not any(task.state == "starting" for task in self.waiting):
                self._wake.clear()
                await self._wake.wait()
            async with self.model.held() as process:
                task = next((task for task in self.waiting if task.state == "starting"), None)
                if task is not None:
                    await self._carry_out(task, process)

    async def _carry_out(self, task: Task, process: ModelProcess) -> None:
        task.begin()
        LOG.info("task %s: running", task.id)
        number, answer = process.begin(
            "capture",
            on_event=lambda event: _note(task, event),
            order=task.order.model_dump(),
            ids=task.order.ids,
            tree=task.tree,
            variant=task.variant,
            store=task.store,
        )
        self._running = task, process, number
        saving = asyncio.create_task(self._save_often(task))
        try:
            task.complete(**await answer)
        except CancelledRequest:
            task.end("interrupted" if self.closing else "cancelled", error=INTERRUPTED if self.closing else _CANCELLED)
        except (FailedRequest, EndedError) as error:
            task.end("failed", error=str(error))
        finally:
            saving.cancel()
            self._running = None
        LOG.log(logging.ERROR if task.state == "failed" else logging.INFO, _said(task))
        await self._save(task)

    async def _save_often(self, task: Task) -> None:
        while True:
            await self._save(task)
            await asyncio.sleep(SAVED_EVERY)

    # -- the model -------------------------------------------------------------------------------------------------

    async def load_model(self, name: str, *, quantize: str | None = None) -> bool:
        """Put another model in the place of the one that is loaded; see `ModelHolder.replace`.

        Returns
        -------
        bool
            False where it is loaded already.

        Raises
        ------
        RequestError
            A directory out of the root for models.
        BusyModelError
            Captures wait or run: they need the model that is loaded.
        """
        self.refuse_if_closing()
        setup = self.model.setup
        here = same_model(name, setup.model) and quantize == setup.quantize and setup.adapter is None
        if here and self.model.state == "loaded":
            return False
        allowed = setup.model if same_model(name, setup.model) else await asyncio.to_thread(self.roots.model, name)
        if waiting := self.waiting:
            raise BusyModelError(f"task {waiting[0].id} needs the model {self.model.name}; wait for it or cancel it")
        await self.model.replace(allowed, quantize=quantize)
        return True


def _adapter(name: str | None) -> str:
    return f"the adapter {name}" if name else "no adapter"


def _note(task: Task, event: Mapping[str, Any]) -> None:
    if "planned" in event:
        task.plan(**event["planned"])
    elif "progress" in event:
        task.move(**event["progress"])


def _said(task: Task) -> str:
    if task.state != "completed":
        return f"task {task.id}: {task.state}: {task.error}"
    done, skipped = task.progress, f", {task.skipped} were in the store already" if task.skipped else ""
    return f"task {task.id}: completed: {done.rollouts} rollouts, {done.tokens:,} tokens{skipped}"


def _missing(ids: list[str], order: CaptureOrder, target: Target) -> str:
    more = f" and {len(ids) - SHOWN_IDS} more" if len(ids) > SHOWN_IDS else ""
    return (
        f"prompt set {order.prompt_set!r} has no rollout {', '.join(ids[:SHOWN_IDS])}{more} among the responses of "
        f"{order.responses_from or target.variant!r}; leave them out"
    )
