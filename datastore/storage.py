"""The only file that touches Zarr: create a store and a capture's group, read small arrays, write chunks, rename, sync.

Everything appears whole: groups are built aside and renamed, chunks get a temporary name and are renamed. Nothing here
knows what a plan or a rollout means beyond the arrays that hold it.
"""

import ctypes
import errno
import json
import math
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, lru_cache
from itertools import product
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import LocalStore, MemoryStore

from datastore.codec import ChunkDecoder, zarr_codecs
from datastore.diskerrors import disk_error, enough_room, free_bytes, named, naming, writable
from datastore.dtype import register, zarr_dtype
from datastore.errors import (
    CorruptError,
    DatastoreError,
    MisuseError,
    NewerFormatError,
    NotAStoreError,
    ReadOnlyError,
)
from datastore.plainfile import MOST_ARRAY, MOST_TABLE, read_json, read_plain, read_small, shape_of
from datastore.plainwrite import consolidated, write_metadata, write_single
from datastore.schema import FORMAT, FORMAT_VERSION, Codec
from datastore.writebehind import WriteBehind, libc_function

__all__ = [
    "ROOT_GROUPS",
    "array_metadata",
    "attributes",
    "check_writable",
    "chunk_file",
    "chunk_size",
    "clear_leftovers",
    "consolidate",
    "create_array",
    "create_group",
    "create_root",
    "discard",
    "disk_error",
    "enough_room",
    "free_bytes",
    "naming",
    "numbered",
    "open_root",
    "publish",
    "put_away",
    "read_array",
    "read_region",
    "remove",
    "set_attributes",
    "sync_file",
    "sync_files",
    "writable",
    "write_array",
    "write_atomic",
    "write_chunk",
    "zarr_array",
]

register()  # zarr-python 3.1 collects the entry points of data types and never loads them

P = ParamSpec("P")
T = TypeVar("T")
ROOT_GROUPS = ("captures", "labels", "annotations", "dropped", "calibration", "scores")
TABLE_CHUNK = 65536
"""Elements a chunk of the small arrays: coordinates and the rollout table."""


def open_root(path: Path) -> None:
    """Check that `path` is a store of a version this release reads.

    Raises
    ------
    NotAStoreError
        The path does not exist, or is something else.
    NewerFormatError
        The store was written by a newer release.
    """
    if not path.exists():
        raise NotAStoreError(f"{path} does not exist, so there is no store to read; check the path, or capture into it")
    try:
        found = attributes(path)
    except CorruptError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EIO:
            raise  # whether it is a store can't be known
        found = {}
    if found.get("format") != FORMAT:
        raise NotAStoreError(
            f"{path} exists and is not an activation store (its zarr.json does not name the format {FORMAT!r}); "
            "nothing was read or written, give another path"
        )
    version = found.get("version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise NewerFormatError(
            f"{path} has format version {version}, and this release reads up to {FORMAT_VERSION}; "
            "upgrade activation-datastore to open it"
        )


