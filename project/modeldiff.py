"""Two stores of the same rollouts, two models apart: how far the second moves along each direction."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from datastore.errors import MisuseError
from datastore.query import Rollouts, Store
from datastore.scores import Place
from experiments.direction import Direction
from project.derive import runs_of_rollouts
from project.pooling import pooled_means
from project.run import Given, as_directions
from project.statistics import effect_size, paired_effect_size

__all__ = ["difference", "model_diff"]

Dim = tuple[str, int, int]


def difference(a: xr.Dataset, b: xr.Dataset) -> xr.Dataset:
    """Return b − a token by token, where both scored the same rollouts, tokens, directions and layers.

    What `derive.cleaned` needs is a difference as well, as far as both kept it, so that a difference is cleaned of the
    difference. Norms are those of a, and are cleaned of a's own: `norm_dim_value`.

    Raises
    ------
    MisuseError
        Nothing matches, or rollouts of one name have other tokens.
    """
    labels = [label for label in a.direction.values if label in set(b.direction.values)]
    names = [name for name, _ in runs_of_rollouts(a) if name in set(b.rollout.values.tolist())]
    if not labels or not names:
        raise MisuseError(
            "the two have no rollouts and directions in common, so there is no difference; score both along the same "
            "directions at the same layers"
        )
    dims = [dim for dim in _dims(a) if dim in set(_dims(b))]  # one may be calibrated otherwise, or not at all
    kept_a, kept_b = (_kept(one, names, labels, dims=dims) for one in (a, b))
    for name, run in runs_of_rollouts(kept_a):
        same = np.array_equal(kept_a.token_id.values[run], kept_b.token_id.values[kept_b.rollout.values == name])
        if not same:
            raise MisuseError(f"rollout {name!r} has other tokens in the other store, so its tokens can't be matched")
    changed = {n: kept_a[n].copy(data=kept_b[n].values - kept_a[n].values) for n in ("score", "dim_value")}
    return kept_a.assign({**changed, "norm_dim_value": kept_a.dim_value})


def _kept(scores: xr.Dataset, names: Sequence[str], labels: Sequence[str], *, dims: Sequence[Dim]) -> xr.Dataset:
    places = {name: np.flatnonzero(scores.rollout.values == name) for name in names}
    columns = [_dims(scores).index(dim) for dim in dims]
    kept = scores.isel(token=np.concatenate(list(places.values())), dim_column=columns)
    return kept.sel(direction=list(labels))


def _dims(scores: xr.Dataset) -> list[Dim]:
    """Component, layer and dimension of each activation kept beside the scores."""
    return list(zip(*(scores[name].values.tolist() for name in ("dim_component", "dim_layer", "dim")), strict=True))


def model_diff(
    a: Store,
    b: Store,
    directions: Given,
    *,
    rollouts: Rollouts = None,
    segment: str = "response",
    memory: int = 10**9,
) -> pd.DataFrame:
    """Compare two models over the same rollouts, along each direction.

    Rollouts match where both stores hold the same id with the same tokens at the direction's layer. A rollout counts by
    its mean over a segment; one without tokens there is left out.

    Returns
    -------
    DataFrame
        A row for each direction: trait, layer, n_rollouts, mean_a, mean_b, std_a, std_b, effect_size (means over the
        pooled spread), paired_effect_size (mean of the differences over their spread), cosine of the mean difference of
        the activations with the direction.

    Raises
    ------
    MisuseError
        No rollout matches.
    """
    given = as_directions(directions)
    names = _matched(a, b, rollouts)
    rows: dict[int, dict[str, object]] = {}
    for place in dict.fromkeys(given.column(i).place for i in range(len(given.vectors))):
        here = [name for name in names if _captured(a, place, name) and _captured(b, place, name)]
        tokens = {name: kept for name in here if len(kept := _segment(a, name, segment))}
        if not tokens:
            raise MisuseError(
                f"no rollout that both stores hold at layer {place.layer} has tokens in its {segment}; choose another "
                "segment or layer"
            )
        pooled = [pooled_means(one, *place, tokens=tokens, memory=memory) for one in (a, b)]
        for i, vector in enumerate(given.vectors):
            if given.column(i).place == place:
                rows[i] = {"trait": vector.trait, "layer": place.layer, **_compared(*pooled, vector=vector)}
    return pd.DataFrame([rows[i] for i in range(len(given.vectors))])


def _compared(a: NDArray[np.float64], b: NDArray[np.float64], *, vector: Direction) -> dict[str, object]:
    """Compare mean activations (rollout, hidden); the mean of scores is the score of the mean."""
    along = np.asarray(vector.values, np.float64) / vector.norm
    before, after = a @ along, b @ along
    change = (b - a).mean(axis=0)
    length, many = float(np.linalg.norm(change)), len(a) > 1
    return {
        "n_rollouts": len(a),
        "mean_a": float(before.mean()),
        "mean_b": float(after.mean()),
        "std_a": float(before.std(ddof=1)) if many else float("nan"),
        "std_b": float(after.std(ddof=1)) if many else float("nan"),
        "effect_size": effect_size(before, after),
        "paired_effect_size": paired_effect_size(before, after),
        "cosine": float(change @ along) / length if length else float("nan"),
    }


def _matched(a: Store, b: Store, rollouts: Rollouts) -> list[str]:
    chosen = a.rollouts if rollouts is None else a.rollouts.loc[_ids(rollouts)]
    hashes = b.rollouts["token_sha256"].to_dict()
    names = [str(name) for name, sha in chosen["token_sha256"].items() if hashes.get(name) == sha]
    if not names:
        raise MisuseError(
            "the two stores have no rollout of the same id and tokens in common, so nothing can be compared"
        )
    return names


def _ids(rollouts: Rollouts) -> list[str]:
    if isinstance(rollouts, str):
        return [rollouts]
    return [str(name) for name in (rollouts.index if isinstance(rollouts, pd.DataFrame) else rollouts or [])]


def _captured(store: Store, place: Place, name: str) -> bool:
    return bool(store.cells.where(*place)[0][store.cells.index[name]] >= 0)


def _segment(store: Store, name: str, segment: str) -> NDArray[np.int64]:
    cells = store.cells
    end, n_tokens = (int(values[cells.index[name]]) for values in (cells.column("prompt_end"), cells.counts))
    if segment not in ("prompt", "response"):
        raise MisuseError(f"segment {segment!r} is neither prompt nor response")
    return np.arange(end) if segment == "prompt" else np.arange(end, n_tokens)
