"""Fill a plan and commit it: rows in any order, whole chunks assembled in bounded memory, one rename at the end.

A chunk is written whole, its partial statistics after it, both under temporary names that are then renamed. So a process
may die on any line: the next one rechecks the chunks that are there, and goes on.
"""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Condition
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from datastore import layout, parts, storage
from datastore.codec import encode
from datastore.commit import Combiner, commit_group
from datastore.dtype import numpy_dtype
from datastore.errors import DatastoreError, PlanError
from datastore.partials import ChunkId, Partials, finished_chunks
from datastore.planning import lay_down
from datastore.schema import Batch, Plan

__all__ = ["Progress", "Writer", "create"]


@dataclass(frozen=True, slots=True)
class Progress:
    """What a writer has finished, this process and earlier ones together."""

    chunks: int
    chunks_total: int
    raw_bytes: int
    raw_bytes_total: int
    stored_bytes: int


class _OpenChunk:
    """A chunk in memory whose rows are not all there yet."""

    __slots__ = ("filled", "rows", "values")

    def __init__(self, values: NDArray[Any], rows: int) -> None:
        self.values = values
        self.rows = rows
        self.filled = np.zeros(rows, dtype=np.bool_)
        if rows < len(values):
            values[rows:] = np.nan  # Zarr stores a last chunk whole; its tail holds the fill value

    @property
    def complete(self) -> bool:
        return bool(self.filled.all())


def create(
    path: str | os.PathLike[str],
    plan: Plan,
    *,
    part: tuple[int, int] = (1, 1),
    memory: int = 1 << 30,
    threads: int | None = None,
) -> "Writer":
    """Begin a planned capture, or go on with it where the same plan lies unfinished on disk.

    Parameters
    ----------
    path : path
        The store; created empty where there is none.
    plan : Plan
        From `datastore.plan`.
    part : (int, int)
        Fill part i of N only (1-based).
    memory : int
        Bytes of raw chunks held at most; rows beyond it wait on disk or hold up `put`.
    threads : int, optional
        Threads that compress and write; default the CPUs of this process.

    Raises
    ------
    BusyError
        A living process fills some of the same tokens of the same plan.
    NotAStoreError, NewerFormatError, ReadOnlyError, PlanError
        The path or the plan can't be used.
    """
    store = Path(path)
    storage.create_root(store)
    directory = lay_down(store, plan)
    return Writer(store, directory, plan, part=part, memory=memory, threads=threads)


