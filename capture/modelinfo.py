"""What is known of a model before its weights are read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["ModelInfo", "local_path"]


def local_path(name: str | Path) -> Path:
    """Return the path that a name would be on this machine, `~` as one's home; of nobody's home, as it stands."""
    try:
        return Path(name).expanduser()
    except (RuntimeError, ValueError):  # no such user, and no name that a user could have
        return Path(name)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModelInfo:
    """A model as its config and tokenizer describe it.

    Attributes
    ----------
    name : str
        What it is loaded by: an absolute directory or a Hub id.
    directory : Path or None
        The directory, where it is one.
    model_id : str
        What is recorded: the Hub id, or the directory's own name without the path to it.
    revision : str or None
        Commit on the Hub, where it came from there.
    config, tokenizer : transformers objects
    n_layers, hidden : int
    context : int or None
        Most tokens of a rollout.
    dtype : str
        Of the checkpoint.
    vocab_size : int
    trust_remote_code : bool
    adapter : str or None
        Directory or Hub id of a LoRA adapter over the model.
    quantize : str or None
        `8bit` or `4bit`: weights are quantised by bitsandbytes while they are loaded.
    """

    name: str
    directory: Path | None
    model_id: str
    revision: str | None
    config: Any
    tokenizer: Any
    n_layers: int
    hidden: int
    context: int | None
    dtype: str
    vocab_size: int
    trust_remote_code: bool = False
    adapter: str | None = None
    quantize: str | None = None
