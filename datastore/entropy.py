"""Blosc frames of our own making: activations by entropy alone, and sums of float64 with the planes that shrink alone.

zstd's search for repeats finds nothing in activations.

The high bytes of bfloat16 values are signs and exponents that hardly ever repeat for long, so that what zstd's level 1
finds are matches of three or four bytes, which cost most of the time and take more room than Huffman codes of the same
bytes. Here zstd is told to look for nothing shorter than seven bytes in a table of 64 places. The frame is an ordinary
one, and every Blosc reads it. Where rows do repeat (equal prefixes in a narrow model), a block is smaller with the
search; then there is no such frame, and Blosc makes its own.

Of float64 sums only the lowest bytes, which are zero, shrink in a way that is quick to undo. The others are as good as
random, or shrink by Huffman codes to nine tenths, which a reader takes as long to undo as thirty copies; they stay as
they are. docs/design/0001-store.md has the numbers.
"""

import struct
import threading
from typing import Any, Final

import numpy as np
import zstandard
from numpy.typing import NDArray

__all__ = ["frame", "plane_frame"]

_HEADER: Final = struct.Struct("<4B3I")
_LENGTH: Final = struct.Struct("<i")
_VERSION, _ZSTD_VERSION = 2, 1
_FLAGS: Final = 0x01 | 0x10 | 4 << 5
"""Byte shuffle; each block is one stream; zstd."""
_SPLIT_FLAGS: Final = 0x01 | 4 << 5
"""Byte shuffle; each block is as many streams as an item has bytes; zstd."""
_LEAST_BLOCKS: Final = 4
"""A frame of fewer takes no time worth saving."""
_WORSE: Final = 1.01
"""How much larger a block may be than Blosc's own."""
_COPIED: Final = 0x02
"""No block is compressed or shuffled: the values as they are follow the header."""
_LEAST_PLANE: Final = 1 << 12
_VANISHED: Final = 16
"""A plane is stored compressed where it takes at most one in so many of its bytes."""
_MUCH_WORSE: Final = 1.4
"""How much larger than Blosc's own a frame with planes as they are may be."""
_PARAMETERS: Final = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST, min_match=7, hash_log=6, window_log=19, target_length=0
)


