"""What a check of a store finds: problems, what each of them makes doubtful, and the capture they are found in."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from datastore.errors import DatastoreError
from datastore.union import Capture, Drop, Union

__all__ = ["DAMAGE", "Problem", "Subject", "some"]

DAMAGE = (DatastoreError, OSError, KeyError, ValueError, TypeError, IndexError, AttributeError, MemoryError)
"""What reading files that someone edited may raise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong, and which rows can't be trusted for it.

    Attributes
    ----------
    message : str
        One sentence for a person.
    capture : int or None
        None where no row is in doubt.
    component, layer : str, int or None
        None: all of the capture's.
    rollouts : tuple of str
        Empty: all of the capture's.
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
        return self.capture is not None

    @property
    def drop(self) -> Drop:
        """What no longer counts once it is repaired."""
        assert self.capture is not None
        return Drop(
            captures=(self.capture,),
            rollouts=frozenset(self.rollouts) if self.rollouts else None,
            layers=None if self.layer is None else frozenset({self.layer}),
            components=None if self.component is None else frozenset({self.component}),
        )


@dataclass(eq=False, kw_only=True)
class Subject:
    """A capture under check: which of its rows still count, and the problems found.

    Attributes
    ----------
    capture : Capture
    drops : sequence of Drop
        Of this capture.
    problems : list of Problem
    """

    capture: Capture
    drops: Sequence[Drop]
    problems: list[Problem] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.union = Union([self.capture], self.drops)

    @property
    def counts(self) -> NDArray[np.bool_]:
        """Which rows of the table count at all."""
        there = set(self.union.rollout_ids)
        return np.array([name in there for name in self.capture.rollout_ids], dtype=np.bool_)

    def counted(self, component: str, layer: int) -> NDArray[np.bool_]:
        """Which rows of the table count at one component and layer."""
        names = self.capture.rollout_ids
        if not self.drops:
            return np.ones(len(names), dtype=np.bool_)
        return np.array([self.union.find(component, layer, name) is not None for name in names], dtype=np.bool_)

    def problem(
        self,
        what: str,
        *,
        component: str | None = None,
        layer: int | None = None,
        rollouts: tuple[str, ...] = (),
        tokens: tuple[int, int] | None = None,
    ) -> None:
        """Add a problem that makes these rows doubtful."""
        message = f"capture {self.capture.number}: {what}"
        self.problems.append(
            Problem(
                message=message,
                capture=self.capture.number,
                component=component,
                layer=layer,
                rollouts=rollouts,
                tokens=tokens,
            )
        )

    def harmless(self, what: str) -> None:
        """Add a problem that makes no row doubtful."""
        self.problems.append(Problem(message=f"capture {self.capture.number}: {what}"))

    @contextmanager
    def guard(self, what: str = "", *, component: str | None = None, layer: int | None = None) -> Iterator[None]:
        """Turn what damage raises into a problem, so that the next check still runs."""
        try:
            yield
        except DAMAGE as error:
            self.problem(f"{what}{str(error) or type(error).__name__}", component=component, layer=layer)

    def names(self, start: int, stop: int) -> tuple[str, ...]:
        """Return the rollouts that have tokens in a range."""
        return tuple(self.capture.rollout_ids[piece.row] for piece in self.capture.ragged.pieces(start, stop))


def some(names: Sequence[object], most: int = 4) -> str:
    """Return the first names, and how many more there are."""
    listed = ", ".join(map(str, names[:most]))
    return listed if len(names) <= most else f"{listed} and {len(names) - most} more"
