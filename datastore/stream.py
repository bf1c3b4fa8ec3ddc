"""The hot path of reading: whole chunks, ahead of the caller, decoded by threads into buffers that are used again.

`blocks` hands the stored values of one chunk after another to the caller, `map_blocks` hands them to a function in the
threads that decode. Both keep the order of their sources, hold at most `memory` bytes of chunks, read no further ahead
than their buffers while the caller is slower, and end their threads when the caller stops early.
"""

import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from threading import BoundedSemaphore
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from datastore.codec import ChunkDecoder
from datastore.errors import CorruptError, MisuseError
from datastore.plainfile import READ_FLAGS

__all__ = ["Block", "Source", "Span", "blocks", "map_blocks"]

R = TypeVar("R")
_ALIGN: Final = 64
_STEP: Final = 256 << 10
_MORE: Final = 256
"""Bytes that an encoded chunk and the alignment of buffers can take beyond the decoded chunk."""
_SPARE: Final = 2
"""Buffers beyond one a thread: one with the caller and one decoded ahead. More only cost memory and cache."""
_AHEAD: Final = 3
"""How many chunks before its turn the beginning of a file is asked for; the kernel's cache is no memory of ours."""
_GONE: Final = "; or, if someone is deleting or replacing the store just now, open it again"
_REPAIR: Final = "; no value is made up for it: run `verify --repair` on the store, then the same capture again"
_thread = threading.local()


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One chunk to read, and the rows of it that are wanted.

    Attributes
    ----------
    path : Path
        Directory of the component's array.
    capture : int
    component : str
    layer : int
        The real layer number.
    layer_index : int
        Its place on the array's layer axis.
    chunk : int
        Index of the chunk on the token axis.
    tokens, width : int
        Shape of a chunk.
    dtype : numpy.dtype
        The stored dtype.
    rows : slice or tuple of slice
        Rows of the chunk, each a `slice(start, stop)`; every slice becomes one block.
    decoder : ChunkDecoder, optional
        Of the array; None when its codec list is not known here.
    read : callable, optional
        `read(layer_index, tokens)` returns the values of a token range, shape (t, width), through zarr-python. Needed
        where `decoder` is None. It has to raise CorruptError for a chunk that is not there: Zarr would make values up.
    """

    path: Path
    capture: int
    component: str
    layer: int
    layer_index: int
    chunk: int
    tokens: int
    width: int
    dtype: np.dtype[Any]
    rows: slice | tuple[slice, ...]
    decoder: ChunkDecoder | None = None
    read: Callable[[int, slice], NDArray[Any]] | None = None

    def __post_init__(self) -> None:
        for rows in self.slices:
            if rows.step is not None or not 0 <= rows.start < rows.stop <= self.tokens:
                raise MisuseError(
                    f"{self.describe()} has no rows {rows}; "
                    f"give slice(start, stop) with 0 <= start < stop <= {self.tokens}"
                )
        if self.decoder is None and self.read is None:
            raise MisuseError(f"{self.describe()} has neither a decoder nor a reader; give one of them")
        mine = (self.tokens, self.width, self.dtype)
        other = self.decoder and (self.decoder.tokens, self.decoder.width, self.decoder.dtype)
        if other is not None and other != mine:
            raise MisuseError(
                f"{self.describe()} has chunks of {mine}, but its decoder is for {other}; take both from the same array"
            )

    @property
    def slices(self) -> tuple[slice, ...]:
        """The rows wanted, always as a tuple."""
        return (self.rows,) if isinstance(self.rows, slice) else self.rows

    @property
    def start(self) -> int:
        """First token of the chunk."""
        return self.chunk * self.tokens

    @property
    def nbytes(self) -> int:
        """Bytes of the decoded chunk."""
        return self.tokens * self.width * self.dtype.itemsize

    @property
    def file(self) -> Path:
        """The chunk's file, by Zarr's default chunk keys."""
        return self.path / "c" / str(self.chunk) / str(self.layer_index) / "0"

    def describe(self) -> str:
        """Return the chunk's name for a message."""
        return (
            f"chunk {self.chunk} (from token {self.start}) of {self.component} layer {self.layer} "
            f"in capture {self.capture}, {self.file},"
        )


_Group = tuple[Source, ...]
"""Sources that share a chunk, which is read once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Where values are from: a run of tokens of one layer of one component of one capture."""

    capture: int
    component: str
    layer: int
    tokens: slice


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Block(Span):
    """A span with its stored values, shape (t, width), in a buffer that is used again: copy what you keep."""

    values: NDArray[Any]

    @property
    def span(self) -> Span:
        """The span without the values."""
        return Span(capture=self.capture, component=self.component, layer=self.layer, tokens=self.tokens)


