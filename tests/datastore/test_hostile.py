"""Stores that someone made to do harm: refused in one sentence, within bounded memory and time, and nothing waits."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numcodecs.blosc import Blosc

import datastore
from datastore import storage
from datastore.errors import CorruptError, DatastoreError
from datastore.plainfile import MOST_CHUNK
from datastore.verify import verify
from tests.datastore import making

CAPTURE = Path("captures/0001")
ROOM = 1 << 30
"""Bytes of address space that reading may take beyond what the process has; the stores claim terabytes."""

Harm = Callable[[Path], object]


def everything(path: Path) -> None:
    """Ask a store for all that it has."""
    store = datastore.open(path)
    assert len(store.rollouts) == 3
    assert store.annotations is not None
    store.tokens("1")
    for layer in (1, 5):
        for block in store.blocks("residual", layers=layer):
            assert block.values.size
        list(store.statistics("residual", layer))
    assert np.asarray(store.select("k_proj", rollouts="1", layers=1).values).shape == (17, 6)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hostile") / "sound.zarr"
    making.capture(path, making.rollouts(5, 17, 3))
    everything(path)
    return path


@pytest.fixture
def store(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "run.zarr")


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Let the process grow by `ROOM` at most, so that a bomb is an error and not a machine that swaps."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + ROOM, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def described(name: str, **changed: Any) -> Harm:
    """Change an array's metadata, in its own zarr.json and in the consolidated one."""

    def change(meta: dict[str, Any]) -> None:
        meta.update({key: value for key, value in changed.items() if key != "chunks"})
        if "chunks" in changed:
            meta["chunk_grid"]["configuration"]["chunk_shape"] = changed["chunks"]

    def harm(store: Path) -> None:
        own, top = store / CAPTURE / name / "zarr.json", store / CAPTURE / "zarr.json"
        meta, group = json.loads(own.read_text()), json.loads(top.read_text())
        change(meta)
        change(group["consolidated_metadata"]["metadata"][name])
        own.write_text(json.dumps(meta))
        top.write_text(json.dumps(group))

    return harm


def written(name: str, data: bytes) -> Harm:
    return lambda store: (store / CAPTURE / name).write_bytes(data)


def huge(name: str) -> Harm:
    """A file of 20 GB that takes no room."""

    def harm(store: Path) -> None:
        with (store / CAPTURE / name).open("wb") as file:
            file.truncate(20 << 30)

    return harm


def instead(name: str, make: Harm) -> Harm:
    def harm(store: Path) -> None:
        (store / CAPTURE / name).unlink()
        make(store / CAPTURE / name)

    return harm


def linked(name: str, target: str) -> Harm:
    return instead(name, lambda path: path.symlink_to(target))


def bomb(n_bytes: int) -> bytes:
    """Return zeros as a chunk of text that unpacks a thousandfold, with a checksum that is right."""
    packed = Blosc(cname="zstd").encode(np.zeros(n_bytes, np.uint8))
    return bytes(numcodecs.CRC32C(location="end").encode(packed))


TABLE, COORDINATE, CHUNK = "rollouts/n_tokens", "token_id", "residual/c/0/0/0"
HARMS: dict[str, Harm] = {
    "a table of 10^15 rows": described(TABLE, shape=[10**15]),
    "a table in one chunk of 10^10 rows": described(TABLE, shape=[10**10], chunks=[10**10]),
    "a negative shape": described(TABLE, shape=[-3]),
    "a shape that is text": described(TABLE, shape="3"),
    "a component in chunks of 2^34 tokens": described("residual", chunks=[1 << 34, 1, 16]),
    "statistics 10^11 wide": described("stats/residual/sum", shape=[2, 2, 10**11], chunks=[2, 1, 10**11]),
    "a description of 20 GB": huge("zarr.json"),
    "a chunk of 20 GB": huge(CHUNK),
    "a table chunk of 20 GB": huge(f"{TABLE}/c/0"),
    "text that unpacks beyond bounds": written("rollouts/rollout_id/c/0", bomb(MOST_CHUNK + 1)),
    "text of other than its rows": written("rollouts/rollout_id/c/0", bomb(1 << 20)),
    "endless description": linked("zarr.json", "/dev/zero"),
    "endless chunk": linked(CHUNK, "/dev/zero"),
    "endless table": linked(f"{TABLE}/c/0", "/dev/zero"),
    "a pipe for a description": instead("zarr.json", os.mkfifo),
    "a pipe for a chunk": instead(CHUNK, os.mkfifo),
    "a pipe for a table": instead(f"{TABLE}/c/0", os.mkfifo),
    "a link to another's file": linked(CHUNK, "/etc/hostname"),
    "JSON nested without end": written("zarr.json", b'{"attributes":' + b"[" * 100_000),
    "no JSON object": written("zarr.json", b"[]"),
    "attributes that are null": written("zarr.json", b'{"attributes":null}'),
    "layers that are a number": written("zarr.json", b'{"attributes":{"layers":5}}'),
}


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("harm", HARMS)
def test_what_is_meant_to_harm_is_refused_and_found(store: Path, harm: str) -> None:
    """Reading raises our own error; verify names it and goes on. A pipe nobody writes to would hang the test."""
    HARMS[harm](store)
    with pytest.raises(DatastoreError) as refused:
        everything(store)
    assert "\n" not in str(refused.value)
    assert verify(store, full=True).problems


def test_a_capture_that_is_a_link_is_refused(store: Path, tmp_path: Path) -> None:
    (store / CAPTURE).rename(tmp_path / "elsewhere")
    (store / CAPTURE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorruptError, match=r"0001 is a link, which a store does not hold; put what it leads to"):
        datastore.open(store)


def test_bytes_beyond_what_a_chunk_can_have_are_not_read(tmp_path: Path) -> None:
    storage.write_array(tmp_path / "a", np.arange(5), dims=("row",))
    with (tmp_path / "a/c/0").open("ab") as file:
        file.truncate(1 << 20)
    with pytest.raises(CorruptError, match=r"has 1,048,576 bytes, where at most [\d,]+ can be; it was not read"):
        storage.read_array(tmp_path / "a")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every value of a JSON document."""
    yield path
    for key, one in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(one, (*path, key))


FILES = ("zarr.json", "rollouts/n_tokens/zarr.json", "residual/zarr.json", "stats/residual/sum/zarr.json",
         "token_id/zarr.json", "rollouts/labels/length/zarr.json", "vocab/offset/zarr.json")  # fmt: skip


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(FILES), place=st.floats(0, 1), value=values, remove=st.booleans())
def test_metadata_with_any_value_anywhere_reads_or_is_refused(
    sound: Path, tmp_path: Path, name: str, place: float, value: Any, remove: bool
) -> None:
    """Only our own errors come out of a store whose metadata someone edited."""
    store = tmp_path / "fuzzed.zarr"
    shutil.rmtree(store, ignore_errors=True)
    shutil.copytree(sound, store, copy_function=os.link)
    file = store / CAPTURE / name
    meta = json.loads(file.read_text())
    ways = list(places(meta))[1:]
    *way, last = ways[int(place * (len(ways) - 1))]
    inner = meta
    for key in way:
        inner = inner[key]
    if remove:
        del inner[last]
    else:
        inner[last] = value
    file.unlink()  # a link to the sound one
    file.write_text(json.dumps(meta))
    with suppress(DatastoreError, AssertionError):  # an assertion: it says that it holds something else
        everything(store)
    verify(store)
