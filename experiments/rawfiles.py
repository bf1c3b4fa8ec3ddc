"""Raw activation files, the one reader and writer: `.pt` dictionaries, per-request safetensors, npz; a rollout a file.

Reading is in two steps. `read_raw` opens a file, checks what it declares against its size, and returns token ids,
shapes and dtypes without reading a number; `RawFile.rows` then gives the rows, from a memory map where the format
allows one, so that a file whose tensors share a large storage costs its own rows only. Nothing in a file is run or
believed: what it may name and how much it may unpack to are bounded before it is opened.
"""

import hashlib
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from experiments import rawarrays, rawpt
from experiments.errors import ExperimentError
from experiments.rawfile import RawFile, named, whole

__all__ = ["FORMATS", "check_content", "raw_files", "read_raw", "write_raw"]

FORMATS = ("pt", "safetensors", "npz")


def raw_files(path: str | Path) -> list[Path]:
    """List the raw activation files at or below a path; of an experiment tree only those below its `raw/`.

    Raises
    ------
    ExperimentError
        There is nothing there, or no such file.
    """
    top = Path(path)
    if not top.exists():
        raise ExperimentError(f"{top} does not exist; give a raw activation file or a directory of them")
    if top.is_file():
        return [top]
    within = [d for d in sorted(top.glob("inference/*/raw")) if d.is_dir()] if (top / "config.json").is_file() else []
    found = [
        file
        for folder in within or [top]
        for file in sorted(folder.rglob("*"))
        if file.suffix.removeprefix(".") in FORMATS and not file.name.startswith(".") and file.is_file()
    ]
    if not found:
        raise ExperimentError(f"{top} holds no raw activation files: no .pt, .safetensors or .npz at or below it")
    return found


def read_raw(path: str | Path, *, layers: tuple[int, ...] | None = None) -> RawFile:
    """Open a raw activation file and check what it declares; no number is read.

    Parameters
    ----------
    path : path
        `.pt`: the dictionary of prompt and response parts. `.safetensors`, `.npz`: `token_ids` [T] with `hidden_states`
        [T, L, H], or with one such array for each component.
    layers : tuple of int, optional
        Which layers the L are, in order; needed where the file itself does not say.

    Raises
    ------
    ExperimentError
        Empty, truncated, not of this form, larger unpacked than it can be, or contradicting itself: one sentence with
        the file's name.
    """
    path = Path(path)
    with named(path):
        if not path.is_file():
            raise ExperimentError(f"{path} is not a plain file; give a raw activation file or a directory of them")
        if path.stat().st_size == 0:
            raise ExperimentError(f"{path} is empty; copy it again or leave it out")
        if path.suffix == ".pt":
            return rawpt.read(path)
        if path.suffix == ".safetensors":
            return rawarrays.read_safetensors(path, layers)
        if path.suffix == ".npz":
            return rawarrays.read_npz(path, layers)
    raise ExperimentError(f"{path} is no raw activation file; they end in .pt, .safetensors or .npz")


def write_raw(
    path: Path,
    arrays: Mapping[tuple[str, int], NDArray[Any]],
    record: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> None:
    """Write one rollout's rows in the format that the suffix names; the file appears whole or not at all.

    Parameters
    ----------
    path : Path
    arrays : mapping of (component, layer) to array (T, width)
        In the stored dtype; bfloat16 as ml_dtypes has it.
    record : mapping
        The rollout in the keys of a response file: `token_ids`, `prompt_end`, `tokens`, `prompt`, `response`, ...
    overwrite : bool
        Replace a file that is there.

    Raises
    ------
    ExperimentError
        The file is there, or the arrays do not fit the format.
    """
    writers: dict[str, Callable[..., None]] = {
        ".pt": rawpt.write,
        ".safetensors": rawarrays.write_safetensors,
        ".npz": rawarrays.write_npz,
    }
    if path.suffix not in writers:
        raise ExperimentError(f"{path} has no known form; name it .pt, .safetensors or .npz")
    with whole(path, overwrite=overwrite) as staged:
        writers[path.suffix](staged, arrays, record)


def check_content(path: Path) -> str:
    """Read a file once more from end to end and return what identifies its content.

    Returns
    -------
    str
        `zip-crc32:` and the sha256 of a zip's table of names, sizes and CRC-32s, each of which was checked: hashing all
        of it once more would take longer than the check. `sha256:` and the hash of the whole file for other formats.

    Raises
    ------
    ExperimentError
        A part of the file is not what was written.
    """
    with named(path), path.open("rb") as file:
        if path.suffix in (".pt", ".npz"):
            with zipfile.ZipFile(file) as archive:
                broken = archive.testzip()
                if broken:
                    raise ExperimentError(
                        f"{path} is damaged (the checksum of {broken} differs); copy it again or leave it out"
                    )
                return f"zip-crc32:{rawpt.table_hash(archive)}"
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
