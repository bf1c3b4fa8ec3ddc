"""Steering: a multiple of a unit direction is added to what a layer computes, in every forward inside the block."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from capture.components import ComponentTable, Hook, find_components
from capture.errors import CaptureError, RequestError
from experiments.direction import Direction

__all__ = ["steered"]


@contextmanager
def steered(
    model: nn.Module, pushes: Sequence[tuple[Direction, float]], *, table: ComponentTable | None = None
) -> Iterator[None]:
    """While inside, every forward of `model` computes h + c · v/|v| in place of h, at each direction's layer.

    The sum is made in float32 (float64 where the model computes in it) and rounded once to the model's dtype. All
    positions of a forward are pushed: around `generate` the prompt and what is generated; to leave the prompt as it
    was, compute its key-value cache before entering. The hooks are gone at the end, whatever happened.

    Parameters
    ----------
    model : nn.Module
        With or without a head.
    pushes : sequence of (direction, coefficient)
        Directions know their component and layer; several at one place add up. `residual` is the block's output, so
        the blocks above see the change; `resid_pre` its input.
    table : ComponentTable, optional
        From `find_components`, which is done anew where not given.

    Raises
    ------
    RequestError
        A layer or component that the model has not, a direction of another width, a coefficient that is not finite, or
        a component that is only part of a module's output.
    CaptureError
        From within the forward, where a module gives no tensor.

    Examples
    --------
    ::

        with steered(model, [(direction, 4.0)]):
            model.generate(ids, max_new_tokens=20)
    """
    known = table or find_components(model)
    with ExitStack() as stack:
        for direction, coefficient in pushes:
            hook = _checked(known, direction, coefficient)
            added = torch.from_numpy(coefficient * (np.asarray(direction.values, np.float64) / direction.norm))
            stack.callback(_attach(model.get_submodule(hook.path), hook, added).remove)
        yield


def _checked(table: ComponentTable, direction: Direction, coefficient: float) -> Hook:
    hook = table.hook(direction.component, direction.layer)
    if not math.isfinite(coefficient):
        raise RequestError(f"a coefficient of {coefficient} can't steer; give a finite number")
    if hook.columns is not None:
        raise RequestError(
            f"{direction.component} of {table.model_type} is only some columns of {hook.path}, which can't be steered "
            "alone; steer residual or resid_pre"
        )
    if direction.values.size != hook.width:
        raise RequestError(
            f"{direction} has width {direction.values.size} and {hook.component} of {table.model_type} has "
            f"{hook.width}; it is of another model or component"
        )
    return hook


def _attach(module: nn.Module, hook: Hook, added: Tensor) -> Any:
    def on_output(_: nn.Module, __: Any, output: Any) -> Any:
        return _replaced(output, added, hook)

    def on_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (_replaced(args[0], added, hook), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": _replaced(kwargs.get("hidden_states"), added, hook)}

    if hook.take == "input":
        return module.register_forward_pre_hook(on_input, with_kwargs=True)
    return module.register_forward_hook(on_output)


def _replaced(value: Any, added: Tensor, hook: Hook) -> Any:
    """Return the value with its tensor pushed; of a tuple the first element is the tensor."""
    if isinstance(value, (tuple, list)) and value:
        return type(value)((_replaced(value[0], added, hook), *value[1:]))
    if not isinstance(value, Tensor):
        raise CaptureError(
            f"{hook.path} gave a {type(value).__name__} as its {hook.take}, not a tensor, so {hook.component} of layer "
            f"{hook.layer} can't be steered"
        )
    wide = torch.promote_types(value.dtype, torch.float32)
    return (value.to(wide) + added.to(value.device, wide)).to(value.dtype)
