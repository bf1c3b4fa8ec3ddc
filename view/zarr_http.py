"""The stores' own files over HTTP, byte for byte: `xr.open_zarr("http://127.0.0.1:5006/zarr/run/captures/0001")`.

Only what is a committed part of a store is served: the metadata and arrays below its numbered groups. What is being
written, plans, hidden files and whatever a link points to outside the store are not there, whichever way the path is
spelled. Ranges, ETags, conditional requests and HEAD are Starlette's.
"""

import os
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from datastore.errors import DatastoreError
from datastore.query import Store
from datastore.storage import ROOT_GROUPS
from view.formats import JSON, PIECE
from view.shelf import Shelf

__all__ = ["StoreFiles", "zarr_app"]

_NUMBER = re.compile(r"[0-9]{4,9}")
_MOST_LISTED = 10_000


class StoreFiles(StaticFiles):
    """An ASGI application that serves `/{store}/{path}` from the stores of a shelf, and nothing else.

    Parameters
    ----------
    shelf : Shelf
    """

    def __init__(self, shelf: Shelf) -> None:
        super().__init__(check_dir=False)
        self._shelf = shelf

    async def check_config(self) -> None:
        """Do nothing: the stores were there when they were opened, and one that is gone answers 404."""

    def get_path(self, scope: Scope) -> str:
        """Return the path below the mount as it stands: no part of it is ever resolved away."""
        path: str = scope["path"]
        return path.removeprefix(scope.get("root_path", "")).removeprefix("/")

    def lookup_path(self, path: str) -> tuple[str, os.stat_result | None]:
        """Return the file of a URL's path; no file where it is not a committed part of a store."""
        name, _, inside = path.partition("/")
        found = self._inside(name, inside.removesuffix("/")) if inside else None
        if found is None:
            return "", None
        try:
            return str(found), found.stat()
        except OSError:
            return "", None

    def _inside(self, name: str, inside: str) -> Path | None:
        try:
            root = self._shelf.named(name).path
        except DatastoreError:
            return None
        parts = inside.split("/")
        if not _committed(parts):
            return None
        found = Path(os.path.realpath(root.joinpath(*parts)))
        return found if found.is_relative_to(os.path.realpath(root)) else None

    async def get_response(self, path: str, scope: Scope) -> Response:
        """Answer with a file, or with the list of a group's members."""
        try:
            answer = await super().get_response(path, scope)
            if isinstance(answer, FileResponse):
                answer.chunk_size = PIECE  # a chunk is megabytes, and the usual pieces are small
                # whatever a store's files are called, a browser that opens one runs nothing
                answer.headers["content-type"] = JSON if path.endswith("/zarr.json") else "application/octet-stream"
                answer.headers["x-content-type-options"] = "nosniff"
            return answer
        except HTTPException as error:
            if error.status_code != 404:
                raise
        if (listed := self._listed(path)) is not None:
            return listed
        raise HTTPException(404, f"there is no {path[:200]!r} in the stores that are served")

    def _listed(self, path: str) -> Response | None:
        """Return links to a group's members, by which Zarr readers find what has no consolidated metadata."""
        name, _, inside = path.removesuffix("/").partition("/")
        try:
            root = self._shelf.named(name).path if name else None
        except DatastoreError:
            return None
        found = root if not inside else self._inside(name, inside)
        if root is None or found is None or not os.path.isdir(found) or not _is_group(found):
            return None
        shown = found.relative_to(os.path.realpath(root)).parts if inside else ()
        names = [one for one in sorted(os.listdir(found))[:_MOST_LISTED] if _committed([*shown, one])]
        slashes = [one + "/" * (found / one).is_dir() for one in names]
        links = "".join(f'<a href="{quote(one)}">{escape(one)}</a><br>\n' for one in slashes)
        return HTMLResponse(f"<!doctype html><title>{escape(path)}</title>\n{links}")


def _is_group(path: Path) -> bool:
    try:
        return b'"node_type": "group"' in (path / "zarr.json").read_bytes()[:4096]
    except OSError:
        return False


def _committed(parts: Sequence[str]) -> bool:
    """Whether a path inside a store is one of a committed part: `zarr.json`, `captures/0001/...` and its like."""
    if any(not part or part.startswith(".") or ".partial" in part or "\0" in part for part in parts):
        return False
    if parts[0] == "zarr.json":
        return len(parts) == 1
    if parts[0] not in ROOT_GROUPS:
        return False
    return len(parts) < 2 or parts[1:] == ["zarr.json"] or _NUMBER.fullmatch(parts[1]) is not None


def zarr_app(stores: Sequence[Store]) -> StoreFiles:
    """Return an ASGI application for `app.mount("/zarr", zarr_app(stores))`.

    Parameters
    ----------
    stores : sequence of Store
        Served under the names that the query API lists.
    """
    return StoreFiles(Shelf.of(stores))
