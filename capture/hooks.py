"""Hooks on several components and layers for one forward pass; each tensor goes to a sink the moment it appears."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from capture.components import Hook
from capture.errors import CaptureError

Sink = Callable[[str, int, Tensor], None]


@contextmanager
def tapped(model: nn.Module, hooks: Iterable[Hook], sink: Sink) -> Iterator[None]:
    """While inside, every forward of `model` hands each hook's tensor to `sink(component, layer, tensor)`.

    The tensor is the model's own, detached: a sink copies what it keeps, for the model may write to it in place right
    after (Falcon does). Nothing is ever returned to the model, so its results do not change. The hooks are gone at the
    end, whatever happened.

    Raises
    ------
    CaptureError
        From within the forward, where a module gives no tensor.
    """
    with ExitStack() as stack:
        for hook in hooks:
            stack.callback(_attach(model.get_submodule(hook.path), hook, sink).remove)
        yield


def _attach(module: nn.Module, hook: Hook, sink: Sink) -> Any:
    def on_output(_: nn.Module, __: Any, output: Any) -> None:
        sink(hook.component, hook.layer, _chosen(output, hook))

    def on_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sink(hook.component, hook.layer, _chosen(args[0] if args else kwargs.get("hidden_states"), hook))

    if hook.take == "input":
        return module.register_forward_pre_hook(on_input, with_kwargs=True)
    return module.register_forward_hook(on_output)


def _chosen(value: Any, hook: Hook) -> Tensor:
    tensor = value[0] if isinstance(value, (tuple, list)) and value else value
    if not isinstance(tensor, Tensor):
        raise CaptureError(
            f"{hook.path} gave a {type(tensor).__name__} as its {hook.take}, not a tensor, so {hook.component} "
            "of layer "
            f"{hook.layer} can't be captured; give another module with --hook-path {hook.component}=..."
        )
    tensor = tensor.detach()
    if hook.columns is None:
        return tensor
    parts = tensor.reshape(*tensor.shape[:-1], hook.columns.groups, -1)
    kept = parts[..., hook.columns.start : hook.columns.start + hook.columns.width]
    return kept.reshape(*tensor.shape[:-1], hook.width)
