"""Labels and annotations added to a store later: one more numbered group, joined by rollout id, nothing changed.

    labels/0001/       rollout_id (row,), labels/{label} (row,) with the rows that have none in its attributes
    annotations/0001/  rollout_id, token_start, token_end, label, all (annotation,)

The reader is `datastore.tables`: of several values of a rollout's label that of the highest number counts.
"""

import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datastore import storage
from datastore.capture_group import label_array
from datastore.errors import MisuseError
from datastore.layout import label_file, names_a_label
from datastore.schema import Annotation, LabelValue

__all__ = ["add_annotations", "add_labels"]


def add_labels(
    store: Path, labels: Mapping[str, Mapping[str, LabelValue]], *, attrs: Mapping[str, Any] | None = None
) -> int:
    """Give rollouts labels; what they had under the same names no longer counts.

    Parameters
    ----------
    store : Path
    labels : mapping of rollout id to its labels
        A rollout without a value for a name keeps what it has.
    attrs : mapping, optional
        JSON kept with them, such as where they come from.

    Returns
    -------
    int
        The number under `labels/`.

    Raises
    ------
    MisuseError
        There are no labels, or a name or value is none.
    NotAStoreError, ReadOnlyError
        The store can't be used.
    """
    rows = {name: dict(values) for name, values in labels.items() if values}
    names = list(dict.fromkeys(label for values in rows.values() for label in values))
    if not names:
        raise MisuseError("there are no labels to add; nothing was written")
    for label in names:
        _check(label, [values[label] for values in rows.values() if label in values])

    def write(aside: Path) -> None:
        _write_text(aside / "rollout_id", list(rows), "row")
        storage.create_group(aside / "labels", {})
        for label in names:
            values, missing = label_array([one.get(label) for one in rows.values()])
            found = {"label": label, "missing": missing}
            storage.write_array(aside / "labels" / label_file(label), values, dims=("row",), attrs=found)

    return _publish(store, "labels", write, attrs=attrs)


def add_annotations(
    store: Path, annotations: Mapping[str, Sequence[Annotation]], *, attrs: Mapping[str, Any] | None = None
) -> int:
    """Give rollouts annotated spans; spans with the same label that a rollout had no longer count.

    Parameters
    ----------
    store : Path
    annotations : mapping of rollout id to its spans
    attrs : mapping, optional
        JSON kept with them.

    Returns
    -------
    int
        The number under `annotations/`.

    Raises
    ------
    MisuseError
        There are no spans.
    NotAStoreError, ReadOnlyError
        The store can't be used.
    """
    spans = [(name, one) for name, many in annotations.items() for one in many]
    if not spans:
        raise MisuseError("there are no annotations to add; nothing was written")

    def write(aside: Path) -> None:
        _write_text(aside / "rollout_id", [name for name, _ in spans], "annotation")
        for column in ("token_start", "token_end"):
            values = np.asarray([getattr(one, column) for _, one in spans], dtype=np.int64)
            storage.write_array(aside / column, values, dims=("annotation",))
        _write_text(aside / "label", [one.label for _, one in spans], "annotation")

    return _publish(store, "annotations", write, attrs=attrs)


def _check(label: str, values: Sequence[Any]) -> None:
    if not names_a_label(label):
        raise MisuseError(f"{label!r:.80} can't name a label; nothing was written, give it a shorter, plain name")
    for value in values:
        if not isinstance(value, (str, int, float, bool)):
            raise MisuseError(
                f"label {label!r} has the value {value!r:.80}; a label is text, a number or a truth value, and nothing "
                "was written"
            )


def _write_text(path: Path, values: Sequence[str], dim: str) -> None:
    array: NDArray[Any] = np.asarray(list(values), dtype=object)
    storage.write_array(path, array, dims=(dim,))


def _publish(store: Path, kind: str, write: Callable[[Path], None], *, attrs: Mapping[str, Any] | None) -> int:
    storage.open_root(store)
    into = store / kind
    aside = into / f"{uuid.uuid4().hex}.partial"
    with storage.writable(into):
        try:
            into.mkdir(exist_ok=True)
            storage.create_group(aside, {"created": datetime.now(UTC).isoformat(timespec="seconds"), **(attrs or {})})
            write(aside)
            storage.consolidate(aside)
            storage.sync_files(aside)
            return storage.publish(aside, into)
        finally:
            storage.remove(aside)
