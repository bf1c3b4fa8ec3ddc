"""How benchmarks measure: alternated rounds, medians, cold files, peak memory of a process, one table."""

import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from datastore import console

__all__ = ["Row", "alternate", "chill", "peak_rss", "read_bytes", "show", "size_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One claim: what was measured, its rival, and what the ratio must be; no target where it is only printed."""

    what: str
    value: float
    unit: str
    rival: str
    rival_value: float
    ratio: float
    target: float | None = None
    at_most: bool = False

    @classmethod
    def of(
        cls,
        what: str,
        value: float,
        unit: str,
        rival: str,
        rival_value: float,
        target: float | None = None,
        *,
        at_most: bool = False,
    ) -> "Row":
        """Set a value beside its rival's."""
        return cls(
            what=what,
            value=value,
            unit=unit,
            rival=rival,
            rival_value=rival_value,
            ratio=value / rival_value,
            target=target,
            at_most=at_most,
        )

    @property
    def holds(self) -> bool | None:
        """Whether the target is met; None without one."""
        if self.target is None:
            return None
        return self.ratio <= self.target if self.at_most else self.ratio >= self.target


def alternate(
    tasks: Mapping[str, Callable[[], object]], *, rounds: int, before: Callable[[], None] | None = None
) -> dict[str, float]:
    """Time each task once a round, in turn, and return the median seconds of each.

    Parameters
    ----------
    tasks : mapping of name to callable
    rounds : int
    before : callable, optional
        Run before each timing, untimed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, task in tasks.items():
            if before is not None:
                before()
            began = time.perf_counter()
            task()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in seconds.items()}


def chill(paths: Iterable[Path]) -> None:
    """Drop files from the page cache; they must be on disk already."""
    for path in paths:
        for file in path.rglob("*") if path.is_dir() else [path]:
            if file.is_file():
                descriptor = os.open(file, os.O_RDONLY)
                os.fdatasync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files below a directory."""
    return path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


def read_bytes() -> int:
    """Return the bytes that this process has asked the system to read so far."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def peak_rss(module: str, *arguments: str, every: float = 0.01) -> int:
    """Run `python -m module arguments` and return the most memory it held, in bytes, its children included.

    Looking, which happens every so many seconds, costs a few milliseconds of a core.
    """
    process = psutil.Popen([sys.executable, "-m", module, *arguments], stdout=subprocess.DEVNULL)
    peak, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(every):
            with suppress(psutil.Error):
                family = [process, *process.children(recursive=True)]
                peak[0] = max(peak[0], sum(p.memory_info().rss for p in family))

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    stop.set()
    watcher.join()
    if code:
        raise RuntimeError(f"{module} {' '.join(arguments)} failed with exit code {code}")
    return peak[0]


def show(title: str, rows: list[Row], *, as_json: bool) -> None:
    """Print the rows as a table, or as JSON."""
    if as_json:
        console.emit_json({"title": title, "rows": [asdict(row) | {"holds": row.holds} for row in rows]})
        return
    from rich.table import Table

    table = Table("what", "measured", "against", "rival", "ratio", "target", "", title=title)
    for row in rows:
        limit = "" if row.target is None else f"{'<=' if row.at_most else '>='} {row.target:g} x"
        verdict = {None: "", True: "holds", False: "FALLS SHORT"}[row.holds]
        table.add_row(
            row.what,
            f"{row.value:.3g} {row.unit}",
            row.rival,
            f"{row.rival_value:.3g} {row.unit}",
            f"{row.ratio:.2f} x",
            limit,
            verdict,
        )
    console.stdout().print(table)
