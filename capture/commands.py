"""The command line of capture: `python -m capture --store run.zarr`.

Torch and transformers are imported inside the command, so that help is instant.
"""

import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from capture import cache_commands, exchange, submitting
from datastore import console

if TYPE_CHECKING:
    from torch import nn

    from capture.components import ComponentTable
    from capture.request import Request
    from capture.runner import Done, Tick

__all__ = ["app"]

app = console.CommandGroup(
    help="Capture a model's activations over rollouts into a store. Without options but --store: a tiny model "
    "over rollouts of a game that it plays.",
    default="capture",
)

cache_commands.register(app)
exchange.register(app)
submitting.register(app)

CODECS = ("zstd", "lz4", "none")


@app.command("capture", hidden=True)
def capture(
    *,
    store: Annotated[
        Path | None, typer.Option("--store", metavar="PATH", help="The store; made where there is none.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME|DIR", help="A model of the Hub or a directory.")
    ] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Commit, tag or branch on the Hub.")] = None,
    inputs: console.Input = None,
    experiment: Annotated[
        Path | None,
        typer.Option("--experiment", metavar="DIR", help="An experiment tree: model, responses, place of the store."),
    ] = None,
    prompt_set: Annotated[
        str | None, typer.Option("--prompt-set", metavar="NAME", help="Which responses of the tree.")
    ] = None,
    model_variant: Annotated[
        str | None, typer.Option("--model-variant", metavar="NAME", help="Which model of the tree.")
    ] = None,
    responses_from: Annotated[
        str | None, typer.Option("--responses-from", metavar="NAME", help="Whose responses; default the variant's own.")
    ] = None,
    layers: console.Layers = "all",
    components: console.Components = "residual",
    ids: console.Ids = None,
    where: console.Where = None,
    limit: console.Limit = None,
    response_only: Annotated[
        bool, typer.Option("--response-only", help="Store the response's rows only; positions count from its start.")
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Capture again what is there; the new capture counts.")
    ] = False,
    part: Annotated[
        str | None,
        typer.Option("--part", metavar="I/N", help="Fill part I of N of the plan; default what torchrun or srun says."),
    ] = None,
    batch_tokens: Annotated[
        str, typer.Option("--batch-tokens", metavar="auto|N", help="Padded tokens a batch.")
    ] = "auto",
    codec: Annotated[str, typer.Option("--codec", metavar="|".join(CODECS), help="Compression.")] = "zstd",
    chunk_tokens: Annotated[int, typer.Option("--chunk-tokens", min=1, help="Most tokens a chunk.")] = 1024,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Cut rollouts longer than the model's context; recorded.")
    ] = False,
    device: Annotated[
        str,
        typer.Option("--device", help="auto, cpu, cuda, cuda:1, or a .json map of modules to devices."),
    ] = "auto",
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Compute and store in this dtype; default the checkpoint's.")
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option("--adapter", metavar="DIR|NAME", help="A LoRA adapter over the model; recorded. A variant's own."),
    ] = None,
    quantize: Annotated[
        str | None, typer.Option("--quantize", metavar="8bit|4bit", help="Quantise by bitsandbytes while loading.")
    ] = None,
    expert_workspace: Annotated[
        str, typer.Option("--expert-workspace", metavar="SIZE", help="Memory to multiply INT4 experts out in.")
    ] = "2GiB",
    hook_path: Annotated[
        list[str] | None,
        typer.Option("--hook-path", metavar="COMPONENT=PATH", help="Where a component is, as model.blocks.{layer}."),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the model's own Python code.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Fail at the first value that is not finite.")] = False,
    memory: console.Memory = console.DEFAULT_MEMORY,
    dry_run: console.DryRun = False,
    as_json: console.Json = False,
) -> None:
    """Capture activations of rollouts into a store; the same command goes on where it was interrupted."""
    (piece, device), budget, hook_paths = _part(part, device), _budget(batch_tokens), _hook_paths(hook_path)
    workspace = console.parse_bytes(expert_workspace)
    if codec not in CODECS:
        raise typer.BadParameter(f"--codec {codec!r} is not known; choose one of {', '.join(CODECS)}.")
    chosen = console.parse_list(ids)
    if experiment is None and (store is None or prompt_set or model_variant or responses_from):
        lacks = "--store (or --experiment)" if store is None else "--experiment, of which the others speak"
        raise typer.BadParameter(f"Missing option {lacks}.")
    if experiment is not None and inputs:
        raise typer.BadParameter("--input and --experiment both name transcripts; give one of them.")
    # Seconds to load; what is wrong with the command line itself is said before.
    from capture.experiment_source import read_tree
    from capture.loading import describe
    from capture.request import Choice, Settings, read_request

    transcripts: Sequence[Any] | None = inputs
    if experiment is not None:
        tree = read_tree(
            experiment,
            prompt_set=prompt_set,
            variant=model_variant,
            responses_from=responses_from,
            store=store,
            model=model,
        )
        store, model, transcripts = tree.store, tree.model, tree.transcripts
        adapter = adapter or tree.adapter
    assert store is not None  # without a tree it was asked for above

    described: Any = model
    if adapter or quantize:
        if model is None:
            raise typer.BadParameter("--adapter and --quantize speak of a model; name it with --model.")
        described = describe(
            model, revision=revision, trust_remote_code=trust_remote_code, adapter=adapter, quantize=quantize
        )
    request = read_request(
        store,
        model=described,
        revision=revision,
        inputs=transcripts,
        layers=layers or "all",
        components=console.parse_list(components) or (),
        choice=Choice(ids=chosen, where=where, limit=limit),
        settings=Settings(
            batch_tokens=budget,
            codec=codec,
            chunk_tokens=chunk_tokens,
            replace=replace,
            response_only=response_only,
            truncate=truncate,
            strict=strict,
            trust_remote_code=trust_remote_code,
            device=device,
            dtype=dtype,
            hook_paths=hook_paths,
        ),
        quiet=as_json,
    )
    if dry_run:
        _plan(request, memory=memory, as_json=as_json)
    else:
        _capture(request, part=piece, memory=memory, workspace=workspace, as_json=as_json)


