"""Results in a store, `{kind}/000N`: a labelled Dataset written aside, published by one rename, and read back.

The group is plain Zarr: `xr.open_zarr("run.zarr/calibration/0001")` gives the same Dataset. Readers here also refuse
what is missing, where Zarr would fill in. A store that can't be written has its results in a sibling, a store of
results alone that says which store they are of.
"""

import errno
import json
import os
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from datastore import storage
from datastore.errors import CorruptError, DatastoreError, MisuseError, ReadOnlyError
from datastore.plainfile import MOST_TABLE
from datastore.schema import FORMAT, FORMAT_VERSION

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["bring_to_disk", "create_sibling", "publish_result", "read_results", "sibling_of", "still_there"]

FEW_FILES = 300
"""Up to so many files and directories are synced one by one."""
_AT_ONCE = 8
"""One after another, each would wait for a write of the file system's journal of its own."""


def publish_result(store: Path, kind: str, dataset: "xr.Dataset", *, attrs: Mapping[str, Any]) -> int:
    """Write a Dataset as the next number of a kind of result; readers see it whole or not at all.

    Parameters
    ----------
    store : Path
        A store, or a sibling made by `create_sibling`.
    kind : str
        The group it goes into: `calibration`, `scores`.
    dataset : Dataset
        Small arrays of numbers, booleans or text; they are held in memory.
    attrs : mapping
        JSON: selection, inputs and provenance. It is kept as the Dataset's attributes, over those it has.

    Returns
    -------
    int
        The number under `{store}/{kind}/`.

    Raises
    ------
    ReadOnlyError
        The store can't be written.
    MisuseError
        `kind` is no kind of result, or `attrs` is no JSON.
    """
    if kind not in storage.ROOT_GROUPS or kind == "captures":
        raise MisuseError(f"{kind!r} is no kind of result of a store, so nothing was written")
    storage.open_root(store)
    into = store / kind
    aside = into / f"{uuid.uuid4().hex}.partial"
    try:
        with still_there(store):
            into.mkdir(exist_ok=True)  # a merge or an older release may have left it out
            _write(aside, dataset, _json({**dataset.attrs, **attrs}))
            bring_to_disk(aside)
            return storage.publish(aside, into)
    except OSError as error:
        raise _refusal(store, error) from error
    finally:
        storage.remove(aside)


