"""From direction files and steering results to the table of directions that get scored, and why the others do not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from datastore.errors import AbsentError, DatastoreError
from experiments.direction import Direction, DirectionEntry
from experiments.errors import ExperimentError
from experiments.steering import SteeringFile, SteeringResults, read_naturalness, read_steering
from experiments.vectors import DirectionIndex, load_direction
from project.criteria import Criteria
from project.layerspec import LayerRequest, parse_layer_requests, snapped
from project.ranking import Best, rank

__all__ = ["COLUMNS", "Selection", "select"]

COLUMNS = (
    "trait", "layer", "component", "method", "position", "file", "sha256", "norm", "baseline", "model",
    "applied_model", "source", "requested", "requested_layer", "why", "delta", "coefficient", "sign",
)  # fmt: skip
METHODS = ("probe", "mean_diff", "gradient")
"""Tried in this order at a layer for which steering chose no method."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Selection:
    """The directions to score, and what was left out.

    Attributes
    ----------
    directions : DataFrame
        A row for each, `COLUMNS` as columns.
    vectors : tuple of Direction
        In the order of the rows.
    skipped : DataFrame
        Columns trait, requested, why.
    notes : tuple of str
        What was read around: lines of steering files that could not be used.
    """

    directions: pd.DataFrame
    vectors: tuple[Direction, ...]
    skipped: pd.DataFrame
    notes: tuple[str, ...] = ()


class _SkipError(Exception):
    """This trait, or this layer of it, can't be scored; the others go on."""


