"""The command line of the store: `python -m datastore info|ls|head|verify|drop|gc|compact|merge`.

Zarr, xarray and pandas are imported inside the commands, so that help is instant.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from datastore import console

if TYPE_CHECKING:
    from datastore.query import Store
    from datastore.verify import Report

__all__ = ["app"]

app = console.CommandGroup(help="Look into an activation store, check it, and say what no longer counts.")

StorePath = Annotated[Path, typer.Argument(metavar="STORE", help="The store, such as run.zarr.")]


@app.command()
def info(store: StorePath, *, as_json: console.Json = False) -> None:
    """Say what a store holds: model, components, layers, rollouts, tokens, bytes, and what is missing."""
    import datastore
    from datastore.summary import summarise

    found = summarise(datastore.open(store))
    if as_json:
        console.emit_json(found)
        return
    _print_info(found)


def _print_info(found: dict[str, Any]) -> None:
    from rich.table import Table

    out = console.stdout()
    out.print(f"{found['store']}: {found['rollouts']} rollouts, {found['tokens']:,} tokens, format {found['version']}")
    for model in found["models"]:
        out.print(f"model: {model['name']} ({model['model_type']}), {model['revision']}, {model['dtype']}")
    out.print(
        f"bytes: {console.human_bytes(found['raw_bytes'])} raw, {console.human_bytes(found['stored_bytes'])} stored"
        + (f", {found['ratio']:.2f} x smaller" if found["ratio"] else "")
    )
    table = Table("component", "dtype", "width", "layers", "present", "not finite", "read from")
    for one in found["components"]:
        table.add_row(
            one["name"],
            one["dtype"],
            str(one["width"]),
            ", ".join(map(str, one["layers"])),
            f"{100 * one['present']:.0f} %",
            f"{one['nonfinite']:,}" if one["nonfinite"] is not None else "not counted",
            one["hook"],
        )
    out.print(table)
    captures = Table("capture", "rollouts", "tokens", "layers", "components", "statistics", "created")
    for one in found["captures"]:
        captures.add_row(
            f"{one['number']:04d}",
            str(one["n_rollouts"]),
            f"{one['n_tokens']:,}",
            ", ".join(map(str, one["layers"])),
            ", ".join(one["components"]),
            one["statistics"],
            one["created"],
        )
    out.print(captures)
    if found["labels"]:
        out.print(f"labels: {', '.join(found['labels'])}")


@app.command("ls")
def list_rollouts(
    store: StorePath,
    *,
    ids: console.Ids = None,
    where: console.Where = None,
    limit: console.Limit = None,
    as_json: console.Json = False,
) -> None:
    """List the rollouts with their labels."""
    import datastore
    from datastore.choose import choose

    table = datastore.open(store).rollouts
    table = table.loc[choose(table, ids=console.parse_list(ids), where=where, limit=limit)]
    if as_json:
        console.emit_json([{"rollout_id": name, **row} for name, row in table.to_dict("index").items()])
        return
    shown = table.drop(columns=["token_sha256"]).reset_index()
    _print_table([str(c) for c in shown.columns], [[_cell(v) for v in row] for row in shown.itertuples(index=False)])


@app.command()
def head(
    store: StorePath,
    rollout: Annotated[str, typer.Argument(metavar="ID", help="A rollout id.")],
    *,
    limit: Annotated[int, typer.Option("--limit", "-n", metavar="N", min=1, help="Tokens to show.")] = 20,
    components: console.Components = None,
    as_json: console.Json = False,
) -> None:
    """Show the first tokens of a rollout: text, role, and the norm at each layer."""
    import datastore

    opened = datastore.open(store)
    tokens = opened.tokens(rollout).head(limit)
    records: list[dict[str, Any]] = [{str(k): v for k, v in row.items()} for row in tokens.to_dict("records")]
    component = (console.parse_list(components) or opened.components[:1])[0]
    norms = _norms(opened, component, rollout, limit=limit)
    if as_json:
        console.emit_json([row | {"norm": {n: norms[n][i] for n in norms}} for i, row in enumerate(records)])
        return
    columns = ["position", "token_id", "text", "segment", "role", "turn", *(f"|{component}| {n}" for n in norms)]
    rows = [
        [*(str(t[c]) for c in columns[:2]), repr(t["text"]), *(str(t[c]) for c in columns[3:6])]
        + [f"{norms[n][i]:.4g}" for n in norms]
        for i, t in enumerate(records)
    ]
    _print_table(columns, rows)


def _norms(opened: "Store", component: str, rollout: str, *, limit: int) -> dict[int, list[float]]:
    """Norms of the first tokens by layer, from the statistics or, without them, from the rows."""
    import numpy as np

    from datastore.errors import AbsentError

    there = opened.captured(component).loc[rollout]
    layers = [int(layer) for layer in there.index[there.to_numpy()]]
    try:
        kept = np.asarray(opened.norms(component, rollouts=rollout, layers=layers)[:limit].values)
    except AbsentError:
        rows = opened.select(component, rollouts=rollout, layers=layers, positions=slice(0, limit))
        kept = np.linalg.norm(np.asarray(rows.values, dtype=np.float64), axis=-1)
    return {layer: kept[:, i].tolist() for i, layer in enumerate(layers)}


@app.command()
def verify(
    store: StorePath,
    *,
    full: Annotated[bool, typer.Option("--full", help="Compute norms and statistics again from the bits.")] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Drop rows that can't be trusted, so that the same capture fills them.")
    ] = False,
    as_json: console.Json = False,
) -> None:
    """Check shapes, coordinates, hashes and every chunk; exit code 1 where anything is wrong or nothing was checked."""
    from dataclasses import asdict

    from datastore import verify as verifying

    with console.progress(quiet=as_json) as bar:
        task = bar.add_task("verify", total=None, note="chunks")
        report = verifying.verify(
            store, full=full, repair=repair, tick=lambda done, total: bar.update(task, completed=done, total=total)
        )
    if as_json:
        console.emit_json(asdict(report) | {"ok": report.ok})
    else:
        _print_report(store, report)
    if not report.ok:
        raise typer.Exit(1)


def _print_report(store: Path, report: "Report") -> None:
    out = console.stdout()
    for problem in report.problems:
        out.print(f"wrong: {problem.message}", markup=False, soft_wrap=True)
    checked = "chunks, coordinates, hashes and statistics" if report.full else "chunks, coordinates and hashes"
    verdict = "all is well" if report.ok else f"{len(report.problems)} problems"
    size = f"{report.chunks:,} chunks, {report.tokens:,} tokens, {console.human_bytes(report.raw_bytes)} raw"
    out.print(f"{store}: {verdict}; {checked} of {report.captures} captures, {size}")
    repairable = sum(p.repairable for p in report.problems)
    if report.dropped is not None:
        out.print(f"dropped what is broken (dropped/{report.dropped:04d}); run the same capture again to fill it")
    elif repairable:
        out.print(f"{repairable} of them are mended by verify --repair and the same capture")
    elif report.ok and not report.full:
        out.print("swapped chunks decode and are only noticed with --full")


@app.command()
def drop(
    store: StorePath,
    *,
    ids: console.Ids = None,
    where: console.Where = None,
    layers: console.Layers = None,
    components: console.Components = None,
    yes: console.Yes = False,
    dry_run: console.DryRun = False,
    as_json: console.Json = False,
) -> None:
    """Say that rollouts, layers or components no longer count; nothing is deleted until `gc`."""
    import datastore
    from datastore.choose import choose
    from datastore.maintenance import drop, plan_drop

    chosen = None
    if ids is not None or where is not None:
        chosen = choose(datastore.open(store).rollouts, ids=console.parse_list(ids), where=where)
    numbers, names = None if layers is None else _numbers(layers), console.parse_list(components)
    planned = plan_drop(store, rollouts=chosen, layers=numbers, components=names)
    summary = {"store": store, "rollouts": planned.rollouts, "cells": planned.cells, "number": None}
    what = f"{planned.cells:,} cells (rollout x layer x component) of {len(planned.rollouts)} rollouts of {store}"
    if not dry_run:
        console.confirm(f"Drop {what}?", yes=yes)
        summary["number"] = drop(store, rollouts=chosen, layers=numbers, components=names, reason="drop")
    if as_json:
        console.emit_json(summary)
        return
    console.stdout().print(f"{'would drop' if dry_run else 'dropped'} {what}")


@app.command("gc")
def collect_garbage(
    store: StorePath,
    *,
    plans: Annotated[
        bool, typer.Option("--plans", help="Also unfinished plans that no process fills, with what they hold.")
    ] = False,
    older_than: Annotated[
        float,
        typer.Option("--older-than", metavar="SECONDS", min=0, help="Spare younger leftovers of other processes."),
    ] = 3600.0,
    yes: console.Yes = False,
    dry_run: console.DryRun = False,
    as_json: console.Json = False,
) -> None:
    """Delete captures that no longer count, leftovers of killed processes, and dead plans."""
    from datastore.gc import collect, plan_collection

    planned = plan_collection(store, plans=plans, older_than=older_than)
    if not as_json:
        for one in planned.removals:
            line = f"{one.path}: {one.why}, {console.human_bytes(one.n_bytes)}"
            console.stdout().print(line, markup=False, soft_wrap=True)
    if not dry_run and planned.removals:
        console.confirm(f"Delete {len(planned.removals)} of these for good?", yes=yes)
        collect(planned)
    if as_json:
        console.emit_json(
            {"store": store, "removals": planned.removals, "n_bytes": planned.n_bytes, "done": not dry_run}
        )
        return
    done = "would free" if dry_run else "freed"
    console.stdout().print(f"{done} {console.human_bytes(planned.n_bytes)}")


@app.command("compact")
def compact_captures(
    store: StorePath,
    *,
    smaller_than: Annotated[
        str | None, typer.Option("--smaller-than", metavar="SIZE", help="Leave larger captures as they are.")
    ] = None,
    yes: console.Yes = False,
    dry_run: console.DryRun = False,
    as_json: console.Json = False,
) -> None:
    """Rewrite many captures as one, without what was dropped or superseded, and delete the old ones."""
    from datastore.compact import compact, plan_compaction

    limit = None if smaller_than is None else console.parse_bytes(smaller_than)
    planned = plan_compaction(store, smaller_than=limit)
    raw = sum(plan.raw_bytes for plan in planned.plans)
    numbers: list[int] = []
    if planned.plans and not dry_run:
        what = (
            f"{len(planned.captures)} captures as {len(planned.plans)}, {console.human_bytes(raw)} before compression"
        )
        console.confirm(f"Rewrite {what}, and delete the old ones?", yes=yes)
        with console.progress(quiet=as_json) as bar:
            task = bar.add_task("compact", total=None, note="rows")
            numbers = compact(planned, tick=lambda done, total: bar.update(task, completed=done, total=total))
    found = {"captures": planned.captures, "becomes": len(planned.plans), "raw_bytes": raw, "numbers": numbers}
    if as_json:
        console.emit_json(found)
        return
    if not planned.plans:
        console.stdout().print(f"nothing of {store} is to be compacted; gc frees what no longer counts")
        return
    verb = "would rewrite" if dry_run else "rewrote"
    console.stdout().print(f"{verb} {len(planned.captures)} captures of {store} as {len(planned.plans)}")


@app.command("merge")
def merge_stores(
    first: StorePath,
    second: StorePath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The new store.")],
    *,
    dry_run: console.DryRun = False,
    as_json: console.Json = False,
) -> None:
    """Bring the captures of two stores together in a new one, by hard link where that is possible."""
    from datastore.merge import merge, plan_merge

    planned = plan_merge(first, second, out)
    captures = sum(place.parts[0] == "captures" for _, place in planned.sources)
    if not dry_run:
        merge(planned)
    if as_json:
        found = {"out": out, "captures": captures, "rollouts": planned.rollouts, "shared": planned.shared}
        console.emit_json(found | {"n_bytes": planned.n_bytes, "left_out": planned.left_out, "done": not dry_run})
        return
    verb = "would merge" if dry_run else "merged"
    what = f"{captures} captures, {planned.rollouts} rollouts ({len(planned.shared)} of them in both)"
    console.stdout().print(f"{verb} {what}, {console.human_bytes(planned.n_bytes)}, into {out}")
    if planned.left_out:
        console.stdout().print(
            f"{len(planned.left_out)} calibrations and scores are of the captures of one store and were left out: "
            f"calibrate and project {out} to have them there"
        )


def _numbers(spec: str) -> list[int]:
    """Layer numbers of a list such as 5,10-12."""
    numbers: list[int] = []
    for piece in spec.split(","):
        first, dash, last = piece.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise typer.BadParameter(f"--layers {spec!r} is not a list of layer numbers; write it like 5,10-12.")
        numbers.extend(range(int(first), int(last or first) + 1))
    return numbers


def _print_table(columns: list[str], rows: list[list[str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns)
    for row in rows:
        table.add_row(*(Text(value) for value in row))
    console.stdout().print(table)


def _cell(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    if isinstance(value, float):
        return "" if value != value else f"{value:g}"
    return "" if value is None else str(value)
