"""The query API of a real server process: what it answers equals what was put into the store, by other arithmetic."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import datastore
from datastore.dtype import upcast
from tests.datastore import making
from tests.view import served
from tests.view.served import BY_ID, LAYERS, ROLLOUTS, SHARED, Answer, Server, directions, exact, given
from view import answers
from view.formats import ARROW, NPY

LABELS = [f"{one.trait}@{one.layer}" for one in directions()]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> datastore.Store:
    return served.scored_store(tmp_path_factory.mktemp("api") / "run.zarr")


@pytest.fixture(scope="module")
def server(store: datastore.Store) -> Iterator[Server]:
    with served.process(store.path) as started:
        yield started


def npy(answer: Answer) -> Any:
    assert answer.status == 200, answer.body
    assert answer.headers["content-type"] == NPY
    return np.load(io.BytesIO(answer.body), allow_pickle=False)


def arrow(answer: Answer) -> pa.Table:
    assert answer.status == 200, answer.body
    assert answer.headers["content-type"] == ARROW
    return pa.ipc.open_stream(answer.body).read_all()


# -- tables ------------------------------------------------------------------------------------------------------------


def test_stores_are_described(server: Server) -> None:
    found = server.get("/stores").json
    answers.Stores.model_validate(found)
    (one,) = found["stores"]
    assert one["name"] == "run"
    assert one["n_rollouts"] == len(ROLLOUTS)
    assert one["n_tokens"] == sum(len(rollout.token_ids) for rollout in ROLLOUTS)
    assert one["layers"] == list(LAYERS)
    assert [(c["name"], c["width"], c["dtype"], c["captured"]) for c in one["components"]] == [
        ("residual", 16, "bfloat16", 1.0),
        ("k_proj", 6, "float32", 1.0),
    ]
    assert sorted(one["labels"]) == ["lying", "name of it", "reward"]
    assert one["prompt_sets"] == ["audits", "games"]
    assert [d["direction"] for d in one["directions"]] == LABELS
    assert {d["baseline"] for d in one["directions"]} == {0.25}
    assert one["calibrations"] == [1]
    assert [(c["number"], c["model"], c["zarr"]) for c in one["captures"]] == [(1, "toy", "run/captures/0001")]


def ids(answer: Answer) -> list[str]:
    assert answer.status == 200, answer.body
    return [one["rollout_id"] for one in answer.json["rollouts"]]


@pytest.mark.parametrize(
    ("query", "those"),
    [
        ({}, lambda one: True),
        ({"where": "lying and n_tokens > 30"}, lambda one: one.labels["lying"] and len(one.token_ids) > 30),
        ({"label": "lying=false"}, lambda one: not one.labels["lying"]),
        ({"label": ["name of it=alone"]}, lambda one: one.rollout_id == "alone"),
        ({"tag": ["audit", "long"]}, lambda one: "long" in one.tags),
        ({"prompt_set": "games", "where": "reward > 5"}, lambda one: one.rollout_id == "twin-b"),
        ({"where": "n_tokens < 0"}, lambda one: False),
    ],
)
def test_rollouts_are_filtered(server: Server, query: dict[str, Any], those: Any) -> None:
    assert set(ids(server.get("/rollouts", **query))) == {one.rollout_id for one in ROLLOUTS if those(one)}


def test_rollouts_come_in_pages(server: Server) -> None:
    whole = ids(server.get("/rollouts"))
    pages = [server.get("/rollouts", offset=at, limit=3) for at in (0, 3, 6)]
    assert [name for page in pages for name in ids(page)] == whole
    assert {page.json["total"] for page in pages} == {len(ROLLOUTS)}


@pytest.mark.parametrize("name", list(BY_ID))
def test_a_rollout_is_as_it_was_captured(server: Server, name: str) -> None:
    from urllib.parse import quote

    one = BY_ID[name]
    found = server.get(f"/rollouts/{quote(name)}").json
    answers.RolloutDetail.model_validate(found)
    assert found["rollout_id"] == name
    assert found["labels"] == one.labels
    assert found["tags"] == list(one.tags)
    assert found["token_sha256"] == one.token_sha256
    assert found["captured"] == {"residual": list(LAYERS), "k_proj": list(LAYERS)}
    assert found["annotations"] == [
        {"token_start": span.token_start, "token_end": span.token_end, "label": span.label} for span in one.annotations
    ]
    tokens = server.get(f"/rollouts/{quote(name)}/tokens", start=2, stop=7).json
    answers.Tokens.model_validate(tokens)
    assert tokens["n_tokens"] == len(one.token_ids)
    expected = [
        {
            "position": i,
            "token_id": int(one.token_ids[i]),
            "text": chr(65 + int(one.token_ids[i]) % 26),
            "segment": "prompt" if i < one.prompt_end else "response",
            "role": "user" if i < one.prompt_end else "assistant",
            "turn": int(i >= one.prompt_end),
            "thinking": False,
        }
        for i in range(2, 7)
    ]
    assert tokens["tokens"] == expected


def test_a_calibration_is_that_of_the_store(server: Server, store: datastore.Store) -> None:
    found = server.get("/calibration").json
    answers.CalibrationInfo.model_validate(found)
    kept = store.calibration()
    pooled = [given(one.rollout_id, layer)[one.prompt_end :] for layer in LAYERS for one in ROLLOUTS]
    norms = [np.linalg.norm(rows.astype(np.float64), axis=1) for rows in pooled]
    by_layer = [np.concatenate(norms[i * 4 : i * 4 + 4]).mean() for i in range(len(LAYERS))]
    assert [one["layer"] for one in found["by_layer"]] == list(LAYERS)
    np.testing.assert_allclose([one["norm"] for one in found["by_layer"]], by_layer, rtol=1e-6)
    assert [one["top_dims"] for one in found["by_layer"]] == kept["top_dims"].values.tolist()
    assert server.get("/calibration", number=1).json == found


def test_families_are_rollouts_of_one_beginning(server: Server) -> None:
    (one,) = server.get("/families", least=5).json["families"]
    assert sorted(one["rollouts"]) == ["twin-a", "twin-b"]
    assert one["fork"] == SHARED
    assert server.get("/families", rollout=["twin-a", "alone"], least=5).json["families"] == []


# -- activations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("component", ["residual", "k_proj"])
def test_a_slice_is_what_was_put_in(server: Server, component: str) -> None:
    query: dict[str, Any] = {
        "rollout": "alone",
        "component": component,
        "layers": "5,1",
        "start": 3,
        "stop": 30,
        "dims": "4,0-1",
    }
    rows = np.stack([given("alone", layer, component) for layer in (5, 1)], axis=1)[3:30][:, :, [4, 0, 1]]
    expected = upcast(np.ascontiguousarray(rows))
    plain = server.get("/slice", **query)
    answers.Slice.model_validate({**plain.json, "values": np.empty((0, 0, 0), np.float32)})
    assert (plain.json["layers"], plain.json["dims"]) == ([5, 1], [4, 0, 1])
    assert (plain.json["start"], plain.json["stop"]) == (3, 30)
    np.testing.assert_array_equal(np.array(plain.json["values"], np.float32), expected)
    binary = server.get("/slice", headers={"Accept": NPY}, **query)
    np.testing.assert_array_equal(npy(binary), expected)
    assert (binary.headers["x-layers"], binary.headers["x-dims"], binary.headers["x-dtype"]) == (
        "5,1",
        "4,0-1",
        "float32",
    )
    table = arrow(server.get("/slice", headers={"Accept": ARROW}, **query))
    assert table["position"].to_pylist() == np.repeat(np.arange(3, 30), 2).tolist()
    assert table["layer"].to_pylist() == [5, 1] * 27
    np.testing.assert_array_equal(np.array(table["values"].to_pylist(), np.float32), expected.reshape(-1, 3))
    assert table.schema.metadata[b"dims"] == b"4,0,1"
    assert table.schema.metadata[b"component"] == component.encode()


def test_a_whole_rollout_is_the_default(server: Server) -> None:
    expected = upcast(np.stack([given("twin-a", layer) for layer in LAYERS], axis=1))
    np.testing.assert_array_equal(npy(server.get("/slice", headers={"Accept": NPY}, rollout="twin-a")), expected)
    none = npy(server.get("/slice", headers={"Accept": NPY}, rollout="twin-a", start=19))
    assert none.shape == (0, 3, 16)


def test_the_stored_bits_can_be_had(server: Server) -> None:
    answer = server.get("/slice", headers={"Accept": NPY}, rollout="twin-a", layers="5", raw="true")
    assert answer.headers["x-dtype"] == "bfloat16"
    np.testing.assert_array_equal(npy(answer)[:, 0], given("twin-a", 5).view(np.uint16))
    refused = server.get("/slice", rollout="twin-a", layers="5", raw="true")
    assert (refused.status, refused.detail.partition(" ")[0]) == (422, "raw=true")


def test_norms_are_those_of_the_rows(server: Server) -> None:
    rows = np.stack([given("alone", layer) for layer in (1, 9)], axis=1)[5:20].astype(np.float64)
    query: dict[str, Any] = {"rollout": "alone", "layers": "1,9", "start": 5, "stop": 20}
    found = server.get("/norms", **query).json
    np.testing.assert_allclose(found["values"], np.linalg.norm(rows, axis=2), rtol=1e-6)
    binary = npy(server.get("/norms", headers={"Accept": NPY}, **query))
    np.testing.assert_array_equal(np.array(found["values"], np.float32), binary)
    table = arrow(server.get("/norms", headers={"Accept": ARROW}, **query))
    np.testing.assert_array_equal(table["norm"].to_numpy().reshape(15, 2), binary)


@pytest.mark.parametrize(
    ("accept", "sent"),
    [
        ("*/*", "application/json"),
        ("text/html, application/*;q=0.5", "application/json"),
        (f"application/json;q=0.1, {NPY};q=0.9", NPY),
        (f"{ARROW}, application/json;q=0.5", ARROW),
        (f"application/json;q=0, {NPY};q=wrong, application/vnd.apache.arrow.stream", ARROW),
    ],
)
def test_the_accept_header_chooses(server: Server, accept: str, sent: str) -> None:
    answer = server.get("/slice", headers={"Accept": accept}, rollout="twin-a", stop=1)
    assert (answer.status, answer.headers["content-type"]) == (200, sent)


def test_what_no_form_fits_is_said(server: Server) -> None:
    answer = server.get("/slice", headers={"Accept": "image/png"}, rollout="twin-a", stop=1)
    assert answer.status == 406
    assert "takes none of application/json, application/x-npy" in answer.detail


# -- scores ------------------------------------------------------------------------------------------------------------


def scores_by_hand(rollout_id: str, *, mode: str = "raw", drop: tuple[int, ...] = ()) -> np.ndarray:
    """(direction, token), in float64, by the definitions."""
    found = []
    for one in directions():
        rows = given(rollout_id, one.layer).astype(np.float64)
        unit = np.asarray(one.values, np.float64) / np.linalg.norm(np.asarray(one.values, np.float64))
        kept = [dim for dim in range(rows.shape[1]) if dim not in drop]
        values, norms = rows[:, kept] @ unit[kept], np.linalg.norm(rows[:, kept], axis=1)
        if mode == "normalised":
            norms = np.full(len(rows), norms[BY_ID[rollout_id].prompt_end :].mean())
        found.append(values / norms if mode != "raw" else values)
    return np.array(found)


@pytest.mark.parametrize("mode", ["raw", "cosine", "normalised"])
@pytest.mark.parametrize("clean", ["none", "all", "top5-3layers", "named"])
def test_scores_are_the_products(server: Server, store: datastore.Store, mode: str, clean: str) -> None:
    top = store.calibration()["top_dims"].values.tolist()
    drops = {
        "none": (),
        "all": tuple({dim for dims in top for dim in dims}),
        "top5-3layers": tuple(dim for dim in range(16) if sum(dim in dims for dims in top) >= 3),
        "named": (top[0][0],),
    }
    rule = str(top[0][0]) if clean == "named" else clean
    answer = server.get("/scores", mode=mode, clean=rule)
    found = answer.json
    assert [d["direction"] for d in found["directions"]] == LABELS
    assert {one["rollout_id"] for one in found["rollouts"]} == set(BY_ID)
    for one in found["rollouts"]:
        expected = scores_by_hand(one["rollout_id"], mode=mode, drop=drops[clean])
        assert (one["start"], one["stop"]) == (0, expected.shape[1])
        np.testing.assert_allclose(np.array(one["values"]), expected, rtol=2e-4, atol=2e-5)


def test_scores_are_chosen_by_trait_layer_rollout_and_tokens(server: Server) -> None:
    query: dict[str, Any] = {"trait": "calm", "layers": "2-9", "rollout": ["run/4 ü", "alone"], "start": 4, "stop": 20}
    found = server.get("/scores", **query).json
    (one,) = [one for one in directions() if (one.trait, one.layer) == ("mood/calm", 5)]
    assert [d["direction"] for d in found["directions"]] == ["mood/calm@5"]
    assert [(r["rollout_id"], r["start"], r["stop"]) for r in found["rollouts"]] == [
        ("run/4 ü", 4, 8),
        ("alone", 4, 20),
    ]
    for rollout in found["rollouts"]:
        expected = exact(rollout["rollout_id"], one)[4:20]
        np.testing.assert_allclose(rollout["values"], expected[np.newaxis], rtol=1e-4, atol=1e-5)
    answers.Scores.model_validate({**found, "rollouts": []})
    stacked = np.concatenate([np.array(rollout["values"], np.float32) for rollout in found["rollouts"]], axis=1).T
    binary = server.get("/scores", headers={"Accept": NPY}, **query)
    np.testing.assert_array_equal(npy(binary), stacked)
    assert binary.headers["x-rollouts"] == "run/4%20%C3%BC=4,alone=16"
    table = arrow(server.get("/scores", headers={"Accept": ARROW}, **query))
    np.testing.assert_array_equal(table["mood/calm@5"].to_numpy(), stacked[:, 0])
    assert table["rollout_id"].to_pylist() == ["run/4 ü"] * 4 + ["alone"] * 16
    assert table["position"].to_pylist() == [*range(4, 8), *range(4, 20)]


def test_spans_are_the_strongest_windows(server: Server) -> None:
    one = directions()[0]
    found = server.get("/spans", direction="bs/lying@1", window=4, most=5, per_rollout=2, segment="response").json
    answers.Spans.model_validate(found)
    best = []
    for rollout in ROLLOUTS:
        scores = exact(rollout.rollout_id, one)
        windows = [(i, scores[i : i + 4].mean()) for i in range(rollout.prompt_end, len(scores) - 3)]
        first = max(windows, key=lambda pair: abs(pair[1]))
        apart = [pair for pair in windows if abs(pair[0] - first[0]) >= 4]
        best.append((rollout.rollout_id, *first))
        if apart:
            best.append((rollout.rollout_id, *max(apart, key=lambda pair: abs(pair[1]))))
    best.sort(key=lambda span: -abs(span[2]))
    assert [(s["rollout_id"], s["start"], s["stop"]) for s in found["spans"]] == [
        (name, start, start + 4) for name, start, _ in best[:5]
    ]
    np.testing.assert_allclose([s["mean"] for s in found["spans"]], [mean for *_, mean in best[:5]], rtol=1e-4)
    for span in found["spans"]:
        tokens = BY_ID[span["rollout_id"]].token_ids[span["start"] : span["stop"]]
        assert span["text"] == "".join(chr(65 + int(i) % 26) for i in tokens)


def test_groups_are_compared(server: Server) -> None:
    found = server.get("/compare", label="lying", trait="lying", layers="1", segment="response").json
    answers.Comparison.model_validate(found)
    one = directions()[0]
    for group in found["groups"]:
        members = [r for r in ROLLOUTS if str(r.labels["lying"]) == group["group"]]
        values = [exact(r.rollout_id, one)[r.prompt_end :] for r in members]
        assert (group["direction"], group["part"], group["n_rollouts"]) == ("bs/lying@1", None, 2)
        assert group["n_tokens"] == sum(map(len, values))
        np.testing.assert_allclose(group["mean"], np.concatenate(values).mean(), rtol=1e-4)
        assert group["low"] <= group["mean"] <= group["high"]
    parts = server.get("/compare", label="lying", trait="lying", layers="1", per="role").json["groups"]
    assert {(one["part"], one["group"]) for one in parts} == {
        (role, str(flag)) for role in ("user", "assistant") for flag in (True, False)
    }


def test_a_difference_of_two_stores_is_the_second_less_the_first(tmp_path: Path, store: datastore.Store) -> None:
    import project

    making.capture(tmp_path / "other.zarr", ROLLOUTS[:2], LAYERS, version=7)
    project.scores(datastore.open(tmp_path / "other.zarr"), directions())
    with served.process(store.path, tmp_path / "other.zarr") as server:
        assert [one["name"] for one in server.get("/stores").json["stores"]] == ["run", "other"]
        query: dict[str, Any] = {"trait": "bs/lying", "layers": "5"}
        unnamed = server.get("/scores", **query)
        assert (unnamed.status, unnamed.detail) == (
            422,
            "several stores are served and none is named; add store=NAME, one of run, other",
        )
        found = server.get("/scores", store="other", less="run", **query).json
    one = directions()[1]
    unit = np.asarray(one.values, np.float64) / np.linalg.norm(np.asarray(one.values, np.float64))
    assert {r["rollout_id"] for r in found["rollouts"]} == {"twin-a", "twin-b"}
    for rollout in found["rollouts"]:
        name = rollout["rollout_id"]
        other = making.values(making.RESIDUAL, 5, BY_ID[name], version=7).astype(np.float64) @ unit
        np.testing.assert_allclose(rollout["values"][0], other - exact(name, one), rtol=1e-3, atol=1e-4)