def blocks(sources: Iterable[Source], *, memory: int, threads: int | None = None) -> Generator[Block, None, None]:
    """Yield the wanted rows of every source, in order, decoded ahead by threads.

    Parameters
    ----------
    sources : iterable of Source
        Neighbours of the same chunk are decoded once.
    memory : int
        Bytes of chunks, decoded and encoded, to hold at most.
    threads : int, optional
        Decoding threads; one a core by default, fewer where `memory` does not feed them.

    Yields
    ------
    Block
        Its values are valid until the next block is taken.

    Raises
    ------
    CorruptError
        In the place of a block whose chunk is missing or does not decode.
    MisuseError
        `memory` is too little for a single chunk.
    """
    with closing(_ordered(_decoded, sources, memory=memory, threads=threads)) as results:
        for found in results:
            yield from found


def map_blocks(
    fn: Callable[[Block], R], sources: Iterable[Source], *, memory: int, threads: int | None = None
) -> Generator[tuple[Span, R], None, None]:
    """Call `fn` on every block in the thread that decoded it, and yield the results in order.

    `fn` must return nothing that looks into `block.values`, whose buffer is used again. It runs in several threads at a
    time. What it raises is raised in the place of its result. Parameters and errors are those of `blocks`.

    Yields
    ------
    tuple of Span and result
    """

    def work(group: _Group, buffer: NDArray[np.uint8]) -> list[tuple[Span, R]]:
        return [(block.span, fn(block)) for block in _decoded(group, buffer)]

    with closing(_ordered(work, sources, memory=memory, threads=threads)) as results:
        for found in results:
            yield from found


def _ordered(
    work: Callable[[_Group, NDArray[np.uint8]], R],
    sources: Iterable[Source],
    *,
    memory: int,
    threads: int | None,
) -> Generator[R, None, None]:
    """Yield work(group, buffer) of every chunk in order; a result's buffer is free again when the next one is taken."""
    groups = _with_later(_by_chunk(sources))
    group, later = next(groups, (None, None))
    if group is None:
        return
    buffers = _Buffers(memory, threads or len(os.sched_getaffinity(0)), first=group[0])
    turns = _Turns(buffers.threads)
    pool = ThreadPoolExecutor(buffers.threads, thread_name_prefix="chunk")
    more = ThreadPoolExecutor(1, thread_name_prefix="chunk-more")
    count = itertools.count()
    pending: deque[tuple[Future[R], NDArray[np.uint8]]] = deque()
    try:
        while group or pending:
            while group and (buffer := buffers.take(group[0])) is not None:
                extra = buffers.reader and turns.waited and next(count) % (buffers.threads + 1) == 0
                doing = (more if extra else pool).submit(_worked, work, group, buffer, later=later, turns=turns)
                pending.append((doing, buffer))
                group, later = next(groups, (None, None))
            future, buffer = pending.popleft()
            yield future.result()
            buffers.give(buffer)
    finally:
        for threads_of in (pool, more):
            threads_of.shutdown(wait=True, cancel_futures=True)


def _worked(
    work: Callable[[_Group, NDArray[np.uint8]], R],
    group: _Group,
    buffer: NDArray[np.uint8],
    *,
    later: _Group | None,
    turns: "_Turns",
) -> R:
    """Work on a chunk when it is this thread's turn; one that waits for the disk lets another work meanwhile."""
    with turns:
        _thread.turns = turns
        if turns.waited and later and later[0].decoder is not None:
            _touch(later[0].file)
        return work(group, buffer)


def _by_chunk(sources: Iterable[Source]) -> Iterator[_Group]:
    for _, group in groupby(sources, key=lambda one: (one.path, one.layer_index, one.chunk)):
        yield tuple(group)


class _Turns(BoundedSemaphore):
    """As many turns as threads work at a time; `waited` once any had to wait for the disk: one more then reads."""

    waited = False

    @contextmanager
    def given_up(self) -> Iterator[None]:
        """Let another thread work while this one, whose turn it is, waits."""
        self.waited = True
        self.release()
        try:
            yield
        finally:
            self.acquire()


def _with_later(groups: Iterator[_Group]) -> Iterator[tuple[_Group, _Group | None]]:
    """Yield every group and the one `_AHEAD` places later."""
    waiting: deque[_Group] = deque()
    for group in groups:
        waiting.append(group)
        if len(waiting) > _AHEAD:
            yield waiting.popleft(), group
    for group in waiting:
        yield group, None


def _touch(file: Path) -> None:
    """Read the first bytes of a file, so that the kernel begins to bring it into its cache before its turn."""
    with suppress(OSError):  # whoever reads the file says what is wrong with it
        descriptor = os.open(file, READ_FLAGS)
        try:
            os.preadv(descriptor, [bytearray(1)], 0)
        finally:
            os.close(descriptor)


def _decoded(group: _Group, buffer: NDArray[np.uint8]) -> list[Block]:
    """Read the chunk that all sources of `group` share, and return their blocks."""
    one = group[0]
    rows = [(source, wanted) for source in group for wanted in source.slices]
    if one.decoder is not None:
        first = 0
        values = buffer[: one.nbytes].view(one.dtype).reshape(one.tokens, one.width)
        _decode(one, one.decoder, values)
    else:
        first = min(wanted.start for _, wanted in rows)
        values = _read_through(one, slice(one.start + first, one.start + max(wanted.stop for _, wanted in rows)))
    return [
        Block(
            capture=source.capture,
            component=source.component,
            layer=source.layer,
            tokens=slice(one.start + wanted.start, one.start + wanted.stop),
            values=values[wanted.start - first : wanted.stop - first],
        )
        for source, wanted in rows
    ]


