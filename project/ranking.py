"""Which vector of a trait steers best: the three rule sets that have been in use, over the same candidates and results.

Every rule set looks at the runs whose first vector is the candidate's (layer and method, and component where the rules
say so) and whose coherence reaches the threshold, and scores the candidate by its largest change of the trait over the
unsteered model. A null coherence counts as below the threshold, a run without a trait mean counts for nothing.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from datastore.errors import MisuseError
from experiments.direction import DirectionEntry, directory_of_position
from experiments.steering import SteeringResults, SteeringRun

__all__ = ["RULES", "Best", "Naturalness", "Rules", "rank", "rules_named"]

Naturalness = Mapping[tuple[int, str, str], float]
"""Mean naturalness by (layer, method, component); what is not in it counts as 100."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How steering results choose a vector.

    Attributes
    ----------
    name : str
    min_coherence : float
        Runs below it do not count.
    directed : bool
        A trait to be lowered is best where it fell most; otherwise the largest rise wins whatever was wanted.
    match_component : bool
        A run counts only for vectors of its own component.
    min_naturalness : float
        Candidates judged below it are dropped; 0 does not look.
    keep_unnatural : bool
        Where all are below it, keep them all rather than none.
    per_layer : bool
        Rank only the best candidate of each layer.
    """

    name: str
    min_coherence: float
    directed: bool = True
    match_component: bool = True
    min_naturalness: float = 0.0
    keep_unnatural: bool = False
    per_layer: bool = False


RULES: Mapping[str, Rules] = {
    "dev": Rules(name="dev", min_coherence=77.0, keep_unnatural=True, per_layer=True),
    "main": Rules(name="main", min_coherence=77.0, min_naturalness=50.0),
    "seed": Rules(name="seed", min_coherence=70.0, directed=False, match_component=False),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """A candidate that some run counts for.

    Attributes
    ----------
    entry : DirectionEntry
    delta : float
        Change of the trait mean in its best run.
    coefficient : float or None
        Weight of the vector in that run.
    coherence : float or None
    sign : int
        -1 where the trait was to be lowered.
    source : str
        "steering", or "manifest" where a manifest says what steering chose.
    """

    entry: DirectionEntry
    delta: float
    coefficient: float | None = None
    coherence: float | None = None
    sign: int = 1
    source: str = "steering"


def rules_named(name: str) -> Rules:
    """Return a rule set by its name.

    Raises
    ------
    MisuseError
        If there is none of that name.
    """
    if name not in RULES:
        raise MisuseError(f"there are no selection rules {name!r}; choose one of {', '.join(RULES)}")
    return RULES[name]


def rank(
    candidates: Iterable[DirectionEntry],
    results: Mapping[str, SteeringResults],
    *,
    rules: Rules,
    min_delta: float = 0.0,
    naturalness: Naturalness | None = None,
) -> list[Best]:
    """Rank a trait's candidates by what steering with them reached, best first.

    Parameters
    ----------
    candidates : iterable of DirectionEntry
        In the order that decides ties: the first stays ahead.
    results : mapping of position to SteeringResults
        The trait's results; a candidate is looked up under its own position.
    rules : Rules
    min_delta : float
        Least change, up or down, that a candidate must have reached.
    naturalness : mapping, optional
        From `read_naturalness`.

    Returns
    -------
    list of Best
        Empty where no run counts.
    """
    by_place = {directory_of_position(position): result for position, result in results.items()}
    scored: list[Best] = []
    sign = 0
    for candidate in _natural(list(candidates), rules=rules, naturalness=naturalness or {}):
        result = by_place.get(directory_of_position(candidate.position))
        if result is None:
            continue
        # the first candidate that has a score decides which way is up for all of the trait's
        best = _best_run(candidate, result, rules=rules, sign=sign or (result.sign if rules.directed else 1))
        if best is not None:
            sign = best.sign
            scored.append(best)
    scored = [best for best in scored if abs(best.delta) >= min_delta]
    ranked = sorted(scored, key=lambda best: -best.delta * best.sign)
    return _first_of_layers(ranked) if rules.per_layer else ranked


def _best_run(candidate: DirectionEntry, result: SteeringResults, *, rules: Rules, sign: int) -> Best | None:
    best: tuple[float, SteeringRun] | None = None
    for run in result.runs:
        delta = result.delta(run)
        if delta is None or not _counts(run, candidate, rules):
            continue
        if best is None or delta * sign > best[0] * sign:
            best = (delta, run)
    if best is None:
        return None
    return Best(
        entry=candidate,
        delta=best[0],
        coefficient=best[1].vector.weight,
        coherence=best[1].result.coherence_mean,
        sign=sign,
    )


def _counts(run: SteeringRun, candidate: DirectionEntry, rules: Rules) -> bool:
    vector, coherence = run.vector, run.result.coherence_mean
    same = vector.layer == candidate.layer and vector.method == candidate.method
    if rules.match_component:
        same = same and (vector.component or "residual") == candidate.component
    return same and coherence is not None and coherence >= rules.min_coherence


def _natural(candidates: list[DirectionEntry], *, rules: Rules, naturalness: Naturalness) -> Sequence[DirectionEntry]:
    if not naturalness or rules.min_naturalness <= 0:
        return candidates
    kept = [e for e in candidates if naturalness.get((e.layer, e.method, e.component), 100.0) >= rules.min_naturalness]
    return candidates if not kept and rules.keep_unnatural else kept


def _first_of_layers(ranked: Iterable[Best]) -> list[Best]:
    by_layer: dict[int, Best] = {}
    for best in ranked:
        by_layer.setdefault(best.entry.layer, best)
    return list(by_layer.values())
