"""Statistics as captures kept them, for any rollouts of one component and layer, and what needs a pass over data."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from datastore import storage
from datastore.cells import Cells, Ints
from datastore.errors import AbsentError
from datastore.schema import SEGMENTS, STATISTICS
from datastore.stats import Moments

__all__ = ["KeptStatistics", "KeptTable"]


class KeptTable(NamedTuple):
    """Some rollouts that were captured together, and their statistics by name, arrays (rollout, segment, hidden)."""

    rollouts: tuple[str, ...]
    values: dict[str, NDArray[Any]]

    @property
    def moments(self) -> Moments:
        """All statistics as one."""
        return Moments(**self.values)


class KeptStatistics:
    """Moments of the rows of some rollouts at one layer, as far as they were kept when the rows were captured.

    A capture keeps them per rollout and segment where that costs little, else per segment of the whole capture. The
    latter answer only for all of a capture's rollouts together.

    Attributes
    ----------
    component : str
    layer : int
    per_rollout : tuple of str
        Rollouts whose moments are kept each by itself.
    per_capture : tuple of int
        Captures that are wanted whole and keep one sum.
    needs_pass : tuple of str
        Rollouts whose moments were not kept in a form that answers: sum them up over `Store.blocks`.

    Raises
    ------
    AbsentError
        A cell is not captured.
    """

    def __init__(self, cells: Cells, component: str, layer: int, *, rollouts: Ints) -> None:
        self.component, self.layer = component, layer
        self._cells, self._rows, self._whole = cells, dict[int, Ints](), list[int]()
        holder, row = cells.found(component, layer, rollouts)
        needs_pass: list[str] = []
        for place in np.unique(holder).tolist():
            capture, rows = cells.captures[place], np.unique(row[holder == place])
            level = capture.attrs["statistics"]
            if level == "rollout":
                self._rows[place] = rows
            elif level == "capture" and len(rows) == len(capture.rollout_ids):
                self._whole.append(place)
            else:
                needs_pass += [capture.rollout_ids[r] for r in rows.tolist()]
        self.needs_pass = tuple(needs_pass)
        self.per_capture = tuple(cells.captures[place].number for place in self._whole)
        names = [cells.captures[place].rollout_ids[r] for place, rows in self._rows.items() for r in rows.tolist()]
        self.per_rollout = tuple(names)

    def __repr__(self) -> str:
        return (
            f"KeptStatistics({self.component} at layer {self.layer}: {len(self.per_rollout)} rollouts by themselves, "
            f"captures {list(self.per_capture)} as a whole, {len(self.needs_pass)} rollouts need a pass)"
        )

    def __iter__(self) -> Iterator[tuple[str | int, str, Moments]]:
        """Yield rollout id (or capture number), segment and moments; those of no token are left out."""
        for names, values in self.tables():
            for i, name in enumerate(names):
                for code, segment in enumerate(SEGMENTS):
                    moments = Moments(**{key: array[i, code] for key, array in values.items()})
                    if _any(moments):
                        yield name, segment, moments
        yield from self.together()

    def tables(
        self, statistics: Sequence[str] = STATISTICS, *, memory: dict[str, NDArray[Any]] | None = None
    ) -> Iterator[KeptTable]:
        """Yield what was kept of each rollout by itself, all rollouts of a chunk of the statistics at a time.

        Parameters
        ----------
        statistics : sequence of str
            Only these are read; a table has moments where it is all of them.
        memory : dict, optional
            The caller's, empty at first, for tables of this layer and of others: what they are read into, each over the
            one before. Fresh memory takes as much time as decoding.
        """
        for place, rows in self._rows.items():
            names = self._cells.captures[place].rollout_ids
            path = self._path(place)
            size = int(storage.array_metadata(path / "sum")["chunk_grid"]["configuration"]["chunk_shape"][0])
            for block in np.unique(rows // size).tolist():
                first = block * size
                values = self._read(place, statistics, slice(first, first + size), memory=memory)
                at = rows[rows // size == block] - first
                together = len(at) == at[-1] + 1 - at[0]
                some = slice(at[0], at[-1] + 1) if together else at  # a slice is no copy
                found = {name: array[:, :, 0][some] for name, array in values.items()}
                yield KeptTable(tuple(names[first + row] for row in at.tolist()), found)
        self._cells.check(self._rows)

    def together(self) -> Iterator[tuple[int, str, Moments]]:
        """Yield capture number, segment and moments of captures that keep one sum; those of no token are left out."""
        for place in self._whole:
            values = self._read(place, STATISTICS)
            for code, segment in enumerate(SEGMENTS):
                moments = Moments(**{name: array[code, 0] for name, array in values.items()})
                if _any(moments):
                    yield self._cells.captures[place].number, segment, moments
        self._cells.check(self._whole)

    def total(self, segment: str | None = None) -> Moments:
        """Return the sum over all rollouts, of one segment or of both.

        Raises
        ------
        AbsentError
            Some rollouts need a pass.
        """
        if self.needs_pass:
            raise AbsentError(
                f"statistics of {self.component} at layer {self.layer} are not kept for {len(self.needs_pass)} "
                f"rollouts by themselves, the first is {self.needs_pass[0]!r}; sum Moments.of over the store's "
                "blocks, or ask for whole captures"
            )
        found = [moments for _, code, moments in self if segment in (None, code)]
        total = found[0] if found else Moments.zero(self._cells.components[self.component].width)
        for moments in found[1:]:
            total = total + moments
        return total

    def _path(self, place: int) -> Path:
        return self._cells.captures[place].path / "stats" / self.component

    def _read(
        self,
        place: int,
        statistics: Sequence[str],
        *rows: slice,
        memory: dict[str, NDArray[Any]] | None = None,
    ) -> dict[str, NDArray[Any]]:
        capture = self._cells.captures[place]
        at, width = capture.layers.index(self.layer), capture.components[self.component].width
        region: Sequence[slice] = (*rows, slice(0, len(SEGMENTS)), slice(at, at + 1), slice(0, width))
        shape = tuple(part.stop - part.start for part in region)
        if memory is not None and {array.shape for array in memory.values()} != {shape}:
            memory |= _memory(shape)
        path, held = self._path(place), memory or {}
        return {name: storage.read_region(path / name, region, held.get(name)) for name in statistics}


def _memory(shape: tuple[int, ...]) -> dict[str, NDArray[Any]]:
    """Return memory for all statistics, as they are stored: one piece, so that it is of large pages."""
    whole = np.empty((len(STATISTICS), *shape), np.float64)
    return {
        name: array.view(np.int64) if name in ("count", "nonfinite") else array
        for name, array in zip(STATISTICS, whole, strict=True)
    }


def _any(moments: Moments) -> bool:
    return bool(moments.count.any() or moments.nonfinite.any())
