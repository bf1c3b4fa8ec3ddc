"""A sample of the full disks of `make bench-faults`, where a disk may be mounted."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.disk import may_mount, shortages


def test_a_disk_that_is_full_loses_nothing_and_says_how_much_room_is_needed(tmp_path: Path) -> None:
    if not may_mount(tmp_path / "try"):
        pytest.skip("no disk may be mounted here")
    counts = shortages(tmp_path, {"growth": 3, "compact": 2}, seed=3)
    assert {name: one.wrong for name, one in counts.items() if not one.ok} == {}
    assert sum(one.full for one in counts.values()) >= 2
