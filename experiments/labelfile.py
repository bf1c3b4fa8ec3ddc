"""Labels and annotations in files of their own: CSV or JSON, joined to rollouts by id."""

import csv
import io
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from experiments.annotations import ResponseSpan, Span, parse_annotations
from experiments.errors import ExperimentError
from experiments.formats import labels_of
from experiments.jsonfile import load_records, read_text, where
from experiments.transcript import LabelValue

__all__ = ["Labels", "read_labels"]

ID_NAMES = ("rollout_id", "id", "prompt_id", "idx")


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """What a file says of rollouts.

    Attributes
    ----------
    labels : mapping of rollout id to its labels
    samples : mapping of (run, sample) to labels
        Of audit classifications, which name no rollout id.
    annotations : mapping of rollout id to spans
    """

    labels: Mapping[str, Mapping[str, LabelValue]] = field(default_factory=dict)
    samples: Mapping[tuple[str, int], Mapping[str, LabelValue]] = field(default_factory=dict)
    annotations: Mapping[str, tuple[Span, ...]] = field(default_factory=dict)


def read_labels(path: str | Path) -> Labels:
    """Read labels or annotations, the form told by the content.

    CSV: a column `rollout_id` (or `id`, or `file`, as in `71.json`), each other column a label, its type that of all
    its values; an empty cell is no value. JSON or JSON lines: objects with `rollout_id` (or `id`), or one object of id
    to labels; audit classifications; annotations in either of their two forms; `detailed_annotations` of biases, whose
    token ranges count from the response.

    Raises
    ------
    ExperimentError
        It is none of these, or an id is there twice.
    """
    path = Path(path)
    if path.suffix in (".csv", ".tsv"):
        return Labels(labels=_csv(path))
    document, lines = load_records(path)
    if isinstance(document, dict) and isinstance(document.get("classifications"), list):
        return Labels(samples=_samples(document["classifications"], path))
    if isinstance(document, dict) and isinstance(document.get("detailed_annotations"), dict):
        return _exploitations(document["detailed_annotations"], path)
    if isinstance(document, dict) and document and _are_annotations(document):
        return Labels(annotations=parse_annotations(document, source=str(path)))
    if isinstance(document, dict):
        named = document.items()
        records = [({"rollout_id": key, **one} if isinstance(one, dict) else one, 0) for key, one in named]
    else:
        many = document if isinstance(document, list) else [document]
        records = lines or [(one, n + 1) for n, one in enumerate(many)]
    return Labels(labels=_records(records, path))


def _are_annotations(document: Mapping[str, Any]) -> bool:
    if isinstance(document.get("annotations"), list):
        return True
    return all(isinstance(one, dict) and isinstance(one.get("annotations"), list) for one in document.values())


def _records(
    records: list[tuple[Any, int]], path: Path, *, labels: Callable[[dict[str, Any]], dict[str, LabelValue]] = labels_of
) -> dict[str, dict[str, LabelValue]]:
    found: dict[str, dict[str, LabelValue]] = {}
    for record, number in records:
        place = where(path, number or None)
        key = next((k for k in ID_NAMES if isinstance(record, dict) and record.get(k) is not None), None)
        if key is None:
            raise ExperimentError(f"{place}: labels of no rollout; each needs a `rollout_id`")
        name = str(record[key])
        if name in found:
            raise ExperimentError(f"{place}: rollout {name!r} is there twice; give its labels once")
        found[name] = labels({k: v for k, v in record.items() if k != key})
        if any(isinstance(v, float) and not math.isfinite(v) for v in found[name].values()):
            raise ExperimentError(f"{place}: rollout {name!r} has a label that is not finite; write it as text")
    if not found:
        raise ExperimentError(f"{path} holds no labels; give objects with `rollout_id`, or a CSV with such a column")
    return found


