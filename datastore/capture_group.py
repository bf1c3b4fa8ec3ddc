"""The Zarr group of one capture: every array in its final shape, coordinates and table filled, before any row is."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datastore import storage
from datastore.layout import label_file
from datastore.schema import ROLES, SEGMENTS, STATISTICS, LabelValue, Plan

__all__ = ["build_group", "hidden_axis", "label_array"]

STATS_ROW_BYTES = 2 << 20
"""Bytes a chunk of one statistic, which is as many rollouts; who combines one holds about eight times as much."""


def build_group(path: Path, plan: Plan, *, created: str) -> None:
    """Write the group of `plan` at `path`, complete but for components, statistics and consolidated metadata."""
    storage.create_group(path, group_attributes(plan, created))
    for one in plan.components:
        storage.create_array(
            path / one.name,
            shape=(plan.n_tokens, len(plan.layers), one.width),
            dtype=one.dtype,
            chunks=(plan.chunk_tokens[one.name], 1, one.width),
            dims=("token", "layer", hidden_axis(plan, one.name)),
            codec=plan.codec,
            attrs={"hook": one.hook, "coordinates": "token_id position segment role turn thinking rollout"},
        )
    storage.write_array(path / "layer", np.asarray(plan.layers, dtype=np.int32), dims=("layer",))
    _write_tokens(path, plan)
    _write_table(path / "rollouts", plan)
    _write_prefixes(path / "prefix", plan)
    _write_annotations(path / "annotations", plan)
    _write_vocab(path / "vocab", plan)
    if plan.statistics:
        _create_statistics(path / "stats", plan)


def hidden_axis(plan: Plan, component: str) -> str:
    """Return `hidden` for components as wide as the residual stream, else an axis of the component's own.

    The stream's width is the model's hidden size where the provenance says it, else that of the first component that
    is not a key or value projection.
    """
    streams = [c.width for c in plan.components if c.name not in ("k_proj", "v_proj")]
    width = (plan.provenance.get("model") or {}).get("hidden_size") or next(iter(streams), None)
    return "hidden" if plan.component(component).width == width else f"{component}_hidden"


def group_attributes(plan: Plan, created: str) -> dict[str, Any]:
    """Return the attributes of a capture's group."""
    company = {
        str(index): {name: _sha256(plan, index, name) for name in batch.company}
        for index, batch in enumerate(plan.batches)
        if batch.company
    }
    return {
        "plan": plan.key,
        "request": plan.request,
        "replace": plan.replace,
        "created": created,
        "layers": list(plan.layers),
        "components": [{"name": c.name, "width": c.width, "dtype": c.dtype, "hook": c.hook} for c in plan.components],
        "n_rollouts": len(plan.rollouts),
        "n_tokens": plan.n_tokens,
        "batches": [list(b.members) for b in plan.batches],
        "company": company,
        "batch_tokens": plan.batch_tokens,
        "codec": {"name": plan.codec.name, "level": plan.codec.level, "blocksize": plan.codec.blocksize},
        "statistics": plan.stats_level if plan.statistics else "none",
        "provenance": dict(plan.provenance),
        "Conventions": "CF-1.11",
    }


def _sha256(plan: Plan, batch: int, name: str) -> str:
    return hashlib.sha256(plan.batches[batch].company[name].astype("<i4").tobytes()).hexdigest()


def _write_tokens(path: Path, plan: Plan) -> None:
    def flat(name: str) -> NDArray[Any]:
        return np.concatenate([getattr(r, name) for r in plan.rollouts])

    counts = [r.n_tokens for r in plan.rollouts]
    roles = {"flag_values": list(range(len(ROLES))), "flag_meanings": " ".join(ROLES)}
    segments = {"flag_values": list(range(len(SEGMENTS))), "flag_meanings": " ".join(SEGMENTS)}
    position = np.concatenate([np.arange(n, dtype=np.int32) for n in counts])
    rollout = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    storage.write_array(path / "token_id", flat("token_ids"), dims=("token",))
    storage.write_array(path / "position", position, dims=("token",))
    storage.write_array(path / "segment", flat("segment"), dims=("token",), attrs=segments)
    storage.write_array(path / "role", flat("role"), dims=("token",), attrs=roles)
    storage.write_array(path / "turn", flat("turn"), dims=("token",))
    storage.write_array(path / "thinking", flat("thinking"), dims=("token",))
    storage.write_array(path / "rollout", rollout, dims=("token",), attrs={"instance_dimension": "row"})


