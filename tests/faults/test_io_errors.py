"""A sample of the errors of the disk of `make bench-faults`, where there is a C compiler."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.eio import may_compile
from tests.faults.io_errors import io_errors


def test_a_call_that_fails_loses_nothing_and_is_told_in_one_sentence(tmp_path: Path) -> None:
    if not may_compile():
        pytest.skip("errors of the disk are not tested: they need cc and a system that preloads libraries")
    counts = io_errors(tmp_path, {"growth": 7, "calibrate": 2}, seed=4)
    assert {name: one.wrong for name, one in counts.items() if not one.ok} == {}
    assert sum(one.failed for one in counts.values()) >= 5
