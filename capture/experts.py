"""INT4 experts of one mixture-of-experts block, fused: packed in memory, multiplied out a few at a time.

The module takes the place of transformers' own experts module and has its `forward(hidden_states, top_k_index,
top_k_weights)`. Its weights are those of compressed-tensors `pack-quantized`: eight signed nibbles an int32, the lowest
first, offset by 8, one scale for each group of 32 inputs, stacked over the experts.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

__all__ = ["GROUP", "PROJECTIONS", "WORKSPACE", "Int4Experts", "dequantise", "set_workspace"]

GROUP = 32
"""Inputs that share a scale, where the config does not say otherwise."""
WORKSPACE = 2 << 30
"""Bytes of weights multiplied out at a time, and of what doing so takes."""
PROJECTIONS = ("gate", "up", "down")
_WORD = 8


class Int4Experts(nn.Module):
    """Experts `down(act(gate(x)) * up(x))` with INT4 weights.

    Parameters
    ----------
    n_experts, hidden, inner : int
        Sizes; `hidden` and `inner` are multiples of `group`.
    dtype : torch.dtype
        Of the scales, the arithmetic and the result.
    act : str
        Name of the activation in transformers.
    group : int
        Inputs that share a scale.
    device : optional

    Attributes
    ----------
    gate_packed, up_packed : int32 [n_experts, inner, hidden / 8]
    down_packed : int32 [n_experts, hidden, inner / 8]
    gate_scale, up_scale, down_scale : [n_experts, rows, columns / group]
    workspace : int
        Bytes as for `WORKSPACE`; at least one expert's projection is always multiplied out at a time.
    direct : bool
        Multiply INT4 directly on a GPU that has the kernel, with no workspace at all.
    """

    workspace: int = WORKSPACE
    direct: bool = True

    def __init__(
        self,
        n_experts: int,
        hidden: int,
        inner: int,
        *,
        dtype: torch.dtype = torch.bfloat16,
        act: str = "silu",
        group: int = GROUP,
        device: Any = None,
    ) -> None:
        super().__init__()
        if hidden % group or inner % group or group % _WORD:
            raise ValueError(f"experts of {hidden} x {inner} do not divide into groups of {group} inputs")
        self.n_experts, self.hidden, self.inner, self.group = n_experts, hidden, inner, group
        self.act, self.act_fn = act, ACT2FN[act]
        for name in PROJECTIONS:
            rows, columns = (hidden, inner) if name == "down" else (inner, hidden)
            packed = torch.empty(n_experts, rows, columns // _WORD, dtype=torch.int32, device=device)
            scale = torch.empty(n_experts, rows, columns // group, dtype=dtype, device=device)
            self.register_buffer(f"{name}_packed", packed)
            self.register_buffer(f"{name}_scale", scale)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Send each token through its experts.

        Parameters
        ----------
        hidden_states : [tokens, hidden]
        top_k_index, top_k_weights : [tokens, k]
            Each token's experts, and what their results count.

        Returns
        -------
        [tokens, hidden]
            The weighted sum, taken in float32 in the order of `k`, so that the same routing gives the same bits.
        """
        order = top_k_index.reshape(-1).argsort(stable=True)
        sorted_experts = top_k_index.reshape(-1)[order]
        experts = torch.arange(self.n_experts, device=order.device, dtype=sorted_experts.dtype)
        ends = torch.searchsorted(sorted_experts, experts, right=True).to(torch.int32)
        token = order // top_k_index.shape[1]
        multiply = _kernel(hidden_states, self) or _multiply
        rows = multiply(self, hidden_states, token=token, ends=ends)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        out = torch.zeros(hidden_states.shape, dtype=torch.float32, device=rows.device)
        for choice, weight in zip(place.view_as(top_k_index).unbind(1), top_k_weights.unbind(1), strict=True):
            out.addcmul_(rows.index_select(0, choice).float(), weight[:, None].float())
        return out.to(hidden_states.dtype)

    def weights(self, name: str, experts: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """Return one projection of some experts, multiplied out: [experts, rows, columns]."""
        return dequantise(getattr(self, f"{name}_packed")[experts], getattr(self, f"{name}_scale")[experts], dtype)

    def extra_repr(self) -> str:
        """Return the sizes."""
        return f"{self.n_experts} experts, {self.hidden} x {self.inner}, INT4 in groups of {self.group}"


def set_workspace(model: nn.Module, n_bytes: int) -> None:
    """Let every module of fused experts in a model multiply out so many bytes at a time."""
    for module in model.modules():
        if isinstance(module, Int4Experts):
            module.workspace = n_bytes


def dequantise(packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply INT4 weights out.

    Parameters
    ----------
    packed : int32 [..., rows, columns / 8]
    scale : [..., rows, columns / group]
    dtype : torch.dtype
        Of the result; each weight is one product, rounded once.

    Returns
    -------
    [..., rows, columns]
    """
    pairs = _pairs(dtype, packed.device)
    flat = packed.contiguous().view(torch.uint8).to(torch.int32).reshape(-1)
    values = pairs.index_select(0, flat).view(*scale.shape, -1)
    return values.mul_(scale.to(dtype)[..., None]).view(*packed.shape[:-1], -1)


@cache
def _pairs(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The two signed nibbles of every byte, low first: [256, 2]."""
    bytes_ = torch.arange(256, device=device)
    return torch.stack([bytes_ & 15, bytes_ >> 4], dim=1).sub_(8).to(dtype)


def _multiply(module: Int4Experts, x: Tensor, *, token: Tensor, ends: Tensor) -> Tensor:
    """Rows of the sorted (token, expert) pairs, [pairs, hidden]: one projection of some active experts at a time."""
    rows = torch.empty(len(token), module.hidden, dtype=x.dtype, device=x.device)
    bounds = [0, *ends.tolist()]
    active = [expert for expert in range(module.n_experts) if bounds[expert + 1] > bounds[expert]]
    one = module.hidden * module.inner * (x.element_size() + 2)
    for chunk in _chunks(active, max(1, module.workspace // one)):
        first, last = bounds[chunk[0]], bounds[chunk[-1] + 1]
        offsets = torch.tensor([bounds[e + 1] - first for e in chunk], dtype=torch.int32, device=x.device)
        whole = chunk[-1] - chunk[0] + 1 == len(chunk)
        experts = slice(chunk[0], chunk[-1] + 1) if whole else torch.tensor(chunk, device=x.device)
        inputs = x.index_select(0, token[first:last])
        gate = _grouped(inputs, module.weights("gate", experts, x.dtype), offsets)
        inner = module.act_fn(gate).mul_(_grouped(inputs, module.weights("up", experts, x.dtype), offsets))
        rows[first:last] = _grouped(inner, module.weights("down", experts, x.dtype), offsets)
    return rows


def _chunks(items: Sequence[int], size: int) -> list[Sequence[int]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _grouped(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Rows of each group times that group's weights, transposed: [rows, in], [groups, out, in] -> [rows, out]."""
    if x.dtype is torch.bfloat16 and hasattr(F, "grouped_mm") and _has_kernel(x.device):
        return F.grouped_mm(x, weights.transpose(-2, -1), offs=ends)
    out, start = x.new_empty(len(x), weights.shape[1]), 0
    for one, end in zip(weights, ends.tolist(), strict=True):
        torch.mm(x[start:end], one.T, out=out[start:end])
        start = end
    return out


def _has_kernel(device: torch.device) -> bool:
    return device.type == "cpu" or (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0))


def _kernel(x: Tensor, module: Int4Experts) -> Callable[..., Tensor] | None:
    """What multiplies INT4 directly on this device, where there is such a kernel for these sizes."""
    if (
        not module.direct
        or x.device.type != "cuda"
        or x.dtype is not torch.bfloat16
        or module.gate_packed.device != x.device
    ):
        return None
    try:
        from capture import experts_triton  # Triton is there on a GPU only
    except ImportError:
        return None
    return experts_triton.multiply if experts_triton.fits(module) else None
