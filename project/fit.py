"""Learn a direction from a store: mean activations over a position, one for each rollout, told apart by a label.

Directions are fitted on one share of the rollouts and judged on the other, against two controls: a probe whose labels
were shuffled, which says what chance gives, and one that sees only which token ids stand there, which says how much of
the label the words give away.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from datastore.errors import AbsentError, MisuseError
from datastore.query import Store
from experiments.direction import Direction
from project.pooling import pooled_means
from project.positions import parse_position, token_columns, tokens_of
from project.statistics import Interval, auroc, bootstrap_auroc

__all__ = ["METHODS", "Fitted", "fit_directions", "fit_vector", "labelled"]

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
METHODS = ("mean_diff", "probe", "random")
SHUFFLES = 20
LEAST = 4
"""Rollouts of each class: two to fit on and two to judge by."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fitted:
    """A direction and how well it tells rollouts apart that it was not fitted on.

    Attributes
    ----------
    direction : Direction
        Unit norm; its facts hold the numbers below, for `metadata.json`.
    auroc : Interval
        Of the held-out rollouts.
    shuffled : Interval
        AUROC of directions fitted on shuffled labels, on the same rollouts: mean, and the range of 95 % of them. One
        alone may be anything where one direction holds most of the spread, since it then points along or against it.
    token_ids : float
        AUROC of a probe that sees token ids only, on the same rollouts.
    n_fitted, n_judged : int
        Rollouts.
    """

    direction: Direction
    auroc: Interval
    shuffled: Interval
    token_ids: float
    n_fitted: int
    n_judged: int


class _Samples(NamedTuple):
    names: list[str]
    tokens: dict[str, NDArray[np.int64]]
    positive: Flags
    fitted: Flags


def labelled(table: pd.DataFrame, label: str) -> pd.Series:
    """Return one bool for each rollout that has the label.

    Parameters
    ----------
    table : DataFrame
        Rollouts with labels as columns.
    label : str
        A column of true and false; `column=value`; or a condition such as `score > 50`.

    Raises
    ------
    MisuseError
        It is none of these, or not both classes are there.
    """
    name, equal, value = label.partition("=")
    if label in table.columns:
        column = table[label].dropna()
        if not column.isin([True, False, 0, 1]).all():
            values = sorted(map(str, column.unique()))[:8]
            raise MisuseError(
                f"label {label!r} is not true or false but {', '.join(values)}; give --label {label}=VALUE"
            )
        found = column.astype(bool)
    elif equal and name.strip() in table.columns and not value.startswith("="):
        column = table[name.strip()].dropna()
        found = column.astype(str) == value.strip()
    else:
        found = _condition(table, label)
    if found.all() or not found.any():
        which = "all" if len(found) and found.all() else "none"
        raise MisuseError(f"{which} of the {len(found)} rollouts are {label!r}, so there is nothing to tell apart")
    return found


def _condition(table: pd.DataFrame, label: str) -> pd.Series:
    try:
        found = table.eval(label, engine="python")
    except Exception as error:
        raise MisuseError(
            f"the rollouts have no label {label!r} ({' '.join(str(error).split())}); they have "
            f"{', '.join(map(str, table.columns))}"
        ) from error
    if not isinstance(found, pd.Series) or found.dtype != bool:
        raise MisuseError(f"{label!r} is no condition on each rollout; write it like score > 50")
    return found


