"""The xarray engine "activations": `xr.open_dataset("run.zarr", engine="activations")` is `open(...).dataset()`."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import xarray as xr
from xarray.backends import BackendEntrypoint

from datastore import query, storage
from datastore.errors import DatastoreError

__all__ = ["ActivationsBackend"]


class ActivationsBackend(BackendEntrypoint):
    """Opens an activation store as one lazy Dataset."""

    description: ClassVar[str] = "Open an activation store as one lazy Dataset"
    url: ClassVar[str] = ""

    def open_dataset(self, filename_or_obj: Any, *, drop_variables: str | Iterable[str] | None = None) -> xr.Dataset:
        """Open the union of a store's captures.

        Raises
        ------
        NotAStoreError
            The path is no activation store.
        """
        dropped = [drop_variables] if isinstance(drop_variables, str) else list(drop_variables or ())
        return query.open(filename_or_obj).dataset().drop_vars(dropped, errors="ignore")

    def guess_can_open(self, filename_or_obj: Any) -> bool:
        """Whether it is the path of an activation store."""
        if not isinstance(filename_or_obj, str | os.PathLike):
            return False
        try:
            storage.open_root(Path(filename_or_obj))
        except (DatastoreError, OSError, ValueError):
            return False
        return True
