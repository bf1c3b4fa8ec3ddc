"""An experiment tree: its variants, where its prompt sets lie, and its responses with all that is known of them."""

from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from experiments.errors import ExperimentError
from experiments.jsonfile import MAX_BYTES, load_json
from experiments.reading import SUFFIXES, is_sidecar, joined, natural_key, read, unique
from experiments.transcript import Transcript, sentence

__all__ = ["Experiment", "Variant", "read_classifications"]

M = TypeVar("M", bound=BaseModel)


class Variant(BaseModel):
    """A model of an experiment: a name or directory, and the adapter put on it."""

    model_config = ConfigDict(frozen=True, extra="allow")
    model: str = Field(min_length=1)
    lora: str | None = None


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")
    defaults: dict[str, str] = Field(default_factory=dict)
    model_variants: dict[str, Variant] = Field(min_length=1)
    use_chat_template: bool | None = None


class _Classification(BaseModel):
    run: str
    sample: int
    label: str
    justification: str | None = None


class _Classifications(BaseModel):
    classifications: tuple[_Classification, ...]

    @model_validator(mode="after")
    def _once(self) -> Self:
        keys = [(one.run, one.sample) for one in self.classifications]
        for (run, sample), count in Counter(keys).items():
            if count > 1:
                raise ValueError(f"has run {run!r} sample {sample} more than once")
        return self


class Experiment:
    """An experiment tree on disk.

    Parameters
    ----------
    root : path
        The directory with `config.json`.
    max_bytes : int
        Largest file that is read.

    Raises
    ------
    ExperimentError
        No directory, no `config.json`, or one without `model_variants`.
    """

    def __init__(self, root: str | Path, *, max_bytes: int = MAX_BYTES) -> None:
        self.root = Path(root)
        self.max_bytes = max_bytes
        path = self.root / "config.json"
        if not path.is_file():
            raise ExperimentError(f"{self.root} is not an experiment tree: it has no config.json")
        self._config = _validated(_Config, load_json(path, max_bytes=max_bytes), path=path)

    @property
    def use_chat_template(self) -> bool | None:
        """What the config says of chat templates; None when it says nothing."""
        return self._config.use_chat_template

    @property
    def variants(self) -> dict[str, Variant]:
        """The model variants by name, in the config's order."""
        return dict(self._config.model_variants)

    def variant_name(
        self, name: str | None = None, *, mode: Literal["application", "extraction"] = "application"
    ) -> str:
        """Return the variant asked for: `name`, else the config's default for `mode`, else the first one."""
        chosen = name or self._config.defaults.get(mode) or next(iter(self.variants))
        if chosen not in self.variants:
            raise ExperimentError(
                f"{self.root / 'config.json'} has no model variant {chosen!r}; it has {', '.join(self.variants)}"
            )
        return chosen

    def model(self, variant: str) -> str:
        """Return a variant's model: the Hub's name, or its directory where the tree itself has one of that name."""
        named = self.variants[variant].model
        inside = self.root / named
        return str(inside) if (inside / "config.json").is_file() else named

    def responses_dir(self, prompt_set: str, variant: str) -> Path:
        """Directory of a variant's responses to a prompt set, which may be nested (`rm_syco/train_100`)."""
        return self.root / "inference" / _inside(variant) / "responses" / _inside(prompt_set)

    def default_store(self, prompt_set: str, variant: str) -> Path:
        """Where the store of a variant's prompt set lies unless another place is named."""
        return self.root / "inference" / _inside(variant) / f"{_inside(prompt_set)}.zarr"

    def prompt_sets(self, variant: str) -> list[str]:
        """List the prompt sets that hold responses of a variant, nested ones as `a/b`."""
        top = self.root / "inference" / _inside(variant) / "responses"
        files = [p for p in top.rglob("*.json*") if p.suffix in SUFFIXES and not is_sidecar(p)] if top.is_dir() else []
        return sorted({p.parent.relative_to(top).as_posix() for p in files} - {"."}, key=natural_key)

    def transcripts(
        self,
        prompt_set: str,
        *,
        variant: str | None = None,
        responses_from: str | None = None,
        classifications: Path | None = None,
    ) -> list[Transcript]:
        """Read the responses of a prompt set with labels, tags, annotations and turns.

        Parameters
        ----------
        prompt_set : str
        variant : str, optional
            The model variant; default the config's default for application.
        responses_from : str, optional
            Another variant whose responses are read instead (one model over another's text).
        classifications : path, optional
            An `audit_classifications.json`; default the one in the root, if it is there. It is joined on run and
            sample as labels `classification` and `classification_justification`, and wins over the responses' own.

        Raises
        ------
        ExperimentError
            No such variant or prompt set (the message lists what there is), or a file that can't be read.
        """
        owner = responses_from or self.variant_name(variant)
        folder = self.responses_dir(prompt_set, owner)
        if not folder.is_dir():
            known = ", ".join(self.prompt_sets(owner)) or "none"
            raise ExperimentError(f"{folder} does not exist: prompt sets with responses of {owner!r}: {known}")
        audit = classifications or self.root / "audit_classifications.json"
        known_labels = (
            read_classifications(audit, max_bytes=self.max_bytes) if classifications or audit.is_file() else {}
        )
        return unique(
            joined(one, prompt_set=prompt_set, labels=known_labels.get(_run_and_sample(one), {}))
            for one in read(folder, max_bytes=self.max_bytes)
        )


def read_classifications(path: Path, *, max_bytes: int = MAX_BYTES) -> dict[tuple[str, int], dict[str, str]]:
    """Read an `audit_classifications.json`: (run, sample) to the labels it gives."""
    found = _validated(_Classifications, load_json(path, max_bytes=max_bytes), path=path)
    out = {}
    for one in found.classifications:
        labels = {"classification": one.label}
        if one.justification is not None:
            labels["classification_justification"] = one.justification
        out[one.run, one.sample] = labels
    return out


def _run_and_sample(one: Transcript) -> tuple[str, int]:
    run, sample = one.labels.get("run"), one.labels.get("sample_idx")
    return (run, sample) if isinstance(run, str) and isinstance(sample, int) else ("", -1)


def _inside(name: str) -> PurePosixPath:
    """Refuse a name that leads out of the tree."""
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise ExperimentError(f"{name!r} is not a name inside the tree; give one such as 'rm_syco/train_100'")
    return path


def _validated(model: type[M], data: Any, *, path: Path) -> M:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ExperimentError(f"{path} {sentence(error)}") from None
