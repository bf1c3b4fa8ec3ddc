"""Foreign JSON read within bounds: size, depth, encoding, and errors that name file and line."""

import json
import re
from pathlib import Path
from typing import Any

from experiments.errors import ExperimentError

__all__ = ["MAX_BYTES", "Json", "load_json", "load_records", "where"]

# An escaped surrogate: half of a pair passes json.loads and fails much later, in the tokenizer.
_SURROGATE = re.compile(r"\\ud[89a-f]", re.IGNORECASE)

Json = Any
"""What `json.loads` gives; narrowed by pydantic, never trusted."""

MAX_BYTES = 256 * 1024 * 1024
"""Largest file read by default. Python objects take up to about 20 times the bytes of their JSON."""


def where(path: Path, line: int | None = None) -> str:
    """Name a place in a file, for messages and for `Transcript.source`."""
    return str(path) if line is None else f"{path}, line {line}"


def read_text(path: Path, *, max_bytes: int = MAX_BYTES) -> str:
    """Read a whole UTF-8 file of at most `max_bytes`."""
    if not path.exists():
        raise ExperimentError(f"{path} does not exist; check the path")
    if not path.is_file():
        raise ExperimentError(f"{path} is not a plain file; name a JSON file, a directory of them or a quoted glob")
    try:
        with path.open("rb") as file:
            raw = file.read(max_bytes + 1)
    except OSError as error:
        raise ExperimentError(f"{path} can't be read ({error.strerror}); copy it again or leave it out") from error
    if len(raw) > max_bytes:
        raise ExperimentError(
            f"{path} is larger than the {max_bytes:,} bytes read at once; split it into several files "
            "or raise the limit (max_bytes)"
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ExperimentError(f"{where(path, line)}: not UTF-8 text; save the file as UTF-8") from None


def parse(text: str, path: Path, *, line: int | None = None) -> Json:
    """Parse one JSON document; `line` is where it starts when it is one line of a file."""
    try:
        value = json.loads(text)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError:
        raise ExperimentError(
            f"{where(path, line)}: holds half a surrogate pair, which is no character; mend the text"
        ) from None
    except json.JSONDecodeError as error:
        place = where(path, error.lineno if line is None else line)
        end = "the file ends too early, it may be cut short" if not text[error.pos :].strip() else error.msg
        raise ExperimentError(f"{place}, column {error.colno}: not valid JSON: {end}") from None
    except RecursionError:
        raise ExperimentError(f"{where(path, line)}: JSON nested too deeply to be read; flatten it") from None
    except ValueError as error:  # an integer of thousands of digits
        raise ExperimentError(f"{where(path, line)}: not usable JSON: {error}") from None


def load_json(path: Path, *, max_bytes: int = MAX_BYTES) -> Json:
    """Read a file that is one JSON document."""
    text = read_text(path, max_bytes=max_bytes)
    if not text.strip():
        raise ExperimentError(f"{path} is empty; it should hold JSON")
    return parse(text, path)


def load_records(path: Path, *, max_bytes: int = MAX_BYTES) -> tuple[Json, list[tuple[Json, int]]]:
    """Read a file as one JSON document or as JSON lines, whichever it is by content.

    Returns
    -------
    document : the document, or None when the file is JSON lines
    lines : (value, line number) per line that isn't blank; empty when the file is one document
    """
    text = read_text(path, max_bytes=max_bytes)
    if not text.strip():
        raise ExperimentError(f"{path} is empty; it should hold transcripts as JSON")
    if path.suffix == ".jsonl" or _is_lines(text):
        # Not splitlines(): JSON may hold U+2028 and its like inside a string.
        numbered = enumerate(text.split("\n"), start=1)
        return None, [(parse(one, path, line=n), n) for n, one in numbered if one.strip()]
    return parse(text, path), []


def _is_lines(text: str) -> bool:
    first, _, rest = text.strip().partition("\n")
    if not (first.startswith("{") and rest.strip().startswith("{")):
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return True
