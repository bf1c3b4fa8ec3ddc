"""Steering results: the `results.jsonl` files that say how far each direction moved a model, and where they lie.

One reader for every era of the file: with and without a header, a direction, population statistics or an evaluation
per run. What a line can't say (a null mean, a missing component) stays None; nothing is taken to be zero here.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from experiments.direction import directory_of_position, position_of_directory
from experiments.errors import ExperimentError
from experiments.jsonfile import load_json, read_text
from experiments.transcript import sentence

__all__ = [
    "Problem",
    "SteeringFile",
    "SteeringHeader",
    "SteeringResult",
    "SteeringResults",
    "SteeringRun",
    "SteeringVector",
    "find_steering",
    "read_naturalness",
    "read_steering",
]


def _finite(value: Any) -> Any:
    # a judge that never answered is written as null or as a bare NaN
    return None if isinstance(value, float) and not math.isfinite(value) else value


Score = Annotated[float | None, BeforeValidator(_finite)]
"""A judge's mean of 0 to 100, or None where the judge gave none."""


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")


class SteeringVector(_Row):
    """One vector that was added to the model, with its weight."""

    layer: int
    method: str = "probe"
    component: str | None = None
    position: str | None = None
    weight: float | None = None


class SteeringResult(_Row):
    """What the judge said of the answers of one run or of the unsteered model."""

    trait_mean: Score = None
    coherence_mean: Score = None
    trait_std: Score = None
    success_rate: Score = None
    n: int | None = None


class _Config(_Row):
    vectors: tuple[SteeringVector, ...] = Field(min_length=1)


class SteeringRun(_Row):
    """One run: the vectors and what came of them."""

    result: SteeringResult
    config: _Config

    @property
    def vector(self) -> SteeringVector:
        """The first vector, the one that a run counts for."""
        return self.config.vectors[0]


class _Baseline(_Row):
    result: SteeringResult


class SteeringHeader(_Row):
    """The first line of newer files."""

    trait: str | None = None
    direction: Literal["positive", "negative"] = "positive"
    steering_model: str | None = None
    steering_experiment: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A line that could not be used, and why."""

    file: str
    line: int
    why: str

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}: {self.why}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SteeringFile:
    """Where a `results.jsonl` stands in its tree."""

    file: str
    experiment: str | None
    trait: str
    variant: str
    position: str
    prompt_set: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SteeringResults:
    """The content of one `results.jsonl`; the lines that can't be used are in `problems`, the others all count."""

    file: str
    header: SteeringHeader
    baseline: SteeringResult | None
    runs: tuple[SteeringRun, ...]
    problems: tuple[Problem, ...] = ()

    @property
    def sign(self) -> int:
        """1 where more of the trait is better, -1 where less is."""
        return 1 if self.header.direction == "positive" else -1

    def delta(self, run: SteeringRun) -> float | None:
        """Trait mean of a run above that of the unsteered model (above 0 where no baseline was measured)."""
        before = self.baseline.trait_mean if self.baseline is not None else None
        after = run.result.trait_mean
        return None if after is None else after - (before or 0.0)


def find_steering(path: str | Path) -> tuple[SteeringFile, ...]:
    """List the steering results at or below a directory, sorted, without opening them.

    Parameters
    ----------
    path : path
        Any directory at or above `{category}/{trait}/{variant}/{position}/{prompt_set}/results.jsonl`, where the prompt
        set may itself be nested; or one that holds such paths as file names joined by `~`.

    Raises
    ------
    ExperimentError
        If there is no such directory.
    """
    root = Path(path).absolute()
    if not root.is_dir():
        raise ExperimentError(f"{path} is not a directory, so no steering results can be read from it")
    # of an experiment only its steering is walked; below a position, `steering` is one prompt set among others
    top = root / "steering" if (root / "steering").is_dir() and not _is_position(root.parts, -1) else root
    found = (_placed(file) for file in top.rglob("*results.jsonl"))
    return tuple(sorted((one for one in found if one is not None), key=lambda one: one.file))


def read_steering(file: str | Path, *, strict: bool = False) -> SteeringResults:
    """Read one `results.jsonl`.

    Parameters
    ----------
    file : path
    strict : bool
        Raise for the first line that can't be used, rather than listing it in `problems`.

    Raises
    ------
    ExperimentError
        If the file can't be read; with `strict`, if any line can't be used (text cut off, no vectors, wrong types).
    """
    path = Path(file)
    header, baseline, runs, problems = SteeringHeader(), None, [], []
    for number, text in _lines(path):
        try:
            row = _row(text)
        except (ValueError, RecursionError) as error:
            problems.append(Problem(file=str(path), line=number, why=_why(text, error)))
            continue
        if isinstance(row, SteeringHeader):
            header = row
        elif isinstance(row, SteeringRun):
            runs.append(row)
        else:
            baseline = row.result
    if strict and problems:
        raise ExperimentError(str(problems[0]))
    return SteeringResults(file=str(path), header=header, baseline=baseline, runs=tuple(runs), problems=tuple(problems))


def read_naturalness(file: str | Path) -> dict[tuple[int, str, str], float]:
    """Read the `naturalness.json` beside a `results.jsonl`: mean naturalness by (layer, method, component).

    Where one direction was judged at several weights the last one in the file stands.
    """
    document = load_json(Path(file))
    scores = document.get("scores", {}) if isinstance(document, dict) else {}
    try:
        return {(int(s["layer"]), str(s["method"]), str(s["component"])): float(s["mean"]) for s in scores.values()}
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise ExperimentError(
            f"{file} is not a table of naturalness scores ({type(error).__name__}: {error}); remove or mend it"
        ) from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    numbered = enumerate(read_text(path).split("\n"), start=1)
    return ((number, text) for number, text in numbered if text.strip())


def _row(text: str) -> SteeringHeader | SteeringRun | _Baseline:
    row = json.loads(text)
    kind = row.get("type") if isinstance(row, dict) else None
    if kind == "header":
        return SteeringHeader.model_validate(row)
    if kind == "baseline":
        return _Baseline.model_validate(row)
    return SteeringRun.model_validate(row)


def _why(text: str, error: Exception) -> str:
    if isinstance(error, ValidationError):
        return f"{sentence(error)}; the line is left out"
    ended = text.rstrip()
    if not ended.endswith("}") or (isinstance(error, json.JSONDecodeError) and error.pos >= len(ended)):
        return f"the line is cut off after {len(text)} characters, so its run is left out; measure it again"
    return f"not valid JSON ({error}), so the line is left out; mend it"


def _placed(file: Path) -> SteeringFile | None:
    names = file.name.split("~")
    if names[-1] != "results.jsonl":
        return None
    parts = [*file.parent.parts, *names[:-1]]
    at = next((i for i in range(len(parts) - 2, 2, -1) if _is_position(parts, i)), None)
    if at is None:
        return None
    category, trait, variant, position = parts[at - 3 : at + 1]
    return SteeringFile(
        file=str(file),
        experiment=parts[at - 5] if at >= 5 and parts[at - 4] == "steering" else None,
        trait=f"{category}/{trait}",
        variant=variant,
        position=position_of_directory(position),
        prompt_set="/".join(parts[at + 1 :]),
    )


def _is_position(parts: Sequence[str], at: int) -> bool:
    return directory_of_position(position_of_directory(parts[at])) == parts[at] != position_of_directory(parts[at])
