"""A small real model and conversations to run it over: what capture is given where a test names no other."""

from pathlib import Path

import pytest

from tests.capture import cli

__all__ = ["MODEL", "ROLLOUTS", "command", "worded"]

MODEL = Path(__file__).parents[1] / "data" / "stories260K"
ROLLOUTS = MODEL / "rollouts" / "rollouts.jsonl"


def worded(*words: object) -> tuple[object, ...]:
    """Return the words of a capture with this model and these conversations added, unless others are named."""
    model = () if "--model" in words else ("--model", MODEL)
    return (*words, *model, *(() if "--input" in words else ("--input", ROLLOUTS)))


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> cli.Command:
    """Run `python -m capture` with these words in this process, over the stories where they name nothing else."""
    return lambda *words: cli.run(capsys, *worded(*words))
