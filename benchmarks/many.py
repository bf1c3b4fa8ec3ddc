"""`python -m benchmarks.many [N]`: a store of 1,000 captures of one rollout each: opened, compacted, read alike."""

import sys
import tempfile
import time
from pathlib import Path

import datastore
from benchmarks.measure import Row, show
from datastore.compact import compact, plan_compaction
from tests.datastore import making
from tests.faults.kills import cells
from tests.faults.tasks import TASKS


def main(n: int) -> None:
    """Make the captures, open the store, compact it; fail unless every cell has the bytes that it had."""
    with tempfile.TemporaryDirectory(prefix="bench-many-") as directory:
        root = Path(directory)
        path = root / "run.zarr"
        for i in range(n):
            making.capture(path, [making.rollout(f"r{i:04}", 3 + i % 4)], components=[making.RESIDUAL])
        before = cells(root, TASKS["capture"])
        began = time.perf_counter()
        assert len(datastore.open(path).rollouts) == n
        opened = time.perf_counter() - began
        began = time.perf_counter()
        numbers = compact(plan_compaction(path))
        compacted = time.perf_counter() - began
        same = cells(root, TASKS["capture"]) == before and len(before) == 2 * n
    what = f"open {n:,} captures of one rollout and their table"
    rows = [
        Row(
            what=what, value=opened, unit="s", rival="a second", rival_value=1.0, ratio=opened, target=1.0, at_most=True
        )
    ]
    show(f"many captures, compacted into {len(numbers)} in {compacted:.1f} s, read alike: {same}", rows, as_json=False)
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 1000)
