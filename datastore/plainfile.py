"""Files of a store as bytes, JSON and small arrays, read within bounds, whoever wrote them.

A store may come from anywhere. So a file is read only if it is a plain one (no link, no pipe, no device) and no larger
than what it can be, and a small array is decoded here, from what its metadata says, rather than through zarr-python:
nothing is allocated before it is known to be small, and a table costs one read, not a turn of an event loop.
"""

import errno
import json
import math
import os
import stat
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from datastore.codec import ChunkDecoder, decode_text
from datastore.errors import CorruptError

__all__ = ["MOST_ARRAY", "MOST_TABLE", "READ_FLAGS", "read_json", "read_plain", "read_small", "shape_of"]

READ_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""A link is an error and a pipe does not wait for a writer."""
MOST_JSON: Final = 128 << 20
"""Bytes of a zarr.json; a capture of a million rollouts has about 40 MB."""
MOST_CHUNK: Final = 64 << 20
"""Bytes of a decoded chunk of a small array; they are written with at most 2 MiB, and texts with at most this."""
MOST_ARRAY: Final = 8 << 30
"""Bytes of a small array decoded whole: the token ids of two billion tokens."""
MOST_TABLE: Final = 1 << 30
"""Bytes of a column of a table, of an array of a result, or of one chunk of rows, statistics or scores."""
_TEXT: Final = 128
"""Bytes to count for a text: few of its own, and those of the Python object."""


def read_plain(path: Path, most: int) -> bytes:
    """Read a plain file of at most so many bytes.

    Raises
    ------
    FileNotFoundError
        It is not there.
    CorruptError
        It is a link, no plain file, or larger; or it can't be read.
    """
    try:
        descriptor = os.open(path, READ_FLAGS)
    except FileNotFoundError:
        raise
    except OSError as error:
        what = "is a link, which a store does not hold" if error.errno == errno.ELOOP else f"({error.strerror})"
        raise CorruptError(f"{path} can't be read: it {what}; what it holds is lost") from error
    with open(descriptor, "rb", buffering=0) as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise CorruptError(f"{path} is no plain file; what it should hold is lost")
        if found.st_size > most:
            raise CorruptError(f"{path} has {found.st_size:,} bytes, where at most {most:,} can be; it was not read")
        try:
            return file.read(found.st_size)
        except OSError as error:
            raise CorruptError(f"{path} can't be read ({error.strerror}); what it holds is lost") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object.

    Raises
    ------
    CorruptError
        It is missing, too large or no JSON object.
    """
    try:
        value = json.loads(read_plain(path, MOST_JSON))
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptError(f"{path} can't be read ({error}); what it describes is lost") from error
    if not isinstance(value, dict):
        raise CorruptError(f"{path} holds no JSON object; what it describes is lost")
    return value


def shape_of(metadata: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Return shape and chunk shape of an array's metadata.

    Raises
    ------
    ValueError
        They are no such thing.
    """
    shape = metadata.get("shape")
    grid = metadata.get("chunk_grid")
    configuration = grid.get("configuration") if isinstance(grid, dict) else None
    chunk = configuration.get("chunk_shape") if isinstance(configuration, dict) else None
    lists = isinstance(shape, list) and isinstance(chunk, list) and len(shape) == len(chunk)
    if not lists or not _counts(shape, 0) or not _counts(chunk, 1):
        raise ValueError(f"its shape is {shape!s:.60} in chunks of {chunk!s:.60}")
    return list(shape or ()), list(chunk or ())


def _counts(values: Any, least: int) -> bool:
    return all(type(n) is int and least <= n < 1 << 62 for n in values)


def read_small(path: Path, metadata: Mapping[str, Any], *, most: int = MOST_ARRAY) -> NDArray[Any] | None:
    """Read an array whole; None where its codecs or data type are not known here.

    Parameters
    ----------
    path : Path
    metadata : mapping
        Its zarr.json.
    most : int
        Bytes that it can have decoded.

    Raises
    ------
    CorruptError
        A chunk is missing, does not decode, or the array is larger than any that a store has.
    """
    try:
        shape, chunk = shape_of(metadata)
        text = metadata.get("data_type") == "string"
        decoder = None if text else ChunkDecoder.of_any(metadata)
        size = _TEXT if text else 16 if decoder is None else decoder.dtype.itemsize
        if (
            math.prod(shape) * size > most
            or (decoder is not None and decoder.nbytes > MOST_CHUNK)
            or (decoder is None and math.prod(chunk) * 8 > MOST_TABLE)
        ):
            raise ValueError(f"it claims to be {shape} in chunks of {chunk}, more than any table or coordinate has")
        if not text and decoder is None:
            return None
        return _filled(path, metadata, decoder, shape=shape, chunk=chunk)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, MemoryError) as error:
        raise CorruptError(f"{path} does not decode ({error}); what it holds is lost") from error
    except CorruptError as error:
        if str(path) in str(error):
            raise
        raise CorruptError(f"{path} does not decode ({error}); what it holds is lost") from error


def _filled(
    path: Path, metadata: Mapping[str, Any], decoder: ChunkDecoder | None, *, shape: Sequence[int], chunk: Sequence[int]
) -> NDArray[Any]:
    grid = [range(-(-n // size)) for n, size in zip(shape, chunk, strict=True)]
    whole, missing = None, 0
    buffer = None if decoder is None else np.empty((decoder.tokens, decoder.width), decoder.dtype)
    for index in product(*grid):
        file = path.joinpath("c", *map(str, index))
        try:
            raw = read_plain(file, MOST_CHUNK if decoder is None else decoder.most_bytes)
        except FileNotFoundError:
            missing += 1
            if missing > 1000:
                break
            continue
        if decoder is not None and buffer is not None:
            decoder.decode_into(raw, buffer)
            values = buffer.reshape(chunk)
        else:
            values = decode_text(raw, metadata, most=MOST_CHUNK).reshape(chunk)
        if whole is None:
            whole = np.empty(shape, values.dtype)
        places = tuple(slice(i * n, min((i + 1) * n, end)) for i, n, end in zip(index, chunk, shape, strict=True))
        whole[places] = values[tuple(slice(place.stop - place.start) for place in places)]
    if missing:
        n_chunks = math.prod(len(one) for one in grid)
        raise CorruptError(f"{path} lacks {missing} of {n_chunks} chunks; what they hold is lost")
    if whole is None:
        whole = np.empty(shape, object if decoder is None else decoder.dtype)
    return whole