@contextmanager
def still_there(store: Path) -> Iterator[None]:
    """Say of a file that is not there any more that someone takes the store away.

    Raises
    ------
    DatastoreError
        In place of FileNotFoundError.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise DatastoreError(
            f"{error.filename} went away while a result was written, so nothing was kept in {store}; someone deletes "
            "or moves it, check the path and run the same command again"
        ) from error


def bring_to_disk(aside: Path) -> None:
    """Sync a result that is complete, before the rename that publishes it.

    Its few files are synced themselves, with their directories and those above, which may be as new: a sync of the
    whole file system would wait for everything that any other process has written. Many files are left to that one.

    Parameters
    ----------
    aside : Path
        The result, in the directory of its kind.

    Raises
    ------
    DatastoreError
        Something could not be written.
    """
    new = [aside, *aside.rglob("*"), aside.parent, aside.parent.parent]
    if len(new) > FEW_FILES:
        storage.sync_files(aside)
        return
    try:
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="sync") as pool:
            list(pool.map(storage.sync_file, new))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DatastoreError(
            f"{error.filename or aside} could not be brought to disk ({error.strerror}); nothing was committed, run "
            "the same command again once the disk is well"
        ) from error


def read_results(
    store: Path, kind: str, *, numbers: Iterable[int] | None = None, only: Collection[str] | None = None
) -> "list[tuple[int, xr.Dataset]]":
    """Read the results of a kind, whole, ascending by number.

    Parameters
    ----------
    store : Path
    kind : str
    numbers : iterable of int, optional
        Only these; those that are not there are left out.
    only : collection of str, optional
        Variables to read; default all.

    Raises
    ------
    CorruptError
        A part of one is missing or does not decode.
    """
    storage.open_root(store)
    wanted = None if numbers is None else set(numbers)
    there = [n for n in storage.numbered(store / kind) if wanted is None or n in wanted]
    return [(number, _read(store / kind / f"{number:04d}", only)) for number in there]


def create_sibling(path: Path, store: Path) -> None:
    """Make a store of results at `path` that says it is of `store`, or do nothing where that is what it is.

    Raises
    ------
    MisuseError
        Something else is there, or the results of another store.
    ReadOnlyError
        It can't be made there.
    """
    if path.exists():
        storage.open_root(path)
        of = sibling_of(path)
        if of != store.absolute():
            held = f"holds results of {of}" if of else "is a store of its own"
            raise MisuseError(f"{path} {held}, not of {store}; nothing was written, choose another --out")
        return
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.create_group(aside, {"format": FORMAT, "version": FORMAT_VERSION, "results_of": str(store.absolute())})
        for name in storage.ROOT_GROUPS:
            storage.create_group(aside / name, {})
        storage.sync_files(aside)
        with suppress(FileExistsError):
            os.rename(aside, path)
        storage.sync_file(path.parent)  # results in it sync their own files, not the file system
    except OSError as error:
        raise _refusal(path, error) from error
    finally:
        storage.remove(aside)


def sibling_of(path: Path) -> Path | None:
    """Return the store whose results a store keeps for it; None where it keeps its own."""
    of = storage.attributes(path).get("results_of")
    return None if of is None else Path(of)


def _write(aside: Path, dataset: "xr.Dataset", attrs: dict[str, Any]) -> None:
    plain = [str(name) for name in dataset.coords if name not in dataset.dims]
    if plain:
        attrs = {**attrs, "coordinates": " ".join(plain)}  # so that xarray takes them for coordinates
    storage.create_group(aside, attrs)
    for name, variable in dataset.variables.items():
        values = np.asarray(variable.values)
        storage.write_array(
            aside / str(name), values, dims=[str(dim) for dim in variable.dims], attrs=_json(variable.attrs)
        )
    storage.consolidate(aside)


def _read(path: Path, only: Collection[str] | None) -> "xr.Dataset":
    import xarray as xr  # results are asked for seldom, and xarray takes half a second

    attrs = storage.attributes(path)
    coordinates = str(attrs.pop("coordinates", "")).split()
    members = [p.name for p in sorted(path.iterdir()) if (p / "zarr.json").is_file()]
    known = storage.array_metadata(path).get("consolidated_metadata", {}).get("metadata", {})
    lost = sorted(set(known) - set(members))
    if lost:
        raise CorruptError(f"{path} lacks {', '.join(lost)}; what it holds is lost, compute it again")
    variables = {name: _variable(path / name) for name in members if only is None or name in only}
    dataset = xr.Dataset(variables, attrs=attrs)
    return dataset.set_coords([name for name in coordinates if name in variables])


def _variable(path: Path) -> "xr.Variable":
    import xarray as xr

    meta = storage.array_metadata(path)
    return xr.Variable(
        meta.get("dimension_names") or (), _plain(storage.read_array(path, most=MOST_TABLE)), meta.get("attributes", {})
    )


def _plain(values: NDArray[Any]) -> NDArray[Any]:
    """Return text as Python strings: pandas and xarray know no NumPy strings of varying width."""
    return values.astype(object) if values.dtype.kind == "T" else values


def _json(attrs: Mapping[Any, Any]) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(json.dumps(dict(attrs), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise MisuseError(f"the attributes of a result must be JSON ({error}); nothing was written") from error
    return found


def _refusal(path: Path, error: OSError) -> Exception:
    if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
        return error
    return ReadOnlyError(
        f"{path} can't be written, so the results are not kept in it; give --out other.zarr to keep them beside it"
    )
