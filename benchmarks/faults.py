"""`python -m benchmarks.faults`: kill processes, cut the power, fail and fill the disk; count what is lost: nothing.

Kills are SIGKILL of real processes at random instants. Power cuts are replayed from the recorded file operations of a
process: after every one of them, with what no sync followed lost or kept in any choice. Full disks are tmpfs mounts
that are too small by a random amount, which takes the right to mount. Errors of the disk come from a library that is
preloaded and fails the n-th open, read, write, sync, rename or listing, which takes a C compiler.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datastore import console
from tests.faults.blackout import blackouts
from tests.faults.disk import may_mount, shortages
from tests.faults.eio import may_compile
from tests.faults.io_errors import io_errors
from tests.faults.kills import campaign

KILLS = {"capture": 40, "growth": 40, "import": 30, "merge": 25, "compact": 35, "gc": 25, "model": 5}
BLACKOUTS = ["capture", "growth", "merge", "compact", "gc", "drop", "label"]
SHORTAGES = {"capture": 15, "growth": 15, "import": 10, "compact": 10}
IO_ERRORS = {"capture": 30, "growth": 30, "import": 30, "merge": 21, "compact": 30, "gc": 21, "drop": 14, "label": 14,
             "calibrate": 21, "project": 21}  # fmt: skip


def shares(counts: dict[str, int], share: float) -> dict[str, int]:
    """Return a share of the trials, at least one of each."""
    return {name: max(1, round(share * n)) for name, n in counts.items()}


def all_of(root: Path, *, seed: int, share: float, only: str | None) -> dict[str, dict[str, Any]]:
    """Run the campaigns and return their counts by campaign and task."""
    every = max(1, round(1 / share))
    campaigns: dict[str, Callable[[], dict[str, Any]]] = {
        "kill -9": lambda: campaign(root / "kills", shares(KILLS, share), seed=seed),
        "power cut": lambda: blackouts(root / "power", BLACKOUTS, seed=seed, every=every),
    }
    if may_compile():
        campaigns["error of the disk"] = lambda: io_errors(root / "errors", shares(IO_ERRORS, share), seed=seed)
    if may_mount(root / "try"):
        campaigns["full disk"] = lambda: shortages(root / "disk", shares(SHORTAGES, share), seed=seed)
    found: dict[str, dict[str, Any]] = {}
    for name, run in campaigns.items():
        if only is not None and only not in name:
            continue
        began = time.monotonic()
        found[name] = run()
        wrong = [task for task, one in found[name].items() if not one.ok]
        said = f"lost something in {', '.join(wrong)}" if wrong else "nothing lost"
        print(f"{name}: {said}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return found


def main() -> None:
    """Run, print the counts, and fail if one that should be 0 is not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="of the trials, such as 0.1")
    parser.add_argument("--only", metavar="NAME", help="kill, power, error or full")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-faults-") as directory:
        found = all_of(Path(directory), seed=asked.seed, share=asked.share, only=asked.only)
    ok = all(one.ok for counts in found.values() for one in counts.values())
    if asked.json:
        tables = {name: {task: asdict(one) for task, one in counts.items()} for name, counts in found.items()}
        console.emit_json({"seed": asked.seed, "ok": ok, **tables})
    else:
        _print(found)
    sys.exit(0 if ok else 1)


def _print(found: dict[str, dict[str, Any]]) -> None:
    from rich.table import Table

    for name, counts in found.items():
        columns = [field for field in asdict(next(iter(counts.values()))) if field != "wrong"]
        table = Table("task", *(column.replace("_", " ") for column in columns), title=name)
        for task, one in counts.items():
            table.add_row(task, *(f"{getattr(one, column):,}" for column in columns))
        table.add_row("all", *(f"{sum(getattr(one, column) for one in counts.values()):,}" for column in columns))
        console.stdout().print(table)
        for one in counts.values():
            for line in one.wrong[:5]:
                console.stdout().print(line, markup=False)
    if found.keys() >= {"kill -9", "power cut"}:
        lacking = {"error of the disk": "there is no C compiler", "full disk": "no disk may be mounted here"}
        for name in lacking.keys() - found.keys():
            console.stdout().print(f"{name}: not done, because {lacking[name]}")


if __name__ == "__main__":
    main()
