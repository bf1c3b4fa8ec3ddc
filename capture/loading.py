"""A model from a directory or the Hub: described without its weights, loaded up to the layers that will run."""

import hashlib
import importlib.util
import json
import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig

from capture import hub
from capture.adapter import apply_adapter, describe_adapter
from capture.errors import CaptureError, ModelError, RequestError
from capture.loaders import Order, Tick, load_weights
from capture.modelinfo import ModelInfo, local_path
from capture.skeleton import DeviceMap
from datastore.schema import DTYPES

_NATIVE = {"kimi_k2": "deepseek_v3"}
"""Model types whose own code is not needed: the class on the right computes the same."""

_TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tiktoken.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
_PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "zarr", "activation-datastore")
_SAFETENSORS_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Loaded:
    """A base model in evaluation mode, with the layers that were asked for, and what it was made from."""

    model: nn.Module
    tokenizer: Any
    info: ModelInfo
    n_layers: int
    dtype: str
    device: str
    attn_implementation: str


def describe(
    name_or_dir: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    adapter: str | None = None,
    quantize: str | None = None,
    tokenizer: bool = True,
) -> ModelInfo:
    """Read config and tokenizer; no weights are read, and none downloaded.

    Parameters
    ----------
    name_or_dir : str or Path
    revision : str, optional
    trust_remote_code : bool
    adapter : str, optional
        Directory or Hub id of a LoRA adapter to run over the model.
    quantize : str, optional
        `8bit` or `4bit`, by bitsandbytes while loading.
    tokenizer : bool
        Whether it is needed; without one nothing can be captured.

    Raises
    ------
    RequestError
        For another `quantize`, or where bitsandbytes is not installed.
    ModelError
        Where the directory, its config or tokenizer is missing, the Hub has no such model, or the dtype is not one
        that a store holds.
    """
    if quantize not in (None, "8bit", "4bit"):
        raise RequestError(f"quantize {quantize!r} is not known; choose 8bit or 4bit, or leave it out")
    if quantize and importlib.util.find_spec("bitsandbytes") is None:
        raise RequestError(
            f"quantising to {quantize} needs the package bitsandbytes, which is not installed: pip install bitsandbytes"
        )
    directory = _directory(name_or_dir)
    name = str(directory or name_or_dir)
    config = _config(name, revision, trust_remote_code)
    text = config.get_text_config()
    commit = _snapshot_commit(directory or _hub_snapshot(name, revision)) or (None if directory else revision)
    return ModelInfo(
        name=name,
        directory=directory,
        model_id=_directory_id(directory) if directory else name,
        revision=commit,
        config=config,
        tokenizer=_tokenizer(name, config, revision, trust_remote_code=trust_remote_code) if tokenizer else None,
        n_layers=_size(text, "num_hidden_layers", name),
        hidden=_size(text, "hidden_size", name),
        context=getattr(text, "max_position_embeddings", None),
        dtype=_dtype(config, name, directory),
        vocab_size=_size(text, "vocab_size", name),
        trust_remote_code=trust_remote_code,
        adapter=adapter,
        quantize=quantize,
    )


