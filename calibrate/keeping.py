"""Keep a calibration in the stores it is of, under the next number of `calibration/`, or in a store beside them."""

import os
from collections.abc import Sequence
from pathlib import Path

from calibrate.calibration import Calibration
from datastore import storage
from datastore.errors import CorruptError, DatastoreError, MisuseError, ReadOnlyError
from datastore.results import create_sibling, publish_result

__all__ = ["check_places", "save"]


def check_places(stores: Sequence[Path], *, out: Path | None = None) -> None:
    """Check before any work that `save` will have a place.

    Raises
    ------
    ReadOnlyError
        A store can't be written.
    MisuseError
        `out` is no store of results of the first store.
    """
    if out is not None:
        create_sibling(out, stores[0])
        return
    for store in stores:
        place = store / "calibration"
        if not os.access(place if place.is_dir() else store, os.W_OK | os.X_OK):
            raise ReadOnlyError(
                f"{store} can't be written, so a calibration can't be kept in it; nothing was computed, give "
                "--out other.zarr to keep it beside it"
            )


def save(calibration: Calibration, *, out: Path | None = None) -> list[tuple[Path, int]]:
    """Keep a calibration in each store it is of, or in a store of results.

    Parameters
    ----------
    calibration : Calibration
    out : Path, optional
        A store of results, made where there is none; for stores that can't be written.

    Returns
    -------
    list of (Path, int)
        The stores, and the number under `calibration/` in each.

    Raises
    ------
    ReadOnlyError
        A store can't be written.
    MisuseError
        The calibration is of no store.
    DatastoreError
        A store was deleted, or is another one now.
    """
    stores = [Path(one["store"]) for one in calibration.data.attrs["sources"] if one.get("store")]
    if not stores:
        raise MisuseError("the calibration is of arrays that came from no store, so there is none to keep it in")
    if out is None:
        _refuse_others(calibration)
    else:
        create_sibling(out, stores[0])
    places = list(dict.fromkeys(stores)) if out is None else [out]
    try:
        return [(place, publish_result(place, "calibration", calibration.data, attrs={})) for place in places]
    except DatastoreError:
        if out is None:
            _refuse_others(calibration)  # what went wrong may be that the store went away meanwhile
        raise


def _refuse_others(calibration: Calibration) -> None:
    for one in calibration.data.attrs["sources"]:
        for number, known in one.get("captures", {}).items():
            capture = Path(one["store"]) / "captures" / f"{int(number):04d}"
            try:
                created = storage.attributes(capture).get("created")
            except CorruptError:
                if capture.exists():
                    continue  # it is there; what can't be read is said elsewhere
                created = None
            if created != known["created"]:
                raise DatastoreError(
                    f"capture {number} of {one['store']} was {'replaced' if created else 'deleted'} while it was "
                    "calibrated, so the result is not kept in it; run the same command again, or give --out other.zarr"
                )
