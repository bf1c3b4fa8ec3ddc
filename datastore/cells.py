"""What a store held when it was opened, as arrays: which capture and which row hold each rollout's cell of each layer.

`Union` answers for one cell at a time; a reader asks for 100,000 rollouts at once. Both give the same answers (proved
by a test). A `Snapshot` names what was there; it is all that travels when a lazy array is pickled.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datastore import storage
from datastore.errors import AbsentError, CorruptError, DatastoreError
from datastore.schema import ComponentSpec
from datastore.union import Capture, Union, load_captures, load_drops

__all__ = ["Cells", "Snapshot", "latest", "opened", "snapshot"]

Ints = NDArray[np.int64]
TRIES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The captures and drops that a store had, and what tells each capture from another one of the same number."""

    path: Path
    captures: tuple[tuple[int, tuple[int, int]], ...]
    dropped: tuple[int, ...]


def snapshot(path: Path) -> Snapshot:
    """Look at what the store at `path` has now.

    Raises
    ------
    NotAStoreError, NewerFormatError
        It is no store, or one of a newer release.
    """
    storage.open_root(path)
    path = path.absolute()
    numbers = storage.numbered(path / "captures")
    return Snapshot(
        path=path,
        captures=tuple((n, mark) for n in numbers if (mark := _mark(path, n)) is not None),
        dropped=tuple(storage.numbered(path / "dropped")),
    )


def _mark(path: Path, number: int) -> tuple[int, int] | None:
    """Time and size of a capture's zarr.json, which is never written again; None when it is gone."""
    try:
        found = (path / "captures" / f"{number:04d}" / "zarr.json").stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


@lru_cache(maxsize=8)
def opened(what: Snapshot) -> "Cells":
    """Read the tables of all captures of a snapshot.

    Raises
    ------
    DatastoreError
        A capture is gone, or is another one.
    """
    try:
        drops = load_drops(what.path, what.dropped)
        captures = load_captures(what.path, (n for n, _ in what.captures), drops)
    except CorruptError:
        _check(what, (n for n, _ in what.captures))
        raise
    _check(what, (n for n, _ in what.captures))
    return Cells(what, Union(captures, drops))


def latest(path: Path) -> "Cells":
    """Read the store at `path` as it is now; captures that `gc` removes meanwhile make it look again."""
    for _ in range(TRIES - 1):
        seen = snapshot(path)
        try:
            return opened(seen)
        except DatastoreError:
            if snapshot(path) == seen:
                raise
    return opened(snapshot(path))


def _check(what: Snapshot, numbers: Iterable[int]) -> None:
    marks = dict(what.captures)
    for number in numbers:
        now = _mark(what.path, number)
        if now != marks[number]:
            raise DatastoreError(
                f"capture {number} of {what.path} was {'deleted' if now is None else 'replaced'} after the store was "
                "opened, so nothing more can be read through it; open the store again"
            )


