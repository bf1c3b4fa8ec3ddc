"""Who may ask a server: requests that bear the token, and none that a web page of elsewhere sent."""

import hmac

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from capture.messages import Problem

__all__ = ["LOOPBACK", "MAX_BODY", "Guard", "problem"]

MAX_BODY = 1 << 20
"""Bytes of a request."""

_TOO_LONG = f"the request is longer than the {MAX_BODY:,} bytes that are taken"

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def problem(
    code: int, detail: str, *, task_id: str | None = None, headers: dict[str, str] | None = None
) -> JSONResponse:
    """Make an answer that is no success."""
    return JSONResponse(Problem(detail=detail, task_id=task_id).model_dump(), code, headers)


class Guard:
    """Lets a request in: it bears the token, where there is one, and comes from no web page of elsewhere.

    Parameters
    ----------
    app : ASGIApp
    token : str or None
    loopback : bool
        The server is for this machine alone: requests must name it so, which no other site's page does.
    """

    def __init__(self, app: ASGIApp, *, token: str | None, loopback: bool) -> None:
        self._app, self._token, self._loopback = app, token, loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer for the application where the request may not come in."""
        refusal = self._refusal(Headers(scope=scope)) if scope["type"] == "http" else None
        if refusal is not None:
            await _drain(receive)
        await (refusal or self._app)(scope, _bounded(receive), send)

    def _refusal(self, headers: Headers) -> JSONResponse | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._loopback and _name(host) not in LOOPBACK:
            return problem(403, f"this server is for this machine alone, not for {host[:100]!r}")
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > MAX_BODY:
            return problem(413, _TOO_LONG)
        if origin is not None and origin.partition("://")[2] != host:
            return problem(403, f"pages of {origin[:100]!r} may not use this server")
        if self._token is not None and not self._bears(headers.get("authorization", "")):
            return problem(
                401,
                "the request bears no valid token; send the header 'Authorization: Bearer TOKEN'",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return None

    def _bears(self, authorization: str) -> bool:
        kind, _, given = authorization.partition(" ")
        wanted = (self._token or "").encode()
        return kind.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), wanted)


def _bounded(receive: Receive) -> Receive:
    """Count what comes, for a request need not say how long it is."""
    taken = 0

    async def bounded() -> Message:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        if taken > MAX_BODY:
            raise HTTPException(413, _TOO_LONG)
        return message

    return bounded


async def _drain(receive: Receive) -> None:
    """Take in what is still being sent, within bounds: a client that writes hears no answer."""
    left = 16 * MAX_BODY
    while left > 0:
        message = await receive()
        if message["type"] != "http.request" or not message.get("more_body"):
            return
        left -= len(message["body"])


def _name(host: str) -> str:
    """A host header without its port."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
