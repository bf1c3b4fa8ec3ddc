"""Groups, metadata and small arrays written as plain files: the bytes of zarr-python, without a turn of its event loop.

A result has a dozen small arrays, and through zarr-python each takes longer than a chunk of activations. What is
written here is new: it lies aside, where no reader looks, until its group is renamed.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs.vlen import VLenUTF8
from numpy.typing import NDArray

from datastore.codec import encode
from datastore.schema import Codec

__all__ = ["consolidated", "write_metadata", "write_single"]


def write_metadata(path: Path, document: Mapping[str, Any]) -> None:
    """Create the directory of a group or array with its zarr.json.

    Raises
    ------
    FileExistsError
        There is a group or an array already.
    """
    path.mkdir(exist_ok=True)  # never its parents: what was deleted meanwhile is not brought back
    text = json.dumps(document, indent=2)
    with (path / "zarr.json").open("x") as file:
        file.write(text)


def write_single(path: Path, values: NDArray[Any]) -> bool:
    """Write the only chunk of an array that has one; False where the values are of a kind that is not written here.

    Parameters
    ----------
    path : Path
        The array, its zarr.json saying `Codec()` and chunks of the shape of `values`.
    values : ndarray
        Numbers, booleans or Python strings, not empty.
    """
    if values.dtype.kind == "O":
        if not all(isinstance(value, str) for value in values.flat):
            return False
        values = np.frombuffer(VLenUTF8().encode(values.reshape(-1)), np.uint8)
    elif values.dtype.kind not in "biuf" or not values.dtype.isnative:
        return False
    file = path.joinpath("c", *["0"] * len(json.loads((path / "zarr.json").read_bytes())["shape"]))
    for parent in reversed([one for one in file.parents if one.is_relative_to(path) and one != path]):
        parent.mkdir(exist_ok=True)
    file.write_bytes(encode(values, Codec()))
    return True


def consolidated(path: Path) -> dict[str, Any]:
    """Return the zarr.json of a complete group with those of all its members in it, by name."""
    document = json.loads((path / "zarr.json").read_bytes())
    members = dict(sorted(_members(path)))
    return _holding(document, members)


def _members(group: Path, prefix: str = "") -> list[tuple[str, dict[str, Any]]]:
    found = []
    for entry in os.scandir(group):
        file = Path(entry.path) / "zarr.json"
        if not entry.is_dir() or not file.is_file():
            continue
        document = json.loads(file.read_bytes())
        name = prefix + entry.name
        if document["node_type"] == "group":
            document = _holding(document, {})
            found += _members(Path(entry.path), f"{name}/")
        found.append((name, document))
    return found


def _holding(document: Mapping[str, Any], members: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group's metadata, its keys in zarr-python's order, with the metadata of its members."""
    # consolidated metadata is not in the Zarr v3 specification; every reader that does not know it ignores it
    inline = {"kind": "inline", "must_understand": False, "metadata": dict(members)}
    placed = {key: value for key, value in document.items() if key not in ("consolidated_metadata", "node_type")}
    return {**placed, "consolidated_metadata": inline, "node_type": document["node_type"]}
