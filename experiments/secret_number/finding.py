"""The finding: does a direction learned from single questions tell false claims from true ones in whole games?

The direction and its layer are chosen before a game is looked at: learned from the single-turn set, the layer by
steering. Nothing here is fitted on the games. What falls to one of its controls is said to have fallen.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

import project
from datastore.errors import MisuseError
from datastore.query import Store
from experiments.direction import Direction
from experiments.secret_number import controls
from experiments.secret_number.answers import answers_of, positions
from experiments.secret_number.controls import Lessons
from project.pooling import pooled_means
from project.statistics import bootstrap_mean

__all__ = ["CAVEAT", "by_layer", "find", "pairs", "profile", "verdict"]

Tick = Callable[[str], object]
OFFSETS = {"start": range(-3, 10), "claim": range(-4, 6), "stop": range(-6, 5)}
"""Tokens around the start of the answer, the token that decides its truth, and its full stop."""
LEAST = 4
"""Answers of each kind below which an AUROC says nothing."""

CAVEAT = (
    "A toy: a model of a million parameters, trained to lie by a rule, knows that a claim is false only as far as its "
    "training rewards it, by what follows a claim. This shows how to look for such a direction and how to doubt it. It "
    "does not show that larger models hold one, or that this way of looking would find it in them."
)


def find(
    store: Store,
    direction: Direction,
    *,
    learned_on: Store,
    others: Sequence[Direction] = (),
    seed: int = 0,
    tick: Tick = lambda _: None,
) -> dict[str, Any]:
    """Measure a direction on the audit answers of a store, beside its controls.

    Parameters
    ----------
    store : Store
        Of rollouts that nothing was fitted on.
    direction : Direction
        From `project fit`.
    learned_on : Store
        What it was fitted on, for the controls that learn again.
    others : sequence of Direction
        The same trait at other layers, to say where it is to be found; they decide nothing.
    seed : int
        Of resampling, shuffling and random directions.
    tick : callable
        Told what comes next.

    Returns
    -------
    dict
        JSON: direction, counts, readings with their controls, profile, pairs, layers, survives, verdict, caveat.

    Raises
    ------
    AbsentError
        There are no audit answers, or a layer or the embedding is not captured.
    MisuseError
        Too few answers are false, or true.
    """
    answers = answers_of(store)
    _check_numbers(answers)
    tick("what the direction was learned from")
    lessons = controls.lessons_of(learned_on, direction)
    tick("readings and controls")
    readings = _readings(store, answers, direction, lessons=lessons, seed=seed)
    tick("where it separates")
    curves = profile(store, answers, direction, seed=seed)
    found: dict[str, Any] = {
        "direction": _about(direction),
        "answers": {
            "n": len(answers),
            "false": int(answers["false"].sum()),
            "by_question": {
                str(kind): {"n": len(of), "false": int(of["false"].sum())} for kind, of in answers.groupby("question")
            },
            "labels": {str(k): int(v) for k, v in answers["label"].value_counts().sort_index().items()},
        },
        "compare": _compared(store, direction, seed=seed),
        "readings": readings,
        "first_separates": {key: curve["first_separates"] for key, curve in curves.items()},
        "profile": curves,
        "pairs": pairs(store, answers, direction),
    }
    tick("other layers")
    found["layers"] = by_layer(store, answers, [direction, *others], seed=seed)
    found["survives"] = verdict(readings)
    found["verdict"] = _sentence(found)
    found["caveat"] = CAVEAT
    return found


def _compared(store: Store, direction: Direction, *, seed: int) -> list[dict[str, Any]]:
    """Set the labels side by side over the whole answers, as anyone would first; what is said differs there too."""
    if "classification" not in store.rollouts.columns:
        return []
    table = project.compare(store, project.scores(store, [direction]), "classification", segment="response", seed=seed)
    rows: list[dict[str, Any]] = json.loads(table.to_json(orient="records"))
    return rows


def _check_numbers(answers: pd.DataFrame) -> None:
    n_false = int(answers["false"].sum())
    if min(n_false, len(answers) - n_false) < LEAST:
        raise MisuseError(
            f"of {len(answers)} audit answers {n_false} are false; {LEAST} of each kind are the least that an AUROC "
            "says anything of; capture more rollouts"
        )


def _about(direction: Direction) -> dict[str, Any]:
    facts = {
        key: direction.facts[key] for key in ("auroc", "auroc_shuffled", "auroc_token_ids") if key in direction.facts
    }
    return {
        "trait": direction.trait,
        "layer": direction.layer,
        "component": direction.component,
        "method": direction.method,
        "position": direction.position,
        "sha256": direction.sha256,
        "where_it_was_learned": facts,
    }


def _unit(direction: Direction) -> Any:
    return np.asarray(direction.values, np.float64) / direction.norm


def _readings(
    store: Store, answers: pd.DataFrame, direction: Direction, *, lessons: Lessons, seed: int
) -> dict[str, dict[str, Any]]:
    """Read all answers and those of equal sentences, each before the answer and at its full stop."""
    same = controls.equals(answers)
    asked: list[tuple[str, pd.DataFrame, int, str, bool]] = [
        ("before the answer", answers, -1, "start", False),
        ("at the full stop", answers, 0, "stop", False),
        ("equal sentences, before the answer", same, -1, "start", True),
        ("equal sentences, at the full stop", same, 0, "stop", True),
    ]
    return {
        name: _reading(
            store, of, positions(of, offset, since=since), direction=direction, lessons=lessons, equal=equal, seed=seed
        )
        for name, of, offset, since, equal in asked
        if min(int(of["false"].sum()), int((~of["false"]).sum())) >= 2
    }


def _reading(
    store: Store,
    answers: pd.DataFrame,
    tokens: dict[str, Any],
    *,
    direction: Direction,
    lessons: Lessons,
    equal: bool,
    seed: int,
) -> dict[str, Any]:
    rows = pooled_means(store, direction.component, direction.layer, tokens=tokens)
    false = answers["false"].to_numpy(dtype=bool)
    strata = answers["sentence"].tolist() if equal else None
    score = rows @ _unit(direction)
    area = controls.judged(score, false, strata=strata, seed=seed)
    spread: dict[str, Any] = {"observed": area.value, "strata": strata, "seed": seed}
    found = {
        "n_false": int(false.sum()),
        "n_true": int((~false).sum()),
        **({"n_sentences": len(set(strata))} if strata else {}),
        "auroc": asdict(area),
        "shuffled_labels": asdict(controls.shuffled_spread(score, false, strata=strata, seed=seed)),
        "relearned_from_shuffled": asdict(controls.relearned_spread(rows, false, lessons, **spread)),
        "random_directions": asdict(controls.random_spread(rows, false, **spread)),
    }
    # what has been said up to the token that is read, and it: nothing yet where the answer has not begun
    said = {
        str(name): np.arange(start, at[0] + 1)
        for name, start, at in zip(answers["rollout"], answers["start"], tokens.values(), strict=True)
    }
    if all(len(at) for at in said.values()):
        embedded = pooled_means(store, *controls.EMBEDDING, tokens=said)
        found["token_ids"] = asdict(controls.token_ids(lessons, controls.words_at(store, said), false, strata=strata))
        found["embedding"] = asdict(controls.embedding(lessons, embedded, false, strata=strata))
    return found


def profile(store: Store, answers: pd.DataFrame, direction: Direction, *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Follow the AUROC token by token around three places, over all answers and over equal sentences.

    Returns
    -------
    dict
        `{place}` and `{place}, equal sentences` to lists over offsets: auroc, low, high, the range of random
        directions, numbers of answers; and `first_separates`, the first offset from which on two neighbours are both
        above 0.5 with their whole interval and above 97.5 % of random directions; None where there is none.
    """
    found = {}
    for kind, of, equal in (("", answers, False), (", equal sentences", controls.equals(answers), True)):
        for since, offsets in OFFSETS.items():
            points = [_point(store, of, direction, since=since, offset=at, equal=equal, seed=seed) for at in offsets]
            kept = [point for point in points if point is not None]
            if kept:
                curve: dict[str, Any] = {key: [point[key] for point in kept] for key in kept[0]}
                found[since + kind] = {**curve, "first_separates": _first(kept)}
    return found