class Writer:
    """Takes rows of one plan (or of one part of it), writes chunks, and commits. Made by `create`.

    Used as a context manager it releases its part on leaving; leaving without `commit` keeps what is finished, for the
    same plan to go on with.
    """

    def __init__(
        self, store: Path, directory: Path, plan: Plan, *, part: tuple[int, int], memory: int, threads: int | None
    ) -> None:
        self.plan = plan
        self._store, self._directory, self._group = store, directory, directory / "group"
        self._start, self._stop = layout.part_range(*part, n_tokens=plan.n_tokens, stride=plan.stride)
        self._record = parts.acquire(directory / "parts", *part, start=self._start, stop=self._stop)
        self._workers = threads or len(os.sched_getaffinity(0))
        self._memory = memory
        self._partials = Partials(directory / "partials", plan)
        self._layer_index = {layer: i for i, layer in enumerate(plan.layers)}
        self._open: dict[ChunkId, _OpenChunk] = {}
        self._spilled: dict[ChunkId, NDArray[np.bool_]] = {}
        self._free: dict[str, list[NDArray[Any]]] = {c.name: [] for c in plan.components}
        self._room = Condition()
        self._busy_bytes = 0
        self._failure: BaseException | None = None
        self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="datastore-write")
        try:
            storage.remove(directory / f"spill-{self._start}")
            self._done = finished_chunks(self._group, plan, (self._start, self._stop), threads=self._workers)
        except BaseException:
            self.close()
            raise
        self._stored_bytes = sum(self._done.values())

    # -- what is to do ---------------------------------------------------------------------------------------------

    @property
    def tokens(self) -> tuple[int, int]:
        """The token range that this part owns."""
        return self._start, self._stop

    def wants(self, rollout_id: str) -> bool:
        """Whether any row of the rollout lies in a chunk that this part still has to write."""
        start, stop = self.plan.ragged.range(self.plan.rows[rollout_id])
        return any(
            chunk not in self._done
            for one in self.plan.components
            for index in layout.chunks_of(
                max(start, self._start), min(stop, self._stop), self.plan.chunk_tokens[one.name]
            )
            for chunk in (ChunkId(one.name, i, index) for i in range(len(self.plan.layers)))
        )

    def todo(self) -> list[Batch]:
        """Return the batches of which this part still needs rows, in the order of the token axis.

        A batch that was halved for memory before is returned as its pieces.
        """
        split = {tuple(one["batch"]): one["into"] for one in self._partials.notes().get("halved", [])}
        pieces = [p for batch in self.plan.batches for p in _pieces(batch, split)]
        return [b for b in pieces if any(self.wants(name) for name in b.stored)]

    def halved(self, batch: Batch, into: Sequence[Batch]) -> None:
        """Record that a batch did not fit into memory and is computed as these pieces, now and later."""
        self.note("halved", {"batch": list(batch.members), "into": [list(b.members) for b in into]})

    def progress(self) -> Progress:
        """Return what is finished of this part."""
        totals = self._all_chunks()
        return Progress(
            chunks=len(self._done),
            chunks_total=len(totals),
            raw_bytes=sum(self._raw(c) for c in list(self._done)),
            raw_bytes_total=sum(self._raw(c) for c in totals),
            stored_bytes=self._stored_bytes,
        )

    def _all_chunks(self) -> list[ChunkId]:
        return [
            ChunkId(one.name, i, index)
            for one in self.plan.components
            for i in range(len(self.plan.layers))
            for index in layout.chunks_of(self._start, self._stop, self.plan.chunk_tokens[one.name])
        ]

    def _raw(self, chunk: ChunkId) -> int:
        one = self.plan.component(chunk.component)
        start, stop = layout.chunk_range(chunk.chunk, self.plan.chunk_tokens[one.name], self.plan.n_tokens)
        return (stop - start) * one.width * one.itemsize

    # -- rows in ---------------------------------------------------------------------------------------------------

    def put(self, component: str, layer: int, rollout_id: str, values: NDArray[Any], *, start: int = 0) -> None:
        """Give rows of one rollout, in any order; rows of other parts and of finished chunks are ignored.

        Parameters
        ----------
        component, layer, rollout_id
            Which cell; it must be in the plan.
        values : array (n, width)
            In the component's stored dtype, never cast. Copied, so the caller may reuse it.
        start : int
            Position of the first row in its rollout.

        Raises
        ------
        PlanError
            The cell is not in the plan, or the rows do not fit it.
        DatastoreError
            A chunk could not be written; what is finished is kept.
        """
        first = self._check(component, layer, rollout_id, values, start)
        size = self.plan.chunk_tokens[component]
        begin, end = max(first, self._start), min(first + len(values), self._stop)
        for index in layout.chunks_of(begin, end, size):
            chunk = ChunkId(component, self._layer_index[layer], index)
            if chunk in self._done:
                continue
            low, high = layout.chunk_range(index, size, self.plan.n_tokens)
            a, b = max(begin, low), min(end, high)
            one = self._opened(chunk, high - low)
            one.values[a - low : b - low] = values[a - first : b - first]
            one.filled[a - low : b - low] = True
            if one.complete:
                self._submit(chunk, self._open.pop(chunk))

    def _check(self, component: str, layer: int, rollout_id: str, values: NDArray[Any], start: int) -> int:
        spec = self.plan.component(component)
        if layer not in self._layer_index:
            raise PlanError(f"layer {layer} is not in this plan, which has layers {list(self.plan.layers)}")
        if rollout_id not in self.plan.rows:
            raise PlanError(f"rollout {rollout_id!r} is not in this plan of {len(self.plan.rollouts)} rollouts")
        if values.dtype != numpy_dtype(spec.dtype):
            raise PlanError(
                f"{component} of rollout {rollout_id!r} is {values.dtype} and the plan stores {spec.dtype}; values are "
                "never cast, plan the dtype that the model computes in"
            )
        first, stop = self.plan.ragged.range(self.plan.rows[rollout_id])
        if values.ndim != 2 or values.shape[1] != spec.width or not 0 <= start <= start + len(values) <= stop - first:
            raise PlanError(
                f"{component} of rollout {rollout_id!r} got rows of shape {values.shape} at position {start}; it has "
                f"{stop - first} tokens of width {spec.width}"
            )
        return first + start

    def _opened(self, chunk: ChunkId, rows: int) -> _OpenChunk:
        if chunk not in self._open:
            self._make_room(chunk.component)
            with self._room:
                free = self._free[chunk.component]
                values = free.pop() if free else self._new_buffer(chunk.component)
            self._open[chunk] = _OpenChunk(values, rows)
            if chunk in self._spilled:
                self._unspill(chunk)
        return self._open[chunk]

    def _new_buffer(self, component: str) -> NDArray[Any]:
        spec = self.plan.component(component)
        return np.empty((self.plan.chunk_tokens[component], spec.width), dtype=numpy_dtype(spec.dtype))

    def _buffer_bytes(self, component: str) -> int:
        spec = self.plan.component(component)
        return self.plan.chunk_tokens[component] * spec.width * spec.itemsize

    # -- bounded memory --------------------------------------------------------------------------------------------

    def _held_bytes(self) -> int:
        return self._busy_bytes + sum(self._buffer_bytes(c.component) for c in self._open)

    def _make_room(self, component: str) -> None:
        """Wait for chunks being written, then put open chunks on disk, until one more buffer is within the allowance.

        Half of the allowance is for what compression and statistics need beside the raw chunks.
        """
        need, allowance = self._buffer_bytes(component), self._memory // 2
        with self._room:
            self._raise_failure()
            while self._held_bytes() + need > allowance and self._busy_bytes:
                self._room.wait()
                self._raise_failure()
        while self._open and self._held_bytes() + need > allowance:
            self._spill(next(iter(self._open)))

    def _spill(self, chunk: ChunkId) -> None:
        one = self._open.pop(chunk)
        file = self._spill_file(chunk)
        file.parent.mkdir(exist_ok=True)
        one.values.view(np.uint8).tofile(file)
        self._spilled[chunk] = one.filled
        self._recycle(chunk.component, one.values)

    def _unspill(self, chunk: ChunkId) -> None:
        one, file = self._open[chunk], self._spill_file(chunk)
        one.values.view(np.uint8)[...] = np.fromfile(file, dtype=np.uint8).reshape(len(one.values), -1)
        one.filled = self._spilled.pop(chunk)
        file.unlink()

    def _spill_file(self, chunk: ChunkId) -> Path:
        directory = self._directory / f"spill-{self._start}"
        return directory / f"{chunk.component}-{chunk.layer_index}-{chunk.chunk}"

    def _recycle(self, component: str, values: NDArray[Any]) -> None:
        with self._room:
            if len(self._free[component]) <= self._workers:
                self._free[component].append(values)

    # -- chunks out ------------------------------------------------------------------------------------------------

    def _submit(self, chunk: ChunkId, one: _OpenChunk) -> None:
        self._done[chunk] = 0
        with self._room:
            self._busy_bytes += self._buffer_bytes(chunk.component)
        self._pool.submit(self._write, chunk, one)

    def _write(self, chunk: ChunkId, one: _OpenChunk) -> None:
        try:
            encoded = encode(one.values, self.plan.codec)
            storage.write_chunk(self._group / chunk.component, (chunk.chunk, chunk.layer_index, 0), encoded)
            if self.plan.statistics:
                self._partials.write(chunk, one.values[: one.rows], encoded)
            with self._room:
                self._done[chunk] = len(encoded)
                self._stored_bytes += len(encoded)
        except BaseException as error:
            self._failure = self._failure or error
        finally:
            self._recycle(chunk.component, one.values)
            with self._room:
                self._busy_bytes -= self._buffer_bytes(chunk.component)
                self._room.notify_all()

    def _raise_failure(self) -> None:
        if self._failure is None:
            return
        if isinstance(self._failure, OSError):
            left = self.plan.raw_bytes - sum(self._raw(c) for c, n in self._done.items() if n)
            raise DatastoreError(
                f"a chunk could not be written to {self._store}: {self._failure.strerror or self._failure}; about "
                f"{left / 1e9:.3g} GB before compression are still to write and {storage.free_bytes(self._store) / 1e9:.3g} "
                "GB are free, what is finished is kept, run the same command again to go on"
            ) from self._failure
        raise self._failure

    def flush(self) -> None:
        """Wait until every complete chunk is written."""
        with self._room:
            while self._busy_bytes and self._failure is None:
                self._room.wait()
            self._raise_failure()

    # -- commit ----------------------------------------------------------------------------------------------------

    def note(self, key: str, value: Any) -> None:
        """Keep a fact about how this part was computed (JSON); it goes into the capture's provenance at commit."""
        self._partials.note(key, value)

    def notes(self) -> dict[str, list[Any]]:
        """Return what this and earlier processes noted of this plan."""
        return self._partials.notes()

    def commit(self) -> int | None:
        """Finish this part; if it was the last, publish the capture.

        Returns
        -------
        int or None
            The capture's number, or None while other parts are not done.

        Raises
        ------
        PlanError
            Rows of this part are missing.
        """
        self.flush()
        missing = [c for c in self._all_chunks() if c not in self._done]
        if missing:
            raise PlanError(self._what_is_missing(missing))
        storage.sync_files(self._directory)
        parts.mark_done(self._directory / "parts", start=self._start, stop=self._stop)
        if parts.unfinished(self._directory / "parts", self.plan.n_tokens):
            self.close()
            return None
        combiner = Combiner(self.plan, self._group, self._partials, threads=self._workers)
        number = commit_group(self._store, self._directory, self.plan, combiner)
        self.close()
        return number

    def _what_is_missing(self, missing: list[ChunkId]) -> str:
        chunk = missing[0]
        size = self.plan.chunk_tokens[chunk.component]
        low, high = layout.chunk_range(chunk.chunk, size, self.plan.n_tokens)
        names = [self.plan.rollouts[p.row].rollout_id for p in self.plan.ragged.pieces(low, high)]
        return (
            f"{len(missing)} of {len(self._all_chunks())} chunks are not filled, the first is {chunk.component} at layer "
            f"{self.plan.layers[chunk.layer_index]}, tokens {low}-{high} of rollouts {', '.join(names[:4])}; nothing was "
            "committed, put the missing rows and commit again"
        )

    def close(self) -> None:
        """Stop the threads and release the part; what is finished stays for the same plan."""
        self._pool.shutdown(wait=True)
        parts.release(self._record)
        with suppress(OSError):
            storage.remove(self._directory / f"spill-{self._start}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _pieces(batch: Batch, split: Mapping[tuple[str, ...], Sequence[Sequence[str]]]) -> list[Batch]:
    if batch.members not in split:
        return [batch]
    return [p for members in split[batch.members] for p in _pieces(batch.of(members), split)]
