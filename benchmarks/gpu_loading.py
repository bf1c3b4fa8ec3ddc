"""The GPU benchmark's loading: from the fast-load cache, the normal way, and the bare reading of the cache's files."""

import json
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from benchmarks.gpu_capture import make_llama
from benchmarks.gpu_sizes import Sizes
from benchmarks.measure import Row, chill, size_of
from capture import loaders, skeleton, tensorfiles
from capture.loading import load, order_of
from capture.modelinfo import ModelInfo

__all__ = ["loading"]

_QUANTIZATION = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 32, "symmetric": True}}},
}


def loading(sizes: Sizes, device: torch.device, root: Path) -> tuple[list[Row], list[str]]:
    """Load a Llama and a part of a Kimi-K2, files cold and warm."""
    rows: list[Row] = []
    facts = []
    for name, save in {"Llama": save_llama, "Kimi-K2 with INT4 experts": save_kimi}.items():
        directory = root / name.split()[0]
        info = save(sizes, device, directory)
        found, fact = _one(name, info, device, root / f"{directory.name}-cache")
        rows += found
        facts.append(fact)
    return rows, facts


def _one(name: str, info: ModelInfo, device: torch.device, cache: Path) -> tuple[list[Row], str]:
    assert info.directory is not None
    whole = load(info, device=str(device), cache=False)
    order = order_of(info, device=str(device))
    loaders.build_cache(order, whole.model, cache, blocks="layers", versions={}, tick=lambda *_: None)
    del whole
    tasks: dict[str, Callable[[], object]] = {
        "cached": lambda: load(info, device=str(device), cache=cache),
        "normal": lambda: load(info, device=str(device), cache=False),
        "read": lambda: read_raw(cache),
    }
    n_bytes, rows, facts = size_of(cache), [], []
    for state in ("warm", "cold"):
        rate = {
            task: n_bytes / _time(call, [cache, info.directory], cold=state == "cold") for task, call in tasks.items()
        }
        rows += [
            _row(f"{name}, {state}: cached load", rate, "read", "the same files read", 0.8),
            _row(f"{name}, {state}: cached load", rate, "normal", "the normal load", None),
        ]
        facts.append(state)
    return rows, f"{name}: {n_bytes / 1e9:.2f} GB"


def _time(call: Callable[[], object], files: list[Path], *, cold: bool, rounds: int = 2) -> float:
    times = []
    if not cold:
        call()
    for _ in range(rounds):
        if cold:
            chill(files)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _row(what: str, rate: dict[str, float], rival: str, against: str, target: float | None) -> Row:
    return Row(
        what=what,
        value=rate["cached"] / 1e9,
        unit="GB/s",
        rival=against,
        rival_value=rate[rival] / 1e9,
        ratio=rate["cached"] / rate[rival],
        target=target,
    )


def read_raw(directory: Path, *, block: int = 64 << 20) -> None:
    """Read every file into host memory that is used again, in as many threads as loading has."""
    pieces = [(path, at) for path in sorted(directory.iterdir()) for at in range(0, path.stat().st_size, block)]
    threads = min(16, len(os.sched_getaffinity(0)))
    buffers: list[Any] = [torch.empty(block, dtype=torch.uint8).numpy() for _ in range(threads)]

    def read(one: tuple[int, tuple[Path, int]]) -> None:
        number, (path, at) = one
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.preadv(descriptor, [buffers[number % threads]], at)
        finally:
            os.close(descriptor)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, enumerate(pieces)))


def save_llama(sizes: Sizes, device: torch.device, directory: Path) -> ModelInfo:
    """Write a random Llama as transformers does."""
    model = make_llama(sizes, device, num_hidden_layers=sizes.llama_layers)
    model.save_pretrained(directory)
    return _info(directory, model.config, "llama")


def save_kimi(sizes: Sizes, device: torch.device, directory: Path) -> ModelInfo:
    """Write a random Kimi-K2 as it is published: each expert's projections on their own."""
    directory.mkdir()
    config: Any = AutoConfig.for_model("deepseek_v3", **sizes.kimi, num_nextn_predict_layers=0)
    (directory / "config.json").write_text(json.dumps({"model_type": "deepseek_v3", **sizes.kimi}))
    config.quantization_config = _QUANTIZATION
    model = skeleton.skeleton(config, dtype=torch.bfloat16, int4=skeleton.int4_layout(config))
    skeleton.place(model, {"": device})
    tensors = {}
    for name, tensor in model.state_dict().items():
        if tensor.dtype is torch.int32:
            tensor.random_(-(1 << 31), (1 << 31) - 1)
        else:
            tensor.normal_(0, 0.02)
        path, _, last = name.rpartition(".")
        if not path.endswith(".experts"):
            tensors[f"model.{name}"] = tensor
            continue
        projection, kind = last.split("_")
        for expert, one in enumerate(tensor):
            tensors[f"model.{path}.{expert}.{projection}_proj.weight_{kind}"] = one
    tensorfiles.write(directory / "model.safetensors", tensors)
    return _info(directory, config, "kimi")


def _info(directory: Path, config: Any, name: str) -> ModelInfo:
    return ModelInfo(
        name=str(directory),
        directory=directory,
        model_id=name,
        revision=None,
        config=config,
        tokenizer=None,
        n_layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        context=None,
        dtype="bfloat16",
        vocab_size=config.vocab_size,
    )
