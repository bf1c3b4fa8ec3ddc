"""The stores' own files over HTTP: xarray, Zarr and zarrita read them as the local ones, and nothing else is there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import xarray as xr
import zarr

import datastore
from tests.view import served
from tests.view.served import LAYERS, ROLLOUTS, Server, directions, given

JS = Path(__file__).with_name("js")
SECRET = b"a secret that lies outside the store"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> datastore.Store:
    """A store with scores, beside things that nobody may see, and with links, leftovers and hidden files in it."""
    top = tmp_path_factory.mktemp("zarr")
    store = served.scored_store(top / "run.zarr")
    (top / "secret.txt").write_bytes(SECRET)
    (top / ".env").write_bytes(SECRET)
    (top / "run.zarr.plans").mkdir(exist_ok=True)
    (top / "run.zarr.plans/secret.txt").write_bytes(SECRET)
    (top / "elsewhere.zarr").mkdir()
    (top / "elsewhere.zarr/zarr.json").write_bytes(SECRET)
    capture = store.path / "captures/0001"
    (capture / "link.txt").symlink_to(top / "secret.txt")
    (capture / "up").symlink_to(top)
    (capture / "sideways").symlink_to(top / "run.zarr.plans")
    (store.path / "captures/0777").symlink_to(top)
    (capture / ".hidden").write_bytes(SECRET)
    (capture / "zarr.json.0123.partial").write_bytes(SECRET)
    (store.path / "captures/abcdef.partial").mkdir()
    (store.path / "captures/abcdef.partial/zarr.json").write_bytes(SECRET)
    (store.path / "notes.txt").write_bytes(SECRET)
    (capture / "page.html").write_text("<script>alert(1)</script>")
    return store


@pytest.fixture(scope="module")
def server(store: datastore.Store) -> Iterator[Server]:
    """The stores' files at /zarr, beside the query API."""
    with served.process(store.path) as started:
        yield started._replace(base="")


def url(server: Server, path: str) -> str:
    return f"{server.url}/zarr/run/{path}"


# -- bytes -------------------------------------------------------------------------------------------------------------


def test_every_committed_file_is_served_byte_for_byte(server: Server, store: datastore.Store) -> None:
    files = [
        path.relative_to(store.path).as_posix()
        for path in store.path.rglob("*")
        if path.is_file() and SECRET not in path.read_bytes()
    ]
    assert len(files) > 100
    for name in files:
        line = quote(name)
        answer = server.get(f"/zarr/run/{line}")
        assert answer.status == 200, name
        assert answer.body == (store.path / name).read_bytes()
        assert server.get(f"/api/zarr/run/{line}", method="HEAD").headers["etag"] == answer.headers["etag"]


def test_no_file_of_a_store_is_a_page(server: Server) -> None:
    """A store may come from anyone, and the viewer is at the same address."""
    page = server.get("/zarr/run/captures/0001/page.html").headers
    assert (page["content-type"], page["x-content-type-options"]) == ("application/octet-stream", "nosniff")
    assert server.get("/zarr/run/captures/0001/zarr.json").headers["content-type"] == "application/json"


def test_ranges_and_conditions(server: Server, store: datastore.Store) -> None:
    chunk = "captures/0001/residual/c/0/0/0"
    path, data = f"/zarr/run/{chunk}", (store.path / chunk).read_bytes()
    whole = server.get(path)
    head = server.get(path, method="HEAD")
    assert (head.status, head.body, head.headers["content-length"]) == (200, b"", str(len(data)))
    etag = whole.headers["etag"]
    for given_range, expected in (("bytes=5-9", data[5:10]), ("bytes=-4", data[-4:]), ("bytes=10-", data[10:])):
        part = server.get(path, headers={"Range": given_range})
        assert (part.status, part.body) == (206, expected)
        assert part.headers["content-range"].endswith(f"/{len(data)}")
    assert server.get(path, headers={"Range": "bytes=0-3", "If-Range": etag}).body == data[:4]
    assert server.get(path, headers={"Range": "bytes=0-3", "If-Range": '"other"'}).body == data
    assert server.get(path, headers={"Range": f"bytes={len(data)}-"}).status == 416
    unchanged = server.get(path, headers={"If-None-Match": etag})
    assert (unchanged.status, unchanged.body) == (304, b"")
    assert server.get(path, headers={"If-None-Match": '"other"'}).body == data


