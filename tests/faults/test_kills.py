"""A sample of the kills of `make bench-faults`: nothing lost, nothing made up, nothing done twice."""

from __future__ import annotations

from pathlib import Path

from tests.faults.kills import campaign

KILLS = {"capture": 4, "growth": 4, "import": 2, "merge": 2, "compact": 3, "gc": 2}


def test_processes_killed_at_random_lose_nothing_and_go_on(tmp_path: Path) -> None:
    counts = campaign(tmp_path, KILLS, seed=20)
    assert {name: one.wrong for name, one in counts.items() if not one.ok} == {}
    assert sum(one.kills for one in counts.values()) >= 12