def _decode(source: Source, decoder: ChunkDecoder, values: NDArray[Any]) -> None:
    try:
        decoder.decode_into(_file_bytes(source.file, decoder.most_bytes), values)
    except FileNotFoundError as error:
        if not source.path.is_dir():
            raise CorruptError(f"{source.describe()} is gone with its capture; open the store again") from error
        raise CorruptError(f"{source.describe()} is missing{_REPAIR}{_GONE}") from error
    except OSError as error:
        raise CorruptError(f"{source.describe()} can't be read ({error.strerror}){_REPAIR}") from error
    except CorruptError as error:
        raise CorruptError(f"{source.describe()} can't be used: {error}{_REPAIR}") from error


def _read_through(source: Source, tokens: slice) -> NDArray[Any]:
    assert source.read is not None  # a Source has a decoder or a reader
    values = source.read(source.layer_index, tokens)
    if values.shape != (tokens.stop - tokens.start, source.width) or values.dtype != source.dtype:
        raise CorruptError(
            f"{source.describe()} was read as {values.shape} {values.dtype} where "
            f"{tokens.stop - tokens.start} tokens x {source.width} {source.dtype} were asked for{_REPAIR}"
        )
    return values


def _file_bytes(file: Path, most: int) -> NDArray[np.uint8]:
    """Return the file's bytes in this thread's own buffer, at most one more than `most` of them."""
    scratch = getattr(_thread, "scratch", None)
    if scratch is None or len(scratch) <= most:
        scratch = _thread.scratch = _aligned(most + 1)
    descriptor = os.open(file, READ_FLAGS)
    try:
        size = _cached(descriptor, scratch[: most + 1])
        if size < min(most + 1, os.fstat(descriptor).st_size):
            with _thread.turns.given_up():
                size = _from_disk(descriptor, scratch[: most + 1], size)
    finally:
        os.close(descriptor)
    return scratch[:size]


def _from_disk(descriptor: int, into: NDArray[np.uint8], size: int) -> int:
    """Read on from `size` to the end of a file, in steps by which the kernel sees that it is read through.

    It then reads ahead in large pages, twice as fast here as by one call for the whole file.
    """
    while (got := os.preadv(descriptor, [into[size : size + _STEP].data], size)) > 0:
        size += got
    return size


def _cached(descriptor: int, into: NDArray[np.uint8]) -> int:
    """Read what the page cache holds of a file's beginning, in one call, and return how much that is."""
    try:
        return os.preadv(descriptor, [into.data], 0, os.RWF_NOWAIT)
    except (AttributeError, OSError):  # none of it, or a system that can't say
        return 0


def _aligned(nbytes: int) -> NDArray[np.uint8]:
    memory = np.empty(nbytes + _ALIGN, np.uint8)
    offset = -memory.ctypes.data % _ALIGN
    return memory[offset : offset + nbytes]


class _Buffers:
    """The buffers of one stream, within its allowance: decoded chunks, and one encoded chunk a thread.

    Only the thread that takes the results calls it, so it needs no lock.
    """

    def __init__(self, memory: int, threads: int, *, first: Source) -> None:
        self.memory = memory
        # n threads want n encoded chunks, n decoded ones and one more with the caller.
        self.threads = max(1, min(threads, (memory - first.nbytes) // (2 * first.nbytes + _MORE)))
        self.reader = True
        """Whether there is room for one thread more, which waits for the disk while the others work."""
        self._largest = 0
        self._free: list[NDArray[np.uint8]] = []
        self._out = 0
        self._held = 0

    def take(self, source: Source) -> NDArray[np.uint8] | None:
        """Return a buffer for the chunk, or None when one that is out has to come back first."""
        self._largest = max(self._largest, source.nbytes)
        if self._out == self.threads + _SPARE:
            return None
        fitting = next((one for one in self._free if len(one) >= source.nbytes), None)
        if fitting is not None:
            self._free = [one for one in self._free if one is not fitting]
        else:
            fitting = self._new(source)
        self._out += fitting is not None
        return fitting

    def give(self, buffer: NDArray[np.uint8]) -> None:
        """Take back a buffer that nobody reads or fills any more."""
        self._out -= 1
        self._free.append(buffer)

    def _new(self, source: Source) -> NDArray[np.uint8] | None:
        encoded = self.threads * (self._largest + _MORE)
        self.reader = self.reader and self.threads * 2 * (self._largest + _MORE) + source.nbytes <= self.memory // 2
        if self.reader:
            encoded += self._largest + _MORE
        while self._free and self._held + source.nbytes + encoded > self.memory:
            self._held -= len(self._free.pop())
        if self._held + source.nbytes + encoded <= self.memory:
            self._held += source.nbytes
            return _aligned(source.nbytes)
        if self._out:
            return None
        raise MisuseError(
            f"{source.describe()} needs {source.nbytes + encoded} bytes to be read, but the allowance is "
            f"{self.memory}; nothing more was read, allow more memory"
        )
