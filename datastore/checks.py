"""The checks of what describes a capture's rows: metadata, files, coordinates, table, hashes, vocabulary."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datastore import layout, storage
from datastore.findings import Subject, some
from datastore.schema import ROLES

__all__ = ["check_description"]

PER_TOKEN = ("token_id", "position", "segment", "role", "turn", "thinking", "rollout")


def check_description(subject: Subject) -> None:
    """Check everything of a capture but its components and statistics; each check goes on where another fails."""
    for check in (_metadata, _files, _arrays, _coordinates, _table, _hashes, _vocabulary):
        with subject.guard():
            check(subject)


def _read(subject: Subject, name: str) -> NDArray[Any]:
    return storage.read_array(subject.capture.path / name)


def _members(subject: Subject) -> dict[str, Mapping[str, Any]]:
    meta = storage.array_metadata(subject.capture.path)
    found: dict[str, Mapping[str, Any]] = (meta.get("consolidated_metadata") or {}).get("metadata") or {}
    return found


def _owner(subject: Subject, name: str) -> str | None:
    """Return the component whose array or statistic this is."""
    parts = name.split("/")
    owner = parts[1] if parts[0] == "stats" and len(parts) > 1 else parts[0]
    return owner if owner in subject.capture.components else None


def _metadata(subject: Subject) -> None:
    capture, members = subject.capture, _members(subject)
    if not members:
        subject.problem("its metadata is not consolidated")
    for name, described in members.items():
        component = _owner(subject, name)
        if component is not None and component not in subject.union.components:
            continue
        with subject.guard(component=component):
            own = storage.array_metadata(capture.path / name)
            keys = (described.keys() | own.keys()) - {"consolidated_metadata"}
            different = sorted(key for key in keys if own.get(key) != described.get(key))
            if different:
                what = f"the metadata of {name} and the consolidated metadata differ in {', '.join(different)}"
                subject.problem(what, component=component)
    if list(capture.layers) != sorted(set(capture.layers)) or not capture.layers:
        subject.problem(f"its layers {list(capture.layers)} are not ascending")
    if _read(subject, "layer").tolist() != list(capture.layers):
        subject.problem("the layer coordinate differs from the layers of the metadata")
    batches = [capture.batches[i] if 0 <= i < len(capture.batches) else [] for i in capture.batch.tolist()]
    if any(name not in batch for name, batch in zip(capture.rollout_ids, batches, strict=True)):
        subject.problem("the batches of its table are not those of its metadata")


def _files(subject: Subject) -> None:
    """Find files that no reader asks for, and links, which may lead out of the store."""
    grids = {name: _grid(one) for name, one in _members(subject).items()}
    if not grids:
        return
    for directory, folders, files in os.walk(subject.capture.path):
        for name in (*files, *folders):
            file = Path(directory, name)
            inside = PurePosixPath(file.relative_to(subject.capture.path).as_posix())
            if file.is_symlink():
                subject.harmless(f"{inside} is a link, which a store does not hold; put what it leads to in its place")
            elif name in files and not _belongs(inside, grids):
                subject.harmless(f"{inside} does not belong to it; delete it")


def _grid(meta: Mapping[str, Any]) -> list[int] | None:
    if meta.get("node_type") != "array":
        return None
    sizes = meta["chunk_grid"]["configuration"]["chunk_shape"]
    return [layout.n_chunks(n, size) for n, size in zip(meta["shape"], sizes, strict=True)]


def _belongs(file: PurePosixPath, grids: Mapping[str, list[int] | None]) -> bool:
    if file.name == "zarr.json":
        return str(file.parent) in grids or len(file.parts) == 1
    for place, part in enumerate(file.parts):
        grid = grids.get("/".join(file.parts[:place]))
        if part == "c" and grid is not None:
            index = file.parts[place + 1 :]
            return len(index) == len(grid) and all(
                i.isdecimal() and str(int(i)) == i and int(i) < n for i, n in zip(index, grid, strict=True)
            )
    return False


def _arrays(subject: Subject) -> None:
    """Decode every small array: a bit that flipped in one is an error of its checksum."""
    for name, meta in _members(subject).items():
        if meta.get("node_type") == "array" and _owner(subject, name) is None:
            with subject.guard():
                _read(subject, name)


def _coordinates(subject: Subject) -> None:
    ragged, counts = subject.capture.ragged, np.diff(subject.capture.ragged.starts)
    position = np.arange(ragged.n_tokens) - np.repeat(ragged.starts[:-1], counts)
    expected: dict[str, NDArray[Any]] = {
        "position": position,
        "rollout": np.repeat(np.arange(len(counts)), counts),
        "segment": position >= np.repeat(_read(subject, "rollouts/prompt_end"), counts),
    }
    for name in PER_TOKEN:
        with subject.guard():
            found = _read(subject, name)
            if found.shape != (ragged.n_tokens,):
                subject.problem(f"{name} has shape {found.shape} for {ragged.n_tokens} tokens")
            elif name in expected:
                _compare(subject, name, found, expected=expected[name])
            elif name == "role":
                _named_roles(subject, found)


def _compare(subject: Subject, name: str, found: NDArray[Any], *, expected: NDArray[Any]) -> None:
    rows = _rows_with(subject, found != expected)
    if rows:
        token = int(np.flatnonzero(found != expected)[0])
        subject.problem(
            f"{name} of token {token} is {found[token]}, not {int(expected[token])} (rollouts {some(rows)})",
            rollouts=rows,
        )


def _named_roles(subject: Subject, found: NDArray[Any]) -> None:
    rows = _rows_with(subject, (found < 0) | (found >= len(ROLES)))
    if rows:
        subject.problem(f"role holds codes that are none of the roles (rollouts {some(rows)})", rollouts=rows)


def _rows_with(subject: Subject, bad: NDArray[np.bool_]) -> tuple[str, ...]:
    """Return the rollouts that count and have a bad token."""
    if not bad.any():
        return ()
    wrong = np.logical_or.reduceat(bad, subject.capture.ragged.starts[:-1]) & subject.counts
    return tuple(subject.capture.rollout_ids[row] for row in np.flatnonzero(wrong).tolist())


def _table(subject: Subject) -> None:
    capture = subject.capture
    if len(set(capture.rollout_ids)) < len(capture.rollout_ids):
        subject.problem("a rollout id is in its table twice, so rows are covered twice")
    if not np.array_equal(_read(subject, "rollouts/token_start"), capture.ragged.starts[:-1]):
        subject.problem("token_start of its table does not follow from n_tokens, so rows are covered twice or never")
    if capture.attrs.get("n_tokens") != capture.ragged.n_tokens:
        said = capture.attrs.get("n_tokens")
        subject.problem(f"its table adds up to {capture.ragged.n_tokens} tokens, its metadata says {said}")
    if capture.attrs.get("n_rollouts") != len(capture.rollout_ids):
        said = capture.attrs.get("n_rollouts")
        subject.problem(f"its table has {len(capture.rollout_ids)} rollouts, its metadata says {said}")


def _hashes(subject: Subject) -> None:
    """Compare token ids with their hashes; of a rollout whose prompt has no rows, the hash covers the prompt too."""
    capture, counts = subject.capture, subject.counts
    ids, prefixes = _read(subject, "token_id").astype("<i4"), _Prefixes(subject)
    for row, expected in enumerate(capture.token_sha256):
        start, stop = capture.ragged.range(row)
        before = prefixes.of(row)
        found = hashlib.sha256(before.tobytes() + ids[start:stop].tobytes()).hexdigest()
        found = f"{found}+{len(before)}" if len(before) else found
        if counts[row] and found != expected:
            name = capture.rollout_ids[row]
            what = f"the token ids of rollout {name!r} have sha256 {found[:12]}, its table says {expected[:12]}"
            subject.problem(what, rollouts=(name,))


class _Prefixes:
    """Token ids that were computed before the first stored ones, by row of the table."""

    def __init__(self, subject: Subject) -> None:
        rows = len(subject.capture.rollout_ids)
        self._edges, self._ids = np.zeros(rows + 1, dtype=np.int64), np.empty(0, dtype="<i4")
        if (subject.capture.path / "prefix").is_dir():
            np.cumsum(_read(subject, "prefix/n_tokens"), out=self._edges[1:])
            self._ids = _read(subject, "prefix/token_id").astype("<i4")

    def of(self, row: int) -> NDArray[np.int32]:
        """Return those of one rollout."""
        return self._ids[self._edges[row] : self._edges[row + 1]]


def _vocabulary(subject: Subject) -> None:
    """Check the bytes of token ids; a capture may have been made without any."""
    known, offset = _read(subject, "vocab/token_id"), _read(subject, "vocab/offset")
    n_bytes = len(_read(subject, "vocab/bytes"))
    if len(offset) != len(known) + 1 or (np.diff(offset) < 0).any() or offset[0] != 0 or offset[-1] != n_bytes:
        subject.problem("the offsets of vocab do not tile its bytes")
    if not known.size:
        return
    lacking = ~np.isin(_read(subject, "token_id"), known)
    rows = _rows_with(subject, lacking)
    if rows:
        first = int(_read(subject, "token_id")[np.flatnonzero(lacking)[0]])
        what = f"token ids have no bytes in vocab, the first is {first} (rollouts {some(rows)})"
        subject.problem(what, rollouts=rows)
