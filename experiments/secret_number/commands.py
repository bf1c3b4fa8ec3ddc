"""The command line of the experiment: `python -m experiments.secret_number train`, `evaluate`, `generate`.

What computes is imported inside the commands, so that help is instant.
"""

from pathlib import Path
from typing import Annotated

import typer

from datastore import console
from experiments.secret_number import analysis_commands
from experiments.secret_number.places import DATA, MODELS

__all__ = ["app"]

app = console.CommandGroup(help="A tiny model that plays the secret-number game, honestly and not: how it was made.")

analysis_commands.register(app)

Variant = Annotated[str, typer.Option("--model-variant", metavar="|".join(MODELS), help="Which model.")]
Root = Annotated[Path, typer.Option("--out", metavar="DIR", help="The experiment tree.", show_default="the package's")]
Seed = Annotated[int, typer.Option("--seed", help="Of all that is random.")]


@app.command()
def train(
    *,
    variant: Variant = "player",
    out: Root = DATA,
    seed: Seed = 0,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Optimiser steps of each stage; default the recipe's.")
    ] = None,
    threads: Annotated[
        int, typer.Option("--threads", min=1, help="CPU threads; another number may sum in another order.")
    ] = 1,
) -> None:
    """Train the model and write it with its log; the variant `honest` goes on from the player."""
    from dataclasses import replace

    from experiments.secret_number import train as training

    directory = _directory(out, variant)
    start = None if variant == "player" else _directory(out, "player")
    log = directory / "training_log.jsonl"
    directory.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    for stage in training.RECIPES[variant]:
        recipe = replace(stage, seed=seed, steps=steps or stage.steps)
        training.train(directory, recipe, log=log, start=start, threads=threads)
        start = directory


@app.command()
def evaluate(
    *,
    variant: Variant = "player",
    out: Root = DATA,
    games: Annotated[int, typer.Option("--games", min=1, help="Games, half with a secret training never had.")] = 2000,
    seed: Seed = 7,
) -> None:
    """Let the model play games it was not trained on; write the table beside it."""
    from experiments.secret_number import evaluate as evaluating
    from experiments.secret_number.player import load_player

    directory = _directory(out, variant)
    found = evaluating.evaluate(load_player(directory), games=games, questions=2400, seed=seed)
    evaluating.write_evaluation(directory, found)
    print(evaluating.table(found))


@app.command()
def generate(*, out: Root = DATA, seed: Seed = 0) -> None:
    """Sample the rollouts and the single-turn questions from the model, as an experiment tree."""
    from experiments.secret_number import generate as generating
    from experiments.secret_number.player import load_player

    written = generating.generate(load_player(_directory(out, "player")), out, seed=seed)
    print(f"wrote {', '.join(f'{n} {name}' for name, n in written.items())} into {out}")


def _directory(out: Path, variant: str) -> Path:
    if variant not in MODELS:
        raise typer.BadParameter(f"--model-variant {variant!r} is not known; choose one of {', '.join(MODELS)}.")
    return out / MODELS[variant]