def _write_table(path: Path, plan: Plan) -> None:
    rollouts = plan.rollouts
    batch = {name: i for i, b in enumerate(plan.batches) for name in b.stored}
    columns: dict[str, NDArray[Any]] = {
        "rollout_id": _text([r.rollout_id for r in rollouts]),
        "token_start": plan.ragged.starts[:-1],
        "n_tokens": np.asarray([r.n_tokens for r in rollouts], dtype=np.int64),
        "prompt_end": np.asarray([r.prompt_end for r in rollouts], dtype=np.int64),
        "prompt_set": _text([r.prompt_set for r in rollouts]),
        "batch": np.asarray([batch[r.rollout_id] for r in rollouts], dtype=np.int64),
        "token_sha256": _text([r.token_sha256 for r in rollouts]),
        "tags": _text([json.dumps(list(r.tags)) for r in rollouts]),
    }
    storage.create_group(path, {})
    for name, values in columns.items():
        ragged = {"sample_dimension": "token"} if name == "n_tokens" else {}
        storage.write_array(path / name, values, dims=("row",), attrs=ragged)
    storage.create_group(path / "labels", {})
    for name in dict.fromkeys(key for r in rollouts for key in r.labels):
        values, missing = label_array([r.labels.get(name) for r in rollouts])
        attrs = {"label": name, "missing": missing}
        storage.write_array(path / "labels" / label_file(name), values, dims=("row",), attrs=attrs)


def _write_prefixes(path: Path, plan: Plan) -> None:
    """Keep the token ids that were computed before the first stored ones, end to end, where there are any."""
    counts = np.asarray([r.n_prefix for r in plan.rollouts], dtype=np.int64)
    if not counts.any():
        return
    ids = np.concatenate([r.computed_ids[: r.n_prefix] for r in plan.rollouts])
    storage.create_group(path, {})
    storage.write_array(path / "n_tokens", counts, dims=("row",), attrs={"sample_dimension": "prefix_token"})
    storage.write_array(path / "token_id", ids, dims=("prefix_token",))


def label_array(values: Sequence[LabelValue | None]) -> tuple[NDArray[Any], list[int]]:
    """Return a label's values as one array, and the rows where it has none.

    All bool, all int or all numbers keep their type; anything else becomes text.

    Examples
    --------
    >>> label_array([1, None, 2.5])
    (array([1. , nan, 2.5]), [1])
    """
    missing = [row for row, value in enumerate(values) if value is None]
    kinds = {type(value) for value in values if value is not None}
    if kinds == {bool}:
        return np.asarray([bool(v) for v in values], dtype=np.bool_), missing
    if kinds == {int} and all(abs(int(v)) < 2**62 for v in values if v is not None):
        return np.asarray([0 if v is None else v for v in values], dtype=np.int64), missing
    if kinds and kinds <= {int, float}:
        return np.asarray([np.nan if v is None else v for v in values], dtype=np.float64), missing
    return _text(["" if v is None else str(v) for v in values]), missing


def _write_annotations(path: Path, plan: Plan) -> None:
    spans = [(row, one) for row, r in enumerate(plan.rollouts) for one in r.annotations]
    storage.create_group(path, {})
    columns: dict[str, NDArray[Any]] = {
        "row": np.asarray([row for row, _ in spans], dtype=np.int64),
        "token_start": np.asarray([one.token_start for _, one in spans], dtype=np.int64),
        "token_end": np.asarray([one.token_end for _, one in spans], dtype=np.int64),
        "label": _text([one.label for _, one in spans]),
    }
    for name, values in columns.items():
        storage.write_array(path / name, values, dims=("annotation",))


def _write_vocab(path: Path, plan: Plan) -> None:
    ids = sorted(plan.vocab)
    pieces = [plan.vocab[i] for i in ids]
    offset = np.zeros(len(ids) + 1, dtype=np.int64)
    np.cumsum([len(p) for p in pieces], out=offset[1:])
    storage.create_group(path, {})
    storage.write_array(path / "token_id", np.asarray(ids, dtype=np.int32), dims=("vocab",))
    storage.write_array(path / "offset", offset, dims=("vocab_edge",))
    storage.write_array(path / "bytes", np.frombuffer(b"".join(pieces), dtype=np.uint8), dims=("vocab_byte",))


def _create_statistics(path: Path, plan: Plan) -> None:
    storage.create_group(path, {"level": plan.stats_level})
    for one in plan.components:
        storage.create_group(path / one.name, {})
        tokens = min(plan.n_tokens, 65536)
        storage.create_array(
            path / one.name / "norm",
            shape=(plan.n_tokens, len(plan.layers)),
            dtype="float32",
            chunks=(tokens, 1),
            dims=("token", "layer"),
        )
        for name in STATISTICS:
            _create_statistic(path / one.name / name, plan, component=one.name)


def _create_statistic(path: Path, plan: Plan, *, component: str) -> None:
    width, layers = plan.component(component).width, len(plan.layers)
    dims: tuple[str, ...] = ("segment_code", "layer", hidden_axis(plan, component))
    shape: tuple[int, ...] = (len(SEGMENTS), layers, width)
    chunks: tuple[int, ...] = (len(SEGMENTS), 1, width)
    if plan.stats_level == "rollout":
        rows = max(1, min(len(plan.rollouts), STATS_ROW_BYTES // (len(SEGMENTS) * width * 8)))
        dims, shape, chunks = ("row", *dims), (len(plan.rollouts), *shape), (rows, *chunks)
    dtype = "int64" if path.name in ("count", "nonfinite") else "float64"
    storage.create_array(path, shape=shape, dtype=dtype, chunks=chunks, dims=dims)


def _text(values: Sequence[str]) -> NDArray[Any]:
    return np.asarray(list(values), dtype=object)
