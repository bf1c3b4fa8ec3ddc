"""Scores as the projection files that an experiment's viewer and analyses read: `{trait}/{prompt_set}/{id}.json`."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from datastore.errors import MisuseError
from datastore.query import Store
from experiments.projections import (
    DimValues,
    Halves,
    MassiveDimData,
    Projection,
    ProjectionEntry,
    ProjectionMetadata,
    numbers,
    projection_path,
    write_json,
)
from project.cleaning import top_dims
from project.scoring import less_baseline

__all__ = ["export_json"]


def export_json(store: Store, scores: xr.Dataset, root: str | Path, *, centred: bool = False) -> int:
    """Write one projection file for each trait and rollout; return how many.

    Every vector's entry carries its token norms, and, where the store is calibrated, what it takes to clean it of
    massive dimensions. What is not captured or not finite is null: the files are always valid JSON.

    Parameters
    ----------
    store : Store
    scores : Dataset
        From `project.scores`.
    root : path
        Directory of the projections.
    centred : bool
        Subtract the directions' baselines.

    Raises
    ------
    MisuseError
        A baseline is unknown and `centred` is asked for, or a name would lead out of the directory.
    """
    values = scores.score.values
    if centred:
        values = less_baseline(values, scores.baseline.values)
    table = store.rollouts
    rollout, written = scores.rollout.values, 0
    norms = _activation_norms(store, scores)
    for name in dict.fromkeys(rollout.tolist()):
        tokens = np.flatnonzero(rollout == name)
        cut = int(table.loc[name, "prompt_end"])
        prompt_set = str(table.loc[name, "prompt_set"]) or store.path.stem
        for trait in dict.fromkeys(scores.trait.values.tolist()):
            columns = np.flatnonzero(scores.trait.values == trait)
            record = _record(store, scores, values, tokens=tokens, cut=cut, columns=columns)
            record.metadata = _metadata(scores, name, prompt_set, cut=cut, tokens=len(tokens), columns=columns)
            record.metadata.centered = centred
            record.metadata.captured_layers = list(norms)
            record.activation_norms = _halves(
                np.array([_mean(one[tokens][:cut]) for one in norms.values()]),
                np.array([_mean(one[tokens][cut:]) for one in norms.values()]),
            )
            path = projection_path(root, trait=trait, prompt_set=prompt_set, rollout_id=name)
            if not path.resolve().is_relative_to(Path(root).resolve()):
                raise MisuseError(f"rollout {name!r} or trait {trait!r} would be written outside {root}; rename it")
            write_json(path, record)
            written += 1
    return written


def _metadata(
    scores: xr.Dataset, name: str, prompt_set: str, *, cut: int, tokens: int, columns: NDArray[np.int64]
) -> ProjectionMetadata:
    first = columns[0]
    return ProjectionMetadata(
        prompt_id=name,
        prompt_set=prompt_set,
        n_prompt_tokens=cut,
        n_response_tokens=tokens - cut,
        multi_vector=True,
        n_vectors=len(columns),
        component=str(scores.component.values[first]),
        position=str(scores.vector_position.values[first]) or None,
        centered=False,
        projection_date=datetime.now(UTC).isoformat(),
        captured_layers=None,
    )


def _record(
    store: Store,
    scores: xr.Dataset,
    values: NDArray[np.float32],
    *,
    tokens: NDArray[np.int64],
    cut: int,
    columns: NDArray[np.int64],
) -> Projection:
    entries, cleaning = [], []
    norms = scores.norm.values
    for j in columns.tolist():
        data = _massive(store, scores, j, tokens=tokens, cut=cut)
        entry = ProjectionEntry(
            method=str(scores.method.values[j]),
            layer=int(scores.layer.values[j]),
            selection_source=str(scores.source.values[j]),
            baseline=_known(scores.baseline.values[j]),
            prompt=numbers(values[tokens[:cut], j]),
            response=numbers(values[tokens[cut:], j]),
            token_norms=_halves(norms[tokens[:cut], j], norms[tokens[cut:], j]),
        )
        if data is not None:
            entry.massive_dim_data = data
            cleaning.append(data)
        entries.append(entry)
    metadata = ProjectionMetadata(prompt_id="", prompt_set="")
    record = Projection(metadata=metadata, projections=entries)
    if len(entries) == len(cleaning) == 1:
        record.massive_dim_data = cleaning[0]  # where readers of single vectors look for it
    return record


def _massive(store: Store, scores: xr.Dataset, j: int, *, tokens: NDArray[np.int64], cut: int) -> MassiveDimData | None:
    component, layer = str(scores.component.values[j]), int(scores.layer.values[j])
    here = np.flatnonzero((scores.dim_component.values == component) & (scores.dim_layer.values == layer))
    if not len(here):
        return None
    dims = scores.dim.values[here].tolist()
    at = scores.dim_value.values[:, here]
    norm = float(scores.vector_norm.values[j])
    return MassiveDimData(
        dims=dims,
        top_dims_by_layer={n: list(top) for n, top in top_dims(store, component).items()},
        vec_norm=norm,
        # readers divide by the norm, which the unit vector has lost
        vec_components={dim: float(v) * norm for dim, v in zip(dims, scores.dim_unit.values[here, j], strict=True)},
        activation_values=DimValues(prompt=_by_dim(dims, at[tokens[:cut]]), response=_by_dim(dims, at[tokens[cut:]])),
    )


def _by_dim(dims: Sequence[int], values: NDArray[np.float32]) -> dict[int, list[Any]]:
    return {dim: numbers(values[:, i]) for i, dim in enumerate(dims)}


def _activation_norms(store: Store, scores: xr.Dataset) -> dict[int, NDArray[np.float32]]:
    """Each captured layer's norms where the store kept them, else only those of the layers that were scored."""
    from datastore.errors import AbsentError

    component = str(scores.component.values[0])
    names = list(dict.fromkeys(scores.rollout.values.tolist()))
    found: dict[int, NDArray[np.float32]] = {}
    for layer in store.captured(component).columns:
        scored = np.flatnonzero((scores.layer.values == layer) & (scores.component.values == component))
        try:
            found[int(layer)] = store.norms(component, rollouts=names, layers=int(layer)).values
        except AbsentError:
            if len(scored):
                found[int(layer)] = scores.norm.values[:, scored[0]]
    return found


def _mean(values: NDArray[np.float32]) -> float:
    return float(values.astype(np.float64).mean()) if len(values) else 0.0


def _halves(prompt: NDArray[Any], response: NDArray[Any]) -> Halves:
    return Halves(prompt=numbers(prompt), response=numbers(response))


def _known(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
