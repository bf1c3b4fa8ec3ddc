"""The server's HTTP side: what each address takes and answers, who may ask, and the life of the process."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, Query
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.requests import Request

from capture.errors import CaptureError, RequestError
from capture.guard import LOOPBACK, Guard, problem
from capture.messages import (
    CaptureOrder,
    Generated,
    GenerateOrder,
    Health,
    ModelAnswer,
    Problem,
    SaveAnswer,
    Started,
    TaskList,
    TaskStatus,
)
from capture.modelholder import BusyModelError, ModelHolder, NoModelError, Setup
from capture.modelprocess import CancelledRequest, EndedError, FailedRequest
from capture.roots import NotThereError, OutsideError, Roots
from capture.service import BusyStoreError, ClosingError, Service, UnknownTaskError
from capture.tasks import Task
from experiments.errors import ExperimentError

__all__ = ["create_app", "listen", "serve"]

LOG = logging.getLogger("capture")
LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"
HEARTBEAT = 15.0
"""Seconds without an event after which a comment is sent, so that nobody between takes the line for dead."""

LONGEST_END = 4.5
"""Seconds after a signal until the process leaves, whatever still hangs: the next start finds all in order."""

LEAST_PAUSE = 0.1
"""Seconds between two events of one task."""

_STATUS: tuple[tuple[type[Exception], int], ...] = (
    (OutsideError, 403),
    (NotThereError, 404),
    (UnknownTaskError, 404),
    (NoModelError, 400),
    (BusyStoreError, 409),
    (BusyModelError, 409),
    (ClosingError, 503),
    (EndedError, 503),
    (CancelledRequest, 503),
    (RequestError, 422),
    (ExperimentError, 422),
)
TaskId = Annotated[str, InPath(pattern=r"^[0-9a-f]{8}$", description="As POST /capture gave it.")]


def create_app(service: Service, *, token: str | None = None, host: str = "127.0.0.1") -> FastAPI:
    """Make the application.

    Parameters
    ----------
    service : Service
    token : str, optional
        Every request must bear it where it is given.
    host : str
        The address listened on: on the loopback, requests must name this machine, which no other site's page does.
    """
    app = FastAPI(
        title="capture",
        summary="Activations of rollouts into stores, over one model",
        responses={code: {"model": Problem} for code in (400, 401, 403, 413, 422, 500)},
    )
    app.add_middleware(Guard, token=token, loopback=host in LOOPBACK)
    app.add_exception_handler(RequestValidationError, _invalid)
    for kind in (CaptureError, ExperimentError):
        app.add_exception_handler(kind, _refused)
    app.add_exception_handler(Exception, _bug)
    _add_tasks(app, service)
    _add_following(app, service)
    _add_model(app, service)
    return app


# --- what is answered ----------------------------------------------------------------------------------------------


def _add_tasks(app: FastAPI, service: Service) -> None:
    def status(task: Task) -> TaskStatus:
        return task.status(ahead=service.ahead(task))

    @app.get("/health")
    async def health() -> Health:
        """Say whether the model is loaded; answers at once whatever the model does."""
        model = service.model
        return Health(model=model.name, loaded=model.state == "loaded", active_evals=len(service.waiting))

    @app.post("/capture", responses=_problems(404, 409, 503))
    async def capture(order: CaptureOrder) -> Started:
        """Capture rollouts of an experiment tree; the same request goes on where an earlier one was cut off."""
        task = await service.submit(order)
        return Started(
            task_id=task.id,
            status="starting",
            prompt_set=order.prompt_set,
            layers=order.layers,
            n_prompt_ids="all" if order.ids is None else len(order.ids),
            store=task.store,
            ahead=service.ahead(task),
        )

    @app.get("/eval/status/{task_id}", responses=_problems(404))
    async def task_status(task_id: TaskId) -> TaskStatus:
        """Say how far a capture is."""
        return status(service.task(task_id))

    @app.get("/tasks")
    async def tasks() -> TaskList:
        """List captures, newest first."""
        return TaskList(tasks=[status(task) for task in service.tasks()])


def _add_following(app: FastAPI, service: Service) -> None:
    @app.post("/tasks/{task_id}/cancel", responses=_problems(404))
    async def cancel(task_id: TaskId) -> TaskStatus:
        """Cancel a capture; what it has finished is kept, and it stops at the next module of the model."""
        task = await service.cancel(task_id)
        return task.status(ahead=service.ahead(task))

    @app.get(
        "/tasks/{task_id}/events",
        response_class=StreamingResponse,
        responses={200: {"content": {"text/event-stream": {}}, "description": "Events"}, **_problems(404)},
    )
    async def events(task_id: TaskId) -> StreamingResponse:
        """Send the status at every change, as server-sent events, until the capture has ended."""
        return StreamingResponse(_events(service, service.task(task_id)), media_type="text/event-stream")


def _add_model(app: FastAPI, service: Service) -> None:
    @app.post("/model/load", responses=_problems(409, 503))
    async def load_model(
        model_name: Annotated[str, Query(min_length=1, max_length=1024, pattern=r"^[^\x00-\x1f]+$")],
        load_in_8bit: bool = False,
        load_in_4bit: bool = False,
    ) -> ModelAnswer:
        """Load another model in the place of this one, and answer once it is there."""
        if load_in_8bit and load_in_4bit:
            raise RequestError("load_in_8bit and load_in_4bit are both true; choose one")
        quantize = "8bit" if load_in_8bit else "4bit" if load_in_4bit else None
        fresh = await service.load_model(model_name, quantize=quantize)
        return ModelAnswer(status="loaded" if fresh else "already_loaded", model=service.model.setup.model)

    @app.post("/model/save", responses=_problems(409, 503))
    async def save_model() -> SaveAnswer:
        """Write the model's fast-load cache."""
        service.refuse_if_closing()
        return SaveAnswer.model_validate(await service.model.ask("save"))

    @app.post("/generate", responses=_problems(409, 503))
    async def generate(order: GenerateOrder) -> Generated:
        """Continue prompts by plain sampling."""
        service.refuse_if_closing()
        return Generated.model_validate(await service.model.ask("generate", **order.model_dump()))


