"""The command line of project: `python -m project run.zarr --vectors DIR --layers best,best+5`.

What computes is imported inside the commands, so that help is instant.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from datastore import console
from datastore.errors import MisuseError

if TYPE_CHECKING:
    import xarray as xr

    from datastore.query import Store
    from project.run import Work
    from project.selection import Selection

__all__ = ["app"]

app = console.CommandGroup(
    help="Score the rollouts of a store along trait directions, and keep the scores in it; no model is needed.",
    default="project",
)

Experiment = Annotated[
    Path | None, typer.Option("--experiment", metavar="DIR", help="A tree: store, vectors, steering, projections.")
]
Variant = Annotated[str | None, typer.Option("--model-variant", help="Model variant of the experiment.")]
PromptSet = Annotated[str | None, typer.Option("--prompt-set", help="Prompt set of the experiment.")]


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where everything lies, named one by one or by an experiment."""

    store: Path
    vectors: Path
    steering: Path | None = None
    export: Path | None = None
    """Where an experiment has its projection files; they are written there unless --out names another place."""
    extraction: str | None = None
    prompt_sets: tuple[str, ...] = field(default_factory=tuple)


@app.command("project", hidden=True)
def project(
    *,
    store: Annotated[Path | None, typer.Argument(metavar="STORE", help="The store.")] = None,
    vectors: Annotated[
        Path | None, typer.Option("--vectors", metavar="DIR", help="Directory above vector files, or a flat file.")
    ] = None,
    layers: Annotated[
        str, typer.Option("--layers", metavar="SPEC", help="best, best+5, best-5, 16, 10-20, 0-75:5, by commas.")
    ] = "best,best+5",
    traits: Annotated[str | None, typer.Option("--traits", metavar="NAME,NAME", help="Only these traits.")] = None,
    component: Annotated[str, typer.Option("--component", help="Which tensor of each layer.")] = "residual",
    method: Annotated[str | None, typer.Option("--method", help="probe, mean_diff, gradient...")] = None,
    position: Annotated[str | None, typer.Option("--position", help='As "response[:5]".')] = None,
    steering: Annotated[
        Path | None, typer.Option("--steering", metavar="DIR", help="Directory above results.jsonl files.")
    ] = None,
    steering_set: Annotated[
        str, typer.Option("--steering-set", help="Prompt set of the steering results.")
    ] = "steering",
    extraction_variant: Annotated[
        str | None, typer.Option("--extraction-variant", help="Model variant that the vectors are of.")
    ] = None,
    min_coherence: Annotated[
        float | None, typer.Option("--min-coherence", metavar="N", help="Least coherence of a steering run.")
    ] = None,
    rules: Annotated[
        str, typer.Option("--rules", metavar="dev|main|seed", help="How the best vector is chosen.")
    ] = "dev",
    centered: Annotated[
        bool, typer.Option("--centered", help="Subtract each direction's baseline in the export.")
    ] = False,
    snap: Annotated[int, typer.Option("--snap", metavar="N", help="How far the nearest captured layer may be.")] = 2,
    force_model: Annotated[
        bool, typer.Option("--force-model", help="Take vectors that were made from another model.")
    ] = False,
    ids: console.Ids = None,
    where: console.Where = None,
    limit: console.Limit = None,
    segment: console.Segment = None,
    export: console.Export = None,
    out: console.Out = None,
    experiment: Experiment = None,
    model_variant: Variant = None,
    prompt_set: PromptSet = None,
    scheduler: console.Scheduler = None,
    workers: console.Workers = None,
    memory: console.Memory = console.DEFAULT_MEMORY,
    dry_run: console.DryRun = False,
    as_json: console.Json = False,
) -> None:
    """Score rollouts along directions and keep the scores; what is there already is not computed again."""
    from project.criteria import Criteria

    _check_choices(segment=segment, export=export, out=out, experiment=experiment)
    places = _places(store, vectors, steering, experiment=experiment, variant=model_variant, prompt_set=prompt_set)
    criteria = Criteria(
        layers=layers,
        traits=console.parse_list(traits),
        component=component,
        method=method,
        position=position,
        variant=extraction_variant or places.extraction,
        prompt_set=steering_set,
        rules=rules,
        min_coherence=min_coherence,
        snap=snap,
        force_model=force_model,
    )
    opened = _opened(places.store)
    rollouts = _rollouts(opened, places, ids=ids, where=where, limit=limit)
    _project(
        opened,
        _selected(opened, places, criteria, rollouts=rollouts),
        rollouts,
        results=out if export is None else None,
        projections=places.export if out is None else None if export is None else out,
        centred=centered,
        segment=segment,
        cluster={"scheduler": scheduler, "workers": workers},
        memory=memory,
        dry_run=dry_run,
        as_json=as_json,
        asked={"layers": layers, "traits": traits, "ids": ids, "where": where, "rules": rules},
    )


