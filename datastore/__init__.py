"""A Zarr-backed store for transformer activations: plan a capture, fill it, open the store, query it.

>>> import datastore
>>> store = datastore.open("run.zarr")                                   # doctest: +SKIP
>>> store.select("residual", rollouts="71", layers=20).mean("token")     # doctest: +SKIP

Names are loaded when first used, so that a command's help does not wait for Zarr or xarray.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datastore.errors import (
        AbsentError,
        BusyError,
        ConflictError,
        CorruptError,
        DatastoreError,
        MisuseError,
        NewerFormatError,
        NotAStoreError,
        PlanError,
        ReadOnlyError,
    )
    from datastore.planning import plan
    from datastore.query import Store, open
    from datastore.schema import Annotation, Batch, Codec, ComponentSpec, Plan, Rollout
    from datastore.stats import Moments
    from datastore.stream import Block
    from datastore.writer import Writer, create

_HOMES = {
    "datastore.errors": (
        "AbsentError",
        "BusyError",
        "ConflictError",
        "CorruptError",
        "DatastoreError",
        "MisuseError",
        "NewerFormatError",
        "NotAStoreError",
        "PlanError",
        "ReadOnlyError",
    ),
    "datastore.planning": ("plan",),
    "datastore.query": ("Store", "open"),
    "datastore.schema": ("Annotation", "Batch", "Codec", "ComponentSpec", "Plan", "Rollout"),
    "datastore.stats": ("Moments",),
    "datastore.stream": ("Block",),
    "datastore.writer": ("Writer", "create"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "AbsentError",
    "Annotation",
    "Batch",
    "Block",
    "BusyError",
    "Codec",
    "ComponentSpec",
    "ConflictError",
    "CorruptError",
    "DatastoreError",
    "MisuseError",
    "Moments",
    "NewerFormatError",
    "NotAStoreError",
    "Plan",
    "PlanError",
    "ReadOnlyError",
    "Rollout",
    "Store",
    "Writer",
    "create",
    "open",
    "plan",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'datastore' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
