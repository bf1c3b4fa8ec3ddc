"""Games that nothing else uses, played by the model and written as an experiment tree: what the report measures on."""

from pathlib import Path

from experiments.secret_number.game import Game, setup
from experiments.secret_number.language import parse_answer
from experiments.secret_number.places import AUDIT
from experiments.secret_number.player import Played, Player, play_on
from experiments.secret_number.tree import Record, record_of, write_classifications, write_config, write_set

__all__ = ["FIRST_GAME", "write_games"]

FIRST_GAME = 9_000_000
"""Neither training, nor the rollouts, nor evaluation, nor steering draw games from here on."""


def write_games(player: Player, root: Path, *, model: Path, games: int, seed: int = 0) -> int:
    """Play games, each once and to its end, and write those that came to an answer of the grammar.

    Parameters
    ----------
    player : Player
    root : Path
        The tree, with a prompt set as the bundled one and `model` as its only variant's.
    model : Path
        Where the player was loaded from.
    games : int
    seed : int
        Of the sampling.

    Returns
    -------
    int
        Games written: all but those in which the model made an illegal move.
    """
    played = play_on(player, [Game(setup(FIRST_GAME + i)) for i in range(games)], seed=seed)
    records = [one for i, done in enumerate(played) if (one := _record(player, f"h{i}", done)) is not None]
    write_config(root, {"player": str(model.absolute())})
    write_set(root, AUDIT, records, variant="player", one_file=True)
    write_classifications(root, records)
    return len(records)


def _record(player: Player, name: str, done: Played) -> Record | None:
    game: Game = done.conversation
    question = game.setup.question
    if done.problem or parse_answer(question, game.messages[-1]["content"]) is None:
        return None
    return record_of(
        game.messages,
        player.encode,
        question=question,
        facts=game.facts,
        tools=True,
        id=name,
        run=f"run-{game.setup.seed}",
        sample=0,
        model="player",
        why="",
    )
