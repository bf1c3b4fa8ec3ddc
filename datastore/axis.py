"""A token axis as runs of rollouts' tokens: 50 million tokens cost as much memory as their rollouts. Pure NumPy.

A run is a rollout (an index into a table of rollouts) and a half-open range of positions in it. Runs lie end to end.
All that a reader selects, from the whole store to every third token of one turn, is such an axis.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Axis"]

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Axis:
    """Runs of tokens, end to end.

    Parameters
    ----------
    rollout : int64 array (R,)
        Index of each run's rollout.
    start, stop : int64 arrays (R,)
        Positions in the rollout, half-open; empty runs are left out.

    Attributes
    ----------
    edges : int64 array (R + 1,)
        Where each run begins on this axis; the last is the number of tokens.

    Examples
    --------
    >>> axis = Axis.of(np.array([7, 8]), np.array([0, 0]), np.array([3, 2]))
    >>> axis.take(slice(1, 4)).positions().tolist()
    [1, 2, 0]
    """

    rollout: Ints
    start: Ints
    stop: Ints
    edges: Ints = field(init=False)

    def __post_init__(self) -> None:
        edges = np.zeros(len(self.rollout) + 1, dtype=np.int64)
        np.cumsum(self.stop - self.start, out=edges[1:])
        object.__setattr__(self, "edges", edges)

    @classmethod
    def of(cls, rollout: NDArray[Any], start: NDArray[Any], stop: NDArray[Any]) -> "Axis":
        """Return the axis of these runs; empty ones are left out and runs that continue each other are joined."""
        rollout, start, stop = (np.asarray(a, dtype=np.int64) for a in (rollout, start, stop))
        full = stop > start
        rollout, start, stop = rollout[full], start[full], stop[full]
        goes_on = (rollout[1:] == rollout[:-1]) & (start[1:] == stop[:-1])
        if not goes_on.any():
            return cls(rollout, start, stop)
        first, last = np.r_[True, ~goes_on], np.r_[~goes_on, True]
        return cls(rollout[first], start[first], stop[last])

    @property
    def n_tokens(self) -> int:
        """Length of the axis."""
        return int(self.edges[-1])

    @property
    def lengths(self) -> Ints:
        """Tokens of each run."""
        return self.stop - self.start

    def positions(self) -> Ints:
        """Return each token's position in its own rollout."""
        shift: Ints = self.spread(self.start - self.edges[:-1])
        return np.arange(self.n_tokens, dtype=np.int64) + shift

    def spread(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return one value per token from one value per run."""
        return np.repeat(values, self.lengths)

    def locate(self, tokens: Ints) -> tuple[Ints, Ints]:
        """Return the run and the position of tokens given by their place on this axis (negative ones from its end)."""
        tokens = np.asarray(tokens, dtype=np.int64)
        wrong = (tokens < -self.n_tokens) | (tokens >= self.n_tokens)
        if wrong.any():
            raise IndexError(f"token {int(tokens[wrong][0])} is outside an axis of {self.n_tokens} tokens")
        tokens = np.where(tokens < 0, tokens + self.n_tokens, tokens)
        runs = np.searchsorted(self.edges, tokens, side="right") - 1
        return runs, tokens - self.edges[runs] + self.start[runs]

    def take(self, key: slice | NDArray[Any]) -> "Axis":
        """Return the axis of some of the tokens: a slice, or an array of their places in any order."""
        if not isinstance(key, slice):
            return self._pick(np.asarray(key))
        first, last, step = key.indices(self.n_tokens)
        if step != 1:
            return self._pick(np.arange(first, last, step, dtype=np.int64))
        if last <= first:
            return self._runs(slice(0, 0))
        (low, high), (start, stop) = self.locate(np.array([first, last - 1]))
        part = self._runs(slice(int(low), int(high) + 1))
        part.start[0], part.stop[-1] = start, stop + 1
        return Axis(part.rollout, part.start, part.stop)

    def _runs(self, runs: slice) -> "Axis":
        return Axis(self.rollout[runs].copy(), self.start[runs].copy(), self.stop[runs].copy())

    def _pick(self, tokens: Ints) -> "Axis":
        runs, positions = self.locate(tokens)
        rollout = self.rollout[runs]
        breaks = (rollout[1:] != rollout[:-1]) | (positions[1:] != positions[:-1] + 1)
        first = np.flatnonzero(np.r_[True, breaks][: len(rollout)])
        last = np.flatnonzero(np.r_[breaks, True][: len(rollout)])
        return Axis(rollout[first], positions[first], positions[last] + 1)

    def within(self, start: NDArray[Any], stop: NDArray[Any]) -> "Axis":
        """Return what lies between positions `start` and `stop`, one of each per run."""
        return Axis.of(self.rollout, np.maximum(self.start, start), np.minimum(self.stop, stop))

    def renamed(self, rollout: NDArray[Any]) -> "Axis":
        """Return the same runs with other numbers for the rollouts: `rollout[i]` for rollout i."""
        return Axis(np.asarray(rollout, dtype=np.int64)[self.rollout], self.start, self.stop)

    def same(self, other: "Axis") -> bool:
        """Whether both have the same runs."""
        return all(
            np.array_equal(a, b)
            for a, b in ((self.rollout, other.rollout), (self.start, other.start), (self.stop, other.stop))
        )

    @staticmethod
    def joined(axes: Sequence["Axis"]) -> "Axis":
        """Return the axes end to end."""
        return Axis.of(*(np.concatenate([getattr(a, name) for a in axes]) for name in ("rollout", "start", "stop")))
