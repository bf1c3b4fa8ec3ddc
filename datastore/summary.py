"""What a store holds, in one JSON-able summary: for `info`, and for whoever asks from Python."""

from typing import TYPE_CHECKING, Any

from datastore.schema import FORMAT_VERSION

if TYPE_CHECKING:
    from datastore.query import Store
    from datastore.union import Capture

__all__ = ["summarise"]

FIXED = ("n_tokens", "prompt_end", "prompt_set", "tags", "token_sha256")


def summarise(store: "Store") -> dict[str, Any]:
    """Return models, components, layers, rollouts, tokens, bytes, the share that is present, and the captures.

    Bytes are those of all captures on disk, also of rows that a later capture replaced.
    """
    captures = list(store.cells.captures)
    raw = sum(_raw_bytes(one) for one in captures)
    stored = sum(sum(one.attrs.get("stored_bytes", {}).values()) for one in captures)
    return {
        "store": store.path,
        "version": FORMAT_VERSION,
        "rollouts": len(store.rollouts),
        "tokens": int(store.rollouts["n_tokens"].sum()),
        "layers": store.layers,
        "labels": [c for c in store.rollouts.columns if c not in FIXED],
        "annotations": len(store.annotations),
        "raw_bytes": raw,
        "stored_bytes": stored,
        "ratio": raw / stored if stored else None,
        "models": _models(captures),
        "components": [_component(store, name) for name in store.components],
        "captures": [_capture(one) for one in captures],
    }


def _raw_bytes(capture: "Capture") -> int:
    cells = capture.ragged.n_tokens * len(capture.layers)
    return sum(cells * one.width * one.itemsize for one in capture.components.values())


def _models(captures: "list[Capture]") -> list[dict[str, Any]]:
    models: dict[str, dict[str, Any]] = {}
    for one in captures:
        model = dict(one.attrs["provenance"].get("model") or {})
        weights = model.get("weights_sha256")
        revision = model.get("revision") or (f"weights sha256 {weights[:12]}" if weights else "weights unknown")
        known = {k: model.get(k) or "unknown" for k in ("name", "model_type", "dtype")}
        models.setdefault(one.model, {**known, "revision": revision})
    return list(models.values())


def _component(store: "Store", name: str) -> dict[str, Any]:
    spec = store.cells.components[name]
    there = store.captured(name)
    counts = [one.attrs.get("nonfinite", {}).get(name) for one in store.cells.captures if name in one.components]
    return {
        "name": name,
        "dtype": spec.dtype,
        "width": spec.width,
        "hook": spec.hook,
        "layers": [int(layer) for layer in there.columns],
        "present": float(there.to_numpy().sum()) / max(1, len(there) * len(store.layers)),
        "nonfinite": None if None in counts else sum(counts),
    }


def _capture(one: "Capture") -> dict[str, Any]:
    return {
        "number": one.number,
        "n_rollouts": len(one.rollout_ids),
        "n_tokens": one.ragged.n_tokens,
        "layers": one.layers,
        "components": list(one.components),
        "statistics": one.attrs.get("statistics"),
        "created": one.attrs.get("created"),
    }
