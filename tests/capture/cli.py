"""The capture command as tests use it: in this process for speed, as a process of its own where it is killed."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from capture.commands import app
from datastore import console
from tests import forked
from tests.forked import Forked


class Result(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Command = Callable[..., Result]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `python -m capture` with these words in this process."""
    return lambda *words: run(capsys, *words)


def run(capsys: pytest.CaptureFixture[str], *words: object) -> Result:
    """Run `python -m capture` with these words in this process."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        console.run(app, [str(word) for word in words])
    out, err = capsys.readouterr()
    code = left.value.code
    assert isinstance(code, int)
    return Result(code, out, err)


def start(*words: object, **environ: str) -> Forked:
    """Start `python -m capture` with these words as a process of its own."""
    return forked.start("capture", *words, errors=None, environment=None, **environ)


def wait_for(found: Callable[[], bool], process: Forked, *, seconds: float = 120) -> None:
    """Wait until something is there that a running process makes."""
    end = time.monotonic() + seconds
    while not found():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.002)


def chunks(store: Path) -> list[Path]:
    """Chunk files of components in plans that are not committed yet."""
    found = store.with_name(f"{store.name}.plans").glob("*/group/residual/c/*/*/*")
    return [file for file in found if file.suffix != ".partial"]  # what is written, or was by a process that was killed


def contents(store: Path) -> dict[str, bytes]:
    """Every file of a store; when it was made is left out."""
    return {
        file.relative_to(store).as_posix(): (_undated if file.name == "zarr.json" else bytes)(file.read_bytes())
        for file in sorted(store.rglob("*"))
        if file.is_file()
    }


def _undated(raw: bytes) -> bytes:
    meta = json.loads(raw)
    meta.get("attributes", {}).pop("created", None)
    return json.dumps(meta).encode()
