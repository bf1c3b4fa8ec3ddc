"""The capture command where the CPU is taken for a device with memory of its own, and 512 << its rank tokens measured.

It measures when all that are expected do, so that each has looked for a remembered budget before any is there.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

from capture import budget, budgeting
from capture.commands import app
from datastore import console


def main() -> None:
    """Run the command that follows the directory to meet in and how many are expected there."""
    rank, meeting, expected = int(os.environ["RANK"]), Path(sys.argv.pop(1)), int(sys.argv.pop(1))

    def measure(*_: Any, **__: Any) -> budget.Measured:
        (meeting / str(rank)).touch()
        while len(list(meeting.iterdir())) < expected:
            time.sleep(0.01)
        return budget.Measured(fixed=0.0, per_token=1.0, row=1, free=1000 << rank)

    setattr(budgeting, "_is_measured", lambda device: True)  # noqa: B010 — the two are for this process alone
    setattr(budget, "measure", measure)  # noqa: B010
    console.run(app, sys.argv[1:])


if __name__ == "__main__":
    main()
