"""One record of a foreign file as a Transcript: chats, tau-bench runs, responses of an experiment tree."""

import json
from collections.abc import Mapping
from typing import Any

from experiments.errors import ExperimentError
from experiments.transcript import LabelValue, Transcript

__all__ = ["labels_of", "transcript_of"]

_CONTENT = ("messages", "prompt", "response", "token_ids", "text")
# Keys with a meaning of their own; every other key is a label.
_STRUCTURE = {
    *_CONTENT,
    "id",
    "prompt_end",
    "turn_boundaries",
    "sentence_boundaries",
    "tools",
    "tags",
    "prompt_set",
    "annotations",
    "source",
    "tokens",  # decoded token strings: lossy, so never read
}


def transcript_of(record: Any, *, source: str, default_id: str | None = None) -> Transcript:
    """Read one record, its format told by its keys.

    Parameters
    ----------
    record : a JSON value
    source : str
        Named in errors, kept with the transcript.
    default_id : str, optional
        The id when the record has none (the stem of a file that holds one response).

    Raises
    ------
    ExperimentError
        Not a transcript of a known format, or not a valid one.
    """
    if isinstance(record, Mapping) and "traj" in record:
        return _tau_bench(record, source=source)
    if isinstance(record, Mapping) and any(key in record for key in _CONTENT):
        return _chat(record, source=source, default_id=default_id)
    keys = f"keys {', '.join(map(str, list(record)[:6])) or 'none'}" if isinstance(record, Mapping) else "no keys"
    raise ExperimentError(
        f"{source}: not a transcript ({keys}); a chat has `messages`, `prompt` with `response`, `token_ids` or `text`, "
        "a tau-bench run has `traj`"
    )


def _chat(record: Mapping[str, Any], *, source: str, default_id: str | None) -> Transcript:
    fields: dict[str, Any] = {key: record[key] for key in _CONTENT if record.get(key) is not None}
    fields["id"] = record.get("id", default_id)
    if fields["id"] is None:
        raise ExperimentError(f'{source}: a transcript without `id`; give each its own, such as "id": "71"')
    for key, name in {"prompt_end": "prompt_end", "turn_boundaries": "turns", "tools": "tools", "tags": "tags"}.items():
        if record.get(key) is not None:
            fields[name] = record[key]
    fields["prompt_set"] = record.get("prompt_set") or ""
    fields["annotations"] = [*_listed(record, "annotations", source), *_sentences(record, source)]
    fields["labels"] = {**_source_labels(record.get("source")), **labels_of(record)}
    return Transcript.of(fields, source=source)


def _tau_bench(record: Mapping[str, Any], *, source: str) -> Transcript:
    """A run of tau-bench: task, trial and reward are labels, the trajectory is the chat."""
    missing = [key for key in ("task_id", "trial", "reward") if record.get(key) is None]
    if missing:
        raise ExperimentError(f"{source}: a tau-bench run (it has `traj`) without `{missing[0]}`")
    fields = {
        "id": f"{record['task_id']}-{record['trial']}",
        "messages": record["traj"],
        "labels": {key: value for key, value in labels_of(record).items() if key not in ("traj", "info")},
    }
    return Transcript.of(fields, source=source)


def labels_of(record: Mapping[str, Any]) -> dict[str, LabelValue]:
    """Return every key without a meaning of its own as a label.

    null is no label; a list or an object is kept as compact JSON text with sorted keys, so that nothing is lost and
    a label stays one value.
    """
    return {key: _label(value) for key, value in record.items() if key not in _STRUCTURE and value is not None}


def _label(value: Any) -> LabelValue:
    if isinstance(value, (str, int, float, bool)):
        return value
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _source_labels(source: Any) -> dict[str, LabelValue]:
    """What a rollout's `source` says of it (run, sample_idx, classification, ...); its `type` is `source_type`."""
    if source is None:
        return {}
    if not isinstance(source, Mapping):
        return {"source": _label(source)}
    return {"source_type" if k == "type" else k: _label(v) for k, v in source.items() if v is not None}


def _listed(record: Mapping[str, Any], key: str, source: str) -> list[Any]:
    value = record.get(key)
    if value is not None and not isinstance(value, list):
        raise ExperimentError(f"{source}: `{key}` must be a list, not {type(value).__name__}")
    return value or []


def _sentences(record: Mapping[str, Any], source: str) -> list[Any]:
    """Sentences of a response count tokens from its start; a transcript's annotations count from its own."""
    shift = record.get("prompt_end") or 0
    out = []
    for one in _listed(record, "sentence_boundaries", source):
        try:
            start, end = one["token_start"] + shift, one["token_end"] + shift
            out.append({"token_start": start, "token_end": end, "label": f"sentence {one['sentence_num']}"})
        except (KeyError, TypeError):
            out.append(one)  # refused with its place by the model
    return out
