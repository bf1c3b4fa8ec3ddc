"""Check a store against itself: shapes, coordinates, hashes, every chunk, and statistics against the bits.

The default check decodes every chunk, so a flipped bit or a lost file is found. Chunks that were swapped decode: they
are noticed by `full`, which computes norms and statistics again and compares them with those written at capture.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datastore import layout, storage
from datastore.codec import ChunkDecoder
from datastore.dtype import numpy_dtype
from datastore.errors import CorruptError, DatastoreError
from datastore.maintenance import commit_drops
from datastore.schema import ROLES, SEGMENTS, STATISTICS
from datastore.stats import Key, Moments, MomentsTable
from datastore.union import Capture, Drop, Union, load_capture, load_drops

__all__ = ["Problem", "Report", "verify"]

COORDINATES = ("token_id", "position", "segment", "role", "turn", "thinking", "rollout")
RELATIVE = 1e-9
"""How far kept sums may be from sums over the bits: they are float64 sums of the same numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong.

    Attributes
    ----------
    capture : int or None
    message : str
        One sentence for a person.
    component : str or None
    layer : int or None
    rollouts : tuple of str
        Whose rows can't be trusted; empty where the damage is not in rows.
    tokens : (int, int) or None
        On the capture's token axis.
    """

    message: str
    capture: int | None = None
    component: str | None = None
    layer: int | None = None
    rollouts: tuple[str, ...] = ()
    tokens: tuple[int, int] | None = None

    @property
    def repairable(self) -> bool:
        """Whether dropping rows mends it, so that the same capture fills them again."""
        return self.capture is not None and self.component is not None and bool(self.rollouts)


@dataclass(slots=True, kw_only=True)
class Report:
    """What was checked and what was found."""

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


@dataclass(frozen=True, slots=True, eq=False)
class _Checked:
    """What one chunk gave: its statistics, or what is wrong with it."""

    chunk: int
    table: MomentsTable | None
    problem: Problem | None


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
    """
    store = Path(path)
    storage.open_root(store)
    report = Report(full=full)
    drops = load_drops(store)
    captures = list(_captures(store, report))
    total = sum(_n_chunks(one) for one in captures)
    workers = threads or len(os.sched_getaffinity(0))
    for capture in captures:
        _Check(capture, drops, report, workers=workers, tick=lambda: tick(report.chunks, total)).run()
    _check_added(store, report)
    if not report.captures:
        report.problems.append(Problem(message=f"{store} holds no capture, so nothing was checked"))
    if repair:
        broken = [p for p in report.problems if p.repairable]
        if broken:
            report.dropped = commit_drops(store, [_drop_of(p) for p in broken], reason="verify --repair")
    return report


def _drop_of(problem: Problem) -> Drop:
    assert problem.capture is not None
    assert problem.layer is not None
    assert problem.component is not None
    return Drop(
        captures=(problem.capture,),
        rollouts=frozenset(problem.rollouts),
        layers=frozenset({problem.layer}),
        components=frozenset({problem.component}),
    )


def _captures(store: Path, report: Report) -> Iterator[Capture]:
    for number in storage.numbered(store / "captures"):
        report.captures += 1
        try:
            yield load_capture(store / "captures" / f"{number:04d}", number)
        except (DatastoreError, KeyError, ValueError, TypeError) as error:
            message = f"capture {number} can't be opened: {error}; restore it from a copy, or delete its directory"
            report.problems.append(Problem(message=message, capture=number))


def _n_chunks(capture: Capture) -> int:
    try:
        return sum(
            layout.n_chunks(capture.ragged.n_tokens, _chunk_tokens(capture, name)) * len(capture.layers)
            for name in capture.components
        )
    except (DatastoreError, KeyError, ValueError, TypeError):
        return 0


def _chunk_tokens(capture: Capture, component: str) -> int:
    return int(storage.array_metadata(capture.path / component)["chunk_grid"]["configuration"]["chunk_shape"][0])


def _check_added(store: Path, report: Report) -> None:
    """Read whatever was added beside the captures: labels, annotations, calibrations, scores."""
    for kind in storage.ROOT_GROUPS[1:]:
        for number in storage.numbered(store / kind):
            for file in sorted((store / kind / f"{number:04d}").rglob("zarr.json")):
                try:
                    if storage.array_metadata(file.parent).get("node_type") == "array":
                        storage.read_array(file.parent)
                except DatastoreError as error:
                    report.problems.append(Problem(message=f"{kind}/{number:04d} is damaged: {error}"))