def load(
    info: ModelInfo,
    *,
    dtype: str | None = None,
    device: str | DeviceMap = "auto",
    layers: Sequence[int] | None = None,
    attn_implementation: str | None = None,
    cache: Path | bool | None = None,
    tick: Tick = lambda _, __: None,
) -> Loaded:
    """Load the base model, without head, up to the highest of `layers`.

    A fast-load cache is used where there is one that fits; what is wrong with one that does not is logged. INT4 experts
    stay packed.

    Parameters
    ----------
    info : ModelInfo
    dtype : str, optional
        To compute in, and so to store; the checkpoint's where not given.
    device : str or mapping
        A torch device; `auto`: the GPU where there is one (several share the model, then host memory, then the disk),
        else the CPU; or a map of module paths to devices, `cpu` and `disk` among them, also as a `.json` file's name.
    layers : sequence of int, optional
        The layers that will be captured; all where not given.
    attn_implementation : str, optional
        `sdpa`, `eager`, ...; the model's own choice where not given.
    cache : Path or bool, optional
        A cache's directory; False uses none; default the usual places.
    tick : callable
        Told (bytes read, bytes of all) where the files are read in place.

    Raises
    ------
    RequestError
        For a dtype, device or layer that does not exist.
    ModelError
        Where weights are missing, unreadable, or not those of the config. A weight that the files do not have is an
        error, never a random one.
    """
    order = order_of(
        info, dtype=dtype, device=device, layers=layers, attn_implementation=attn_implementation, cache=cache
    )
    with _quietly(), _as_model_error(info.name, "can't be loaded"):
        model = load_weights(order, tick=tick)
        if info.adapter:
            model = apply_adapter(model, info.adapter)
    return Loaded(
        model=model.eval().requires_grad_(False),
        tokenizer=info.tokenizer,
        info=info,
        n_layers=order.n_layers,
        dtype=order.dtype,
        device=str(model.device),
        attn_implementation=str(model.config.get_text_config()._attn_implementation),
    )


def order_of(
    info: ModelInfo,
    *,
    dtype: str | None = None,
    device: str | DeviceMap = "auto",
    layers: Sequence[int] | None = None,
    attn_implementation: str | None = None,
    cache: Path | bool | None = None,
) -> Order:
    """Check what `load` was asked for; a model of the Hub is downloaded later, where no cache can be used."""
    if dtype is not None and dtype not in DTYPES:
        raise RequestError(f"dtype {dtype!r} is not one that a store holds; choose {', '.join(DTYPES)}")
    n_layers = _layers_to_load(info, layers)
    _check_weights(info)
    placed = _device_map(device)
    return Order(
        info=info,
        directory=info.directory or (None if info.revision else hub.snapshot(info.name, None)),
        config=_shortened(info.config, n_layers),
        dtype=dtype or info.dtype,
        devices=placed,
        attn_implementation=attn_implementation,
        cache=cache if isinstance(cache, Path) else None,
        use_cache=cache is not False,
    )


def provenance(loaded: Loaded) -> dict[str, Any]:
    """What a capture records about the model: JSON values, and no path of this machine.

    Weights from the Hub are named by their commit; others by the sha256 of their safetensors files.
    """
    return _facts(
        loaded.info, dtype=loaded.dtype, device=loaded.device, attn_implementation=loaded.attn_implementation, hash=True
    )


def identity(
    info: ModelInfo, *, dtype: str | None = None, device: str | DeviceMap = "auto", hash_weights: bool = True
) -> dict[str, Any]:
    """What `provenance` will say once the model is loaded, without loading it.

    Parameters
    ----------
    info : ModelInfo
    dtype, device
        As for `load`.
    hash_weights : bool
        Read the local weights' files to hash them; where False, their sha256 is None.
    """
    placed = _device_map(device)
    return _facts(
        info,
        dtype=dtype or info.dtype,
        device=_main_device(placed),
        attn_implementation=_attn_implementation(info, dtype or info.dtype),
        hash=hash_weights,
    )


def _attn_implementation(info: ModelInfo, dtype: str) -> str:
    """What transformers would choose, asked of one layer without weights."""
    make: Any = AutoModel
    with torch.device("meta"), _quietly(), _as_model_error(info.name, "can't be built from its config"):
        model = make.from_config(
            _shortened(info.config, 1), dtype=getattr(torch, dtype), trust_remote_code=info.trust_remote_code
        )
    return str(model.config.get_text_config()._attn_implementation)


