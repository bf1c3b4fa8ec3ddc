"""The token budget of a request: what was asked for, what was measured before, or what is measured now on a GPU."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from capture import budget
from capture.components import ComponentTable
from capture.request import Request

__all__ = ["budget_key", "with_budget"]

_MODEL = ("name", "revision", "weights_sha256", "dtype", "adapter", "quantization")


def with_budget(
    request: Request, provenance: Mapping[str, Any], source: Callable[[], tuple[nn.Module, ComponentTable]]
) -> Request:
    """Give a request a measured token budget where it runs on a GPU and names none.

    Parameters
    ----------
    request : Request
    provenance : mapping
        Of its captures.
    source : callable
        Loads the model; called only where nothing was measured before.
    """
    settings = request.settings
    if settings.batch_tokens is not None or settings.device == "cpu" or not torch.cuda.is_available():
        return request
    key = budget_key(request, provenance)
    tokens = budget.recall(key)
    if tokens is None:
        model, table = source()
        found = budget.measure(model, table, layers=request.layers, components=request.components)
        tokens = budget.remember(key, found)
    return replace(request, settings=replace(settings, batch_tokens=tokens))


def budget_key(request: Request, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What a measured budget depends on."""
    model, environment = provenance["model"], provenance["environment"]
    return {
        **{
            name: model.get(name) for name in ("name", "revision", "weights_sha256", "dtype", "adapter", "quantization")
        },
        "attention": provenance["settings"]["attn_implementation"],
        "device": environment["device"],
        "versions": {name: environment["versions"].get(name) for name in ("torch", "transformers")},
        "layers": list(request.layers),
        "components": list(request.components),
    }
