"""The commands that measure: `steer`, `play`, `finding` and `report`, beside those that make the model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from datastore import console
from experiments.secret_number.places import DATA, MODELS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from datastore.query import Store
    from experiments.direction import Direction, DirectionEntry

__all__ = ["register"]

LYING = "secret_number/lying"

Vectors = Annotated[Path, typer.Option("--vectors", metavar="DIR", help="Directory above the vector files.")]
LearnedOn = Annotated[
    Path, typer.Option("--learned-on", metavar="STORE", help="The store that the direction was fitted on.")
]
Seed = Annotated[int, typer.Option("--seed", help="Of all that is random.")]


def register(app: console.CommandGroup) -> None:
    """Add the commands to the experiment's group."""
    app.command("steer")(steer)
    app.command("play")(play)
    app.command("finding")(finding)
    app.command("report")(report)


def steer(
    *,
    learned_on: LearnedOn,
    vectors: Vectors = DATA / "extraction",
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The steering tree.")] = DATA / "steering",
    model: Annotated[Path, typer.Option("--model", metavar="DIR", help="The player.")] = DATA / MODELS["player"],
    games: Annotated[int, typer.Option("--games", min=1, help="Held-out games, the same for every direction.")] = 128,
    multiples: Annotated[
        str, typer.Option("--multiples", metavar="M,M", help="Coefficients, in mean norms of the layer.")
    ] = "-1,-0.5,-0.25,0.25,0.5,1",
    traits: Annotated[str | None, typer.Option("--traits", metavar="NAME,NAME", help="Only these traits.")] = None,
    methods: Annotated[str | None, typer.Option("--methods", metavar="NAME,NAME", help="Only these methods.")] = None,
    seed: Seed = 0,
    as_json: console.Json = False,
) -> None:
    """Add each direction to the model while it plays held-out games; the game's facts judge what comes of it."""
    numbers = _multiples(multiples)
    import datastore
    from experiments.secret_number.player import load_player
    from experiments.secret_number.steering import steer as steering
    from experiments.secret_number.steering import write_results
    from experiments.vectors import read_directions

    named, kept = console.parse_list(traits), console.parse_list(methods)
    found_there = read_directions(vectors)
    directions = [o for o in found_there if (named is None or o.trait in named) and (kept is None or o.method in kept)]
    store = datastore.open(learned_on)
    norms = {one.layer: float(store.norms(one.component, layers=one.layer).mean()) for one in directions}
    with console.progress(quiet=as_json) as bar:
        task = bar.add_task("steer", total=1 + len(directions) * len(numbers), note="")
        baseline, found = steering(
            load_player(model),
            directions,
            norms,
            multiples=numbers,
            games=games,
            seed=seed,
            tick=lambda note: bar.update(task, advance=1, note=note),
        )
    files = write_results(out, baseline, found, variant="player")
    if as_json:
        rows = [_steered_row(one, at, outcome) for one, at, outcome in found]
        console.emit_json({"baseline": baseline.result("false"), "runs": rows, "files": files})
        return
    _show_steering(baseline, found)


def _multiples(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(one) for one in console.parse_list(text) or ())
    except ValueError:
        raise typer.BadParameter(f"--multiples {text!r} is no list of numbers; write it like -1,-0.5,0.5,1.") from None


def _steered_row(direction: "Direction", coefficient: float, outcome: Any) -> dict[str, Any]:
    about = {"trait": direction.trait, "layer": direction.layer, "method": direction.method, "weight": coefficient}
    return {**about, **outcome.result("false")}


def _show_steering(baseline: Any, found: Any) -> None:
    from rich.table import Table

    table = Table("trait", "layer", "method", "coefficient", "false claims", "promises", "read the file", "valid turns")
    rows = [(("unsteered", "", "", ""), baseline)]
    rows += [((o.trait, str(o.layer), o.method, f"{c:+.2f}"), outcome) for o, c, outcome in found]
    for about, outcome in rows:
        result = outcome.result("false")
        shares = [result[key] for key in ("false_mean", "promised_mean", "peeked_mean", "coherence_mean")]
        table.add_row(*about, *("" if share is None else f"{share:.1f} %" for share in shares))
    console.stdout().print(table)


def play(
    *,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The experiment tree to write.")],
    model: Annotated[Path, typer.Option("--model", metavar="DIR", help="The player.")] = DATA / MODELS["player"],
    games: Annotated[int, typer.Option("--games", min=1, help="How many games.")] = 600,
    seed: Seed = 0,
) -> None:
    """Let the model play games that nothing else uses, and write them as a tree to capture."""
    from experiments.secret_number.held_out import write_games
    from experiments.secret_number.player import load_player

    with console.stderr().status("playing"):
        written = write_games(load_player(model), out, model=model, games=games, seed=seed)
    print(f"wrote {written} of {games} games, those that came to an answer, into {out}")


