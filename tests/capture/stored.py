"""What a store holds, read with plain zarr-python: the oracle's side of tests that write with our own code."""

from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

import datastore.dtype  # noqa: F401 - names bfloat16 to zarr

Rows = dict[tuple[str, int, str], NDArray[Any]]


def attributes(store: Path, number: int) -> dict[str, Any]:
    return dict(zarr.open_group(store / "captures" / f"{number:04d}", mode="r").attrs)


def captures(store: Path) -> list[int]:
    return sorted(int(path.name) for path in (store / "captures").iterdir() if path.name.isdigit())


def rows(store: Path) -> Rows:
    """Bits of every (component, layer, rollout), as unsigned integers; a later capture counts."""
    found: Rows = {}
    for number in captures(store):
        group: Any = zarr.open_group(store / "captures" / f"{number:04d}", mode="r")
        names, starts, counts = (group[f"rollouts/{name}"][:] for name in ("rollout_id", "token_start", "n_tokens"))
        for one in group.attrs["components"]:
            values = np.asarray(group[one["name"]][:])
            for i, layer in enumerate(group["layer"][:]):
                for name, start, n in zip(names, starts, counts, strict=True):
                    part = np.ascontiguousarray(values[start : start + n, i])
                    found[one["name"], int(layer), str(name)] = part.view(f"u{part.itemsize}")
    return found


def assert_same(found: Rows, expected: Rows) -> None:
    """Every cell of `expected` is there, to the bit."""
    assert set(expected) <= set(found)
    wrong = [cell for cell, values in expected.items() if not np.array_equal(values, found[cell])]
    assert wrong == []
