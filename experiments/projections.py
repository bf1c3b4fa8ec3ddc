"""The JSON files that an experiment's viewer and analyses read: projections per rollout, and massive activations.

Both are pydantic models, so that a file that can be built can be read back. A number that is not finite can't be held:
what is undefined is null, and the text is always valid JSON. Files of the old tools are read with their bare `NaN`.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from glob import escape
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

import numpy as np
from numpy.typing import ArrayLike
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from experiments.errors import ExperimentError
from experiments.jsonfile import read_text
from experiments.transcript import sentence

__all__ = [
    "AlignmentRange",
    "Halves",
    "MassiveActivations",
    "MassiveAggregate",
    "MassiveDim",
    "MassiveDimData",
    "MassivePrompt",
    "PerLayerStats",
    "Projection",
    "ProjectionEntry",
    "ProjectionMetadata",
    "dim_set",
    "massive_paths",
    "numbers",
    "projection_path",
    "read_massive",
    "read_projection",
    "write_json",
]

M = TypeVar("M", bound=BaseModel)


def numbers(values: ArrayLike) -> list[Any]:
    """Return an array as nested lists for JSON: non-finite as None, float32 in the fewest digits that give it back.

    Examples
    --------
    >>> numbers(np.array([0.1, np.nan], np.float32))
    [0.1, None]
    """
    array = np.asarray(values)
    if array.dtype == np.float32:
        # the shortest text of a float32 is half the length of that of the same number as float64
        array = array.astype(str).astype(np.float64)
    array = array.astype(np.float64)
    boxed = array.astype(object)
    boxed[~np.isfinite(array)] = None
    listed: list[Any] = boxed.tolist()
    return listed


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not np.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_finite)]
"""A finite number, or None where it is undefined."""
Numbers = list[Number]


class _Record(BaseModel):
    # `extra`: what newer or older tools add is kept, and checked for nothing but being JSON
    model_config = ConfigDict(extra="allow", allow_inf_nan=False)


class Halves(_Record):
    """One list of values over the prompt's tokens and one over the response's."""

    prompt: Numbers = Field(default_factory=list)
    response: Numbers = Field(default_factory=list)


class DimValues(_Record):
    """Activation values of single dimensions, by dimension, over the prompt's and the response's tokens."""

    prompt: dict[int, Numbers] = Field(default_factory=dict)
    response: dict[int, Numbers] = Field(default_factory=dict)


class MassiveDimData(_Record):
    """What it takes to clean the scores of one direction of massive dimensions."""

    dims: list[int]
    top_dims_by_layer: dict[int, list[int]]
    vec_norm: float
    vec_components: dict[int, float]
    activation_values: DimValues


class ProjectionEntry(_Record):
    """The scores of one direction over one rollout."""

    method: str
    layer: int
    selection_source: str | None = None
    baseline: Number = None
    prompt: Numbers = Field(default_factory=list)
    response: Numbers = Field(default_factory=list)
    token_norms: Halves | None = None
    massive_dim_data: MassiveDimData | None = None


class ProjectionMetadata(_Record):
    """What a projection file says of itself."""

    prompt_id: str
    prompt_set: str
    n_prompt_tokens: int = 0
    n_response_tokens: int = 0
    multi_vector: bool = True
    n_vectors: int = 1
    component: str = "residual"
    position: str | None = None
    centered: bool = False
    projection_date: str | None = None
    captured_layers: list[int] | None = None


class Projection(_Record):
    """One rollout's scores for one trait. The form of before there were several vectors is read into the same shape."""

    metadata: ProjectionMetadata
    projections: list[ProjectionEntry]
    activation_norms: Halves | None = None
    massive_dim_data: MassiveDimData | None = None
    logit_lens: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_vector(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("projections"), dict):
            return data
        source = data.get("metadata", {}).get("vector_source", {})
        entry = {"method": "unknown", "layer": -1, **source, **data["projections"]}
        entry["token_norms"] = data.get("token_norms")
        return {**{k: v for k, v in data.items() if k != "token_norms"}, "projections": [entry]}

    @model_validator(mode="after")
    def _lengths(self) -> Self:
        expected = (self.metadata.n_prompt_tokens, self.metadata.n_response_tokens)
        for entry in self.projections:
            found = (len(entry.prompt), len(entry.response))
            if expected != (0, 0) and found != expected:
                raise ValueError(f"has {found} prompt and response scores at layer {entry.layer} for {expected} tokens")
        return self

    def entry(self, layer: int | None = None) -> ProjectionEntry:
        """Return the entry of a layer, or the first one.

        Raises
        ------
        ExperimentError
            If no entry is of that layer.
        """
        for entry in self.projections:
            if layer in (None, entry.layer):
                return entry
        layers = [entry.layer for entry in self.projections]
        raise ExperimentError(
            f"rollout {self.metadata.prompt_id} has no projection on layer {layer}; it has layers {layers}"
        )


