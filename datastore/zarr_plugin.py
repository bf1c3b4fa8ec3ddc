"""Makes plain zarr-python know bfloat16 by installation alone; installed beside the packages, run at interpreter start.

zarr-python 3.1 collects the entry points of the group `zarr.data_type` and never loads them, so offering the data type
there is not enough. The distribution therefore brings this file as the top-level module `activation_datastore_zarr` and
`activation_datastore_zarr.pth`, which imports it when the interpreter starts. It imports nothing: it waits until
somebody imports zarr, and then has `datastore.dtype` register the data type. It must never get in anybody's way.
"""

import sys


class WhenZarrIsImported:
    """A finder that finds nothing itself: it sees to it that `datastore.dtype` is imported right after zarr, once."""

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        """Return zarr's own spec, whose loader will do a little more; None for all other modules."""
        if name != "zarr":
            return None
        sys.meta_path.remove(self)
        import importlib.util  # not at interpreter start, where every millisecond is everybody's

        spec = importlib.util.find_spec(name)
        loader = getattr(spec, "loader", None)
        load = getattr(loader, "exec_module", None)
        if load is None:
            return spec

        def exec_module(module):  # type: ignore[no-untyped-def]
            del vars(loader)["exec_module"]
            load(module)
            try:  # noqa: SIM105
                import datastore.dtype  # noqa: F401
            except Exception:  # zarr works for every other array
                pass

        vars(loader)["exec_module"] = exec_module
        return spec


if __name__ == "activation_datastore_zarr" and "zarr" not in sys.modules:
    sys.meta_path.insert(0, WhenZarrIsImported())
