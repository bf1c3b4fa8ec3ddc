"""The command line of calibrate: `python -m calibrate run.zarr`.

What computes is imported inside the commands, so that help is instant.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from datastore import console
from datastore.errors import MisuseError, ReadOnlyError

if TYPE_CHECKING:
    from calibrate.calibration import Calibration
    from calibrate.selected import Selected
    from datastore.query import Store

__all__ = ["app"]

app = console.CommandGroup(
    help="Find the massive dimensions, alignment and norms of every layer of a store, and keep them in it; no model is "
    "needed.",
    default="calibrate",
)

EXPORTS = ("json", "per-layer")


@app.command("calibrate", hidden=True)
def calibrate(
    *,
    stores: Annotated[
        list[Path] | None, typer.Argument(metavar="STORE...", help="One store, or several of one model.")
    ] = None,
    ids: console.Ids = None,
    where: console.Where = None,
    limit: console.Limit = None,
    segment: console.Segment = None,
    layers: Annotated[
        str | None, typer.Option("--layers", metavar="SPEC", help="Captured layers: all, 16, 5,10, 5-20, 0-75:5.")
    ] = None,
    components: console.Components = "residual",
    top_k: Annotated[int, typer.Option("--top-k", metavar="N", min=1, help="Dimensions to rank at each layer.")] = 5,
    threshold: Annotated[
        float, typer.Option("--threshold", metavar="RATIO", help="Peak over the median dimension's that is massive.")
    ] = 100.0,
    no_pass: Annotated[
        bool, typer.Option("--no-pass", help="Only what follows from the statistics kept at capture; read no data.")
    ] = False,
    per_token: Annotated[
        bool, typer.Option("--per-token", help="Add each rollout's tokens and values at its massive dims to the JSON.")
    ] = False,
    export: Annotated[
        str | None, typer.Option("--export", metavar="|".join(EXPORTS), help="Write a file in this form to --out.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="PATH", help="The exported file; or a store to keep results in.")
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="OUT.png", help="Draw the result.")] = None,
    experiment: Annotated[
        Path | None,
        typer.Option(
            "--experiment",
            metavar="DIR",
            help="An experiment tree: finds the store, and writes the file to where its tools look.",
        ),
    ] = None,
    model_variant: Annotated[
        str | None, typer.Option("--model-variant", help="Model variant of the experiment.")
    ] = None,
    prompt_set: Annotated[str | None, typer.Option("--prompt-set", help="Prompt set of the experiment.")] = None,
    scheduler: console.Scheduler = None,
    workers: console.Workers = None,
    memory: console.Memory = console.DEFAULT_MEMORY,
    dry_run: console.DryRun = False,
    as_json: console.Json = False,
) -> None:
    """Calibrate stores; what follows from the statistics kept at capture takes no pass over the data."""
    names = console.parse_list(components) or ()
    _check_choices(export=export, out=out, names=names)
    if per_token and (no_pass or (export != "json" and experiment is None)):
        raise typer.BadParameter("--per-token needs --export json or --experiment, and the pass; leave --no-pass out.")
    paths, variant = _stores(stores, experiment, variant=model_variant, prompt_set=prompt_set)
    from calibrate.keeping import check_places

    keep = out if export is None else None
    chosen = _chosen(paths, ids=console.parse_list(ids), where=where, limit=limit)
    wanted = {"layers": layers, "segment": console.parse_list(segment), "passes": not no_pass}
    if dry_run:
        _show_plan([_selected(chosen, name, **wanted) for name in names], passes=not no_pass, as_json=as_json)
        return
    kept = _keeps(paths, keep, required=export is None and experiment is None)
    if kept:
        check_places(paths, out=keep)
    found = _fitted(
        chosen,
        names,
        cluster={"scheduler": scheduler, "workers": workers},
        quiet=as_json,
        **wanted,
        top_k=top_k,
        threshold=threshold,
        memory=memory,
    )
    written = _written(
        found[0],
        export,
        out,
        experiment=experiment,
        variant=variant,
        prompt_set=prompt_set,
        plot=plot,
        per_token=memory if per_token else None,
    )
    _show(found, _saved(found, keep) if kept else [], written, as_json=as_json)


def _check_choices(*, export: str | None, out: Path | None, names: Sequence[str]) -> None:
    if export not in (None, *EXPORTS):
        raise typer.BadParameter(f"--export {export!r} is not known; choose one of {', '.join(EXPORTS)}.")
    if export is not None and out is None:
        raise typer.BadParameter(f"--export {export} needs --out PATH, the file to be written.")
    if export is not None and len(names) > 1:
        raise typer.BadParameter(f"--export {export} writes one component's file; name one in --components.")


def _stores(
    stores: list[Path] | None, experiment: Path | None, *, variant: str | None, prompt_set: str | None
) -> tuple[list[Path], str]:
    """Return the stores, named or found in the experiment, and the model variant."""
    if experiment is None:
        if variant or prompt_set:
            raise typer.BadParameter("--model-variant and --prompt-set belong to an --experiment; name it too.")
        if not stores:
            raise typer.BadParameter("Name a store, or an --experiment with --prompt-set that holds one.")
        return stores, ""
    if prompt_set is None:
        raise typer.BadParameter("--experiment needs --prompt-set, which names the store and the file to be written.")
    from experiments.tree import Experiment

    tree = Experiment(experiment)
    name = tree.variant_name(variant)
    return stores or [tree.default_store(prompt_set, name)], name


def _chosen(
    paths: Sequence[Path], *, ids: Sequence[str] | None, where: str | None, limit: int | None
) -> "list[tuple[Store, list[str] | None]]":
    """Open the stores and choose rollouts of each; a store in which none is chosen is left out."""
    import datastore
    from datastore.choose import choose

    opened = [datastore.open(path) for path in paths]
    if ids is None and where is None and limit is None:
        return [(store, None) for store in opened]
    held = {str(name) for store in opened for name in store.rollouts.index}
    unknown = [name for name in ids or () if name not in held]
    if unknown:
        raise MisuseError(f"{len(unknown)} of the ids asked for are in none of the stores: {', '.join(unknown[:8])}")
    chosen: list[tuple[Store, list[str] | None]] = []
    refused: list[MisuseError] = []
    for store in opened:
        mine = None if ids is None else [name for name in ids if name in store.rollouts.index]
        try:
            if mine is None or mine:
                chosen.append((store, choose(store.rollouts, ids=mine, where=where, limit=limit)))
        except MisuseError as error:
            refused.append(error)
    if not chosen:
        raise refused[0]
    return chosen


def _selected(chosen: "Sequence[tuple[Store, list[str] | None]]", component: str, **wanted: Any) -> "Selected":
    from calibrate.layerspec import captured_layers
    from calibrate.selected import resolve

    layers = captured_layers(wanted["layers"], [store for store, _ in chosen], component)
    return resolve(chosen, component=component, layers=layers, segment=wanted["segment"])


def _fitted(
    chosen: "Sequence[tuple[Store, list[str] | None]]",
    components: Sequence[str],
    *,
    cluster: dict[str, Any],
    quiet: bool,
    **wanted: Any,
) -> "list[Calibration]":
    """Calibrate each component, in this process or on a cluster."""
    with console.progress(quiet=quiet) as bar:
        task = bar.add_task("calibrate", total=0, note="tokens x layers")

        def tick(tokens: int) -> None:
            bar.update(task, advance=tokens)

        def begin(component: str, total: int) -> None:
            bar.reset(task, description=component, total=total)

        if cluster["scheduler"] is None and cluster["workers"] is None:
            return [_fit(chosen, name, begin=begin, tick=tick, **wanted) for name in components]
        from calibrate.distributed import cluster_runner

        with cluster_runner(**cluster, memory=wanted["memory"], tick=tick) as runner:
            return [_fit(chosen, name, begin=begin, runner=runner, **wanted) for name in components]


def _fit(
    chosen: "Sequence[tuple[Store, list[str] | None]]",
    component: str,
    *,
    begin: Callable[[str, int], None],
    layers: str | None,
    **wanted: Any,
) -> "Calibration":
    from calibrate.calibration import fit
    from calibrate.layerspec import captured_layers
    from calibrate.reading import to_read

    selected = _selected(chosen, component, layers=layers, segment=wanted["segment"])
    for source in selected.sources:
        left_out = getattr(source, "left_out", ())
        if left_out and layers is None:
            console.warn(
                f"{component} at layers {', '.join(map(str, left_out))} is not captured for all the rollouts, so they "
                "are left out; name --layers, or choose rollouts that have them"
            )
    begin(component, sum(one.tokens for one in to_read(selected, passes=wanted["passes"])))
    numbers = captured_layers(layers, [store for store, _ in chosen], component)
    return fit(chosen, component=component, layers=numbers, **wanted)


def _keeps(paths: Sequence[Path], out: Path | None, *, required: bool) -> bool:
    """Whether the result is kept in the stores: one that can't be written is no error where a file is asked for."""
    from calibrate.keeping import check_places

    if required:
        return True
    try:
        check_places(paths, out=out)
    except ReadOnlyError as error:
        console.warn(str(error))
        return False
    return True


