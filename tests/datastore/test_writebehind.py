"""Chunk files on their way to disk. Oracle: the system's own word on what its cache holds, and plain file reads."""

import errno
import os
import resource
from contextlib import suppress
from pathlib import Path

import pytest

from datastore import storage, writebehind
from datastore.writebehind import WriteBehind, libc_function

MANY = 1 << 20


def cached(file: Path) -> bool:
    """Whether the page cache holds the first bytes of a file: a read that may not wait says so."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        return os.preadv(descriptor, [bytearray(1)], 0, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)


def is_open(descriptor: int) -> bool:
    with suppress(OSError):
        os.fstat(descriptor)
        return True
    return False


@pytest.mark.skipif(libc_function("sync_file_range") is None, reason="this system has no sync_file_range")
def test_files_leave_the_cache_in_their_turn_and_keep_their_bytes(tmp_path: Path) -> None:
    behind, content = WriteBehind(depth=2), {f"{i}": os.urandom(MANY) for i in range(5)}
    for index, (name, data) in enumerate(content.items()):
        storage.write_chunk(tmp_path, (index, 0, 0), (data[:7], memoryview(data)[7:]), behind=behind)
        if index == 0 and not cached(storage.chunk_file(tmp_path, (0, 0, 0))):
            pytest.skip("this file system keeps no cache of its files")
        assert name in content
    files = [storage.chunk_file(tmp_path, (index, 0, 0)) for index in range(5)]
    assert [cached(file) for file in files[:3]] == [False] * 3
    behind.close()
    assert [file.read_bytes() for file in files] == list(content.values())


def test_all_descriptors_are_closed(tmp_path: Path) -> None:
    behind, taken = WriteBehind(depth=2), [os.open(tmp_path / f"{i}", os.O_CREAT | os.O_WRONLY) for i in range(4)]
    for index, one in enumerate(taken):
        behind.push(one, tmp_path / f"{index}")
    assert [is_open(one) for one in taken] == [False, False, True, True]
    behind.close()
    assert not any(map(is_open, taken))


def test_what_cannot_be_synced_is_only_closed() -> None:
    """A pipe is no file that any disk takes; that is no error."""
    behind, (reading, writing) = WriteBehind(depth=0), os.pipe()
    behind.push(writing, Path("no file"))
    assert not is_open(writing)
    os.close(reading)


def test_a_file_that_the_disk_did_not_take_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No disk here fails on demand, so the kernel's answer is made up; what follows from it is real."""
    behind, real = WriteBehind(depth=1), writebehind._sync_range

    def failing(descriptor: int, how: int) -> None:
        if how == writebehind._SYNC_WAIT and os.readlink(f"/proc/self/fd/{descriptor}").endswith("/1/0/0"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(descriptor, how)

    monkeypatch.setattr(writebehind, "_sync_range", failing)
    for index in range(2):
        storage.write_chunk(tmp_path, (index, 0, 0), (b"some",), behind=behind)
    storage.write_chunk(tmp_path, (2, 0, 0), (b"more",), behind=WriteBehind())
    with pytest.raises(OSError, match=r"Input/output error: '.*/c/1/0/0'"):
        storage.write_chunk(tmp_path, (3, 0, 0), (b"last",), behind=behind)
    there = [storage.chunk_file(tmp_path, (index, 0, 0)).exists() for index in range(4)]
    assert there == [True, False, True, True]
    storage.write_chunk(tmp_path, (1, 0, 0), (b"some",), behind=behind)
    with pytest.raises(OSError, match="Input/output error"):
        behind.drain()
    assert not storage.chunk_file(tmp_path, (1, 0, 0)).exists()


def test_a_chunk_is_whole_or_not_there(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            storage.write_chunk(tmp_path, (0, 1, 0), (bytes(2000), b"abcd"), behind=WriteBehind())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [one for one in tmp_path.rglob("*") if one.is_file()] == []
    assert storage.write_chunk(tmp_path, (0, 1, 0), (b"", bytes(2000), b"abcd")) == 2004
    assert storage.chunk_file(tmp_path, (0, 1, 0)).read_bytes() == bytes(2000) + b"abcd"


def test_a_process_that_is_too_late_does_not_bring_an_array_back(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        storage.write_chunk(tmp_path / "gone", (0, 0, 0), (b"late",))
    assert not (tmp_path / "gone").exists()