class MassiveAggregate(_Record):
    """Statistics over all rollouts of the set; lists without a layer key run over `layers`, in its order."""

    n_prompts: int
    mean_alignment_by_layer: dict[int, Number]
    top_dims_by_layer: dict[int, list[int]]
    dim_magnitude_by_layer: dict[int, Numbers]
    layer_norms: dict[int, Number]
    attn_norms: dict[int, Number] | None = None
    mlp_norms: dict[int, Number] | None = None
    consecutive_cosine: dict[int, Number] | None = None


class MassiveDim(_Record):
    """One of the largest dimensions of one rollout at one layer; `ratio` is null where the median is zero."""

    dim: int
    max_val: Number
    mean_val: Number
    ratio: Number
    is_massive: bool


class AlignmentRange(_Record):
    """Cosine of the tokens with their mean."""

    mean: Number
    min: Number
    max: Number
    std: Number


class MassivePrompt(_Record):
    """Per-token detail of one rollout."""

    massive_dims: dict[int, list[MassiveDim]] = Field(default_factory=dict)
    tracked_dims: list[int] = Field(default_factory=list)
    prompt_mean_alignment: dict[int, AlignmentRange] = Field(default_factory=dict)
    response_mean_alignment: dict[int, AlignmentRange] = Field(default_factory=dict)
    prompt_tokens: list[str] = Field(default_factory=list)
    response_tokens: list[str] = Field(default_factory=list)
    prompt_dim_values: dict[int, dict[int, Numbers]] = Field(default_factory=dict)
    response_dim_values: dict[int, dict[int, Numbers]] = Field(default_factory=dict)


class MassiveActivations(_Record):
    """The massive-activations file of one prompt set; `layers` says which layer each list entry is."""

    experiment: str
    model: str
    model_variant: str
    prompt_set: str
    is_calibration: bool = False
    layers: list[int] | None = None
    aggregate: MassiveAggregate
    per_prompt: dict[str, MassivePrompt] | None = None

    @model_validator(mode="after")
    def _lists_follow_layers(self) -> Self:
        for dim, values in self.aggregate.dim_magnitude_by_layer.items():
            if self.layers is not None and len(values) != len(self.layers):
                raise ValueError(f"has {len(values)} magnitudes of dim {dim} for {len(self.layers)} layers")
        return self


class PerDimStats(_Record):
    """How one dimension behaves at one layer, against the median dimension."""

    ratio: Number
    cv: Number
    p5_ratio: Number
    pct_above_10x: Number


class PerLayerStats(_Record):
    """The `per_layer_stats.json` of a variant."""

    experiment: str
    model_variant: str
    n_tokens: int
    n_layers: int
    layers: list[int] | None = None
    massive_dims: list[int]
    per_layer: dict[int, dict[int, PerDimStats]]


