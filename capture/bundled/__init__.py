"""Where the bundled model and the bundled rollouts lie."""

from pathlib import Path

__all__ = ["MODEL", "ROLLOUTS"]

MODEL = Path(__file__).parent / "stories260K"
ROLLOUTS = Path(__file__).parent / "rollouts.jsonl"
