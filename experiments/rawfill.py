"""A `.pt` file whose rows come in any order, from any thread: laid out without them, filled in place, then published.

`torch.save` needs all tensors in memory, writes them one after another in one thread, and computes their checksums on
the way. Here it writes everything but the rows (`torch.serialization.skip_data`); each run of rows then goes from the
memory where it was decoded to its own place in the file, and its checksum is put together from those of the runs.
The file is the one that `torch.save` would have written.
"""

import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from experiments.errors import ExperimentError
from experiments.rawfile import DTYPES, Array, publish, staged_for
from experiments.rawpt import parts_of

__all__ = ["Filling", "combined_crc32"]

_LOCAL: Final = struct.Struct("<4s22xHH")
"""Of a member's header: signature, and the lengths of name and extra field that follow it."""
_CENTRAL: Final = struct.Struct("<4s24xHHH12x")
"""Of its entry in the directory at the end: signature, and the lengths of name, extra field and comment."""
_CENTRAL_CRC: Final = 16
_DESCRIPTOR: Final = b"PK\x07\x08"
"""After a member's bytes come this and its CRC-32."""
_HAS_DESCRIPTOR: Final = 0x8
_POLYNOMIAL: Final = 0xEDB88320


class _Run(NamedTuple):
    """Bytes that were written into a member."""

    size: int
    crc: int


@dataclass(slots=True, kw_only=True)
class _Member:
    """A tensor's bytes in the archive: its rows of the rollout, where they begin, and what was written of them."""

    rows: slice
    row_bytes: int
    dtype: str
    width: int
    offset: int = 0
    entry: int = 0
    runs: dict[int, _Run] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return int(self.rows.stop - self.rows.start) * self.row_bytes

    def crc(self) -> int | None:
        """CRC-32 of all of it; None while something is not there."""
        end, crc = 0, 0
        for start, run in sorted(self.runs.items()):
            if start != end:
                return None
            end, crc = start + run.size, combined_crc32(crc, run.crc, run.size)
        return crc if end == self.nbytes else None


class Filling:
    """A `.pt` file that is laid out and waits for its rows; nobody sees it before `finish`.

    Parameters
    ----------
    path : Path
    arrays : mapping of (component, layer) to Array
        Width and dtype of what will come.
    record : mapping
        As `write_raw` takes it.
    overwrite : bool
        Replace a file that is there.

    Raises
    ------
    RuntimeError
        This torch lays out files in a way that is not known here.
    """

    def __init__(
        self, path: Path, arrays: Mapping[tuple[str, int], Array], record: Mapping[str, Any], *, overwrite: bool = False
    ) -> None:
        self.path, self._overwrite = path, overwrite
        self._staged = staged_for(path)
        self._descriptor = -1
        try:
            self._members = _laid_out(self._staged, arrays, record)
            self._descriptor = os.open(self._staged, os.O_RDWR | os.O_CLOEXEC)
            self._locate()
        except BaseException:
            self.abandon()
            raise
        self._of: dict[tuple[str, int], list[_Member]] = {}
        for cell, member in self._members:
            self._of.setdefault(cell, []).append(member)

    def put(self, component: str, layer: int, rows: NDArray[Any], *, start: int) -> None:
        """Write rows, the first of them that of token `start` (counted from the first that has rows); each row once.

        Raises
        ------
        OSError
            The disk did not take them.
        """
        for member in self._of[component, layer]:
            first, last = max(start, member.rows.start), min(start + len(rows), member.rows.stop)
            if first >= last:
                continue
            piece = rows[first - start : last - start]
            if (piece.shape[1], str(piece.dtype)) != (member.width, member.dtype):
                raise ExperimentError(
                    f"{self.path} is laid out for {component} at layer {layer} as {member.dtype} of width "
                    f"{member.width}, and rows came as {piece.dtype} of width {piece.shape[1]}; it was not written"
                )
            data = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
            at = (first - member.rows.start) * member.row_bytes
            member.runs[at] = _Run(len(data), zlib.crc32(data.data))
            self._write(data, member.offset + at)

    def finish(self) -> int:
        """Complete the checksums, let the file appear under its name, and return its open descriptor.

        Raises
        ------
        ExperimentError
            Some rows never came, or a file is there.
        """
        try:
            for (component, layer), member in self._members:
                crc = member.crc()
                if crc is None:
                    raise ExperimentError(
                        f"{self.path} lacks rows of {component} at layer {layer}, so it was not written; export again"
                    )
                if member.nbytes:
                    packed = np.frombuffer(struct.pack("<I", crc), np.uint8)
                    self._write(packed, member.offset + member.nbytes + len(_DESCRIPTOR))
                    self._write(packed, member.entry + _CENTRAL_CRC)
            publish(self._staged, self.path, overwrite=self._overwrite)
        except BaseException:
            self.abandon()
            raise
        descriptor, self._descriptor = self._descriptor, -1
        return descriptor

    def abandon(self) -> None:
        """Delete what was written; nothing happens after `finish`."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        with suppress(FileNotFoundError):
            self._staged.unlink()

    def _write(self, data: NDArray[np.uint8], at: int) -> None:
        done = 0
        while done < len(data):
            try:
                done += os.pwrite(self._descriptor, data[done:].data, at + done)
            except OSError as error:
                error.filename = str(self.path)
                raise

    def _locate(self) -> None:
        """Find where each tensor's bytes and its entry in the directory are."""
        with zipfile.ZipFile(self._staged) as archive:
            entries = {one.filename.partition("/")[2]: one for one in archive.infolist()}
            places = dict(zip(entries, self._entries(archive.start_dir, len(entries)), strict=True))
        for index, (_, member) in enumerate(self._members):
            name = f"data/{index}"
            found = entries.get(name)
            if found is None or found.file_size != member.nbytes:
                raise _unknown(self.path)
            if not member.nbytes:
                continue
            signature, name_size, extra_size = self._read(_LOCAL, found.header_offset)
            member.offset = found.header_offset + _LOCAL.size + name_size + extra_size
            member.entry = places[name]
            after = os.pread(self._descriptor, len(_DESCRIPTOR), member.offset + member.nbytes)
            if signature != b"PK\x03\x04" or after != _DESCRIPTOR or not found.flag_bits & _HAS_DESCRIPTOR:
                raise _unknown(self.path)

    def _entries(self, at: int, n: int) -> list[int]:
        places = []
        for _ in range(n):
            signature, *sizes = self._read(_CENTRAL, at)
            if signature != b"PK\x01\x02":
                raise _unknown(self.path)
            places.append(at)
            at += _CENTRAL.size + sum(sizes)
        return places

    def _read(self, form: struct.Struct, at: int) -> tuple[Any, ...]:
        return form.unpack(os.pread(self._descriptor, form.size, at))


