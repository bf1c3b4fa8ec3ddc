"""A store made from known numbers, and a real server process over it, for the tests of the query API.

What the tests compare with is made here from `tests.datastore.making`, without a line of the code under test.
"""

from __future__ import annotations

import http.client
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode, urlsplit

import numpy as np
import uvicorn
from numpy.typing import NDArray

import calibrate
import datastore
import project
from datastore.schema import Annotation, Rollout
from experiments.direction import Direction
from tests import house
from tests.datastore import making
from view.api import create_app

__all__ = [
    "LAYERS",
    "ROLLOUTS",
    "TRAITS",
    "Answer",
    "Server",
    "directions",
    "exact",
    "given",
    "inside",
    "process",
    "running",
    "scored_store",
    "store_of",
]

LAYERS = (1, 5, 9)
TRAITS = ("bs/lying", "mood/calm")
WIDTH = making.RESIDUAL.width
SHARED = 12
"""Tokens with which `twin-a` and `twin-b` both begin."""


def _rollout(name: str, n_tokens: int, *, lying: bool, start: str | None = None, **known: Any) -> Rollout:
    ids = making.rollout(name, n_tokens).token_ids.copy()
    if start is not None:
        ids[:SHARED] = making.rollout(start, 64).token_ids[:SHARED]
        ids[SHARED] = (len(name) + ord(name[-1])) % 50
    half = n_tokens // 2
    return Rollout(
        rollout_id=name,
        token_ids=ids,
        prompt_end=half,
        role=np.where(np.arange(n_tokens) < half, 2, 3).astype(np.int8),
        turn=(np.arange(n_tokens) >= half).astype(np.int32),
        labels={"lying": lying, "reward": n_tokens / 4, "name of it": name},
        annotations=(Annotation(token_start=half, token_end=half + 2, label="claim"),),
        tags=("audit", "long") if n_tokens > 20 else ("audit",),
        **known,
    )


ROLLOUTS = [
    _rollout("twin-a", 19, lying=False, start="twin", prompt_set="games"),
    _rollout("twin-b", 22, lying=True, start="twin", prompt_set="games"),
    _rollout("alone", 37, lying=True, prompt_set="audits"),
    _rollout("run/4 ü", 8, lying=False, prompt_set="audits"),
]
BY_ID = {one.rollout_id: one for one in ROLLOUTS}


def given(rollout_id: str, layer: int, component: str = "residual") -> NDArray[Any]:
    """The rows that were put into the store."""
    spec = next(spec for spec in making.BOTH if spec.name == component)
    return making.values(spec, layer, BY_ID[rollout_id])


def directions() -> list[Direction]:
    """Two traits at two layers, of random numbers."""
    return [
        Direction(
            trait=trait,
            layer=layer,
            values=np.random.default_rng([i, layer]).standard_normal(WIDTH).astype(np.float32),
            method="probe",
            position="response[:5]",
            baseline=0.25,
        )
        for i, trait in enumerate(TRAITS)
        for layer in (1, 5)
    ]


def exact(rollout_id: str, direction: Direction) -> NDArray[np.float64]:
    """The scores of a rollout in float64."""
    vector = np.asarray(direction.values, np.float64)
    found: NDArray[np.float64] = given(rollout_id, direction.layer).astype(np.float64) @ (
        vector / np.linalg.norm(vector)
    )
    return found


def store_of(path: Path, rollouts: Sequence[Rollout] = ROLLOUTS, **options: Any) -> datastore.Store:
    """Capture rollouts into a store of one capture."""
    making.capture(path, rollouts, options.pop("layers", LAYERS), **options)
    return datastore.open(path)


def scored_store(path: Path) -> datastore.Store:
    """The store with a calibration and scores."""
    store = store_of(path)
    calibrate.save(calibrate.fit(store))
    project.scores(store, directions())
    return datastore.open(path)


class Answer(NamedTuple):
    """What a server said."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON, in which only what JSON knows may stand."""
        return json.loads(self.body, parse_constant=_no_constant)

    @property
    def detail(self) -> str:
        """The sentence of a refusal."""
        found = self.json["detail"]
        assert isinstance(found, str)
        return found


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


class Server(NamedTuple):
    """A server process that answers."""

    host: str
    port: int
    base: str = ""

    @property
    def url(self) -> str:
        """Its address, without a slash at the end."""
        return f"http://{self.host}:{self.port}{self.base}"

    def get(self, path: str, *, method: str = "GET", headers: Mapping[str, str] | None = None, **query: Any) -> Answer:
        """Send a request, its path as it stands, with the query's parameters; lists repeat theirs."""
        line = self.base + path + ("?" + urlencode(query, doseq=True) if query else "")
        connection = http.client.HTTPConnection(self.host, self.port, timeout=180)
        try:
            connection.putrequest(method, line, skip_host="Host" in (headers or {}))
            for name, value in (headers or {}).items():
                connection.putheader(name, value)
            connection.endheaders()
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()


@contextmanager
def process(*words: object, **environment: str) -> Iterator[Server]:
    """Run `python -m view api` with these words and a free port, and end it."""
    command = [sys.executable, "-m", "view", "api", *map(str, words), "--port", "0"]
    env = {**os.environ, **environment, "PYTHONPATH": str(house.ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, text=True) as started:
        assert started.stdout is not None
        assert started.stderr is not None
        try:
            line = started.stdout.readline()
            if not line.startswith("serving "):
                raise AssertionError(f"the server said {line!r} and {started.stderr.read()}")
            address = urlsplit(line.split()[1])
            yield Server(str(address.hostname), int(address.port or 0), address.path.removesuffix("/"))
        finally:
            started.terminate()
            said = started.stderr.read()
        assert "Traceback" not in said, said


@contextmanager
def running(paths: Sequence[Path], **settings: Any) -> Iterator[Server]:
    """Run `create_app` with settings that the command has not, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    started = context.Process(target=_run, args=(list(paths), settings, theirs))
    started.start()
    try:
        assert ours.poll(180), "the server did not start"
        yield Server("127.0.0.1", ours.recv())
    finally:
        started.terminate()
        started.join()


@contextmanager
def inside(paths: Sequence[Path], **settings: Any) -> Iterator[Server]:
    """Run `create_app` with settings in a thread of this process."""
    bound = socket.create_server(("127.0.0.1", 0))
    app = create_app([datastore.open(path) for path in paths], **settings)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    try:
        yield Server("127.0.0.1", bound.getsockname()[1])
    finally:
        server.should_exit = server.force_exit = True
        thread.join()


def _run(paths: list[Path], settings: dict[str, Any], ready: Connection) -> None:
    bound = socket.create_server(("127.0.0.1", 0))
    app = create_app([datastore.open(path) for path in paths], **settings)
    ready.send(bound.getsockname()[1])
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[bound])