def _project(
    store: "Store",
    chosen: "Selection",
    rollouts: list[str],
    *,
    results: Path | None,
    projections: Path | None,
    centred: bool,
    segment: str | None,
    cluster: dict[str, Any],
    memory: int,
    dry_run: bool,
    as_json: bool,
    asked: dict[str, Any],
) -> None:
    """Compute what is missing, export, and print the tables."""
    from project.run import work

    if not chosen.vectors:
        _show(chosen, None, None, as_json=as_json)
        raise typer.Exit(1)
    todo = work(store, chosen, rollouts=rollouts, out=results)
    for sentence in (*chosen.notes, *todo.changed, *_absences(todo)):
        console.warn(sentence)
    if dry_run:
        _show(chosen, todo, None, as_json=as_json)
        return
    found = _scored(store, chosen, todo, out=results, cluster=cluster, memory=memory, quiet=as_json, asked=asked)
    written = 0
    if projections is not None:
        from project.export import export_json

        written = export_json(store, found, projections, centred=centred)
    _show(chosen, todo, found, as_json=as_json, segment=segment, written=written)
    if written and not as_json:
        console.stdout().print(f"{written} projection files written below {projections}")


def _rollouts(store: "Store", places: Places, *, ids: str | None, where: str | None, limit: int | None) -> list[str]:
    """Choose rollouts, of an experiment's prompt set where the store holds several."""
    from datastore.choose import choose

    table = store.rollouts
    if places.prompt_sets and set(table["prompt_set"]) & set(places.prompt_sets):
        table = table[table["prompt_set"].isin(places.prompt_sets)]
    return choose(table, ids=console.parse_list(ids), where=where, limit=limit)


def _check_choices(*, segment: str | None, export: str | None, out: Path | None, experiment: Path | None) -> None:
    if segment not in (None, "prompt", "response"):
        raise typer.BadParameter(f"--segment {segment!r} is neither prompt nor response.")
    if export not in (None, "json"):
        raise typer.BadParameter(f"--export {export!r} is not known; json writes a projection file for each rollout.")
    if export == "json" and out is None and experiment is None:
        raise typer.BadParameter("--export json needs --out DIR, the directory for the projection files.")


def _places(
    store: Path | None,
    vectors: Path | None,
    steering: Path | None,
    *,
    experiment: Path | None,
    variant: str | None,
    prompt_set: str | None,
) -> Places:
    """Resolve what an experiment stands for; what is named by itself wins."""
    if experiment is None:
        if variant or prompt_set:
            raise typer.BadParameter("--model-variant and --prompt-set belong to an --experiment; name it too.")
        if store is None or vectors is None:
            missing = "the store" if store is None else "--vectors"
            raise typer.BadParameter(f"Name {missing}, or an --experiment with --prompt-set that holds both.")
        return Places(store=store, vectors=vectors, steering=steering)
    from experiments.tree import Experiment

    tree = Experiment(experiment)
    name = tree.variant_name(variant)
    if store is None and prompt_set is None:
        raise typer.BadParameter("--experiment needs --prompt-set, which names its store, or the store itself.")
    steered = experiment / "steering"
    return Places(
        store=store or tree.default_store(prompt_set or "", name),
        vectors=vectors or experiment,
        steering=steering or (steered if steered.is_dir() else None),
        export=experiment / "inference" / name / "projections",
        extraction=tree.variant_name(mode="extraction"),
        prompt_sets=(prompt_set,) if prompt_set else (),
    )


