"""`python -m benchmarks.store`: writing and reading a store against encoder, decoder, raw files and the .pt path.

Data: realistic bfloat16 activations of width 7168 on 9 layers, rollouts of about 2,000 tokens, 4.2 GB before
compression. Rates are GB/s of those bytes. Every rival is measured alone, in the same rounds.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs.blosc import Blosc
from numpy.typing import NDArray

import datastore
from benchmarks.measure import Row, alternate, chill, peak_rss, read_bytes, show, size_of
from datastore import layout, storage
from datastore.codec import ChunkDecoder, encode, encode_pieces
from datastore.schema import Codec, ComponentSpec, Plan, Rollout
from tests.synthetic import activations

WIDTH, LAYERS, ROLLOUTS, TOKENS = 7168, tuple(range(10, 55, 5)), 16, 2048
ROUNDS = 3
CPUS = len(os.sched_getaffinity(0))


@dataclass(frozen=True, slots=True, eq=False)
class Data:
    """Rollouts and the rows of one layer, which every layer holds."""

    rollouts: tuple[Rollout, ...]
    rows: NDArray[Any]

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer."""
        return int(self.rows.nbytes)

    @property
    def all_bytes(self) -> int:
        """Bytes of all layers."""
        return self.layer_bytes * len(LAYERS)


