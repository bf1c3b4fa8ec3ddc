"""Chunks of an unfinished plan and the statistics of each: which are finished, and the partial file beside it.

A partial is always computed from the bits as stored and bound to its chunk by the chunk's checksum, so a partial that
is missing, damaged or of an earlier attempt is computed again from the chunk, and the sum over chunks in token order is
the same to the bit however the work was interrupted or divided.
"""

import json
import os
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from datastore import layout, storage
from datastore.codec import ChunkDecoder
from datastore.dtype import numpy_dtype
from datastore.errors import CorruptError
from datastore.schema import Plan
from datastore.stats import Key, MomentsTable

__all__ = ["ChunkId", "Partials", "chunks_within", "finished_chunks", "grid_index", "read_chunk"]


SEAL = 4
"""Bytes that tie a partial to its chunk: the chunk's crc32c, with which every codec ends."""


class ChunkId(NamedTuple):
    """A chunk of a plan: component, index of the layer, index along the tokens."""

    component: str
    layer_index: int
    chunk: int


def grid_index(chunk: ChunkId) -> tuple[int, int, int]:
    """Return where a chunk stands in its array (token, layer, hidden)."""
    return chunk.chunk, chunk.layer_index, 0


def read_chunk(group: Path, plan: Plan, chunk: ChunkId) -> tuple[NDArray[Any], bytes]:
    """Read and decode one chunk.

    Returns
    -------
    values : array (rows, width)
        Stored bits, without the padding of a last chunk.
    encoded : bytes
        The file's content.

    Raises
    ------
    CorruptError
        It is missing or does not decode.
    """
    spec, size = plan.component(chunk.component), plan.chunk_tokens[chunk.component]
    array = group / chunk.component
    file = storage.chunk_file(array, grid_index(chunk))
    try:
        encoded = file.read_bytes()
    except OSError as error:
        raise CorruptError(
            f"{file} can't be read ({error.strerror}), so its rows are lost; run the same command again to fill it"
        ) from error
    values = np.empty((size, spec.width), dtype=numpy_dtype(spec.dtype))
    decoder = ChunkDecoder.of(storage.array_metadata(array))
    if decoder is None:
        raise CorruptError(
            f"{array} is encoded with codecs that this release does not write, so the plan can't go on; "
            f"remove {group.parent}"
        )
    decoder.decode_into(encoded, values)
    start, stop = layout.chunk_range(chunk.chunk, size, plan.n_tokens)
    return values[: stop - start], encoded


def chunks_within(plan: Plan, tokens: tuple[int, int]) -> Iterator[ChunkId]:
    """Yield the chunks of a token range, along the token axis first."""
    for one in plan.components:
        for index in layout.chunks_of(*tokens, plan.chunk_tokens[one.name]):
            for i in range(len(plan.layers)):
                yield ChunkId(one.name, i, index)


def finished_chunks(group: Path, plan: Plan, tokens: tuple[int, int], *, threads: int) -> dict[ChunkId, int]:
    """Return the chunks of a token range that are there and decode, with their stored bytes, 0 where one is damaged.

    Temporary files that killed processes left beside them are deleted: a range has one living holder.
    """
    found = []
    begun = {one.name for one in plan.components if (group / one.name / "c").is_dir()}
    for chunk in chunks_within(plan, tokens) if begun else ():
        file = storage.chunk_file(group / chunk.component, grid_index(chunk))
        storage.clear_leftovers(file.parent)
        if file.exists():
            found.append(chunk)

    def size(chunk: ChunkId) -> int:
        try:
            return len(read_chunk(group, plan, chunk)[1])
        except CorruptError:
            return 0

    with ThreadPoolExecutor(threads) as pool:
        return dict(zip(found, pool.map(size, found), strict=True))