def fit_directions(
    store: Store,
    label: str,
    *,
    layers: Sequence[int] | None = None,
    method: str = "mean_diff",
    position: str = "response[:]",
    component: str = "residual",
    trait: str | None = None,
    rollouts: Sequence[str] | None = None,
    group: str | None = None,
    held_out: float = 0.3,
    seed: int = 0,
    memory: int = 10**9,
) -> list[Fitted]:
    """Fit one direction for each layer.

    Parameters
    ----------
    store : Store
    label : str
        See `labelled`.
    layers : sequence of int, optional
        Default all layers of the component.
    method : str
        `mean_diff`: mean of the positive less mean of the negative; `probe`: logistic regression on activations of unit
        norm (C=1, as scikit-learn has it); `random`: a direction that knows nothing.
    position : str
        Tokens that are averaged, see `project.positions`. A rollout without any is left out.
    component : str
    trait : str, optional
        `category/name`; default `fitted/` and the label.
    rollouts : sequence of str, optional
    group : str, optional
        A label whose rollouts stay on one side of the split, such as the run that several samples continue.
    held_out : float
        Share of the rollouts, or groups, to judge by.
    seed : int
        Of the split, the shuffling and the random direction.
    memory : int
        Bytes of chunks to hold at most.

    Raises
    ------
    MisuseError
        Too few rollouts of a class, an unknown method, label or position.
    AbsentError
        A layer is not captured.
    """
    if method not in METHODS:
        raise MisuseError(f"method {method!r} is not known; choose one of {', '.join(METHODS)}")
    samples = _samples(store, label, position=position, rollouts=rollouts, group=group, held_out=held_out, seed=seed)
    numbers = list(layers) if layers is not None else [int(n) for n in store.captured(component).columns]
    if not numbers:
        raise AbsentError(f"{component} is captured at no layer, so nothing can be fitted")
    bag = _token_ids_only(store, samples)
    name = trait or f"fitted/{_slug(label)}"
    about = {"trait": name, "component": component, "method": method, "position": position, "model": _model(store)}
    found = []
    for layer in numbers:
        means = pooled_means(store, component, layer, tokens=samples.tokens, memory=memory)
        found.append(_fitted(means, samples, layer=layer, about=about, bag=bag, seed=seed, label=label))
    return found


def _samples(
    store: Store,
    label: str,
    *,
    position: str,
    rollouts: Sequence[str] | None,
    group: str | None,
    held_out: float,
    seed: int,
) -> _Samples:
    asked = parse_position(position)
    table = store.rollouts if rollouts is None else store.rollouts.loc[list(rollouts)]
    classes = labelled(table, label)
    at = tokens_of(store, asked, [str(name) for name in classes.index])
    tokens = {name: positions for name, positions in at.items() if len(positions)}
    names = list(tokens)
    positive = classes.loc[names].to_numpy(dtype=bool)
    fewest = min(int(positive.sum()), int((~positive).sum()))
    if fewest < LEAST:
        raise MisuseError(
            f"of the rollouts with tokens at {position}, {int(positive.sum())} are {label!r} and "
            f"{int((~positive).sum())} are not; fitting needs {LEAST} of each"
        )
    groups = None if group is None else table.loc[names, group].astype(str).to_numpy()
    return _Samples(names, tokens, positive, _split(positive, groups, held_out=held_out, seed=seed))


def _split(positive: Flags, groups: NDArray[Any] | None, *, held_out: float, seed: int) -> Flags:
    """Mark the rollouts to fit on, each class in the same share; a group stays whole."""
    if not 0 < held_out < 1:
        raise MisuseError(f"a share of {held_out:g} can't be held out; give more than 0 and less than 1")
    from sklearn.model_selection import GroupShuffleSplit, StratifiedShuffleSplit  # scikit-learn takes a second

    split = StratifiedShuffleSplit if groups is None else GroupShuffleSplit
    for attempt in range(100):
        maker = split(n_splits=1, test_size=held_out, random_state=seed + attempt)
        train, _ = next(maker.split(np.zeros(len(positive)), positive, groups))
        fitted = np.zeros(len(positive), bool)
        fitted[train] = True
        if min(len(set(positive[fitted])), len(set(positive[~fitted]))) == 2:
            return fitted
    raise MisuseError(
        "the groups can't be split so that both sides have both classes; leave --group out or hold out more"
    )


