"""Frames of our own: every Blosc reads them, they are little or no larger than Blosc's own, or there is none."""

from __future__ import annotations

import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import zarr
from numcodecs.blosc import Blosc

from datastore.codec import ChunkDecoder, encode, encode_pieces, zarr_codecs
from datastore.dtype import numpy_dtype, zarr_dtype
from datastore.schema import DTYPES, Codec
from datastore.storage import read_region, write_chunk
from tests.synthetic import activations

BLOCK = 1 << 16
SMALL = Codec(blocksize=BLOCK)


def blosc_size(values: np.ndarray, codec: Codec = SMALL) -> int:
    """Bytes of Blosc's own frame and the checksum."""
    blosc = Blosc(cname="zstd", clevel=codec.level, shuffle=1, blocksize=codec.blocksize, typesize=values.itemsize)
    return len(blosc.encode(values.reshape(-1).view(np.uint8))) + 4


def is_ours(values: np.ndarray, codec: Codec = SMALL) -> bool:
    """Blosc gives one piece, and the checksum is another."""
    return len(encode_pieces(values, codec)) > 2


def bits(values: np.ndarray) -> np.ndarray:
    return values.reshape(-1).view(np.uint8)


def decoded(raw: bytes, like: np.ndarray) -> np.ndarray:
    out = np.empty_like(like)
    ChunkDecoder(tokens=like.shape[0], width=like.shape[1], dtype=like.dtype, blosc=True, crc32c=True).decode_into(
        raw, out
    )
    return out


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("tokens", [256, 258, 300])  # whole blocks, and a last one that is short
def test_activations_come_back_to_the_bit(dtype: str, tokens: int) -> None:
    values = activations(tokens, 1000, seed=1, dtype=dtype)
    values[3, 5], values[100] = np.nan, np.inf
    values[200:250] = 0
    assert is_ours(values)
    raw = encode(values, SMALL)
    assert len(raw) < 1.01 * blosc_size(values)
    assert np.array_equal(bits(decoded(raw, values)), bits(values))
    assert np.array_equal(np.frombuffer(Blosc().decode(raw[:-4]), np.uint8), bits(values))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_as_the_store_writes_them_they_take_less_room(dtype: str) -> None:
    values, codec = activations(512, 4096, seed=1, dtype=dtype), Codec()
    assert is_ours(values, codec)
    assert len(encode(values, codec)) < blosc_size(values, codec)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_zarr_and_tensorstore_read_them(tmp_path: Path, dtype: str) -> None:
    values = activations(512, 1024, seed=2, dtype=dtype)
    array = zarr.create_array(
        tmp_path / "a",
        shape=(512, 1, 1024),
        chunks=(512, 1, 1024),
        dtype=zarr_dtype(dtype),
        fill_value=float("nan"),
        **zarr_codecs(SMALL, dtype),
    )
    file = tmp_path / "a" / "c" / "0" / "0" / "0"
    file.parent.mkdir(parents=True)
    file.write_bytes(encode(values, SMALL))
    assert is_ours(values)
    assert np.array_equal(bits(np.asarray(array[:, 0])), bits(values))
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(tmp_path / "a")}}
    read = tensorstore.open(spec, open=True).result().read().result()
    assert np.array_equal(bits(np.ascontiguousarray(read[:, 0])), bits(values))


def made(what: str) -> np.ndarray:
    random, bf16 = np.random.default_rng(0), numpy_dtype("bfloat16")
    if what == "prefixes that repeat":
        return np.tile(activations(64, 128, seed=1), (32, 1))
    if what == "bits at random":
        return random.integers(0, 1 << 16, (256, 1000), np.uint16).view(bf16)
    if what == "three blocks":
        return activations(96, 1024, seed=1)
    return activations(256, 1000, seed=1, dtype=what)


@pytest.mark.parametrize("what", ["prefixes that repeat", "bits at random", "three blocks", "float16", "float64"])
def test_where_they_would_be_larger_or_no_faster_the_bytes_are_blosc_s(what: str) -> None:
    values = made(what)
    assert not is_ours(values)
    assert len(encode(values, SMALL)) == blosc_size(values)
    assert np.array_equal(bits(decoded(encode(values, SMALL), values)), bits(values))


@pytest.mark.parametrize("codec", [Codec(level=3, blocksize=BLOCK), Codec(name="lz4", blocksize=BLOCK)])
def test_other_codecs_are_blosc_s_own(codec: Codec) -> None:
    assert not is_ours(activations(256, 1000, seed=1), codec)


