"""Where the experiment's files lie: the models, the tree of rollouts, and which of them are captured by default."""

from pathlib import Path

__all__ = ["AUDIT", "DATA", "DEFAULT_IDS", "MODELS", "QUESTION_SET"]

DATA = Path(__file__).parent / "data"
"""An experiment tree, with its models beside the rollouts."""

MODELS = {"player": "secret-number", "honest": "secret-number-honest"}
"""Variant to directory in `DATA`: the agent, and the same trained further on games without a lie."""

AUDIT, QUESTION_SET = "secret_number", "questions"
DEFAULT_IDS = "default_ids.txt"
