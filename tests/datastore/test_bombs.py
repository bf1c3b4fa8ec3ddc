"""Small files that unpack to gigabytes, and metadata of 10^15 rows: refused in one sentence, the memory never taken.

A process of its own reads each store and tells the most memory that it ever had: what an array was merely asked for and
never filled does not count, what was decoded does.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numcodecs
import numpy as np
import pytest
import xarray as xr
from numcodecs.blosc import Blosc

import datastore
import project
from datastore.errors import DatastoreError
from datastore.results import publish_result, read_results
from datastore.scores import load_results
from datastore.verify import verify
from tests.datastore import making
from tests.project.stores import direction

ROOT = Path(__file__).parents[2]
MB = 1 << 20
GROWTH = 400 * MB
"""Bytes that reading one may take beyond what the libraries do; each unpacks to 1 GB or more."""
LIMIT = 6 << 30
"""Address space that the reader may take more: a bomb that goes off is an error of it, not a machine that swaps."""
CAPTURE, CALIBRATION, SCORES = Path("captures/0001"), Path("calibration/0001"), Path("scores/0001")


class Bomb(NamedTuple):
    """An array of a store that is made to claim more than it should.

    Attributes
    ----------
    group, array : path
        The group with the consolidated metadata, and the array in it.
    shape, chunks : sequence of int
    unpacked : int
        Bytes that each chunk there really unpacks to; 0 leaves the chunks as they are.
    reader : str
        Of `READERS`.
    """

    group: Path
    array: str
    shape: Sequence[int]
    chunks: Sequence[int]
    unpacked: int
    reader: str


ROWS = 5 << 20
BOMBS = {
    "a chunk of a component": Bomb(CAPTURE, "residual", (40 * MB, 2, 16), (40 * MB, 1, 16), 1280 * MB, "blocks"),
    "the same, selected": Bomb(CAPTURE, "residual", (40 * MB, 2, 16), (40 * MB, 1, 16), 1280 * MB, "select"),
    "a component of 10^15 tokens": Bomb(CAPTURE, "residual", (10**15, 2, 16), (16, 1, 16), 0, "verify"),
    "a chunk of statistics": Bomb(
        CAPTURE, "stats/residual/sum", (ROWS, 2, 2, 16), (ROWS, 2, 1, 16), 1280 * MB, "statistics"
    ),
    "statistics of 10^15 rows in one": Bomb(
        CAPTURE, "stats/residual/sum", (10**15, 2, 2, 16), (10**15, 2, 1, 16), 0, "statistics"
    ),
    "norms of 10^15 tokens in one": Bomb(CAPTURE, "stats/residual/norm", (10**15, 2), (10**15, 1), 0, "verify"),
    "a column of a table": Bomb(CAPTURE, "rollouts/n_tokens", (256 * MB,), (8 * MB,), 64 * MB, "open"),
    "a calibration in one chunk": Bomb(CALIBRATION, "mean", (10 * MB, 16), (10 * MB, 16), 1280 * MB, "calibration"),
    "a calibration in many chunks": Bomb(CALIBRATION, "mean", (16 * MB, 16), (MB // 2, 16), 64 * MB, "calibration"),
    "a calibration of 10^15 layers": Bomb(CALIBRATION, "mean", (10**15, 16), (2, 16), 0, "calibration"),
    "a chunk of scores": Bomb(SCORES, "score", (320 * MB, 1), (320 * MB, 1), 1280 * MB, "scores"),
    "scores of 10^15 tokens in one": Bomb(SCORES, "score", (10**15, 1), (10**15, 1), 0, "scores"),
    "directions of scores": Bomb(SCORES, "vectors/residual", (32 * MB, 16), (MB, 16), 64 * MB, "directions"),
}


def statistics(store: Path) -> None:
    for layer in (1, 5):
        list(datastore.open(store).statistics("residual", layer))


def blocks(store: Path) -> None:
    for block in datastore.open(store).blocks("residual", layers=1):
        block.values.sum()


def scores(store: Path) -> None:
    float(datastore.open(store).scores()["score"].sum())


def directions(store: Path) -> None:
    (result,) = load_results(store)
    result.vectors("residual").sum()


def problems(store: Path) -> None:
    found = verify(store, full=True).problems
    if found:
        raise DatastoreError(str(found[0]))


READERS: dict[str, Callable[[Path], object]] = {
    "open": lambda store: datastore.open(store).rollouts,
    "blocks": blocks,
    "select": lambda store: datastore.open(store).select("residual", layers=1).values.sum(),
    "statistics": statistics,
    "calibration": lambda store: read_results(store, "calibration"),
    "scores": scores,
    "directions": directions,
    "verify": problems,
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bombs") / "sound.zarr"
    making.capture(path, making.rollouts(5, 17, 3))
    mean = xr.Dataset({"mean": (("layer", "hidden"), np.ones((2, 16)))}, coords={"layer": [1, 5]})
    publish_result(path, "calibration", mean, attrs={"component": "residual"})
    project.scores(datastore.open(path), [direction("tone/dry", 1, width=16)], dims=())
    for read in READERS.values():
        read(path)
    return path


def armed(sound: Path, store: Path, bomb: Bomb) -> Path:
    """Copy a store with one array changed, in its own description and in the group's, and its chunks if asked."""
    shutil.copytree(sound, store)
    group, array = store / bomb.group, store / bomb.group / bomb.array
    top, own = json.loads((group / "zarr.json").read_text()), json.loads((array / "zarr.json").read_text())
    known = top.get("consolidated_metadata", {}).get("metadata", {})
    for meta in [own, *([known[bomb.array]] if bomb.array in known else [])]:
        meta["shape"] = list(bomb.shape)
        meta["chunk_grid"]["configuration"]["chunk_shape"] = list(bomb.chunks)
    (group / "zarr.json").write_text(json.dumps(top))
    (array / "zarr.json").write_text(json.dumps(own))
    if bomb.unpacked:
        first, *others = chunk_files(array, bomb)
        shutil.rmtree(array / "c")
        first.parent.mkdir(parents=True)
        first.write_bytes(zeros(bomb.unpacked))
        assert first.stat().st_size < bomb.unpacked // 100
        for other in others:
            other.parent.mkdir(parents=True, exist_ok=True)
            os.link(first, other)
    return store


