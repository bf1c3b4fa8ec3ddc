"""Fill a plan and commit it: rows in any order, whole chunks assembled in bounded memory, one rename at the end.

A chunk is written whole, its partial statistics after it, both under temporary names that are then renamed. So a
process may die on any line: the next one rechecks the chunks that are there, and goes on.
"""

import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Self

from numpy.typing import NDArray

from datastore import layout, parts, storage
from datastore.arena import Arena
from datastore.assembly import Assembly, OpenChunk, bits
from datastore.chunkprocesses import ChunkProcesses
from datastore.chunkwork import ChunkWork, Work
from datastore.combine import PIECE_BYTES, Combiner, Pending
from datastore.commit import commit_group
from datastore.dtype import numpy_dtype
from datastore.errors import PlanError
from datastore.partials import ChunkId, Partials, chunks_within, finished_chunks, grid_index
from datastore.planning import lay_down, plans_directory
from datastore.schema import Batch, Plan
from datastore.stats import WORTH_COMPILING

__all__ = ["Progress", "Writer", "create"]


@dataclass(frozen=True, slots=True)
class Progress:
    """What a writer has finished, this process and earlier ones together."""

    chunks: int
    chunks_total: int
    raw_bytes: int
    raw_bytes_total: int
    stored_bytes: int


