"""The Hub: a snapshot is used at its commit, a cache is pushed and pulled, and what is in the way is said.

Processes of their own speak to a Hub of this machine, as `huggingface_hub` speaks to the real one.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from capture import cache
from tests import forked, kimi
from tests.capture.hubserver import Hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHARD = "model-00002-of-00002.safetensors"


@pytest.fixture
def hub() -> Iterator[Hub]:
    one = Hub()
    try:
        yield one
    finally:
        one.stop()


class Done(NamedTuple):
    """A process that has ended."""

    returncode: int
    stdout: str
    stderr: str


def done(module: str, *words: object, environment: dict[str, str]) -> Done:
    process = forked.start(module, *words, environment=environment)
    out, err = process.communicate(timeout=300)
    return Done(process.wait(), out, err)


def loading(environment: dict[str, str], *revisions: str) -> Done:
    return done("tests.capture.told_of_load", *revisions, environment=environment)


def load(environment: dict[str, str], *revisions: str) -> list[dict[str, Any]]:
    ended = loading(environment, *revisions)
    assert ended.returncode == 0, ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines()]


def manage(environment: dict[str, str], *words: object) -> Done:
    return done("capture", "cache", *words, environment=environment)


def test_a_snapshot_is_loaded_at_its_commit_and_a_missing_shard_is_named(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--owner--tiny"
    snapshot = repository / "snapshots" / COMMIT
    shutil.copytree(kimi.save_kimi(tmp_path / "k", shards=3), snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    (said,) = load(environment, "-")
    assert (said["model"], said["revision"], said["weights_sha256"]) == ("owner/tiny", COMMIT, None)
    (snapshot / "model-00002-of-00003.safetensors").unlink()
    ended = loading(environment, "-")
    assert ended.returncode != 0
    assert "lacks 1 of 3 shards, model-00002-of-00003.safetensors the first" in ended.stderr


def test_a_revision_is_pinned_and_recorded_and_once_it_is_here_the_hub_is_not_asked(hub: Hub, tmp_path: Path) -> None:
    first = hub.put("owner/tiny", kimi.save_kimi(tmp_path / "first"))
    second = hub.put("owner/tiny", kimi.save_kimi(tmp_path / "second", num_hidden_layers=2))
    environment = hub.environment(tmp_path / "home")
    old, new = load(environment, first, "-")
    assert (old["revision"], old["n_layers"]) == (first, 3)
    assert (new["revision"], new["n_layers"]) == (second, 2)
    of_first = [one for one in hub.asked if f"/resolve/{first}/model-" in one and one.startswith("GET")]
    assert len(of_first) == 2, "its two shards, at the commit itself"
    assert not [one for one in hub.asked if "/resolve/main/model-" in one], "a branch may move between two files"

    hub.asked.clear()
    assert load({**environment, "HF_HUB_OFFLINE": "1"}, first, "-") == [old, new]
    assert hub.asked == []
    empty = loading(hub.environment(tmp_path / "empty", HF_HUB_OFFLINE="1"), first)
    assert (empty.returncode, hub.asked) == (1, [])
    assert "owner/tiny" in empty.stderr


def fetch_in_vain(hub: Hub, there: dict[str, str], home: Path, *, rest: int) -> None:
    """Pull to a machine that has nothing: first its disk has no room, then it is killed when `rest` bytes are there."""
    hub.exaggerates = "rest.safetensors"
    full = manage(there, "build", "owner/tiny", "--from-hub", "owner/cache")
    assert (full.returncode, hub.fetched("rest.safetensors")) == (1, [])
    assert "owner/cache takes 1,125,899," in full.stderr
    assert "nothing was downloaded" in full.stderr
    hub.exaggerates = ""

    hub.stalls = "layers-from-000.safetensors"
    blobs = home / "hub" / "models--owner--cache" / "blobs"
    process = forked.start("capture", "cache", "build", "owner/tiny", "--from-hub", "owner/cache", environment=there)
    end = time.monotonic() + 300
    while not (hub.fetched(hub.stalls) and rest in [file.stat().st_size for file in blobs.glob("*[!e]")]):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    process.kill()
    process.communicate(timeout=300)
    hub.stalls = ""
    assert not (home / "activation_cache").exists(), "half of a cache is put nowhere"


def test_a_cache_is_pushed_and_pulled_elsewhere_with_the_same_bits(hub: Hub, tmp_path: Path) -> None:
    commit = hub.put("owner/tiny", kimi.save_kimi(tmp_path / "model"))
    here, there = hub.environment(tmp_path / "here"), hub.environment(tmp_path / "there")
    pushed = manage(here, "build", "owner/tiny", "--to-hub", "owner/cache")
    assert pushed.returncode == 0, pushed.stderr
    repository = hub.repositories["owner/cache"]
    (place,) = (tmp_path / "here" / "activation_cache").iterdir()
    _, commit_of_cache = repository.commits
    there_now = repository.commits[commit_of_cache]
    assert f"pushed: {hub.url}/owner/cache/commit/{commit_of_cache}" in pushed.stderr
    assert repository.private
    assert there_now == {
        ".gitattributes": there_now[".gitattributes"],
        **{file.name: file.read_bytes() for file in place.iterdir()},
    }
    assert len(hub.fetched(SHARD)) == 1

    fetch_in_vain(hub, there, tmp_path / "there", rest=cache.read(place).files["rest.safetensors"])
    pulled = manage(there, "build", "owner/tiny", "--from-hub", "owner/cache", "--json")
    assert pulled.returncode == 0, pulled.stderr
    assert len(hub.fetched("rest.safetensors")) == 1, "what was whole is not fetched again"
    assert len(hub.fetched("layers-from-000.safetensors")) == 2
    directory = Path(json.loads(pulled.stdout)["directory"])
    assert cache.verify(directory).of.revision == commit
    for file in place.iterdir():
        assert (directory / file.name).read_bytes() == file.read_bytes()

    (loaded,) = load(there, "-")
    assert len(hub.fetched(SHARD)) == 1, "the model's own weights were never needed there"
    plain = hub.environment(tmp_path / "plain")
    assert [loaded] == load(plain, "-")
    assert len(hub.fetched(SHARD)) == 2


def test_who_may_not_push_is_told_and_a_bad_cache_is_not_put_in_place(hub: Hub, tmp_path: Path) -> None:
    hub.put("owner/tiny", kimi.save_kimi(tmp_path / "model"))
    environment = hub.environment(tmp_path / "home")
    refused = manage({**environment, "HF_TOKEN": "hf_another"}, "build", "owner/tiny", "--to-hub", "owner/cache")
    assert refused.returncode == 1
    assert "the cache could not be pushed to owner/cache: " in refused.stderr
    (place,) = (tmp_path / "home" / "activation_cache").iterdir()
    file, before = place / "rest.safetensors", (place / "manifest.json").read_bytes()
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    hub.put("owner/cache", place)
    file.write_bytes(good)
    pulled = manage(environment, "build", "owner/tiny", "--from-hub", "owner/cache")
    assert pulled.returncode == 1
    assert "a byte of it has changed" in pulled.stderr
    assert (file.read_bytes(), (place / "manifest.json").read_bytes()) == (good, before), "the good one stays"
