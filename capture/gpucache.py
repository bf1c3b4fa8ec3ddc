"""The fused cache of earlier tools, one safetensors file per GPU beside a metadata.json: read, and never written.

Such a cache has no manifest, no checksums and no revision: what can be checked is that every shard is there and whole,
and that no key is missing, unexpected or of another shape. The number of GPUs that wrote it does not matter.
"""

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from torch import Tensor, nn

from capture.errors import CacheError
from capture.skeleton import tensors_of
from capture.tensorfiles import Stored, header

__all__ = ["find", "sources"]

_EXPERTS = re.compile(r"\.mlp\._(gate|up|down)_(packed|scale)$")


def find(model: str) -> Path | None:
    """Return the cache of a model below HF_HOME, or None; of several the one of the most GPUs."""
    found = Path(constants.HF_HOME).glob(f"fused_cache/{model.replace('/', '--')}__*gpu/metadata.json")
    return max((path.parent for path in found), key=lambda p: (len(p.name), p.name), default=None)


def sources(directory: Path, model: nn.Module, *, name: str) -> dict[str, Stored]:
    """Find where each tensor of a skeleton with fused experts is; tensors that the model makes itself are left out.

    Raises
    ------
    CacheError
        A shard is missing or short, it is of another model, or a key is missing, unexpected, or of another shape.
    """
    stored = _named(directory, _metadata(directory, name))
    wanted = tensors_of(model)
    made = {key for key, _ in model.named_buffers()} - set(model.state_dict())
    n_layers = len({key.split(".")[1] for key in wanted if key.startswith("layers.")})
    there = {key: one for key, one in stored.items() if not _beyond(key, n_layers)}
    for keys, what in (
        (wanted.keys() - made - there.keys(), "misses"),
        (there.keys() - wanted.keys(), "has an unexpected"),
    ):
        if keys:
            raise CacheError(f"the cache {directory} {what} key {min(keys)} ({len(keys)} in all); it is not used")
    for key, one in there.items():
        tensor: Tensor = wanted[key]
        if one.shape != tuple(tensor.shape) or one.dtype.is_floating_point != tensor.is_floating_point():
            raise CacheError(
                f"{key} in the cache {directory} is {list(one.shape)} and the model's is {list(tensor.shape)}; it is "
                "not used"
            )
    return there


def _metadata(directory: Path, name: str) -> dict[str, Any]:
    try:
        said = json.loads((directory / "metadata.json").read_text())
        of, n_gpus = said["model_name"], int(said["n_gpus"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CacheError(
            f"the metadata.json of the cache {directory} can't be read: {error}; it is not used"
        ) from error
    if of != name:
        raise CacheError(f"the cache {directory} is of the model {of!r}, not {name!r}; it is not used")
    missing = [gpu for gpu in range(n_gpus) if not (directory / f"shard_gpu{gpu}.safetensors").exists()]
    if missing:
        raise CacheError(
            f"the cache {directory} was never finished: shard_gpu{missing[0]}.safetensors is missing, and "
            f"{n_gpus} GPUs wrote it; it is not used"
        )
    return dict(said)


def _named(directory: Path, said: dict[str, Any]) -> dict[str, Stored]:
    """Every tensor under the name that the base model has for it."""
    stored: dict[str, Stored] = {}
    files = [directory / f"shard_gpu{gpu}.safetensors" for gpu in range(int(said["n_gpus"]))]
    for path in [*files, *directory.glob("shard_cpu.safetensors")]:
        for key, one in header(path).items():
            stored[_EXPERTS.sub(r".mlp.experts.\1_\2", key.removeprefix("model."))] = one
    return {key: one for key, one in stored.items() if not key.startswith("lm_head.")}


def _beyond(key: str, n_layers: int) -> bool:
    parts = key.split(".")
    return parts[0] == "layers" and parts[1].isdecimal() and int(parts[1]) >= n_layers
