"""Complete a plan's group from its partials and publish it: the one rename that makes a capture exist."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datastore import layout, parts, storage
from datastore.capture_group import STATS_ROW_BYTES
from datastore.codec import encode_pieces
from datastore.errors import CorruptError, DatastoreError, PlanError
from datastore.partials import ChunkId, Partials, chunks_within, grid_index
from datastore.plainfile import shape_of
from datastore.schema import SEGMENTS, STATISTICS, Codec, Plan
from datastore.stats import Key, Moments
from datastore.union import load_drops, load_union, plan_of

__all__ = ["Combiner", "Counted", "commit_group", "committed_as"]

NAMED_NONFINITE = 20

Counted = tuple[int, list[dict[str, Any]]]
"""Elements of a layer that are not finite, and the first tokens that hold one."""


class Combiner:
    """Adds the partials of all chunks up, in token order, and writes the statistics of a capture.

    Parameters
    ----------
    plan : Plan
    group : Path
        The capture's group, before it is published.
    partials : Partials
    threads, memory : int
        Layers are combined side by side, in so many threads and bytes at most.
    cell : callable, optional
        What does `combine_cell` elsewhere.
    """

    def __init__(
        self,
        plan: Plan,
        group: Path,
        partials: Partials,
        *,
        threads: int = 1,
        memory: int = 0,
        cell: Callable[[str, int], Counted] | None = None,
    ) -> None:
        self.plan, self.group, self.partials = plan, group, partials
        self._threads = max(1, min(threads, memory // (8 * STATS_ROW_BYTES)))
        self._cell = cell or self.combine_cell
        self._chunk_rows: dict[tuple[str, str], int] = {}

    def combine(self) -> dict[str, Any]:
        """Write `stats/` and return what the capture's metadata says of them."""
        cells = [(one.name, i) for one in self.plan.components for i in range(len(self.plan.layers))]
        with ThreadPoolExecutor(self._threads) as pool:
            counted = list(pool.map(lambda cell: self._cell(*cell), cells))
        total = {one.name: 0 for one in self.plan.components}
        named: list[dict[str, Any]] = []
        for (component, _), (count, where) in zip(cells, counted, strict=True):
            total[component] += count
            named.extend(where)
        return {"nonfinite": total, "nonfinite_tokens": named[:NAMED_NONFINITE]}

    def combine_cell(self, component: str, layer_index: int) -> Counted:
        """Write the statistics of one layer of a component."""
        norms = np.empty(self.plan.n_tokens, dtype=np.float32)
        count, where = 0, []
        for block, moments in self._blocks(component, layer_index, norms):
            self._write_block(component, layer_index, block=block, sums=moments)
            count += sum(int(m.nonfinite.sum()) for m in moments.values())
        for block, start in enumerate(range(0, len(norms), self._rows(component, "norm"))):
            part = norms[start : start + self._rows(component, "norm")]
            self._write(component, "norm", index=(block, layer_index), values=part[:, None])
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
        return 1 if self.plan.stats_level == "capture" else self._rows(component, "sum")

    def _rows(self, component: str, name: str) -> int:
        """Rows of a chunk of one of the arrays."""
        if (component, name) not in self._chunk_rows:
            _, chunk = shape_of(storage.array_metadata(self.group / "stats" / component / name))
            self._chunk_rows[component, name] = chunk[0]
        return self._chunk_rows[component, name]

    def _write(self, component: str, name: str, *, index: tuple[int, ...], values: NDArray[Any]) -> None:
        """Write one chunk, a last one padded with the fill value; there are thousands, and zarr-python takes long."""
        array = self.group / "stats" / component / name
        short = self._rows(component, name) - len(values)
        if short:
            fill = np.nan if values.dtype.kind == "f" else 0
            values = np.concatenate([values, np.full((short, *values.shape[1:]), fill, values.dtype)])
        with storage.naming(array):
            storage.write_chunk(array, index, encode_pieces(values, Codec()))

    def _write_block(self, component: str, layer_index: int, *, block: int, sums: dict[Key, Moments]) -> None:
        width = self.plan.component(component).width
        if self.plan.stats_level == "rollout":
            rows = self._rows_a_block(component)
            first, last = block * rows, min((block + 1) * rows, len(self.plan.rollouts))
            keys: list[Key] = [(row, segment) for row in range(first, last) for segment in range(len(SEGMENTS))]
            shape: tuple[int, ...] = (last - first, len(SEGMENTS), 1, width)
            index: tuple[int, ...] = (block, 0, layer_index, 0)
        else:
            keys, shape = [(segment,) for segment in range(len(SEGMENTS))], (len(SEGMENTS), 1, width)
            index = (0, layer_index, 0)
        zero = Moments.zero(width)
        for name in STATISTICS:
            values = np.stack([getattr(sums.get(key, zero), name) for key in keys]).reshape(shape)
            values = values.astype(np.int64 if name in ("count", "nonfinite") else np.float64, copy=False)
            self._write(component, name, index=index, values=values)

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


