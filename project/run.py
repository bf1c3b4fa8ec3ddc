"""Scores of a store: one pass over the chunks that new columns need, kept in the store, read back labelled.

What a result already holds for a direction's numbers, place, rollout and capture is not computed again.
"""

import errno
import platform
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from datastore import storage
from datastore.cells import Cells
from datastore.errors import AbsentError, MisuseError, ReadOnlyError
from datastore.query import Rollouts, Store
from datastore.results import bring_to_disk, create_sibling, still_there
from datastore.scores import IDENTITY, Place, Result, create_result, known_columns, load_results, read_scores
from experiments.direction import Direction, directions_of
from experiments.vectors import find_directions, load_direction
from project.cleaning import calibrated_dims
from project.kernel import run_tasks
from project.selection import Selection
from project.tasks import Directions, Group, Job, Task, matrices, needed

__all__ = ["Given", "Work", "scores", "stored_scores", "work"]

Given = Selection | Sequence[Direction] | xr.DataArray | str | Path
Runner = Callable[[Job, Sequence[Task]], None]
"""Does all tasks of a job, in whatever processes."""
_TABLE = (
    "trait", "layer", "component", "method", "position", "file", "sha256", "norm", "baseline", "model",
    "applied_model", "source", "requested", "requested_layer", "why", "delta", "coefficient", "sign",
)  # fmt: skip
_PACKAGES = ("activation-datastore", "numpy", "zarr", "numcodecs")


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """What projecting would do: nothing is read or written before `scores` does it.

    Attributes
    ----------
    directions : Directions
    rollouts : tuple of str
    groups : tuple of Group
        The products that are missing; empty where every score is there already.
    absent : mapping of Place to rollout ids
        Not captured there, so without a score.
    changed : tuple of str
        Sentences: directions whose numbers changed since they were scored.
    n_columns : int
        Directions of which any rollout's score is missing.
    decoded_bytes : int
        Of the activations that have to be decoded.
    """

    cells: Cells
    directions: Directions
    rollouts: tuple[str, ...]
    groups: tuple[Group, ...]
    absent: Mapping[Place, Sequence[str]]
    changed: tuple[str, ...]

    @property
    def n_columns(self) -> int:
        """Directions that any rollout lacks a score of."""
        return len({column for group in self.groups for column in group.of("score")})

    @property
    def decoded_bytes(self) -> int:
        """Bytes of the activations that have to be read, before compression, chunks counted by their rows wanted."""
        total = 0
        for group in self.groups:
            tokens = int(self.cells.counts[group.rollouts].sum())
            for place in {column.place for column in group.columns if column.kind != "norm"}:
                spec = self.cells.components[place.component]
                total += tokens * spec.width * spec.itemsize
        return total


def work(
    store: Store, directions: Given, *, rollouts: Rollouts = None, out: str | Path | None = None, dims: Any = None
) -> Work:
    """Find out what has to be computed for scores of these directions over these rollouts.

    Parameters and errors are those of `scores`.
    """
    given = as_directions(directions)
    cells = store.cells
    given.check_widths({name: spec.width for name, spec in cells.components.items()})
    chosen = _indices(cells, rollouts)
    results = results_of(store, out)
    places = list(dict.fromkeys(given.column(i).place for i in range(len(given.vectors))))
    kept = {place: calibrated_dims(store, place, out=out) if dims is None else tuple(dims) for place in places}
    for place, listed in kept.items():
        width = cells.components[place.component].width
        if any(not 0 <= dim < width for dim in listed):
            raise MisuseError(
                f"dimensions {sorted(listed)} are not all in [0, {width}), the width of {place.component}"
            )
    groups, absent = needed(cells, known_columns(results, cells), given, rollouts=chosen, dims=kept)
    nowhere = [place for place, names in absent.items() if len(names) == len(chosen)]
    if nowhere:
        place, there = nowhere[0], cells.layers_of(nowhere[0].component)
        raise AbsentError(
            f"{place.component} at layer {place.layer} is not captured for any of the {len(chosen)} rollouts; captured "
            f"are layers {', '.join(map(str, there)) or 'none'}"
        )
    return Work(
        cells=cells,
        directions=given,
        rollouts=tuple(str(name) for name in cells.ids[chosen]),
        groups=tuple(groups),
        absent=absent,
        changed=tuple(_changed(given, results)),
    )


