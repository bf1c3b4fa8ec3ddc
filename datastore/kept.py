"""Statistics as captures kept them, for any rollouts of one component and layer, and what needs a pass over data."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datastore import storage
from datastore.cells import Cells, Ints
from datastore.errors import AbsentError
from datastore.schema import SEGMENTS, STATISTICS
from datastore.stats import Moments

__all__ = ["KeptStatistics"]


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
        with ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="kept") as pool:
            for place, rows in self._rows.items():
                names = self._cells.captures[place].rollout_ids
                for row, segment, moments in self._by_rollout(place, rows, pool):
                    yield names[row], segment, moments
            for place in self._whole:
                values = {name: array[:, 0] for name, array in self._read(place, pool).items()}
                for code, segment in enumerate(SEGMENTS):
                    moments = self._moments(place, {name: array[code] for name, array in values.items()})
                    if _any(moments):
                        yield self._cells.captures[place].number, segment, moments
        self._cells.check([*self._rows, *self._whole])

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

    def _by_rollout(self, place: int, rows: Ints, pool: Executor) -> Iterator[tuple[int, str, Moments]]:
        path = self._cells.captures[place].path / "stats" / self.component / "sum"
        size = int(storage.array_metadata(path)["chunk_grid"]["configuration"]["chunk_shape"][0])
        for block in np.unique(rows // size).tolist():
            wanted = rows[rows // size == block]
            first, last = int(wanted[0]), int(wanted[-1]) + 1
            values = {name: array[:, :, 0] for name, array in self._read(place, pool, slice(first, last)).items()}
            for row in wanted.tolist():
                for code, segment in enumerate(SEGMENTS):
                    moments = self._moments(place, {name: array[row - first, code] for name, array in values.items()})
                    if _any(moments):
                        yield row, segment, moments

    def _read(self, place: int, pool: Executor, *rows: slice) -> dict[str, NDArray[Any]]:
        """Return all statistics of some rows, decoded side by side."""
        capture = self._cells.captures[place]
        at, width = capture.layers.index(self.layer), capture.components[self.component].width
        region: Sequence[slice] = (*rows, slice(0, len(SEGMENTS)), slice(at, at + 1), slice(0, width))
        path = capture.path / "stats" / self.component
        found = pool.map(lambda name: storage.read_region(path / name, region), STATISTICS)
        return dict(zip(STATISTICS, found, strict=True))

    def _moments(self, place: int, values: dict[str, NDArray[Any]]) -> Moments:
        wide = self._cells.captures[place].components[self.component].dtype == "float64"
        top: NDArray[np.floating[Any]] = values.pop("max_abs").astype(np.float64 if wide else np.float32)
        return Moments(max_abs=top, **values)


def _any(moments: Moments) -> bool:
    return bool(moments.count.any() or moments.nonfinite.any())
