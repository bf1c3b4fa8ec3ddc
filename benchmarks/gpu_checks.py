"""The GPU benchmark's checks: the paths that only a GPU has give the rows that the plain ones give."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaModel

import capture
import datastore
from benchmarks.measure import Row
from capture.components import find_components
from capture.experts import Int4Experts
from capture.forward import Halved, run_batch
from capture.staging import Staging
from datastore.schema import Rollout

__all__ = ["checks"]

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
"""On a CPU, whose bfloat16 is a hundred times slower."""


def checks(device: torch.device) -> tuple[list[Row], list[str]]:
    """Run them all.

    Raises
    ------
    RuntimeError
        One of them fails.
    """
    done = [_experts(device), _staging(device), _stored(device)]
    if device.type == "cuda":
        done.append(_memory(device))
    return [], done


def _experts(device: torch.device) -> str:
    module = Int4Experts(16, 512, 256, device=device)
    for name, buffer in module.named_buffers():
        if name.endswith("packed"):
            buffer.random_(-(1 << 31), (1 << 31) - 1)
        else:
            buffer.uniform_(0.002, 0.02)
    worst, routings = 0.0, 0
    for tokens in (1, 3, 70, 700, 3000) if device.type == "cuda" else (1, 3, 70):
        for few in (4, 5, 16):
            x = torch.randn(tokens, 512, device=device, dtype=torch.bfloat16)
            index = torch.rand(tokens, few, device=device).argsort(1)[:, :4] + (16 - few) // 2
            weights = torch.rand(tokens, 4, device=device)
            results = []
            for direct in (True, False):
                module.direct = direct
                results.append(module(x, index, weights).double())
            routings += 1
            worst = max(worst, float((results[0] - results[1]).norm() / results[1].norm()))
    if not worst < 1e-2:
        raise RuntimeError(f"INT4 products are {worst} from the weights multiplied out")
    return f"INT4 products are within {worst:.1e} of the weights multiplied out, {routings} routings"


def _llama(device: torch.device) -> Any:
    config: Any = LlamaConfig
    torch.manual_seed(0)
    size = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    model: Any = LlamaModel(config(**(size if device.type == "cuda" else SMALL), num_hidden_layers=4, vocab_size=500))
    return model.to(device, torch.bfloat16).eval()


def _rows(model: Any, batch: Any, staging: Staging | None, halved: list[Halved] | None = None) -> dict[Any, Any]:
    table, rows = find_components(model), dict[Any, Any]()

    def put(component: str, layer: int, rollout_id: str, values: Any, *, start: int) -> None:
        rows[component, layer, rollout_id, start] = np.array(values)

    run_batch(
        model,
        table,
        batch,
        layers=range(4),
        components=["residual", "mlp_out"],
        put=put,
        staging=staging,
        on_halve=(halved if halved is not None else []).append,
    )
    return rows


def _batch(lengths: Any) -> list[tuple[str, Any]]:
    random = np.random.default_rng(0)
    return [(str(i), random.integers(3, 500, n)) for i, n in enumerate(lengths)]


def _staging(device: torch.device) -> str:
    model, batches = _llama(device), [_batch([50, 71, 20]), _batch([64, 64]), _batch([200]), _batch(range(1, 40))] * 4
    plain = [_rows(model, batch, None) for batch in batches]
    with Staging() as staging:
        staged = [_rows(model, batch, staging) for batch in batches]
    for a, b in zip(plain, staged, strict=True):
        if a.keys() != b.keys() or any(not np.array_equal(a[k].view(np.uint16), b[k].view(np.uint16)) for k in a):
            raise RuntimeError("rows that went through the slabs are not the same bits")
    return f"rows through the slabs are the same bits, {len(batches)} batches"


def _stored(device: torch.device) -> str:
    """A whole capture, whose writer lags behind the model: what lies in the store is what the forwards gave."""
    model, random, count = _llama(device), np.random.default_rng(1), 160 if device.type == "cuda" else 12
    rollouts = [
        Rollout(rollout_id=str(i), token_ids=random.integers(3, 500, n, np.int32), prompt_end=n // 2)
        for i, n in enumerate(random.integers(200, 900, count))
    ]
    options: dict[str, Any] = {"layers": range(4), "batch_tokens": 2048, "provenance": {"model": {"name": "toy"}}}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "run.zarr"
        specs = find_components(model).specs(("residual", "mlp_out"), range(4))
        (plan,) = datastore.plan(path, rollouts, components=specs, most_tokens=64, **options)
        capture.run(
            model, None, rollouts, path, components=("residual", "mlp_out"), most_tokens=64, memory=64 << 20, **options
        )
        store, wrong, cells = datastore.open(path), list[str](), 0
        for batch in plan.batches:
            wanted = _rows(model, [(name, plan.tokens(batch, name)) for name in batch.members], None)
            for (component, layer, name, _), values in wanted.items():
                found = np.asarray(store.select(component, rollouts=name, layers=layer).values)
                cells += 1
                if not np.array_equal(found, values.astype(np.float32)):
                    wrong.append(f"{component} of layer {layer} of rollout {name}")
    if wrong:
        raise RuntimeError(f"{len(wrong)} of {cells} stored cells are not what the model gave, the first is {wrong[0]}")
    return f"a stored capture holds the bits of its forwards, {cells} cells in {len(plan.batches)} batches"


def _memory(device: torch.device) -> str:
    """A batch that does not fit is halved, and the memory of the failed attempt is free again."""
    model, batch = _llama(device), _batch([4000] * 16)
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    before, whole = torch.cuda.memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
    halved: list[Halved] = []
    torch.cuda.set_per_process_memory_fraction((before + (160 << 20)) / whole, device)
    try:
        with Staging() as staging:
            small = _rows(model, batch, staging, halved)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    torch.cuda.synchronize()
    left = torch.cuda.memory_allocated(device) - before
    if not halved or left > 8 << 20:
        raise RuntimeError(f"{len(halved)} divisions, and {left:,} bytes are still held after running out of memory")
    rows = _rows(model, batch, None)
    distance = max(_distance(small[k], rows[k]) for k in rows if k in small)
    if len(small) != len(rows) or not distance < 2e-2:
        raise RuntimeError(f"after {len(halved)} divisions {len(small)} of {len(rows)} rows, {distance} apart")
    return f"out of memory: divided {len(halved)} times, {left:,} bytes left behind, rows within {distance:.1e}"


def _distance(a: Any, b: Any) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