def scores(
    store: Store,
    directions: Given,
    *,
    rollouts: Rollouts = None,
    memory: int = 10**9,
    threads: int | None = None,
    out: str | Path | None = None,
    dims: Sequence[int] | None = None,
    selection: Mapping[str, Any] | None = None,
    runner: Runner | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """Score rollouts along directions, h · v/|v|, in one pass over the chunks that are needed, and keep the scores.

    Parameters
    ----------
    store : Store
    directions : Selection, directions, DataArray (direction, hidden), or path of direction files
        A path stands for every direction below it.
    rollouts : id, ids or rollout table, optional
        Default all.
    memory : int
        Bytes to hold at most.
    threads : int, optional
        One a core by default.
    out : path, optional
        A store of results beside a store that can't be written; made where there is none.
    dims : sequence of int, optional
        Dimensions whose activations are kept for cleaning; default those of the store's newest calibration.
    selection : mapping, optional
        JSON kept with the result: how the directions and rollouts were asked for.
    runner : callable, optional
        Does the tasks elsewhere, see `project.distributed`.
    progress : callable, optional
        Given tokens done and tokens to do.

    Returns
    -------
    Dataset
        See `datastore.scores.read_scores`: `score` and `norm` over (token, direction), in the order of `directions`.

    Raises
    ------
    AbsentError
        A layer is captured for none of the rollouts.
    MisuseError
        A direction is of another width or component.
    CorruptError
        A chunk is missing or does not decode; nothing is kept.
    ReadOnlyError
        The store can't be written and `out` is not given.
    """
    todo = work(store, directions, rollouts=rollouts, out=out, dims=dims)
    total, before = sum(int(todo.cells.counts[group.rollouts].sum()) for group in todo.groups), 0
    for group in todo.groups:

        def advanced(tokens: int, before: int = before) -> None:
            if progress is not None:
                progress(before + tokens, total)

        run = runner or _in_process(memory=memory, threads=threads, advanced=advanced)
        _keep(store, todo, group, into=_place_for_results(store, out), selection=selection or {}, run=run)
        before += int(todo.cells.counts[group.rollouts].sum())
    shas = [str(sha) for sha in todo.directions.table["sha256"]]
    return read_scores(results_of(store, out), todo.cells, rollouts=todo.rollouts, sha256=shas)


def stored_scores(
    store: Store,
    directions: Given | None = None,
    *,
    rollouts: Rollouts = None,
    traits: Sequence[str] | None = None,
    out: str | Path | None = None,
) -> xr.Dataset:
    """Read scores that are there already, computing nothing.

    Parameters
    ----------
    directions : as for `scores`, optional
        Exactly these, by their numbers as they are now; default the latest of every direction.
    rollouts : id, ids or rollout table, optional
        Default all that have a score.
    traits : sequence of str, optional
        Only these.

    Raises
    ------
    AbsentError
        There are none, or not of these numbers: the files changed after they were scored.
    """
    chosen = None if rollouts is None else [str(store.cells.ids[i]) for i in _indices(store.cells, rollouts)]
    shas = None if directions is None else [str(sha) for sha in as_directions(directions).table["sha256"]]
    return read_scores(results_of(store, out), store.cells, rollouts=chosen, traits=traits, sha256=shas)


def results_of(store: Store, out: str | Path | None) -> list[Result]:
    """Read the metadata of the score results in a store, and of those beside it."""
    found = load_results(store.path)
    return found if out is None or not Path(out).exists() else [*found, *load_results(Path(out))]


def as_directions(given: Given) -> Directions:
    """Return directions with their table, however they were given; the same numbers at the same place once."""
    if isinstance(given, Selection):
        vectors, table = given.vectors, given.directions.copy()
    else:
        if isinstance(given, xr.DataArray):
            vectors = tuple(directions_of(given))
        elif isinstance(given, str | Path):
            vectors = tuple(load_direction(entry) for entry in find_directions(given).entries)
        else:
            vectors = tuple(given)
        table = pd.DataFrame({name: [getattr(v, name, None) for v in vectors] for name in _TABLE})
        table["source"] = "given"
    if not vectors:
        raise MisuseError("there are no directions to score along; give at least one")
    first = ~table.duplicated(["sha256", "component", "layer"]).to_numpy()
    kept = tuple(vector for vector, new in zip(vectors, first, strict=True) if new)
    return Directions(kept, table[first].reset_index(drop=True))


def _indices(cells: Cells, rollouts: Rollouts) -> NDArray[np.int64]:
    if rollouts is None:
        return np.arange(len(cells.ids), dtype=np.int64)
    names: Any = rollouts.index if isinstance(rollouts, pd.DataFrame) else rollouts
    names = [names] if isinstance(names, str) else [str(name) for name in names]
    unknown = [name for name in names if name not in cells.index]
    if unknown or not names:
        raise AbsentError(
            f"rollout {unknown[0]!r} is not in the store" if unknown else "no rollouts are asked for; name at least one"
        )
    return np.array([cells.index[name] for name in dict.fromkeys(names)], dtype=np.int64)


def _changed(given: Directions, results: Sequence[Result]) -> list[str]:
    """Say which directions were scored with other numbers before and never with these."""
    tables = [result.directions.assign(result=result.number) for result in results if len(result.directions)]
    if not tables:
        return []
    before = pd.concat(tables, ignore_index=True)
    found = []
    for vector, row in zip(given.vectors, given.table.itertuples(), strict=True):
        names = (vector.trait, vector.component, vector.layer, vector.method, vector.position)
        same = np.logical_and.reduce([before[key] == name for key, name in zip(IDENTITY, names, strict=True)])
        if same.any() and str(row.sha256) not in set(before[same]["sha256"]):
            old = before[same].iloc[-1]
            found.append(
                f"{vector} has changed since scores/{old['result']:04d} (sha256 {str(row.sha256)[:12]}, was "
                f"{str(old['sha256'])[:12]}); its scores are computed anew"
            )
    return found


def _place_for_results(store: Store, out: str | Path | None) -> Path:
    if out is None:
        return store.path
    create_sibling(Path(out), store.path)
    return Path(out)


def _in_process(*, memory: int, threads: int | None, advanced: Callable[[int], None]) -> Runner:
    def run(job: Job, tasks: Sequence[Task]) -> None:
        run_tasks(job, tasks, memory=memory, threads=threads, done=lambda task: advanced(task.stop))

    return run


def _keep(store: Store, todo: Work, group: Group, *, into: Path, selection: Mapping[str, Any], run: Runner) -> int:
    """Compute one product and publish it as a result; nothing is left behind when that fails."""
    aside = into / "scores" / f"{uuid.uuid4().hex}.partial"
    job = Job(str(aside), todo.cells, group, matrices(todo.directions, group))
    try:
        with still_there(into), todo.cells.unchanged():  # results of one store are never published in another
            aside.parent.mkdir(exist_ok=True)
            _lay_down(store, todo, job, selection=selection)
            run(job, list(job.tasks()))
            storage.consolidate(aside)
            bring_to_disk(aside)
        return storage.publish(aside, into / "scores")
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ReadOnlyError(
                f"{into} can't be written, so no scores can be kept in it; give --out other.zarr to keep them beside it"
            ) from error
        raise
    finally:
        storage.remove(aside)


def _lay_down(store: Store, todo: Work, job: Job, *, selection: Mapping[str, Any]) -> None:
    cells, group = todo.cells, job.group
    columns = group.of("score")
    rows = [i for i in range(len(todo.directions.vectors)) if todo.directions.column(i) in columns]
    table = todo.directions.table.iloc[rows].rename(columns={"position": "vector_position", "norm": "vector_norm"})
    holders = np.stack([cells.where(*place)[0][group.rollouts] for place in group.places], axis=1)
    numbers = np.asarray([capture.number for capture in cells.captures], np.int64)
    names = [str(name) for name in cells.ids[group.rollouts]]
    shas = cells.column("token_sha256")[group.rollouts]
    used = {int(place): cells.captures[place] for place in np.unique(holders)}
    create_result(
        Path(job.path),
        attrs={
            "captures": {str(capture.number): capture.attrs["plan"] for capture in used.values()},
            "store": str(store.path),
            "selection": {**selection, "n_rollouts": len(names)},
            "provenance": {
                "created": datetime.now(UTC).isoformat(),
                "python": platform.python_version(),
                **{name: _version(name) for name in _PACKAGES},
            },
        },
        rollouts={
            name: (str(sha), int(n)) for name, sha, n in zip(names, shas, cells.counts[group.rollouts], strict=True)
        },
        capture=numbers[holders],
        columns=group.columns,
        directions=table.reset_index(drop=True),
        vectors=_vectors(job),
    )


def _vectors(job: Job) -> dict[str, NDArray[np.float32]]:
    """Stack the unit vectors of each component's score columns, in the order of those columns."""
    found: dict[str, list[NDArray[np.float32]]] = {}
    taken: dict[Place, int] = {}
    for column in job.group.of("score"):
        at = taken.get(column.place, 0)
        found.setdefault(column.place.component, []).append(job.matrices[column.place][:, at])
        taken[column.place] = at + 1
    return {component: np.stack(vectors) for component, vectors in found.items()}


@cache
def _version(name: str) -> str:
    try:
        return version(name)
    except ModuleNotFoundError:
        return "unknown"
