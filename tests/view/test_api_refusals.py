"""What the query API refuses and how it says so: what is absent, too large or not allowed; and a store that changes."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import datastore
import project
from datastore.labels import add_labels
from tests import house
from tests.datastore import making
from tests.view import served
from tests.view.served import ROLLOUTS, Server, directions, given
from view.asking import Limits
from view.formats import ARROW, NPY


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> datastore.Store:
    return served.scored_store(tmp_path_factory.mktemp("refusals") / "run.zarr")


@pytest.fixture(scope="module")
def server(store: datastore.Store) -> Iterator[Server]:
    with served.process(store.path) as started:
        yield started


@pytest.mark.parametrize(
    ("path", "query", "status", "sentence"),
    [
        ("/rollouts/zz", {}, 404, "rollout 'zz' is not in the store, which holds "),
        ("/rollouts/zz/tokens", {}, 404, "rollout 'zz' is not in the store"),
        ("/slice", {"rollout": "zz"}, 404, "rollout 'zz' is not in the store"),
        ("/slice", {"rollout": "alone", "component": "mlp_out"}, 404, "'mlp_out' is not captured in run, which holds"),
        ("/slice", {"rollout": "alone", "layers": "7"}, 404, "layer 7 is not captured for any rollout; .* 1, 5, 9"),
        ("/slice", {"rollout": "alone", "layers": "six"}, 422, "layers 'six' are no numbers"),
        ("/slice", {"rollout": "alone", "dims": "3-99"}, 404, "dim 99 is not there; the component has dims 0-15"),
        ("/slice", {}, 422, "parameter 'rollout' is wrong: Field required"),
        ("/slice", {"rollout": "alone", "start": "-1"}, 422, "parameter 'start' is wrong"),
        ("/norms", {"rollout": "alone", "layers": "2-4"}, 404, "no layer in 2-4 is there; there are 1, 5, 9"),
        ("/scores", {"trait": "nope"}, 404, "no scores of traits nope, but of bs/lying, mood/calm"),
        ("/scores", {"layers": "9"}, 404, "no scores of layers 9, but of 1, 5"),
        ("/scores", {"rollout": "zz"}, 404, "rollout 'zz' is not in the store"),
        ("/scores", {"mode": "loud"}, 422, "parameter 'mode' is wrong: Input should be 'raw', 'cosine'"),
        ("/scores", {"clean": "some"}, 422, "'some' names no set of dimensions; use none, all, top5-3layers"),
        ("/scores", {"clean": "7,3"}, 404, "activations at dimensions .* were not kept beside the scores; calibrate"),
        ("/scores", {"less": "other"}, 404, "no store named 'other' is served; there are run"),
        ("/scores", {"store": "../run"}, 404, r"no store named '\.\./run' is served"),
        ("/spans", {"direction": "bs/lying@7"}, 404, "no scores of directions bs/lying@7, but of bs/lying@1, "),
        ("/compare", {"label": "lable"}, 422, "the rollouts have no label 'lable'; they have "),
        ("/calibration", {"number": "9"}, 404, "run holds no calibration number 9"),
        ("/calibration", {"component": "k_proj"}, 404, "run holds no calibration of k_proj; make one with"),
        ("/rollouts", {"where": "@pd.compat.os.abort()"}, 422, "where .* is not a condition; write it like"),
        ("/rollouts", {"where": "n_tokens.max() > 3"}, 422, "where holds 'n_tokens.max"),
        ("/rollouts", {"where": "lable == 3"}, 422, "where names 'lable', which is no column; there are rollout_id"),
        ("/rollouts", {"where": "n_tokens > 'a'"}, 422, "^where .* is not a query"),
        ("/rollouts", {"limit": "100000"}, 422, "parameter 'limit' is wrong: .* less than or equal to 10000"),
    ],
)
def test_refusals_say_what_is_there(
    server: Server, store: datastore.Store, path: str, query: dict[str, Any], status: int, sentence: str
) -> None:
    import re

    answer = server.get(path, **query)
    assert answer.status == status, answer.body
    assert re.search(sentence, answer.detail), answer.detail
    assert "\n" not in answer.detail
    assert str(store.path.parent) not in answer.detail, "where the store lies is nobody's business"


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
@pytest.mark.parametrize("path", ["/stores", "/slice", "/zarr/run/zarr.json"])
def test_nothing_can_be_written(server: Server, method: str, path: str) -> None:
    assert server.get(path, method=method).status == 405


def test_a_page_elsewhere_can_not_reach_it_under_a_name_of_its_own(server: Server) -> None:
    assert server.get("/stores", headers={"Host": "evil.example:80"}).status == 400
    assert server.get("/stores", headers={"Host": f"localhost:{server.port}"}).status == 200
    assert "access-control-allow-origin" not in server.get("/stores", headers={"Origin": "http://evil.example"}).headers


def test_too_much_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    path = served.scored_store(tmp_path / "run.zarr").path
    for chunks in [*path.glob("captures/*/residual/c"), *path.glob("scores/*/score/c")]:
        shutil.rmtree(chunks)
    with served.inside([path], limits=Limits(json_values=200, binary_bytes=2000)) as server:
        large = server.get("/slice", rollout="alone")
        assert large.status == 413
        assert "1,776 tokens x layers x dims of 'alone' are 1,776 values, and one answer in JSON holds at most 200" in (
            large.detail
        )
        assert "ask for fewer tokens (start, stop), layers or dims; npy and Arrow" in large.detail
        for form in (NPY, ARROW):
            assert server.get("/slice", headers={"Accept": form}, rollout="alone").status == 413
        assert server.get("/rollouts/alone/tokens").status == 413
        assert server.get("/scores").status == 413
        lost = server.get("/scores", rollout="run/4 ü", trait="lying", layers="1")
        assert lost.status == 500, "a score that is lost is not a rollout without scores"
        assert "is missing; what it holds is lost" in lost.detail
        # what is small enough is read, and what is broken said
        broken = server.get("/slice", rollout="alone", layers="1", stop=3, dims="0-3")
        assert broken.status == 500
        assert "residual at layer 1 of rollout" in broken.detail
        assert str(tmp_path) not in broken.detail


# -- tokens, addresses, ports ------------------------------------------------------------------------------------------


def test_a_token_stands_before_everything(store: datastore.Store) -> None:
    with served.inside([store.path], token="sesame ä") as server:
        for path in ("/", "/stores", "/openapi.json", "/zarr/run/zarr.json", "/nowhere"):
            for headers in ({}, {"Authorization": "Bearer sesam"}, {"Authorization": "Basic sesame"}):
                refused = server.get(path, headers=headers)
                assert refused.status == 401
                assert refused.headers["www-authenticate"] == "Bearer"
                assert refused.detail == "this server wants a token; send it as Authorization: Bearer TOKEN"
        right = {"Authorization": "bearer sesame ä".encode().decode("latin-1")}
        assert server.get("/stores", headers=right).status == 200
        assert server.get("/zarr/run/zarr.json", headers=right).status == 200


def command(*words: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "view", "api", *map(str, words)]
    return subprocess.run(line, cwd=house.ROOT, capture_output=True, text=True, timeout=300)


def test_other_machines_are_let_in_with_a_token_only(store: datastore.Store) -> None:
    done = command(store.path, "--host", "0.0.0.0", "--port", "0")
    assert done.returncode == 2
    assert done.stderr.startswith("error: 0.0.0.0 can be reached from other machines")
    assert done.stderr.count("\n") == 1
    with served.process(store.path, "--host", "0.0.0.0", "--token", "sesame") as server:
        assert server.get("/stores").status == 401
        assert server.get("/stores", headers={"Authorization": "Bearer sesame"}).status == 200


def test_a_port_that_is_taken_is_one_sentence(store: datastore.Store) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        done = command(store.path, "--port", port)
    assert done.returncode == 1
    assert (
        done.stderr
        == f"error: port {port} is taken by another program, so nothing is served; give another one with --port\n"
    )


def test_a_path_that_is_no_store_is_one_sentence(tmp_path: Path) -> None:
    done = command(tmp_path / "run.zarr")
    assert done.returncode == 2
    assert "does not exist, so there is no store to read" in done.stderr
    assert done.stderr.count("\n") == 1


# -- stores that lack something, or change -----------------------------------------------------------------------------


def test_without_scores_calibration_or_text_the_rest_is_answered(tmp_path: Path) -> None:
    path = served.store_of(tmp_path / "bare.zarr", vocab=None).path
    with served.inside([path]) as server:
        (one,) = server.get("/stores").json["stores"]
        assert (one["directions"], one["calibrations"]) == ([], [])
        asked: dict[str, dict[str, Any]] = {"/scores": {}, "/spans": {"direction": "x"}, "/compare": {"label": "lying"}}
        for route, query in asked.items():
            refused = server.get(route, **query)
            assert refused.status == 404
            assert refused.detail == (
                "store 'bare' holds no scores; compute them with python -m project STORE --vectors DIR"
            )
        assert "python -m calibrate bare.zarr" in server.get("/calibration").detail
        tokens = server.get("/rollouts/alone/tokens", stop=2).json["tokens"]
        assert [one["text"] for one in tokens] == [None, None]
        assert [one["token_id"] for one in tokens] == served.BY_ID["alone"].token_ids[:2].tolist()
        assert len(server.get("/norms", rollout="alone").json["values"]) == 37


def test_a_store_is_answered_as_it_is_at_each_request(tmp_path: Path) -> None:
    path = served.store_of(tmp_path / "run.zarr", ROLLOUTS[:2], layers=(1,)).path
    with served.inside([path]) as server:
        assert server.get("/rollouts").json["total"] == 2
        assert server.get("/slice", rollout="alone").status == 404
        making.capture(path, ROLLOUTS[1:], (1, 5))
        (one,) = server.get("/stores").json["stores"]
        assert (one["n_rollouts"], one["layers"], len(one["captures"])) == (4, [1, 5], 3)
        residual = one["components"][0]
        assert residual["captured"] == 7 / 8, "of four rollouts and two layers, twin-a lacks one"
        partly = server.get("/slice", rollout="twin-a", layers="5")
        assert partly.status == 404
        assert "residual at layer 5 of rollout 'twin-a' is not captured; captured for it: " in partly.detail
        assert server.get("/rollouts/twin-a").json["captured"] == {"residual": [1], "k_proj": [1]}
        values = server.get("/slice", rollout="alone", layers="5").json["values"]
        np.testing.assert_array_equal(np.array(values, np.float32)[:, 0], given("alone", 5).astype(np.float32))
        add_labels(path, {"alone": {"verdict": "guilty"}})
        assert server.get("/rollouts", where="verdict == 'guilty'").json["total"] == 1
        project.scores(datastore.open(path), [one for one in directions() if one.layer == 1])
        assert len(server.get("/scores").json["rollouts"]) == 4
        shutil.rmtree(path)
        gone = server.get("/stores")
        assert (gone.status, gone.detail) == (
            404,
            "run does not exist, so there is no store to read; check the path, or capture into it",
        )


def test_results_kept_beside_a_store_are_answered_as_its_own(tmp_path: Path) -> None:
    store = served.store_of(tmp_path / "run.zarr")
    project.scores(store, directions()[:1], out=tmp_path / "results.zarr")
    with served.inside([store.path, tmp_path / "results.zarr"]) as server:
        (one,) = server.get("/stores").json["stores"]
        assert [d["direction"] for d in one["directions"]] == ["bs/lying@1"]
        assert server.get("/scores", rollout="alone").status == 200


# -- the description ---------------------------------------------------------------------------------------------------


def test_the_page_needs_nothing_from_elsewhere(server: Server) -> None:
    import re

    page = server.get("/").body.decode()
    links = re.findall(r'(?:href|src)="([^"]*)"', page)
    assert "/api/openapi.json" in links
    assert [link for link in links if not link.startswith("/api/")] == []
    assert "<script" not in page
    described = server.get("/openapi.json").json["paths"]
    assert all(path in page for path in described)
    for link in set(links):
        assert server.get(link.removeprefix("/api")).status == 200, link
