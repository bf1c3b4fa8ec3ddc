"""The token budget of a request: asked for, that of the plan it goes on with, remembered, or measured now on a GPU."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from capture import budget
from capture.components import ComponentTable
from capture.request import Request, plans_of
from datastore.planning import PlanFile, laid_down, read_plan

__all__ = ["budget_key", "with_budget"]

_MODEL = ("name", "revision", "weights_sha256", "dtype", "adapter", "quantization")


def with_budget(
    request: Request, provenance: Mapping[str, Any], source: Callable[[], tuple[nn.Module, ComponentTable]]
) -> Request:
    """Give a request a measured token budget where it runs on a GPU and names none.

    Processes that carry out parts of one request get one budget, whatever each of them measures: that of the plan which
    lies beside the store, else the one that the first of them remembered. Their HF_HOME must be the same directory.

    Parameters
    ----------
    request : Request
    provenance : mapping
        Of its captures.
    source : callable
        Loads the model; called only where nothing was measured before.
    """
    if request.settings.batch_tokens is not None or not _is_measured(request.settings.device):
        return request
    key = budget_key(request, provenance)
    tokens = _begun(request, provenance) or budget.recall(key)
    if tokens is None:
        model, table = source()
        found = budget.measure(model, table, layers=request.layers, components=request.components)
        tokens = budget.remember(key, found)
    return _at(request, tokens)


def budget_key(request: Request, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What a measured budget depends on."""
    model, environment = provenance["model"], provenance["environment"]
    return {
        **{name: model.get(name) for name in _MODEL},
        "attention": provenance["settings"]["attn_implementation"],
        "device": environment["device"],
        "versions": {name: environment["versions"].get(name) for name in ("torch", "transformers")},
        "layers": list(request.layers),
        "components": list(request.components),
    }


def _is_measured(device: str) -> bool:
    """Whether memory is measured there; on the CPU the budget depends on the model alone."""
    return device != "cpu" and torch.cuda.is_available()


def _at(request: Request, tokens: int) -> Request:
    return replace(request, settings=replace(request.settings, batch_tokens=tokens))


def _begun(request: Request, provenance: Mapping[str, Any]) -> int | None:
    """The budget of the oldest unfinished plan that is of this request but for the budget."""
    plans, asked = list[PlanFile](), {one.rollout_id for one in request.rollouts}
    for directory in laid_down(request.store):
        with suppress(OSError, ValueError):  # another process commits it now, or wrote it otherwise
            plans.append(read_plan(directory))
    for one in sorted(plans, key=lambda plan: (plan.created, plan.request)):
        if not asked.issuperset(one.rollout_ids):
            continue
        again = plans_of(_at(request, one.batch_tokens), provenance)
        if any(plan.request == one.request for plan in again):
            return one.batch_tokens
    return None
