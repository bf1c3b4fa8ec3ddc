"""The command that builds, shows, checks and removes a model's fast-load cache, and moves it to and from the Hub."""

import shutil
import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from datastore import console

if TYPE_CHECKING:
    from capture.cache import Manifest, Wanted
    from capture.loaders import Order
    from capture.modelinfo import ModelInfo

__all__ = ["byte_ticker", "register"]


class Action(StrEnum):
    """What to do with a cache."""

    BUILD = "build"
    INFO = "info"
    VERIFY = "verify"
    RM = "rm"


def register(app: typer.Typer) -> None:
    """Add the command to the command line of capture."""
    app.command("cache")(manage_cache)


def manage_cache(
    action: Annotated[Action, typer.Argument(help="What to do.")],
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model of the Hub or a directory.")],
    *,
    directory: Annotated[
        Path | None,
        typer.Option("--dir", metavar="PATH", help="Default below HF_HOME, where loading looks."),
    ] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Commit, tag or branch on the Hub.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="Default the checkpoint's.")] = None,
    device: Annotated[str, typer.Option("--device", help="Where the model is put together.")] = "cpu",
    from_hub: Annotated[
        str | None,
        typer.Option("--from-hub", metavar="ORG/NAME", help="build: fetch the cache instead; verified."),
    ] = None,
    to_hub: Annotated[
        str | None, typer.Option("--to-hub", metavar="ORG/NAME", help="build: push the cache afterwards; private.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the model's own Python code.")
    ] = False,
    yes: console.Yes = False,
    as_json: console.Json = False,
) -> None:
    """Build, show, verify or remove a model's fast-load cache, which loading uses by itself."""
    if (from_hub or to_hub) and action is not Action.BUILD:
        raise typer.BadParameter(f"--from-hub and --to-hub belong to build, not to {action.value}.")
    from capture import cache, loading
    from capture.loaders import wanted_cache

    info = loading.describe(model, revision=revision, trust_remote_code=trust_remote_code)
    wanted = wanted_cache(info, info.directory, dtype=dtype or info.dtype, n_layers=info.n_layers)
    place = directory or cache.default_directory(wanted)
    if action is Action.BUILD and from_hub:
        _pull(from_hub, wanted, place)
    elif action is Action.BUILD:
        if to_hub:
            _refuse_local(info)
        _build(loading.order_of(info, dtype=dtype, device=device), place, quiet=as_json)
        if to_hub:
            _push(to_hub, place)
    elif action is Action.RM:
        _remove(place, yes=yes)
        return
    manifest = cache.verify(place) if action is Action.VERIFY else cache.read(place)
    cache.check(manifest, wanted, place)
    _show(manifest, place, verified=action is Action.VERIFY, as_json=as_json)


def _build(order: "Order", place: Path, *, quiet: bool) -> None:
    from capture.components import find_components
    from capture.loaders import build_cache
    from capture.loading import load, versions

    with console.progress(quiet=quiet) as bar:
        model = load(
            order.info, dtype=order.dtype, device=_name(order), cache=False, tick=byte_ticker(bar, "load")
        ).model
        blocks = find_components(model).blocks
        build_cache(order, model, place, blocks=blocks, versions=versions(), tick=byte_ticker(bar, "write"))


def _name(order: "Order") -> Any:
    return order.devices or "cpu"


def _pull(repository: str, wanted: "Wanted", place: Path) -> None:
    """Put in place what was downloaded, once every byte of it is known to be good and of this model."""
    from capture import cache, hub

    found = hub.pull(repository)
    cache.check(cache.verify(found), wanted, found)
    cache.link(found, place)


def _refuse_local(info: "ModelInfo") -> None:
    from capture.errors import RequestError

    if info.revision is None:
        raise RequestError(
            f"{info.name} is known by the files of this machine alone, so its cache would fit no other machine's; give "
            "the model's name on the Hub to push its cache"
        )


def _push(repository: str, place: Path) -> None:
    from capture import hub

    console.stderr().print(f"pushed: {hub.push(repository, place)}", soft_wrap=True)  # an address is copied whole


def _remove(place: Path, *, yes: bool) -> None:
    from capture import cache

    manifest = cache.read(place)  # so that nothing but a cache is ever removed
    console.confirm(f"Remove {place} ({console.human_bytes(manifest.n_bytes)})?", yes=yes)
    shutil.rmtree(place)


def _show(manifest: "Manifest", place: Path, *, verified: bool, as_json: bool) -> None:
    of = manifest.of
    if as_json:
        console.emit_json(
            {
                "directory": str(place),
                "model": of.model,
                "revision": of.revision,
                "dtype": of.dtype,
                "quantization": of.quantization,
                "layers": of.n_layers,
                "files": dict(manifest.files),
                "tensors": len(manifest.tensors),
                "bytes": manifest.n_bytes,
                "verified": verified,
            }
        )
        return
    console.stdout().print(
        f"{place}\n{of.model} {of.revision or ''} {of.dtype} {of.quantization}: {of.n_layers} layers, "
        f"{len(manifest.tensors)} tensors in {len(manifest.files)} files, {console.human_bytes(manifest.n_bytes)}"
        + (", every byte as written" if verified else "")
    )


def byte_ticker(bar: Any, what: str) -> Callable[[int, int], None]:
    """Show bytes of weights on a progress bar, in GB/s."""
    tasks, began = list[Any](), time.monotonic()

    def tick(done: int, total: int) -> None:
        if not tasks:
            tasks.append(bar.add_task(what, total=total, note=""))
        rate = done / max(time.monotonic() - began, 1e-9) / 1e9
        bar.update(tasks[0], completed=done, total=total, note=f"{rate:.2f} GB/s")

    return tick