def write_json(path: str | Path, record: BaseModel) -> Path:
    """Write a record whole, by a rename; keys that are None at birth are left out, undefined numbers are null."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.writing")
    staged.write_text(record.model_dump_json(exclude_unset=True), "utf-8")
    os.replace(staged, path)
    return path


def read_projection(path: str | Path) -> Projection:
    """Read a projection file of any era; files of one vector each (`{id}_{method}_L{layer}.json`) are read as one.

    Raises
    ------
    ExperimentError
        If it can't be read or is not a projection.
    """
    path = Path(path)
    apart = [] if path.exists() else sorted(path.parent.glob(f"{escape(path.stem)}_*_L*.json"))
    if not apart:
        return _read(path, Projection)
    read = [_read(part, Projection) for part in apart]
    entries = sorted((entry for one in read for entry in one.projections), key=lambda e: (e.layer, e.method))
    metadata = read[0].metadata.model_copy(update={"multi_vector": True, "n_vectors": len(entries)})
    return read[0].model_copy(update={"projections": entries, "metadata": metadata, "massive_dim_data": None})


def read_massive(path: str | Path) -> MassiveActivations:
    """Read a massive-activations file.

    Raises
    ------
    ExperimentError
        If it can't be read or is none.
    """
    return _read(Path(path), MassiveActivations)


def projection_path(root: str | Path, *, trait: str, prompt_set: str, rollout_id: str) -> Path:
    """Return where below a directory of projections a rollout's file stands."""
    return Path(root, trait, prompt_set, f"{rollout_id}.json")


def massive_paths(experiment: str | Path, *, variant: str, prompt_set: str, calibration: bool) -> tuple[Path, ...]:
    """Return every place where a tool looks for the massive activations of a variant.

    The set's own file stands below the variant; what is to serve as the calibration is looked for both below the
    variant and below the experiment.
    """
    inference = Path(experiment, "inference")
    own = inference / variant / "massive_activations"
    places = (own / f"{prompt_set}.json",)
    if not calibration:
        return places
    return (*places, own / "calibration.json", inference / "massive_activations" / "calibration.json")


def dim_set(rule: str | Iterable[int], top_dims: Mapping[int, Sequence[int]]) -> tuple[int, ...]:
    """Return the massive dimensions that a rule picks, ascending.

    Parameters
    ----------
    rule : str or dims
        `none`; `all` (the union of all layers' top dims); `top5-3layers` (among the first five at three layers or
        more, so nothing where fewer than three layers are known); or the dims themselves, also as `"443,5"`.
    top_dims : mapping of layer to dims
        Largest first.

    Raises
    ------
    ExperimentError
        If the rule is none of these.

    Examples
    --------
    >>> dim_set("top5-3layers", {1: [5, 36], 3: [5, 52], 5: [52, 5]})
    (5,)
    """
    if not isinstance(rule, str):
        return tuple(sorted({int(dim) for dim in rule}))
    if rule == "none":
        return ()
    if rule == "all":
        return tuple(sorted({int(dim) for dims in top_dims.values() for dim in dims}))
    if rule == "top5-3layers":
        counted = [int(dim) for dims in top_dims.values() for dim in set(dims[:5])]
        return tuple(sorted(dim for dim in set(counted) if counted.count(dim) >= 3))
    parts = [part.strip() for part in rule.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ExperimentError(f"{rule!r} names no set of dimensions; use none, all, top5-3layers or a list like 443,5")
    return tuple(sorted({int(part) for part in parts}))


def _read(path: Path, model: type[M]) -> M:
    text = read_text(path)
    try:
        # bare NaN and Infinity, which older tools wrote, are no JSON: they are read as null
        return model.model_validate(json.loads(text, parse_constant=lambda _: None))
    except ValidationError as error:
        raise ExperimentError(f"{path} {sentence(error)}; write it again") from None
    except (ValueError, RecursionError) as error:
        raise ExperimentError(f"{path} is not valid JSON ({error}); it may be cut short, write it again") from None
