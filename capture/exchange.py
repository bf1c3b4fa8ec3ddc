"""The commands that move rows and labels between stores and files: import, export, label, components.

What computes is imported inside the commands, so that help is instant.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from datastore import console

if TYPE_CHECKING:
    from capture.components import ComponentTable
    from capture.importing import Survey
    from datastore.schema import Plan

__all__ = ["register"]

FORMATS = ("pt", "safetensors", "npz")
SHOWN = 20
"""Files named one by one in a summary."""

Replace = Annotated[bool, typer.Option("--replace", help="Do again what is there already.")]
KeepGoing = Annotated[bool, typer.Option("--keep-going", help="Leave out what can't be read instead of stopping.")]
Store = Annotated[Path, typer.Option("--store", metavar="PATH", help="The store; made where there is none.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line of capture."""
    app.command("import")(import_files)
    app.command("export")(export_files)
    app.command("label")(label_rollouts)
    app.command("components")(list_components)


def import_files(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A file, a directory of files or an experiment tree.")],
    *,
    store: Store,
    layers: Annotated[
        str | None, typer.Option("--layers", metavar="0,10,20", help="Layers of .safetensors and .npz files, in order.")
    ] = None,
    ids: console.Ids = None,
    where: console.Where = None,
    limit: console.Limit = None,
    model: Annotated[str | None, typer.Option("--model", help="The model's name; default what the tree says.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", metavar="NAME|DIR", help="For exact text; default the files' strings.")
    ] = None,
    responses_from: Annotated[
        str | None, typer.Option("--responses-from", metavar="VARIANT", help="Whose responses the activations are of.")
    ] = None,
    replace: Replace = False,
    keep_going: KeepGoing = False,
    codec: Annotated[str, typer.Option("--codec", metavar="zstd|lz4|none", help="Compression.")] = "zstd",
    chunk_tokens: Annotated[int, typer.Option("--chunk-tokens", min=1, help="Most tokens a chunk.")] = 1024,
    memory: console.Memory = console.DEFAULT_MEMORY,
    dry_run: console.DryRun = False,
    as_json: console.Json = False,
) -> None:
    """Import activation files (.pt, .safetensors, .npz); the same command goes on where it was interrupted."""
    numbers = _numbers(layers)
    if codec not in ("zstd", "lz4", "none"):
        raise typer.BadParameter(f"--codec {codec!r} is not known; choose one of zstd, lz4, none.")
    from capture import importing

    with console.progress(quiet=as_json) as bar:
        asked = importing.survey(
            source,
            layers=numbers,
            ids=console.parse_list(ids),
            where=where,
            limit=limit,
            model=model,
            tokenizer=_tokenizer(tokenizer),
            responses_from=responses_from,
            keep_going=keep_going,
            tick=_ticker(bar, "look"),
        )

    def plan() -> "list[Plan]":
        return importing.plans_of(asked, store, replace=replace, codec=codec, most_tokens=chunk_tokens)

    report = _what_is_planned(asked, plan()) | {"store": store}
    if not dry_run:
        try:
            with console.progress(quiet=as_json) as bar:
                report["imported"] = importing.carry_out(
                    asked, store, plan=plan, memory=memory, keep_going=keep_going, tick=_ticker(bar, "import")
                )
        except KeyboardInterrupt as error:
            raise console.Interrupted(
                "stopped; nothing half-done was committed, and the chunks that are finished are kept: run the same "
                "command again to go on"
            ) from error
    _say_import(report, {str(file): why for file, why in asked.skipped.items()}, as_json=as_json)


def _what_is_planned(asked: "Survey", plans: "Sequence[Plan]") -> dict[str, Any]:
    planned = {one.rollout_id for plan in plans for one in plan.rollouts}
    return {
        "model": asked.model,
        "files": len(asked.found),
        "already_there": len(asked.found) - len(planned),
        "notes": asked.notes,
        "planned": [
            {
                "rollouts": len(plan.rollouts),
                "tokens": plan.n_tokens,
                "layers": plan.layers,
                "components": [one.name for one in plan.components],
                "raw_bytes": plan.raw_bytes,
            }
            for plan in plans
        ],
    }