class Partials:
    """The directory of partial files of a plan, and the notes of its parts."""

    @staticmethod
    def make_directories(directory: Path, plan: Plan) -> None:
        """Make all directories once, so that a process that is too late for a plan can't bring them back."""
        for one in plan.components:
            for layer_index in range(len(plan.layers)):
                (directory / one.name / str(layer_index)).mkdir(parents=True)

    def __init__(self, directory: Path, plan: Plan, *, memory: int = 0) -> None:
        self._directory, self._plan = directory, plan
        self._kept: dict[ChunkId, MomentsTable] = {}
        self._room = memory  # for tables of chunks that this process wrote, so that a commit need not read them back
        self._notes_file = directory / f"notes-{uuid.uuid4().hex}.json"  # a process id may come back
        self._notes: dict[str, list[Any]] = {}
        self._lock = threading.Lock()

    def pieces(self, chunk: ChunkId) -> list[tuple[Key, int, int]]:
        """Return the runs of one (row, segment), or of one (segment,) where statistics are per capture, of a chunk."""
        start, stop = layout.chunk_range(chunk.chunk, self._plan.chunk_tokens[chunk.component], self._plan.n_tokens)
        runs: list[tuple[Key, int, int]] = []
        for piece in self._plan.ragged.pieces(start, stop):
            begin, _ = self._plan.ragged.range(piece.row)
            cut = min(max(begin + self._plan.rollouts[piece.row].prompt_end, piece.start), piece.stop)
            for segment, (a, b) in enumerate(((piece.start, cut), (cut, piece.stop))):
                key: Key = (piece.row, segment) if self._plan.stats_level == "rollout" else (segment,)
                if a < b:
                    runs.append((key, a - start, b - start))
        return runs

    def _file(self, chunk: ChunkId) -> Path:
        return self._directory / chunk.component / str(chunk.layer_index) / str(chunk.chunk)

    def write(self, chunk: ChunkId, values: NDArray[Any], *, seal: bytes) -> MomentsTable:
        """Compute and keep the statistics of a chunk; `seal` is the end of its file, its checksum."""
        table = MomentsTable.of_pieces(values, self.pieces(chunk))
        encoded = seal + table.to_bytes()
        storage.write_atomic(self._file(chunk), encoded)
        with self._lock:
            if self._room >= len(encoded):
                self._room -= len(encoded)
                self._kept[chunk] = table
        return table

    def read(self, group: Path, chunk: ChunkId) -> MomentsTable:
        """Return the statistics of a chunk, computed again where they are missing or not of its bits."""
        with self._lock:
            kept = self._kept.get(chunk)
        if kept is not None:
            return kept
        file = storage.chunk_file(group / chunk.component, grid_index(chunk))
        try:
            raw = self._file(chunk).read_bytes()
            with file.open("rb") as chunk_bytes:
                chunk_bytes.seek(-SEAL, os.SEEK_END)
                if raw[:SEAL] == chunk_bytes.read():
                    return MomentsTable.from_bytes(raw[SEAL:])
        except (OSError, CorruptError):
            pass
        values, encoded = read_chunk(group, self._plan, chunk)
        return self.write(chunk, values, seal=encoded[-SEAL:])

    def clear(self) -> None:
        """Delete the files of all chunks, which are added up; where one is asked for again, it is computed again."""
        layers = range(len(self._plan.layers))
        with ThreadPoolExecutor(8) as pool:  # a directory is emptied file by file, several at once
            list(
                pool.map(_empty, [self._directory / one.name / str(i) for one in self._plan.components for i in layers])
            )

    def note(self, key: str, value: Any) -> None:
        """Keep a note of this process beside the plan."""
        with self._lock:
            self._notes.setdefault(key, []).append(value)
            storage.write_atomic(self._notes_file, json.dumps(self._notes, sort_keys=True).encode(), durable=True)

    def notes(self) -> dict[str, list[Any]]:
        """Return the notes of all processes, sorted, each once."""
        merged: dict[str, set[str]] = {}
        for file in sorted(self._directory.glob("notes-*.json")):
            for key, values in json.loads(file.read_text()).items():
                merged.setdefault(key, set()).update(json.dumps(v, sort_keys=True) for v in values)
        return {key: [json.loads(v) for v in sorted(values)] for key, values in sorted(merged.items())}


def _empty(directory: Path) -> None:
    """Delete the files of a directory, which stays: a process that is too late must not bring it back."""
    for file in directory.iterdir():
        file.unlink(missing_ok=True)
