"""Labels and annotations for rollouts that are captured already: read, joined by rollout id, written beside them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

import datastore
from capture.errors import RequestError
from datastore.labels import add_annotations, add_labels
from datastore.query import Store
from datastore.schema import Annotation, LabelValue
from experiments.annotations import ResponseSpan, Span, TextSpan, token_range
from experiments.labelfile import read_labels

__all__ = ["Labelled", "label"]

FIXED = ("rollout_id", "n_tokens", "prompt_end", "prompt_set", "tags", "token_sha256")
_KINDS = {bool: "truth values", int: "numbers", float: "numbers", str: "text"}


@dataclass(slots=True, kw_only=True)
class Labelled:
    """What was joined, and what was not."""

    labels: dict[str, int] = field(default_factory=dict)
    annotations: int = 0
    rollouts: int = 0
    unknown: list[str] = field(default_factory=list)
    unlabelled: int = 0
    notes: list[str] = field(default_factory=list)


def label(path: Path, files: Sequence[Path], *, dry_run: bool = False) -> Labelled:
    """Add the labels and annotations of files to a store.

    Parameters
    ----------
    path : Path
        The store.
    files : sequence of Path
        As `experiments.labelfile.read_labels`; of two files that give one label to one rollout the later counts.
    dry_run : bool
        Join, and write nothing.

    Raises
    ------
    ExperimentError
        A file can't be read.
    RequestError
        Not one id is in the store, or a label has the name of a column.
    """
    store, done = datastore.open(path), Labelled()
    labels: dict[str, dict[str, LabelValue]] = {}
    spans: dict[str, list[Span]] = {}
    for file in files:
        read = read_labels(file)
        for name, values in {**read.labels, **_by_sample(store.rollouts, read.samples, done)}.items():
            labels.setdefault(name, {}).update(values)
        for name, many in read.annotations.items():
            spans.setdefault(name, []).extend(many)
    known = set(store.rollouts.index)
    done.unknown += sorted({*labels, *spans} - known)
    labels = {name: values for name, values in labels.items() if name in known}
    spans = {name: many for name, many in spans.items() if name in known}
    if not labels and not spans:
        listed = ", ".join(done.unknown[:8])
        raise RequestError(
            f"none of the {len(done.unknown)} ids is a rollout of {path} ({listed}); nothing was written, it has "
            f"{', '.join(map(str, store.rollouts.index[:8]))}"
        )
    done.rollouts = len({*labels, *spans})
    done.unlabelled = len(known) - done.rollouts
    _check(store.rollouts, labels, done)
    annotations = {name: _ranges(store, name, many, done=done) for name, many in spans.items()}
    done.annotations = sum(map(len, annotations.values()))
    if not dry_run:
        source = {"source": [file.name for file in files]}
        if done.labels:
            add_labels(path, labels, attrs=source)
        if done.annotations:
            add_annotations(path, annotations, attrs=source)
    return done


def _by_sample(
    table: pd.DataFrame, samples: Mapping[tuple[str, int], Mapping[str, LabelValue]], done: Labelled
) -> dict[str, Mapping[str, LabelValue]]:
    """Find the rollouts of audit classifications by their labels `run` and `sample_idx`."""
    if not samples:
        return {}
    if not {"run", "sample_idx"} <= set(table.columns):
        raise RequestError("classifications are joined on the labels run and sample_idx, and these rollouts have none")
    keys = {
        (str(run), int(sample)): str(name)
        for name, run, sample in zip(table.index, table["run"], table["sample_idx"], strict=True)
        if sample == sample and sample is not None
    }
    done.unknown += [f"{run} sample {sample}" for run, sample in samples if (run, sample) not in keys]
    return {keys[key]: labels for key, labels in samples.items() if key in keys}


def _check(table: pd.DataFrame, labels: Mapping[str, Mapping[str, LabelValue]], done: Labelled) -> None:
    """Count values by label; say where a label's type changes, for then it becomes text."""
    given: dict[str, set[str]] = {}
    for values in labels.values():
        for name, value in values.items():
            if name in FIXED:
                raise RequestError(f"a label can't be called {name}, a column that every rollout has; rename it")
            done.labels[name] = done.labels.get(name, 0) + 1
            given.setdefault(name, set()).add(_KINDS[type(value)])
    for name, kinds in given.items():
        before = {_KINDS[type(v)] for v in _known(table, name)}
        if len(kinds | before) > 1:
            was = f"was {' and '.join(sorted(before))}" if before else "has values of several types"
            done.notes.append(f"label {name!r} {was} and is now given {' and '.join(sorted(kinds))}: it becomes text")


def _known(table: pd.DataFrame, name: str) -> list[Any]:
    return [v for v in table[name].tolist() if v is not None and v == v] if name in table else []


def _ranges(store: Store, rollout_id: str, spans: Sequence[Span], *, done: Labelled) -> list[Annotation]:
    n, found = int(store.rollouts["n_tokens"][rollout_id]), []
    for span in spans:
        if isinstance(span, TextSpan):
            place = _find(store, rollout_id, span.span)
            if place is None:
                done.notes.append(f"rollout {rollout_id!r} does not contain {span.span[:60]!r}; it was left out")
                continue
            start, stop = place
        else:
            first = _response(store, rollout_id) if isinstance(span, ResponseSpan) else 0
            start, stop = first + span.token_start, first + span.token_end
        if stop > n:
            done.notes.append(
                f"rollout {rollout_id!r}: {span.label!r} ends at token {stop}, beyond its {n} tokens; it was left out"
            )
            continue
        found.append(Annotation(token_start=start, token_end=stop, label=span.label))
    return found


def _response(store: Store, rollout_id: str) -> int:
    """Return where the response begins; with the whole where there is none."""
    n, cut = (int(store.rollouts[name][rollout_id]) for name in ("n_tokens", "prompt_end"))
    return cut if cut < n else 0


def _find(store: Store, rollout_id: str, text: str) -> tuple[int, int] | None:
    """Find a text in the response, or in the whole where there is none."""
    tokens, first = store.tokens(rollout_id), _response(store, rollout_id)
    pieces = [one.encode() if isinstance(one, str) else b"" for one in tokens["text"].tolist()[first:]]
    place = token_range(pieces, text)
    return None if place is None else (first + place[0], first + place[1])
