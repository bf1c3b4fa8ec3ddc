"""Which dimensions a store's newest calibration names as massive, so that their activations are kept beside scores."""

from pathlib import Path

import numpy as np

from datastore.query import Store
from datastore.results import read_results
from datastore.scores import Place
from datastore.storage import attributes, numbered

__all__ = ["calibrated_dims", "top_dims"]


def top_dims(store: Store, component: str, *, out: str | Path | None = None) -> dict[int, tuple[int, ...]]:
    """Return the top dimensions by layer, largest first, of the component's newest calibration.

    Parameters
    ----------
    store : Store
    component : str
    out : path, optional
        A store of results beside it, where a calibration counts before those in the store.

    Returns
    -------
    mapping of layer to dimensions
        Empty where the component was never calibrated.
    """
    for path in [place for place in (out and Path(out), store.path) if place and place.is_dir()]:
        for number in reversed(numbered(path / "calibration")):
            if attributes(path / "calibration" / f"{number:04d}").get("component") != component:
                continue
            ((_, found),) = read_results(path, "calibration", numbers=[number], only=("layer", "top_dims"))
            rows = zip(found["layer"].values, np.atleast_2d(found["top_dims"].values), strict=True)
            return {int(layer): tuple(int(dim) for dim in dims if dim >= 0) for layer, dims in rows}
    return {}


def calibrated_dims(store: Store, place: Place, *, out: str | Path | None = None) -> tuple[int, ...]:
    """Return all dimensions that the calibration names at any layer of the component, ascending."""
    listed = top_dims(store, place.component, out=out)
    return tuple(sorted({dim for dims in listed.values() for dim in dims}))
