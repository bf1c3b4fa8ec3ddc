"""Many readers at once of a store that grows meanwhile: each answer is right, or one sentence that says why not."""

from __future__ import annotations

import io
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import numpy as np

import datastore
import project
from datastore.dtype import upcast
from datastore.labels import add_labels
from tests.datastore import making
from tests.view import served
from tests.view.served import BY_ID, ROLLOUTS, Server, directions, exact, given
from view.formats import NPY

READERS, ROUNDS = 8, 6


def test_many_readers_of_a_store_that_grows(tmp_path: Path) -> None:
    path = served.store_of(tmp_path / "run.zarr", ROLLOUTS[:2], layers=(1,)).path
    project.scores(datastore.open(path), directions()[:1])
    together = threading.Barrier(READERS + 1)

    def read(number: int) -> int:
        together.wait()
        return sum(_round(server, (number + i) % 4) for i in range(ROUNDS))

    with served.running([path]) as server, ThreadPoolExecutor(READERS) as pool:
        readers = [pool.submit(read, number) for number in range(READERS)]
        together.wait()
        making.capture(path, ROLLOUTS[2:], (1,))
        add_labels(path, {name: {"verdict": "guilty"} for name in BY_ID})
        making.capture(path, ROLLOUTS, (5,))
        assert sum(reader.result() for reader in readers) >= READERS * ROUNDS
        assert server.get("/rollouts", where="verdict == 'guilty'").json["total"] == 4
        for name in BY_ID:
            assert server.get(f"/rollouts/{quote(name)}").json["captured"]["residual"] == [1, 5]


def _round(server: Server, kind: int) -> int:
    """Ask a few things that hold at any time; return how many were answered."""
    answered = 0
    if kind == 0:
        found = server.get("/stores").json["stores"][0]
        assert found["n_rollouts"] in (2, 4)
        assert found["n_tokens"] == sum(len(one.token_ids) for one in ROLLOUTS[: found["n_rollouts"]])
        return 1
    for name in list(BY_ID)[:4]:
        if kind == 1:
            answer = server.get("/slice", headers={"Accept": NPY}, rollout=name, layers="1")
            if answer.status == 200:
                rows = np.load(io.BytesIO(answer.body))[:, 0]
                np.testing.assert_array_equal(rows, upcast(given(name, 1)))
        elif kind == 2:
            answer = server.get(f"/rollouts/{quote(name)}/tokens")
            if answer.status == 200:
                ids = [one["token_id"] for one in answer.json["tokens"]]
                assert ids == BY_ID[name].token_ids.tolist()
        else:
            answer = server.get("/scores", rollout=name, trait="lying")
            if answer.status == 200:
                (values,) = answer.json["rollouts"][0]["values"]
                np.testing.assert_allclose(values, exact(name, directions()[0]), rtol=1e-4, atol=1e-5)
        assert answer.status in (200, 404), answer.body
        assert name not in ("twin-a", "twin-b") or answer.status == 200, "these were there from the beginning"
        answered += answer.status == 200
    return answered