def make_data(rollouts: int = ROLLOUTS) -> Data:
    """Make rollouts of 2,001 to 2,096 tokens and their rows."""
    counts = [TOKENS - 47 + 13 * i for i in range(rollouts)]
    made = tuple(
        Rollout(rollout_id=str(i), token_ids=np.arange(n, dtype=np.int32), prompt_end=n // 2)
        for i, n in enumerate(counts)
    )
    return Data(made, activations(sum(counts), WIDTH, seed=7))


def plan_of(store: Path, data: Data, *, statistics: bool, codec: str = "zstd") -> Plan:
    """Plan a capture of all layers."""
    component = ComponentSpec(name="residual", width=WIDTH, dtype="bfloat16")
    (plan,) = datastore.plan(
        store,
        data.rollouts,
        layers=LAYERS,
        components=[component],
        batch_tokens=4 * TOKENS,
        statistics=statistics,
        codec=Codec(name=codec),  # type: ignore[arg-type]
    )
    return plan


def write(store: Path, data: Data, *, statistics: bool, memory: int = 1 << 30, codec: str = "zstd") -> None:
    """Write all rows through the writer, as a capture does: batch by batch, layer by layer."""
    plan = plan_of(store, data, statistics=statistics, codec=codec)
    with datastore.create(store, plan, memory=memory) as writer:
        for batch in plan.batches:
            for layer in LAYERS:
                for name in batch.stored:
                    writer.put("residual", layer, name, rows_of(plan, data, name), copy=False)
        writer.commit()


def rows_of(plan: Plan, data: Data, name: str) -> NDArray[Any]:
    """Return the rows of a rollout."""
    start, stop = plan.ragged.range(plan.rows[name])
    return data.rows[start:stop]


def chunks_of(data: Data, tokens: int) -> Iterator[NDArray[Any]]:
    """Yield the whole chunks of all layers, the last one of each layer padded."""
    for _ in LAYERS:
        for index in range(layout.n_chunks(len(data.rows), tokens)):
            piece = data.rows[index * tokens : (index + 1) * tokens]
            if len(piece) < tokens:
                padded = np.full((tokens, WIDTH), np.nan, dtype=data.rows.dtype)
                padded[: len(piece)] = piece
                piece = padded
            yield piece


def encode_all(data: Data, codec: Codec) -> list[bytes]:
    """Encode every chunk on all cores and keep the result."""
    with ThreadPoolExecutor(CPUS) as pool:
        return list(pool.map(lambda c: encode(c, codec), chunks_of(data, layout.chunk_tokens(WIDTH, 2))))


def encoded_bytes(data: Data, codec: Codec) -> int:
    """Encode every chunk on all cores and keep only the sizes: nothing but the encoder."""
    with ThreadPoolExecutor(CPUS) as pool:
        chunks = chunks_of(data, layout.chunk_tokens(WIDTH, 2))
        return sum(pool.map(lambda c: sum(map(len, encode_pieces(c, codec))), chunks))


def blosc_bytes(data: Data) -> int:
    """Encode every chunk as Blosc itself does: the frames that zarr-python writes with the same codec list."""
    codec = Codec()
    blosc = Blosc(cname=codec.name, clevel=codec.level, shuffle=1, blocksize=codec.blocksize, typesize=2)
    with ThreadPoolExecutor(CPUS) as pool:
        chunks = chunks_of(data, layout.chunk_tokens(WIDTH, 2))
        return sum(pool.map(lambda c: len(blosc.encode(c.reshape(-1).view(np.uint8))), chunks))


def write_raw(directory: Path, encoded: list[bytes]) -> None:
    """Write encoded chunks as plain files and bring them to disk."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    for i, one in enumerate(encoded):
        (directory / str(i)).write_bytes(one)
    storage.sync_files(directory)


def save_pt(directory: Path, data: Data) -> None:
    """Write one .pt file a rollout, as users do, each tensor owning its rows, and bring them to disk."""
    import torch

    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    start = 0
    for one in data.rollouts:
        rows = torch.from_numpy(data.rows[start : start + one.n_tokens].view(np.uint16)).view(torch.bfloat16)
        start += one.n_tokens
        layers = {layer: {"residual": rows.clone()} for layer in LAYERS}
        torch.save({"prompt": {"activations": layers}}, directory / f"{one.rollout_id}.pt")
    storage.sync_files(directory)


def load_pt(directory: Path) -> int:
    """Load every file whole, as users do, and touch one layer."""
    import torch

    total = 0
    for file in sorted(directory.glob("*.pt")):
        values = torch.load(file, weights_only=True)["prompt"]["activations"][LAYERS[4]]["residual"]
        total += int(values.view(torch.uint16)[:, 0].sum(dtype=torch.int64))
    return total


# -- the rows of the table ---------------------------------------------------------------------------------------------


def bench_writing(root: Path, data: Data) -> list[Row]:
    """Writer without and with statistics, against the encoder and raw files; torch.save beside them."""
    encoded = encode_all(data, Codec())

    def fresh(name: str, work: Callable[[Path], None]) -> Callable[[], None]:
        def run() -> None:
            shutil.rmtree(root / name, ignore_errors=True)
            shutil.rmtree(root / f"{name}.plans", ignore_errors=True)
            work(root / name)

        return run

    seconds = alternate(
        {
            "encode": lambda: encode_all(data, Codec()),
            "discard": lambda: encoded_bytes(data, Codec()),
            "raw": lambda: write_raw(root / "raw", encoded),
            "plain": fresh("plain.zarr", lambda p: write(p, data, statistics=False)),
            "statistics": fresh("run.zarr", lambda p: write(p, data, statistics=True)),
            "pt": lambda: save_pt(root / "pt", data),
        },
        rounds=ROUNDS,
        before=lambda: storage.sync_files(root),
    )
    rate = {name: data.all_bytes / s / 1e9 for name, s in seconds.items()}
    slower = min("encode", "raw", key=rate.__getitem__)
    named = {"encode": "encoder on all cores, output kept", "raw": "raw write + sync of the compressed bytes"}[slower]
    limit = rate[slower]
    return [
        _rate("writer without statistics", rate["plain"], named, limit, 0.8),
        _rate("writer with statistics", rate["statistics"], named, limit, 0.5),
        _rate("writer without statistics", rate["plain"], "encoder whose output is thrown away", rate["discard"]),
        _rate("writer with statistics", rate["statistics"], "encoder whose output is thrown away", rate["discard"]),
        _rate("writer with statistics", rate["statistics"], "torch.save + sync", rate["pt"]),
        _rate("encoder on all cores", rate["encode"], "raw write + sync of the compressed bytes", rate["raw"]),
    ]


def bench_reading(root: Path, data: Data) -> list[Row]:
    """`.blocks()` over one layer, warm and cold, and the bytes that one rollout costs."""
    store = datastore.open(root / "run.zarr")
    array = root / "run.zarr" / "captures" / "0001" / "residual"
    index = 4
    files = sorted((file for file in array.glob(f"c/*/{index}/0")), key=lambda f: int(f.parts[-3]))
    flat = root / "layer.raw"
    data.rows.view(np.uint16).tofile(flat)
    storage.sync_files(root)
    decoder = ChunkDecoder.of(storage.array_metadata(array))
    assert decoder is not None

    def stream() -> None:
        for _ in store.blocks("residual", layers=LAYERS[index]):
            pass

    encoded = [file.read_bytes() for file in files]
    tasks = {
        "blocks": stream,
        "decode": lambda: decode_all(decoder, encoded, data.rows.dtype),
        "raw": lambda: [file.read_bytes() for file in files],
        "pt": lambda: load_pt(root / "pt"),
    }
    warm = {n: data.layer_bytes / s / 1e9 for n, s in alternate(tasks, rounds=2 * ROUNDS + 1).items()}
    cold_tasks = {"blocks": stream, "memmap": lambda: int(np.memmap(flat, dtype=np.uint16).sum(dtype=np.uint64))}
    cold = alternate(cold_tasks, rounds=2 * ROUNDS + 1, before=lambda: chill([array, flat]))
    cold = {n: data.layer_bytes / s / 1e9 for n, s in cold.items()}
    slower = min("decode", "raw", key=warm.__getitem__)
    named = {"decode": "decoder on all cores", "raw": "raw read of the compressed bytes"}[slower]
    return [
        _rate(".blocks() of one layer, warm", warm["blocks"], named, warm[slower], 0.8),
        _rate(".blocks() of one layer, cold", cold["blocks"], "raw memmap of the same rows", cold["memmap"], 0.9),
        _rate(".blocks() of one layer, warm", warm["blocks"], ".pt files loaded whole", warm["pt"]),
        _one_rollout(root),
    ]


def decode_all(decoder: ChunkDecoder, encoded: list[bytes], dtype: np.dtype[Any]) -> None:
    """Decode chunks on all cores, each thread into a buffer of its own that is used again."""

    def work(mine: list[bytes]) -> None:
        out = np.empty((decoder.tokens, decoder.width), dtype)
        for one in mine:
            decoder.decode_into(one, out)

    with ThreadPoolExecutor(CPUS) as pool:
        list(pool.map(work, [encoded[i::CPUS] for i in range(CPUS)]))


def _one_rollout(root: Path) -> Row:
    """Bytes read for one rollout and layer against its share of the compressed bytes."""
    store = datastore.open(root / "run.zarr")
    array = root / "run.zarr" / "captures" / "0001" / "residual"
    tokens = int(store.rollouts["n_tokens"].loc["3"])
    share = size_of(array / "c") / len(LAYERS) * tokens / int(store.rollouts["n_tokens"].sum())
    lazy = store.select("residual", rollouts="3", layers=LAYERS[4])
    before = read_bytes()
    lazy.load()
    read = read_bytes() - before
    return Row(
        what=f"bytes read for one rollout of {tokens} tokens on one layer",
        value=read / 1e6,
        unit="MB",
        rival="its compressed bytes",
        rival_value=share / 1e6,
        ratio=read / share,
        target=1.5,
        at_most=True,
    )


def bench_codecs(data: Data) -> list[Row]:
    """Encode rates and ratios of the codecs, each against zstd, and zstd against Blosc's own frames of it."""
    codecs = {"zstd": Codec(name="zstd"), "lz4": Codec(name="lz4"), "none": Codec(name="none")}
    tasks = {name: partial(encoded_bytes, data, codec) for name, codec in codecs.items()}
    seconds = alternate({**tasks, "blosc": partial(blosc_bytes, data)}, rounds=ROUNDS)
    sizes = {name: encoded_bytes(data, codec) for name, codec in codecs.items()}
    rows = []
    for name in codecs:
        rate, zstd = data.all_bytes / seconds[name] / 1e9, data.all_bytes / seconds["zstd"] / 1e9
        what = f"encoder {name}, {data.all_bytes / sizes[name]:.3f} x smaller"
        rows.append(_rate(what, rate, "encoder zstd", zstd))
    own = f"Blosc's own frames, {data.all_bytes / blosc_bytes(data):.3f} x smaller"
    rows.append(_rate("encoder zstd", zstd, own, data.all_bytes / seconds["blosc"] / 1e9))
    return rows


def bench_memory(root: Path) -> list[Row]:
    """Peak memory of a process that writes, and of one that streams, a store twice its allowance."""
    rows = []
    for what in ("write", "stream"):
        peak = peak_rss("benchmarks.store", what, str(root / "memory.zarr"))
        rows.append(
            Row(
                what=f"peak memory, {what} 2.1 GB with memory=1GB",
                value=peak / 1e9,
                unit="GB",
                rival="the allowance",
                rival_value=1.0,
                ratio=peak / 1e9,
                target=1.0,
                at_most=True,
            )
        )
    return rows


def write_bounded(store: Path) -> None:
    """Write 2.1 GB with an allowance of 1 GB, making rows a rollout at a time."""
    counts = [TOKENS - 47 + 13 * i for i in range(ROLLOUTS)]
    made = tuple(Rollout(rollout_id=str(i), token_ids=np.arange(n, dtype=np.int32)) for i, n in enumerate(counts))
    data = Data(made, np.empty((0, WIDTH), dtype=np.float32))
    plan = plan_of(store, data, statistics=True)
    with datastore.create(store, plan, memory=10**9) as writer:
        for layer in LAYERS:
            for name in [r.rollout_id for r in plan.rollouts]:
                start, stop = plan.ragged.range(plan.rows[name])
                writer.put("residual", layer, name, activations(stop - start, WIDTH, seed=7, start=start))
        writer.commit()


def stream_bounded(store: Path) -> None:
    """Stream all layers with an allowance of 1 GB."""
    total = 0
    for block in datastore.open(store).blocks("residual", layers=list(LAYERS), memory=10**9):
        total += int(block.values.view(np.uint16)[0, 0])


def _rate(what: str, value: float, rival: str, rival_value: float, target: float | None = None) -> Row:
    return Row.of(what, value, "GB/s", rival, rival_value, target)


def main(arguments: list[str]) -> None:
    """Run the benchmark, or one half of the memory measurement in a process of its own."""
    if arguments[:1] == ["write"]:
        write_bounded(Path(arguments[1]))
        return
    if arguments[:1] == ["stream"]:
        stream_bounded(Path(arguments[1]))
        return
    with tempfile.TemporaryDirectory(prefix="bench-store-", dir=os.environ.get("BENCH_DIR")) as directory:
        root, data = Path(directory), make_data()
        rows = [*bench_writing(root, data), *bench_reading(root, data), *bench_codecs(data)]
        del data
        rows += bench_memory(root)
    show(f"store, {CPUS} cores", rows, as_json="--json" in arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