@pytest.mark.parametrize(
    "path",
    [
        "/zarr/../secret.txt",
        "/zarr/run/../secret.txt",
        "/zarr/run/captures/../../secret.txt",
        "/zarr/run/captures/0001/../../../secret.txt",
        "/zarr/run/captures/0001/up/secret.txt",
        "/zarr/run/captures/0001/link.txt",
        "/zarr/run/captures/0001/sideways/secret.txt",
        "/zarr/run/captures/0777/secret.txt",
        "/zarr/run/%2e%2e/secret.txt",
        "/zarr/run/captures/%2e%2e/%2e%2e/secret.txt",
        "/zarr/run/captures/..%2f..%2fsecret.txt",
        "/zarr/run/captures/%252e%252e/%252e%252e/secret.txt",
        "/zarr/run/captures/%c0%ae%c0%ae/%c0%ae%c0%ae/secret.txt",
        "/zarr/run/captures/..\\..\\secret.txt",
        "/zarr/run/captures//../../secret.txt",
        "/zarr/run/captures/./0001/../../../secret.txt",
        "/zarr/run/captures/0001/zarr.json/../../../../secret.txt",
        "/zarr/run/captures/0001/secret.txt%00/zarr.json",
        "/zarr/run%2f..%2fsecret.txt",
        "/zarr/run.zarr.plans/secret.txt",
        "/zarr/run/../run.zarr.plans/secret.txt",
        "/zarr/elsewhere/zarr.json",
        "/zarr/elsewhere.zarr/zarr.json",
        "/zarr/./elsewhere.zarr/zarr.json",
        "/zarr/run/captures/0001/.hidden",
        "/zarr/run/captures/0001/%2ehidden",
        "/zarr/run/captures/0001/zarr.json.0123.partial",
        "/zarr/run/captures/abcdef.partial/zarr.json",
        "/zarr/run/notes.txt",
        "/zarr/.env",
        "/zarr//secret.txt",
        "//secret.txt",
        "/secret.txt",
        "/../secret.txt",
        "/api/../secret.txt",
        "/api/zarr/../../secret.txt",
        "/api/rollouts/..%2f..%2f..%2fsecret.txt",
        "/api/rollouts/../../secret.txt/tokens",
        "/zarr/run/captures/0001/" + "a" * 300,
        "/zarr/run/" + "captures/" * 600,
    ],
)
def test_nothing_outside_the_stores_is_served(server: Server, store: datastore.Store, path: str) -> None:
    for line in (path, f"{path}?store=run", path.replace("/secret.txt", f"{store.path.parent}/secret.txt")):
        answer = server.get(line)
        assert answer.status in (400, 404), line
        assert SECRET not in answer.body
        assert line != path or str(store.path.parent).encode() not in answer.body


def test_an_absolute_form_of_the_request_is_no_way_out(server: Server) -> None:
    assert server.get("http://127.0.0.1/../secret.txt").status in (400, 404)


def test_groups_list_their_committed_members(server: Server) -> None:
    page = server.get("/zarr/run/captures/").body.decode()
    assert [line for line in page.splitlines() if "href" in line] == [
        '<a href="0001/">0001/</a><br>',
        '<a href="0777/">0777/</a><br>',  # a link's name; what it leads to is not there
        '<a href="zarr.json">zarr.json</a><br>',
    ]
    assert server.get("/zarr/run/captures/0777/").status == 404
    assert server.get("/zarr/run/captures/0001/residual/c/").status == 404, "chunks are not listed"
    assert "notes" not in server.get("/zarr/run/").body.decode()


# -- readers -----------------------------------------------------------------------------------------------------------


def test_xarray_reads_all_of_it_remotely(server: Server, store: datastore.Store) -> None:
    for place in ("captures/0001", "scores/0001", "calibration/0001", "captures/0001/rollouts", "captures/0001/vocab"):
        whole = place.count("/") == 1  # a group inside one has no consolidated metadata of its own
        here = xr.open_zarr(store.path / place, consolidated=whole)
        there = xr.open_zarr(url(server, place), consolidated=whole)
        assert set(there.variables) == set(here.variables)
        assert there.attrs == here.attrs
        for name in here.variables:
            a, b = np.asarray(here[name].values), np.asarray(there[name].values)
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert a.tolist() == b.tolist() if a.dtype.kind in "OT" else a.tobytes() == b.tobytes(), (place, name)


