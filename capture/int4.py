"""A checkpoint with compressed-tensors INT4 experts, read from its shards straight into fused buffers.

The published files hold each projection of each expert as three tensors, 208,000 of them in Kimi-K2: no module is made
for any of them.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from capture.errors import ModelError
from capture.experts import Int4Experts
from capture.skeleton import tensors_of
from capture.tensorfiles import Stored, headers

__all__ = ["checkpoint_files", "int4_sources"]

_INDEX = "model.safetensors.index.json"
Sources = list[tuple[Stored, Tensor]]


def checkpoint_files(directory: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint; every shard that its index names is there.

    Raises
    ------
    ModelError
        A shard is missing, or there is no file at all.
    """
    index = directory / _INDEX
    if not index.exists():
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise ModelError(f"{directory} has no *.safetensors file, so there are no weights to load; download them")
        return files
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"{index} can't be read: {error}; download it again") from error
    missing = [name for name in names if not (directory / name).exists()]
    if missing:
        raise ModelError(
            f"{directory} lacks {len(missing)} of {len(names)} shards, {missing[0]} the first, so its weights are not "
            "all there; download them too"
        )
    return [directory / name for name in names]


def int4_sources(model: torch.nn.Module, directory: Path) -> Sources:
    """Find where in a checkpoint every tensor of a placed model with fused experts comes from.

    Raises
    ------
    ModelError
        A tensor is missing or has another shape; experts are not packed.
    """
    stored = headers(checkpoint_files(directory))
    prefix = _prefix(stored, directory)
    experts = {f"{name}.": module for name, module in model.named_modules() if isinstance(module, Int4Experts)}
    computed, sources = _computed(model), list[tuple[Stored, Tensor]]()
    for name, tensor in tensors_of(model).items():
        owner = next((path for path in experts if name.startswith(path)), None)
        if owner is not None:
            sources += _slices(stored, prefix + owner, name=name.removeprefix(owner), buffer=tensor)
        elif prefix + name in stored or name not in computed:
            sources.append((_found(stored, prefix + name, tensor.shape), tensor))
    return sources


def _prefix(stored: Mapping[str, Stored], directory: Path) -> str:
    found = [name for name in stored if re.search(r"(^|\.)embed_tokens\.weight$", name)]
    if not found:
        raise ModelError(f"the weights in {directory} have no embed_tokens.weight, so they are of no decoder")
    return min(found, key=len).removesuffix("embed_tokens.weight")


def _computed(model: torch.nn.Module) -> set[str]:
    """Buffers that the model makes itself, and no file holds."""
    return {name for name, _ in model.named_buffers()} - set(model.state_dict())


def _slices(stored: Mapping[str, Stored], path: str, *, name: str, buffer: Tensor) -> Sources:
    projection, kind = name.split("_")
    return [
        (_found(stored, f"{path}{expert}.{projection}_proj.weight_{kind}", one.shape), one)
        for expert, one in enumerate(buffer)
    ]


def _found(stored: Mapping[str, Stored], name: str, shape: tuple[int, ...]) -> Stored:
    one = stored.get(name)
    if one is None:
        plain = name.replace("weight_packed", "weight")
        why = ", and there is an unpacked one in its place" if plain != name and plain in stored else ""
        raise ModelError(f"the weights do not fit the config: {name} is missing{why}; download the model again")
    if one.shape != tuple(shape):
        raise ModelError(
            f"the weights do not fit the config: {name} is {list(one.shape)} and should be {list(shape)}; correct "
            "config.json, or download the model again"
        )
    return one
