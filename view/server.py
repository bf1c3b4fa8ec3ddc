"""One server for the page and the query API: Panel's page as routes of the FastAPI application that holds /api."""

import errno
import hmac
import ipaddress
import socket
import sys
import webbrowser
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from http.cookies import SimpleCookie
from typing import Any
from urllib.parse import parse_qs

from fastapi import FastAPI, Response
from starlette.middleware.trustedhost import TrustedHostMiddleware

from datastore.errors import DatastoreError, MisuseError
from datastore.query import Store

__all__ = ["build", "serve"]

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
COOKIE = "ads-view-token"
UNSEEN_MS = 180_000
"""For so long a page waits for its browser, which fetches megabytes of scripts first, or for one that went away.

Bokeh's 15 s are too short for a slow line: who came later got an empty page.
"""
SILENT_S = 120.0
"""A browser that does not answer for so long has gone; a busy machine is silent for longer than uvicorn's 20 s."""


def build(stores: Sequence[Store], *, page: bool = True) -> FastAPI:
    """Return the application: the page at /, the query API at /api, the stores' own files at /zarr. `serve` guards it.

    Parameters
    ----------
    stores : sequence of Store
        Nothing outside of them is served.
    page : bool
        Serve the page too.
    """
    from view.api import create_app
    from view.zarr_http import zarr_app

    app = FastAPI(title="activation-datastore", docs_url=None, redoc_url=None, openapi_url=None)
    app.mount("/api", create_app(stores))
    app.mount("/zarr", zarr_app(stores))
    if page:
        import panel
        from panel.io.fastapi import add_applications

        from view.model import Models
        from view.page import document

        models = Models(stores)
        panel.extension("tabulator")
        app.add_api_route("/favicon.ico", lambda: Response(status_code=204), include_in_schema=False)
        waiting: dict[str, Any] = {"unused_session_lifetime_milliseconds": UNSEEN_MS}
        add_applications({"/": lambda: document(models)}, app=app, title="Activations", **waiting)
    return app


def serve(
    stores: Sequence[Store],
    *,
    host: str = "127.0.0.1",
    port: int = 5006,
    token: str | None = None,
    page: bool = True,
    open_browser: bool = False,
) -> None:
    """Serve until Ctrl-C.

    Raises
    ------
    MisuseError
        The address is not this machine's alone and no token is given.
    DatastoreError
        The port is taken.
    """
    import uvicorn

    here = _loopback(host)
    if not here and not token:
        raise MisuseError(
            f"{host} can be reached from other machines, so whoever finds it could read the stores; give --token WORD, "
            "or leave --host out"
        )
    bound = _bind(host, port)
    app: Any = build(stores, page=page)
    if here:  # a page elsewhere must not reach this one under a name of its own
        app = TrustedHostMiddleware(app, allowed_hosts=["127.0.0.1", "localhost", "[::1]", "::1", "testserver"])
    if token:
        app = _Guard(app, token)
    url = f"http://{'127.0.0.1' if here else host}:{bound.getsockname()[1]}/{'' if page else 'api/'}"
    print(f"serving {url}  (Ctrl-C stops)", flush=True)
    if open_browser:
        webbrowser.open(url)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1, ws_ping_timeout=SILENT_S)
    uvicorn.Server(config).run(sockets=[bound])


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol by its number: of sockets without one asyncio leaves Nagle's algorithm on, 40 ms an answer.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    if sys.platform != "win32":
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        bound.listen(128)
    except OSError as error:
        bound.close()
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            taken = "is taken by another program" if error.errno == errno.EADDRINUSE else "needs special rights"
            raise DatastoreError(f"port {port} {taken}, so nothing is served; give another one with --port") from None
        raise DatastoreError(f"{host}:{port} can't be listened on ({error.strerror}); give another --host") from None
    return bound


class _Guard:
    """Lets through who shows the token: in the query once, which a cookie remembers, or in a header."""

    def __init__(self, app: Any, token: str) -> None:
        self._app, self._token = app, token.encode()

    async def __call__(self, scope: Scope, receive: Any, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        asked = parse_qs(scope["query_string"].decode("latin-1")).get("token", [])
        if not any(map(self._right, [*asked, *self._carried(scope)])):
            await self._refuse(scope, receive, send)
            return

        async def remembering(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start" and asked:
                cookie = f"{COOKIE}={asked[0]}; HttpOnly; SameSite=Strict; Path=/"
                message["headers"] = [*message["headers"], (b"set-cookie", cookie.encode("latin-1"))]
            await send(message)

        await self._app(scope, receive, remembering)

    def _right(self, word: str) -> bool:
        return hmac.compare_digest(word.encode(), self._token)

    def _carried(self, scope: Scope) -> list[str]:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        scheme, _, word = headers.get("authorization", "").partition(" ")
        return ([] if cookie is None else [cookie.value]) + [word] * (scheme.lower() == "bearer")

    async def _refuse(self, scope: Scope, receive: Any, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        answer = Response("this server wants a token: add ?token=WORD to the address\n", 401, media_type="text/plain")
        await answer(scope, receive, send)
