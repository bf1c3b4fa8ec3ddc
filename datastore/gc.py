"""Free what no longer counts: captures that are dropped or superseded, leftovers of killed processes, dead plans.

Each thing is renamed out of sight first and deleted then, so that a reader finds a capture whole or not at all, and a
process that is killed meanwhile leaves only what the next collection removes. A capture stays as long as a label or an
annotation that came with it shows in the tables of the store; `compact` brings these along and then frees it.
"""

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from datastore import parts, storage
from datastore.cells import latest
from datastore.errors import PlanError
from datastore.planning import laid_down, plans_directory
from datastore.tables import telling
from datastore.union import gone

__all__ = ["Collection", "Removal", "collect", "plan_collection"]

ADDED = ("labels", "annotations")
OLDER_THAN = 3600.0
"""Seconds since anything in a leftover was written: a younger one may belong to a living process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """One directory or file to delete, the bytes that frees, and why."""

    path: Path
    n_bytes: int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Collection:
    """What a collection would delete."""

    store: Path
    removals: tuple[Removal, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes that it frees."""
        return sum(one.n_bytes for one in self.removals)


def plan_collection(
    store: Path, *, plans: bool = False, older_than: float = OLDER_THAN, only: frozenset[int] | None = None
) -> Collection:
    """Look for what can be deleted; nothing is.

    Parameters
    ----------
    store : Path
    plans : bool
        Also unfinished plans that no living process fills; their finished chunks are lost.
    older_than : float
        Seconds since the last write in a leftover.
    only : set of int, optional
        Nothing but captures, and only these where nothing of them counts.

    Raises
    ------
    NotAStoreError, NewerFormatError
        The path is no store.
    """
    storage.open_root(store)
    found = [*_captures(store, only)]
    if only is None:
        found += [*_leftovers(store, older_than), *_plans(store, unfinished=plans)]
    removals = tuple(Removal(path=path, n_bytes=_size(path), why=why) for path, why in found)
    return Collection(store=store, removals=removals)


def collect(collection: Collection) -> None:
    """Delete what was planned.

    Raises
    ------
    ReadOnlyError
        Something can't be deleted.
    """
    store = collection.store
    with storage.writable(store):
        for aside in _put_away(store, {one.path for one in collection.removals}):
            storage.remove(aside)
        for one in collection.removals:
            _remove(store, one.path)
        with suppress(OSError):
            plans_directory(store).rmdir()  # where no plan waits


def _put_away(store: Path, named: set[Path]) -> list[Path]:
    """Take captures out of the store that were planned to go and, looked at again, still count for nothing."""
    if not any(path.parent == store / "captures" for path in named):
        return []
    with parts.changing(store):
        return storage.put_away([path for path, _ in _captures(store, None) if path in named])


def _remove(store: Path, path: Path) -> None:
    if path.name.endswith(".partial") and path.is_dir():
        storage.remove(path)
    elif path.name.endswith(".partial"):
        path.unlink(missing_ok=True)
    elif path.parent == plans_directory(store) and (path / "group").is_dir():
        _remove_unfinished(path)
    elif path.parent == plans_directory(store):
        storage.discard(path)


def _captures(store: Path, only: frozenset[int] | None) -> Iterator[tuple[Path, str]]:
    cells = latest(store)
    union, dropped = cells.union, gone(cells.union.drops)
    known = dropped | {capture.number for capture in union.captures}  # what is committed later is not in it
    useless = {n for n in storage.numbered(store / "captures") if n in known - union.counting}
    if useless - dropped:
        added = [[store / kind / f"{n:04d}" for n in storage.numbered(store / kind)] for kind in ADDED]
        useless -= telling(cells, *added) - dropped
    for number in sorted(useless if only is None else useless & only):
        yield store / "captures" / f"{number:04d}", "nothing of it counts any more"


def _leftovers(store: Path, older_than: float) -> Iterator[tuple[Path, str]]:
    places = [store, plans_directory(store), *(store / kind for kind in storage.ROOT_GROUPS)]
    found = [file for place in places if place.is_dir() for file in sorted(place.iterdir())]
    found += [file for file in sorted(store.parent.iterdir()) if file.name.startswith(f"{store.name}.")]
    for file in found:
        if file.name.endswith(".partial") and time.time() - _written(file) >= older_than:
            yield file, "left over by a process that was killed"


def _plans(store: Path, *, unfinished: bool) -> Iterator[tuple[Path, str]]:
    for directory in laid_down(store):
        if not (directory / "group").is_dir():
            yield directory, "what is left of a plan that was carried out"
        elif unfinished and not parts.living(directory / "parts"):
            yield directory, "an unfinished plan that no process fills"


def _remove_unfinished(directory: Path) -> None:
    try:
        with parts.locked(directory / "parts"):
            if not parts.living(directory / "parts"):
                storage.discard(directory)
    except PlanError:  # committed meanwhile, by the process that removes the rest
        return


def _written(path: Path) -> float:
    """Return when anything of a file or directory was last written."""
    return max((found.lstat().st_mtime for found in (path, *path.rglob("*"))), default=0.0)


def _size(path: Path) -> int:
    return sum(found.lstat().st_size for found in (path, *path.rglob("*")) if found.is_file())
