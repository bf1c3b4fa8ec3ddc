"""The query API over HTTP: what a store holds, as JSON, npy or Arrow; and under /zarr the store itself.

Everything is read-only and of the given stores alone. `view.server` serves it; `create_app` is for a server of one's
own.
"""

import hmac
from collections.abc import Sequence

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from datastore.errors import AbsentError, ConflictError, CorruptError, DatastoreError, MisuseError, NotAStoreError
from datastore.query import Store
from experiments.errors import ExperimentError
from view import api_numbers, api_tables
from view.api_page import page
from view.asking import Limits, TooLargeError
from view.formats import NotAcceptableError
from view.inflight import Budget, BusyError, InFlight
from view.shelf import Shelf
from view.zarr_http import StoreFiles

__all__ = ["create_app"]

_STATUS: tuple[tuple[type[Exception], int], ...] = (
    (TooLargeError, 413),
    (NotAcceptableError, 406),
    (AbsentError, 404),
    (NotAStoreError, 404),  # it was one when it was opened
    (MisuseError, 422),
    (ConflictError, 409),
    (CorruptError, 500),
    (DatastoreError, 503),  # captures went away while they were read: ask again
    (ExperimentError, 422),
    (OSError, 500),
)


def create_app(
    stores: Sequence[Store], *, token: str | None = None, limits: Limits | None = None, budget: Budget | None = None
) -> FastAPI:
    """Return the query API of some stores; `/` documents it, without anything from elsewhere.

    Parameters
    ----------
    stores : sequence of Store
        Each is looked at anew for every request, so what is captured later is answered too. A store of results of
        another one here adds its scores to that one.
    token : str, optional
        What a request must show as `Authorization: Bearer TOKEN`. Without one, listen on this machine's own address
        alone, and let only requests to that name through, as `view.server` does.
    limits : Limits, optional
        How large one answer may be.
    budget : Budget, optional
        How much memory all answers may hold together.

    Raises
    ------
    MisuseError
        There are no stores.
    """
    shelf = Shelf.of(stores)
    app = FastAPI(title="activation-datastore", description=(__doc__ or ""), docs_url=None, redoc_url=None)
    app.state.shelf, app.state.limits = shelf, limits or Limits()
    app.include_router(api_tables.router)
    app.include_router(api_numbers.router)
    app.mount("/zarr", StoreFiles(shelf))
    app.add_exception_handler(RequestValidationError, _misread)
    for kind, _ in _STATUS:
        app.add_exception_handler(kind, _refused)
    app.state.budget = budget or Budget()
    app.add_middleware(InFlight, budget=app.state.budget)
    if token is not None:
        app.add_middleware(_Bearer, token=token)

    @app.get("/", include_in_schema=False)
    def documentation(request: Request) -> HTMLResponse:
        return HTMLResponse(page(app.openapi(), root=request.scope.get("root_path", "")))

    return app


async def _refused(request: Request, error: Exception) -> JSONResponse:
    """Answer with the error's own sentence; where the stores lie on this machine is nobody's business."""
    status = next(status for kind, status in _STATUS if isinstance(error, kind))
    text = str(error)
    if isinstance(error, OSError) and not isinstance(error, DatastoreError):
        why = error.strerror or type(error).__name__
        text = f"the store can't be read ({why}); look at it with python -m datastore verify"
    for one in request.app.state.shelf.served:
        for path in (one.path, one.beside):
            text = text if path is None else text.replace(str(path), one.name)
    headers = {"Retry-After": str(error.retry_after)} if isinstance(error, BusyError) else None
    return JSONResponse({"detail": text.replace("--where", "where")}, status, headers=headers)


async def _misread(request: Request, error: Exception) -> JSONResponse:
    """Answer a parameter of the wrong form with one sentence."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"][1:])
    return JSONResponse({"detail": f"parameter {name!r} is wrong: {first['msg']}"}, 422)


class _Bearer:
    """Lets through requests that show the token."""

    def __init__(self, app: ASGIApp, *, token: str) -> None:
        self._app, self._expected = app, f"bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._shown(scope):
            await self._app(scope, receive, send)
            return
        answer = JSONResponse(
            {"detail": "this server wants a token; send it as Authorization: Bearer TOKEN"},
            401,
            headers={"WWW-Authenticate": "Bearer"},
        )
        await answer(scope, receive, send)

    def _shown(self, scope: Scope) -> bool:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, space, word = given.partition(b" ")
        return hmac.compare_digest(scheme.lower() + space + word, self._expected)
