"""Running `python -m calibrate` in this process."""

import json
from pathlib import Path
from typing import Any

import pytest

from calibrate.commands import app
from datastore import console


class Ran:
    """What a command printed, and its exit code."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def of(*words: str | Path) -> Ran:
        with pytest.raises(SystemExit) as ended:
            console.run(app, [str(word) for word in words])
        printed = capsys.readouterr()
        return Ran(int(ended.value.code or 0), printed.out, printed.err)

    return of