@dataclass(slots=True, eq=False)
class _Run:
    rows: list[dict[str, Any]] = field(default_factory=list)
    vectors: list[Direction] = field(default_factory=list)
    skipped: list[tuple[str, str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, eq=False)
class _Trait:
    """What is known of one trait while its layers are resolved."""

    candidates: Sequence[DirectionEntry]
    best: Best | None
    no_best: str
    steered_models: frozenset[str]


def select(
    index: DirectionIndex,
    captured: Sequence[int],
    *,
    steering: Sequence[SteeringFile] = (),
    criteria: Criteria | None = None,
) -> Selection:
    """Choose and load the directions that get scored.

    A trait without vectors or steering results, and a layer without a vector, are skipped and say why; the others go
    on. A layer asked for by number that is not captured is an error, since it would be missing for every trait.

    Parameters
    ----------
    index : DirectionIndex
        From `find_directions`.
    captured : sequence of int
        Layers that the store has of the component.
    steering : sequence of SteeringFile
        From `find_steering`; needed for `best` unless a manifest says what was chosen.
    criteria : Criteria, optional

    Raises
    ------
    AbsentError
        If a layer asked for by number is beyond the snap.
    """
    asked = criteria or Criteria()
    requests = parse_layer_requests(asked.layers)
    for request in requests:
        if request.offset is None:
            _targets(request, None, captured=captured, snap=asked.snap)
    run = _Run()
    for name in asked.traits if asked.traits is not None else sorted({*index.traits, *dict(index.absent)}):
        try:
            trait = _resolved_name(name, index)
            known = _known(trait, index, steering=steering, criteria=asked, notes=run.notes)
        except (_SkipError, ExperimentError) as error:
            run.skipped.append((name, asked.layers, str(error)))
            continue
        for request in requests:
            _add(run, trait, request, known=known, captured=captured, criteria=asked)
    table = pd.DataFrame(run.rows, columns=list(COLUMNS))
    return Selection(
        directions=table.astype(dict.fromkeys(("baseline", "delta", "coefficient"), "float64")),
        vectors=tuple(run.vectors),
        skipped=pd.DataFrame(run.skipped, columns=["trait", "requested", "why"]),
        notes=tuple(dict.fromkeys(run.notes)),
    )


def _resolved_name(name: str, index: DirectionIndex) -> str:
    absent = dict(index.absent)
    if name in index.traits:
        return name
    if name in absent:
        raise _SkipError(absent[name])
    alike = [trait for trait in index.traits if trait.endswith(f"/{name}")]
    if len(alike) == 1:
        return alike[0]
    if alike:
        raise _SkipError(f"trait {name!r} is in several categories; name one of {', '.join(alike)}")
    raise _SkipError(f"there are no vectors of trait {name!r}; there are {', '.join(index.traits) or 'none at all'}")


def _known(
    trait: str,
    index: DirectionIndex,
    *,
    steering: Sequence[SteeringFile],
    criteria: Criteria,
    notes: list[str],
) -> _Trait:
    candidates = _candidates(trait, index, criteria)
    if not any("best" in request.text for request in parse_layer_requests(criteria.layers)) and not steering:
        return _Trait(candidates, None, "", frozenset())
    no_best, results = "", {}
    try:
        results = _results(trait, steering, criteria)
    except _SkipError as error:
        no_best = str(error)
    notes.extend(str(problem) for result in results.values() for problem in result.problems)
    ranked = rank(
        candidates,
        results,
        rules=criteria.resolved_rules(),
        min_delta=criteria.min_delta,
        naturalness=_naturalness(results),
    ) or _ranked_by_manifest(candidates, steered=bool(results))
    if not ranked and not no_best:
        coherent = f"coherence of {criteria.resolved_rules().min_coherence:g} or more"
        no_best = f"no steering run of trait {trait} with {coherent} used one of its vectors"
    models = {result.header.steering_model for result in results.values() if result.header.steering_model}
    return _Trait(candidates, ranked[0] if ranked else None, no_best, frozenset(models))


def _candidates(trait: str, index: DirectionIndex, criteria: Criteria) -> list[DirectionEntry]:
    every = [entry for entry in index.entries if entry.trait == trait]
    wanted = (("variant", criteria.variant), ("component", criteria.component), ("position", criteria.position))
    for name, value in wanted:
        kept = [entry for entry in every if value in (None, getattr(entry, name))]
        if not kept:
            there = sorted({str(getattr(entry, name)) for entry in every})
            raise _SkipError(f"trait {trait} has no vectors of {name} {value!r}; it has {', '.join(there)}")
        every = kept
    variants = sorted({str(entry.variant) for entry in every})
    if len(variants) > 1:
        raise _SkipError(f"trait {trait} has vectors of the variants {', '.join(variants)}; name one")
    return every


def _results(trait: str, steering: Sequence[SteeringFile], criteria: Criteria) -> dict[str, SteeringResults]:
    """Read the trait's results, one file for each position."""
    files = [file for file in steering if file.trait == trait]
    if not files:
        raise _SkipError(f"there are no steering results of trait {trait}, so none of its layers is best")
    for name, value in (("variant", criteria.steering_variant), ("prompt_set", criteria.prompt_set)):
        kept = [file for file in files if value in (None, getattr(file, name))]
        if not kept:
            there = sorted({str(getattr(file, name)) for file in files})
            raise _SkipError(f"trait {trait} has no steering results of {name} {value!r}; it has {', '.join(there)}")
        files = kept
    for name in ("variant", "experiment"):
        there = sorted({str(getattr(file, name)) for file in files})
        if len(there) > 1:
            raise _SkipError(f"trait {trait} has steering results of the {name}s {', '.join(there)}; choose one")
    return {file.position: read_steering(file.file) for file in files}


def _naturalness(results: Mapping[str, SteeringResults]) -> dict[tuple[int, str, str], float]:
    found: dict[tuple[int, str, str], float] = {}
    for result in results.values():
        file = Path(result.file).with_name("naturalness.json")
        if file.is_file():
            found |= read_naturalness(file)
    return found


def _ranked_by_manifest(candidates: Sequence[DirectionEntry], *, steered: bool) -> list[Best]:
    """Take a manifest's word for what steering reached, where no steering results are given."""
    if steered:
        return []
    chosen = [
        Best(entry=e, delta=e.delta, coefficient=e.coefficient, sign=-1 if e.delta < 0 else 1, source="manifest")
        for e in candidates
        if e.delta is not None
    ]
    return sorted(chosen, key=lambda best: -abs(best.delta))


def _add(
    run: _Run, trait: str, request: LayerRequest, *, known: _Trait, captured: Sequence[int], criteria: Criteria
) -> None:
    """Resolve one request of one trait into rows, or into a reason."""
    try:
        if request.offset is not None and known.best is None:
            raise _SkipError(known.no_best)
        for asked, used, why in _targets(request, known.best, captured=captured, snap=criteria.snap):
            entry = _picked(trait, used, request, known=known, criteria=criteria)
            _append(run, entry, request, asked=asked, why=why, known=known, criteria=criteria)
    except (_SkipError, ExperimentError, DatastoreError) as error:
        run.skipped.append((trait, request.text, str(error)))


def _targets(
    request: LayerRequest, best: Best | None, *, captured: Sequence[int], snap: int
) -> list[tuple[int, int, str]]:
    """Return (layer asked for, captured layer used, why) for each layer of a request."""
    if request.span is not None:
        inside = [layer for layer in sorted(captured) if layer in request.span]
        if not inside:
            listed = ", ".join(map(str, sorted(captured)))
            raise AbsentError(f"no layer of {request.text} is captured; captured are {listed or 'none'}")
        return [(layer, layer, f"captured, in {request.text}") for layer in inside]
    layer = request.layer
    if layer is None:
        assert best is not None  # who has none has been skipped
        layer = best.entry.layer + (request.offset or 0)
    used = snapped(layer, captured, within=snap)
    why = "captured" if used == layer else f"layer {layer} is not captured, {used} is the nearest within {snap}"
    return [(layer, used, why)]


def _picked(trait: str, layer: int, request: LayerRequest, *, known: _Trait, criteria: Criteria) -> DirectionEntry:
    """Choose method and position at a layer.

    The method is the one asked for, else that of the best vector at its own layer (and where `best` itself was
    snapped), else the first of `METHODS` there is, else the only one there is.
    """
    best = known.best.entry if known.best is not None else None
    positions = sorted({entry.position for entry in known.candidates})
    position = best.position if best is not None else positions[0]
    if best is None and len(positions) > 1:
        raise _SkipError(f"trait {trait} has vectors of the positions {', '.join(positions)}; name one with --position")
    here = {e.method: e for e in known.candidates if e.layer == layer and e.position == position}
    order: tuple[str, ...] = METHODS if criteria.method is None else (criteria.method,)
    if best is not None and criteria.method is None and (layer == best.layer or request.offset == 0):
        order = (best.method, *METHODS)
    for method in order:
        if method in here:
            return here[method]
    if len(here) == 1 and criteria.method is None:
        return next(iter(here.values()))
    asked = f" of method {criteria.method!r}" if criteria.method else ""
    layers = sorted({e.layer for e in known.candidates})
    raise _SkipError(
        f"trait {trait} has no vector{asked} at layer {layer} and position {position}; "
        f"it has layers {', '.join(map(str, layers))}"
    )


def _append(
    run: _Run,
    entry: DirectionEntry,
    request: LayerRequest,
    *,
    asked: int,
    why: str,
    known: _Trait,
    criteria: Criteria,
) -> None:
    best = known.best
    from_best = best is not None and (request.offset == 0 or entry.layer == best.entry.layer)
    source = best.source if best is not None and from_best else "layers_arg"
    for row, vector in zip(run.rows, run.vectors, strict=True):
        if (vector.file, vector.key, vector.trait, vector.layer) == (entry.file, entry.key, entry.trait, entry.layer):
            # two requests that come to the same layer are one direction; where it came from steering it says so
            row["requested"] += f",{request.text}"
            if row["source"] == "layers_arg" and source != "layers_arg":
                row.update(source=source, why=why, requested_layer=asked, **_steered(best, from_best=True))
            return
    vector = load_direction(entry)
    _check(vector, known=known, criteria=criteria)
    table = {name: getattr(vector, name) for name in COLUMNS[: COLUMNS.index("source")]}
    placed = {"source": source, "requested": request.text, "requested_layer": asked, "why": why}
    run.rows.append({**table, **placed, **_steered(best, from_best=from_best)})
    run.vectors.append(vector)


def _steered(best: Best | None, *, from_best: bool) -> dict[str, Any]:
    if best is None or not from_best:
        return {"delta": None, "coefficient": None, "sign": best.sign if best is not None else 1}
    return {"delta": best.delta, "coefficient": best.coefficient, "sign": best.sign}


def _check(vector: Direction, *, known: _Trait, criteria: Criteria) -> None:
    if criteria.width not in (None, vector.values.size):
        raise _SkipError(
            f"{vector} has width {vector.values.size} and the store's {criteria.component} has {criteria.width}; "
            "it is of another model or component"
        )
    models = [name for name in (vector.model, vector.applied_model, *sorted(known.steered_models)) if name]
    if criteria.model is None or criteria.force_model or not models:
        return
    if _short(criteria.model) not in map(_short, models):
        raise _SkipError(
            f"{vector} belongs to {', '.join(dict.fromkeys(models))} and the store to {criteria.model}; "
            "if its directions mean the same there, give --force-model"
        )


def _short(model: str) -> str:
    # a hub name and a local directory of the same model share the last part
    return model.rstrip("/").rsplit("/", 1)[-1].casefold()
