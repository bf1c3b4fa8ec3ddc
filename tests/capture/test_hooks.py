"""Hooks see each tensor once, change nothing, and are gone afterwards."""

from typing import Any

import pytest
import torch
from torch import nn

from capture.components import Hook, find_components
from capture.families import Columns
from capture.hooks import tapped
from tests.capture import tiny


def hooks_left(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_each_tensor_once_in_the_order_of_the_model_and_the_result_is_unchanged() -> None:
    model = tiny.tiny_model("gpt2")
    table = find_components(model)
    ids = torch.arange(2, 9)[None]
    before = model(input_ids=ids).last_hidden_state
    seen: list[tuple[str, int]] = []
    hooks = [table.hook(c, layer) for layer in (2, 0) for c in ("residual", "k_proj", "v_proj", "resid_pre", "mlp_out")]
    with tapped(model, hooks, lambda c, layer, _: seen.append((c, layer))):
        during = model(input_ids=ids).last_hidden_state
    order = ("resid_pre", "k_proj", "v_proj", "mlp_out", "residual")
    assert seen == [(c, layer) for layer in (0, 2) for c in order]
    assert torch.equal(before, during)
    assert not hooks_left(model)


def test_the_sinks_result_never_replaces_the_models() -> None:
    model = nn.Sequential(nn.Identity())
    hook = Hook(component="residual", layer=0, path="0", width=2)
    returning: Any = lambda *_: torch.zeros(1, 2)  # noqa: E731 - a sink that breaks its contract
    with tapped(model, [hook], returning):
        assert torch.equal(model(torch.ones(1, 2)), torch.ones(1, 2))


@pytest.mark.parametrize("where", ["sink", "path", "body"])
def test_hooks_are_removed_whatever_fails(where: str) -> None:
    model = nn.Sequential(nn.Identity(), nn.Identity())
    hooks = [
        Hook(component="residual", layer=i, path=str(i) if i < 2 or where == "path" else "0", width=2) for i in range(3)
    ]

    def sink(_: str, __: int, tensor: torch.Tensor) -> None:
        if where == "sink":
            raise KeyError("sink")

    def use() -> None:
        with tapped(model, hooks, sink):
            model(torch.ones(1, 2))
            raise KeyError("body")

    with pytest.raises((KeyError, AttributeError)):
        use()
    assert not hooks_left(model)


def test_inputs_by_position_or_name_tuples_and_columns() -> None:
    class Block(nn.Module):
        def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, None]:
            return hidden_states * 2, None

    model, given = Block(), torch.arange(12.0).reshape(1, 1, 12)
    seen: list[torch.Tensor] = []
    columns = Columns(groups=2, start=4, width=2)
    hooks = [
        Hook(component="resid_pre", layer=0, path="", width=12, take="input"),
        Hook(component="residual", layer=0, path="", width=12),
        Hook(component="v_proj", layer=0, path="", width=4, columns=columns),
    ]
    with tapped(model, hooks, lambda _, __, tensor: seen.append(tensor)):
        model(given)
        model(hidden_states=given)
    assert [tensor.flatten().tolist() for tensor in seen] == 2 * [
        list(range(12)),
        list(range(0, 24, 2)),
        [8, 10, 20, 22],
    ]