def _samples(classifications: list[Any], path: Path) -> dict[tuple[str, int], Mapping[str, LabelValue]]:
    found: dict[tuple[str, int], Mapping[str, LabelValue]] = {}
    for one in classifications:
        good = isinstance(one, dict) and isinstance(one.get("run"), str) and type(one.get("sample")) is int
        if not good or not isinstance(one.get("label"), str):
            raise ExperimentError(f"{path}: a classification without `run`, `sample` and `label`; mend the file")
        labels = {"classification": one["label"]}
        if isinstance(one.get("justification"), str):
            labels["classification_justification"] = one["justification"]
        found[one["run"], one["sample"]] = labels
    return found


def _exploitations(entries: Mapping[str, Any], path: Path) -> Labels:
    """Read where responses exploit which bias: each entry's own values are labels, its `exploitations` annotations."""
    try:
        own = [{k: v for k, v in entry.items() if k != "exploitations"} for entry in entries.values()]
        spans = {
            name: tuple(
                ResponseSpan(token_start=one["tokens"][0], token_end=one["tokens"][1], label=f"bias {one['bias']}")
                for one in entry.get("exploitations", ())
            )
            for name, entry in entries.items()
        }
    except (KeyError, IndexError, TypeError, AttributeError, ValidationError) as error:
        said = " ".join(str(error).split())[:120]
        raise ExperimentError(
            f"{path}: an exploitation is not valid ({said}); each needs `bias` and `tokens` of two numbers"
        ) from None
    named = [({"rollout_id": name, **one}, 0) for name, one in zip(entries, own, strict=True)]
    return Labels(labels=_records(named, path), annotations=spans)


def _csv(path: Path) -> dict[str, dict[str, LabelValue]]:
    text = read_text(path)
    try:
        rows = list(csv.reader(io.StringIO(text), delimiter="\t" if path.suffix == ".tsv" else ",", strict=True))
    except csv.Error as error:
        raise ExperimentError(f"{path} is no valid CSV: {error}") from None
    header = [name.strip() for name in rows[0]] if rows else []
    key = next((name for name in (*ID_NAMES, "file") if name in header), None)
    if key is None or len(set(header)) < len(header) or "" in header:
        raise ExperimentError(
            f"{path} needs a header with a column rollout_id and a name for each other one; it has "
            f"{', '.join(header):.200}"
        )
    body = [(number, row) for number, row in enumerate(rows[1:], start=2) if any(cell.strip() for cell in row)]
    for number, row in body:
        if len(row) != len(header):
            raise ExperimentError(f"{where(path, number)}: {len(row)} cells for {len(header)} columns; mend the row")
    columns = {name: _typed([row[i] for _, row in body]) for i, name in enumerate(header) if name != key}
    at = header.index(key)
    records: list[tuple[Any, int]] = [
        ({"rollout_id": _named(row[at], key) or None, **{name: values[i] for name, values in columns.items()}}, number)
        for i, (number, row) in enumerate(body)
    ]
    return _records(records, path, labels=lambda row: {k: v for k, v in row.items() if v is not None})


def _named(cell: str, column: str) -> str:
    """A column of response files names rollouts by the files' stems."""
    return cell.strip().removesuffix(".json") if column == "file" else cell.strip()


def _typed(cells: list[str]) -> list[LabelValue | None]:
    """Return a column's values as the narrowest of bool, int, float and text that all of them are."""
    given = [one.strip() for one in cells if one.strip()]
    if given and all(one.lower() in ("true", "false") for one in given):
        return [one.strip().lower() == "true" if one.strip() else None for one in cells]
    for kind in (int, float):
        if given and all(_is(kind, one) for one in given):
            return [kind(one) if one.strip() else None for one in cells]
    return [one if one.strip() else None for one in cells]


def _is(kind: type[int] | type[float], text: str) -> bool:
    if "_" in text or re.match(r"[+-]?0\d", text):
        return False  # "007" is a name
    try:
        value = kind(text)
    except ValueError:
        return False
    return math.isfinite(value) and abs(value) < 2**62 if kind is int else math.isfinite(value)
