"""Bring the captures of two stores together in a third, by hard link or copy: rollouts meet by id and token hash.

What the two hold of the same rollout must be of the same tokens and the same model; where both hold the same cell, the
second store's counts. Results (calibration, scores) are of the captures of one store, and are not brought over.
"""

import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from datastore import storage
from datastore.errors import ConflictError, MisuseError
from datastore.maintenance import drop_record
from datastore.schema import FORMAT, FORMAT_VERSION
from datastore.union import Drop, Union, gone, load_union

__all__ = ["Merge", "merge", "plan_merge"]

ADDED = ("labels", "annotations")


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """What a merge would bring over.

    Attributes
    ----------
    out : Path
    sources : tuple of (Path, Path)
        Each group of the sources and where it goes, relative to `out`.
    drops : tuple of Drop
        What the sources dropped, of the captures' new numbers.
    rollouts : int
    shared : tuple of str
        Rollouts that both hold.
    n_bytes : int
        Of all files that are linked or copied.
    left_out : tuple of Path
        Results of the sources: they are of the captures of one store, and are computed again on the new one.
    """

    out: Path
    sources: tuple[tuple[Path, Path], ...]
    drops: tuple[Drop, ...]
    rollouts: int
    shared: tuple[str, ...]
    n_bytes: int
    left_out: tuple[Path, ...]


def plan_merge(first: Path, second: Path, out: Path) -> Merge:
    """Say what merging two stores into a new one would bring over; nothing is written.

    Raises
    ------
    NotAStoreError, NewerFormatError
        A source is no store.
    MisuseError
        `out` is there already, or the sources are one store.
    ConflictError
        A rollout has other tokens or another model in the second store than in the first.
    """
    unions = []
    for store in (first, second):
        storage.open_root(store)
        unions.append(load_union(store))
    if first.resolve() == second.resolve():
        raise MisuseError(f"{first} can't be merged with itself; name two stores")
    if out.exists():
        raise MisuseError(f"{out} is there already, and a merge makes a new store; name a path that is free")
    shared = _shared(unions[0], unions[1], names=(first, second))
    numbers = _renumbered(unions)
    sources = [
        (c.path, Path("captures", f"{numbers[i, c.number]:04d}")) for i, u in enumerate(unions) for c in u.captures
    ]
    for kind in ADDED:
        groups = [store / kind / f"{n:04d}" for store in (first, second) for n in storage.numbered(store / kind)]
        sources += [(group, Path(kind, f"{place:04d}")) for place, group in enumerate(groups, 1)]
    return Merge(
        out=out,
        sources=tuple(sources),
        drops=tuple(_drops(unions, numbers)),
        rollouts=len({name for union in unions for name in union.rollout_ids}),
        shared=shared,
        n_bytes=sum(file.stat().st_size for group, _ in sources for file in group.rglob("*") if file.is_file()),
        left_out=tuple(_results(first, second)),
    )


def _results(*stores: Path) -> Iterator[Path]:
    for store in stores:
        for kind in ("calibration", "scores"):
            yield from (store / kind / f"{n:04d}" for n in storage.numbered(store / kind))


def _shared(first: Union, second: Union, *, names: tuple[Path, Path]) -> tuple[str, ...]:
    there = set(first.rollout_ids)
    shared = tuple(name for name in second.rollout_ids if name in there)
    for name in shared:
        (a, row), (b, other) = first.newest(name), second.newest(name)
        if a.token_sha256[row] != b.token_sha256[other]:
            raise ConflictError(
                f"rollout {name!r} has {int(a.counts[row])} tokens (sha256 {a.token_sha256[row][:12]}) in {names[0]} "
                f"and {int(b.counts[other])} (sha256 {b.token_sha256[other][:12]}) in {names[1]}; nothing was merged, "
                "drop it from one of them"
            )
        if a.model != b.model:
            raise ConflictError(
                f"rollout {name!r} is of model {a.model_name} in {names[0]} and of model {b.model_name} with other "
                f"weights or dtype in {names[1]}; nothing was merged, drop it from one of them"
            )
    return shared


def _renumbered(unions: list[Union]) -> dict[tuple[int, int], int]:
    """Return the new number of each (store, capture): those of the first store first, in their order."""
    old = [(place, capture.number) for place, union in enumerate(unions) for capture in union.captures]
    return {one: number for number, one in enumerate(old, 1)}


def _drops(unions: list[Union], numbers: Mapping[tuple[int, int], int]) -> Iterator[Drop]:
    for place, union in enumerate(unions):
        for one in union.drops:
            captures = tuple(numbers[place, n] for n in one.captures if (place, n) in numbers)
            if captures and not gone([one]):
                yield Drop(captures=captures, rollouts=one.rollouts, layers=one.layers, components=one.components)


def merge(plan: Merge) -> None:
    """Carry out a merge: the new store appears whole, by one rename.

    Raises
    ------
    MisuseError
        The new store's path was taken meanwhile.
    ReadOnlyError
        It can't be written there.
    """
    aside = plan.out.with_name(f"{plan.out.name}.{uuid.uuid4().hex}.partial")
    try:
        with storage.writable(plan.out), storage.enough_room(plan.out, plan.n_bytes):
            plan.out.parent.mkdir(parents=True, exist_ok=True)
            storage.create_group(aside, {"format": FORMAT, "version": FORMAT_VERSION})
            for kind in storage.ROOT_GROUPS:
                storage.create_group(aside / kind, {})
            for group, place in plan.sources:
                _copy(group, aside / place)
            if plan.drops:
                created = datetime.now(UTC).isoformat(timespec="seconds")
                dropped = [drop_record(one) for one in plan.drops]
                storage.create_group(
                    aside / "dropped" / "0001", {"created": created, "reason": "merge", "dropped": dropped}
                )
            storage.sync_files(aside)
            if plan.out.exists():
                raise MisuseError(f"{plan.out} was made by another process meanwhile; nothing was merged")
            os.rename(aside, plan.out)
            storage.sync_file(plan.out.parent)
    finally:
        storage.remove(aside)


class _Stopped(Exception):
    """Copying ended at this error: `copytree` goes on after an OSError, and tells of all as a list."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.error = error


def _copy(group: Path, place: Path) -> None:
    try:
        shutil.copytree(group, place, copy_function=_link)
    except _Stopped as stopped:
        raise stopped.error from None


def _link(source: str, target: str) -> None:
    """Link a file, which no store ever changes, or copy it where it can't be linked."""
    with suppress(OSError):
        os.link(source, target)
        return
    try:
        shutil.copy2(source, target)
    except OSError as error:
        error.filename = error.filename or target
        raise _Stopped(error) from error
