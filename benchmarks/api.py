"""`python -m benchmarks.api`: a store over HTTP against the same read locally, both warm, on the same machine.

A rollout of 14,000 tokens and three short ones, width 2048, two layers, scored along 22 directions. The server is a
process of its own, `python -m view api`; the client is one connection, kept open.
"""

import argparse
import http.client
import io
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import xarray as xr

import datastore
import project
from benchmarks.measure import Row, alternate, show
from datastore.schema import ComponentSpec, Rollout
from experiments.direction import Direction
from tests.synthetic import activations

WIDTH, LAYERS, TRAITS = 2048, (10, 20), 11
COUNTS = {"long": 14_000, "a": 600, "b": 700, "c": 700}
NPY, ARROW, JSON = "application/x-npy", "application/vnd.apache.arrow.stream", "application/json"


def build(path: Path) -> datastore.Store:
    """Capture and score the rollouts."""
    rollouts = [
        Rollout(rollout_id=name, token_ids=np.arange(n, dtype=np.int32) % 50, prompt_end=n // 2)
        for name, n in COUNTS.items()
    ]
    spec = ComponentSpec(name="residual", width=WIDTH, dtype="bfloat16")
    vocab = {i: f"word{i} ".encode() for i in range(50)}
    (plan,) = datastore.plan(path, rollouts, layers=LAYERS, components=[spec], vocab=vocab)
    with datastore.create(path, plan) as writer:
        for one in plan.rollouts:
            for layer in plan.layers:
                rows = activations(one.n_tokens, WIDTH, seed=layer + len(one.rollout_id))
                writer.put("residual", layer, one.rollout_id, rows)
        writer.commit()
    random = np.random.default_rng(0)
    vectors = random.standard_normal((TRAITS, len(LAYERS), WIDTH)).astype(np.float32)
    directions = [
        Direction(trait=f"set/trait{i}", layer=layer, values=vectors[i, j], method="probe", position="response[:5]")
        for i in range(TRAITS)
        for j, layer in enumerate(LAYERS)
    ]
    project.scores(datastore.open(path), directions)
    return datastore.open(path)


@contextmanager
def served(path: Path) -> Iterator[str]:
    """Serve the store; yield host and port."""
    command = [sys.executable, "-m", "view", "api", str(path), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        found = re.search(r"http://([^/]+)", server.stdout.readline())
        if found is None:
            raise RuntimeError("the server did not start")
        try:
            yield found[1]
        finally:
            server.terminate()


class Client:
    """One connection that is kept open."""

    def __init__(self, address: str) -> None:
        self._connection = http.client.HTTPConnection(address)

    def get(self, path: str, accept: str = JSON, **query: object) -> bytes:
        """Return the body of an answer, which must be a good one."""
        self._connection.request("GET", f"{path}?{urlencode(query, doseq=True)}", headers={"Accept": accept})
        answer = self._connection.getresponse()
        body = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{path} answered {answer.status}: {body[:200]!r}")
        return body


Pairs = dict[str, tuple[Callable[[], object], Callable[[], object]]]
"""Over HTTP, and locally."""


def activations_of(client: Client, store: Path) -> Pairs:
    """Return the questions on activations."""

    def remote(accept: str = NPY, **query: Any) -> object:
        body = client.get("/api/slice", accept, rollout="long", layers=10, **query)
        return np.load(io.BytesIO(body)) if accept == NPY else body

    def local(**query: Any) -> object:
        return datastore.open(store).select("residual", rollouts="long", layers=10, **query).values

    return {
        "10 tokens x 64 dims, JSON": (
            lambda: remote(JSON, start=5000, stop=5010, dims="0-63"),
            lambda: local(positions=slice(5000, 5010)),
        ),
        "2,000 tokens, npy": (lambda: remote(stop=2000), lambda: local(positions=slice(0, 2000))),
        "14,000 tokens, npy": (remote, local),
        "14,000 tokens, stored bits": (lambda: remote(raw="true"), lambda: local(raw=True)),
    }


def others(client: Client, store: Path, url: str) -> Pairs:
    """Return the questions on tables and scores, and the store's own files."""
    chunk = "captures/0001/residual/c/0/0/0"

    def scores() -> object:
        return datastore.open(store).scores(rollouts="long").score.values

    return {
        "scores of 14,000 tokens x 22, JSON": (lambda: client.get("/api/scores", rollout="long"), scores),
        "the same, Arrow": (lambda: client.get("/api/scores", ARROW, rollout="long"), scores),
        "stores": (lambda: client.get("/api/stores"), lambda: datastore.open(store).rollouts),
        "a chunk's bytes": (lambda: client.get(f"/zarr/{store.stem}/{chunk}"), (store / chunk).read_bytes),
        "xr.open_zarr and a layer": (
            lambda: xr.open_zarr(f"{url}/captures/0001").residual[:, 0].values,
            lambda: xr.open_zarr(store / "captures/0001").residual[:, 0].values,
        ),
    }


def measure(store: Path, address: str, *, rounds: int) -> list[Row]:
    """Time each question over HTTP beside the same read locally."""
    client = Client(address)
    rows = []
    pairs = activations_of(client, store) | others(client, store, f"http://{address}/zarr/{store.stem}")
    for what, (remote, here) in pairs.items():
        times = alternate({"http": remote, "here": here}, rounds=rounds)
        rows.append(
            Row(
                what=what,
                value=times["http"] * 1e3,
                unit="ms",
                rival="the same locally",
                rival_value=times["here"] * 1e3,
                ratio=times["http"] / times["here"],
            )
        )
    return rows


def main() -> None:
    """Build, serve, measure, show."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        store = build(Path(directory) / "run.zarr")
        with served(store.path) as address:
            rows = measure(store.path, address, rounds=asked.rounds)
    show("A store over HTTP", rows, as_json=asked.json)


if __name__ == "__main__":
    main()