def _opened(path: Path) -> "Store":
    import datastore

    return datastore.open(path)


def _selected(store: "Store", places: Places, criteria: Any, *, rollouts: list[str]) -> "Selection":
    from dataclasses import replace

    from experiments.steering import find_steering
    from experiments.vectors import find_directions
    from project.selection import select

    if criteria.component not in store.components:
        raise MisuseError(
            f"the store does not hold the component {criteria.component!r}; it holds {', '.join(store.components)}"
        )
    captured = store.captured(criteria.component).loc[rollouts]
    models = sorted({str(name) for name in store.captures["model"]} - {"unknown"})
    return select(
        find_directions(places.vectors),
        [int(layer) for layer in captured.columns[captured.any()]],
        steering=find_steering(places.steering) if places.steering is not None else (),
        criteria=replace(
            criteria,
            width=store.cells.components[criteria.component].width,
            model=models[-1] if models else None,
            variant=_variant(places, criteria.variant),
        ),
    )


def _variant(places: Places, asked: str | None) -> str | None:
    """Use an experiment's extraction variant only where the vectors are of several."""
    from experiments.vectors import find_directions

    if asked is None or asked != places.extraction:
        return asked
    variants = {entry.variant for entry in find_directions(places.vectors).entries}
    return asked if len(variants) > 1 and asked in variants else None


def _absences(todo: "Work") -> list[str]:
    return [
        f"{place.component} at layer {place.layer} is not captured for {len(names)} rollouts "
        f"({', '.join(names[:5])}{', ...' if len(names) > 5 else ''}), which get no score there"
        for place, names in todo.absent.items()
    ]


