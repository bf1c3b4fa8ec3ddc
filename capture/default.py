"""What is captured when nothing is named: a tiny model of the secret-number game over rollouts of its own, as files."""

from pathlib import Path

import experiments
from experiments.transcript import Transcript
from experiments.tree import Experiment

__all__ = ["default_ids", "default_model", "default_transcripts"]

_TREE = Path(experiments.__file__).parent / "secret_number" / "data"
_PROMPT_SET = "secret_number"


def default_model() -> Path:
    """Return the directory of the tree's own model."""
    tree = Experiment(_TREE)
    return Path(tree.model(tree.variant_name()))


def default_transcripts() -> list[Transcript]:
    """Read all audited rollouts of the tree, with labels, turns and annotations."""
    return Experiment(_TREE).transcripts(_PROMPT_SET)


def default_ids() -> tuple[str, ...]:
    """Return the rollouts that are captured where none are chosen."""
    return tuple((_TREE / "default_ids.txt").read_text(encoding="utf-8").split())