class _Own(threading.local):
    """What each thread compresses with."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(compression_params=_PARAMETERS)
        self.planes: NDArray[np.uint8] = np.empty(0, np.uint8)


_OWN = _Own()


def frame(values: NDArray[Any], blosc: Any, *, blocksize: int) -> list[memoryview] | None:
    """Return a Blosc frame in pieces, None where Blosc's own is smaller or as fast.

    Parameters
    ----------
    values : ndarray
        bfloat16 or float32, C-contiguous.
    blosc : numcodecs.blosc.Blosc
        zstd with byte shuffle: what the array's metadata says.
    blocksize : int
        Bytes of a block, a multiple of the item size.
    """
    raw, itemsize = values.reshape(-1).view(np.uint8), values.itemsize
    if blocksize < itemsize or blocksize % itemsize or len(raw) <= (_LEAST_BLOCKS - 1) * blocksize:
        return None
    starts = range(0, len(raw), blocksize)
    middle = raw[starts[len(starts) // 2] :][:blocksize]
    (sample,) = _compressed(middle, len(middle), itemsize)
    if len(sample) > _WORSE * len(blosc.encode(middle)):
        return None
    blocks = _compressed(raw, blocksize, itemsize)
    ends = np.cumsum([_HEADER.size + 4 * len(blocks), *(_LENGTH.size + len(block) for block in blocks)])
    if ends[-1] >= len(raw) + _HEADER.size:  # Blosc then copies
        return None
    head = _HEADER.pack(_VERSION, _ZSTD_VERSION, _FLAGS, itemsize, len(raw), blocksize, int(ends[-1]))
    pieces = [memoryview(head + ends[:-1].astype("<i4").tobytes())]
    for block in blocks:
        pieces += (memoryview(_LENGTH.pack(len(block))), block)
    return pieces


def plane_frame(values: NDArray[Any], blosc: Any, *, blocksize: int) -> list[memoryview] | None:
    """Return a Blosc frame in pieces whose planes are compressed where they vanish, None where it is much larger.

    Parameters
    ----------
    values : ndarray
        C-contiguous.
    blosc : numcodecs.blosc.Blosc
        zstd with byte shuffle: what the array's metadata says.
    blocksize : int
        Bytes of a block at most.
    """
    raw, itemsize = values.reshape(-1).view(np.uint8), values.itemsize
    n = _equal_blocks(len(raw) // itemsize, most=blocksize // itemsize)
    if n is None or len(raw) // n < itemsize * _LEAST_PLANE:
        return None
    blocks = raw.reshape(n, len(raw) // n)
    streams = _planes(blocks, itemsize)
    ends = np.cumsum([_HEADER.size + 4 * n, *(sum(4 + len(one) for one in block) for block in streams)])
    if ends[1] - ends[0] > _MUCH_WORSE * len(blosc.encode(blocks[0])):
        return None
    if ends[-1] >= len(raw) + _HEADER.size:
        copied = (_VERSION, _ZSTD_VERSION, _SPLIT_FLAGS | _COPIED, itemsize, len(raw), blocks.shape[1])
        return [memoryview(_HEADER.pack(*copied, len(raw) + _HEADER.size)), raw.data]
    head = _HEADER.pack(_VERSION, _ZSTD_VERSION, _SPLIT_FLAGS, itemsize, len(raw), blocks.shape[1], int(ends[-1]))
    pieces = [memoryview(head + ends[:-1].astype("<i4").tobytes())]
    for block in streams:
        for one in block:
            pieces += (memoryview(_LENGTH.pack(len(one))), one)
    return pieces


def _equal_blocks(items: int, *, most: int) -> int | None:
    """Return the least number of equal blocks of so many items at most; None where it is far more than need be."""
    least = -(-items // most) if most > 0 else 0
    return next((n for n in range(least, 2 * least + 1) if n and items % n == 0), None)


def _planes(blocks: NDArray[np.uint8], itemsize: int) -> list[list[memoryview]]:
    """Shuffle each block and compress its planes, those that vanish."""
    planes = blocks.reshape(len(blocks), -1, itemsize).transpose(0, 2, 1).copy()
    plain: list[Any] = [plane.data for block in planes for plane in block]
    found: Any = _OWN.compressor.multi_compress_to_buffer(plain)
    chosen = [
        memoryview(found[i]) if _VANISHED * len(found[i]) <= len(plane) else plane for i, plane in enumerate(plain)
    ]
    return [chosen[i : i + itemsize] for i in range(0, len(chosen), itemsize)]


def _compressed(raw: NDArray[np.uint8], blocksize: int, itemsize: int) -> list[memoryview]:
    """Shuffle and compress each block; one that does not shrink stays as it is, shuffled.

    All blocks in one call each, because after every call a thread waits for the interpreter lock.
    """
    if len(_OWN.planes) < len(raw):
        _OWN.planes = np.empty(len(raw), np.uint8)
    planes, whole = _OWN.planes[: len(raw)], len(raw) // blocksize * blocksize
    for part, into in ((raw[:whole], planes[:whole]), (raw[whole:], planes[whole:])):
        if len(part):
            _shuffle(part, into, blocksize=min(blocksize, len(part)), itemsize=itemsize)
    blocks: list[Any] = [planes[start : start + blocksize].data for start in range(0, len(raw), blocksize)]
    found: Any = _OWN.compressor.multi_compress_to_buffer(blocks)
    return [
        memoryview(found[i]) if len(found[i]) < len(block) else memoryview(bytes(block))
        for i, block in enumerate(blocks)
    ]


def _shuffle(raw: NDArray[np.uint8], planes: NDArray[np.uint8], *, blocksize: int, itemsize: int) -> None:
    """Put byte k of all items of a block before byte k + 1 of them."""
    into = planes.reshape(-1, itemsize, blocksize // itemsize)
    if itemsize == 2:  # several times faster than a transposed copy
        pairs = raw.view("<u2").reshape(len(into), -1)
        into[:, 0] = pairs
        np.right_shift(pairs, 8, out=into[:, 1], casting="unsafe")
    else:
        np.copyto(into, raw.reshape(len(into), -1, itemsize).transpose(0, 2, 1))
