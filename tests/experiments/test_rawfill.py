"""Files that are laid out first and filled later are those of `torch.save`; what is not whole never appears."""

import errno
import os
import random
import zipfile
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from experiments.errors import ExperimentError
from experiments.rawfile import Array
from experiments.rawfiles import check_content, read_raw, write_raw
from experiments.rawfill import Filling, combined_crc32

Cells = dict[tuple[str, int], NDArray[Any]]
KINDS = ("bfloat16", "float16", "float32", "float64")


def made(n: int) -> Cells:
    """Return rows of two components at two layers; one is of another width and dtype."""
    numbers = np.random.default_rng(n)
    of = {"residual": (6, ml_dtypes.bfloat16), "k_proj": (3, np.float32)}
    return {
        (name, layer): numbers.standard_normal((n, width)).astype(dtype)
        for name, (width, dtype) in of.items()
        for layer in (12, 3)
    }


def about(n: int, cut: int, left_out: int = 0) -> dict[str, Any]:
    return {
        "token_ids": list(range(n + left_out)),
        "tokens": ["é"] * (n + left_out),
        "prompt": "ask",
        "response": "answer",
        "prompt_end": cut,
        "left_out": left_out,
    }


def filling(path: Path, cells: Cells, record: dict[str, Any], **options: Any) -> Filling:
    arrays = {cell: Array(rows.shape[1], str(rows.dtype)) for cell, rows in cells.items()}
    return Filling(path, arrays, record, **options)


def put_all(file: Filling, cells: Cells, *, seed: int, most: int = 4) -> None:
    """Put all rows in pieces of a few, in any order."""
    pieces = []
    for cell, rows in cells.items():
        at = 0
        while at < len(rows):
            n = random.Random(seed * 31 + at).randint(1, most)
            pieces.append((cell, at, rows[at : at + n]))
            at += n
    random.Random(seed).shuffle(pieces)
    for (component, layer), start, rows in pieces:
        file.put(component, layer, rows, start=start)


def members(path: Path) -> dict[str, bytes]:
    """Return what an archive holds, each part checked by its checksum, but for the id that is drawn for each file."""
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        names = [one for one in archive.namelist() if not one.endswith("serialization_id")]
        return {one.partition("/")[2]: archive.read(one) for one in names}


@pytest.mark.parametrize(
    ("n", "cut", "left_out"), [(7, 3, 0), (5, 0, 0), (5, 5, 0), (6, 4, 4), (1, 1, 0), (300, 120, 0)]
)
def test_a_filled_file_is_the_one_that_torch_saves(n: int, cut: int, left_out: int, tmp_path: Path) -> None:
    cells, record = made(n), about(n, cut, left_out)
    write_raw(tmp_path / "saved.pt", cells, record)
    file = filling(tmp_path / "filled.pt", cells, record)
    put_all(file, cells, seed=n, most=1 + n // 3)
    assert not (tmp_path / "filled.pt").exists(), "it appears when it is whole"
    os.close(file.finish())
    assert members(tmp_path / "filled.pt") == members(tmp_path / "saved.pt")
    assert check_content(tmp_path / "filled.pt").startswith("zip-crc32:")
    loaded = [torch.load(tmp_path / f"{name}.pt", weights_only=True, mmap=True) for name in ("saved", "filled")]
    assert repr(loaded[0]) == repr(loaded[1])
    assert read_raw(tmp_path / "filled.pt").arrays == read_raw(tmp_path / "saved.pt").arrays
    assert sorted(one.name for one in tmp_path.iterdir()) == ["filled.pt", "saved.pt"]
    modes = {(tmp_path / f"{name}.pt").stat().st_mode for name in ("saved", "filled")}
    assert len(modes) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_every_dtype_is_filled_to_the_bit(kind: str, tmp_path: Path) -> None:
    rows = np.arange(40).reshape(8, 5).astype(ml_dtypes.bfloat16 if kind == "bfloat16" else kind)
    file = filling(tmp_path / "a.pt", {("residual", 0): rows}, about(8, 2))
    put_all(file, {("residual", 0): rows}, seed=1)
    os.close(file.finish())
    found = [one.values.tobytes() for one in read_raw(tmp_path / "a.pt").rows()]
    assert b"".join(found) == rows.tobytes()


def test_a_file_that_is_not_whole_or_must_not_be_written_over_leaves_nothing(tmp_path: Path) -> None:
    cells, record = made(4), about(4, 2)
    file = filling(tmp_path / "a.pt", cells, record)
    put_all(file, {cell: rows[:3] if cell == ("residual", 12) else rows for cell, rows in cells.items()}, seed=0)
    with pytest.raises(
        ExperimentError, match=r"a.pt lacks rows of residual at layer 12, so it was not written; export"
    ):
        file.finish()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a.pt").write_text("mine")
    file = filling(tmp_path / "a.pt", cells, record)
    put_all(file, cells, seed=0)
    with pytest.raises(ExperimentError, match=r"a.pt is there already and was left as it is; --replace"):
        file.finish()
    assert [one.read_text() for one in tmp_path.iterdir()] == ["mine"]
    file = filling(tmp_path / "a.pt", cells, record, overwrite=True)
    put_all(file, cells, seed=0)
    os.close(file.finish())
    assert read_raw(tmp_path / "a.pt").arrays.keys() == cells.keys()
    assert len(list(tmp_path.iterdir())) == 1
    filling(tmp_path / "b.pt", cells, record).abandon()
    assert len(list(tmp_path.iterdir())) == 1


def test_rows_of_another_width_or_dtype_are_refused(tmp_path: Path) -> None:
    cells = made(4)
    file = filling(tmp_path / "a.pt", cells, about(4, 2))
    with pytest.raises(ExperimentError, match=r"a.pt is laid out for residual at layer 3 as bfloat16 of width 6, and"):
        file.put("residual", 3, cells["k_proj", 3], start=0)
    file.abandon()


def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = made(4)
    file = filling(tmp_path / "a.pt", cells, about(4, 2))

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/a.pt'"):
        file.put("residual", 3, cells["residual", 3], start=0)
    file.abandon()


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_checksums_are_put_together_as_if_the_bytes_were_one(one: bytes, other: bytes) -> None:
    assert combined_crc32(zlib.crc32(one), zlib.crc32(other), len(other)) == zlib.crc32(one + other)


def test_checksums_of_much_are_put_together() -> None:
    one, other = b"a" * 1000, bytes(70_000_001)
    assert combined_crc32(zlib.crc32(one), zlib.crc32(other), len(other)) == zlib.crc32(one + other)