@cache
def zeros(n_bytes: int) -> bytes:
    """Return a chunk of zeros, its checksum right."""
    packed = Blosc(cname="zstd", typesize=8).encode(np.zeros(n_bytes, np.uint8))
    return bytes(numcodecs.CRC32C(location="end").encode(packed))


def chunk_files(array: Path, bomb: Bomb) -> Iterator[Path]:
    for index in np.ndindex(*(-(-n // size) for n, size in zip(bomb.shape, bomb.chunks, strict=True))):
        yield array.joinpath("c", *map(str, index))


@pytest.fixture(scope="module")
def found(sound: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What a process that reads every store says of each: the error, and the growth of its peak memory."""
    root = tmp_path_factory.mktemp("armed")
    stores = [armed(sound, root / f"{i}.zarr", bomb) for i, bomb in enumerate(BOMBS.values())]
    asked = json.dumps([[str(store), bomb.reader] for store, bomb in zip(stores, BOMBS.values(), strict=True)])
    words = [sys.executable, "-m", "tests.datastore.test_bombs", str(sound), asked]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(BOMBS, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("name", BOMBS)
def test_it_is_refused_and_never_unpacked(name: str, found: dict[str, dict[str, Any]]) -> None:
    said = found[name]
    assert said["kind"] == "DatastoreError", said
    assert "\n" not in said["text"]
    assert said["growth"] < GROWTH, said


def tell(store: Path, reader: str) -> dict[str, Any]:
    """Read a store and say how it ended, and by how much the process grew at most meanwhile."""
    kind, text = "nothing", ""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what there is
    before = peak()
    try:
        READERS[reader](store)
    except DatastoreError as error:
        kind, text = "DatastoreError", str(error)
    except Exception as error:
        kind, text = type(error).__name__, str(error)
    return {"kind": kind, "text": text, "growth": peak() - before}


def peak() -> int:
    """Return the most memory that this process had since its peak was last cleared, in bytes."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def main(sound: str, asked: str) -> None:
    """Read a sound store in every way, then those that were asked for."""
    for read in READERS.values():
        read(Path(sound))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + LIMIT, resource.RLIM_INFINITY))
    print(json.dumps([tell(Path(store), reader) for store, reader in json.loads(asked)]))


if __name__ == "__main__":
    main(*sys.argv[1:])