def commit_group(store: Path, directory: Path, combiner: Combiner, *, done: tuple[int, int]) -> int | None:
    """Record that the tokens `done` are written and synced, and if all are, complete and publish the plan.

    Of several processes that come here at once one publishes and the others return the same number.

    Returns
    -------
    int or None
        The capture's number; None where a part is not done.

    Raises
    ------
    ConflictError
        Meanwhile another capture brought one of the rollouts with other tokens or from another model.
    CorruptError
        A chunk of a part that was done is gone; its part is to do again.
    """
    group, plan = directory / "group", combiner.plan
    try:
        with parts.locked(directory / "parts"):
            parts.mark_done(directory / "parts", start=done[0], stop=done[1])
            if parts.unfinished(directory / "parts", plan.n_tokens):
                return None
            seen = storage.numbered(store / "captures")
            if not plan.replace:
                load_union(store).refuse_conflicts(plan.rollouts, plan.provenance, store=store)
            _complete(directory, combiner)
            storage.sync_files(group)
            with parts.changing(store):
                if not plan.replace and storage.numbered(store / "captures") != seen:
                    load_union(store).refuse_conflicts(plan.rollouts, plan.provenance, store=store)
                used = [number for drop in load_drops(store) for number in drop.captures]
                number = storage.publish(group, store / "captures", above=max(used, default=0))
            storage.discard(directory)
    except PlanError:
        if group.is_dir():
            raise
        return committed_as(store, plan)
    with suppress(OSError):
        directory.parent.rmdir()  # where no other plan waits
    return number


def _complete(directory: Path, combiner: Combiner) -> None:
    group, plan = directory / "group", combiner.plan
    stored = _stored_bytes(directory, plan)
    _clear_leftovers(group, plan)
    attrs = storage.attributes(group)
    if plan.statistics:
        attrs |= combiner.combine()
    notes = combiner.partials.notes()
    if notes:
        attrs["provenance"] = attrs["provenance"] | {"notes": notes}
    attrs["stored_bytes"] = stored
    storage.set_attributes(group, attrs)
    storage.consolidate(group)


def _stored_bytes(directory: Path, plan: Plan) -> dict[str, int]:
    """Return the bytes of each component's chunks, all of which must be there."""
    total = {one.name: 0 for one in plan.components}
    for chunk in chunks_within(plan, (0, plan.n_tokens)):
        size = storage.chunk_size(directory / "group" / chunk.component, grid_index(chunk))
        if not size:
            start, stop = layout.chunk_range(chunk.chunk, plan.chunk_tokens[chunk.component], plan.n_tokens)
            parts.reopen(directory / "parts", start=start, stop=stop)
            raise CorruptError(
                f"the chunk of {chunk.component} at layer {plan.layers[chunk.layer_index]}, tokens {start}-{stop}, was "
                "written and is gone, so nothing was committed; run the same command again to fill it"
            )
        total[chunk.component] += size
    return total


def _clear_leftovers(group: Path, plan: Plan) -> None:
    """Delete the temporary files of a commit that was killed; those among the chunks went when their part began."""
    storage.clear_leftovers(group)
    for entry in group.iterdir():
        if entry.is_dir() and entry.name not in plan.chunk_tokens:
            for leftover in entry.rglob("*.partial"):
                leftover.unlink(missing_ok=True)


def committed_as(store: Path, plan: Plan) -> int:
    """Return the number under which a plan was published.

    Raises
    ------
    DatastoreError
        It was not.
    """
    for number in reversed(storage.numbered(store / "captures")):
        if plan_of(store / "captures" / f"{number:04d}") == plan.key:
            return number
    raise DatastoreError(f"the plan {plan.key} is neither on disk nor among the captures of {store}; plan again")
