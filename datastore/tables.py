"""The tables of a store as pandas: rollouts with labels, annotations, captures; and the tokens of a rollout as text.

Labels and annotations come with captures and are added later, as `labels/0001/` and `annotations/0001/`:

    labels/0001/rollout_id, labels/0001/labels/{label}           string (row,); an array (row,) a label, as in a capture
    annotations/0001/rollout_id, token_start, token_end, label   (annotation,)

Of several values of a rollout's label that of the highest number counts, those added later before those of captures.
"""

import codecs
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from datastore.cells import Cells, Ints
from datastore.errors import CorruptError
from datastore.storage import attributes, read_array

__all__ = ["annotation_table", "capture_table", "rollout_table", "telling", "token_texts"]

FIXED = ("n_tokens", "prompt_end", "prompt_set", "tags", "token_sha256")


@dataclass(frozen=True, slots=True)
class _Given:
    """Values of one label: for which rollouts, and the values, all of one type."""

    rollouts: Ints
    values: NDArray[Any]


def rollout_table(cells: Cells, added: Sequence[Path]) -> pd.DataFrame:
    """Return one row per rollout, indexed by rollout_id.

    Parameters
    ----------
    cells : Cells
    added : sequence of Path
        The groups of labels added later, ascending by number.
    """
    table = pd.DataFrame(index=pd.Index(cells.ids.tolist(), name="rollout_id", dtype="str"))
    table["n_tokens"] = cells.counts
    table["prompt_end"] = cells.column("prompt_end").astype(np.int64)
    table["prompt_set"] = pd.array(cells.column("prompt_set"), dtype="str")
    tags = np.empty(len(table), dtype=object)
    tags[:] = [tuple(json.loads(text)) for text in cells.column("tags")]
    table["tags"] = tags
    table["token_sha256"] = pd.array(cells.column("token_sha256"), dtype="str")
    labels: dict[str, list[_Given]] = {}
    for rollouts, group in _label_groups(cells, added):
        for name, rows, values in _read_labels(group):
            known = rollouts[rows] >= 0
            labels.setdefault(name, []).append(_Given(rollouts[rows][known], values[known]))
    columns = {_free(name): _label_column(given, len(cells.ids)) for name, given in labels.items()}
    return pd.concat([table, pd.DataFrame(columns, index=table.index)], axis=1)


def _label_groups(cells: Cells, added: Sequence[Path]) -> Iterator[tuple[Ints, Path]]:
    """Yield the rollout of each row (-1: none that counts) and the group of labels, the lowest that counts first."""
    for place, capture in enumerate(cells.captures):
        yield np.where(cells.current[place], cells.members[place], -1), capture.path / "rollouts" / "labels"
    for group in added:
        names = read_array(group / "rollout_id")
        yield np.array([cells.index.get(str(n), -1) for n in names], dtype=np.int64), group / "labels"


def _read_labels(group: Path) -> Iterator[tuple[str, Ints, NDArray[Any]]]:
    """Yield each label with the rows that have a value, and the values."""
    for array in sorted(path for path in group.iterdir() if path.is_dir()) if group.is_dir() else ():
        attrs, values = attributes(array), read_array(array)
        missing = attrs.get("missing", [])
        if not isinstance(missing, list) or not all(type(row) is int and 0 <= row < len(values) for row in missing):
            raise CorruptError(
                f"{array / 'zarr.json'} names rows without a label that are not among its {len(values)} rows, so no "
                "label of it can be trusted; drop the capture or restore the file"
            )
        rows = np.setdiff1d(np.arange(len(values)), np.asarray(missing, dtype=np.int64))
        yield str(attrs.get("label", array.name)), rows, values[rows]


def _free(name: str) -> str:
    return f"label_{name}" if name in FIXED or name == "rollout_id" else name


def _label_column(given: Sequence[_Given], n: int) -> Any:
    """Return one label as a column. Types that differ become text, whole and broken numbers numbers."""
    values, there = np.empty(n, dtype=object), np.zeros(n, dtype=np.bool_)
    kinds = {"T" if one.values.dtype.kind in "OTU" else one.values.dtype.kind for one in given if len(one.values)}
    text = len(kinds) > 1 and kinds != {"i", "f"}
    for one in given:
        values[one.rollouts] = [str(v) for v in one.values.tolist()] if text else one.values.tolist()
        there[one.rollouts] = True
    if kinds == {"b"}:
        return values.astype(np.bool_) if there.all() else values
    if kinds and kinds <= {"i", "f"}:
        whole = kinds == {"i"} and there.all()
        return values.astype(np.int64) if whole else np.where(there, values, np.nan).astype(np.float64)
    return pd.array(values, dtype="str")