def _unknown(path: Path) -> RuntimeError:
    return RuntimeError(
        f"{path} can't be filled: this version of torch lays out files in a way that is not known here; install the "
        "version that is in constraints.txt"
    )


def _laid_out(
    path: Path, arrays: Mapping[tuple[str, int], Array], record: Mapping[str, Any]
) -> list[tuple[tuple[str, int], _Member]]:
    """Write the file without its rows; return its tensors in the order in which they lie."""
    import torch  # seconds to load, and only this form needs it

    members: list[tuple[tuple[str, int], _Member]] = []

    def tensor(cell: tuple[str, int], rows: slice) -> Any:
        width, dtype = arrays[cell]
        members.append((cell, _Member(rows=rows, row_bytes=width * DTYPES[dtype], dtype=dtype, width=width)))
        return torch.empty(rows.stop - rows.start, width, dtype=getattr(torch, dtype))  # memory that is never touched

    parts = parts_of(arrays, record, tensor)
    with torch.serialization.skip_data():
        torch.save(parts, path)
    return members


def combined_crc32(first: int, second: int, size: int) -> int:
    """Return the CRC-32 of two runs of bytes end to end from that of each, the second `size` bytes long.

    The first one is multiplied by x^(8 size) modulo the CRC's polynomial, as zlib's `crc32_combine` does.
    """
    return _times(_power(size), first) ^ second


@lru_cache(maxsize=256)
def _power(size: int) -> int:
    """x^(8 size) modulo the polynomial."""
    power, bit = 1 << 31, 3
    while size:
        if size & 1:
            power = _times(_power_of_two(bit % 32), power)
        size, bit = size >> 1, bit + 1
    return power


@cache
def _power_of_two(n: int) -> int:
    """x^(2^n) modulo the polynomial; bits are in reverse, x^0 is the highest."""
    return 1 << 30 if n == 0 else _times(_power_of_two(n - 1), _power_of_two(n - 1))


def _times(one: int, other: int) -> int:
    product = 0
    for place in range(31, -1, -1):
        if one >> place & 1:
            product ^= other
        other = other >> 1 ^ (_POLYNOMIAL if other & 1 else 0)
    return product
