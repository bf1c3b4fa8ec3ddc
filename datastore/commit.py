"""Complete a plan's group from its partials and publish it: the one rename that makes a capture exist."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datastore import layout, parts, storage
from datastore.errors import DatastoreError
from datastore.partials import ChunkId, Partials
from datastore.schema import SEGMENTS, STATISTICS, Plan
from datastore.stats import Key, Moments

__all__ = ["Combiner", "commit_group", "committed_as"]

NAMED_NONFINITE = 20


class Combiner:
    """Adds the partials of all chunks up, in token order, and writes the statistics of a capture."""

    def __init__(self, plan: Plan, group: Path, partials: Partials, *, threads: int) -> None:
        self.plan, self.group, self.partials = plan, group, partials
        self._threads = threads

    def notes(self) -> dict[str, list[Any]]:
        """Return what the parts noted."""
        return self.partials.notes()

    def combine(self) -> dict[str, Any]:
        """Write `stats/` and return what the capture's metadata says of them."""
        cells = [(one.name, i) for one in self.plan.components for i in range(len(self.plan.layers))]
        with ThreadPoolExecutor(self._threads) as pool:
            counted = list(pool.map(lambda cell: self._combine_cell(*cell), cells))
        total = {one.name: 0 for one in self.plan.components}
        named: list[dict[str, Any]] = []
        for (component, _), (count, where) in zip(cells, counted, strict=True):
            total[component] += count
            named.extend(where)
        return {"nonfinite": total, "nonfinite_tokens": named[:NAMED_NONFINITE]}

    def _combine_cell(self, component: str, layer_index: int) -> tuple[int, list[dict[str, Any]]]:
        norms = np.empty(self.plan.n_tokens, dtype=np.float32)
        count, where = 0, []
        for block, moments in self._blocks(component, layer_index, norms):
            self._write_block(component, layer_index, block, moments)
            count += sum(int(m.nonfinite.sum()) for m in moments.values())
        storage.zarr_array(self.group / "stats" / component / "norm", "r+")[:, layer_index] = norms
        if count:
            where = self._name_nonfinite(component, layer_index, norms)
        return count, where

    def _blocks(
        self, component: str, layer_index: int, norms: NDArray[np.float32]
    ) -> Iterator[tuple[int, dict[Key, Moments]]]:
        """Yield the sums of each block of rows of the table once it is complete; all as block 0 if per capture."""
        size, rows = self.plan.chunk_tokens[component], self._rows_a_block(component)
        open_block, sums = 0, dict[Key, Moments]()
        for index in range(layout.n_chunks(self.plan.n_tokens, size)):
            start, stop = layout.chunk_range(index, size, self.plan.n_tokens)
            table = self.partials.read(self.group, ChunkId(component, layer_index, index))
            norms[start:stop] = table.norms
            for key, moments in table.moments.items():
                block = key[0] // rows if len(key) == 2 else 0
                while open_block < block:
                    yield open_block, sums
                    open_block, sums = open_block + 1, {}
                sums[key] = sums[key] + moments if key in sums else moments
        yield open_block, sums

    def _rows_a_block(self, component: str) -> int:
        if self.plan.stats_level == "capture":
            return 1
        return int(storage.zarr_array(self.group / "stats" / component / "sum").chunks[0])

    def _write_block(self, component: str, layer_index: int, block: int, sums: dict[Key, Moments]) -> None:
        width = self.plan.component(component).width
        if self.plan.stats_level == "rollout":
            rows = self._rows_a_block(component)
            first, last = block * rows, min((block + 1) * rows, len(self.plan.rollouts))
            keys: list[Key] = [(row, segment) for row in range(first, last) for segment in range(len(SEGMENTS))]
            shape: tuple[int, ...] = (last - first, len(SEGMENTS), width)
            region: tuple[Any, ...] = (slice(first, last), slice(None), layer_index)
        else:
            keys, shape = [(segment,) for segment in range(len(SEGMENTS))], (len(SEGMENTS), width)
            region = (slice(None), layer_index)
        zero = Moments.zero(width)
        for name in STATISTICS:
            values = np.stack([getattr(sums.get(key, zero), name) for key in keys]).reshape(shape)
            storage.zarr_array(self.group / "stats" / component / name, "r+")[region] = values

    def _name_nonfinite(self, component: str, layer_index: int, norms: NDArray[np.float32]) -> list[dict[str, Any]]:
        named = []
        for token in np.flatnonzero(~np.isfinite(norms))[:NAMED_NONFINITE]:
            row = self.plan.ragged.row_at(int(token))
            named.append(
                {
                    "component": component,
                    "layer": self.plan.layers[layer_index],
                    "rollout_id": self.plan.rollouts[row].rollout_id,
                    "position": int(token) - self.plan.ragged.range(row)[0],
                }
            )
        return named


def commit_group(store: Path, directory: Path, plan: Plan, combiner: Combiner) -> int:
    """Complete and publish a plan whose parts are all done; return the capture's number.

    Of several processes that come here at once one publishes and the others return the same number.
    """
    group = directory / "group"
    try:
        with parts.locked(directory, "commit.lock"):
            if not group.is_dir():
                return committed_as(store, plan)
            _complete(group, plan, combiner)
            storage.sync_files(group)
            number = storage.publish(group, store / "captures")
            storage.remove(directory)
            return number
    except FileNotFoundError:
        if directory.exists():
            raise
        return committed_as(store, plan)


def _complete(group: Path, plan: Plan, combiner: Combiner) -> None:
    for leftover in group.rglob("*.partial"):
        leftover.unlink(missing_ok=True)
    attrs = storage.attributes(group)
    if plan.statistics:
        attrs |= combiner.combine()
    notes = combiner.notes()
    if notes:
        attrs["provenance"] = attrs["provenance"] | {"notes": notes}
    attrs["stored_bytes"] = {one.name: _bytes_under(group / one.name / "c") for one in plan.components}
    storage.set_attributes(group, attrs)
    storage.consolidate(group)


def _bytes_under(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def committed_as(store: Path, plan: Plan) -> int:
    """Return the number under which a plan was published.

    Raises
    ------
    DatastoreError
        It was not.
    """
    for number in reversed(storage.numbered(store / "captures")):
        if storage.attributes(store / "captures" / f"{number:04d}").get("plan") == plan.key:
            return number
    raise DatastoreError(f"the plan {plan.key} is neither on disk nor among the captures of {store}; plan again")