def _saved(found: "Sequence[Calibration]", out: Path | None) -> list[str]:
    from calibrate.keeping import save

    return [f"{store}/calibration/{number:04d}" for one in found for store, number in save(one, out=out)]


def _written(
    found: "Calibration",
    export: str | None,
    out: Path | None,
    *,
    experiment: Path | None,
    variant: str,
    prompt_set: str | None,
    plot: Path | None,
    per_token: int | None,
) -> list[Path]:
    """Write the files that were asked for; `per_token` is the allowance for reading each rollout's values again."""
    from calibrate.export import massive_file, per_layer_file, write_experiment
    from experiments.projections import write_json

    files: list[Path] = []
    about: dict[str, Any] = {
        "experiment": "" if experiment is None else experiment.resolve().name,
        "model_variant": variant,
    }
    detail: dict[str, Any] = {}
    if per_token is not None:
        from calibrate.per_token import per_rollout

        detail["per_prompt"] = per_rollout(found.data, memory=per_token)
    if export == "json" and out is not None:
        files.append(write_json(out, massive_file(found.data, **about, **detail, prompt_set=prompt_set or "")))
    if export == "per-layer" and out is not None:
        files.append(write_json(out, per_layer_file(found.data, **about)))
    if experiment is not None and prompt_set is not None:
        files += write_experiment(found.data, experiment, variant=variant, prompt_set=prompt_set, **detail)
    if plot is not None:
        from calibrate.plot import save_plot

        files.append(save_plot(found.data, plot))
    return files


