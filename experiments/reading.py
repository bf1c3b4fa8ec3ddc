"""Transcripts from the paths a user names: a file, a directory or a quoted glob, in the order of their ids."""

import glob
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments.annotations import Span, read_annotations
from experiments.errors import ExperimentError
from experiments.formats import transcript_of
from experiments.jsonfile import MAX_BYTES, load_json, load_records, where
from experiments.transcript import Transcript

__all__ = ["natural_key", "read", "read_tags"]

SUFFIXES = (".json", ".jsonl")


def read(paths: str | Path | Sequence[str | Path], *, max_bytes: int = MAX_BYTES) -> list[Transcript]:
    """Read transcripts, each file's format told by its content.

    Formats: JSON lines (or a JSON list) of chats `{id, messages | prompt + response | token_ids | text, ...}` where
    any further key becomes a label; lists of tau-bench runs; the response files of an experiment tree, one object per
    file, named by the file. Beside responses, `_tags.json` and `X_annotations.json` are joined, not read as responses.

    Parameters
    ----------
    paths : path or sequence of paths
        Files, directories (their `.json` and `.jsonl` files, not below) or globs.
    max_bytes : int
        Largest file that is read.

    Returns
    -------
    list of Transcript
        In natural order of their ids (2 before 10).

    Raises
    ------
    ExperimentError
        Nothing there, a file that isn't transcripts, an id that is there twice: one sentence with file and line.
    """
    paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if not paths:
        raise ExperimentError("no input was named; give a file, a directory or a quoted glob of transcripts")
    files = list(dict.fromkeys(file for path in paths for file in _files(path)))
    sidecars = _Sidecars(max_bytes)
    found = [sidecars.join(one, file) for file in files for one in _file_transcripts(file, max_bytes=max_bytes)]
    return unique(found)


def unique(transcripts: Iterable[Transcript]) -> list[Transcript]:
    """Return them in natural order of id; an id that is there twice is an error naming both places."""
    seen: dict[str, Transcript] = {}
    for one in transcripts:
        if one.id in seen:
            raise ExperimentError(
                f"transcript id {one.id!r} is there twice: {seen[one.id].source} and {one.source}; ids must be unique"
            )
        seen[one.id] = one
    return sorted(seen.values(), key=lambda one: natural_key(one.id))


def natural_key(text: str) -> list[tuple[int, int, str]]:
    """Sort key that compares runs of digits as numbers."""
    parts = re.split(r"([0-9]+)", text)
    # A number is compared by its length, then its digits: no limit on how many there are.
    keys = [(0, len(p.lstrip("0")), p.lstrip("0")) if i % 2 else (1, 0, p) for i, p in enumerate(parts)]
    return [key for key in keys if key != (1, 0, "")] + [(-1, 0, text)]


def read_tags(path: Path, *, max_bytes: int = MAX_BYTES) -> dict[str, tuple[str, ...]]:
    """Read a `_tags.json`: transcript id to its tags."""
    data = load_json(path, max_bytes=max_bytes)
    good = isinstance(data, dict) and all(
        isinstance(tags, list) and all(isinstance(tag, str) for tag in tags) for tags in data.values()
    )
    if not good:
        raise ExperimentError(f"{path}: tags must be one object of id to a list of strings")
    return {key: tuple(tags) for key, tags in data.items()}


def is_sidecar(path: Path) -> bool:
    """Tell the files that lie beside responses and are none: `_tags.json`, `X_annotations.json`."""
    return path.name.startswith("_") or path.stem.endswith("_annotations")


def _files(path: str | Path) -> list[Path]:
    named = Path(path)
    if named.is_dir():
        files = [p for p in named.iterdir() if p.suffix in SUFFIXES and p.is_file() and not is_sidecar(p)]
        if not files:
            raise ExperimentError(f"{named} holds no .json or .jsonl file of transcripts (looked not below it)")
    elif named.exists():
        if is_sidecar(named):
            raise ExperimentError(f"{named} holds tags or annotations, not transcripts; name the responses beside it")
        return [named]
    else:
        matches = [Path(p) for p in glob.glob(str(path), recursive=True)]
        files = [p for p in matches if p.is_file() and not is_sidecar(p)]
        if not files:
            what = "matches no file" if glob.has_magic(str(path)) else "does not exist"
            raise ExperimentError(f"{named} {what}; give a file, a directory or a quoted glob of transcripts")
    return sorted(files, key=lambda p: natural_key(str(p)))


def _file_transcripts(path: Path, *, max_bytes: int) -> list[Transcript]:
    document, lines = load_records(path, max_bytes=max_bytes)
    if lines:
        return [transcript_of(record, source=where(path, n)) for record, n in lines]
    if isinstance(document, list):
        if not document:
            raise ExperimentError(f"{path} holds an empty list; there are no transcripts in it")
        return [transcript_of(record, source=f"{path}, item {i}") for i, record in enumerate(document)]
    return [transcript_of(document, source=str(path), default_id=path.stem)]


class _Sidecars:
    """Tags and annotations that lie beside the files read, each read once."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._tags: dict[Path, dict[str, tuple[str, ...]]] = {}
        self._spans: dict[Path, dict[str, tuple[Span, ...]]] = {}

    def join(self, one: Transcript, file: Path) -> Transcript:
        folder = file.parent
        if folder not in self._tags:
            tags = folder / "_tags.json"
            self._tags[folder] = read_tags(tags, max_bytes=self._max_bytes) if tags.is_file() else {}
        # Of a directory of responses the annotations lie beside the directory, of one file beside the file.
        spans: tuple[Span, ...] = ()
        for path in (folder.parent / f"{folder.name}_annotations.json", folder / f"{file.stem}_annotations.json"):
            if path not in self._spans:
                self._spans[path] = read_annotations(path, max_bytes=self._max_bytes) if path.is_file() else {}
            spans += self._spans[path].get(one.id, ())
        return joined(one, tags=self._tags[folder].get(one.id, ()), annotations=spans)


def joined(one: Transcript, **extra: Any) -> Transcript:
    """Return the transcript with more tags, annotations or labels; what is known already stays, labels are replaced."""
    fields: dict[str, Any] = {
        "tags": tuple(dict.fromkeys([*one.tags, *extra.get("tags", ())])),
        "annotations": tuple(dict.fromkeys([*one.annotations, *extra.get("annotations", ())])),
        "labels": {**one.labels, **extra.get("labels", {})},
        "prompt_set": extra.get("prompt_set", one.prompt_set),
    }
    if all(getattr(one, name) == value for name, value in fields.items()):
        return one
    return Transcript.of({**{name: getattr(one, name) for name in type(one).model_fields}, **fields}, source=one.source)