def _say_import(report: dict[str, Any], skipped: dict[str, str], *, as_json: bool) -> None:
    if as_json:
        console.emit_json(report | {"skipped": skipped})
        return
    for note in report["notes"][:SHOWN]:
        console.warn(note)
    for why in list(skipped.values())[:SHOWN]:
        console.warn(f"left out: {why}")
    rows, there = report["planned"], report["already_there"]
    done = report.get("imported")
    if done is None:
        for one in rows:
            print(
                f"would import {one['rollouts']} rollouts, {one['tokens']:,} tokens, {', '.join(one['components'])} at "
                f"layers {', '.join(map(str, one['layers']))}: {console.human_bytes(one['raw_bytes'])} raw"
            )
    elif done.captures:
        print(
            f"imported {done.rollouts} rollouts, {done.tokens:,} tokens into {report['store']} in {done.seconds:.1f} "
            f"s: {console.human_bytes(done.raw_bytes)} raw, {console.human_bytes(done.stored_bytes)} stored"
        )
    if there:
        print(f"{there} of {report['files']} rollouts are in the store already")
    if skipped:
        print(f"{len(skipped)} files were left out")
    if done is not None:
        print(f"next: python -m datastore info {report['store']}")


def export_files(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="The store.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where the files go.")],
    *,
    form: Annotated[str, typer.Option("--format", metavar="|".join(FORMATS), help="What to write.")] = "pt",
    ids: console.Ids = None,
    where: console.Where = None,
    limit: console.Limit = None,
    layers: console.Layers = None,
    components: console.Components = None,
    variant: Annotated[
        str, typer.Option("--variant", help="For pt: the model variant under which the tree has the files.")
    ] = "exported",
    replace: Annotated[bool, typer.Option("--replace", help="Write files anew that are there.")] = False,
    skip_existing: Annotated[bool, typer.Option("--skip-existing", help="Only files that are not there.")] = False,
    dry_run: console.DryRun = False,
    as_json: console.Json = False,
) -> None:
    """Export rollouts as files, one a rollout: pt (an experiment tree), safetensors or npz."""
    if form not in FORMATS:
        raise typer.BadParameter(f"--format {form!r} is not known; choose one of {', '.join(FORMATS)}.")
    import datastore
    from capture import exporting
    from capture.layerspec import parse_layers
    from datastore.choose import choose

    opened = datastore.open(store)
    exports = exporting.plan_of(
        opened,
        directory,
        form=form,
        rollouts=choose(opened.rollouts, ids=console.parse_list(ids), where=where, limit=limit),
        layers=None if layers is None else parse_layers(layers, max(opened.layers) + 1),
        components=console.parse_list(components),
        variant=variant,
    )
    there = [one for one in exports if one.path.exists()]
    if there and not (replace or skip_existing):
        raise typer.BadParameter(
            f"{len(there)} of {len(exports)} files are there already, such as {there[0].path}; --replace writes them "
            "anew, --skip-existing writes the others."
        )
    todo = exports if replace else [one for one in exports if not one.path.exists()]
    report: dict[str, Any] = {"directory": directory, "files": [one.path for one in todo]}
    if not dry_run and todo:
        with console.progress(quiet=as_json) as bar:
            report["responses_kept"] = exporting.carry_out(
                opened, directory, todo, variant=variant, overwrite=replace, tick=_ticker(bar, "export")
            )
    if as_json:
        console.emit_json(report)
        return
    print(f"{'would export' if dry_run else 'exported'} {len(todo)} rollouts as {form} into {directory}")
    if report.get("responses_kept"):
        print(f"{report['responses_kept']} response files were there and are as they were")