class _Check:
    """The checks of one capture."""

    def __init__(
        self,
        capture: Capture,
        drops: list[Drop],
        report: Report,
        *,
        workers: int,
        tick: Callable[[], object],
    ) -> None:
        self.capture, self.report, self.workers, self.tick = capture, report, workers, tick
        self.union = Union([capture], [d for d in drops if capture.number in d.captures])

    def run(self) -> None:
        """Check metadata, coordinates and components, each on its own, so that one problem does not hide others."""
        for check in (self._metadata, self._coordinates, self._table, self._vocabulary):
            self._guard(check)
        for component in self.capture.components:
            self._guard(lambda component=component: self._component(component))  # type: ignore[misc]
        self.report.tokens += self.capture.ragged.n_tokens

    def _guard(self, check: Callable[[], object]) -> None:
        try:
            check()
        except (DatastoreError, KeyError, ValueError, TypeError, IndexError) as error:
            self._problem(f"{error}")

    def _problem(self, what: str, **where: Any) -> None:
        message = f"capture {self.capture.number}: {what}"
        self.report.problems.append(Problem(message=message, capture=self.capture.number, **where))

    # -- what describes the rows -----------------------------------------------------------------------------------

    def _metadata(self) -> None:
        meta = storage.array_metadata(self.capture.path)
        members = meta.get("consolidated_metadata", {}).get("metadata", {})
        if not members:
            self._problem("its metadata is not consolidated")
        for name, described in members.items():
            own = storage.array_metadata(self.capture.path / name)
            different = [k for k in described if k != "consolidated_metadata" and own.get(k) != described[k]]
            if different:
                self._problem(f"the metadata of {name} and the consolidated metadata differ in {', '.join(different)}")
        if list(self.capture.layers) != sorted(set(self.capture.layers)):
            self._problem(f"its layers {list(self.capture.layers)} are not ascending")
        if self._read("layer").tolist() != list(self.capture.layers):
            self._problem("the layer coordinate differs from the layers of the metadata")

    def _read(self, name: str) -> NDArray[Any]:
        return storage.read_array(self.capture.path / name)

    def _coordinates(self) -> None:
        ragged = self.capture.ragged
        counts = np.diff(ragged.starts)
        start = np.repeat(ragged.starts[:-1], counts)
        first = self._first_positions()
        position = np.arange(ragged.n_tokens) - start + np.repeat(first, counts)
        segment = position >= np.repeat(self._read("rollouts/prompt_end"), counts)
        expected = {"position": position, "rollout": np.repeat(np.arange(len(counts)), counts), "segment": segment}
        for name in COORDINATES:
            found = self._read(name)
            if found.shape != (ragged.n_tokens,):
                self._problem(f"{name} has shape {found.shape} for {ragged.n_tokens} tokens")
            elif name in expected and not np.array_equal(found, expected[name]):
                token = int(np.flatnonzero(found != expected[name])[0])
                row = self.capture.rollout_ids[ragged.row_at(token)]
                is_now = f"is {found[token]}, not {expected[name][token]}"
                self._problem(f"{name} of token {token} (rollout {row!r}) {is_now}")
        if int(self._read("role").max(initial=0)) >= len(ROLES) or int(self._read("role").min(initial=0)) < 0:
            self._problem("role holds a code that is none of the roles")

    def _first_positions(self) -> NDArray[np.int64]:
        """Position of the first stored token of each rollout: 0 unless only later rows were kept."""
        file = self.capture.path / "rollouts" / "stored_from"
        return storage.read_array(file) if file.is_dir() else np.zeros(len(self.capture.rollout_ids), np.int64)

    def _table(self) -> None:
        capture = self.capture
        if len(set(capture.rollout_ids)) < len(capture.rollout_ids):
            self._problem("a rollout id is in its table twice, so rows are covered twice")
        if not np.array_equal(self._read("rollouts/token_start"), capture.ragged.starts[:-1]):
            self._problem("token_start of the table does not follow from n_tokens, so rows are covered twice or never")
        if capture.attrs.get("n_tokens") != capture.ragged.n_tokens:
            self._problem(f"the table adds up to {capture.ragged.n_tokens} tokens, its metadata says otherwise")
        ids = self._read("token_id").astype("<i4")
        for row, expected in enumerate(capture.token_sha256):
            start, stop = capture.ragged.range(row)
            found = hashlib.sha256(ids[start:stop].tobytes()).hexdigest()
            if found != expected:
                self._problem(
                    f"the token ids of rollout {capture.rollout_ids[row]!r} have sha256 {found[:12]}, the table says "
                    f"{expected[:12]}"
                )

    def _vocabulary(self) -> None:
        known = self._read("vocab/token_id")
        missing = np.setdiff1d(self._read("token_id"), known) if known.size else np.empty(0)
        if missing.size:
            self._problem(f"{missing.size} token ids have no bytes in vocab, the first is {int(missing[0])}")

    # -- the rows --------------------------------------------------------------------------------------------------

    def _component(self, component: str) -> None:
        spec, capture = self.capture.components[component], self.capture
        array = capture.path / component
        meta = storage.array_metadata(array)
        shape = [capture.ragged.n_tokens, len(capture.layers), spec.width]
        if meta["shape"] != shape or meta["data_type"] != spec.dtype:
            self._problem(f"{component} is {meta['data_type']} {meta['shape']}, and should be {spec.dtype} {shape}")
            return
        decoder = ChunkDecoder.of(meta)
        for index, layer in enumerate(capture.layers):
            self._layer(component, layer, index=index, decoder=decoder)

    def _layer(self, component: str, layer: int, *, index: int, decoder: ChunkDecoder | None) -> None:
        size, spec = _chunk_tokens(self.capture, component), self.capture.components[component]
        chunks = range(layout.n_chunks(self.capture.ragged.n_tokens, size))
        keys = _Pieces(self.capture)
        norms = self._kept_norms(component, index)
        sums: dict[Key, Moments] = {}
        whole = True
        check = _ChunkCheck(self.capture, component, layer, index=index, size=size, decoder=decoder)
        want = keys if self.report.full and norms is not None else None

        def run(chunk: int) -> _Checked:
            return check.run(chunk, self._trusted(component, layer, size, chunk), want)

        with ThreadPoolExecutor(self.workers) as pool:
            for one in _in_order(pool, run, chunks, ahead=4 * self.workers):
                self.report.chunks += 1
                self.tick()
                start, stop = layout.chunk_range(one.chunk, size, self.capture.ragged.n_tokens)
                self.report.raw_bytes += (stop - start) * spec.width * spec.itemsize
                problem = one.problem
                if problem is None and one.table is not None and norms is not None:
                    problem = self._compare_norms(one, norms[start:stop], check)
                    for key, moments in one.table.moments.items():
                        sums[key] = sums[key] + moments if key in sums else moments
                whole &= problem is None and one.table is not None
                if problem is not None:
                    self.report.problems.append(problem)
        if self.report.full and norms is not None:
            self._compare_sums(component, layer, index=index, sums=sums, whole=whole)

    def _trusted(self, component: str, layer: int, size: int, chunk: int) -> tuple[str, ...]:
        """Rollouts of a chunk whose rows of this layer count; the others were dropped."""
        start, stop = layout.chunk_range(chunk, size, self.capture.ragged.n_tokens)
        names = [self.capture.rollout_ids[p.row] for p in self.capture.ragged.pieces(start, stop)]
        return tuple(name for name in names if self.union.find(component, layer, name) is not None)

    def _kept_norms(self, component: str, index: int) -> NDArray[Any] | None:
        if self.capture.attrs.get("statistics") == "none":
            return None
        return self._read(f"stats/{component}/norm")[:, index]

    def _compare_norms(self, one: _Checked, kept: NDArray[Any], check: "_ChunkCheck") -> Problem | None:
        assert one.table is not None
        bad = ~np.isclose(one.table.norms, kept, rtol=1e-6, atol=0.0, equal_nan=True)
        if not bad.any():
            return None
        return check.problem(one.chunk, f"norms of {int(bad.sum())} tokens differ from those written at capture")

    def _compare_sums(self, component: str, layer: int, *, index: int, sums: dict[Key, Moments], whole: bool) -> None:
        """Compare kept sums with sums over the bits, for the keys whose every chunk was read."""
        kept = {name: self._read(f"stats/{component}/{name}") for name in STATISTICS}
        per_rollout = self.capture.attrs["statistics"] == "rollout"
        if not whole and not per_rollout:
            return
        broken = {n for p in self.report.problems if p.component == component and p.layer == layer for n in p.rollouts}
        for key, moments in sums.items():
            name = self.capture.rollout_ids[key[0]] if per_rollout else None
            if name is not None and (name in broken or self.union.find(component, layer, name) is None):
                continue
            place = (*key, index)
            wrong = [s for s in STATISTICS if not _close(kept[s][place], getattr(moments, s))]
            if wrong:
                names = (name,) if name is not None else self.capture.rollout_ids
                of = f"rollout {name!r}" if name is not None else "the capture"
                self._problem(
                    f"statistics of {component} at layer {layer} of {of}, {SEGMENTS[key[-1]]}, differ from the bits in "
                    f"{', '.join(wrong)}",
                    component=component,
                    layer=layer,
                    rollouts=names,
                )


