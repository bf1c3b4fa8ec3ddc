"""What has to be computed: which columns of which rollouts no result holds yet, as products and tasks. Reads no data.

A task is a run of tokens of a result, whole chunks of it, over all places that the result needs; it says all that a
process needs beside the job, so that any process can do it alone, again, or in another order, to the same bits.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from datastore.axis import Axis
from datastore.cells import Cells
from datastore.errors import MisuseError
from datastore.scores import CHUNK, Column, Place
from experiments.direction import Direction
from project.scoring import unit

__all__ = ["Directions", "Group", "Job", "Task", "needed", "place_of"]

Ints = NDArray[np.int64]


def place_of(direction: Direction) -> Place:
    """Where a direction is scored: its component at its layer."""
    return Place(direction.component, direction.layer)


@dataclass(frozen=True, eq=False)
class Directions:
    """Directions with their table, a row for each; no two have the same numbers at the same place.

    Parameters
    ----------
    vectors : tuple of Direction
    table : DataFrame
        With columns trait, layer, component, method, position, sha256 and more.
    """

    vectors: tuple[Direction, ...]
    table: pd.DataFrame

    def column(self, i: int) -> Column:
        """The column of results that holds the scores of direction `i`."""
        return self.columns[i]

    @cached_property
    def columns(self) -> tuple[Column, ...]:
        """The columns of results of all directions."""
        pairs = zip(self.vectors, self.table["sha256"].tolist(), strict=True)
        return tuple(Column("score", place_of(vector), str(sha)) for vector, sha in pairs)

    def check_widths(self, widths: Mapping[str, int]) -> None:
        """Refuse a direction of another width than the store's component, or of a component that is not there."""
        for vector in self.vectors:
            width = widths.get(vector.component)
            if width is None:
                raise MisuseError(
                    f"{vector} is of a component that the store does not hold; it holds {', '.join(widths) or 'none'}"
                )
            if width != vector.values.size:
                raise MisuseError(
                    f"{vector} has width {vector.values.size} and the store's {vector.component} has {width}; "
                    "it is of another model or component"
                )


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Rollouts that miss exactly the same columns: one product, one result.

    Parameters
    ----------
    rollouts : int64 array
        Indices into the store's rollouts, in the order of the captures' token axes.
    columns : tuple of Column
        Scores first, then norms, then dimensions.
    """

    rollouts: Ints
    columns: tuple[Column, ...]

    @property
    def places(self) -> tuple[Place, ...]:
        """The places, in order of first appearance among the columns."""
        return tuple(dict.fromkeys(column.place for column in self.columns))

    def of(self, kind: str) -> list[Column]:
        """The columns of one kind, in the order of that array's columns."""
        return [column for column in self.columns if column.kind == kind]


@dataclass(frozen=True, slots=True)
class Task:
    """A run of tokens on the result's axis: whole chunks of the result."""

    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Job:
    """All that a process needs to do the tasks of one result; picklable.

    Parameters
    ----------
    path : str
        The result being filled.
    cells : Cells
        The store as it was opened.
    group : Group
    matrices : mapping of Place to float32 array (hidden, direction)
        Unit vectors of the score columns at a place.
    """

    path: str
    cells: Cells
    group: Group
    matrices: Mapping[Place, NDArray[np.float32]]

    @cached_property
    def axis(self) -> Axis:
        """The result's token axis."""
        rollouts = self.group.rollouts
        return Axis.of(rollouts, np.zeros_like(rollouts), self.cells.counts[rollouts])

    def tasks(self, most: int = 20_000) -> Iterator[Task]:
        """Yield the tasks: single chunks of the result, or runs of them where there would be more than `most`."""
        n_tokens = self.axis.n_tokens
        step = CHUNK * max(1, -(-n_tokens // (CHUNK * most)))
        for start in range(0, n_tokens, step):
            yield Task(start, min(start + step, n_tokens))


def needed(
    cells: Cells,
    known: Mapping[Column, set[str]],
    directions: Directions,
    *,
    rollouts: Ints,
    dims: Mapping[Place, Sequence[int]],
) -> tuple[list[Group], dict[Place, list[str]]]:
    """Return what is to be computed, and for each place the rollouts that are not captured there.

    Parameters
    ----------
    cells : Cells
    known : mapping of Column to rollout ids
        From `known_columns`.
    directions : Directions
    rollouts : int64 array
        Indices of the rollouts asked for.
    dims : mapping of Place to dimensions
        Of which the activations are kept beside the scores.
    """
    columns = [directions.column(i) for i in range(len(directions.vectors))]
    places = list(dict.fromkeys(column.place for column in columns))
    columns += [Column("norm", place) for place in places]
    columns += [Column("dim", place, str(dim)) for place in places for dim in sorted(dims.get(place, ()))]
    holders = {place: cells.where(*place)[0][rollouts] for place in places}
    absent = {p: [str(cells.ids[r]) for r in rollouts[holders[p] < 0]] for p in places if (holders[p] < 0).any()}
    missing = np.zeros((len(rollouts), len(columns)), bool)
    for j, column in enumerate(columns):
        done = known.get(column, set())
        missing[:, j] = [str(name) not in done for name in cells.ids[rollouts]]
        missing[:, j] &= holders[column.place] >= 0
    groups = []
    for pattern in np.unique(missing, axis=0)[::-1]:
        if pattern.any():
            mine = rollouts[(missing == pattern).all(axis=1)]
            wanted = tuple(column for column, lacks in zip(columns, pattern, strict=True) if lacks)
            groups.append(Group(_in_token_order(cells, mine, wanted[0].place), wanted))
    return groups, absent


def matrices(directions: Directions, group: Group) -> dict[Place, NDArray[np.float32]]:
    """Return the unit vectors of the group's score columns, (hidden, direction) for each place."""
    units = {directions.column(i): unit(vector.values) for i, vector in enumerate(directions.vectors)}
    found = {}
    for place in group.places:
        mine = [units[column] for column in group.of("score") if column.place == place]
        if mine:
            found[place] = np.ascontiguousarray(np.stack(mine, axis=1))
    return found


def _in_token_order(cells: Cells, rollouts: Ints, place: Place) -> Ints:
    """Order rollouts as they lie in the captures, so that the tasks' runs of tokens are runs of whole chunks."""
    holder, row = (values[rollouts] for values in cells.where(*place))
    return rollouts[np.lexsort((row, holder))]
