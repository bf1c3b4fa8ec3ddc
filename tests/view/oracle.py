"""Scores and what is drawn of them, computed from a store's activations by other code than the page's."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

import datastore
from tests.view import stores

__all__ = ["drawn", "score", "shade_of"]

Floats = NDArray[np.float64]


def score(store: datastore.Store, rollout: str, direction: str) -> tuple[Floats, Floats]:
    """Return h . v/|v| and |h| in float64, straight from the activations; direction as `bs/lying@4`."""
    trait, _, layer = direction.rpartition("@")
    (vector,) = [one for one in stores.directions() if (one.trait, one.layer) == (trait, int(layer))]
    rows = np.asarray(store.select("residual", rollouts=rollout, layers=int(layer)).values, np.float64)
    unit = np.asarray(vector.values, np.float64)
    return rows @ (unit / np.sqrt((unit**2).sum())), np.sqrt((rows**2).sum(axis=1))


def drawn(
    store: datastore.Store,
    rollout: str,
    direction: str,
    *,
    mode: str = "cosine",
    smooth: int = 5,
    centred: bool = False,
    velocity: bool = False,
) -> Floats:
    """Return the curve of a direction, as the page's controls say."""
    values, norms = score(store, rollout, direction)
    if mode == "cosine":
        values = values / norms
    if mode == "normalised":
        values = values / norms[20:].mean()  # the games' prompts have 20 tokens
    if centred:
        values = values - values[0]
    half = smooth // 2
    values = np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])
    return np.concatenate([[np.nan], values[1:] - values[:-1]]) if velocity else values


def shade_of(value: float, values: Any) -> str:
    """Return the colour of a token, from all values of its rollout: blue and orange about the median."""
    beyond = np.sort(np.asarray(values[4:], np.float64))
    middle = float(np.median(beyond))
    distances = np.sort(np.abs(beyond - middle))
    place = 0.99 * (len(distances) - 1)
    low = distances[int(place)]
    scale = low + (place - int(place)) * (distances[min(int(place) + 1, len(distances) - 1)] - low)
    share = round(min(1.0, abs(value - middle) / scale) * 0.62, 3)
    colour = "230, 97, 1" if value > middle else "43, 131, 226"
    return f"rgba({colour}, {share:g})"