def _show_plan(selected: "Sequence[Selected]", *, passes: bool, as_json: bool) -> None:
    """Say what would be read."""
    from calibrate.reading import to_read

    plans: list[dict[str, Any]] = [
        {
            "component": one.component,
            "layers": one.layers,
            "rollouts": len(one.counts),
            "tokens": one.tokens,
            "of": one.rule,
            "passes": [
                {"what": p.what, "rollouts": p.rollouts, "bytes": p.nbytes} for p in to_read(one, passes=passes)
            ],
        }
        for one in selected
    ]
    if as_json:
        console.emit_json({"dry_run": plans})
        return
    out = console.stdout()
    for plan in plans:
        out.print(
            f"{plan['component']} at layers {', '.join(map(str, plan['layers']))}: {plan['rollouts']} rollouts, "
            f"{plan['tokens']:,} tokens ({plan['of']})"
        )
        for step in plan["passes"]:
            out.print(f"  pass for {step['what']}: {step['rollouts']} rollouts, {console.human_bytes(step['bytes'])}")
        if not plan["passes"]:
            out.print("  no pass: all from the statistics kept at capture")


def _show(found: "Sequence[Calibration]", saved: list[str], written: list[Path], *, as_json: bool) -> None:
    """Print what each layer is like, and where the results are."""
    from calibrate.report import summary

    documents = [summary(one) for one in found]
    if as_json:
        console.emit_json({"calibrations": documents, "saved": saved, "written": written})
        return
    from rich.table import Table

    out = console.stdout()
    for one in documents:
        table = Table(
            "layer",
            "norm",
            "alignment",
            "cos next",
            "top dims of |mean|",
            "massive (peak ratio)",
            "Sun et al.",
            title=f"{one['component']}: {one['rollouts']} rollouts, {one['tokens']:,} tokens ({one['of']})",
        )
        for row in one["by_layer"]:
            table.add_row(*(_cell(row[key]) for key in row))
        out.print(table)
        out.print(f"recommended dims (first five of three layers or more): {_cell(one['recommended_dims'])}")
        took = one["sources"]
        out.print(
            f"from the statistics kept at capture: {', '.join(took['statistics']) or 'nothing'}\n"
            f"from a pass over the data: {', '.join(took['pass']) or 'nothing'}"
        )
    for place in [*saved, *map(str, written)]:
        out.print(f"wrote {place}")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{dim} ({_cell(ratio)})" for dim, ratio in value.items()) or "none"
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
