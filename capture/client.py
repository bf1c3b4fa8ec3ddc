"""A client of the capture server: typed, plain HTTP, and nothing is loaded by making one.

>>> from capture.client import Client
>>> client = Client()                                                                          # doctest: +SKIP
>>> task = client.capture("mats-mental-state-circuits", "secret_number_audit", layers="10,15")  # doctest: +SKIP
>>> client.wait(task.task_id).progress                                                         # doctest: +SKIP
"""

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from typing import Any, TypeVar
from urllib.parse import quote, urlencode, urlsplit

from pydantic import BaseModel, ValidationError

from capture.errors import CaptureError
from capture.messages import (
    ENDED,
    CaptureOrder,
    Generated,
    Health,
    ModelAnswer,
    SaveAnswer,
    Started,
    TaskList,
    TaskStatus,
)

__all__ = ["Client", "NoServerError", "ServerError"]

M = TypeVar("M", bound=BaseModel)
DEFAULT_URL = "http://127.0.0.1:8765"


class ServerError(CaptureError):
    """The server refused or failed; the text is its own sentence.

    Attributes
    ----------
    status : int
        Of HTTP.
    task_id : str or None
        The task that stands in the way, where one does.
    """

    def __init__(self, text: str, *, status: int, task_id: str | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.task_id = task_id
        self.exit_code = 2 if status in (404, 422) else 1


class NoServerError(CaptureError):
    """Nobody answers at the address, or somebody else does."""


class Client:
    """Talks to a server.

    Parameters
    ----------
    url : str, optional
        Default the environment's `ADS_CAPTURE_URL`, else http://127.0.0.1:8765.
    token : str, optional
        Default the environment's `ADS_CAPTURE_TOKEN`.
    timeout : float
        Seconds to wait for an answer; loading and generating wait as long as it takes.

    Raises
    ------
    CaptureError
        The address is not one of HTTP.
    """

    def __init__(self, url: str | None = None, *, token: str | None = None, timeout: float = 30.0) -> None:
        self.url = (url or os.environ.get("ADS_CAPTURE_URL") or DEFAULT_URL).rstrip("/")
        self._token = token or os.environ.get("ADS_CAPTURE_TOKEN")
        self._timeout = timeout
        # A server on this machine is not reached through a proxy.
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
        if urlsplit(self.url).scheme not in ("http", "https") or not urlsplit(self.url).hostname:
            raise CaptureError(f"{self.url!r} is not an address of a server; write it like {DEFAULT_URL}")

    def health(self) -> Health:
        """Return the server's model, and whether it is loaded."""
        return self._ask(Health, "GET", "/health")

    def capture(
        self,
        experiment: str,
        prompt_set: str,
        *,
        model_variant: str | None = None,
        layers: str | None = None,
        components: str = "residual",
        prompt_ids: Sequence[str] | None = None,
        **options: Any,
    ) -> Started:
        """Submit a capture and return at once.

        Parameters
        ----------
        experiment, prompt_set, model_variant, layers, components, prompt_ids, **options
            The fields of `CaptureOrder`.

        Raises
        ------
        ServerError
            The server refuses; 409 where the same store is being captured into.
        NoServerError
        """
        try:
            order = CaptureOrder(
                experiment=experiment,
                prompt_set=prompt_set,
                model_variant=model_variant,
                layers=layers,
                components=components,
                prompt_ids=None if prompt_ids is None else list(prompt_ids),
                **options,
            )
        except ValidationError as error:
            first = error.errors()[0]
            raise ServerError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}", status=422) from None
        return self.submit(order)

    def submit(self, order: CaptureOrder) -> Started:
        """Submit a capture and return at once; errors as `capture`."""
        return self._ask(Started, "POST", "/capture", body=order.model_dump(exclude_none=True))

    def status(self, task_id: str) -> TaskStatus:
        """Return how far a capture is."""
        return self._ask(TaskStatus, "GET", f"/eval/status/{quote(task_id, safe='')}")

    def tasks(self) -> list[TaskStatus]:
        """Return all captures, newest first."""
        return self._ask(TaskList, "GET", "/tasks").tasks

    def cancel(self, task_id: str) -> TaskStatus:
        """Cancel a capture; what it has finished is kept."""
        return self._ask(TaskStatus, "POST", f"/tasks/{quote(task_id, safe='')}/cancel")

    def events(self, task_id: str) -> Iterator[TaskStatus]:
        """Yield a capture's status at every change, until it has ended.

        Raises
        ------
        NoServerError
            The server ended before the capture did.
        """
        with self._request("GET", f"/tasks/{quote(task_id, safe='')}/events", timeout=60.0) as answer:
            status = None
            for line in answer:
                if line.startswith(b"data: "):
                    status = TaskStatus.model_validate_json(line.removeprefix(b"data: "))
                    yield status
        if status is None or status.status not in ENDED:
            raise NoServerError(
                f"the server at {self.url} stopped before task {task_id} had ended; when it runs again, submit the "
                "same capture to go on"
            )

    def wait(self, task_id: str) -> TaskStatus:
        """Wait until a capture has ended, and return its last status."""
        *_, last = self.events(task_id)
        return last

    def wait_until_loaded(self, *, seconds: float = 3600.0) -> Health:
        """Wait until the model is loaded.

        Raises
        ------
        NoServerError
            Nobody answers, or the time is over.
        """
        end = time.monotonic() + seconds
        while not (health := self.health()).loaded:
            if time.monotonic() > end:
                raise NoServerError(f"the server at {self.url} has not loaded {health.model} within {seconds:.0f} s")
            time.sleep(0.5)
        return health

    def generate(self, prompts: Sequence[str], *, max_new_tokens: int = 256, temperature: float = 0.0) -> list[str]:
        """Continue prompts by plain sampling."""
        body = {"prompts": list(prompts), "max_new_tokens": max_new_tokens, "temperature": temperature}
        return self._ask(Generated, "POST", "/generate", body=body, timeout=None).responses

    def load_model(self, name: str) -> ModelAnswer:
        """Load another model in the place of the server's, and wait for it."""
        return self._ask(ModelAnswer, "POST", f"/model/load?{urlencode({'model_name': name})}", timeout=None)

    def save_model(self) -> SaveAnswer:
        """Write the fast-load cache of the server's model."""
        return self._ask(SaveAnswer, "POST", "/model/save", timeout=None)

    # -- HTTP ------------------------------------------------------------------------------------------------------

    def _ask(self, kind: type[M], method: str, path: str, **how: Any) -> M:
        how.setdefault("timeout", self._timeout)
        with self._request(method, path, **how) as answer:
            raw = answer.read()
        try:
            return kind.model_validate_json(raw)
        except ValidationError as error:
            raise NoServerError(f"what answers at {self.url}{path} is no capture server") from error

    @contextmanager
    def _request(self, method: str, path: str, *, timeout: float | None, body: Any = None) -> Iterator[Any]:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data=data, headers=headers, method=method)
        try:
            with self._open(request, timeout=timeout) as answer:
                yield answer
        except urllib.error.HTTPError as error:
            with error:
                raise _server_error(error) from None
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise NoServerError(
                f"no answer from {self.url} ({reason}); start a server with python -m capture serve --model M, or name "
                "another with --url"
            ) from error


def _server_error(error: urllib.error.HTTPError) -> ServerError:
    try:
        said = json.loads(error.read())
        return ServerError(str(said["detail"]), status=error.code, task_id=said.get("task_id"))
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return ServerError(f"{error.url} answers {error.code} {error.reason}", status=error.code)
