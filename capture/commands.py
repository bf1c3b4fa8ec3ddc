"""The command line of capture: `python -m capture --store run.zarr`.

Torch and transformers are imported inside the commands, so that help is instant.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from datastore import console

if TYPE_CHECKING:
    from capture.components import ComponentTable
    from capture.loading import ModelInfo
    from capture.runner import Done, Tick
    from capture.tokens import Rendered
    from datastore.schema import Plan, Rollout
    from experiments.transcript import Transcript

__all__ = ["app"]

app = console.CommandGroup(
    help="Capture a model's activations over rollouts into a store. Without options but --store: a small bundled model "
    "over bundled conversations.",
    default="capture",
)

BUNDLED = Path(__file__).parent / "bundled"
RATIO = {"bfloat16": 1.43, "float16": 1.2, "float32": 1.15, "float64": 1.1}
"""Compression to expect by dtype, for estimates only."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asks for, after it is read and before anything is loaded."""

    store: Path
    info: "ModelInfo"
    table: "ComponentTable"
    rendered: "list[Rendered]"
    layers: tuple[int, ...]
    components: tuple[str, ...]

    @property
    def rollouts(self) -> "list[Rollout]":
        """Rollouts to capture."""
        return [one.rollout for one in self.rendered]


@app.command("capture", hidden=True)
def capture(
    *,
    store: Annotated[Path, typer.Option("--store", metavar="PATH", help="The store; made where there is none.")],
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME|DIR", help="A model of the Hub or a directory.")
    ] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Commit, tag or branch on the Hub.")] = None,
    inputs: console.Input = None,
    layers: console.Layers = "all",
    components: console.Components = "residual",
    ids: console.Ids = None,
    where: console.Where = None,
    limit: console.Limit = None,
    response_only: Annotated[
        bool, typer.Option("--response-only", help="Store the rows of response tokens only.")
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Capture again what is there; the new capture counts.")
    ] = False,
    part: Annotated[str, typer.Option("--part", metavar="I/N", help="Fill part I of N of the plan.")] = "1/1",
    batch_tokens: Annotated[
        str, typer.Option("--batch-tokens", metavar="auto|N", help="Padded tokens a batch.")
    ] = "auto",
    codec: Annotated[str, typer.Option("--codec", metavar="zstd|lz4|none", help="Compression.")] = "zstd",
    chunk_tokens: Annotated[int, typer.Option("--chunk-tokens", min=1, help="Most tokens a chunk.")] = 1024,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Cut rollouts longer than the model's context; recorded.")
    ] = False,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Compute and store in this dtype; default the checkpoint's.")
    ] = None,
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
    piece, budget = _part(part), _budget(batch_tokens)
    hooks = _hook_paths(hook_path)
    request = _request(
        store=store,
        model=model,
        revision=revision,
        inputs=inputs,
        layers=layers or "all",
        components=console.parse_list(components) or (),
        choice={"ids": console.parse_list(ids), "where": where, "limit": limit},
        options={"truncate": truncate, "dtype": dtype, "hooks": hooks, "trust": trust_remote_code},
        quiet=as_json,
    )
    settings = {
        "budget": budget,
        "codec": codec,
        "most_tokens": chunk_tokens,
        "replace": replace,
        "response_only": response_only,
        "truncate": truncate,
        "device": device,
    }
    if dry_run:
        _show_plans(_plans(request, None, settings), request, memory=memory, as_json=as_json)
        return
    _capture(request, settings, dtype=dtype, hooks=hooks, part=piece, memory=memory, strict=strict, as_json=as_json)


# -- reading the request -----------------------------------------------------------------------------------------------


