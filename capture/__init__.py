"""Rows enter a store here: models and their hooks, batching, loading, and the capture of rollouts.

>>> import capture
>>> capture.run(model, tokenizer, rollouts, "run.zarr", layers="all", components=("residual",))   # doctest: +SKIP

Names are loaded when first used, so that a command's help does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from capture.components import ComponentTable, find_components
    from capture.errors import CaptureError, ModelError, NoMemoryError, RequestError
    from capture.layerspec import parse_layers
    from capture.loading import Loaded, describe, load
    from capture.modelinfo import ModelInfo
    from capture.runner import Done, run
    from capture.steering import steered
    from capture.tokens import Rendered, render

_HOMES = {
    "capture.components": ("ComponentTable", "find_components"),
    "capture.errors": ("CaptureError", "ModelError", "NoMemoryError", "RequestError"),
    "capture.layerspec": ("parse_layers",),
    "capture.loading": ("Loaded", "describe", "load"),
    "capture.modelinfo": ("ModelInfo",),
    "capture.runner": ("Done", "run"),
    "capture.steering": ("steered",),
    "capture.tokens": ("Rendered", "render"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "CaptureError",
    "ComponentTable",
    "Done",
    "Loaded",
    "ModelError",
    "ModelInfo",
    "NoMemoryError",
    "Rendered",
    "RequestError",
    "describe",
    "find_components",
    "load",
    "parse_layers",
    "render",
    "run",
    "steered",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'capture' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
