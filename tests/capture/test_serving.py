"""What a real server answers and refuses: captures, their queue and cancellation, the model, who may ask."""

import json
import re
import signal
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from capture import cache
from capture.client import Client, NoServerError, ServerError
from capture.messages import CaptureOrder
from tests import kimi
from tests.capture import cli, served, stored
from tests.capture.cli import Command, command
from tests.capture.served import EXPERIMENT, PROMPT_SET, Server

__all__ = ["command"]

TOKEN = "a secret"
SMALL = settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)
ALL = {"experiment": EXPERIMENT, "prompt_set": PROMPT_SET}
# A prompt may be too long for the model, and a model may not be there.
NOT_ALWAYS_ACCEPTED = ("/generate", "/model/load")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("served")
    model = kimi.save_kimi(top / "models" / "kimi", num_hidden_layers=12)
    kimi.save_kimi(top / "models" / "small")
    served.make_tree(top / "experiments", model, n_tokens=100)
    return top


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Server]:
    """One server for the module; it asks for a token."""
    server = Server(
        root / "models/kimi", root / "experiments", "--models-root", root / "models", "--chunk-tokens", 64, token=TOKEN
    )
    try:
        yield server.loaded()
        assert server.end(signal.SIGTERM) == 0
        # One test kills the process with the model; nothing else may go wrong.
        wrong = [line for line in server.log.splitlines() if re.search("ERROR|Traceback", line)]
        assert not [line for line in wrong if "the process that holds the model was ended by SIGKILL" not in line], (
            wrong
        )
    finally:
        server.kill()


def send(server: Server, path: str, *, data: bytes | None = None, **headers: str) -> tuple[int, Any]:
    """Send a request with the token, and return the status and the answer's JSON."""
    marked = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}", **headers}
    request = urllib.request.Request(f"{server.url}{path}", data=data, headers=marked)
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def post(server: Server, order: dict[str, Any]) -> tuple[int, Any]:
    return send(server, "/capture", data=json.dumps(order).encode())


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"model_variant": "no"}, 422, "has no model variant 'no'; it has kimi_k2, other, tuned"),
        (
            {"model_variant": "other", "responses_from": "kimi_k2"},
            422,
            "is somebody/else, and this server holds ",
        ),
        (
            {"model_variant": "tuned", "responses_from": "kimi_k2"},
            422,
            "with the adapter somebody/adapter, and ",
        ),
        ({"prompt_ids": ["71", "72", "1000"]}, 422, "has no rollout 72, 1000 among the responses of 'kimi_k2'"),
        ({"prompt_ids": [str(i) for i in range(10_000)]}, 422, "prompt_ids: 10,000 ids are more than the 5,000"),
        ({"prompt_ids": []}, 422, "prompt_ids: "),
        ({"prompt_set": "no"}, 404, f"no responses of 'kimi_k2' to prompt set 'no'; prompt sets it has: {PROMPT_SET}"),
        ({"experiment": "no"}, 404, f"there is no experiment 'no' here; the server has: {EXPERIMENT}"),
        ({"experiment": "../experiments"}, 403, "'../experiments' leads out of the directory"),
        ({"experiment": "/etc"}, 403, "'/etc' leads out of the directory"),
        ({"experiment": f"{EXPERIMENT}/../../models"}, 403, "leads out of the directory"),
        ({"experiment": "a\0b"}, 422, "experiment: "),
        ({"prompt_set": "../../../../../models"}, 422, "is not a name inside the tree"),
        ({"store": "../elsewhere.zarr"}, 403, "store '../elsewhere.zarr' leads out of the directory"),
        ({"store": "/tmp/x.zarr"}, 403, "leads out of the directory"),
        ({"experiment": "ü" * 255}, 422, "holds a name of 510 bytes, and a file's has 255 at most; shorten it"),
        ({"prompt_set": "ü" * 255}, 422, "holds a name of 510 bytes"),
        ({"responses_from": "ü" * 255}, 422, "holds a name of 510 bytes"),
        ({"store": f"{'a' * 300}.zarr"}, 422, "holds a name of 305 bytes"),
        ({"store": "here"}, 422, "is not called like a store; give a name that ends in .zarr"),
        ({"output_suffix": "../x"}, 422, "output_suffix: "),
        ({"layers": "11-12"}, 422, "12"),
        ({"components": "residuum"}, 422, "the model has no component 'residuum'; it has residual, "),
        ({"promt_ids": ["71"]}, 422, "promt_ids: Extra inputs are not permitted"),
        ({"limit": 0}, 422, "limit: "),
    ],
)
def test_what_can_not_be_captured_is_refused_in_one_sentence(
    changes: dict[str, Any], code: int, message: str, server: Server
) -> None:
    status, answer = post(server, {**ALL, **changes})
    assert (status, list(answer)) == (code, ["detail", "task_id"])
    assert re.search(message, answer["detail"]), answer
    assert "\n" not in answer["detail"]
    assert server.client.health().active_evals == 0


