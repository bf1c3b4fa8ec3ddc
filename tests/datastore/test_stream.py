"""Streaming chunks. Oracle: the NumPy array that was stored, and zarr-python reading it."""

import itertools
import json
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import GzipCodec
from zarr.dtype import data_type_registry

from datastore.codec import ChunkDecoder, zarr_codecs
from datastore.dtype import BFloat16, zarr_dtype
from datastore.errors import CorruptError, MisuseError
from datastore.schema import Codec
from datastore.stream import Block, Source, blocks, map_blocks
from tests.synthetic import activations

data_type_registry.register("bfloat16", BFloat16)  # as the entry point does

N_TOKENS, LAYERS, WIDTH, CHUNK = 45, (3, 7), 16, 8
N_CHUNKS = 6
MEMORY = 1 << 20


class Stored:
    """An array on disk and the values it holds."""

    def __init__(self, path: Path, *, chunk: int = CHUNK, dtype: str = "bfloat16", codecs: Any = None) -> None:
        self.path = path
        self.values = activations(N_TOKENS * 2, WIDTH, seed=1, dtype=dtype).reshape(N_TOKENS, 2, WIDTH)
        array = zarr.create_array(
            path,
            shape=self.values.shape,
            chunks=(chunk, 1, WIDTH),
            dtype=zarr_dtype(dtype),
            fill_value=float("nan"),
            **(codecs or zarr_codecs(Codec(), dtype)),
        )
        array[...] = self.values
        self.array = array
        self.chunk = chunk
        self.decoder = ChunkDecoder.of(json.loads((path / "zarr.json").read_text()))
        self.reads: list[slice] = []

    def read(self, layer_index: int, tokens: slice) -> Any:
        self.reads.append(tokens)
        return np.asarray(self.array[tokens, layer_index])

    def source(self, chunk: int, layer_index: int = 0, **changed: Any) -> Source:
        stop = min(N_TOKENS - chunk * self.chunk, self.chunk)
        options: dict[str, Any] = {"rows": slice(0, stop), "decoder": self.decoder, "read": self.read, **changed}
        return Source(
            path=self.path,
            capture=2,
            component="residual",
            layer=LAYERS[layer_index],
            layer_index=layer_index,
            chunk=chunk,
            tokens=self.chunk,
            width=WIDTH,
            dtype=self.values.dtype,
            **options,
        )

    def all(self, **changed: Any) -> list[Source]:
        n_chunks = -(-N_TOKENS // self.chunk)
        return [self.source(chunk, layer, **changed) for layer in range(2) for chunk in range(n_chunks)]

    def wanted(self, block: Block) -> Any:
        return self.values[block.tokens, LAYERS.index(block.layer)]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    return Stored(tmp_path_factory.mktemp("stream") / "residual")


@pytest.fixture
def broken(tmp_path: Path) -> Stored:
    return Stored(tmp_path / "residual")


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert [one.name for one in threading.enumerate() if one.name.startswith("chunk")] == []


def same_bits(found: Any, expected: Any) -> None:
    assert found.dtype == expected.dtype
    item = f"u{expected.itemsize}"
    np.testing.assert_array_equal(np.ascontiguousarray(found).view(item), np.ascontiguousarray(expected).view(item))


@pytest.mark.parametrize("decoded", [True, False], ids=["decoder", "zarr-python"])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_layer_after_the_other_comes_in_order(kept: Stored, threads: int, decoded: bool) -> None:
    sources = kept.all() if decoded else kept.all(decoder=None)
    places = []
    for block in blocks(sources, memory=MEMORY, threads=threads):
        same_bits(block.values, kept.wanted(block))
        places.append((block.capture, block.component, block.layer, block.tokens.start, block.tokens.stop))
    starts = range(0, N_TOKENS, CHUNK)
    assert places == [(2, "residual", layer, s, min(s + CHUNK, N_TOKENS)) for layer in LAYERS for s in starts]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_other_dtypes(tmp_path: Path, dtype: str) -> None:
    stored, rows = Stored(tmp_path / "a", dtype=dtype), 0
    for block in blocks(stored.all(), memory=MEMORY):
        same_bits(block.values, stored.wanted(block))
        rows += len(block.values)
    assert rows == 2 * N_TOKENS


def test_an_array_with_another_codec_goes_through_zarr_python(tmp_path: Path) -> None:
    stored = Stored(tmp_path / "a", codecs={"compressors": (GzipCodec(level=1),)})
    assert stored.decoder is None
    for block in blocks(stored.all(), memory=MEMORY):
        same_bits(block.values, stored.wanted(block))
    assert len(stored.reads) == 2 * N_CHUNKS


runs = st.tuples(st.integers(0, CHUNK - 1), st.integers(1, CHUNK)).map(lambda x: slice(x[0], min(CHUNK, x[0] + x[1])))
picks = st.lists(
    st.tuples(st.integers(0, N_CHUNKS - 2), st.integers(0, 1), st.lists(runs, min_size=1, max_size=3), st.booleans()),
    max_size=12,
)


@settings(deadline=None)
@given(picks, st.integers(1, 3), st.integers(1000, 5000))
def test_any_rows_of_any_chunks(kept: Stored, picked: Any, threads: int, memory: int) -> None:
    sources = [
        kept.source(chunk, layer, rows=tuple(rows), **({} if decoded else {"decoder": None}))
        for chunk, layer, rows, decoded in picked
    ]
    expected = [
        (LAYERS[layer], chunk * CHUNK + one.start, chunk * CHUNK + one.stop)
        for chunk, layer, rows, _ in picked
        for one in rows
    ]
    found = []
    for block in blocks(sources, memory=memory, threads=threads):
        same_bits(block.values, kept.wanted(block))
        found.append((block.layer, block.tokens.start, block.tokens.stop))
    assert found == expected
    mapped = list(map_blocks(lambda block: block.values.copy(), sources, memory=memory, threads=threads))
    assert [(span.layer, span.tokens.start, span.tokens.stop) for span, _ in mapped] == expected
    for span, values in mapped:
        same_bits(values, kept.values[span.tokens, LAYERS.index(span.layer)])


def test_neighbours_of_a_chunk_are_read_once(kept: Stored) -> None:
    kept.reads.clear()
    sources = [
        kept.source(1, rows=slice(2, 4), decoder=None),
        kept.source(1, rows=(slice(5, 6), slice(0, 3)), decoder=None),
        kept.source(2, rows=slice(0, 1), decoder=None),
    ]
    tokens = [block.tokens for block in blocks(sources, memory=MEMORY, threads=1)]
    assert tokens == [slice(10, 12), slice(13, 14), slice(8, 11), slice(16, 17)]
    assert kept.reads == [slice(8, 14), slice(16, 17)]


def test_functions_run_in_the_decoding_threads(kept: Stored) -> None:
    names = {name for _, name in map_blocks(lambda _: threading.current_thread().name, kept.all(), memory=MEMORY)}
    assert all(name.startswith("chunk") for name in names)


def test_buffers_are_used_again(kept: Stored) -> None:
    seen = [block.values.ctypes.data for block in blocks(kept.all() * 3, memory=MEMORY, threads=2)]
    assert len(set(seen)) <= 2 + 2 < len(seen)
    assert all(address % 64 == 0 for address in seen)


def test_memory_stays_within_the_allowance(tmp_path: Path) -> None:
    shape, chunk = (2048, 1, 1024), 64
    values = np.random.default_rng(0).integers(0, 1 << 16, shape, np.uint16).view(np.float16)  # does not compress
    array = zarr.create_array(
        tmp_path / "a", shape=shape, chunks=(chunk, 1, 1024), dtype="float16", **zarr_codecs(Codec(), "float16")
    )
    array[...] = values
    decoder = ChunkDecoder.of(json.loads((tmp_path / "a" / "zarr.json").read_text()))
    sources = [
        Source(
            path=tmp_path / "a",
            capture=1,
            component="residual",
            layer=0,
            layer_index=0,
            chunk=index,
            tokens=chunk,
            width=1024,
            dtype=values.dtype,
            rows=slice(0, chunk),
            decoder=decoder,
        )
        for index in range(32)
    ]
    for memory in (600_000, 2_000_000):
        tracemalloc.start()
        n_tokens = sum(len(block.values) for block in blocks(sources, memory=memory, threads=16))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert n_tokens == 2048
        assert sources[0].nbytes * 2 < peak < memory + 100_000  # the rest is what Python needs for threads and futures


def test_chunks_of_several_sizes_share_the_allowance(tmp_path: Path) -> None:
    small, large = (Stored(tmp_path / str(chunk), chunk=chunk, dtype="float64") for chunk in (8, 32))
    sources = [*small.all(), *large.all(), *small.all(), *large.all()]
    memory = 2 * large.source(0).nbytes + 256  # one large chunk, once the small buffers are given up for it
    found = [(block.values.copy(), block) for block in blocks(sources, memory=memory, threads=1)]
    assert len(found) == len(sources)
    for values, block in found:
        same_bits(values, small.wanted(block))


def test_a_slow_caller_is_waited_for(kept: Stored) -> None:
    kept.reads.clear()
    ahead = threading.Event()

    def read(layer_index: int, tokens: slice) -> Any:
        if tokens.start:
            ahead.set()
        return kept.read(layer_index, tokens)

    sources = (kept.source(chunk % (N_CHUNKS - 1), decoder=None, read=read) for chunk in itertools.count())
    stream = blocks(sources, memory=MEMORY, threads=2)
    for taken in range(1, 20):
        same_bits((block := next(stream)).values, kept.wanted(block))
        assert ahead.wait(10)
        assert len(kept.reads) <= taken + 2 + 1  # threads, and one decoded ahead
    stream.close()


def test_an_endless_stream_can_be_left(kept: Stored) -> None:
    endless = (kept.source(index % 2) for index in itertools.count())
    for block, _ in zip(blocks(endless, memory=MEMORY, threads=3), range(5), strict=False):
        same_bits(block.values, kept.wanted(block))
    mapped = map_blocks(
        lambda block: len(block.values), (kept.source(index % 2) for index in itertools.count()), memory=MEMORY
    )
    assert next(mapped)[1] == CHUNK
    mapped.close()


def test_no_sources_no_blocks() -> None:
    assert list(blocks([], memory=1)) == []
    assert list(map_blocks(len, [], memory=1)) == []  # type: ignore[arg-type]


def test_a_missing_chunk_is_an_error_in_its_place(broken: Stored) -> None:
    file = broken.source(3).file
    file.unlink()
    stream = blocks(broken.all(), memory=MEMORY, threads=4)
    for chunk in range(3):
        assert next(stream).tokens.start == chunk * CHUNK
    message = (
        r"chunk 3 \(from token 24\) of residual layer 3 in capture 2, .*residual/c/3/0/0, is missing; "
        "no value is made up for it: run `verify --repair`"
    )
    with pytest.raises(CorruptError, match=message):
        next(stream)
    assert next(stream, None) is None


def test_a_changed_or_cut_chunk_is_an_error_in_its_place(broken: Stored) -> None:
    file = broken.source(2).file
    good = file.read_bytes()
    for bad in (good[:-1], b"", good + b"x" * 4096, good[:40] + bytes([good[40] ^ 1]) + good[41:]):
        file.write_bytes(bad)
        stream = map_blocks(lambda block: block.tokens, broken.all(), memory=MEMORY)
        assert [next(stream)[1].start, next(stream)[1].start] == [0, 8]
        with pytest.raises(CorruptError, match=r"chunk 2 \(from token 16\) of residual layer 3 .* can't be used: it"):
            next(stream)


def test_a_capture_that_is_gone_says_so(broken: Stored) -> None:
    sources = broken.all()
    broken.path.rename(broken.path.with_name("elsewhere"))
    with pytest.raises(CorruptError, match=r"chunk 0 .* is gone with its capture; open the store again"):
        next(blocks(sources, memory=MEMORY))


def test_what_a_function_raises_is_raised_in_its_place(kept: Stored) -> None:
    stream = map_blocks(lambda block: 1 // (16 - block.tokens.start), kept.all(), memory=MEMORY)
    assert [next(stream)[1], next(stream)[1]] == [0, 0]
    with pytest.raises(ZeroDivisionError):
        next(stream)


def test_what_the_sources_raise_is_raised(kept: Stored) -> None:
    def sources() -> Iterator[Source]:
        yield kept.source(0)
        raise ZeroDivisionError("the list ended badly")

    with pytest.raises(ZeroDivisionError, match="the list ended badly"):
        list(blocks(sources(), memory=MEMORY))


def test_a_reader_that_returns_something_else_is_refused(kept: Stored) -> None:
    source = kept.source(1, decoder=None, read=lambda _, tokens: np.zeros((3, WIDTH), np.float32))
    with pytest.raises(
        CorruptError, match=r"was read as \(3, 16\) float32 where 8 tokens x 16 bfloat16 were asked for"
    ):
        next(blocks([source], memory=MEMORY))


def test_too_little_memory_names_what_is_needed(kept: Stored) -> None:
    needed = 2 * CHUNK * WIDTH * 2 + 256
    assert len(list(blocks(kept.all(), memory=needed, threads=4))) == 2 * N_CHUNKS
    with pytest.raises(MisuseError, match=f"needs {needed} bytes to be read, but the allowance is {needed - 1};"):
        next(blocks(kept.all(), memory=needed - 1))


@pytest.mark.parametrize("rows", [slice(0, 0), slice(0, 9), slice(-1, 3), slice(3, 2), slice(0, 4, 2)])
def test_rows_outside_the_chunk_are_refused(kept: Stored, rows: slice) -> None:
    with pytest.raises(
        MisuseError, match=r"has no rows slice\(.*; give slice\(start, stop\) with 0 <= start < stop <= 8"
    ):
        kept.source(0, rows=rows)


def test_a_source_needs_a_fitting_way_to_be_read(kept: Stored) -> None:
    with pytest.raises(MisuseError, match="has neither a decoder nor a reader; give one of them"):
        kept.source(0, decoder=None, read=None)
    other = ChunkDecoder(tokens=CHUNK, width=WIDTH + 1, dtype=kept.values.dtype, blosc=True, crc32c=True)
    with pytest.raises(MisuseError, match=r"but its decoder is for .*17.*; take both from the same array"):
        kept.source(0, decoder=other)
