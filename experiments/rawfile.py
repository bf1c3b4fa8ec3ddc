"""One raw activation file: what it declares, its rows, and the checks that every form of it has to pass."""

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from experiments.errors import ExperimentError

__all__ = ["DTYPES", "Array", "RawFile", "Rows", "checked", "integers", "named", "publish", "staged_for", "whole"]

DTYPES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
MOST_LAYER = 100_000
"""A layer number beyond it is damage, not a model."""


class Array(NamedTuple):
    """Width and dtype of a component at one layer."""

    width: int
    dtype: str


class Rows(NamedTuple):
    """Rows of one component and layer, from token `start` of the file on."""

    component: str
    layer: int
    start: int
    values: NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RawFile:
    """What one file holds, before its numbers are read.

    Attributes
    ----------
    path : Path
    token_ids : int32 array (T,)
        Of the tokens that have rows.
    prompt_end : int
        How many of them belong to the prompt.
    before : int32 array (P,)
        Prompt tokens before them that the file names and has no rows of: it was captured for the response only.
    before_strings : tuple of str
        Their decoded text, as far as the file says.
    arrays : mapping of (component, layer) to Array
    strings : tuple of str, optional
        The decoded text of each token with rows; what the format says, so a character split over tokens is lost.
    record : mapping, optional
        What a file written here says of its rollout, in the keys of a response file.
    fingerprint : str
        Changes when the file does; costs no reading of its numbers.
    size : int
        Bytes of the file.
    """

    path: Path
    token_ids: NDArray[np.int32]
    prompt_end: int
    arrays: Mapping[tuple[str, int], Array]
    fingerprint: str
    size: int
    before: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    before_strings: tuple[str, ...] = ()
    strings: tuple[str, ...] | None = None
    record: Mapping[str, Any] | None = None
    source: Callable[[], Iterator[Rows]] = field(repr=False)

    @property
    def left_out(self) -> int:
        """How many prompt tokens stand before the first one with rows."""
        return len(self.before)

    @property
    def format(self) -> str:
        """Its suffix: pt, safetensors or npz."""
        return self.path.suffix.removeprefix(".")

    def rows(self) -> Iterator[Rows]:
        """Give the rows of every component and layer, in the stored dtype; valid until the next ones are asked for.

        Raises
        ------
        ExperimentError
            The file can't be read any more, or is another one than before.
        """
        with named(self.path):
            if self.path.stat().st_size != self.size:
                raise ExperimentError(f"{self.path} changed while it was read; start again")
            yield from self.source()


@contextmanager
def whole(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give a temporary path beside `path` that takes its place when the block ends well."""
    staged = staged_for(path)
    try:
        yield staged
        publish(staged, path, overwrite=overwrite)
    finally:
        with suppress(FileNotFoundError):
            staged.unlink()


def staged_for(path: Path) -> Path:
    """Make an empty file beside `path`, which nobody takes for finished."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=f".writing{path.suffix}", dir=path.parent)
    os.close(handle)
    return Path(name)


def publish(staged: Path, path: Path, *, overwrite: bool) -> None:
    """Let a file made by `staged_for` appear as `path`.

    Raises
    ------
    ExperimentError
        A file is there and must not be written over.
    """
    os.chmod(staged, 0o666 & ~_umask())
    if overwrite:
        os.replace(staged, path)
        return
    try:
        os.link(staged, path)  # unlike a rename, it fails where a file is
    except FileExistsError:
        raise ExperimentError(f"{path} is there already and was left as it is; --replace writes it anew") from None
    staged.unlink()


def _umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now


def checked(path: Path, array: Array, *, component: Any, layer: Any) -> tuple[str, int]:
    """Return the cell if its names, width and dtype can be true."""
    if not isinstance(component, str) or not component.isidentifier() or not component.isascii():
        raise ExperimentError(f"{path} has a component named {component!r:.60}; a component is a plain name")
    if type(layer) is not int or not 0 <= layer < MOST_LAYER:
        raise ExperimentError(f"{path} has {component} at layer {layer!r:.60}; layers are numbers from 0")
    if array.dtype not in DTYPES or array.width < 1:
        raise ExperimentError(
            f"{path} has {component} at layer {layer} of width {array.width} as {array.dtype}; a store holds "
            f"{', '.join(DTYPES)}"
        )
    return component, layer


def integers(path: Path, values: Any, what: str) -> NDArray[np.int32]:
    """Return token ids as int32 if that is what they are."""
    try:
        array = np.asarray(values if not isinstance(values, list) or values else np.zeros(0, np.int32))
    except (ValueError, OverflowError):
        array = np.zeros(0, object)
    good = array.ndim == 1 and np.issubdtype(array.dtype, np.integer)
    if not good or (array.size and not 0 <= int(array.min()) <= int(array.max()) < 2**31):
        raise ExperimentError(f"{path} has {what} that are not one row of token ids from 0; leave it out")
    return array.astype(np.int32)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Turn whatever a library says of a damaged file into one sentence with its name."""
    try:
        yield
    except ExperimentError:
        raise
    except (MemoryError, Exception) as error:  # each library raises its own kinds for a damaged file
        cause = _disk_error(path) or error
        first = " ".join((str(cause).strip().splitlines() or [type(cause).__name__])[0].split())[:160]
        raise ExperimentError(f"{path} can't be read ({first}); copy it again or leave it out") from cause


def _disk_error(path: Path) -> OSError | None:
    """Return what the disk says of a file that a library found damaged: zipfile takes EIO for "not a zip file"."""
    try:
        with path.open("rb") as file:
            file.seek(-min(22, path.stat().st_size), os.SEEK_END)
            file.read()
    except OSError as error:
        return error
    return None
