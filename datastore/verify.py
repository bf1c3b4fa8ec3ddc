"""Check a store against itself: shapes, coordinates, hashes, every chunk, and statistics against the bits.

The default check decodes every chunk of every array, so a bit that flipped and a file that was lost are found. Chunks
that were swapped decode. They are noticed by `full`, which computes the norm of every token again: it was written at
capture, so rows that are elsewhere than they were have other norms. What has no second witness in the store, such as a
label or a role that someone wrote anew with a valid checksum, can't be noticed.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from datastore import layout, storage
from datastore.bitcheck import ComponentCheck, chunk_tokens
from datastore.checks import check_description
from datastore.findings import DAMAGE, Problem, Subject
from datastore.maintenance import commit_drops
from datastore.union import Drop, gone, load_capture, load_drops

__all__ = ["Problem", "Report", "verify"]

AHEAD = 2
"""Chunks read ahead by each thread."""


@dataclass(slots=True, kw_only=True)
class Report:
    """What was checked and what was found.

    Attributes
    ----------
    full : bool
        Norms and statistics were computed again.
    captures, chunks, tokens, raw_bytes : int
        What was checked. Chunks and bytes are those of components, as far as any of their rows count.
    problems : list of Problem
    dropped : int or None
        The number under `dropped/` that says that what is broken no longer counts.
    """

    full: bool
    captures: int = 0
    chunks: int = 0
    tokens: int = 0
    raw_bytes: int = 0
    problems: list[Problem] = field(default_factory=list)
    dropped: int | None = None

    @property
    def ok(self) -> bool:
        """Whether anything was checked and nothing is wrong."""
        return not self.problems


def verify(
    path: str | os.PathLike[str],
    *,
    full: bool = False,
    repair: bool = False,
    threads: int | None = None,
    tick: Callable[[int, int], object] = lambda done, total: None,
) -> Report:
    """Check every capture of a store and everything added to it; go on after the first problem.

    Parameters
    ----------
    path : path
    full : bool
        Also compute norms and statistics from the bits and compare them with those kept.
    repair : bool
        Drop the rows that can't be trusted, in one commit, so that the same capture fills them again.
    threads : int, optional
        Default the CPUs of this process.
    tick : callable
        Told (chunks done, chunks in all).

    Raises
    ------
    NotAStoreError, NewerFormatError
        The path can't be checked at all.
    ReadOnlyError
        `repair` can't write.
    """
    store, report = Path(path), Report(full=full)
    storage.open_root(store)
    drops = _drops(store, report)
    subjects = _subjects(store, report, drops)
    total, done = sum(_n_chunks(one) for one in subjects), 0

    def read(raw_bytes: int) -> None:
        nonlocal done
        done += 1
        report.chunks += bool(raw_bytes)
        report.raw_bytes += raw_bytes
        tick(done, total)

    workers = threads or len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(workers) as pool:
        for subject in subjects:
            check_description(subject)
            for component in subject.union.components:
                ComponentCheck(subject, component, full=full, pool=pool, ahead=AHEAD * workers, tick=read).run()
            report.problems += subject.problems
    _check_added(store, report)
    if not report.problems and not report.chunks:
        report.problems.append(Problem(message=f"{store} holds no capture that counts, so nothing was checked"))
    if repair:
        _repair(store, report)
    return report


def _drops(store: Path, report: Report) -> list[Drop]:
    drops: list[Drop] = []
    for number in storage.numbered(store / "dropped"):
        try:
            drops += load_drops(store, [number])
        except DAMAGE as error:
            report.problems.append(Problem(message=f"dropped/{number:04d} is damaged: {error}; restore it from a copy"))
    return drops


def _subjects(store: Path, report: Report, drops: list[Drop]) -> list[Subject]:
    found = []
    for number in storage.numbered(store / "captures"):
        mine = [one for one in drops if number in one.captures]
        if number in gone(mine):
            continue
        report.captures += 1
        try:
            capture = load_capture(store / "captures" / f"{number:04d}", number)
            found.append(Subject(capture=capture, drops=mine))
            report.tokens += capture.ragged.n_tokens
            _ = capture.layers, capture.components, capture.batches, capture.model
        except DAMAGE as error:
            found = [one for one in found if one.capture.number != number]
            message = f"capture {number} can't be opened: {error}"
            report.problems.append(Problem(message=message, capture=number))
    return found


def _n_chunks(subject: Subject) -> int:
    """Return the chunks of all components whose arrays can be read."""
    total, capture = 0, subject.capture
    for name in subject.union.components:
        try:
            total += layout.n_chunks(capture.ragged.n_tokens, chunk_tokens(subject, name)) * len(capture.layers)
        except DAMAGE:
            continue  # its check will say so
    return total


def _check_added(store: Path, report: Report) -> None:
    """Decode whatever was added beside the captures: labels, annotations, calibrations, scores."""
    for kind in ("labels", "annotations", "calibration", "scores"):
        for number in storage.numbered(store / kind):
            for file in sorted((store / kind / f"{number:04d}").rglob("zarr.json")):
                try:
                    if storage.array_metadata(file.parent).get("node_type") == "array":
                        storage.read_array(file.parent)
                except DAMAGE as error:
                    message = f"{kind}/{number:04d} is damaged: {error}; delete {store / kind / f'{number:04d}'}"
                    report.problems.append(Problem(message=message))


def _repair(store: Path, report: Report) -> None:
    broken = list(dict.fromkeys(one.drop for one in report.problems if one.repairable))
    if broken:
        report.dropped = commit_drops(store, broken, reason="verify --repair")