class Cells:
    """The rollouts of a store in order of first capture, and where each one's cells are.

    Attributes
    ----------
    snapshot : Snapshot
    union : Union
    """

    def __init__(self, snapshot: Snapshot, union: Union) -> None:
        self.snapshot, self.union = snapshot, union
        self._where: dict[tuple[str, int], tuple[Ints, Ints]] = {}
        self._columns: dict[str, NDArray[Any]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return opened, (self.snapshot,)

    def check(self, captures: Iterable[int]) -> None:
        """Raise DatastoreError when one of these captures (by place) is gone, or is another one, since the opening."""
        _check(self.snapshot, (self.captures[i].number for i in captures))

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Say of a store that is gone, or is another one, after what is done here that it is, whatever that met with.

        Raises
        ------
        DatastoreError
            A capture was deleted or replaced since the store was opened.
        """
        try:
            yield
        except (DatastoreError, OSError):
            self.check(range(len(self.captures)))
            raise
        self.check(range(len(self.captures)))

    @property
    def captures(self) -> Sequence[Capture]:
        """The captures, ascending by number; elsewhere here a capture is its place in this list."""
        return self.union.captures

    # -- rollouts --------------------------------------------------------------------------------------------------

    @cached_property
    def _known(self) -> tuple[dict[str, int], list[Ints], Ints]:
        """Index of every rollout that a capture names, that of each capture's rows, and each one's newest capture."""
        index: dict[str, int] = {}
        for capture in self.captures:
            for name in capture.rollout_ids:
                index.setdefault(name, len(index))
        members = [np.array([index[name] for name in c.rollout_ids], dtype=np.int64) for c in self.captures]
        newest = np.full(len(index), -1, dtype=np.int64)
        for place, rows in enumerate(members):
            newest[rows[self._anything_counts(place)]] = place
        return index, members, newest

    @cached_property
    def ids(self) -> NDArray[np.str_]:
        """Rollout ids as fixed-width unicode: those of which anything counts, in order of first capture."""
        index, _, newest = self._known
        names = np.array(list(index), dtype=np.str_) if index else np.zeros(0, dtype="<U1")
        return names[newest >= 0]

    @cached_property
    def index(self) -> dict[str, int]:
        """Place of each rollout id in `ids`."""
        return {str(name): i for i, name in enumerate(self.ids.tolist())}

    @cached_property
    def newest(self) -> Ints:
        """The capture of each rollout that describes it: tokens, coordinates, labels."""
        _, _, newest = self._known
        return newest[newest >= 0]

    @cached_property
    def members(self) -> list[Ints]:
        """For each capture, the rollout of every row; -1 where nothing of the rollout counts."""
        _, members, newest = self._known
        place = np.where(newest >= 0, np.cumsum(newest >= 0) - 1, -1)
        return [place[rows] for rows in members]

    @cached_property
    def described_at(self) -> Ints:
        """Row of each rollout in the table of its newest capture."""
        found = np.zeros(len(self.ids), dtype=np.int64)
        for place, rollouts in enumerate(self.members):
            rows = np.flatnonzero(rollouts >= 0)
            rows = rows[self.newest[rollouts[rows]] == place]
            found[rollouts[rows]] = rows
        return found

    def column(self, name: str) -> NDArray[Any]:
        """Return a column of the rollout table, one value per rollout, from its newest capture."""
        if name not in self._columns:
            parts = [storage.read_array(c.path / "rollouts" / name) for c in self.captures]
            dtype = np.result_type(*parts) if parts and parts[0].dtype.kind in "iub" else np.dtype(object)
            values = np.empty(len(self.ids), dtype=dtype)
            for place, part in enumerate(parts):
                mine = self.newest == place
                values[mine] = part[self.described_at[mine]]
            self._columns[name] = values
        return self._columns[name]

    @cached_property
    def counts(self) -> Ints:
        """Tokens of each rollout."""
        found = np.zeros(len(self.ids), dtype=np.int64)
        for place, capture in enumerate(self.captures):
            mine = self.newest == place
            found[mine] = capture.counts[self.described_at[mine]]
        return found

    # -- cells -----------------------------------------------------------------------------------------------------

    @cached_property
    def current(self) -> list[NDArray[np.bool_]]:
        """For each capture, the rows whose tokens and model are those of the rollout's newest capture."""
        sha256 = np.empty(len(self.ids), dtype=object)
        for place, capture in enumerate(self.captures):
            mine = self.newest == place
            sha256[mine] = np.array(capture.token_sha256, dtype=object)[self.described_at[mine]]
        models = np.array([c.model for c in self.captures], dtype=object)
        found = []
        for capture, rollouts in zip(self.captures, self.members, strict=True):
            rows = np.flatnonzero(rollouts >= 0)
            one, tokens = rollouts[rows], np.array(capture.token_sha256, dtype=object)[rows]
            mine = np.zeros(len(rollouts), dtype=np.bool_)
            mine[rows] = (sha256[one] == tokens) & (models[self.newest[one]] == capture.model)
            found.append(mine)
        return found

    def where(self, component: str, layer: int) -> tuple[Ints, Ints]:
        """Return for each rollout the capture that holds the cell and the row there; -1 where it is not captured."""
        if (component, layer) not in self._where:
            holder = np.full(len(self.ids), -1, dtype=np.int64)
            row = np.full(len(self.ids), -1, dtype=np.int64)
            for place, capture in enumerate(self.captures):
                if component in capture.components and layer in capture.layers:
                    counts = self.current[place] & ~self._dropped(place, component, layer)
                    rows = np.flatnonzero(counts)
                    holder[self.members[place][rows]], row[self.members[place][rows]] = place, rows
            self._where[component, layer] = holder, row
        return self._where[component, layer]

    def found(self, component: str, layer: int, rollouts: NDArray[Any]) -> tuple[Ints, Ints]:
        """Return capture and row of these rollouts' cells.

        Raises
        ------
        AbsentError
            One is not captured; the message lists what is.
        """
        holder, row = (values[rollouts] for values in self.where(component, layer))
        missing = np.flatnonzero(holder < 0)
        if len(missing):
            raise AbsentError(self.union.what_is_there(component, layer, str(self.ids[rollouts[missing[0]]])))
        return holder, row

    def layers_of(self, component: str) -> tuple[int, ...]:
        """Return the layers at which the component is captured for any rollout, ascending."""
        numbers = sorted({n for c in self.captures if component in c.components for n in c.layers})
        return tuple(n for n in numbers if (self.where(component, n)[0] >= 0).any())

    @cached_property
    def components(self) -> dict[str, ComponentSpec]:
        """All components that count anywhere; the newest capture describes each."""
        specs: dict[str, ComponentSpec] = {}
        for capture in self.captures:
            specs |= capture.components
        return {name: spec for name, spec in specs.items() if self.layers_of(name)}

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """All layer numbers that count anywhere, ascending."""
        return tuple(sorted({layer for name in self.components for layer in self.layers_of(name)}))

    def _dropped(self, place: int, component: str, layer: int) -> NDArray[np.bool_]:
        capture = self.captures[place]
        dropped = np.zeros(len(capture.rollout_ids), dtype=np.bool_)
        for one in self.union.drops:
            if (
                capture.number in one.captures
                and (one.layers is None or layer in one.layers)
                and (one.components is None or component in one.components)
            ):
                rows = None if one.rollouts is None else [capture.rows[n] for n in one.rollouts if n in capture.rows]
                dropped[slice(None) if rows is None else rows] = True
        return dropped

    def _anything_counts(self, place: int) -> NDArray[np.bool_]:
        capture = self.captures[place]
        if not any(capture.number in one.captures for one in self.union.drops):
            return np.ones(len(capture.rollout_ids), dtype=np.bool_)
        cells = [(component, layer) for component in capture.components for layer in capture.layers]
        counted = [~self._dropped(place, component, layer) for component, layer in cells]
        return np.asarray(np.any(counted, axis=0), dtype=np.bool_)
