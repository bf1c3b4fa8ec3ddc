"""Large answers at once from a real server: together they stay within the budget, and who must wait is told so."""

import contextlib
import http.client
import io
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import uvicorn
from numpy.typing import NDArray

import datastore
from datastore.labels import add_labels
from datastore.schema import Rollout
from tests.view import stores
from tests.view.browser import until
from view.api import create_app
from view.asking import Limits
from view.formats import NPY
from view.inflight import Budget, BusyError

TOKENS = 200_000
SIZE = TOKENS * stores.WIDTH * 4
SLICE = "/slice?rollout=one"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> datastore.Store:
    """One rollout whose activations are more than a connection buffers."""
    one = Rollout(rollout_id="one", token_ids=np.zeros(TOKENS, np.int32), prompt_end=20)
    path = tmp_path_factory.mktemp("inflight") / "run.zarr"
    return stores.write(path, [one], lambda *_: rows(), vocab=stores.vocabulary(), layers=(1,))


def rows() -> NDArray[np.float32]:
    """What is stored."""
    return np.random.default_rng(0).standard_normal((TOKENS, stores.WIDTH)).astype(np.float32)


@contextlib.contextmanager
def serving(store: datastore.Store, budget: Budget, *, limits: Limits | None = None) -> Iterator[int]:
    """A server with this budget, on a port of its own."""
    bound = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app([store], budget=budget, limits=limits), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    try:
        yield bound.getsockname()[1]
    finally:
        server.should_exit = server.force_exit = True
        thread.join()


def asked(port: int, path: str = SLICE) -> http.client.HTTPConnection:
    """A request that is sent, and whose answer is not read yet."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=180)
    connection.request("GET", path, headers={"Accept": NPY})
    return connection


def answered(port: int, path: str = SLICE) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body."""
    with contextlib.closing(asked(port, path)) as connection:
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()


def test_readers_together_stay_within_the_budget(store: datastore.Store) -> None:
    budget = Budget(2 * SIZE, patience=60)
    with serving(store, budget) as port, ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: answered(port), range(8)))
        assert [status for status, *_ in found] == [200] * 8
        for *_, body in found:
            np.testing.assert_array_equal(np.load(io.BytesIO(body))[:, 0], rows())
        assert SIZE <= budget.peak <= 2 * SIZE
        assert until(lambda: budget.used, lambda used: used == 0) == 0


def test_who_finds_no_room_is_told_when_to_ask_again(store: datastore.Store) -> None:
    budget = Budget(SIZE + SIZE // 2, patience=0.2)
    with serving(store, budget) as port:
        slow = asked(port)
        head = slow.getresponse()
        assert head.status == 200  # and nobody reads on
        status, headers, body = answered(port)
        assert (status, int(headers["retry-after"])) == (503, 1)
        said = json.loads(body)["detail"]
        assert said.startswith("this answer takes 24 MiB, and other answers hold 24 of the 37 MiB that all may hold")
        assert said.endswith("ask again in a while, or for less")
        assert answered(port, SLICE + "&stop=100")[0] == 200  # what fits is answered meanwhile
        assert answered(port, "/rollouts")[0] == 200
        assert len(head.read()) > SIZE
        slow.close()
        assert until(lambda: budget.used, lambda used: used == 0) == 0
        assert answered(port)[0] == 200


def test_a_reader_that_goes_away_frees_its_room(store: datastore.Store) -> None:
    budget = Budget(SIZE, patience=60)
    with serving(store, budget) as port:
        gone = asked(port)
        assert gone.getresponse().status == 200
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(answered, port)
            assert until(lambda: budget.waiting, lambda many: many == 1) == 1
            gone.sock.close() if gone.sock else None
            gone.close()
            del gone
            assert waiting.result()[0] == 200


LONG = 400_000
"""Characters of a label's text."""


@pytest.fixture(scope="module")
def wordy(tmp_path_factory: pytest.TempPathFactory) -> datastore.Store:
    """Games of which each has a text of 400,000 characters."""
    made = stores.game_store(tmp_path_factory.mktemp("wordy") / "run.zarr", pairs=2)
    add_labels(made.path, {str(name): {"essay": "x" * LONG} for name in made.rollouts.index})
    return datastore.open(made.path)


@pytest.mark.parametrize(
    ("path", "least"),
    [("/rollouts", 4 * LONG), ("/rollouts/g0-lie", LONG), ("/families", 4 * 72 * 4), ("/calibration", 3 * 4 * 32)],
)
def test_what_answers_from_tables_has_its_share_too(wordy: datastore.Store, path: str, least: int) -> None:
    budget = Budget(2**30)
    with serving(wordy, budget) as port:
        status, _, body = answered(port, path)
        assert (status, budget.peak) == (200, max(budget.peak, least))
        assert budget.peak >= len(body) * (path != "/calibration")  # of a calibration what is read is more
        assert until(lambda: budget.used, lambda used: used == 0) == 0


def test_rows_of_too_much_text_are_refused(wordy: datastore.Store) -> None:
    with serving(wordy, Budget(), limits=Limits(json_values=100_000)) as port:
        status, _, body = answered(port, "/rollouts")
        assert status == 413
        said = json.loads(body)["detail"]
        assert said.startswith("4 rows, counted by their length, are 160,")
        assert "so nothing was read; ask for fewer at once with limit and offset" in said
        status, _, body = answered(port, "/rollouts?limit=2&offset=2")
        assert (status, [len(one["labels"]["essay"]) for one in json.loads(body)["rollouts"]]) == (200, [LONG, LONG])


def test_no_more_wait_than_may() -> None:
    budget = Budget(10, patience=60, waiting=0)
    budget.take(100)  # one alone is let through
    with pytest.raises(BusyError, match="this answer takes 0 MiB, and other answers hold 0 of the 0 MiB") as caught:
        budget.take(1)
    assert caught.value.retry_after == 30
    budget.give(100)
    budget.take(1)
    assert (budget.used, budget.peak) == (1, 100)
