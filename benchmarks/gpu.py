"""`python -m benchmarks.gpu`: every number of capture at scale on one GPU, each beside its rival in the same run.

INT4 experts of one Kimi-K2 layer against the loop over experts; rows of a Llama of 8 billion parameters to disk against
its bare forward; copies to the host against a pinned copy; cached loading against reading the same files. Weights are
random, of the true shapes. `--tiny` runs all of it small, on the CPU too; `--only experts,capture` runs some.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks import gpu_capture, gpu_checks, gpu_loading
from benchmarks.gpu_sizes import FULL, TINY, Sizes
from benchmarks.measure import Row, show
from capture.experts import Int4Experts, dequantise

SECTIONS = ("checks", "experts", "copies", "budget", "capture", "loading")


@dataclass(frozen=True, slots=True)
class Timed:
    """Median seconds of a call, and the most memory that it took beyond what was held before."""

    seconds: float
    peak: int


def timed(call: Callable[[], object], device: torch.device, *, rounds: int) -> Timed:
    """Run a call once unmeasured, then some times."""
    times = []
    call()
    before = _reset(device)
    for _ in range(rounds):
        _wait(device)
        began = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else 0
    return Timed(statistics.median(times), peak)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return int(torch.cuda.memory_allocated(device))


def loop(module: Int4Experts, x: Any, index: Any, weights: Any) -> Any:
    """The rival: each expert on its own, its three projections multiplied out, over the same packed buffers."""
    out = torch.zeros_like(x, dtype=torch.float32)
    for expert in index.unique().tolist():
        token, choice = torch.where(index == expert)
        gate, up, down = (
            module.weights(name, slice(expert, expert + 1), x.dtype)[0] for name in ("gate", "up", "down")
        )
        inner = torch.nn.functional.silu(x[token] @ gate.T) * (x[token] @ up.T)
        out.index_add_(0, token, (inner @ down.T).float() * weights[token, choice, None])
    return out.to(x.dtype)


def everything(module: Int4Experts, x: Any, index: Any, weights: Any) -> Any:
    """The other rival: all experts multiplied out at once, then grouped products."""
    every = {
        name: dequantise(module.get_buffer(f"{name}_packed"), module.get_buffer(f"{name}_scale"), x.dtype)
        for name in ("gate", "up", "down")
    }
    flat = index.reshape(-1)
    order = flat.argsort(stable=True)
    ends = torch.searchsorted(flat[order], torch.arange(module.n_experts, device=x.device), right=True).int()
    token = order // index.shape[1]
    grouped = torch.nn.functional.grouped_mm
    gate = grouped(x[token], every["gate"].transpose(1, 2), offs=ends)
    inner = torch.nn.functional.silu(gate) * grouped(x[token], every["up"].transpose(1, 2), offs=ends)
    rows = grouped(inner, every["down"].transpose(1, 2), offs=ends)
    out = torch.zeros_like(x, dtype=torch.float32)
    out.index_add_(0, token, rows.float() * weights.reshape(-1)[order][:, None])
    return out.to(x.dtype)


def experts(sizes: Sizes, device: torch.device) -> tuple[list[Row], list[str]]:
    """One layer's experts: time, peak memory, and how far the ways are from each other."""
    module = random_experts(sizes, device)
    packed = sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())
    facts = [f"{module.extra_repr()}, {packed / 1e9:.2f} GB packed, workspace {module.workspace / 1e9:.1f} GB"]
    rows: list[Row] = []
    with torch.inference_mode():
        for tokens in sizes.expert_tokens:
            found, said = _experts_at(tokens, module, sizes, device)
            rows += found
            facts += said
    return rows, facts