def create(
    path: str | os.PathLike[str],
    plan: Plan,
    *,
    part: tuple[int, int] = (1, 1),
    memory: int = 1 << 30,
    threads: int | None = None,
    processes: int = 0,
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
        Bytes held at most: open chunks, and what compressing and counting them takes. Complete chunks that wait beyond
        it hold up `put`, open ones are put aside on disk. One chunk and one thread are always allowed.
    threads : int, optional
        Threads that compress and write; default the CPUs of this process.
    processes : int
        Processes that compress and write instead, for a caller whose own threads must not wait for the interpreter
        lock. Linux only; beside `memory` each took 33 MB with chunks of 8 MiB.

    Raises
    ------
    BusyError
        A living process fills some of the same tokens of the same plan.
    NotAStoreError, NewerFormatError, ReadOnlyError, PlanError
        The path or the plan can't be used, or the plan was carried out already.
    """
    if threads is not None and threads < 1:
        raise PlanError(f"{threads} threads write nothing; give at least 1, or leave it out for one per CPU")
    if processes < 0 or (processes and threads):
        raise PlanError(f"{threads} threads and {processes} processes can't write together; give one of them")
    store = Path(path).resolve()
    with storage.enough_room(store, plan.raw_bytes + plan.table_bytes):
        storage.create_root(store)
        directory = lay_down(store, plan)
        storage.check_writable(store, plans_directory(store))
        return Writer(store, directory, plan, part=part, memory=memory, threads=threads, processes=processes)


class Writer:
    """Takes rows of one plan (or of one part of it), writes chunks, and commits. Made by `create`.

    Used as a context manager it releases its part on leaving; leaving without `commit` keeps what is finished, for the
    same plan to go on with.
    """

    def __init__(
        self,
        store: Path,
        directory: Path,
        plan: Plan,
        *,
        part: tuple[int, int],
        memory: int,
        threads: int | None,
        processes: int,
    ) -> None:
        self.plan = plan
        self._store, self._directory, self._group = store, directory, directory / "group"
        self._start, self._stop = layout.part_range(*part, n_tokens=plan.n_tokens, stride=plan.stride)
        record = parts.acquire(directory / "parts", part, start=self._start, stop=self._stop)
        self._release = weakref.finalize(self, parts.release, record)
        largest = max(plan.chunk_tokens[c.name] * c.width * c.itemsize for c in plan.components)
        asked = processes or threads or len(os.sched_getaffinity(0))
        self._workers = max(1, min(asked, memory // (4 * largest)))
        self._partials = Partials(directory / "partials", plan, memory=memory // 16)
        self._layer_index = {layer: i for i, layer in enumerate(plan.layers)}
        self._dtypes = {c.name: numpy_dtype(c.dtype) for c in plan.components}
        self._failure: BaseException | None = None
        self._count = Lock()
        early = plan.statistics and self._workers * PIECE_BYTES <= memory // 2
        each = max(2 * largest, PIECE_BYTES) if early else 2 * largest
        allowance = memory - memory // 16 - each * self._workers
        arena = Arena(largest, max(1, allowance // largest)) if processes else None
        self._assembly = Assembly(
            plan,
            directory / f"spill-{self._start}",
            allowance=allowance,
            waiting=max(allowance // (2 if processes else 8), 2 * largest * self._workers),
            check=self._raise_failure,
            arena=arena,
        )
        self._total = sum(1 for _ in chunks_within(plan, self.tokens))
        self._disk, self._work = os.open(directory, os.O_RDONLY), self._worked(arena)
        combiner = Combiner(plan, self._group, self._partials)
        self._pending = Pending(combiner, self._work.combine, threads=self._workers, memory=memory)
        self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="datastore-write")
        try:
            self._take_stock(early=early)
        except BaseException:
            self.close()
            raise

    def _worked(self, arena: Arena | None) -> Work:
        compiled = self.plan.statistics and self._raw_total() >= WORTH_COMPILING
        if arena is None:
            return ChunkWork(self._group, self.plan, self._partials, compiled=compiled)
        directory = self._directory / "partials"
        return ChunkProcesses(self._group, self.plan, directory, n=self._workers, arena=arena, compiled=compiled)

    def _take_stock(self, *, early: bool) -> None:
        """Find what earlier processes finished, and remove what they left unfinished or what does not decode."""
        for spilled in self._directory.glob("spill-*"):
            if self._start <= int(spilled.name.removeprefix("spill-")) < self._stop:
                storage.remove(spilled)
        found = finished_chunks(self._group, self.plan, self.tokens, threads=self._workers)
        whole = {chunk: size for chunk, size in found.items() if size}
        if len(whole) < self._total:
            with parts.locked(self._directory / "parts"):
                parts.reopen(self._directory / "parts", start=self._start, stop=self._stop)
                for chunk in found.keys() - whole.keys():
                    storage.chunk_file(self._group / chunk.component, grid_index(chunk)).unlink(missing_ok=True)
        self._taken = set(whole)
        self._written = len(whole)
        self._raw_bytes = sum(self._raw(chunk) for chunk in whole)
        self._stored_bytes = sum(whole.values())
        if early:
            self._pending.expect(chunk for chunk in chunks_within(self.plan, self.tokens) if chunk not in whole)

    # -- what is to do ---------------------------------------------------------------------------------------------

    @property
    def tokens(self) -> tuple[int, int]:
        """The token range that this part owns."""
        return self._start, self._stop

    def wants(self, rollout_id: str) -> bool:
        """Whether any row of the rollout lies in a chunk that this part still has to write."""
        start, stop = self.plan.ragged.range(self.plan.rows[rollout_id])
        return any(
            chunk not in self._taken
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
        with self._count:
            return Progress(
                chunks=self._written,
                chunks_total=self._total,
                raw_bytes=self._raw_bytes,
                raw_bytes_total=self._raw_total(),
                stored_bytes=self._stored_bytes,
            )

    def _raw_total(self) -> int:
        width = sum(c.width * c.itemsize for c in self.plan.components)
        return (self._stop - self._start) * len(self.plan.layers) * width

    def _raw(self, chunk: ChunkId) -> int:
        one = self.plan.component(chunk.component)
        start, stop = layout.chunk_range(chunk.chunk, self.plan.chunk_tokens[one.name], self.plan.n_tokens)
        return (stop - start) * one.width * one.itemsize

    # -- rows in ---------------------------------------------------------------------------------------------------

    def put(
        self,
        component: str,
        layer: int,
        rollout_id: str,
        values: NDArray[Any],
        *,
        start: int = 0,
        copy: bool = True,
    ) -> None:
        """Give rows of one rollout, in any order; rows of other parts and of finished chunks are ignored.

        Called by one thread at a time.

        Parameters
        ----------
        component, layer, rollout_id
            Which cell; it must be in the plan.
        values : array (n, width)
            In the component's stored dtype, never cast.
        start : int
            Position of the first row in its rollout.
        copy : bool
            Whether the caller may change `values` afterwards. Without, whole chunks are compressed where they lie; the
            array is kept until they are written.

        Raises
        ------
        PlanError
            The cell is not in the plan, or the rows do not fit it.
        DatastoreError
            A chunk could not be written; what is finished is kept.
        """
        first = self._check(component, layer, rollout_id, values=values, start=start)
        size, lend = self.plan.chunk_tokens[component], not copy and values.flags.c_contiguous
        begin, end = max(first, self._start), min(first + len(values), self._stop)
        self._raise_failure()
        with self._disk_errors():
            for index in layout.chunks_of(begin, end, size):
                chunk = ChunkId(component, self._layer_index[layer], index)
                if chunk in self._taken:
                    continue
                low, high = layout.chunk_range(index, size, self.plan.n_tokens)
                a, b = max(begin, low), min(end, high)
                rows = values[a - first : b - first]
                whole = self._assembly.lend(chunk, rows) if lend and len(rows) == size else None
                if whole or self._fill(chunk, rows, at=a - low, of=high - low):
                    self._taken.add(chunk)
                    self._pool.submit(self._write, chunk, whole or self._assembly.take(chunk))

    def _fill(self, chunk: ChunkId, rows: NDArray[Any], *, at: int, of: int) -> bool:
        """Copy rows into an open chunk of `of` rows and return whether it is complete."""
        one = self._assembly.open(chunk, of)
        bits(one.values)[at : at + len(rows)] = bits(rows)
        one.filled[at : at + len(rows)] = True
        return one.complete

    def _check(self, component: str, layer: int, rollout_id: str, *, values: NDArray[Any], start: int) -> int:
        spec = self.plan.component(component)
        if layer not in self._layer_index:
            raise PlanError(f"layer {layer} is not in this plan, which has layers {list(self.plan.layers)}")
        if rollout_id not in self.plan.rows:
            raise PlanError(f"rollout {rollout_id!r} is not in this plan of {len(self.plan.rollouts)} rollouts")
        if values.dtype != self._dtypes[component]:
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

    # -- chunks out ------------------------------------------------------------------------------------------------

    def _write(self, chunk: ChunkId, one: OpenChunk) -> None:
        try:
            stored = self._work.write(chunk, one.values, one.rows)
            with self._count:
                self._written += 1
                self._raw_bytes += self._raw(chunk)
                self._stored_bytes += stored
            self._pending.written(chunk, self._pool)
        except BaseException as error:
            self._failure = self._failure or error
        finally:
            self._assembly.give_back(chunk, one)

    def _raise_failure(self) -> None:
        if self._failure is None:
            return
        with self._disk_errors():
            raise self._failure

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Say of an error of the disk what is kept, and how much room the rest needs."""
        try:
            yield
        except OSError as error:
            done = self.progress()
            left = done.raw_bytes_total - done.raw_bytes + self.plan.table_bytes
            raise storage.disk_error(error, self._store, left) from error

    def flush(self) -> None:
        """Wait until every complete chunk is written."""
        self._assembly.wait()

    # -- commit ----------------------------------------------------------------------------------------------------

    def note(self, key: str, value: Any) -> None:
        """Keep a fact about how this part was computed (JSON); it goes into the capture's provenance at commit."""
        with self._disk_errors():
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
        missing = [c for c in chunks_within(self.plan, self.tokens) if c not in self._taken]
        if missing:
            raise PlanError(self._what_is_missing(missing))
        with self._disk_errors():
            self._work.drain()
            sync = partial(storage.sync_files, self._directory, self._disk)
            number = commit_group(self._store, self._directory, self._pending, done=self.tokens, sync=sync)
        self.close()
        return number

    def _what_is_missing(self, missing: list[ChunkId]) -> str:
        chunk = missing[0]
        size = self.plan.chunk_tokens[chunk.component]
        low, high = layout.chunk_range(chunk.chunk, size, self.plan.n_tokens)
        names = [self.plan.rollouts[p.row].rollout_id for p in self.plan.ragged.pieces(low, high)]
        return (
            f"{len(missing)} of {self._total} chunks are not filled, the first is {chunk.component} at layer "
            f"{self.plan.layers[chunk.layer_index]}, tokens {low}-{high} of rollouts {', '.join(names[:4])}; nothing "
            "was committed, put the missing rows and commit again"
        )

    def close(self) -> None:
        """Stop the threads and release the part; what is finished stays for the same plan."""
        if self._release.alive:
            self._pool.shutdown(wait=True)
            self._work.close()
            os.close(self._disk)
            storage.remove(self._directory / f"spill-{self._start}")
            self._release()

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