def label_rollouts(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="The store.")],
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Labels or annotations: .csv, .json, .jsonl.")],
    *,
    dry_run: console.DryRun = False,
    as_json: console.Json = False,
) -> None:
    """Add labels and annotations to rollouts that are captured, joined by rollout id."""
    from capture.labelling import label

    done = label(store, files, dry_run=dry_run)
    if as_json:
        console.emit_json(done)
        return
    for note in done.notes[:SHOWN]:
        console.warn(note)
    if done.unknown:
        listed = ", ".join(done.unknown[:SHOWN])
        console.warn(f"{len(done.unknown)} ids are not in {store} and were left out: {listed}")
    given = ", ".join(f"{name} ({count})" for name, count in done.labels.items()) or "no labels"
    verb = "would give" if dry_run else "gave"
    print(f"{verb} {done.rollouts} rollouts {given} and {done.annotations} annotations")
    if done.unlabelled:
        print(f"{done.unlabelled} rollouts of the store are not in the files")


def list_components(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model of the Hub or a directory.")],
    *,
    revision: Annotated[str | None, typer.Option("--revision", help="Commit, tag or branch on the Hub.")] = None,
    hook_path: Annotated[
        list[str] | None,
        typer.Option("--hook-path", metavar="COMPONENT=PATH", help="Where a component is, as model.blocks.{layer}."),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the model's own Python code.")
    ] = False,
    as_json: console.Json = False,
) -> None:
    """List what a model offers: components with module paths, widths and layers. No weights are read."""
    paths = dict(one.partition("=")[::2] for one in hook_path or [])
    from capture import loading
    from capture.components import describe_components
    from capture.report import ranges

    info = loading.describe(model, revision=revision, trust_remote_code=trust_remote_code, tokenizer=False)
    table = describe_components(info.config, dtype=info.dtype, hook_paths=paths, trust_remote_code=trust_remote_code)
    rows = _component_rows(table)
    if as_json:
        console.emit_json({"model": info.model_id, "n_layers": table.n_layers, "components": rows})
        return
    from rich.table import Table

    shown = Table("component", "layers", "module", "width", "dtype", title=f"{info.model_id}, {table.n_layers} layers")
    for row in rows:
        cells = (row.get("absent", "") and f"absent: {row['absent']}") or row["module"]
        shown.add_row(row["component"], ranges(row["layers"]), cells, str(row.get("width", "")), row.get("dtype", ""))
    console.stdout().print(shown)


def _component_rows(table: "ComponentTable") -> list[dict[str, Any]]:
    """Return a row for each component and kind of layer: where it is, or why it is not there."""
    from capture.errors import CaptureError
    from datastore.schema import COMPONENTS

    rows: list[dict[str, Any]] = []
    for name in COMPONENTS:
        found: dict[tuple[str, int, str], list[int]] = {}
        why = ""
        for layer in range(table.n_layers):
            try:
                (spec,) = table.specs([name], [layer])
            except CaptureError as error:
                why = why or str(error)
                continue
            found.setdefault((spec.hook, spec.width, spec.dtype), []).append(layer)
        rows += [
            {"component": name, "layers": layers, "module": hook, "width": width, "dtype": dtype}
            for (hook, width, dtype), layers in found.items()
        ]
        if why:
            absent = sorted(set(range(table.n_layers)) - {n for layers in found.values() for n in layers})
            rows.append({"component": name, "layers": absent, "absent": why})
    return rows


def _numbers(text: str | None) -> tuple[int, ...] | None:
    """Read layer numbers in the order given, which is that of the arrays; `4-7` is four of them."""
    if text is None:
        return None
    found: list[int] = []
    for piece in text.split(","):
        first, dash, last = piece.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise typer.BadParameter(f"--layers {text!r} is not a list of layer numbers; write it like 0,10,20 or 4-7.")
        found += range(int(first), int(last) + 1) if dash else [int(first)]
    if not found or len(set(found)) < len(found):
        raise typer.BadParameter(f"--layers {text!r} names no layer, or one twice; write it like 0,10,20.")
    return tuple(found)


def _tokenizer(name: str | None) -> Any:
    if name is None:
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # a library's many kinds for what is not there or not valid
        first = " ".join(str(error).split())[:160]
        raise typer.BadParameter(f"--tokenizer {name!r} can't be loaded ({first}).") from error


def _ticker(bar: Any, what: str) -> Any:
    task = bar.add_task(what, total=None, note="")
    return lambda done, of: bar.update(task, completed=done, total=of)