def create_root(path: Path) -> None:
    """Create an empty store at `path`, whole, or do nothing where one is already.

    Raises
    ------
    NotAStoreError
        Something else is there.
    ReadOnlyError
        The directory that would hold it can't be written.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        open_root(path)
        return
    aside = path.parent / f"{path.name}.{uuid.uuid4().hex}.partial"
    try:
        with writable(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            create_group(aside, {"format": FORMAT, "version": FORMAT_VERSION})
            for name in ROOT_GROUPS:
                create_group(aside / name, {})
            sync_files(aside)
            os.rename(aside, path)
            sync_file(path.parent)
    except OSError:
        if not path.is_dir():
            raise
        open_root(path)  # another process created it first
    finally:
        remove(aside)


def check_writable(store: Path, plans: Path) -> None:
    """Check before any work that a capture can be filled beside the store and renamed into it.

    Raises
    ------
    ReadOnlyError
        One of the two directories can't be written.
    MisuseError
        They lie on different file systems, so that no rename can publish a capture.
    """
    captures = store / "captures"
    for place in (captures, plans):
        if not os.access(place, os.W_OK | os.X_OK, effective_ids=True):
            raise ReadOnlyError(
                f"{place} can't be written by this user, so no capture could be committed; nothing was begun, change "
                "its permissions, or choose another place for the store"
            )
    if captures.stat().st_dev != plans.stat().st_dev:
        raise MisuseError(
            f"{captures} and {plans} are on different file systems, so a capture could not be renamed into the store; "
            "choose a path for the store that is not a mount point itself"
        )


@named
def create_group(path: Path, attrs: Mapping[str, Any]) -> None:
    """Create one Zarr group directory with its attributes."""
    write_metadata(path, {"attributes": dict(attrs), "zarr_format": 3, "node_type": "group"})


@named
def set_attributes(path: Path, attrs: Mapping[str, Any], *, durable: bool = False) -> None:
    """Replace the attributes of a group or array that no reader can see yet."""
    file = path / "zarr.json"
    meta = json.loads(file.read_text())
    write_atomic(file, json.dumps(meta | {"attributes": dict(attrs)}, indent=2).encode(), durable=durable)


def attributes(path: Path) -> dict[str, Any]:
    """Return the attributes of the group or array at `path`."""
    found = array_metadata(path).get("attributes", {})
    if not isinstance(found, dict):
        raise CorruptError(f"{path / 'zarr.json'} has attributes that are no JSON object; what it describes is lost")
    return found


def array_metadata(path: Path) -> dict[str, Any]:
    """Return the zarr.json of the group or array at `path`.

    Raises
    ------
    CorruptError
        It is missing or is not JSON.
    """
    return read_json(path / "zarr.json")


@named
def create_array(
    path: Path,
    *,
    shape: Sequence[int],
    dtype: str,
    chunks: Sequence[int],
    dims: Sequence[str],
    codec: Codec | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> None:
    """Create one array's metadata; floating-point arrays are filled with NaN, all chunks are always written."""
    document = json.loads(_described(dtype, codec or Codec()))
    document["shape"] = [int(n) for n in shape]
    document["chunk_grid"]["configuration"]["chunk_shape"] = [max(1, int(n)) for n in chunks]
    document["attributes"], document["dimension_names"] = dict(attrs or {}), list(dims)
    if not dims:
        del document["dimension_names"]  # as zarr-python has it
    write_metadata(path, document)


@cache
def _described(dtype: str, codec: Codec) -> bytes:
    """Return the zarr.json that zarr-python writes for a data type and a codec, of one element without a name."""
    fill: Any = float("nan") if dtype in ("bfloat16", "float16", "float32", "float64") else None
    array = zarr.create_array(
        MemoryStore(),
        shape=(1,),
        dtype=zarr_dtype(dtype),
        chunks=(1,),
        dimension_names=["x"],
        fill_value=fill if fill is not None else ("" if dtype == "string" else 0),
        attributes={},
        filters=None,
        **zarr_codecs(codec, dtype),
    )
    return array.metadata.to_buffer_dict(default_buffer_prototype())["zarr.json"].to_bytes()


@named
def write_array(
    path: Path, values: NDArray[Any], *, dims: Sequence[str], attrs: Mapping[str, Any] | None = None
) -> None:
    """Create and fill a small array; str and object arrays become Zarr strings."""
    text = values.dtype.kind in "OUT"
    name = "string" if text else str(values.dtype)
    chunks = [min(n, TABLE_CHUNK) for n in values.shape]
    create_array(path, shape=values.shape, dtype=name, chunks=chunks, dims=dims, attrs=attrs)
    filled = values.astype(object) if text else values
    if values.size and not (list(values.shape) == chunks and write_single(path, filled)):
        zarr_array(path, mode="r+")[...] = filled


