"""What a calibration found in each rollout, token by token, as the `per_prompt` part of the users' file.

It is as long as the tokens times layers times dimensions that are tracked, and is held in memory: for small sets.
"""

from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

import datastore
from calibrate.export import alignment_range, massive_dims
from calibrate.formulas import PeakDims
from datastore.dtype import upcast
from datastore.errors import MisuseError
from datastore.schema import SEGMENTS
from datastore.stream import Block
from experiments.projections import AlignmentRange, MassiveDim, MassivePrompt, numbers

__all__ = ["per_rollout"]

TRACKED = 5
Values = dict[tuple[str, int], NDArray[np.float64]]


def per_rollout(data: xr.Dataset, *, memory: int = 1 << 30) -> dict[str, MassivePrompt]:
    """Return each rollout's largest dimensions, alignment, tokens, and values at the dimensions that are tracked.

    Tracked are the first five, by their index, of the dimensions that are massive in the rollout at any layer; where
    none is, of those that are largest.

    Parameters
    ----------
    data : Dataset
        `Calibration.data`, made with its pass over stores.
    memory : int
        Bytes of chunks to hold at most.

    Raises
    ------
    MisuseError
        The calibration was made without its pass, or of arrays, or two of its stores hold a rollout of the same id.
    """
    if "alignment_min" not in data:
        raise MisuseError("per-token values take a pass over the data, and this calibration made none; allow the pass")
    names = [str(name) for name in data["rollout_id"].values]
    paths = [one.get("store") for one in data.attrs["sources"]]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or None in paths:
        what = f"rollout {twice[0]!r} is in several stores" if twice else "the calibration is of arrays"
        raise MisuseError(f"{what}, so there is no file by rollout to be written; calibrate one store at a time")
    found: dict[str, MassivePrompt] = {}
    for source, path in enumerate(paths):
        store = datastore.open(Path(str(path)))
        rows = np.flatnonzero(data["source"].values == source).tolist()
        entries = {names[row]: _largest(data, row) for row in rows}
        tracked = {name: _tracked(by_layer.values()) for name, by_layer in entries.items()}
        values = _values(store, data, tracked, memory=memory)
        for row in rows:
            name = names[row]
            found[name] = _prompt(store, data, row, dims=tracked[name], values=values, entries=entries[name])
    return found


def _largest(data: xr.Dataset, row: int) -> dict[int, list[MassiveDim]]:
    fields = {name: data[f"rollout_{name}"].values[row] for name in ("dims", "peak", "mean_abs", "ratio", "massive")}
    layers = [int(layer) for layer in data["layer"].values]
    return {
        layer: massive_dims(PeakDims(**{name: values[i] for name, values in fields.items()}))
        for i, layer in enumerate(layers)
    }


def _tracked(by_layer: Iterable[list[MassiveDim]]) -> list[int]:
    every = [entry for entries in by_layer for entry in entries if entry.dim >= 0]
    massive = {entry.dim for entry in every if entry.is_massive}
    return sorted(massive or {entry.dim for entry in every})[:TRACKED]


def _values(store: datastore.Store, data: xr.Dataset, tracked: dict[str, list[int]], *, memory: int) -> Values:
    """Read the activations at each rollout's dimensions: (tokens, dims) by rollout and layer."""
    counts = store.rollouts["n_tokens"]
    layers = [int(layer) for layer in data["layer"].values]
    out: Values = {
        (name, layer): np.empty((int(counts[name]), len(dims))) for name, dims in tracked.items() for layer in layers
    }

    def take(block: Block) -> None:
        for name, positions, rows in store.rows_of(block):
            part = block.values[rows][:, tracked[name]]
            out[name, block.layer][positions] = np.asarray(upcast(part), np.float64)

    component = str(data.attrs["component"])
    blocks: Any = store.map_blocks(take, component, layers=layers, rollouts=list(tracked), memory=memory)
    with closing(blocks):
        for _ in blocks:
            pass
    return out


def _prompt(
    store: datastore.Store,
    data: xr.Dataset,
    row: int,
    *,
    dims: list[int],
    values: Values,
    entries: dict[int, list[MassiveDim]],
) -> MassivePrompt:
    name, end = str(data["rollout_id"].values[row]), int(data["prompt_tokens"].values[row])
    texts = [text if isinstance(text, str) else "" for text in store.tokens(name)["text"]]
    parts: dict[str, Any] = {"massive_dims": entries, "tracked_dims": dims}
    for segment, half in zip(SEGMENTS, (slice(0, end), slice(end, None)), strict=True):
        parts[f"{segment}_mean_alignment"] = _alignment(data, row, segment)
        parts[f"{segment}_tokens"] = texts[half]
        parts[f"{segment}_dim_values"] = {
            layer: {dim: numbers(values[name, layer][half, j]) for j, dim in enumerate(dims)} for layer in entries
        }
    return MassivePrompt.model_validate(parts)


def _alignment(data: xr.Dataset, row: int, segment: str) -> dict[int, AlignmentRange]:
    at = SEGMENTS.index(segment)
    keys = {"mean": "alignment", "min": "alignment_min", "max": "alignment_max", "std": "alignment_std"}
    spread = {name: data[key].values[row, at] for name, key in keys.items()}
    return {
        int(layer): alignment_range({name: float(values[i]) for name, values in spread.items()})
        for i, layer in enumerate(data["layer"].values)
        if not np.isnan(spread["mean"][i])
    }
