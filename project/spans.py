"""Where a direction is strongest: windows and clauses with the largest mean score, in one rollout and across them."""

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from datastore.errors import MisuseError
from datastore.query import Store
from project.derive import runs_of_rollouts

__all__ = ["clauses", "top_spans"]

_ENDS = (".", "!", "?", ";", ",", "\u2014", "\u2013")


def top_spans(
    store: Store,
    scores: xr.Dataset,
    direction: str,
    *,
    by: str = "window",
    window: int = 10,
    most: int = 20,
    per_rollout: int = 5,
    segment: str | None = None,
) -> pd.DataFrame:
    """Return the spans of the largest |mean score|, none overlapping another.

    Parameters
    ----------
    store : Store
        For the text.
    scores : Dataset
    direction : str
        A label of `scores.direction`.
    by : str
        `window`: runs of `window` tokens; `clause`: see `clauses`.
    most, per_rollout : int
        At most so many in all, and of one rollout.
    segment : str, optional
        Only its tokens.

    Returns
    -------
    DataFrame
        rollout, start, stop (positions, half-open), mean, text; the strongest first.

    Raises
    ------
    MisuseError
        The direction has no scores here, or `by` or `window` is wrong.
    """
    if direction not in scores.direction.values:
        raise MisuseError(f"direction {direction!r} has no scores here; there are {', '.join(scores.direction.values)}")
    if by not in ("window", "clause") or window < 1:
        raise MisuseError(
            f"spans by {by!r} of {window} tokens are not known; choose window or clause, of 1 or more tokens"
        )
    values = scores.score.sel(direction=direction).values.astype(np.float64)
    inside = np.ones(len(values), bool) if segment is None else scores.segment.values == segment
    rows = []
    for name, run in runs_of_rollouts(scores):
        kept = np.flatnonzero(inside[run] & np.isfinite(values[run]))
        if not len(kept):
            continue
        first, last = int(kept[0]), int(kept[-1]) + 1
        if by == "window":
            spans = _windows(first, last, window)
        else:
            spans = _shifted(clauses(_texts(store, name)[first:last]), first)
        rows += [
            {"rollout": name, "start": start, "stop": stop, "mean": mean}
            for start, stop, mean in _strongest(values[run], spans, per_rollout)
        ]
    found = pd.DataFrame(rows, columns=["rollout", "start", "stop", "mean"])
    order = found["mean"].abs().sort_values(ascending=False, kind="stable").index
    found = found.reindex(order)[:most].reset_index(drop=True)
    # only what is returned is read as text: 10,000 rollouts have 10,000 texts
    texts = {name: _texts(store, str(name)) for name in dict.fromkeys(found["rollout"])}
    places = zip(found["rollout"], found["start"], found["stop"], strict=True)
    return found.assign(text=["".join(texts[name][start:stop]) for name, start, stop in places])


def _texts(store: Store, name: str) -> list[str]:
    return [text if isinstance(text, str) else "" for text in store.tokens(name)["text"]]


def clauses(texts: list[str]) -> NDArray[np.int64]:
    """Return the clauses of tokens, (clause, 2): a clause ends with a token that ends with . ! ? ; a comma or a dash.

    Examples
    --------
    >>> clauses(["I", " lied", ",", " yes", "."]).tolist()
    [[0, 3], [3, 5]]
    """
    ends = [i + 1 for i, text in enumerate(texts) if text.rstrip().endswith(_ENDS)]
    if texts and (not ends or ends[-1] < len(texts)):
        ends.append(len(texts))
    return np.array(list(zip([0, *ends[:-1]], ends, strict=True)), np.int64).reshape(-1, 2)


def _windows(first: int, last: int, window: int) -> NDArray[np.int64]:
    starts = np.arange(first, max(first + 1, last - window + 1))
    return np.stack([starts, np.minimum(starts + window, last)], axis=1)


def _shifted(spans: NDArray[np.int64], by: int) -> NDArray[np.int64]:
    return spans + by


def _strongest(values: NDArray[np.float64], spans: NDArray[np.int64], most: int) -> list[tuple[int, int, float]]:
    """Take spans by |mean|, the earlier of equals first, leaving out those that overlap one that was taken."""
    total = np.concatenate([[0.0], np.cumsum(np.where(np.isfinite(values), values, 0.0))])
    means = (total[spans[:, 1]] - total[spans[:, 0]]) / (spans[:, 1] - spans[:, 0])
    taken: list[tuple[int, int, float]] = []
    for i in np.argsort(-np.abs(means), kind="stable").tolist():
        start, stop = spans[i].tolist()
        if all(stop <= a or start >= b for a, b, _ in taken):
            taken.append((start, stop, float(means[i])))
        if len(taken) == most:
            break
    return taken
