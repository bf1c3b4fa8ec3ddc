"""The command line of view: `python -m view run.zarr [more.zarr ...]`; `view export`, `view api`.

What draws and serves is imported inside the commands, so that help is instant.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from datastore import console

if TYPE_CHECKING:
    from datastore.query import Store

__all__ = ["app"]

app = console.CommandGroup(
    help="Look at stores in a web browser: transcripts, trait scores token by token, comparisons.", default="view"
)

Stores = Annotated[list[Path], typer.Argument(metavar="STORE...", help="Stores; the first is shown first.")]
Host = Annotated[str, typer.Option("--host", help="Address to listen on; elsewhere than here a --token is needed.")]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0 takes a free one.")]
Token = Annotated[
    str | None, typer.Option("--token", envvar="ADS_VIEW_TOKEN", help="What a client must know: ?token=, or a header.")
]


@app.command("view", hidden=True)
def view(
    stores: Stores,
    *,
    port: Port = 5006,
    host: Host = "127.0.0.1",
    token: Token = None,
    open_: Annotated[bool, typer.Option("--open", help="Open the page in a web browser.")] = False,
) -> None:
    """Serve the page, and the query API beside it under /api."""
    from view.server import serve

    serve(_opened(stores), host=host, port=port, token=token, open_browser=open_)


@app.command("api")
def api(stores: Stores, *, port: Port = 5006, host: Host = "127.0.0.1", token: Token = None) -> None:
    """Serve the query API alone, under /api."""
    from view.server import serve

    serve(_opened(stores), host=host, port=port, token=token, page=False)


@app.command("export")
def export(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="The store.")],
    *,
    ids: console.Ids = None,
    where: console.Where = None,
    limit: console.Limit = None,
    export: console.Export = "html",
    out: console.Out = None,
) -> None:
    """Write rollouts for someone without the store: one self-contained page (html), or a tree (json)."""
    from datastore.choose import choose

    if export not in ("html", "json"):
        raise typer.BadParameter(f"--export {export!r} is not known; html writes one page, json a tree of files.")
    if out is None:
        raise typer.BadParameter("Name with --out where to write: a file for html, a directory for json.")
    (opened,) = _opened([store])
    names = choose(opened.rollouts, ids=console.parse_list(ids), where=where, limit=limit)
    if export == "html":
        from view.export import write_page

        write_page(opened, names, out=out)
        console.stdout().print(f"{len(names)} rollouts written to {out}")
        return
    from view.legacy import write_tree

    console.stdout().print(f"{write_tree(opened, out, rollouts=names)} files written under {out}")


def _opened(paths: list[Path]) -> "list[Store]":
    import datastore

    return [datastore.open(path) for path in paths]