def _point(
    store: Store, answers: pd.DataFrame, direction: Direction, *, since: str, offset: int, equal: bool, seed: int
) -> dict[str, Any] | None:
    tokens = positions(answers, offset, since=since)
    here = answers[answers["rollout"].isin(tokens)]
    here = controls.equals(here) if equal else here
    false = here["false"].to_numpy(dtype=bool)
    if min(int(false.sum()), int((~false).sum())) < LEAST:
        return None
    kept = {name: tokens[name] for name in here["rollout"]}
    rows = pooled_means(store, direction.component, direction.layer, tokens=kept)
    strata = here["sentence"].tolist() if equal else None
    area = controls.judged(rows @ _unit(direction), false, strata=strata, seed=seed)
    chance = controls.random_spread(rows, false, observed=area.value, strata=strata, seed=seed, n=200)
    return {
        "offset": offset,
        "auroc": area.value,
        "low": area.low,
        "high": area.high,
        "random_low": chance.low,
        "random_high": chance.high,
        "n_false": int(false.sum()),
        "n_true": int((~false).sum()),
    }


def _first(points: Sequence[dict[str, Any]]) -> int | None:
    above = [p["low"] > 0.5 and p["auroc"] > p["random_high"] for p in points]
    return next((p["offset"] for p, (now, then) in zip(points, pairwise(above), strict=False) if now and then), None)