def _in_order(
    pool: ThreadPoolExecutor, run: Callable[[int], _Checked], chunks: range, *, ahead: int
) -> Iterator[_Checked]:
    """Yield results in order with at most `ahead` of them waiting, so that memory does not grow with the store."""
    for first in range(0, len(chunks), ahead):
        yield from pool.map(run, chunks[first : first + ahead])


def _close(kept: NDArray[Any], found: NDArray[Any]) -> bool:
    with np.errstate(invalid="ignore"):
        scale = float(np.nanmax(np.abs(found.astype(np.float64)), initial=0.0))
        scale = scale if np.isfinite(scale) else 0.0
        return bool(np.allclose(kept, found, rtol=RELATIVE, atol=RELATIVE * scale, equal_nan=True))


class _Pieces:
    """The runs of one statistics key in a range of tokens of a capture."""

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self._segment = storage.read_array(capture.path / "segment")
        self._per_rollout = capture.attrs.get("statistics") == "rollout"

    def of(self, start: int, stop: int) -> list[tuple[Key, int, int]]:
        """Return (key, start, stop), counted from `start`."""
        runs: list[tuple[Key, int, int]] = []
        for piece in self._capture.ragged.pieces(start, stop):
            codes = self._segment[piece.start : piece.stop]
            cuts = [0, *(np.flatnonzero(np.diff(codes)) + 1).tolist(), len(codes)]
            for a, b in pairwise(cuts):
                segment = int(codes[a])
                key: Key = (piece.row, segment) if self._per_rollout else (segment,)
                runs.append((key, piece.start - start + a, piece.start - start + b))
        return runs