@named
def zarr_array(path: Path, mode: Literal["r", "r+"] = "r") -> zarr.Array[Any]:
    """Open one array by its own zarr.json, with all chunks written, also those that equal the fill value."""
    try:
        array = zarr.open_array(LocalStore(path), mode=mode)
    except FileNotFoundError as error:
        raise CorruptError(f"the array {path} is missing; what it holds is lost") from error
    except Exception as error:  # whatever Zarr raises for metadata that someone edited
        raise CorruptError(f"{path} is described in a way that Zarr does not read ({error})") from error
    return array.with_config({"write_empty_chunks": True})  # open_array takes a config and drops it


def read_array(path: Path, metadata: Mapping[str, Any] | None = None, *, most: int = MOST_ARRAY) -> NDArray[Any]:
    """Read a small array whole.

    Parameters
    ----------
    path : Path
    metadata : mapping, optional
        Its zarr.json, where that is known already, such as from the consolidated metadata of its capture.
    most : int
        Bytes that it can have decoded; more are not read.

    Raises
    ------
    CorruptError
        A chunk is missing or does not decode: absent is never read as the fill value.
    """
    if metadata is None and not (path / "zarr.json").exists():
        raise CorruptError(f"the array {path} is missing; what it holds is lost")
    known = read_small(path, array_metadata(path) if metadata is None else metadata, most=most)
    if known is not None:
        return known
    array = zarr_array(path)
    missing = array.nchunks - array.nchunks_initialized if array.size else 0
    if missing:
        raise CorruptError(f"{path} lacks {missing} of {array.nchunks} chunks; what they hold is lost")
    try:
        return np.asarray(array[...])
    except Exception as error:
        raise CorruptError(f"{path} does not decode ({error}); what it holds is lost") from error


