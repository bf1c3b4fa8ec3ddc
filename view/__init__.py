"""The web viewer of a store, and the HTTP query API beside it.

>>> import view
>>> view.app("run.zarr")     # doctest: +SKIP

Names are loaded when first used, so that a command's help does not wait for Panel or xarray.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from view.page import app
    from view.server import serve

_HOMES = {"view.page": ("app",), "view.server": ("serve",)}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = ["app", "serve"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'view' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
