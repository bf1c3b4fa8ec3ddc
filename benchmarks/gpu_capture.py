"""The GPU benchmark's rows: a Llama's forward alone, with its rows copied out, and with them written to disk."""

import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from transformers import LlamaConfig, LlamaModel

import capture
import datastore
from benchmarks.gpu_sizes import Sizes
from benchmarks.measure import Row, alternate
from capture import budget as budgets
from capture.components import ComponentTable, find_components
from capture.forward import _Rows, run_batch
from capture.staging import Staging
from datastore.assembly import bits
from datastore.chunkprocesses import prepare
from datastore.codec import encode, encode_pieces
from datastore.schema import Codec, Plan, Rollout

__all__ = ["budget", "captures", "copies", "make_llama"]

PROVENANCE = {"model": {"name": "random-llama"}}
MEMORY = 8 << 30
WARM_BATCHES = 3
PREPARING = 2.0
"""Seconds that the writing processes may import before a capture begins."""


def make_llama(sizes: Sizes, device: torch.device, **changes: Any) -> Any:
    """Return a random decoder in bfloat16."""
    config: Any = LlamaConfig
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model: Any = LlamaModel(config(**{**sizes.llama, **changes}))
    finally:
        torch.set_default_dtype(default)
    return model.eval().requires_grad_(False)


def copies(sizes: Sizes, device: torch.device) -> tuple[list[Row], list[str]]:
    """Rows of all layers of a batch to the host through the slabs, against one pinned copy of as many bytes."""
    if device.type != "cuda":
        return [], ["needs a GPU"]
    width, tokens = sizes.llama["hidden_size"], sizes.batch_tokens
    tensor = torch.randn(1, tokens, width, device=device).to(torch.bfloat16)
    n_bytes = tensor.numel() * 2 * sizes.copy_layers
    there = torch.empty(min(n_bytes, 2 << 30), dtype=torch.uint8, device=device)
    host = torch.empty(there.shape, dtype=torch.uint8, pin_memory=True)

    def pinned() -> None:
        host.copy_(there, non_blocking=True)
        torch.cuda.synchronize()

    with Staging() as staging:

        def staged() -> None:
            for _ in range(4):
                rows = _Rows("bfloat16", [tokens], tokens, staging=staging, n_bytes=n_bytes)
                for layer in range(sizes.copy_layers):
                    rows.take("residual", layer, tensor)
                rows.finish(())
                assert rows.slab is not None
                staging.hand_on(rows.slab, lambda: None)
            staging.flush()

        for task in (pinned, staged, staged):
            task()
        seconds = alternate({"pinned": pinned, "staged": staged}, rounds=sizes.rounds)
    rate, raw = 4 * n_bytes / seconds["staged"] / 1e9, host.numel() / seconds["pinned"] / 1e9
    row = Row(
        what="rows to the host",
        value=rate,
        unit="GB/s",
        rival="one pinned copy",
        rival_value=raw,
        ratio=rate / raw,
        target=0.8,
    )
    return [row], [f"{sizes.copy_layers} layers of {tokens} tokens, {n_bytes / 1e9:.1f} GB a batch"]