def _part(text: str | None, device: str) -> tuple[tuple[int, int], str]:
    """The part to fill, and the device: processes that were launched together share a machine's GPUs out."""
    if text is None:
        from capture.processes import launched

        found = launched()
        if found is None:
            return (1, 1), device
        i, n = found.part
        print(f"part {i}/{n}, as {found.by} says", file=sys.stderr)
        return found.part, found.device(device)
    first, slash, last = text.partition("/")
    if not (slash and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise typer.BadParameter(f"--part {text!r} is not a part; write it like 2/4, for the second of four.")
    return (int(first), int(last)), device


def _budget(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter(f"--batch-tokens {text!r} is neither auto nor a number of at least 1.")
    return int(text)


def _hook_paths(options: Sequence[str] | None) -> dict[str, str]:
    paths = {}
    for one in options or ():
        component, equals, path = one.partition("=")
        if not (component and equals and path):
            raise typer.BadParameter(
                f"--hook-path {one!r} is not a path; write it like residual=model.blocks.{{layer}}."
            )
        paths[component] = path
    return paths


def _plan(request: "Request", *, memory: int, as_json: bool) -> None:
    """Plan and say so. The weights are read, for their hash, only where the store may hold them or others already."""
    from capture.report import report_plans
    from capture.request import plans_of, provenance_of
    from datastore.planning import plans_directory

    provenance = provenance_of(request, hash_weights=request.store.exists() or plans_directory(request.store).exists())
    hashed = bool(provenance["model"]["weights_sha256"] or provenance["model"]["revision"])
    report_plans(request, plans_of(request, provenance), memory=memory, hashed=hashed, as_json=as_json)


def _capture(request: "Request", *, part: tuple[int, int], memory: int, workspace: int, as_json: bool) -> None:
    from capture.budgeting import with_budget
    from capture.report import report_done
    from capture.request import plans_of, provenance_of
    from capture.runner import carry_out

    provenance = provenance_of(request)
    source = cache(lambda: _load(request, provenance["settings"]["attn_implementation"], workspace, quiet=as_json))
    request = with_budget(request, provenance, source)
    plans = plans_of(request, provenance)
    planned = {rollout.rollout_id for plan in plans for rollout in plan.rollouts}
    try:
        with console.progress(quiet=as_json) as bar:
            done: Done = carry_out(
                plans,
                request.store,
                source=source,
                part=part,
                memory=memory,
                strict=request.settings.strict,
                environment=provenance["environment"],
                tick=_ticker(bar),
            )
    except KeyboardInterrupt as error:
        raise console.Interrupted(
            "stopped; nothing half-done was committed, and the chunks that are finished are kept: run the same "
            "command again to go on"
        ) from error
    report_done(request, done, skipped=len(request.rendered) - len(planned), as_json=as_json)


def _load(
    request: "Request", attn_implementation: str, workspace: int, *, quiet: bool
) -> "tuple[nn.Module, ComponentTable]":
    from capture.components import find_components
    from capture.experts import set_workspace
    from capture.loading import load

    with console.progress(quiet=quiet) as bar:
        loaded = load(
            request.info,
            dtype=request.settings.dtype,
            device=request.settings.device,
            layers=request.layers,
            attn_implementation=attn_implementation,
            tick=cache_commands.byte_ticker(bar, "load"),
        )
    set_workspace(loaded.model, workspace)
    return loaded.model, find_components(loaded.model, hook_paths=request.settings.hook_paths)


def _ticker(bar: Any) -> "Callable[[Tick], None]":
    task, began = bar.add_task("capture", total=None, note=""), list[float]()

    def tick(now: "Tick") -> None:
        began.append(time.monotonic())  # the first tick comes when the model is there
        speed = now.tokens / max(began[-1] - began[0], 1e-9)
        ratio = f" {now.raw_bytes / now.stored_bytes:.2f}x" if now.stored_bytes else ""
        note = f"{speed:,.0f} tokens/s, {console.human_bytes(now.raw_bytes)}{ratio}"
        bar.update(task, completed=now.rollouts, total=now.of, note=note)

    return tick