async def _events(service: Service, task: Task) -> AsyncIterator[str]:
    while True:
        changed = task.changed
        yield f"event: status\ndata: {task.status(ahead=service.ahead(task)).model_dump_json()}\n\n"
        if task.over or service.closing:
            return
        while not changed.is_set():
            try:
                await asyncio.wait_for(changed.wait(), HEARTBEAT)
            except TimeoutError:
                yield ": still here\n\n"
        await asyncio.sleep(LEAST_PAUSE)


# --- what is refused -----------------------------------------------------------------------------------------------


def _problems(*codes: int) -> dict[int | str, dict[str, Any]]:
    return {code: {"model": Problem} for code in codes}


async def _refused(_: Request, error: Exception) -> JSONResponse:
    if isinstance(error, FailedRequest):
        code = 422 if error.refused else 500
    else:
        code = next((code for kind, code in _STATUS if isinstance(error, kind)), 500)
    return problem(code, str(error), task_id=getattr(error, "task_id", None))


async def _invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first, *others = error.errors()
    place = ".".join(str(step) for step in first["loc"][1:] if isinstance(step, str) and step.isidentifier())
    said = first["ctx"].get("error", "") if first["type"] == "json_invalid" else first["msg"]
    text = (
        f"the request is not JSON: {said}" if first["type"] == "json_invalid" else f"{place or 'the request'}: {said}"
    )
    more = f" (and {len(others)} more)" if others else ""
    return problem(422, f"{text}{more}; /docs shows what is taken")


async def _bug(_: Request, error: Exception) -> JSONResponse:
    return problem(500, f"{type(error).__name__}: {error} (a bug; the server's log has more)")


# --- its life ------------------------------------------------------------------------------------------------------


def listen(host: str, port: int) -> socket.socket:
    """Take the port, before anything is loaded.

    Raises
    ------
    CaptureError
        It is taken, or the address is not one of this machine.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
        family, kind, protocol, _, address = found[0]
        with contextlib.ExitStack() as closing:
            # asyncio sends small answers at once only on a socket that names its protocol.
            sock = closing.enter_context(socket.socket(family, kind, protocol))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen(128)
            closing.pop_all()
            return sock
    except OSError as error:
        raise CaptureError(
            f"port {port} of {host} can't be used ({error.strerror or error}); is a server running there already? "
            "stop it, or give another --port"
        ) from error


def serve(sock: socket.socket, setup: Setup, *, roots: Roots, tasks: Path, token: str | None, host: str) -> None:
    """Serve until SIGTERM or Ctrl-C; then stop what runs, within seconds.

    Raises
    ------
    CaptureError
        The model can't be loaded, or the file of the tasks not be used.
    """
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    with sock:
        lost = asyncio.run(
            _serve(sock, setup, roots=roots, tasks=tasks, app_of=lambda s: create_app(s, token=token, host=host))
        )
    if lost is not None:
        LOG.error("no model: %s", lost)
        raise CaptureError(f"the server ended, for its model could not be loaded: {lost}")


async def _serve(
    sock: socket.socket, setup: Setup, *, roots: Roots, tasks: Path, app_of: Callable[[Service], FastAPI]
) -> str | None:
    service = Service(ModelHolder(setup), roots=roots, tasks=tasks)
    config = uvicorn.Config(
        app_of(service), log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1
    )
    server, stopped = _Server(config), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    await service.start()
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    host, port = sock.getsockname()[:2]
    LOG.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
    first: Awaitable[Any] = asyncio.wait(
        [asyncio.create_task(stopped.wait()), service.model.lost, serving], return_when=asyncio.FIRST_COMPLETED
    )
    await first
    LOG.info("ending")
    if stopped.is_set():
        _leave_in_time(service.model)
    await service.stop()
    server.should_exit = True
    await serving
    return service.model.lost.result() if service.model.lost.done() else None


def _leave_in_time(model: ModelHolder) -> None:
    """End in order or not, but end: what hangs, on a starved machine or a dead disk, is not waited for."""

    def leave() -> None:
        model.kill()
        os._exit(0)

    timer = threading.Timer(LONGEST_END, leave)
    timer.daemon = True
    timer.start()


class _Server(uvicorn.Server):
    """Leaves the signals to us: what runs is stopped before connections are closed."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