def annotation_table(cells: Cells, added: Sequence[Path]) -> pd.DataFrame:
    """Return rollout_id, token_start, token_end, label: one row per span, by rollout and start."""
    parts = []
    for number, (path, spans) in enumerate(_annotation_groups(cells, added)):
        columns = {name: read_array(path / name) for name in ("token_start", "token_end", "label")}
        parts.append(pd.DataFrame({"rollout": spans, **columns, "number": number})[spans >= 0])
    empty: dict[str, Any] = {
        "rollout": np.int64,
        "token_start": np.int64,
        "token_end": np.int64,
        "label": "str",
        "number": np.int64,
    }
    parts = [part for part in parts if len(part)]
    table = (
        pd.concat(parts) if parts else pd.DataFrame({name: pd.Series([], dtype=kind) for name, kind in empty.items()})
    )
    table = table[table["number"] == table.groupby(["rollout", "label"])["number"].transform("max")]
    table = table.sort_values(["rollout", "token_start", "token_end"], kind="stable").reset_index(drop=True)
    names = pd.array(cells.ids[table["rollout"].to_numpy(dtype=np.int64)].tolist(), dtype="str")
    return pd.DataFrame(
        {
            "rollout_id": names,
            "token_start": table["token_start"].astype(np.int64),
            "token_end": table["token_end"].astype(np.int64),
            "label": table["label"].astype("str"),
        }
    )


def _annotation_groups(cells: Cells, added: Sequence[Path]) -> Iterator[tuple[Path, Ints]]:
    for place, capture in enumerate(cells.captures):
        rollouts = np.where(cells.current[place], cells.members[place], -1)
        path = capture.path / "annotations"
        yield path, rollouts[read_array(path / "row").astype(np.int64)]
    for path in added:
        names = read_array(path / "rollout_id")
        yield path, np.array([cells.index.get(str(n), -1) for n in names], dtype=np.int64)


def capture_table(cells: Cells) -> pd.DataFrame:
    """Return one row per capture, indexed by number."""
    rows = []
    for one in cells.captures:
        model = one.attrs["provenance"].get("model") or {}
        rows.append(
            {
                "number": one.number,
                "model": one.model_name,
                "revision": str(model.get("revision") or ""),
                "n_rollouts": len(one.rollout_ids),
                "n_tokens": one.ragged.n_tokens,
                "layers": one.layers,
                "components": tuple(one.components),
                "dtypes": tuple(c.dtype for c in one.components.values()),
                "statistics": str(one.attrs["statistics"]),
                "stored_bytes": sum(one.attrs.get("stored_bytes", {}).values()),
                "created": str(one.attrs["created"]),
            }
        )
    names = ("number", "model", "revision", "n_rollouts", "n_tokens", "layers", "components", "dtypes")
    columns = (*names, "statistics", "stored_bytes", "created")
    return pd.DataFrame(rows, columns=list(columns)).set_index("number")


def telling(cells: Cells, labels: Sequence[Path], annotations: Sequence[Path]) -> frozenset[int]:
    """Return the captures of which a label or an annotation shows in the tables, whether or not their rows count.

    Parameters
    ----------
    cells : Cells
    labels, annotations : sequences of Path
        The groups added later, ascending by number.
    """
    shown: dict[tuple[str, int, str], int] = {}
    for number, (rollouts, group) in enumerate(_label_groups(cells, labels)):
        for name, rows, _ in _read_labels(group):
            shown |= {("label", one, name): number for one in rollouts[rows].tolist() if one >= 0}
    for number, (path, spans) in enumerate(_annotation_groups(cells, annotations)):
        names = map(str, read_array(path / "label").tolist())
        shown |= {("span", one, name): number for one, name in zip(spans.tolist(), names, strict=True) if one >= 0}
    return frozenset(cells.captures[place].number for place in shown.values() if place < len(cells.captures))


@lru_cache(maxsize=8)
def _vocabulary(path: Path, mark: tuple[int, int]) -> dict[int, bytes]:
    """Read the bytes of every token id that a capture uses; `mark` tells one capture at this path from another."""
    ids, offset = read_array(path / "token_id").tolist(), read_array(path / "offset").tolist()
    data = read_array(path / "bytes").tobytes()
    return {token: data[offset[i] : offset[i + 1]] for i, token in enumerate(ids)}


def token_texts(cells: Cells, place: int, token_ids: NDArray[np.int32]) -> list[str | None]:
    """Return the text of each token of a rollout; None for a token whose bytes the capture does not know.

    A character whose bytes are spread over tokens stands at the last of them, so the texts end to end are the whole
    text. Bytes that are no UTF-8 are written as `\\xff`.
    """
    known = _vocabulary(cells.captures[place].path / "vocab", cells.snapshot.captures[place][1])
    decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
    texts: list[str | None] = []
    ids = token_ids.tolist()
    for i, token in enumerate(ids):
        ends = i + 1 == len(ids) or ids[i + 1] not in known
        texts.append(decoder.decode(known[token], final=ends) if token in known else None)
    return texts