def _part(text: str) -> tuple[int, int]:
    first, slash, last = text.partition("/")
    if not (slash and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise typer.BadParameter(f"--part {text!r} is not a part; write it like 2/4, for the second of four.")
    return int(first), int(last)


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
            raise typer.BadParameter(f"--hook-path {one!r} is not a path; write it like residual=model.blocks.{{layer}}.")
        paths[component] = path
    return paths


def _request(
    *,
    store: Path,
    model: str | None,
    revision: str | None,
    inputs: Sequence[str] | None,
    layers: str,
    components: tuple[str, ...],
    choice: Mapping[str, Any],
    options: Mapping[str, Any],
    quiet: bool,
) -> Request:
    import experiments
    from capture.components import describe_components
    from capture.layerspec import parse_layers
    from capture.loading import describe

    info = describe(model or BUNDLED / "stories260K", revision=revision, trust_remote_code=options["trust"])
    transcripts = experiments.read(list(inputs or [str(BUNDLED / "rollouts.jsonl")]))
    rendered = _choose(_render_all(transcripts, info, options["truncate"], quiet=quiet), choice)
    table = describe_components(
        info.config,
        dtype=options["dtype"] or info.dtype,
        hook_paths=options["hooks"],
        trust_remote_code=options["trust"],
    )
    return Request(
        store=store,
        info=info,
        table=table,
        rendered=rendered,
        layers=parse_layers(layers, info.n_layers),
        components=components,
    )


def _render_all(
    transcripts: "Sequence[Transcript]", info: "ModelInfo", truncate: bool, *, quiet: bool
) -> "list[Rendered]":
    from capture.tokens import render

    with console.progress(quiet=quiet) as bar:
        task = bar.add_task("tokenise", total=len(transcripts), note="")
        rendered = []
        for one in transcripts:
            rendered.append(
                render(one, info.tokenizer, context=info.context, truncate=truncate, vocab_size=info.vocab_size)
            )
            bar.update(task, advance=1)
    return rendered


def _choose(rendered: "list[Rendered]", choice: Mapping[str, Any]) -> "list[Rendered]":
    import pandas as pd

    from datastore.choose import choose

    rows = {
        r.rollout_id: {"n_tokens": r.n_tokens, "prompt_end": r.prompt_end, "prompt_set": r.prompt_set, **r.labels}
        for r in (one.rollout for one in rendered)
    }
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.index.name = "rollout_id"
    kept = set(choose(table, **choice))
    return [one for one in rendered if one.rollout.rollout_id in kept]


# -- planning ----------------------------------------------------------------------------------------------------------


def _plans(request: Request, provenance: Mapping[str, Any] | None, settings: Mapping[str, Any]) -> "tuple[Plan, ...]":
    import numpy as np

    import datastore
    from capture.batching import auto_batch_tokens
    from capture.tokenbytes import token_bytes
    from datastore.schema import Codec

    used = sorted({int(i) for r in request.rollouts for i in np.unique(r.token_ids)})
    return datastore.plan(
        request.store,
        request.rollouts,
        layers=request.layers,
        components=request.table.specs(request.components, request.layers),
        provenance=provenance or _provenance(request, None, settings),
        batch_tokens=settings["budget"] or auto_batch_tokens(request.info.config, _device_type(settings["device"])),
        codec=Codec(name=settings["codec"]),
        most_tokens=settings["most_tokens"],
        vocab=token_bytes(request.info.tokenizer, used),
        replace=settings["replace"],
    )


def _device_type(device: str) -> str:
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def _provenance(request: Request, loaded: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What every capture says of where it came from; the parts that decide the bits come first."""
    from capture import loading

    known = loading.provenance(loaded) if loaded is not None else loading.identity(request.info, request.table.dtype)
    return {
        "model": {
            "name": known["model"],
            "model_type": known["model_type"],
            "revision": known["revision"],
            "weights_sha256": known["weights_sha256"],
            "dtype": known["dtype"],
            "hidden_size": request.info.hidden,
            "n_layers": known["n_layers"],
        },
        "tokenizer": {
            "sha256": known["tokenizer_sha256"],
            "rendered": sorted({one.notes.template for one in request.rendered}),
            "truncated": {
                one.rollout.rollout_id: one.notes.truncated_from
                for one in request.rendered
                if one.notes.truncated_from is not None
            },
        },
        "settings": {
            "attn_implementation": known.get("attn_implementation"),
            "padding": "right",
            "truncate": request.info.context if settings["truncate"] else None,
            "hooks": {c.name: c.hook for c in request.table.specs(request.components, request.layers)},
        },
        "environment": {name: known.get(name) for name in ("device", "threads", "versions")},
    }


def _show_plans(plans: "Sequence[Plan]", request: Request, *, memory: int, as_json: bool) -> None:
    report = {
        "store": request.store,
        "asked": {"rollouts": len(request.rollouts), "layers": request.layers, "components": request.components},
        "plans": [_plan_report(p, memory) for p in plans],
    }
    if as_json:
        console.emit_json(report)
        return
    out = console.stdout()
    if not plans:
        out.print(f"{request.store} holds all of it already; nothing would be captured.")
    for one in report["plans"]:
        out.print(
            f"would capture {one['rollouts']} rollouts, {one['tokens']:,} tokens, layers {_ranges(one['layers'])}, "
            f"{', '.join(one['components'])}: {one['batches']} batches of up to {one['batch_tokens']:,} padded tokens, "
            f"{one['chunks']:,} chunks, {console.human_bytes(one['raw_bytes'])} raw, about "
            f"{console.human_bytes(one['expected_bytes'])} on disk ({console.human_bytes(one['free_bytes'])} free), "
            f"{console.human_bytes(one['memory'])} of memory for writing"
        )


def _plan_report(plan: "Plan", memory: int) -> dict[str, Any]:
    from datastore.layout import n_chunks
    from datastore.storage import free_bytes

    return {
        "key": plan.key,
        "rollouts": len(plan.rollouts),
        "tokens": plan.n_tokens,
        "layers": list(plan.layers),
        "components": {c.name: {"width": c.width, "dtype": c.dtype, "hook": c.hook} for c in plan.components},
        "batches": len(plan.batches),
        "batch_tokens": plan.batch_tokens,
        "chunks": sum(n_chunks(plan.n_tokens, plan.chunk_tokens[c.name]) * len(plan.layers) for c in plan.components),
        "raw_bytes": plan.raw_bytes,
        "expected_bytes": _expected_bytes(plan),
        "free_bytes": free_bytes(Path.cwd()),
        "memory": memory,
    }


def _expected_bytes(plan: "Plan") -> int:
    layers = plan.n_tokens * len(plan.layers)
    return int(sum(layers * c.width * c.itemsize / RATIO[c.dtype] for c in plan.components))


def _ranges(numbers: Sequence[int]) -> str:
    """Write layer numbers short: 0-4, 10, 15.

    Examples
    --------
    >>> _ranges([0, 1, 2, 10])
    '0-2, 10'
    """
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][-1] == n - 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)


# -- capturing ---------------------------------------------------------------------------------------------------------


def _capture(
    request: Request,
    settings: Mapping[str, Any],
    *,
    dtype: str | None,
    hooks: Mapping[str, str],
    part: tuple[int, int],
    memory: int,
    strict: bool,
    as_json: bool,
) -> None:
    from capture import loading
    from capture.components import find_components
    from capture.runner import carry_out

    loaded = loading.load(request.info, dtype=dtype, device=settings["device"], layers=request.layers)
    provenance = _provenance(request, loaded, settings)
    plans = _plans(request, provenance, settings)
    table = find_components(loaded.model, hook_paths=hooks)
    with console.progress(quiet=as_json) as bar:
        tick = _ticker(bar, plans)
        try:
            done = carry_out(
                plans,
                loaded.model,
                request.store,
                table=table,
                part=part,
                memory=memory,
                strict=strict,
                environment=provenance["environment"],
                tick=tick,
            )
        except KeyboardInterrupt as error:
            raise console.Interrupted(
                "stopped; nothing half-done was committed, and the chunks that are finished are kept: run the same "
                "command again to go on"
            ) from error
    _report(request, done, asked=len(request.rollouts), planned={r.rollout_id for p in plans for r in p.rollouts}, as_json=as_json)


def _ticker(bar: Any, plans: "Sequence[Plan]") -> "Callable[[Tick], None]":
    began = time.monotonic()
    task = bar.add_task("capture", total=sum(len(p.rollouts) for p in plans), note="")

    def tick(now: "Tick") -> None:
        speed = now.tokens / max(time.monotonic() - began, 1e-9)
        ratio = f", {now.raw_bytes / now.stored_bytes:.2f}x" if now.stored_bytes else ""
        note = f"{speed:,.0f} tokens/s, {console.human_bytes(now.raw_bytes)}{ratio}"
        bar.update(task, completed=now.rollouts, note=note)

    return tick


def _report(request: Request, done: "Done", *, asked: int, planned: set[str], as_json: bool) -> None:
    nonfinite, named = _nonfinite(request.store, done.captures)
    summary = {
        "store": request.store,
        **asdict(done),
        "skipped": asked - len(planned),
        "tokens_per_second": done.tokens / done.seconds if done.seconds else None,
        "ratio": done.raw_bytes / done.stored_bytes if done.stored_bytes else None,
        "nonfinite": nonfinite,
        "nonfinite_tokens": named,
    }
    if as_json:
        console.emit_json(summary)
        return
    out = console.stdout()
    if done.captures:
        out.print(
            f"captured {done.rollouts} rollouts, {done.tokens:,} tokens, layers {_ranges(request.layers)} of "
            f"{', '.join(request.components)} from {request.info.model_id} in {done.seconds:.1f} s: "
            f"{console.human_bytes(done.raw_bytes)} raw, {console.human_bytes(done.stored_bytes)} stored"
        )
    if summary["skipped"]:
        out.print(f"{summary['skipped']} of {asked} rollouts were in the store already and were skipped")
    if done.pending:
        out.print("this part is done; the capture is committed when its other parts are done")
    for note in done.notes:
        console.warn(note)
    for one in named:
        console.warn(
            f"not finite: {one['component']}, layer {one['layer']}, rollout {one['rollout_id']}, token {one['position']}"
        )
    if sum(nonfinite.values()):
        console.warn(f"{sum(nonfinite.values()):,} values are not finite; they are stored as they are")
    out.print(f"next: python -m datastore verify {request.store}, or python -m datastore info {request.store}")


def _nonfinite(store: Path, captures: Sequence[int]) -> tuple[dict[str, int], list[dict[str, Any]]]:
    from datastore.storage import attributes

    total: dict[str, int] = {}
    named: list[dict[str, Any]] = []
    for number in captures:
        attrs = attributes(store / "captures" / f"{number:04d}")
        for component, count in attrs.get("nonfinite", {}).items():
            total[component] = total.get(component, 0) + count
        named.extend(attrs.get("nonfinite_tokens", []))
    return total, named