def budget(sizes: Sizes, device: torch.device) -> tuple[list[Row], list[str]]:
    """The measured token budget, and what a batch of that size then really takes."""
    model = make_llama(sizes, device)
    table = find_components(model)
    layers = range(table.n_layers)
    small = (sizes.batch_tokens // 8, sizes.batch_tokens // 2)
    found = budgets.measure(model, table, layers=layers, components=["residual"], sizes=small)
    tokens = budgets.batch_tokens(found)
    real = budgets.measure(model, table, layers=layers, components=["residual"], sizes=(tokens // 2, tokens))
    foreseen, taken = found.fixed + found.per_token * tokens, real.fixed + real.per_token * tokens
    row = Row(
        what=f"memory of a batch of {tokens} tokens",
        value=taken / 1e9,
        unit="GB",
        rival=f"foreseen from {small[0]} and {small[1]} tokens",
        rival_value=foreseen / 1e9,
        ratio=taken / max(foreseen, 1.0),
    )
    return [row], [
        f"{found.per_token / 1e6:.3f} MB a token, {found.fixed / 1e6:.0f} MB a batch, budget {tokens} tokens"
    ]


def captures(sizes: Sizes, device: torch.device, root: Path) -> tuple[list[Row], list[str]]:
    """Capture some layers to disk against the bare forward of the same batches, and against the writer alone."""
    model = make_llama(sizes, device)
    table = find_components(model)
    rows, facts = [], [f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f} G parameters, {disk_rate(root)}"]
    for n_layers, batches in sizes.batches.items():
        layers = _spread(n_layers or table.n_layers, table.n_layers)
        found, fact = _one(sizes, device, root, model=model, table=table, layers=layers, batches=batches)
        rows += found
        facts.append(fact)
    return rows, facts


def _spread(n: int, n_layers: int) -> list[int]:
    return sorted({round((i + 1) * n_layers / n) - 1 for i in range(n)})


def _one(
    sizes: Sizes,
    device: torch.device,
    root: Path,
    *,
    model: Any,
    table: ComponentTable,
    layers: Sequence[int],
    batches: int,
) -> tuple[list[Row], str]:
    rollouts = make_rollouts(sizes, batches)
    run = partial(capture.run, model, None, layers=layers, provenance=PROVENANCE, batch_tokens=sizes.batch_tokens)
    few = make_rollouts(sizes, min(batches, WARM_BATCHES))
    _bare(model, few, sizes.batch_tokens, device)()
    run(few, root / "warm.zarr", memory=MEMORY)
    shutil.rmtree(root / "warm.zarr")
    values = _some_rows(model, table, rollouts[0], layers)
    chunks = _chunks(rollouts, table, layers, values=values)
    codec = _plan(root / "none.zarr", rollouts, table, layers, sizes.batch_tokens).codec
    bare = _bare(model, rollouts, sizes.batch_tokens, device)
    seconds = _seconds(sizes, root, bare, captured=partial(run, rollouts, memory=MEMORY), chunks=chunks, codec=codec)
    tokens = sum(r.n_tokens for r in rollouts)
    speed = {name: tokens / s for name, s in seconds.items()}
    target = 0.8 if len(layers) == table.n_layers else 0.95
    lowest = min(("bare", "encoded", "disk"), key=lambda name: speed[name])
    names = {"bare": "bare forward", "encoded": "the encoder alone", "disk": "the disk alone"}
    rivals = {
        "bare forward": speed["bare"],
        f"the lowest of forward, encoder and disk alone: {names[lowest]}": speed[lowest],
    }
    rows = [
        Row(
            what=f"capture of {len(layers)} of {table.n_layers} layers to disk",
            value=speed["captured"],
            unit="tokens/s",
            rival=rival,
            rival_value=theirs,
            ratio=speed["captured"] / theirs,
            target=target,
        )
        for rival, theirs in rivals.items()
    ]
    gb = tokens * len(layers) * table.hidden * 2 / 1e9
    return rows, (
        f"{len(layers)} layers: {tokens} tokens, {gb:.1f} GB raw, capture {gb / seconds['captured']:.2f} GB/s, "
        f"encoder alone {gb / seconds['encoded']:.2f}, files synced by "
        f"as many threads {gb / seconds['disk']:.2f}"
    )


def _seconds(
    sizes: Sizes,
    root: Path,
    bare: Callable[[], None],
    *,
    captured: Callable[[Path], object],
    chunks: Sequence[Any],
    codec: Codec,
) -> dict[str, float]:
    """Median seconds of the bare forward, of a whole capture, and of writing as many rows without a model."""
    stores = iter(root / f"{len(chunks)}-{i}.zarr" for i in range(100))
    last = root / "none"
    bodies = {key: encode(one, codec) for key, one in {id(one): one for one in chunks}.items()}

    def capture_all() -> None:
        nonlocal last
        last = next(stores)
        captured(last)

    def clear() -> None:
        shutil.rmtree(last, ignore_errors=True)
        os.sync()
        if torch.cuda.is_available():
            prepare(compiled=True)  # which loading a model hides
            time.sleep(PREPARING)

    def encoded() -> None:
        _in_threads(lambda one: encode_pieces(one, codec)[1], chunks)

    def disk() -> None:
        nonlocal last
        last = next(stores)
        last.mkdir()
        _in_threads(lambda i: _write_synced(last / str(i), bodies[id(chunks[i])]), range(len(chunks)))

    tasks = {"bare": bare, "captured": capture_all, "encoded": encoded, "disk": disk}
    seconds = alternate(tasks, rounds=min(2, sizes.rounds), before=clear)
    clear()
    return seconds


def _in_threads(call: Callable[[Any], object], given: Sequence[Any]) -> None:
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(call, given))


def _chunks(
    rollouts: Sequence[Rollout], table: ComponentTable, layers: Sequence[int], *, values: dict[int, Any]
) -> list[Any]:
    """As many chunks as the capture has, one array for each layer given again and again."""
    tokens = sum(r.n_tokens for r in rollouts)
    (size,) = _plan(Path("none.zarr"), rollouts, table, layers, tokens).chunk_tokens.values()
    one = {layer: np.resize(bits(rows), (size, table.hidden)).view(rows.dtype) for layer, rows in values.items()}
    return [one[layer] for layer in layers] * -(-tokens // size)


def _write_synced(path: Path, body: bytes) -> None:
    with path.open("wb") as file:
        file.write(body)
        file.flush()
        os.fsync(file.fileno())


def make_rollouts(sizes: Sizes, batches: int) -> list[Rollout]:
    """Rollouts of half to the whole length, as many as fill the batches."""
    random = np.random.default_rng(0)
    count = batches * sizes.batch_tokens // sizes.rollout_tokens
    lengths = random.integers(sizes.rollout_tokens * 3 // 4, sizes.rollout_tokens, count)
    vocab = sizes.llama["vocab_size"]
    return [
        Rollout(rollout_id=str(i), token_ids=random.integers(3, vocab, n, np.int32), prompt_end=int(n) // 4)
        for i, n in enumerate(lengths)
    ]


def _plan(store: Path, rollouts: Sequence[Rollout], table: ComponentTable, layers: Sequence[int], tokens: int) -> Plan:
    (plan,) = datastore.plan(
        store,
        rollouts,
        layers=layers,
        components=table.specs(("residual",), layers),
        provenance=PROVENANCE,
        batch_tokens=tokens,
    )
    return plan


def _bare(model: Any, rollouts: Sequence[Rollout], tokens: int, device: torch.device) -> Callable[[], None]:
    table = find_components(model)
    plan = _plan(Path("none.zarr"), rollouts, table, [0], tokens)
    batches = []
    for batch in plan.batches:
        ids = [torch.from_numpy(plan.tokens(batch, name).astype(np.int64)) for name in batch.members]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(one) for one in ids], batch_first=True)
        places = torch.arange(padded.shape[1]).expand_as(padded)
        batches.append((padded, mask, places))

    def run() -> None:
        with torch.inference_mode():
            for padded, mask, places in batches:
                model(
                    input_ids=padded.to(device),
                    attention_mask=mask.to(device),
                    position_ids=places.to(device),
                    use_cache=False,
                )
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def _some_rows(model: Any, table: ComponentTable, rollout: Rollout, layers: Sequence[int]) -> dict[int, Any]:
    """Real rows of one rollout, repeated to any length: they compress as rows do."""
    found: dict[int, Any] = {}

    def put(component: str, layer: int, rollout_id: str, values: Any, *, start: int) -> None:
        found[layer] = np.array(values)

    run_batch(model, table, [("0", rollout.token_ids)], layers=layers, components=["residual"], put=put)
    return {layer: np.concatenate([rows, rows]).astype(ml_dtypes.bfloat16, copy=False) for layer, rows in found.items()}


def disk_rate(root: Path, *, n_bytes: int = 2 << 30) -> str:
    """Write a file and sync it: what the disk takes."""
    if not torch.cuda.is_available():
        n_bytes = 1 << 24
    block, path = os.urandom(1 << 24), root / "raw"
    began = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(n_bytes >> 24):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    rate = n_bytes / (time.perf_counter() - began) / 1e9
    path.unlink()
    return f"the disk takes {rate:.2f} GB/s from one writer"