def _fitted(
    means: Floats, samples: _Samples, *, layer: int, about: Mapping[str, Any], bag: float, seed: int, label: str
) -> Fitted:
    here, there = samples.fitted, ~samples.fitted
    vector = fit_vector(means[here], samples.positive[here], about["method"], seed=seed)
    score = means @ vector
    area = bootstrap_auroc(score[there & samples.positive], score[there & ~samples.positive], seed=seed)
    control = _shuffled(means, samples, about["method"], seed=seed)
    # the midpoint between the classes: scores less it are above 0 where the label is more likely
    middle = (score[here & samples.positive].mean() + score[here & ~samples.positive].mean()) / 2
    facts = {
        "auroc": area.value,
        "auroc_low": area.low,
        "auroc_high": area.high,
        "auroc_shuffled": control.value,
        "auroc_shuffled_high": control.high,
        "auroc_token_ids": bag,
        "n_fitted": int(here.sum()),
        "n_judged": int(there.sum()),
        "label": label,
        "seed": seed,
        "rollouts_sha256": _digest([name for name, fit in zip(samples.names, here, strict=True) if fit]),
        "activations_sha256": hashlib.sha256(means[here].astype("<f8").tobytes()).hexdigest(),
    }
    direction = Direction(
        values=vector.astype(np.float32),
        layer=layer,
        baseline=float(middle),
        facts={key: value for key, value in facts.items() if value == value},
        **about,
    )
    return Fitted(
        direction=direction,
        auroc=area,
        shuffled=control,
        token_ids=bag,
        n_fitted=int(here.sum()),
        n_judged=int(there.sum()),
    )


def _shuffled(means: Floats, samples: _Samples, method: str, *, seed: int) -> Interval:
    """AUROC of directions that were fitted on shuffled labels."""
    here, there = samples.fitted, ~samples.fitted
    random = np.random.default_rng(seed)
    found = []
    for turn in range(SHUFFLES):
        shuffled = random.permutation(samples.positive[here])
        score = means @ fit_vector(means[here], shuffled, method, seed=seed + turn + 1)
        found.append(auroc(score[there & samples.positive], score[there & ~samples.positive]))
    low, high = np.quantile(found, [0.025, 0.975])
    return Interval(value=float(np.mean(found)), low=float(low), high=float(high))


def fit_vector(means: Floats, positive: Flags, method: str, *, seed: int = 0) -> Floats:
    """Return the unit vector of a method over mean activations (rollout, hidden); `random` looks at nothing.

    Raises
    ------
    MisuseError
        The classes have the same mean, or an activation is not finite.
    """
    if method == "random":
        vector = np.random.default_rng(seed).standard_normal(means.shape[1])
    elif method == "mean_diff":
        vector = means[positive].mean(axis=0) - means[~positive].mean(axis=0)
    else:
        lengths = np.linalg.norm(means, axis=1, keepdims=True)
        vector = _logistic(means / np.where(lengths > 0, lengths, 1.0), positive).coef_[0]
    length = float(np.linalg.norm(vector))
    if not np.isfinite(length) or length == 0:
        raise MisuseError(
            f"{method} finds no direction: the classes have the same mean, or an activation is not finite; "
            "choose another position or layer"
        )
    return np.asarray(vector / length, np.float64)


def _logistic(samples: Any, positive: Flags) -> Any:
    from sklearn.linear_model import LogisticRegression  # scikit-learn takes a second

    return LogisticRegression(C=1.0, max_iter=1000, random_state=42).fit(samples, positive)


def _token_ids_only(store: Store, samples: _Samples) -> float:
    """AUROC of a probe that sees how often each token id stands at the position, and nothing of the model."""
    tables = token_columns(store, samples.names, ("token_id",))
    ids = {name: tables[name]["token_id"].to_numpy()[at] for name, at in samples.tokens.items()}
    vocabulary = np.unique(np.concatenate(list(ids.values())))
    counts = np.zeros((len(ids), len(vocabulary)))
    for row, found in enumerate(ids.values()):
        np.add.at(counts[row], np.searchsorted(vocabulary, found), 1)
    lengths = np.linalg.norm(counts, axis=1, keepdims=True)
    counts /= np.where(lengths > 0, lengths, 1.0)
    here, there = samples.fitted, ~samples.fitted
    score = counts @ _logistic(counts[here], samples.positive[here]).coef_[0]
    return auroc(score[there & samples.positive], score[there & ~samples.positive])


def _model(store: Store) -> str | None:
    names = sorted({str(name) for name in store.captures["model"]} - {"unknown"})
    return names[-1] if names else None


def _digest(names: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()


def _slug(label: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in label).strip("_") or "label"
