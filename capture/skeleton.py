"""A model without weights, and its tensors made where they will live: where every way of loading in place begins."""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map, init_empty_weights
from accelerate.utils import get_balanced_memory
from torch import Tensor, nn
from transformers import AutoModel

from capture.errors import ModelError, RequestError
from capture.experts import GROUP, Int4Experts

__all__ = [
    "DeviceMap",
    "Int4Layout",
    "balanced",
    "device_of",
    "dispatch",
    "int4_layout",
    "place",
    "skeleton",
    "tensors_of",
]

DeviceMap = Mapping[str, Any]
"""Module path to device; the longest path that a module lies below counts, `""` is the whole model."""

_DISK = "disk"


@dataclass(frozen=True, slots=True)
class Int4Layout:
    """How experts are packed: inputs that share a scale."""

    group: int


def int4_layout(config: Any) -> Int4Layout | None:
    """Return how a config says its experts are packed, or None where it says nothing of compressed-tensors.

    Raises
    ------
    ModelError
        It is packed in another way than 4 bits, symmetric, in groups.
    """
    said = _quantization(config)
    if not said or said.get("quant_method") != "compressed-tensors":
        return None
    groups = list((said.get("config_groups") or {}).values())
    weights = {**said, **(groups[0].get("weights") or {})} if groups else said
    plain = weights.get("num_bits") == 4 and weights.get("symmetric", True) and not weights.get("actorder")
    if len(groups) > 1 or said.get("format") != "pack-quantized" or not plain or not weights.get("group_size", GROUP):
        raise ModelError(
            f"the model's quantization is compressed-tensors {said.get('format')!r} with {len(groups)} groups, "
            f"{weights.get('num_bits')} bits, and only pack-quantized with 4 bits, symmetric, in one group is read; "
            "use a checkpoint of that kind, or an unquantized one"
        )
    return Int4Layout(int(weights.get("group_size") or GROUP))


def _quantization(config: Any) -> dict[str, Any]:
    said = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )
    return dict(said) if isinstance(said, Mapping) else said.to_dict() if said is not None else {}


def skeleton(
    config: Any,
    *,
    dtype: torch.dtype,
    attn_implementation: str | None = None,
    int4: Int4Layout | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Build the base model on the meta device; buffers that no file holds are real.

    Parameters
    ----------
    config : transformers config
        Of as many layers as are wanted.
    dtype : torch.dtype
    attn_implementation : str, optional
    int4 : Int4Layout, optional
        Puts fused INT4 experts in place of the model's own.
    trust_remote_code : bool
    """
    config = deepcopy(config)
    for one in {id(c): c for c in (config, config.get_text_config())}.values():
        if hasattr(one, "quantization_config"):
            del one.quantization_config
    make: Any = AutoModel
    with init_empty_weights(include_buffers=False):
        model = make.from_config(
            config, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code
        )
    _keep_in_float32(model)
    if int4 is not None:
        _fuse(model, int4, dtype)
    return model.eval().requires_grad_(False)


def _keep_in_float32(model: Any) -> None:
    """Tensors that transformers never rounds below float32, as `from_pretrained` treats them."""
    kept = (*(getattr(model, "_keep_in_fp32_modules_strict", None) or ()),)
    for name, tensor in tensors_of(model).items():
        if any(part in name.split(".") for part in kept):
            tensor.data = tensor.data.float()


def _fuse(model: Any, int4: Int4Layout, dtype: torch.dtype) -> None:
    config = model.config.get_text_config()
    found = [
        (name, module)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] == "experts" and hasattr(module, "gate_up_proj")
    ]
    only_dense = config.num_hidden_layers <= (getattr(config, "first_k_dense_replace", None) or 0)
    if not found and not only_dense:
        raise ModelError(
            f"the config speaks of INT4 experts, and {config.model_type} has none that are known; only models whose "
            "blocks keep experts in mlp.experts, as DeepSeek-V3 and Kimi-K2, are read packed"
        )
    for name, module in found:
        fused = Int4Experts(
            module.num_experts,
            config.hidden_size,
            module.down_proj.shape[2],
            dtype=dtype,
            act=config.hidden_act,
            group=int4.group,
            device="meta",
        )
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, fused)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer by name, those that no checkpoint holds too; shared ones once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def place(model: nn.Module, devices: DeviceMap) -> None:
    """Make every tensor of a skeleton on its device: what is on the meta device empty, buffers moved.

    Modules on `disk` stay without weights.
    """
    made: dict[int, Any] = {}
    for path, module in model.named_modules():
        device = device_of(path, devices)
        if device == _DISK:
            continue
        for table, key, tensor in _own(module):
            if id(tensor) not in made:
                there = torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)
                parameter = isinstance(tensor, nn.Parameter)
                made[id(tensor)] = nn.Parameter(there, requires_grad=False) if parameter else there
            table[key] = made[id(tensor)]


def _own(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    tables: list[dict[str, Any]] = [module._parameters, module._buffers]
    for table in tables:
        for key, tensor in list(table.items()):
            if tensor is not None:
                yield table, key, tensor


def device_of(path: str, devices: DeviceMap) -> Any:
    """Return the device of a module or tensor: that of the longest path that it lies below.

    Raises
    ------
    RequestError
        The map has no device for it.
    """
    parts = path.split(".") if path else []
    for end in range(len(parts), -1, -1):
        if (name := ".".join(parts[:end])) in devices:
            return devices[name]
    if any(name.startswith(path) for name in devices):
        return "cpu"  # a container: its children have their own
    raise RequestError(f"the device map has no device for {path}; add it, or one for the whole model under ''")


def balanced(model: Any, *, memory: Mapping[Any, int] | None = None) -> DeviceMap:
    """Spread a skeleton block by block: evenly over the GPUs there are, then over host memory, then the disk.

    Parameters
    ----------
    model : nn.Module
    memory : mapping of device to bytes, optional
        Default what each GPU and the host have.
    """
    blocks = sorted(model._no_split_modules or ())
    most = get_balanced_memory(model, max_memory=memory and dict(memory), no_split_module_classes=blocks)
    found: Any = infer_auto_device_map(model, max_memory=most, no_split_module_classes=blocks, offload_buffers=True)
    return dict(found)


def dispatch(model: Any, devices: DeviceMap, *, on_disk: Mapping[str, Any] | None = None) -> Any:
    """Let a model whose tensors are in place run over several devices.

    Parameters
    ----------
    model : nn.Module
    devices : DeviceMap
    on_disk : mapping, optional
        For every tensor of a module on `disk`, its `safetensors_file`, `weight_name` and `dtype`.
    """
    if len(set(map(str, devices.values()))) == 1 and _DISK not in devices.values():
        return model
    names = {name: str(one) if isinstance(one, torch.device) else one for name, one in devices.items()}
    index = {"offload_index": dict(on_disk)} if on_disk else {}
    placed = dispatch_model(
        model,
        names,
        offload_buffers=True,
        skip_keys=getattr(model, "_skip_keys_device_placement", None),
        **index,
    )
    placed.hf_device_map = names
    return placed