def test_a_link_does_not_lead_out_either(server: Server, root: Path) -> None:
    outside = served.make_tree(root / "outside", root / "models/kimi", n_tokens=5)
    (root / "experiments/link").symlink_to(outside)
    try:
        status, answer = post(server, {**ALL, "experiment": "link"})
    finally:
        (root / "experiments/link").unlink()
    assert (status, "leads out of the directory" in answer["detail"]) == (403, True)


def test_bodies_that_are_no_request_are_refused(server: Server) -> None:
    status, answer = send(server, "/capture", data=b'{"experiment": ')
    assert (status, answer["detail"][:27]) == (422, "the request is not JSON: Ex"[:27])
    assert send(server, "/capture", data=b"[" * 100_000)[0] in (400, 422)
    status, answer = send(server, "/capture", data=b'{"experiment": "' + b"x" * (1 << 20) + b'"}')
    assert status == 413
    assert isinstance(answer["detail"], str)


def test_only_who_bears_the_token_and_comes_from_here_is_let_in(server: Server) -> None:
    status, answer = send(server, "/health", Authorization="Bearer another")
    assert (status, "bears no valid token" in answer["detail"]) == (401, True)
    assert send(server, "/tasks", Authorization="")[0] == 401
    assert send(server, "/health", Host="evil.example")[0] == 403
    assert send(server, "/health", Origin="http://evil.example")[0] == 403
    assert send(server, "/health")[0] == 200