def _facts(info: ModelInfo, *, dtype: str, device: str, attn_implementation: str, hash: bool) -> dict[str, Any]:
    return {
        "model": info.model_id,
        "model_type": info.config.model_type,
        "revision": info.revision,
        "weights_sha256": None if info.revision or not hash else _digest(_weight_files(info.directory)),
        "tokenizer_sha256": _digest(_tokenizer_files(info)),
        "n_layers": info.n_layers,
        "dtype": dtype,
        **({"adapter": describe_adapter(info.adapter)} if info.adapter else {}),
        **({"quantization": f"bitsandbytes {info.quantize}"} if info.quantize else {}),
        "attn_implementation": attn_implementation,
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def _directory(name_or_dir: str | Path) -> Path | None:
    """The directory that is meant, checked; None for a Hub id: `name` or `owner/name`, and no directory here."""
    path, text = local_path(name_or_dir), str(name_or_dir)
    if not isinstance(name_or_dir, Path) and not os.path.exists(path) and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", text):
        return None
    if not os.path.isdir(path):  # not either of a name that is too long for one
        raise ModelError(
            f"{text} is not a directory, so there is no model in it; give a model's directory or a Hub id such "
            "as owner/name"
        )
    if (path / "adapter_config.json").exists():
        raise ModelError(
            f"{text} holds an adapter (adapter_config.json), not a model; merge it into its base model and "
            "give that directory"
        )
    if not (path / "config.json").exists():
        raise ModelError(
            f"{text} has no config.json, so it is not a model's directory; give one that save_pretrained wrote"
        )
    return path.absolute()


def _config(name: str, revision: str | None, trust_remote_code: bool) -> Any:
    with _as_model_error(name, "has no config that can be read"):
        raw, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
        native = _NATIVE.get(raw.get("model_type", ""))
        if native is None:
            return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
        kept = {key: value for key, value in raw.items() if key not in ("model_type", "auto_map")}
        return CONFIG_MAPPING[native].from_dict(kept)


def _tokenizer(name: str, config: Any, revision: str | None, *, trust_remote_code: bool) -> Any:
    with _as_model_error(name, "has no tokenizer that can be read"):
        return AutoTokenizer.from_pretrained(
            name, config=config, revision=revision, trust_remote_code=trust_remote_code
        )


def _size(text: Any, attribute: str, name: str) -> int:
    value = getattr(text, attribute, None)
    if not isinstance(value, int) or value < 1:
        raise ModelError(
            f"the config of {name} has {attribute} {value!r}, so this is not a decoder that can be captured"
        )
    return value


def _dtype(config: Any, name: str, directory: Path | None) -> str:
    declared = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    found = str(declared).removeprefix("torch.") if declared is not None else _first_weight_dtype(directory)
    if found not in DTYPES:
        raise ModelError(
            f"the config of {name} has dtype {found!r}, and a store holds {', '.join(DTYPES)}; correct its config.json"
        )
    return found


def _first_weight_dtype(directory: Path | None) -> str:
    for path in _weight_files(directory):
        with _as_model_error(path.name, "can't be read"), safe_open(path, framework="pt") as file:
            kinds = (file.get_slice(key).get_dtype() for key in file.keys())  # noqa: SIM118 - not a dict
            return next((_SAFETENSORS_DTYPES[kind] for kind in kinds if kind in _SAFETENSORS_DTYPES), "float32")
    return "float32"


def _layers_to_load(info: ModelInfo, layers: Sequence[int] | None) -> int:
    if layers is None:
        return info.n_layers
    bad = [layer for layer in layers if not 0 <= layer < info.n_layers]
    if bad or not layers:
        raise RequestError(
            f"{info.model_id} has no layer {bad[0] if bad else '(none was asked for)'}; its layers are 0 to "
            f"{info.n_layers - 1}"
        )
    return max(layers) + 1


def _shortened(config: Any, n_layers: int) -> Any:
    """A config of the first layers alone: what is listed per layer is cut with it."""
    config = deepcopy(config)
    text = config.get_text_config()
    everything = text.num_hidden_layers
    for key, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == everything and "layer" in key:
            setattr(text, key, value[:n_layers])
    text.num_hidden_layers = n_layers
    return config


def _check_weights(info: ModelInfo) -> None:
    if info.directory and not _weight_files(info.directory):
        other = next((path.name for path in info.directory.glob("*.bin")), None)
        raise ModelError(
            f"{info.name} has no *.safetensors file, so there are no weights to load"
            + (
                f"; {other} is a pickle, which is never read: convert it with save_pretrained"
                if other
                else "; download them too"
            )
        )


def _device_map(device: str | DeviceMap) -> Any:
    """What the loaders take: `auto`, a map, or None for the CPU alone."""
    if isinstance(device, str) and device.endswith(".json"):
        device = _read_map(Path(device))
    if not isinstance(device, str):
        if "" in device and len(device) > 1:
            raise RequestError(
                "the device map names the whole model ('') and parts of it; name every part instead, as embed_tokens, "
                "layers.0, layers.1, norm, rotary_emb"
            )
        return {path: one if one in ("cpu", "disk") else _checked_device(str(one)) for path, one in device.items()}
    if device == "auto":
        if torch.cuda.device_count() > 1:
            return "auto"
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return {"": device} if torch.device(_checked_device(device)).type != "cpu" else None


def _read_map(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RequestError(f"the device map {path} can't be read: {error}") from error
    if not isinstance(found, dict) or not found:
        raise RequestError(
            f'the device map {path} is no object such as {{"embed_tokens": "cpu", "layers": "disk", ...}}'
        )
    return found


def _checked_device(device: str) -> str:
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise RequestError(f"device {device!r} is not one that torch knows; use auto, cpu, cuda or cuda:1") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise RequestError(f"device {device!r} is not there: torch sees no CUDA GPU; use --device cpu")
    return device


def _main_device(placed: Any) -> str:
    """Where a model placed so computes first."""
    if isinstance(placed, Mapping):
        return str(next((one for one in placed.values() if one not in ("cpu", "disk")), "cpu"))
    return "cuda" if placed else "cpu"


def _weight_files(directory: Path | None) -> list[Path]:
    return sorted(directory.glob("*.safetensors")) if directory else []


def _tokenizer_files(info: ModelInfo) -> list[Path]:
    if info.directory:
        candidates: list[Any] = [info.directory / name for name in _TOKENIZER_FILES]
    else:
        candidates = [try_to_load_from_cache(info.name, name, revision=info.revision) for name in _TOKENIZER_FILES]
    return [Path(path) for path in candidates if isinstance(path, (str, Path)) and Path(path).exists()]


def _digest(files: Sequence[Path]) -> str | None:
    """One sha256 over the sha256 of each file with its name, in order of the names."""
    if not files:
        return None
    whole = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            whole.update(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n".encode())
    return whole.hexdigest()


def _directory_id(directory: Path) -> str:
    cached = re.search(r"/models--(.+?)--(.+?)/snapshots/[^/]+$", str(directory))
    return f"{cached[1]}/{cached[2]}" if cached else directory.resolve().name


def _hub_snapshot(name: str, revision: str | None) -> Path:
    """Where the Hub's cache has the config that was just read; its path ends with the commit."""
    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else Path()


def _snapshot_commit(directory: Path) -> str | None:
    match = re.search(r"/snapshots/([0-9a-f]{40})$", str(directory))
    return match[1] if match else None


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    return f"{device} ({named})"


def versions() -> dict[str, str]:
    """Return the versions of what the weights and the bits of rows depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


@contextmanager
def _quietly() -> Iterator[None]:
    """Layers and heads that are left out on purpose would be warned about, one line each."""
    logs: Any = transformers.logging
    level, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    if not sys.stderr.isatty():
        logs.disable_progress_bar()
    try:
        yield
    finally:
        logs.set_verbosity(level)
        if bars:
            logs.enable_progress_bar()


@contextmanager
def _as_model_error(name: str, what: str) -> Iterator[None]:
    """The readers inside fail in any way there is on a damaged file; each becomes one sentence with the "
    "model's name."""
    try:
        yield
    except (CaptureError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(f"the model {name} {what}: {reason}") from error
