"""Could something less than the finding explain an AUROC? The same reading by other means, which it must outdo.

Shuffled labels: the direction learned again from labels that say nothing. Random directions: any at all. Token ids: the
same kind of classifier, given the words and no model. Embedding: the direction learned and read below the first layer.
What is known before the answer, and sentences that are the same word for word, are readings of `answers` themselves.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import rankdata

from datastore.errors import AbsentError, MisuseError
from datastore.query import Store
from experiments.direction import Direction
from project.fit import fit_vector, labelled
from project.pooling import pooled_means
from project.positions import token_columns, tokens_of
from project.statistics import Interval, aurocs, bootstrap_auroc

__all__ = ["Lessons", "Spread", "equals", "lessons_of", "random_spread", "shuffled_spread", "stratified", "token_ids"]

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Ints = NDArray[np.int64]
RANDOM, SHUFFLES = 1000, 200
EMBEDDING = ("resid_pre", 0)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Lessons:
    """What a direction was learned from, to learn it again in ways that should fail.

    Attributes
    ----------
    means, embedded : float64 arrays (rollout, hidden)
        Activations at the direction's own place and position; the embeddings' mean over the whole response.
    words : list of int arrays
        Token ids of each response.
    positive : bool array (rollout)
    method : str
    """

    means: Floats
    embedded: Floats
    words: list[Ints]
    positive: Flags
    method: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """AUROCs of many directions that know nothing: mean, the range of 95 % of them, and how the direction compares.

    Attributes
    ----------
    p : float
        Share of them at least as far from 0.5, on either side, the direction itself counted among them.
    """

    mean: float
    low: float
    high: float
    p: float
    n: int


def lessons_of(store: Store, direction: Direction) -> Lessons:
    """Read what a direction was learned from, as its `metadata.json` says: label, position and method.

    Raises
    ------
    MisuseError
        Its facts name no label, so it was not made by `project fit`.
    AbsentError
        The embedding, `resid_pre` at layer 0, is not captured.
    """
    label = direction.facts.get("label")
    if not isinstance(label, str):
        raise MisuseError(f"{direction} does not say which label it was fitted on; fit it with python -m project fit")
    _check_embedding(store)
    known = labelled(store.rollouts, label)
    found = tokens_of(store, direction.position, [str(name) for name in known.index])
    tokens = {name: at for name, at in found.items() if len(at)}
    responses = tokens_of(store, "response[:]", list(tokens))
    return Lessons(
        means=pooled_means(store, direction.component, direction.layer, tokens=tokens),
        embedded=pooled_means(store, *EMBEDDING, tokens=responses),
        words=words_at(store, responses),
        positive=known.loc[list(tokens)].to_numpy(dtype=bool),
        method=direction.method,
    )


def _check_embedding(store: Store) -> None:
    component, layer = EMBEDDING
    if component not in store.components or layer not in store.captured(component).columns:
        raise AbsentError(
            f"{store.path} does not hold {component} at layer {layer}, the embedding that is a control; add it with "
            f"python -m capture --components {component} --layers {layer} and the options of its first capture"
        )


def words_at(store: Store, tokens: Mapping[str, Ints]) -> list[Ints]:
    """Return the token ids at some positions of rollouts."""
    tables = token_columns(store, list(tokens), ("token_id",))
    return [tables[name]["token_id"].to_numpy()[at] for name, at in tokens.items()]


def random_spread(
    rows: Floats, false: Flags, *, observed: float, strata: Sequence[str] | None, seed: int, n: int = RANDOM
) -> Spread:
    """Read random directions at the same tokens."""
    vectors = np.random.default_rng(seed).standard_normal((rows.shape[1], n))
    return _spread(rows @ vectors, false, observed=observed, strata=strata)


def shuffled_spread(score: Floats, false: Flags, *, strata: Sequence[str] | None, seed: int) -> Spread:
    """Shuffle which answers are called false, among equals: AUROCs of the very scores, with labels that say nothing."""
    random, ranked = np.random.default_rng(seed), stratified(score[:, np.newaxis], strata)[:, 0]
    of = np.zeros(len(false)) if strata is None else np.unique(np.asarray(strata), return_inverse=True)[1]
    order = np.lexsort((random.random((RANDOM, len(false))), np.broadcast_to(of, (RANDOM, len(false)))))
    grouped = ranked[np.lexsort((np.arange(len(false)), of))]
    shuffled = np.empty((len(false), RANDOM))
    shuffled[order, np.arange(RANDOM)[:, np.newaxis]] = grouped
    observed = float(aurocs(ranked[false, np.newaxis], ranked[~false, np.newaxis])[0])
    return _compared(aurocs(shuffled[false], shuffled[~false]), observed)


def relearned_spread(
    rows: Floats, false: Flags, lessons: Lessons, *, observed: float, strata: Sequence[str] | None, seed: int
) -> Spread:
    """Read directions that were learned the same way from shuffled labels.

    Where one direction holds most of the spread they all point along or against it: their mean should be 0.5, and one
    alone may be anything.
    """
    random = np.random.default_rng(seed)
    shuffles = SHUFFLES if lessons.method == "mean_diff" else SHUFFLES // 10  # a probe takes a hundred times longer
    vectors = [
        fit_vector(lessons.means, random.permutation(lessons.positive), lessons.method, seed=seed + turn)
        for turn in range(shuffles)
    ]
    return _spread(rows @ np.stack(vectors, axis=1), false, observed=observed, strata=strata)


def _spread(scores: Floats, false: Flags, *, observed: float, strata: Sequence[str] | None) -> Spread:
    ranked = stratified(scores, strata)
    return _compared(aurocs(ranked[false], ranked[~false]), observed)


def _compared(found: Floats, observed: float) -> Spread:
    low, high = np.quantile(found, [0.025, 0.975])
    as_far = int((np.abs(found - 0.5) >= abs(observed - 0.5) - 1e-12).sum())
    return Spread(
        mean=float(found.mean()), low=float(low), high=float(high), p=(as_far + 1) / (len(found) + 1), n=len(found)
    )


def stratified(scores: Floats, strata: Sequence[str] | None) -> Floats:
    """Replace scores by their ranks within each stratum, in (0, 1), so that only equals are compared."""
    if strata is None:
        return scores
    out, of = np.empty_like(scores), np.asarray(strata)
    for one in np.unique(of):
        inside = of == one
        out[inside] = (rankdata(scores[inside], axis=0) - 0.5) / inside.sum()
    return out


def equals(answers: pd.DataFrame) -> pd.DataFrame:
    """Keep the answers whose sentence, word for word, is said at least once truly and once falsely."""
    both = answers.groupby("sentence")["false"].transform("nunique") == 2
    return answers[both].reset_index(drop=True)


def token_ids(lessons: Lessons, words: Sequence[Ints], false: Flags, *, strata: Sequence[str] | None) -> Interval:
    """AUROC of a probe that learned from the lessons' words how often each token id stands there, and nothing else."""
    vocabulary = np.unique(np.concatenate([*lessons.words, *words]))
    learned, read = (_counts(one, vocabulary) for one in (lessons.words, words))
    return judged(read @ _learned(learned, lessons, "probe"), false, strata=strata)