def test_what_xarray_reads_is_what_the_store_selects(server: Server, store: datastore.Store) -> None:
    """The rows of each rollout, found with nothing but what is in the remote dataset."""
    remote = xr.open_zarr(url(server, "captures/0001"))
    table = xr.open_zarr(url(server, "captures/0001"), group="rollouts")
    names = [str(name) for name in table["rollout_id"].values]
    assert sorted(names) == sorted(one.rollout_id for one in ROLLOUTS)
    for row, name in enumerate(names):
        tokens = np.flatnonzero(remote["rollout"].values == row)
        mine = remote["residual"].isel(token=tokens).sel(layer=5)
        np.testing.assert_array_equal(np.asarray(mine.values).view(np.uint16), given(name, 5).view(np.uint16))
        selected = store.select("residual", rollouts=name, layers=list(LAYERS))
        np.testing.assert_array_equal(remote["residual"].isel(token=tokens).values.astype(np.float32), selected.values)
        assert remote["token_id"].values[tokens].tolist() == selected["token_id"].values.tolist()


def test_zarr_walks_the_store_without_knowing_its_layout(server: Server, store: datastore.Store) -> None:
    root = zarr.open_group(f"{server.url}/zarr/run", mode="r")
    assert {"captures", "scores", "calibration", "labels", "annotations", "dropped"} <= set(root.group_keys())
    array = root["captures/0001/position"]
    assert isinstance(array, zarr.Array)
    np.testing.assert_array_equal(array[:], zarr.open_array(store.path / "captures/0001/position", mode="r")[:])
    with xr.open_datatree(url(server, "captures/0001"), engine="zarr") as tree:
        assert {"/rollouts", "/rollouts/labels", "/vocab", "/stats/residual"} <= set(tree.groups)


def test_a_reader_with_a_token_gets_in(store: datastore.Store) -> None:
    with served.inside([store.path], token="sesame") as server:
        with pytest.raises(Exception, match=r"401|Unauthorized|No such file|not found"):
            xr.open_zarr(url(server, "captures/0001"))
        options: dict[str, Any] = {"headers": {"Authorization": "Bearer sesame"}}
        remote = xr.open_zarr(url(server, "captures/0001"), storage_options=options)
        local = xr.open_zarr(store.path / "captures/0001")
        assert remote["token_id"].values.tolist() == local["token_id"].values.tolist()


# -- zarrita -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def node() -> str:
    """Node with zarrita; without them the tests fail where everything must be there, and say so elsewhere."""
    found = shutil.which("node")
    missing = "node is not installed" if found is None else ""
    if found and not (JS / "node_modules/zarrita").is_dir():
        missing = f"zarrita is not installed: run npm ci in {JS.name}/, which `make test` does where npm is"
    if missing:
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(f"NOT TESTED: {missing}")
    return str(found)


def by_zarrita(node: str, server: Server, *paths: str) -> dict[str, Any]:
    done = subprocess.run(
        [node, str(JS / "read.mjs"), f"{server.url}/zarr/run", *paths], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_zarrita_reads_scores_and_coordinates(node: str, server: Server, store: datastore.Store) -> None:
    coordinates = ["token_id", "position", "segment", "role", "turn", "thinking", "rollout", "layer"]
    table = ["rollouts/rollout_id", "rollouts/n_tokens", "rollouts/prompt_end", "stats/residual/norm", "k_proj"]
    captured = [f"captures/0001/{name}" for name in coordinates + table]
    results = ["scores/0001/score", "scores/0001/norm", "scores/0001/rollouts/rollout_id"]
    found = by_zarrita(node, server, *captured, *results)
    for path, one in found.items():
        ours = np.asarray(zarr.open_array(store.path / path, mode="r")[...])
        assert one["shape"] == list(ours.shape), path
        assert one["values"] == ours.reshape(-1).tolist(), path
    scores = np.array(found["scores/0001/score"]["values"]).reshape(found["scores/0001/score"]["shape"])
    ids = found["scores/0001/rollouts/rollout_id"]["values"]
    expected = np.concatenate([[served.exact(name, one) for one in directions()] for name in ids], axis=1).T
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)


def test_zarrita_has_no_bfloat16_so_components_go_through_slice(node: str, server: Server) -> None:
    """When this fails, zarrita has learned it, and the documentation can say so."""
    with pytest.raises(AssertionError, match="bfloat16"):
        by_zarrita(node, server, "captures/0001/residual")
