"""Chunks to bytes and back. Oracle: zarr-python writing and reading the same array; tensorstore for other readers."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numcodecs.blosc
import numpy as np
import pytest
import tensorstore
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, TransposeCodec, ZstdCodec
from zarr.dtype import data_type_registry

from datastore.codec import ChunkDecoder, encode, zarr_codecs
from datastore.dtype import BFloat16, numpy_dtype, zarr_dtype
from datastore.errors import CorruptError, MisuseError
from datastore.schema import CODECS, DTYPES, Codec
from tests.synthetic import activations

data_type_registry.register("bfloat16", BFloat16)  # as the entry point does

Shape = tuple[int, int, int]
CRC = Crc32cCodec()
KNOWN = {
    "bytes": (),
    "crc": (CRC,),
    "zstd, shuffle": (BloscCodec(cname="zstd", clevel=1, shuffle="shuffle", blocksize=1 << 19, typesize=2), CRC),
    "zstd, no crc": (BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle", blocksize=64, typesize=4),),
    "lz4": (BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle"), CRC),
    "blosclz": (BloscCodec(cname="blosclz", clevel=9, shuffle="noshuffle", typesize=8), CRC),
    "level 0": (BloscCodec(cname="zlib", clevel=0), CRC),
}


def payload(shape: tuple[int, ...], dtype: str, seed: int) -> np.ndarray:
    """Any bits at all, or few that repeat: NaN payloads, infinities, subnormal numbers, zeros."""
    item = np.dtype(f"u{DTYPES[dtype]}")
    random = np.random.default_rng(seed)
    if seed % 3 == 0:
        return random.integers(0, np.iinfo(item).max, shape, item, endpoint=True).view(numpy_dtype(dtype))
    specials = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.5], numpy_dtype(dtype)).view(item)
    specials = np.concatenate([specials, specials[:1] | item.type(1), specials[:1] - item.type(1), item.type([1])])
    return specials[random.integers(len(specials) if seed % 3 == 1 else 1, size=shape)].view(numpy_dtype(dtype))


def stored(path: Path, values: np.ndarray, chunk: Shape, **codecs: Any) -> dict[str, Any]:
    array = zarr.create_array(
        path,
        shape=values.shape,
        chunks=chunk,
        dtype=zarr_dtype(values.dtype.name),
        fill_value=float("nan"),
        config={"write_empty_chunks": True},
        **codecs,
    )
    array[...] = values
    metadata: dict[str, Any] = json.loads((path / "zarr.json").read_text())
    return metadata


def bits(values: Any) -> np.ndarray:
    array = np.ascontiguousarray(values)
    return array.view(np.dtype(f"u{array.itemsize}"))


def padded(values: np.ndarray, chunk: int) -> np.ndarray:
    whole = np.full((chunk, *values.shape[1:]), np.nan, values.dtype)
    whole[: len(values)] = values
    return whole


shapes = st.tuples(st.integers(1, 40), st.integers(1, 3), st.integers(1, 40))
chunks = st.integers(1, 48)
dtypes = st.sampled_from(sorted(DTYPES))
seeds = st.integers(0, 1 << 32)


@settings(max_examples=60, deadline=None)
@given(shapes, chunks, dtypes, st.sampled_from(CODECS), seeds)
def test_encoded_bytes_are_those_of_zarr_python(shape: Shape, chunk: int, dtype: str, name: Any, seed: int) -> None:
    codec, values = Codec(name=name), payload(shape, dtype, seed)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a"
        stored(path, values, (chunk, 1, shape[2]), **zarr_codecs(codec, dtype))
        for start in range(0, shape[0], chunk):
            for layer in range(shape[1]):
                written = (path / "c" / str(start // chunk) / str(layer) / "0").read_bytes()
                part = padded(values[start : start + chunk, layer], chunk)
                assert encode(part, codec) == written
                assert encode(part[:, np.newaxis], codec) == written


@settings(max_examples=60, deadline=None)
@given(shapes, chunks, dtypes, st.sampled_from(sorted(KNOWN)), seeds)
def test_decoded_bits_are_those_of_zarr_python(shape: Shape, chunk: int, dtype: str, codecs: str, seed: int) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a"
        metadata = stored(
            path, payload(shape, dtype, seed), (chunk, 1, shape[2]), compressors=KNOWN[codecs], filters=None
        )
        decoder = ChunkDecoder.of(metadata)
        assert decoder is not None
        oracle = np.asarray(zarr.open_array(path, mode="r")[...])
        buffer = np.empty((chunk, shape[2]), numpy_dtype(dtype))
        buffer.view(np.uint8)[...] = 0xA5
        for start in range(0, shape[0], chunk):
            for layer in range(shape[1]):
                raw = (path / "c" / str(start // chunk) / str(layer) / "0").read_bytes()
                assert len(raw) <= decoder.most_bytes
                decoder.decode_into(raw, buffer)
                expected = padded(oracle[start : start + chunk, layer], chunk)
                np.testing.assert_array_equal(bits(buffer), bits(expected))


def test_real_chunk_compresses_as_measured_and_comes_back() -> None:
    values = activations(512, 1024, seed=3)
    ratios = {}
    names: tuple[Any, ...] = CODECS
    for name in names:
        raw = encode(values, Codec(name=name))
        ratios[name] = values.nbytes / len(raw)
        out = np.empty_like(values)
        decoder(name, 512, 1024).decode_into(bytearray(raw), out)
        np.testing.assert_array_equal(bits(out), bits(values))
    assert 1.40 < ratios["zstd"] < 1.46
    assert 1.25 < ratios["lz4"] < ratios["zstd"]
    assert 0.999 < ratios["none"] < 1


def decoder(name: str, tokens: int, width: int, dtype: str = "bfloat16") -> ChunkDecoder:
    return ChunkDecoder(tokens=tokens, width=width, dtype=numpy_dtype(dtype), blosc=name != "none", crc32c=True)


@pytest.mark.parametrize(
    "changed",
    [
        {"shards": (8, 1, 6)},
        {"filters": (TransposeCodec(order=(1, 0, 2)),)},
        {"compressors": (GzipCodec(),)},
        {"compressors": (ZstdCodec(), CRC)},
        {"compressors": (CRC, BloscCodec())},
        {"compressors": (CRC, CRC)},
        {"serializer": BytesCodec(endian="big"), "dtype": "float32"},
        {"chunks": (4, 2, 6)},
        {"chunks": (4, 1, 3)},
        {"chunk_key_encoding": {"name": "v2", "separator": "/"}},
        {"chunk_key_encoding": {"name": "default", "separator": "."}},
        {"dtype": "int16", "fill_value": 0},
        {"shape": (8, 6), "chunks": (4, 6)},
        {"zarr_format": 2, "dtype": "float32"},
    ],
    ids=lambda changed: " ".join(changed),
)
def test_what_is_not_known_is_left_to_zarr_python(tmp_path: Path, changed: dict[str, Any]) -> None:
    options: dict[str, Any] = {
        "shape": (8, 2, 6),
        "chunks": (4, 1, 6),
        "dtype": "bfloat16",
        "fill_value": float("nan"),
        "compressors": None,
    }
    zarr.create_array(tmp_path / "known", **{**options, "dtype": BFloat16()})
    assert ChunkDecoder.of(json.loads((tmp_path / "known" / "zarr.json").read_text())) is not None
    options |= changed
    zarr.create_array(tmp_path / "a", **{**options, "dtype": zarr_dtype(options["dtype"])})
    metadata = json.loads(next((tmp_path / "a").glob("*z*r*")).read_text())
    assert ChunkDecoder.of(metadata) is None


def test_names_without_configuration_are_known_too() -> None:
    metadata = {
        "zarr_format": 3,
        "shape": [8, 2, 6],
        "data_type": "float32",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [4, 1, 6]}},
        "chunk_key_encoding": "default",
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, "crc32c"],
    }
    assert ChunkDecoder.of(metadata) == decoder("none", 4, 6, "float32")
    assert ChunkDecoder.of({**metadata, "storage_transformers": [{"name": "new"}]}) is None
    assert ChunkDecoder.of({"zarr_format": 3, "node_type": "group"}) is None


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(CODECS), st.integers(0), st.integers(0, 7))
def test_a_flipped_bit_is_an_error(name: Any, position: int, bit: int) -> None:
    raw = bytearray(encode(activations(16, 32, seed=1), Codec(name=name)))
    raw[position % len(raw)] ^= 1 << bit
    with pytest.raises(CorruptError, match="its bytes were changed or cut off: crc32c is"):
        decoder(name, 16, 32).decode_into(raw, np.empty((16, 32), numpy_dtype("bfloat16")))


@pytest.mark.parametrize("name", CODECS)
def test_a_cut_is_an_error_at_any_length(name: Any) -> None:
    raw = encode(activations(16, 32, seed=1), Codec(name=name))
    out = np.empty((16, 32), numpy_dtype("bfloat16"))
    for length in range(len(raw)):
        with pytest.raises(CorruptError, match="cut off"):
            decoder(name, 16, 32).decode_into(raw[:length], out)


def test_without_a_checksum_the_lengths_are_checked() -> None:
    values, out = activations(16, 32, seed=1), np.empty((16, 32), numpy_dtype("bfloat16"))
    body = encode(values, Codec())[:-4]
    plain = ChunkDecoder(tokens=16, width=32, dtype=out.dtype, blosc=True, crc32c=False)
    plain.decode_into(body, out)
    np.testing.assert_array_equal(bits(out), bits(values))
    with pytest.raises(CorruptError, match="less than a Blosc header"):
        plain.decode_into(body[:10], out)
    with pytest.raises(
        CorruptError, match=f"tells of {len(body)} bytes that decode to 1024, where {len(body) - 1} are"
    ):
        plain.decode_into(body[:-1], out)
    short = encode(values[:8], Codec())[:-4]
    with pytest.raises(CorruptError, match=r"decode to 512, .* and a chunk has 1024"):
        plain.decode_into(short, out)
    with pytest.raises(CorruptError, match="it does not decompress"):
        plain.decode_into(body[:16] + b"\xff" * (len(body) - 16), out)
    raw = ChunkDecoder(tokens=16, width=32, dtype=out.dtype, blosc=False, crc32c=False)
    with pytest.raises(CorruptError, match="it holds 1022 bytes of values where a chunk has 1024"):
        raw.decode_into(values.tobytes()[:-2], out)


@pytest.mark.parametrize(
    "out",
    [
        np.empty((16, 32), np.float16),
        np.empty((16, 31), numpy_dtype("bfloat16")),
        np.empty((16, 64), numpy_dtype("bfloat16"))[:, ::2],
    ],
)
def test_a_buffer_that_does_not_fit_is_refused(out: np.ndarray) -> None:
    raw = encode(activations(16, 32, seed=1), Codec())
    with pytest.raises(MisuseError, match="can't hold a chunk of 16 tokens x 32 bfloat16; give a C-contiguous one"):
        decoder("zstd", 16, 32).decode_into(raw, out)


def test_threads_side_by_side_give_the_same_bytes() -> None:
    assert numcodecs.blosc.use_threads is False  # Blosc's own threads would write blocks in any order, and hold the GIL
    values = [activations(256, 2048, seed=1, start=256 * i) for i in range(4)]
    alone = [encode(part, Codec()) for part in values]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(encode, values * 4, [Codec()] * 16)) == alone * 4


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_tensorstore_reads_what_is_encoded(tmp_path: Path, name: Any, dtype: str) -> None:
    codec, values = Codec(name=name), activations(24, 20, seed=5, dtype=dtype)
    stored(tmp_path / "a", np.zeros((24, 1, 20), numpy_dtype(dtype)), (16, 1, 20), **zarr_codecs(codec, dtype))
    for chunk in range(2):
        encoded = encode(padded(values[16 * chunk : 16 * chunk + 16], 16), codec)
        (tmp_path / "a" / "c" / str(chunk) / "0" / "0").write_bytes(encoded)
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(tmp_path / "a")}}
    read = tensorstore.open(spec, open=True).result().read().result()
    np.testing.assert_array_equal(bits(read[:, 0]), bits(values))


@pytest.mark.parametrize(("dtype", "size"), [("int32", 4), ("bool", 1), ("string", 1), ("uint8", 1), ("bfloat16", 2)])
def test_the_small_arrays_are_compressed_too(dtype: str, size: int) -> None:
    blosc, crc = zarr_codecs(Codec(), dtype)["compressors"]
    assert (blosc.typesize, blosc.clevel, blosc.blocksize, crc) == (size, 1, 512 * 1024, CRC)
