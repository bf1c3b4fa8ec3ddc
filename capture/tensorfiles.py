"""Safetensors files and tensors that exist already: headers, parallel reads straight into place, checksums, writing.

On the CPU the bytes are read into the tensor's own memory; for a GPU they pass through two pinned buffers a thread, so
that reading and copying overlap. Nothing is ever in host memory but those buffers.
"""

import json
import os
import struct
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capture.errors import ModelError

__all__ = ["Stored", "as_bytes", "checksum", "fill", "header", "headers", "write"]

BLOCK = 64 << 20
"""Bytes read at a time, and of each pinned buffer."""
_GAP = 1 << 16
_MOST_HEADER = 100 << 20
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

Tick = Callable[[int], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One tensor in a file: `n_bytes` from byte `start` on."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    n_bytes: int


def header(path: Path) -> dict[str, Stored]:
    """Read where every tensor of a safetensors file is.

    Raises
    ------
    ModelError
        The file is not one, or is shorter than its header says.
    """
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            if size > _MOST_HEADER:
                raise ValueError(f"its header would be {size:,} bytes")
            raw = json.loads(file.read(size))
        found = {name: _stored(path, one, 8 + size) for name, one in raw.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise ModelError(f"{path} is no safetensors file that can be read: {error}; download it again") from error
    end, there = max((one.start + one.n_bytes for one in found.values()), default=0), path.stat().st_size
    if there < end:
        raise ModelError(f"{path} has {there:,} bytes and its header speaks of {end:,}; download it again")
    return found


def _stored(path: Path, one: Mapping[str, Any], base: int) -> Stored:
    begin, end = one["data_offsets"]
    dtype = _DTYPES.get(one["dtype"], torch.uint8)  # float8 and the like are only ever looked at by name
    return Stored(path=path, dtype=dtype, shape=tuple(one["shape"]), start=base + begin, n_bytes=end - begin)


def headers(paths: Iterable[Path]) -> dict[str, Stored]:
    """Read the headers of several files as one."""
    return {name: one for path in paths for name, one in header(path).items()}


@dataclass(frozen=True, slots=True)
class _Piece:
    """Bytes of a file, and where they go; `into` is the tensor itself where its dtype is another."""

    path: Path
    start: int
    n_bytes: int
    into: Tensor
    cast: Stored | None = None


def fill(wanted: Sequence[tuple[Stored, Tensor]], *, threads: int | None = None, tick: Tick = lambda _: None) -> None:
    """Read tensors from files into tensors, in parallel.

    Parameters
    ----------
    wanted : sequence of (Stored, Tensor)
        Shapes agree, and the tensors are contiguous; where the dtype is another, values are cast.
    threads : int, optional
        Default the CPUs of this process, 16 at most.
    tick : callable
        Told of bytes read; called from the threads, by one at a time.

    Raises
    ------
    ModelError
        A file can't be read.
    """
    lock = threading.Lock()

    def tell(n_bytes: int) -> None:
        with lock:
            tick(n_bytes)

    runs = _runs([piece for stored, tensor in wanted for piece in _pieces(stored, tensor)])
    with ThreadPoolExecutor(threads or min(16, len(os.sched_getaffinity(0))), thread_name_prefix="load") as pool:
        local = threading.local()
        for _ in pool.map(lambda run: _read_run(run, local, tell), runs):
            pass
    for device in {tensor.device for _, tensor in wanted if tensor.device.type == "cuda"}:
        torch.cuda.synchronize(device)


def _pieces(stored: Stored, tensor: Tensor) -> list[_Piece]:
    if stored.dtype is not tensor.dtype:
        return [_Piece(stored.path, stored.start, stored.n_bytes, tensor, stored)]
    flat = as_bytes(tensor)
    return [
        _Piece(stored.path, stored.start + at, len(flat[at : at + BLOCK]), flat[at : at + BLOCK])
        for at in range(0, stored.n_bytes, BLOCK)
    ]


def _runs(pieces: Sequence[_Piece]) -> list[list[_Piece]]:
    """Pieces of one file and device that lie close together, up to a block of bytes."""
    runs: list[list[_Piece]] = []
    key: Callable[[_Piece], Any] = lambda p: (str(p.path), str(p.into.device), p.start)  # noqa: E731
    for _, same in groupby(sorted(pieces, key=key), key=lambda p: (p.path, p.into.device)):
        run: list[_Piece] = []
        for piece in same:
            end = run[-1].start + run[-1].n_bytes if run else 0
            alone = piece.cast is not None or (run and run[-1].cast is not None)
            if run and (alone or piece.start - end > _GAP or piece.start + piece.n_bytes - run[0].start > BLOCK):
                runs.append(run)
                run = []
            run.append(piece)
        runs.append(run)
    return runs


def _read_run(run: list[_Piece], local: threading.local, tell: Tick) -> None:
    descriptor = os.open(run[0].path, os.O_RDONLY)
    try:
        if run[0].cast is not None:
            _read_cast(descriptor, run[0])
        elif run[0].into.device.type == "cpu":
            for piece in run:
                _read(descriptor, piece.into, piece.start, path=run[0].path)
        else:
            _read_pinned(descriptor, run, local)
    finally:
        os.close(descriptor)
    tell(sum(piece.n_bytes for piece in run))


def _read(descriptor: int, into: Tensor, start: int, *, path: Path) -> None:
    view, done = _memory(into), 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], start + done)
        if count == 0:
            raise ModelError(f"{path} ended at byte {start + done:,} while it was read; download it again")
        done += count


