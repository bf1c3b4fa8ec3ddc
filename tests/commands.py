"""Our commands in this process: one of its own loads torch for eight seconds first, which few tests are about."""

import importlib
import sys
from typing import NoReturn

import pytest

__all__ = ["here"]


def here(package: str, *words: object) -> int:
    """Run `python -m PACKAGE WORDS` in this process, and return its exit code."""

    def run() -> NoReturn:
        importlib.import_module(f"{package}.__main__").main()
        raise AssertionError("a command ends with an exit code")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [package, *map(str, words)])
        with pytest.raises(SystemExit) as left:
            run()
    code = left.value.code
    assert isinstance(code, int), code
    return code