def _scored(
    store: "Store",
    chosen: "Selection",
    todo: "Work",
    *,
    out: Path | None,
    cluster: dict[str, Any],
    memory: int,
    quiet: bool,
    asked: dict[str, Any],
) -> "xr.Dataset":
    from project.run import scores

    settings: dict[str, Any] = {"rollouts": todo.rollouts, "memory": memory, "out": out, "selection": asked}
    with console.progress(quiet=quiet) as bar:
        task = bar.add_task("project", total=None, note="tokens")

        def advanced(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        if cluster["scheduler"] is None and cluster["workers"] is None:
            return scores(store, chosen, progress=advanced, **settings)
        from project.distributed import cluster_runner

        with cluster_runner(**cluster, memory=memory, progress=advanced) as runner:
            return scores(store, chosen, runner=runner, **settings)


def _show(
    chosen: "Selection",
    todo: "Work | None",
    found: "xr.Dataset | None",
    *,
    as_json: bool,
    segment: str | None = None,
    written: int = 0,
) -> None:
    """Print the directions with their mean scores, and at the end what was skipped and why."""
    from project.report import direction_rows

    rows = direction_rows(chosen, found, segment=segment)
    skipped = chosen.skipped.to_dict("records")
    if as_json:
        document: dict[str, Any] = {"directions": rows, "skipped": skipped, "written": written}
        if todo is not None:
            document["rollouts"] = len(todo.rollouts)
            document["computed"] = {"directions": todo.n_columns, "decoded_bytes": todo.decoded_bytes}
        console.emit_json(document)
        return
    from rich.table import Table

    table = Table("trait", "layer", "asked", "method", "position", "source", "mean score", "why", title="directions")
    for row in rows:
        mean = "" if row["mean_score"] is None else f"{row['mean_score']:.4g}"
        cells = (
            row["trait"],
            row["layer"],
            row["requested"],
            row["method"],
            row["vector_position"],
            row["source"],
            mean,
        )
        table.add_row(*map(str, cells), row["why"])
    if rows:
        console.stdout().print(table)
    if todo is not None:
        verb = "computed" if found is not None else "to compute"
        console.stdout().print(
            f"{len(todo.rollouts)} rollouts; {verb}: {todo.n_columns} directions, "
            f"{console.human_bytes(todo.decoded_bytes)} of activations"
        )
    if skipped:
        left_out = Table("trait", "asked", "why", title="skipped")
        for one in skipped:
            left_out.add_row(one["trait"], one["requested"], one["why"])
        console.stdout().print(left_out)


@app.command("fit")
def fit(
    *,
    store: Annotated[Path, typer.Argument(metavar="STORE", help="The store.")],
    label: Annotated[
        str, typer.Option("--label", metavar="LABEL", help="A true-or-false label, LABEL=VALUE, or a condition.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the vector tree is written.")],
    method: Annotated[str, typer.Option("--method", metavar="mean_diff|probe|random")] = "mean_diff",
    position: Annotated[
        str, typer.Option("--position", help='Tokens to average: "response[:5]", "turn[2]:thinking[:]", "all[:]"...')
    ] = "response[:]",
    component: Annotated[str, typer.Option("--component", help="Which tensor of each layer.")] = "residual",
    layers: Annotated[str | None, typer.Option("--layers", metavar="SPEC", help="16, 10-20 by commas; all.")] = None,
    trait: Annotated[str | None, typer.Option("--trait", metavar="CATEGORY/NAME")] = None,
    variant: Annotated[str, typer.Option("--variant", help="Model variant to write the vectors under.")] = "base",
    group: Annotated[
        str | None,
        typer.Option("--group", metavar="LABEL", help="Rollouts of one value stay on one side."),
    ] = None,
    held_out: Annotated[float, typer.Option("--held-out", help="Share of the rollouts to judge by.")] = 0.3,
    seed: Annotated[int, typer.Option("--seed", help="Of the split and the controls.")] = 0,
    ids: console.Ids = None,
    where: console.Where = None,
    limit: console.Limit = None,
    memory: console.Memory = console.DEFAULT_MEMORY,
    as_json: console.Json = False,
) -> None:
    """Learn a direction from the store and write it as a vector tree."""
    from datastore.choose import choose
    from experiments.vectors import write_directions
    from project.fit import fit_directions
    from project.report import fitted_rows

    opened = _opened(store)
    chosen = choose(opened.rollouts, ids=console.parse_list(ids), where=where, limit=limit)
    found = fit_directions(
        opened,
        label,
        layers=_layer_numbers(opened, component, layers),
        method=method,
        position=position,
        component=component,
        trait=trait,
        rollouts=chosen,
        group=group,
        held_out=held_out,
        seed=seed,
        memory=memory,
    )
    written = write_directions(out, [one.direction for one in found], variant=variant)
    rows = fitted_rows(found, written)
    if as_json:
        console.emit_json({"fitted": rows})
        return
    from rich.table import Table

    table = Table("layer", "AUROC held out", "shuffled", "token ids only", "fitted on", "judged by", "file")
    for row in rows:
        interval = f"{row['auroc']:.3f} [{row['auroc_low']:.3f}, {row['auroc_high']:.3f}]"
        controls = [f"{row[key]:.3f}" for key in ("auroc_shuffled", "auroc_token_ids")]
        table.add_row(str(row["layer"]), interval, *controls, str(row["n_fitted"]), str(row["n_judged"]), row["file"])
    console.stdout().print(table)


def _layer_numbers(store: "Store", component: str, spec: str | None) -> list[int] | None:
    """Read a layer spec against the layers that are captured."""
    from project.layerspec import parse_layer_requests, snapped

    if spec is None or spec == "all":
        return None
    captured = [int(layer) for layer in store.captured(component).columns]
    found: list[int] = []
    for request in parse_layer_requests(spec):
        if request.offset is not None:
            raise typer.BadParameter(f"--layers {request.text!r} asks for a best layer, and nothing is fitted yet.")
        if request.span is not None:
            found += [layer for layer in captured if layer in request.span]
        elif request.layer is not None:
            found.append(snapped(request.layer, captured, within=0))
    return sorted(set(found))