def pairs(store: Store, answers: pd.DataFrame, direction: Direction) -> dict[str, Any]:
    """Compare rollouts that share everything up to their answers, one of them false and one not.

    Returns
    -------
    dict
        n_pairs; the share of pairs in which the false answer scores higher, with its interval, at the token before the
        fork and at the full stop. Words differ within a pair, so this alone tells no lie from its words.
    """
    scores = project.scores(store, [direction])
    by_name = answers.set_index("rollout")
    ahead: dict[str, list[float]] = {"before the fork": [], "at the full stop": []}
    for family in project.families(store, rollouts=[str(name) for name in by_name.index]):
        values = project.aligned(scores, family).isel(direction=0)
        of = by_name.loc[list(family.rollouts)]
        if of["false"].nunique() < 2 or family.fork < int(of["start"].max()):
            continue
        read = {"before the fork": of["start"] - 1, "at the full stop": of["stop"]}
        for name, at in read.items():
            score = pd.Series({r: float(values.sel(rollout=r, position=int(at[r]))) for r in family.rollouts})
            difference = score[of["false"]].mean() - score[~of["false"]].mean()
            ahead[name].append(0.5 if abs(difference) < 1e-3 else float(difference > 0))
    return {"n_pairs": len(ahead["at the full stop"]), **{k: asdict(bootstrap_mean(v)) for k, v in ahead.items() if v}}


def by_layer(
    store: Store, answers: pd.DataFrame, directions: Sequence[Direction], *, seed: int = 0
) -> list[dict[str, Any]]:
    """Read the trait's directions of all layers at the full stop, over all answers and over equal sentences.

    `decodable` is the AUROC of a probe that learned on the other games themselves: it says whether the truth is there
    to be read at all, where the direction does not find it. It decides nothing.
    """
    same, rows = controls.equals(answers), []
    for direction in sorted(directions, key=lambda one: one.layer):
        row: dict[str, Any] = {"layer": direction.layer}
        for name, of, equal in (("all", answers, False), ("equal_sentences", same, True)):
            false = of["false"].to_numpy(dtype=bool)
            if min(int(false.sum()), int((~false).sum())) < 2:
                continue
            for where, offset, since in (("before", -1, "start"), ("full_stop", 0, "stop")):
                tokens = positions(of, offset, since=since)
                means = pooled_means(store, direction.component, direction.layer, tokens=tokens)
                strata = of["sentence"].tolist() if equal else None
                area = controls.judged(means @ _unit(direction), false, strata=strata, seed=seed)
                row[f"{name}_{where}"] = asdict(area)
                there = controls.decodable(means, false, strata=strata, seed=seed)
                row[f"{name}_{where}_decodable"] = asdict(there)
        rows.append(row)
    return rows


def verdict(readings: dict[str, dict[str, Any]]) -> dict[str, bool]:
    """Say which controls the direction stands out from: its interval lies above the control's estimate or range."""
    full, before = readings["at the full stop"], readings["before the answer"]
    low = full["auroc"]["low"]
    found = {
        "chance": low > 0.5,
        "shuffled labels": full["auroc"]["value"] > full["shuffled_labels"]["high"],
        "random directions": full["auroc"]["value"] > full["random_directions"]["high"],
        "token ids only": low > full["token_ids"]["value"],
        "embedding layer": low > full["embedding"]["value"],
        "before the answer": low > before["auroc"]["value"],
    }
    same = readings.get("equal sentences, at the full stop")
    if same is not None:
        earlier = readings["equal sentences, before the answer"]
        known = max(0.5, same["random_directions"]["high"], same["shuffled_labels"]["high"])
        found["equal sentences"] = same["auroc"]["low"] > 0.5 and same["auroc"]["value"] > known
        found["equal sentences beyond what was known before"] = same["auroc"]["low"] > earlier["auroc"]["value"]
    return found


def _sentence(found: dict[str, Any]) -> str:
    area = found["readings"]["at the full stop"]["auroc"]
    fallen = [name for name, stands in found["survives"].items() if not stands]
    what = f"AUROC {area['value']:.3f} [{area['low']:.3f}, {area['high']:.3f}] at the full stop of the claim"
    if not fallen:
        return f"{what}: the direction separates false from true claims beyond every control."
    return f"{what}: the direction does not survive {', nor '.join(fallen)}."