def _experts_at(tokens: int, module: Int4Experts, sizes: Sizes, device: torch.device) -> tuple[list[Row], list[str]]:
    x = torch.randn(tokens, sizes.hidden, device=device, dtype=torch.bfloat16)
    index = torch.rand(tokens, sizes.experts, device=device).topk(sizes.active, dim=1).indices
    weights = torch.rand(tokens, sizes.active, device=device)
    reference = loop(module, x, index, weights).double()
    naive = timed(lambda: loop(module, x, index, weights), device, rounds=sizes.rounds)
    whole = timed(lambda: everything(module, x, index, weights), device, rounds=sizes.rounds)
    rows: list[Row] = []
    facts = []
    for way in ("INT4 products", "multiplied out in pieces"):
        module.direct = way == "INT4 products"
        error = float((module(x, index, weights).double() - reference).norm() / reference.norm())
        if not error < 2e-2:
            raise RuntimeError(f"{way} are {error} from the loop at {tokens} tokens")
        facts.append(f"{tokens} tokens, {way}: relative distance from the loop {error:.1e}")
        ours = timed(lambda: module(x, index, weights), device, rounds=sizes.rounds)
        what = f"experts, {tokens} tokens, {way}"
        target = 3.0 if module.direct and tokens == 2048 else None
        rows += [
            _faster(what, ours, "loop over experts", naive, target=target),
            _faster(what, ours, "everything multiplied out", whole),
            *_memory(what, ours, whole, device),
        ]
    module.direct = True
    return rows, facts


def random_experts(sizes: Sizes, device: torch.device) -> Int4Experts:
    """One layer of random packed weights."""
    module = Int4Experts(sizes.experts, sizes.hidden, sizes.inner, device=device)
    for name, buffer in module.named_buffers():
        if name.endswith("packed"):
            buffer.random_(-(1 << 31), (1 << 31) - 1)
        else:
            buffer.uniform_(0.5, 1.5).mul_(0.2 / sizes.hidden**0.5)
    return module


def _faster(what: str, ours: Timed, rival: str, theirs: Timed, *, target: float | None = None) -> Row:
    return Row(
        what=what,
        value=ours.seconds * 1e3,
        unit="ms",
        rival=rival,
        rival_value=theirs.seconds * 1e3,
        ratio=theirs.seconds / ours.seconds,
        target=target,
    )


def _memory(what: str, ours: Timed, theirs: Timed, device: torch.device) -> list[Row]:
    if device.type != "cuda":
        return []
    row = Row(
        what=f"{what}: peak memory",
        value=ours.peak / 1e9,
        unit="GB",
        rival="12 GB; everything multiplied out",
        rival_value=theirs.peak / 1e9,
        ratio=ours.peak / 12e9,
        target=1.0,
        at_most=True,
    )
    return [row]


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "transformers": transformers.__version__,
    }
    if device.type == "cuda":
        asked = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
        said = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
        found["driver"] = said.splitlines()[0] if said else "unknown"
    return found


def sections(sizes: Sizes, device: torch.device, root: Path) -> Mapping[str, Callable[[], tuple[list[Row], list[str]]]]:
    """Every part of the benchmark by its name."""
    return {
        "checks": lambda: gpu_checks.checks(device),
        "experts": lambda: experts(sizes, device),
        "copies": lambda: gpu_capture.copies(sizes, device),
        "budget": lambda: gpu_capture.budget(sizes, device),
        "capture": lambda: gpu_capture.captures(sizes, device, root),
        "loading": lambda: gpu_loading.loading(sizes, device, root),
    }


def main(arguments: list[str]) -> None:
    """Run it: `--tiny`, `--json`, `--only a,b`, `--device cpu`."""
    sizes = TINY if "--tiny" in arguments else FULL
    chosen = dict(pairwise(arguments))
    device = torch.device(chosen.get("--device", "cuda:0" if torch.cuda.is_available() else "cpu"))
    torch.manual_seed(0)
    names = chosen.get("--only", ",".join(SECTIONS)).split(",")
    print(json.dumps(machine(device)), flush=True)
    with tempfile.TemporaryDirectory(prefix="bench-gpu-", dir=os.environ.get("BENCH_DIR")) as directory:
        parts = sections(sizes, device, Path(directory))
        for name in names:
            began = time.monotonic()
            rows, facts = parts[name]()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            title = f"{name} ({time.monotonic() - began:.0f} s): {'; '.join(facts)}"
            show(title, rows, as_json="--json" in arguments)
            sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