def test_of_two_requests_at_once_one_is_told_of_the_other(server: Server, root: Path) -> None:
    order = {**ALL, "output_suffix": "twice", "layers": "2"}
    answers: list[tuple[int, Any]] = []
    threads = [threading.Thread(target=lambda: answers.append(post(server, order))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (good, started), (bad, refused) = sorted(answers, key=lambda answer: answer[0])
    assert (good, bad) == (200, 409)
    assert refused["task_id"] == started["task_id"]
    assert f"task {started['task_id']} captures into {started['store']} already" in refused["detail"]
    done = server.client.wait(started["task_id"])
    assert (done.status, done.captures) == ("completed", [1])
    assert stored.captures(Path(started["store"])) == [1]
    assert Path(started["store"]).name == f"{PROMPT_SET}_twice.zarr"


def test_a_capture_is_followed_cancelled_and_resumed_and_others_wait_for_it(
    server: Server, root: Path, command: Command
) -> None:
    client, order = (
        server.client,
        CaptureOrder.model_validate({**ALL, "store": "deep/cancelled.zarr", "components": "residual,mlp_out"}),
    )
    first = client.submit(order)
    second = client.capture(EXPERIMENT, PROMPT_SET, store="second.zarr")
    third = client.capture(EXPERIMENT, PROMPT_SET, store="third.zarr", prompt_ids=["71"])
    assert (second.ahead, third.ahead) == (1, 2)
    with pytest.raises(ServerError, match=f"task {first.task_id} needs the model"):
        client.load_model(str(root / "models/small"))
    assert client.cancel(second.task_id).status == "cancelled"
    seen = []
    for status in client.events(first.task_id):
        seen.append(status)
        if status.progress.raw_bytes:
            client.cancel(first.task_id)
    assert [one.status for one in (seen[0], seen[-1])] in (["starting", "cancelled"], ["running", "cancelled"])
    sizes = [one.progress.raw_bytes for one in seen]
    assert sizes == sorted(sizes)
    assert 0 < sizes[-1] < seen[-1].progress.raw_bytes_total
    assert "send the same request again" in (seen[-1].error or "")
    assert client.cancel(first.task_id).elapsed == seen[-1].elapsed
    assert client.wait(third.task_id).captures == [1]

    again = client.submit(order)
    done = client.wait(again.task_id)
    assert (done.status, done.resumes, done.captures) == ("completed", first.task_id, [1])
    progress = done.progress
    assert (progress.rollouts, progress.tokens) == (25, progress.tokens_total)
    assert progress.raw_bytes == progress.raw_bytes_total == progress.tokens * 2 * 12 * 64 * 2
    alone = root / "alone.zarr"
    words = ("--components", "residual,mlp_out", "--chunk-tokens", 64, "--batch-tokens", 256)
    told = command(
        "--experiment", root / "experiments" / EXPERIMENT, "--prompt-set", PROMPT_SET, "--store", alone, *words
    )
    assert told.code == 0, told.err
    assert cli.contents(Path(done.store)) == cli.contents(alone)


def test_what_the_store_has_is_skipped_or_captured_again(server: Server) -> None:
    client, ids = server.client, ["1", "2"]
    order = {**ALL, "store": "skipped.zarr", "layers": "3", "prompt_ids": ids}
    made = [
        client.wait(client.submit(CaptureOrder.model_validate({**order, **more})).task_id)
        for more in ({}, {"skip_existing": True}, {"skip_existing": False})
    ]
    assert [one.captures for one in made] == [[1], [], [2]]
    assert [one.skipped for one in made] == [0, 2, 0]
    assert [one.progress.of for one in made] == [2, 0, 2]


def test_the_commands_say_what_the_server_says(server: Server, command: Command) -> None:
    where = ("--url", server.url, "--token", TOKEN)
    words = ("submit", "--experiment", EXPERIMENT, "--prompt-set", PROMPT_SET, "--layers", "1", "--store", "cli.zarr")
    followed = command(*words, "--ids", "1,2", "--watch", *where)
    assert (followed.code, "completed" in followed.out, "2 of 2 rollouts" in followed.out) == (0, True, True)
    task = command(*words, "--ids", "3", "--json", *where).json
    assert command("watch", task["task_id"], *where).code == 0
    assert command("status", task["task_id"], "--json", *where).json["status"] == "completed"
    assert task["task_id"] in command("status", *where).out
    assert command("cancel", task["task_id"], *where).out == f"task {task['task_id']}: completed\n"
    refused = command(*words, "--ids", "4", *where)
    assert (refused.code, "has no rollout 4" in refused.err) == (2, True)
    assert (command("watch", "00000000", *where).code, command("status", "x", *where).code) == (2, 2)
    silent = command("status", "--url", "http://127.0.0.1:9")
    assert (silent.code, "start a server with python -m capture serve" in silent.err) == (1, True)


def test_greedy_sampling_is_that_of_the_model_multiplied_out(server: Server, root: Path) -> None:
    model = kimi.plain_model(root / "models/kimi")
    head = kimi.read_shards(root / "models/kimi")["lm_head.weight"]
    ids, expected = torch.tensor([[1 * 0 + 5, 7, 11]]), []
    for _ in range(4):
        logits = model(input_ids=ids, use_cache=False).last_hidden_state[0, -1] @ head.T
        best = logits.float().topk(2)
        assert best.values[0] > best.values[1], "a tie would not tell"
        expected.append(int(best.indices[0]))
        ids = torch.cat([ids, best.indices[None, :1]], dim=1)
    words = server.client.generate(["w5 w7 w11"], max_new_tokens=4)[0].split()
    assert words == [f"w{i}" for i in expected]
    assert len(server.client.generate(["w5", "w6"], max_new_tokens=2, temperature=1.0)) == 2
    with pytest.raises(ServerError, match="more than the 4096 of kimi; shorten the prompt"):
        server.client.generate(["w5"], max_new_tokens=8000)


def test_a_process_that_is_lost_is_named_and_replaced(server: Server) -> None:
    client = server.client
    task = client.capture(EXPERIMENT, PROMPT_SET, store="lost.zarr", components="residual,mlp_out")
    server.wait(lambda: client.status(task.task_id).progress.raw_bytes)
    (child,) = server.children()
    child.kill()
    ended = client.wait(task.task_id)
    assert ended.status == "failed"
    assert "the process that holds the model was ended by SIGKILL" in (ended.error or "")
    again = client.capture(EXPERIMENT, PROMPT_SET, store="lost.zarr", components="residual,mlp_out")
    assert client.wait(again.task_id).captures == [1]
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_another_model_takes_the_place_of_this_one_only_if_it_is_there(server: Server, root: Path) -> None:
    client, here = server.client, str(root / "models/kimi")
    assert client.load_model(here).status == "already_loaded"
    for elsewhere in (str(root / "experiments"), "~nobody-of-that-name"):
        with pytest.raises(ServerError, match="leads out of the directory"):
            client.load_model(elsewhere)
    with pytest.raises(ServerError, match="holds a name of 300 bytes, and a file's has 255 at most"):
        client.load_model(f"/{'x' * 300}")
    with pytest.raises(ServerError, match=r"nobody/has-this (can't|has no config)"):
        client.load_model("nobody/has-this")
    assert client.health().model == here
    assert client.health().loaded
    small = str(root / "models/small")
    assert client.load_model(small).status == "loaded"
    assert client.health().model == small
    with pytest.raises(ServerError, match=f"and this server holds {small}"):
        client.capture(EXPERIMENT, PROMPT_SET)
    assert client.load_model(here).status == "loaded"


def keep_to_the_schema(url: str, *, paths: set[str], headers: dict[str, str], arrange: Callable[[Any], object]) -> None:
    """Send what the server's own schema allows and what it does not to some addresses, and check each answer by it.

    `arrange` may change a case first: what only takes long is no matter of the schema.
    """
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json", headers=headers)
    results: list[Any] = list(schema.get_all_operations())
    found = [one.ok() for one in results]
    assert len(found) == 9
    assert paths <= {operation.path for operation in found}
    for operation in found:
        if operation.path not in paths:
            continue

        @settings(parent=SMALL)
        @given(case=operation.as_strategy())
        def keeps(case: Any) -> None:
            arrange(case)
            excluded = [positive_data_acceptance] if case.operation.path in NOT_ALWAYS_ACCEPTED else []
            case.call_and_validate(headers=headers, excluded_checks=excluded, timeout=600)

        keeps()


def test_the_server_keeps_to_its_own_schema(server: Server) -> None:
    def few_tokens(case: Any) -> None:
        if case.operation.path == "/generate" and isinstance(case.body, dict):
            asked = case.body.get("max_new_tokens", 256)
            case.body["max_new_tokens"] = 2 if isinstance(asked, int) and 1 <= asked <= 8192 else asked

    headers = {"Authorization": f"Bearer {TOKEN}"}
    paths = {"/health", "/capture", "/generate", "/tasks", "/eval/status/{task_id}"}
    paths |= {"/tasks/{task_id}/cancel", "/tasks/{task_id}/events"}
    keep_to_the_schema(server.url, paths=paths, headers=headers, arrange=few_tokens)


def test_loading_and_saving_keep_to_the_schema_too_and_an_idle_model_does_not_outlive_its_server(root: Path) -> None:
    """On a server of its own, for its model is replaced and saved; a kill of an idle one ends the test."""
    home, small = root / "home", root / "models/small"
    server = Server(small, root / "experiments", "--tasks", root / "fuzzed.sqlite", home=home)

    def of_here(case: Any) -> None:
        """Any name of the Hub costs a process that looks for it in vain: one of them is enough."""
        name = case.query.get("model_name") if case.operation.path == "/model/load" else None
        if isinstance(name, str) and re.fullmatch(r"[^\x00-\x1f/.~][^\x00-\x1f]*", name):
            case.query["model_name"] = str(small)

    try:
        keep_to_the_schema(server.loaded().url, paths={"/model/load", "/model/save"}, headers={}, arrange=of_here)
        (saved,) = (home / "activation_cache").iterdir()
        assert cache.verify(saved).of.n_layers == 3
        assert server.client.health().loaded
        with pytest.raises(ServerError, match="nobody/has-this"):
            server.client.load_model("nobody/has-this")
        children = server.children()
        server.end(signal.SIGKILL)
        assert children
        assert not psutil.wait_procs(children, timeout=30)[1]
    finally:
        server.kill()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--host", "0.0.0.0"), 2, "requests must bear a token"),
        (("--experiments-root", "nowhere"), 2, "nowhere is not a directory"),
    ],
)
def test_a_server_that_may_not_start_says_why(
    words: tuple[str, ...], code: int, message: str, command: Command
) -> None:
    told = command("serve", "--model", "m", *words)
    assert (told.code, message in told.err) == (code, True), told.err


def test_a_taken_port_is_said_before_anything_is_loaded(server: Server, root: Path, command: Command) -> None:
    words = ("--experiments-root", root / "experiments", "--port", server.port)
    told = command("serve", "--model", root / "models/kimi", *words)
    assert (told.code, f"port {server.port} of 127.0.0.1 can't be used" in told.err) == (1, True)


def test_a_model_that_can_not_be_loaded_ends_the_server(root: Path) -> None:
    shard = root / "models/small/model-00002-of-00002.safetensors"
    aside = shard.rename(root / "aside")
    try:
        server = Server(root / "models/small", root / "experiments", "--tasks", root / "other.sqlite")
        assert server.process.wait(timeout=300) == 1
    finally:
        server.kill()
        aside.rename(shard)
    assert re.search(r"ERROR no model: .*model-00002-of-00002", server.log), server.log
    assert "Traceback" not in server.log


def test_a_client_of_nothing_says_so() -> None:
    with pytest.raises(NoServerError, match=r"no answer from http://127\.0\.0\.1:9 "):
        Client("http://127.0.0.1:9").health()
    with pytest.raises(Exception, match="is not an address of a server"):
        Client("ftp://x")
