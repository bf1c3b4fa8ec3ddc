"""Chunk arithmetic: tokens a chunk, part i of N, rollout <-> token range, what is still to do, names.

A component is stored as a run of tokens of one layer per chunk. Rollouts lie end to end on the token axis (CF
contiguous ragged array), so a rollout is a token range and a chunk holds pieces of one or more rollouts.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from datastore.errors import PlanError

__all__ = [
    "Piece",
    "Ragged",
    "batches",
    "chunk_range",
    "chunk_tokens",
    "chunks_of",
    "label_file",
    "n_chunks",
    "names_a_label",
    "part_range",
]

_MOST_NAME = 255
"""Bytes of the name of a label's array: what file systems take."""
MOST_TOKENS = 1024
MOST_BYTES = 8 << 20


def chunk_tokens(width: int, itemsize: int, *, most_tokens: int = MOST_TOKENS, most_bytes: int = MOST_BYTES) -> int:
    """Return the tokens of one chunk: the largest power of two within both limits, at least 1.

    Parameters
    ----------
    width : int
        Values per token (hidden size of the component).
    itemsize : int
        Bytes per value as stored.
    most_tokens, most_bytes : int
        Limits on the chunk, in tokens and in raw bytes.

    Examples
    --------
    >>> chunk_tokens(7168, 2)
    512
    """
    if min(width, itemsize, most_tokens, most_bytes) < 1:
        raise PlanError(
            f"a chunk needs positive sizes, but width={width}, itemsize={itemsize}, most_tokens={most_tokens}, "
            f"most_bytes={most_bytes}; give sizes of at least 1"
        )
    limit = max(1, min(most_tokens, most_bytes // (width * itemsize)))
    return 1 << (limit.bit_length() - 1)


def n_chunks(n_tokens: int, chunk: int) -> int:
    """Return the number of chunks that hold `n_tokens`."""
    return -(-n_tokens // chunk)


def chunk_range(index: int, chunk: int, n_tokens: int) -> tuple[int, int]:
    """Return the half-open token range of chunk `index`; the last one may be short."""
    return index * chunk, min((index + 1) * chunk, n_tokens)


def chunks_of(start: int, stop: int, chunk: int) -> range:
    """Return the indices of the chunks that hold any token of `[start, stop)`."""
    return range(0) if stop <= start else range(start // chunk, (stop - 1) // chunk + 1)


def part_range(part: int, parts: int, *, n_tokens: int, stride: int) -> tuple[int, int]:
    """Return the token range owned by part `part` (1-based) of `parts`: whole strides, nearly equal, maybe empty.

    The ranges of all parts tile `[0, n_tokens)` without gap or overlap, and every cut is a multiple of `stride`, so no
    chunk belongs to two parts.
    """
    if not 1 <= part <= parts:
        raise PlanError(f"part {part}/{parts} does not exist; parts are numbered from 1 to {parts}")
    total = n_chunks(n_tokens, stride)
    start, stop = (part - 1) * total // parts, part * total // parts
    return min(start * stride, n_tokens), min(stop * stride, n_tokens)


def batches(counts: Sequence[int], *, budget: int) -> list[list[int]]:
    """Group rollouts by length into batches of at most `budget` padded tokens (rollouts x longest).

    Parameters
    ----------
    counts : sequence of int
        Tokens of each rollout.
    budget : int
        Padded tokens a batch may hold; a longer rollout is a batch of its own.

    Returns
    -------
    list of list of int
        Indices into `counts`; ascending by length, ties in the order given, so the same counts give the same batches.
    """
    if budget < 1:
        raise PlanError(f"a batch of {budget} tokens holds nothing; give at least 1")
    groups: list[list[int]] = []
    for index in sorted(range(len(counts)), key=lambda i: (counts[i], i)):
        if groups and (len(groups[-1]) + 1) * counts[index] <= budget:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def label_file(name: str) -> str:
    """Return the array name of a label: itself where that is a plain name, else percent-encoded."""
    return quote(name, safe=" ()+,:;=@[]") if not name.startswith((".", "_", "zarr")) else "%" + name.encode().hex()


def names_a_label(name: str) -> bool:
    """Whether a label may be called so: its array's name can be that of a directory."""
    return bool(name) and "\0" not in name and len(label_file(name)) <= _MOST_NAME


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of tokens of one rollout: its row in the table and a half-open range on the token axis."""

    row: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True, eq=False)
class Ragged:
    """Rollouts laid end to end on the token axis.

    Parameters
    ----------
    counts : sequence of int
        Tokens of each rollout, in the order of the axis; each at least 1.
    """

    counts: Sequence[int] | NDArray[np.int64]
    starts: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        counts = np.asarray(self.counts, dtype=np.int64)
        if counts.size and counts.min() < 1:
            row = int(np.argmin(counts))
            raise PlanError(f"rollout {row} of the plan has {counts[row]} tokens; leave out rollouts without tokens")
        starts = np.zeros(counts.size + 1, dtype=np.int64)
        np.cumsum(counts, out=starts[1:])
        object.__setattr__(self, "starts", starts)

    @property
    def n_tokens(self) -> int:
        """Length of the token axis."""
        return int(self.starts[-1])

    def __len__(self) -> int:
        return len(self.starts) - 1

    def range(self, row: int) -> tuple[int, int]:
        """Return the half-open token range of the rollout in `row`."""
        return int(self.starts[row]), int(self.starts[row + 1])

    def row_at(self, token: int) -> int:
        """Return the row of the rollout that holds `token`."""
        if not 0 <= token < self.n_tokens:
            raise IndexError(f"token {token} is outside [0, {self.n_tokens})")
        return int(np.searchsorted(self.starts, token, side="right")) - 1

    def pieces(self, start: int, stop: int) -> list[Piece]:
        """Return the rollouts' runs that tile `[start, stop)`, in token order."""
        if stop <= start:
            return []
        rows = range(self.row_at(start), self.row_at(stop - 1) + 1)
        return [Piece(row, max(start, self.range(row)[0]), min(stop, self.range(row)[1])) for row in rows]

    def tokens_of(self, rows: Iterable[int]) -> list[tuple[int, int]]:
        """Return the token ranges of `rows`, neighbours joined, in token order."""
        runs: list[tuple[int, int]] = []
        for start, stop in sorted(self.range(row) for row in set(rows)):
            if runs and runs[-1][1] == start:
                runs[-1] = (runs[-1][0], stop)
            else:
                runs.append((start, stop))
        return runs