class _ChunkCheck:
    """Reads the chunks of one component and layer."""

    def __init__(
        self,
        capture: Capture,
        component: str,
        layer: int,
        *,
        index: int,
        size: int,
        decoder: ChunkDecoder | None,
    ) -> None:
        self.capture, self.component, self.layer = capture, component, layer
        self._index, self._size, self._decoder = index, size, decoder
        self._array = capture.path / component

    def run(self, chunk: int, trusted: tuple[str, ...], pieces: _Pieces | None) -> _Checked:
        """Decode a chunk of which some rows count; compute its statistics where pieces are given."""
        if not trusted:
            return _Checked(chunk, None, None)
        try:
            values = self._values(chunk)
            start, stop = layout.chunk_range(chunk, self._size, self.capture.ragged.n_tokens)
            table = None
            if pieces is not None:
                table = MomentsTable.of_pieces(values, pieces.of(start, stop))
            return _Checked(chunk, table, None)
        except CorruptError as error:
            return _Checked(chunk, None, self.problem(chunk, f"is broken: {error}"))

    def _values(self, chunk: int) -> NDArray[Any]:
        start, stop = layout.chunk_range(chunk, self._size, self.capture.ragged.n_tokens)
        spec = self.capture.components[self.component]
        if self._decoder is None:
            region = (slice(start, stop), slice(self._index, self._index + 1), slice(0, spec.width))
            return storage.read_region(self._array, region)[:, 0]
        file = storage.chunk_file(self._array, (chunk, self._index, 0))
        try:
            encoded = file.read_bytes()
        except OSError as error:
            raise CorruptError(f"{file} can't be read ({error.strerror})") from error
        values = np.empty((self._size, spec.width), dtype=numpy_dtype(spec.dtype))
        self._decoder.decode_into(encoded, values)
        return values[: stop - start]

    def problem(self, chunk: int, what: str) -> Problem:
        """Return a problem that names the chunk by rollouts, layer and token range."""
        start, stop = layout.chunk_range(chunk, self._size, self.capture.ragged.n_tokens)
        names = tuple(self.capture.rollout_ids[p.row] for p in self.capture.ragged.pieces(start, stop))
        listed = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        return Problem(
            message=f"capture {self.capture.number}: {self.component} at layer {self.layer}, tokens {start}-{stop} "
            f"(rollouts {listed}): {what}",
            capture=self.capture.number,
            component=self.component,
            layer=self.layer,
            rollouts=names,
            tokens=(start, stop),
        )