@pytest.mark.parametrize("blocksize", [0, 1, 3, 1 << 30])
def test_any_block_size_that_blosc_takes(blocksize: int) -> None:
    values = activations(256, 1000, seed=1)
    assert np.array_equal(bits(decoded(encode(values, Codec(blocksize=blocksize)), values)), bits(values))


def test_a_frame_of_more_pieces_than_one_write_takes(tmp_path: Path) -> None:
    values, codec = activations(1024, 1024, seed=1), Codec(blocksize=2048)
    pieces = encode_pieces(values, codec)
    assert len(pieces) > 1024
    (tmp_path / "a").mkdir()
    assert write_chunk(tmp_path / "a", (0, 0, 0), pieces) == sum(map(len, pieces))
    assert zlib.crc32((tmp_path / "a" / "c" / "0" / "0" / "0").read_bytes()) == zlib.crc32(b"".join(pieces))


def test_threads_give_the_same_bytes() -> None:
    values: list[Any] = [activations(256, 1024, seed=seed) for seed in range(4)]
    alone = [encode(one, SMALL) for one in values]
    with ThreadPoolExecutor(4) as pool:
        assert [
            one == other for one, other in zip(pool.map(encode, values * 8, [SMALL] * 32), alone * 8, strict=True)
        ] == [True] * 32


def test_every_dtype_is_stored_one_way_or_the_other() -> None:
    ours = {dtype for dtype in DTYPES if is_ours(activations(256, 1000, seed=1, dtype=dtype))}
    assert ours == {"bfloat16", "float32"}


def sums_of(what: str) -> np.ndarray:
    """Sums as statistics hold them: (rollouts, segments, 1, width) of float64."""
    random, shape = np.random.default_rng(5), (6, 2, 1, 4096)
    rows = random.standard_normal((*shape, 50)).astype(numpy_dtype("bfloat16"))
    values: np.ndarray = rows.astype(np.float64).sum(axis=-1)
    match what:
        case "random in all bytes":
            return np.asarray(random.standard_normal(shape))
        case "of a length that no blocks share":
            return values.reshape(-1)[:40961].reshape(1, 1, 1, 40961)  # a prime
        case "with a padded end":
            values[4:] = np.nan
        case "half of them zero":
            values[:, 0] = 0
        case "all zero":
            values[:] = 0
        case "narrow":
            return values[:, :, :, :64].copy()
    return values


def written(values: np.ndarray) -> tuple[bytes, bool]:
    """The bytes of a chunk of sums, and whether they are of our making."""
    raw = b"".join(encode_pieces(values, SMALL, sums=True))
    return raw, raw != encode(values, SMALL)


@pytest.mark.parametrize(
    ("what", "ours"),
    [
        ("exact, their lowest bytes zero", True),
        ("random in all bytes", True),
        ("with a padded end", True),
        ("of a length that no blocks share", False),
        ("half of them zero", False),
        ("all zero", False),
        ("narrow", False),
    ],
)
def test_sums_come_back_to_the_bit_from_every_reader(tmp_path: Path, what: str, ours: bool) -> None:
    values = sums_of(what)
    raw, own = written(values)
    assert own == ours
    assert len(raw) <= (1.4 if ours else 1.0) * blosc_size(values)
    array = zarr.create_array(
        tmp_path / "a", shape=values.shape, chunks=values.shape, dtype="float64", **zarr_codecs(SMALL, "float64")
    )
    file = tmp_path / "a" / "c" / "0" / "0" / "0" / "0"
    file.parent.mkdir(parents=True)
    file.write_bytes(raw)
    assert np.array_equal(bits(read_region(tmp_path / "a", [slice(0, n) for n in values.shape])), bits(values))
    assert np.array_equal(bits(np.asarray(array[:])), bits(values))
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(tmp_path / "a")}}
    read = tensorstore.open(spec, open=True).result().read().result()
    assert np.array_equal(bits(np.ascontiguousarray(read)), bits(values))


def test_of_sums_only_the_bytes_that_vanish_are_compressed() -> None:
    exact, random = (written(sums_of(what))[0] for what in ("exact", "random in all bytes"))
    size = sums_of("random in all bytes").nbytes
    assert 0.3 * size < len(exact) < 0.7 * size
    assert len(random) == size + 16 + 4, "a header, the values as they are, a checksum"