def _read_cast(descriptor: int, piece: _Piece) -> None:
    assert piece.cast is not None
    values = torch.empty(piece.cast.shape, dtype=piece.cast.dtype)
    _read(descriptor, as_bytes(values), piece.start, path=piece.path)
    piece.into.copy_(values)


def _read_pinned(descriptor: int, run: list[_Piece], local: threading.local) -> None:
    """Read a run at once and copy its pieces on the thread's stream, while the other buffer is still being copied."""
    device, start = run[0].into.device, run[0].start
    if getattr(local, "device", None) != device:
        local.device, local.stream, local.turn = device, _stream(device), 0
        local.buffers = [torch.empty(BLOCK, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        local.events = [_event() for _ in range(2)]
    local.turn ^= 1
    buffer, event = local.buffers[local.turn], local.events[local.turn]
    event.synchronize()
    _read(descriptor, buffer[: run[-1].start + run[-1].n_bytes - start], start, path=run[0].path)
    with torch.cuda.stream(local.stream):
        for piece in run:
            piece.into.copy_(buffer[piece.start - start :][: piece.n_bytes], non_blocking=True)
        event.record(local.stream)


def _memory(data: Tensor) -> memoryview:
    array: Any = data.numpy()
    return memoryview(array)


def _stream(device: torch.device) -> Any:
    make: Any = torch.cuda.Stream
    return make(device)


def _event() -> Any:
    make: Any = torch.cuda.Event
    return make()


def as_bytes(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor's own memory as bytes."""
    return tensor.detach().reshape(-1).view(torch.uint8)


def checksum(tensor: Tensor) -> str:
    """Sum a tensor's bytes where it lies, as 16 + 16 hexadecimal digits.

    Two sums modulo 2^64 over its little-endian 64-bit words w_i, as in Fletcher's: of w_i and of i * w_i. Any change
    within one word, so every flipped byte, changes the first; words that changed places change the second.
    """
    data = as_bytes(tensor)
    whole = len(data) // 8 * 8
    plain = weighted = 0
    for start in range(0, whole, BLOCK):
        words = data[start : min(start + BLOCK, whole)].view(torch.int64)
        total = int(words.sum())
        plain += total
        weighted += start // 8 * total + int(torch.arange(len(words), device=words.device).mul_(words).sum())
    if whole < len(data):
        last = int.from_bytes(bytes(data[whole:].tolist()), "little")
        plain, weighted = plain + last, weighted + whole // 8 * last
    return f"{plain % (1 << 64):016x}{weighted % (1 << 64):016x}"


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, one tensor in host memory at a time; synced, and whole under its name or not there."""
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # keeps each aligned
    table, end = {}, 0
    for name in names:
        one = tensors[name]
        size = one.numel() * one.element_size()
        table[name] = {"dtype": _NAMES[one.dtype], "shape": list(one.shape), "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps({"__metadata__": {"format": "pt"}, **table}).encode()
    raw += b" " * (-len(raw) % 8)
    aside = path.with_name(f"{path.name}.partial")
    with aside.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for name in names:
            file.write(_memory(as_bytes(tensors[name].contiguous().cpu())))
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)