def embedding(lessons: Lessons, embedded: Floats, false: Flags, *, strata: Sequence[str] | None) -> Interval:
    """AUROC of the direction learned by the same method below the first layer, from the answer's embeddings."""
    return judged(embedded @ _learned(lessons.embedded, lessons, lessons.method), false, strata=strata)


def decodable(rows: Floats, false: Flags, *, strata: Sequence[str] | None, seed: int) -> Interval:
    """AUROC of probes fitted on four fifths of these very rows and read on the fifth that is left."""
    from sklearn.model_selection import StratifiedKFold  # scikit-learn takes a second

    folds = min(5, int(false.sum()), int((~false).sum()))
    score = np.zeros(len(false))
    for here, there in StratifiedKFold(folds, shuffle=True, random_state=seed).split(rows, false):
        try:
            along = rows[there] @ fit_vector(rows[here], false[here], "probe")
        except MisuseError:
            continue  # nothing to hold on to: the fold stays undecided
        # each fold has a probe of its own, on its own scale
        score[there] = (rankdata(along) - 0.5) / len(there) if len(there) > 1 else 0.5
    return judged(score, false, strata=strata, seed=seed)


def _learned(samples: Floats, lessons: Lessons, method: str) -> Floats:
    """Return the vector of a method; zero where words are spread over both classes alike and teach nothing."""
    try:
        return fit_vector(samples, lessons.positive, method)
    except MisuseError:
        return np.zeros(samples.shape[1])


def judged(score: Floats, false: Flags, *, strata: Sequence[str] | None = None, seed: int = 0) -> Interval:
    """AUROC of false over true answers, with its interval over rollouts."""
    kept: Any = stratified(np.round(score, 9)[:, np.newaxis], strata)[:, 0]  # rounded: equal words are equal numbers
    return bootstrap_auroc(kept[false], kept[~false], seed=seed)


def _counts(words: Sequence[Ints], vocabulary: Ints) -> Floats:
    counts = np.zeros((len(words), len(vocabulary)))
    for row, ids in enumerate(words):
        np.add.at(counts[row], np.searchsorted(vocabulary, ids), 1)
    return counts
