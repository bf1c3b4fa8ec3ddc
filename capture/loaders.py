"""The ways weights get into a model: a fast-load cache, INT4 shards in place, transformers' own loading.

A cache is tried first; whatever is wrong with it is logged, and the next way is taken.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, BitsAndBytesConfig

from capture import cache, gpucache, hub, skeleton
from capture.errors import CacheError, ModelError, RequestError
from capture.int4 import checkpoint_files, int4_sources
from capture.modelinfo import ModelInfo
from capture.offload import offload_folder
from capture.tensorfiles import Stored, fill

__all__ = ["Order", "Tick", "build_cache", "load_weights", "wanted_cache"]

LOG = logging.getLogger("capture")
Tick = Callable[[int, int], object]
"""Told (bytes read, bytes of all)."""
LOGGED_EVERY = 10.0
"""Seconds between two lines of the log on how much is read."""
_CACHED = "Loading from cache"
_OFFLOADED = "safetensors_file"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Order:
    """One model to load.

    Attributes
    ----------
    info : ModelInfo
    directory : Path or None
        Where its files are; None for a model of the Hub, whose files are downloaded where no cache can be used.
    config : transformers config
        Of the layers that will run.
    dtype : str
    devices : str, mapping or None
        `auto`, module path to device, or None for the CPU.
    attn_implementation : str or None
    cache : Path or None
        A cache to use; None looks in the usual places.
    use_cache : bool
    """

    info: ModelInfo
    directory: Path | None
    config: Any
    dtype: str
    devices: Any
    attn_implementation: str | None
    cache: Path | None = None
    use_cache: bool = True

    @property
    def n_layers(self) -> int:
        """Layers that will run."""
        return int(self.config.get_text_config().num_hidden_layers)

    def files(self) -> Path:
        """Return where its files are, once they are there."""
        return self.directory or hub.snapshot(self.info.name, self.info.revision)


def wanted_cache(info: ModelInfo, directory: Path | None, *, dtype: str, n_layers: int) -> cache.Wanted:
    """Return what a cache of this model must say of itself."""
    int4 = skeleton.int4_layout(info.config)
    return cache.Wanted(
        model=info.model_id,
        revision=info.revision,
        fingerprint="" if info.revision or directory is None else cache.fingerprint(directory),
        dtype=dtype,
        quantization=f"int4-group{int4.group}" if int4 else "",
        n_layers=n_layers,
    )


def load_weights(order: Order, *, tick: Tick = lambda _, __: None) -> Any:
    """Load a model in the fastest way that its files allow.

    Raises
    ------
    ModelError
        Weights are missing, unreadable, or not those of the config.
    RequestError
        The device map does not cover the model, or puts packed experts on the disk.
    """
    int4 = skeleton.int4_layout(order.info.config)
    if order.info.quantize:
        return _from_pretrained(order)
    model = _cached(order, tick) if order.use_cache else None
    if model is not None:
        return model
    if int4 is None:
        return _from_pretrained(order)
    model, devices = _skeleton(order)
    if "disk" in devices.values():
        raise RequestError(
            f"{order.info.model_id} has packed experts, and a part of it would be on disk, which needs a cache to read "
            "them from; build it with python -m capture cache build, or give it more memory"
        )
    LOG.info("from_pretrained %s: its INT4 shards, read in place", order.info.model_id)
    skeleton.place(model, devices)
    _read(int4_sources(model, order.files()), tick, what="from_pretrained")
    LOG.info("Fused INT4 experts of %d layers", sum(1 for m in model.modules() if type(m).__name__ == "Int4Experts"))
    return skeleton.dispatch(model, devices)


def _skeleton(order: Order) -> tuple[Any, skeleton.DeviceMap]:
    model = skeleton.skeleton(
        order.config,
        dtype=getattr(torch, order.dtype),
        attn_implementation=order.attn_implementation,
        int4=skeleton.int4_layout(order.info.config),
        trust_remote_code=order.info.trust_remote_code,
    )
    if order.devices == "auto":
        return model, skeleton.balanced(model)
    return model, order.devices or {"": "cpu"}


def _read(sources: list[tuple[Stored, torch.Tensor]], tick: Tick, *, what: str) -> None:
    """Read weights into place; the log of a server, which has no bar, hears of it every few seconds and at the end."""
    total, done = sum(stored.n_bytes for stored, _ in sources), 0
    began = logged = time.monotonic()

    def told(n_bytes: int) -> None:
        nonlocal done, logged
        done, now = done + n_bytes, time.monotonic()
        tick(done, total)
        if done == total or now - logged >= LOGGED_EVERY:
            logged, rate = now, done / max(now - began, 1e-9) / 1e9
            LOG.info("%s: %.2f of %.2f GB, %.2f GB/s", what, done / 1e9, total / 1e9, rate)

    tick(0, total)
    fill(sources, tick=told)


def _cached(order: Order, tick: Tick) -> Any | None:
    """The model from a cache, ours or of the older kind; None where there is none that can be used."""
    wanted = wanted_cache(order.info, order.directory, dtype=order.dtype, n_layers=order.n_layers)
    ours, theirs = order.cache or cache.default_directory(wanted), gpucache.find(order.info.model_id)
    ways: list[tuple[Path, Callable[[], Any]]] = []
    if order.cache is not None or ours.exists():
        ways.append((ours, lambda: _from_cache(order, ours, wanted=wanted, tick=tick)))
    if theirs is not None and wanted.quantization:
        ways.append((theirs, lambda: _from_gpu_cache(order, theirs, tick)))
    for path, way in ways:
        try:
            LOG.info("%s: %s", _CACHED, path)
            return way()
        except (CacheError, ModelError) as error:
            LOG.warning("the cache is not used, loading goes on without it: %s", error)
            torch.cuda.empty_cache()
    return None


def _from_cache(order: Order, directory: Path, *, wanted: cache.Wanted, tick: Tick) -> Any:
    manifest = cache.read(directory)
    cache.check(manifest, wanted, directory)
    model, devices = _skeleton(order)
    stored = cache.sources(manifest, model, directory)
    skeleton.place(model, devices)
    tensors = skeleton.tensors_of(model)
    _read([(one, tensors[name]) for name, one in stored.items() if not tensors[name].is_meta], tick, what=_CACHED)
    cache.verify_tensors(manifest, {name: tensors[name] for name in stored}, directory)
    on_disk = {
        name: _offloaded(one, name) for name, one in stored.items() if skeleton.device_of(name, devices) == "disk"
    }
    return skeleton.dispatch(model, devices, on_disk=on_disk)


def _offloaded(stored: Stored, name: str) -> Mapping[str, str]:
    return {_OFFLOADED: str(stored.path), "weight_name": name, "dtype": str(stored.dtype).removeprefix("torch.")}


def _from_gpu_cache(order: Order, directory: Path, tick: Tick) -> Any:
    model, devices = _skeleton(order)
    stored = gpucache.sources(directory, model, name=order.info.model_id)
    skeleton.place(model, devices)
    tensors = skeleton.tensors_of(model)
    _read([(one, tensors[name]) for name, one in stored.items()], tick, what=_CACHED)
    LOG.warning("the cache %s records neither revision nor checksums, so those were not checked", directory)
    return skeleton.dispatch(model, devices)


def _from_pretrained(order: Order) -> Any:
    info, extra = order.info, {}
    directory = order.files()
    checkpoint_files(directory)
    if order.devices:
        extra["device_map"] = order.devices
    if isinstance(order.devices, Mapping) and "disk" in order.devices.values():
        extra["offload_folder"] = str(offload_folder())
    if info.quantize:
        extra["quantization_config"] = _bitsandbytes(info.quantize, order.dtype)
    LOG.info("from_pretrained %s", info.model_id)
    model, report = AutoModel.from_pretrained(
        str(directory),
        config=order.config,
        dtype=getattr(torch, order.dtype),
        attn_implementation=order.attn_implementation,
        use_safetensors=True,
        trust_remote_code=info.trust_remote_code,
        output_loading_info=True,
        **extra,
    )
    _check_report(info, report)
    return model


def _check_report(info: ModelInfo, report: Mapping[str, Any]) -> None:
    for what in ("missing_keys", "mismatched_keys"):
        if keys := sorted(map(str, report.get(what) or ())):
            raise ModelError(
                f"the weights of {info.name} do not fit its config: {len(keys)} {what.replace('_', ' ')}, "
                f"{keys[0]} the first; "
                "download the model again, or correct its config.json"
            )


def _bitsandbytes(kind: str, dtype: str) -> Any:
    make: Any = BitsAndBytesConfig
    if kind == "8bit":
        return make(load_in_8bit=True)
    return make(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, dtype))


def build_cache(
    order: Order, model: Any, directory: Path, *, blocks: str, versions: Mapping[str, str], tick: Tick
) -> cache.Manifest:
    """Write the cache of a model that was loaded whole onto devices."""
    wanted = wanted_cache(order.info, order.directory, dtype=order.dtype, n_layers=order.n_layers)
    tensors = skeleton.tensors_of(model)
    away = next((name for name, tensor in tensors.items() if tensor.is_meta), None)
    if away is not None:
        raise RequestError(f"{away} is offloaded, so the cache would lack it; build the cache with --device cpu")
    return cache.build(tensors, directory, of=wanted, blocks=blocks, versions=versions, tick=tick)