def finding(
    *,
    store: Annotated[Path, typer.Argument(metavar="STORE", help="A store of audited games.")],
    learned_on: LearnedOn,
    vectors: Vectors = DATA / "extraction",
    steering: Annotated[
        Path, typer.Option("--steering", metavar="DIR", help="Steering results, for --layers best.")
    ] = DATA / "steering",
    trait: Annotated[str, typer.Option("--trait", metavar="CATEGORY/NAME")] = LYING,
    layers: Annotated[
        str | None,
        typer.Option(
            "--layers", metavar="SPEC", help="One layer, or best for what steered best; default what fitted best."
        ),
    ] = None,
    method: Annotated[str, typer.Option("--method", help="mean_diff or probe.")] = "mean_diff",
    plot: Annotated[Path | None, typer.Option("--plot", metavar="OUT.png", help="Draw the finding.")] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="OUT.json", help="Write the finding as JSON.")] = None,
    seed: Seed = 0,
    as_json: console.Json = False,
) -> None:
    """Measure how well a direction tells false claims from true ones, beside every control."""
    import datastore
    from experiments.secret_number.finding import find

    opened, learned = datastore.open(store), datastore.open(learned_on)
    direction, others = _chosen(opened, vectors, steering, trait=trait, layers=layers, method=method)
    with console.progress(quiet=as_json) as bar:
        task = bar.add_task("finding", total=4, note="")
        found = find(
            opened,
            direction,
            learned_on=learned,
            others=others,
            seed=seed,
            tick=lambda note: bar.update(task, advance=1, note=note),
        )
    if plot is not None:
        from experiments.secret_number.figure import save_figure

        save_figure(found, plot)
    if out is not None:
        import json

        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if as_json:
        console.emit_json(found)
        return
    from experiments.secret_number.tables import show

    show(found)
    if plot is not None:
        console.stdout().print(f"figure: {plot}")


def _chosen(
    store: "Store", vectors: Path, steering: Path, *, trait: str, layers: str | None, method: str
) -> "tuple[Direction, list[Direction]]":
    """Choose the direction, by its fit or as `python -m project` does, and find the same at the other layers."""
    from datastore.errors import MisuseError
    from experiments.steering import find_steering
    from experiments.vectors import find_directions, load_direction
    from project.criteria import Criteria
    from project.selection import select

    index = find_directions(vectors)
    captured = [int(layer) for layer in store.captured("residual").columns]
    width = store.cells.components["residual"].width
    asked = Criteria(
        layers=layers or _fitted_best(index.entries, trait, method), traits=[trait], method=method, width=width
    )
    chosen = select(index, captured, steering=find_steering(steering), criteria=asked)
    if len(chosen.vectors) != 1:
        why = "; ".join(map(str, chosen.skipped["why"])) or f"{len(chosen.vectors)} layers are selected"
        raise MisuseError(f"--trait {trait} --layers {layers} must name one direction: {why}")
    (one,) = chosen.vectors
    same = (one.trait, one.method, one.position, one.component)
    others = [
        load_direction(entry)
        for entry in index.entries
        if (entry.trait, entry.method, entry.position, entry.component) == same and entry.layer != one.layer
    ]
    return one, [other for other in others if other.layer in captured]


def _fitted_best(entries: "Sequence[DirectionEntry]", trait: str, method: str) -> str:
    """Return the layer whose direction told single questions apart best, of those that were held out of its fit."""
    areas = {
        one.layer: one.facts["auroc"]
        for one in entries
        if (one.trait, one.method) == (trait, method) and "auroc" in one.facts
    }
    return str(max(areas, key=lambda layer: areas[layer])) if areas else "best"


def report(
    *,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where everything is made.")],
    games: Annotated[int, typer.Option("--games", min=1, help="Held-out games to measure on.")] = 200,
    steered: Annotated[int, typer.Option("--steered", min=1, help="Held-out games of each steering run.")] = 48,
    write: Annotated[
        bool, typer.Option("--write", help="Put vectors, steering results, numbers and figure into the checkout.")
    ] = False,
) -> None:
    """Make every number of the report again, from the model on: fit, steer, play, capture, measure, draw."""
    from experiments.secret_number.report import make

    make(out, games=games, steered=steered, write=write)