def read_region(path: Path, region: Sequence[slice], out: NDArray[Any] | None = None) -> NDArray[Any]:
    """Read part of an array: one slice with start and stop for each axis.

    Parameters
    ----------
    path : Path
    region : sequence of slice
        It may reach as far as the last chunk does; what lies beyond the array is its padding, or is left out.
    out : array of the region's shape, C order, optional
        Memory to use again, where it is of the array's dtype: fresh memory takes as much time as decoding.

    Raises
    ------
    CorruptError
        A chunk of it is missing or does not decode: absent is never read as the fill value.
    """
    reader, sizes = _opened(path, _mark(path))
    n_values = math.prod(max(0, part.stop - part.start) for part in region)
    if n_values * 8 > MOST_ARRAY:
        raise CorruptError(f"{path} was asked for {n_values:,} values at once, more than any table or statistic has")
    grid = [range(part.start // size, -(-part.stop // size)) for part, size in zip(region, sizes, strict=True)]
    files = {
        index: path / reader.metadata.encode_chunk_key(index)
        if isinstance(reader, zarr.Array)
        else chunk_file(path, index)
        for index in product(*grid)
    }
    for file in files.values():
        if not file.exists():
            raise CorruptError(f"{file} is missing; what it holds is lost")
    try:
        if isinstance(reader, ChunkDecoder):
            return _decoded(files, reader, region=region, sizes=sizes, out=out)
        return np.asarray(reader[tuple(region)])
    except Exception as error:
        raise CorruptError(f"{path} does not decode ({error}); what it holds is lost") from error


def _decoded(
    files: Mapping[tuple[int, ...], Path],
    decoder: ChunkDecoder,
    *,
    region: Sequence[slice],
    sizes: Sequence[int],
    out: NDArray[Any] | None,
) -> NDArray[Any]:
    """Fill a region from its chunks without zarr-python, whose event loop takes longer than a small chunk."""
    if out is None or out.dtype != decoder.dtype:
        out = np.empty([part.stop - part.start for part in region], decoder.dtype)
    if len(files) == 1 and out.size == decoder.tokens * decoder.width:  # a whole chunk needs no copy
        (file,) = files.values()
        decoder.decode_into(read_plain(file, decoder.most_bytes), out.reshape(decoder.tokens, decoder.width))
        return out
    buffer = np.empty((decoder.tokens, decoder.width), decoder.dtype)
    for index, file in files.items():
        decoder.decode_into(read_plain(file, decoder.most_bytes), buffer)
        bounds = [
            (max(part.start, i * n), min(part.stop, (i + 1) * n), part.start, i * n)
            for part, i, n in zip(region, index, sizes, strict=True)
        ]
        target = tuple(slice(low - first, high - first) for low, high, first, _ in bounds)
        source = tuple(slice(low - at, high - at) for low, high, _, at in bounds)
        out[target] = buffer.reshape(sizes)[source]
    return out


def _mark(path: Path) -> tuple[int, int, int]:
    """What tells an array's zarr.json, which is replaced and never edited, from another one at the same path."""
    try:
        found = (path / "zarr.json").stat()
    except OSError:
        return (0, 0, 0)  # opening it says what is wrong
    return found.st_ino, found.st_mtime_ns, found.st_size


@lru_cache(maxsize=256)
def _opened(path: Path, mark: tuple[int, int, int]) -> tuple[zarr.Array[Any] | ChunkDecoder, tuple[int, ...]]:
    """Return what reads an array, a decoder or zarr-python, and the shape of what a file holds: once for many reads."""
    metadata = array_metadata(path)
    try:
        shape, chunk = shape_of(metadata)
        if math.prod(chunk) * 8 > MOST_TABLE:
            raise ValueError(f"it claims to be {shape} in chunks of {chunk}")
    except ValueError as error:
        raise CorruptError(f"{path} does not decode ({error}); what it holds is lost") from error
    decoder = ChunkDecoder.of_any(metadata)
    if decoder is not None:
        return decoder, tuple(chunk)
    array = zarr_array(path)
    return array, array.shards or array.chunks


def chunk_file(array: Path, index: Sequence[int]) -> Path:
    """Return the file of the chunk at grid position `index` (Zarr v3 default chunk key encoding)."""
    return array.joinpath("c", *(str(i) for i in index))


def write_chunk(
    array: Path, index: Sequence[int], pieces: Sequence[bytes | memoryview], *, behind: WriteBehind | None = None
) -> int:
    """Write one encoded chunk, given in pieces, whole: a temporary name beside it, then a rename.

    The array's directory must be there: a process that is too late for a plan must not bring the plan back.

    Returns
    -------
    int
        The bytes written.

    Raises
    ------
    OSError
        Nothing is left of the chunk then.
    """
    file = chunk_file(array, index)
    aside = file.with_name(f"{file.name}.{uuid.uuid4().hex}.partial")
    descriptor = _create_below(array, aside)
    try:
        with naming(file):
            written = _write_all(descriptor, pieces)
        os.rename(aside, file)
    except BaseException:
        os.close(descriptor)
        aside.unlink(missing_ok=True)
        raise
    if behind is None:
        os.close(descriptor)
    else:
        behind.push(descriptor, file)
    return written


def _create_below(array: Path, file: Path) -> int:
    """Create a new file and the directories between it and the array's, and return its descriptor."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        return os.open(file, flags, 0o666)
    except FileNotFoundError:
        made = os.fspath(array)
        for name in file.relative_to(array).parts[:-1]:
            made = os.path.join(made, name)
            with suppress(FileExistsError):
                os.mkdir(made)
        return os.open(file, flags, 0o666)


def _write_all(descriptor: int, pieces: Sequence[bytes | memoryview]) -> int:
    """Write all pieces, whatever the system takes at a time, and return how many bytes they are."""
    left = [memoryview(piece).cast("B") for piece in pieces if len(piece)]
    total = sum(len(piece) for piece in left)
    while left:
        taken = os.writev(descriptor, left[:512])  # Linux takes 1,024
        while left and taken >= len(left[0]):
            taken -= len(left.pop(0))
        if left:
            left[0] = left[0][taken:]
    return total


@named
def write_atomic(path: Path, data: bytes, *, durable: bool = False) -> None:
    """Write a file under a temporary name beside it and rename it.

    Its directory must be there: a process that is too late for a plan must not bring the plan's directory back.
    """
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with aside.open("wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    if durable:
        sync_file(path.parent)


@named
def consolidate(path: Path, *, durable: bool = False) -> None:
    """Write the consolidated metadata of a group that is complete."""
    write_atomic(path / "zarr.json", json.dumps(consolidated(path), indent=2).encode(), durable=durable)


def sync_files(path: Path, descriptor: int | None = None) -> None:
    """Bring everything written on the file system of `path` to disk: one syncfs, not an fsync a chunk.

    Parameters
    ----------
    path : Path
        Any file or directory there.
    descriptor : int, optional
        Of `path`, opened before the writes: the kernel reports a failed write-back only to descriptors older than it.

    Raises
    ------
    DatastoreError
        Something could not be written.
    """
    syncfs = libc_function("syncfs")
    if syncfs is None:
        os.sync()
        return
    opened = os.open(path, os.O_RDONLY) if descriptor is None else descriptor
    try:
        if syncfs(opened) != 0:
            raise DatastoreError(
                f"{path} could not be brought to disk: {os.strerror(ctypes.get_errno())}; "
                "nothing was committed, run the same command again once the disk is well"
            )
    finally:
        if descriptor is None:
            os.close(opened)


@named
def sync_file(path: Path) -> None:
    """Bring one file or directory entry to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def numbered(path: Path) -> list[int]:
    """Return the numbers of the committed members of a group such as `captures/`, ascending."""
    try:
        names = os.listdir(path)
    except FileNotFoundError:
        return []
    return sorted(int(name) for name in names if name.isdigit())


def publish(aside: Path, into: Path, *, above: int = 0) -> int:
    """Rename a complete, synced group to the next free number under `into` and return the number.

    A rename onto a number that another process took first fails, because that directory is not empty; the next is
    tried. `above` is a number that was in use once and must not come back.
    """
    number = max([above, *numbered(into)]) + 1
    while True:
        target = into / f"{number:04d}"
        try:
            os.rename(aside, target)
        except OSError:
            if not target.exists() or not aside.exists():
                raise
            number += 1
            continue
        sync_file(into)
        return number


def remove(path: Path) -> None:
    """Delete a directory that no reader can see, if it is there."""
    shutil.rmtree(path, ignore_errors=True)


def discard(path: Path) -> None:
    """Delete a directory that other processes look for, under another name, so that none finds half of it."""
    for aside in put_away([path]):
        with ThreadPoolExecutor(8) as pool:  # a directory is emptied file by file, several at once
            list(pool.map(remove, [one for one in aside.glob("*/*/*") if one.is_dir()]))
        remove(aside)


def put_away(paths: Sequence[Path]) -> list[Path]:
    """Give directories that are to be deleted names of leftovers, durably, and return these.

    Else a power cut might bring an old name back, and not the files that were deleted since.
    """
    asides = []
    for path in paths:
        aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
        with suppress(FileNotFoundError):
            os.rename(path, aside)
            asides.append(aside)
    for parent in {aside.parent for aside in asides}:
        sync_file(parent)
    return asides


def chunk_size(array: Path, index: Sequence[int]) -> int:
    """Return the stored bytes of a chunk, 0 where it is not there."""
    try:
        return os.stat(f"{array}/c/{'/'.join(map(str, index))}").st_size  # a commit asks for thousands
    except FileNotFoundError:
        return 0


def clear_leftovers(directory: Path) -> None:
    """Delete the temporary files that killed processes left in one directory."""
    with suppress(FileNotFoundError):
        for name in os.listdir(directory):
            if name.endswith(".partial"):
                (directory / name).unlink(missing_ok=True)
