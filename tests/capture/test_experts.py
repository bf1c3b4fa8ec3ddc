"""Fused INT4 experts against the plainest loop over the same packed weights, under every kind of routing."""

import pytest
import torch
from torch import Tensor

from capture.experts import Int4Experts, dequantise
from tests import kimi

EXPERTS, HIDDEN, INNER, K = 12, 64, 32, 4


def random_experts(dtype: torch.dtype) -> Int4Experts:
    generator = torch.Generator().manual_seed(1)
    module = Int4Experts(EXPERTS, HIDDEN, INNER, dtype=dtype)
    for name, buffer in module.named_buffers():
        if name.endswith("packed"):
            buffer.random_(-(1 << 31), (1 << 31) - 1, generator=generator)
        else:
            buffer.copy_(torch.rand(buffer.shape, generator=generator) * 0.05 + 0.01)
    return module


def loop(module: Int4Experts, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Each token, each of its experts, one after the other, with weights unpacked word by word."""
    parts = {
        name: [
            kimi.unpack(p, s)
            for p, s in zip(module.get_buffer(f"{name}_packed"), module.get_buffer(f"{name}_scale"), strict=True)
        ]
        for name in ("gate", "up", "down")
    }
    out = torch.zeros(x.shape, dtype=torch.float64)
    for expert in range(module.n_experts):
        token, choice = torch.where(index == expert)
        gate, up, down = (parts[name][expert] for name in ("gate", "up", "down"))
        inner = torch.nn.functional.silu(x[token] @ gate.T) * (x[token] @ up.T)
        out.index_add_(0, token, (inner @ down.T).double() * weights[token, choice, None].double())
    return out


def routing(kind: str, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    if kind == "one expert takes all":
        return torch.full((tokens, K), 7)
    few = 5 if kind == "experts with none" else EXPERTS
    return torch.rand(tokens, few, generator=generator).argsort(1)[:, :K] + (3 if few == 5 else 0)


@pytest.mark.parametrize("workspace", [1, 3 * HIDDEN * INNER * 4, 1 << 30])
@pytest.mark.parametrize(
    ("kind", "tokens"),
    [("any", 1), ("any", 200), ("one expert takes all", 50), ("experts with none", 100), ("any", 16_384), ("any", 0)],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_they_equal_the_loop(kind: str, tokens: int, workspace: int, dtype: torch.dtype, tolerance: float) -> None:
    module, generator = random_experts(dtype), torch.Generator().manual_seed(3)
    module.workspace = workspace
    x = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    weights = torch.rand(tokens, K, generator=generator)
    index = routing(kind, tokens)
    out = module(x, index, weights)
    expected = loop(module, x, index, weights)
    assert out.dtype is dtype
    assert out.shape == x.shape
    assert (out.double() - expected).norm() <= tolerance * expected.norm()
    assert torch.equal(out, module(x, index, weights)), "the same bits again"


def test_a_token_sent_twice_to_one_expert_counts_twice() -> None:
    module = random_experts(torch.float32)
    x, index = torch.randn(3, HIDDEN), torch.full((3, 2), 5)
    twice = module(x, index, torch.full((3, 2), 0.5))
    torch.testing.assert_close(twice, module(x, index[:, :1], torch.ones(3, 1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_multiplied_out_to_the_bit(dtype: torch.dtype) -> None:
    packed = torch.randint(-(1 << 31), (1 << 31) - 1, (3, 16, 8), dtype=torch.int32)
    scale = torch.rand(3, 16, 2).to(dtype)
    expected = torch.stack([kimi.unpack(p, s) for p, s in zip(packed, scale, strict=True)])
    assert torch.equal(dequantise(packed, scale, dtype), expected)


def test_sizes_that_do_not_divide_into_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="experts of 48 x 32 do not divide into groups of 32 inputs"):
        Int4Experts(2, 48, 32)
