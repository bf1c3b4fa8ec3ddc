"""What the query API answers, as types: the source of its documentation."""

from pydantic import Field, JsonValue

from experiments.projections import Number
from view.formats import Answer, Values

__all__ = [
    "AnnotationInfo",
    "CalibratedLayer",
    "CalibrationInfo",
    "CaptureInfo",
    "ComparedGroup",
    "Comparison",
    "ComponentInfo",
    "DirectionInfo",
    "Families",
    "FamilyInfo",
    "Norms",
    "Problem",
    "RolloutDetail",
    "RolloutInfo",
    "RolloutScores",
    "Rollouts",
    "Scores",
    "Slice",
    "SpanInfo",
    "Spans",
    "StoreInfo",
    "Stores",
    "TokenInfo",
    "Tokens",
]


class Problem(Answer):
    """Why a request was refused."""

    detail: str = Field(description="One sentence: what is wrong, what is there, how to mend it.")


# -- stores ------------------------------------------------------------------------------------------------------------


class ComponentInfo(Answer):
    """A component that is captured for any rollout."""

    name: str
    width: int
    dtype: str
    layers: list[int]
    captured: float = Field(description="Share of the rollouts x layers that are captured, 1 where nothing is absent.")


class CaptureInfo(Answer):
    """One capture; `zarr` is the path below /zarr of a dataset complete in itself."""

    number: int
    created: str
    model: str
    n_rollouts: int
    n_tokens: int
    layers: list[int]
    components: list[str]
    stored_bytes: int
    zarr: str


class DirectionInfo(Answer):
    """A direction that has scores; `direction` is the label to ask with."""

    direction: str
    trait: str
    layer: int
    component: str
    method: str
    position: str
    source: str
    baseline: Number
    sha256: str


class StoreInfo(Answer):
    """A store as it is now."""

    name: str
    n_rollouts: int
    n_tokens: int
    layers: list[int]
    components: list[ComponentInfo]
    captures: list[CaptureInfo]
    labels: list[str] = Field(description="Columns of the rollout table that `where` and `label` can ask for.")
    prompt_sets: list[str]
    directions: list[DirectionInfo]
    calibrations: list[int] = Field(description="Their numbers, ascending.")


class Stores(Answer):
    """The stores that are served."""

    stores: list[StoreInfo]


# -- rollouts ----------------------------------------------------------------------------------------------------------


class RolloutInfo(Answer):
    """One row of the rollout table."""

    rollout_id: str
    n_tokens: int
    prompt_end: int
    prompt_set: str
    tags: list[str]
    token_sha256: str
    labels: dict[str, JsonValue]


class Rollouts(Answer):
    """One page of the rollouts that satisfy the request."""

    store: str
    total: int = Field(description="How many satisfy it, on all pages.")
    offset: int
    rollouts: list[RolloutInfo]


class AnnotationInfo(Answer):
    """A labelled token span, half-open."""

    token_start: int
    token_end: int
    label: str


class RolloutDetail(RolloutInfo):
    """One rollout with its annotations and what is captured of it."""

    annotations: list[AnnotationInfo]
    captured: dict[str, list[int]] = Field(description="Layers by component.")


class TokenInfo(Answer):
    """One token; `text` is null where the capture was not given the token's bytes."""

    position: int
    token_id: int
    text: str | None
    segment: str
    role: str
    turn: int
    thinking: bool


class Tokens(Answer):
    """Tokens of one rollout; the texts end to end are its text."""

    store: str
    rollout_id: str
    n_tokens: int
    tokens: list[TokenInfo]


# -- numbers -----------------------------------------------------------------------------------------------------------


class Slice(Answer):
    """Activations of one rollout."""

    store: str
    component: str
    rollout_id: str
    start: int = Field(description="Position of the first token.")
    stop: int
    layers: list[int]
    dims: list[int]
    values: Values.Three = Field(description="By token, layer, dim: float32, null where not finite.")


class Norms(Answer):
    """Norms of one rollout's tokens as they were kept at capture."""

    store: str
    component: str
    rollout_id: str
    start: int
    stop: int
    layers: list[int]
    values: Values.Two = Field(description="By token, layer.")


class RolloutScores(Answer):
    """Scores of one rollout."""

    rollout_id: str
    start: int = Field(description="Position of the first token.")
    stop: int
    values: Values.Two = Field(description="By direction, token; null where there is no score.")


class Scores(Answer):
    """Scores along directions, in the order of `directions`."""

    store: str
    less: str | None = Field(description="The store whose scores are subtracted.")
    mode: str
    clean: str
    directions: list[DirectionInfo]
    rollouts: list[RolloutScores]


# -- what follows from them --------------------------------------------------------------------------------------------


class CalibratedLayer(Answer):
    """What a layer is like."""

    layer: int
    norm: Number
    mean_alignment: Number
    consecutive_cosine: Number
    top_dims: list[int]
    massive: dict[int, Number] = Field(description="Peak over the median dimension's peak, by massive dimension.")
    massive_sun: list[int] | None


class CalibrationInfo(Answer):
    """A calibration of a component, by layer."""

    store: str
    component: str
    layers: list[int]
    rollouts: int
    tokens: int
    of: str
    by_layer: list[CalibratedLayer]
    recommended_dims: list[int]
    nonfinite_tokens: list[int]
    sources: dict[str, list[str]]


class SpanInfo(Answer):
    """A run of tokens, half-open, and its mean score."""

    rollout_id: str
    start: int
    stop: int
    mean: Number
    text: str


class Spans(Answer):
    """Where a direction is strongest, the strongest first."""

    store: str
    direction: str
    spans: list[SpanInfo]


class ComparedGroup(Answer):
    """One direction in one group of rollouts, against all other groups; low and high are 95 % over rollouts."""

    direction: str
    part: JsonValue = Field(description="The turn, role or annotation label; null for whole rollouts.")
    group: str
    n_rollouts: int
    n_tokens: int
    mean: Number
    low: Number
    high: Number
    effect_size: Number
    auroc: Number
    auroc_low: Number
    auroc_high: Number


class Comparison(Answer):
    """Groups of rollouts by a label."""

    store: str
    label: str
    per: str
    groups: list[ComparedGroup]


class FamilyInfo(Answer):
    """Rollouts that begin with the same tokens; `fork` is the first position at which they differ."""

    rollouts: list[str]
    fork: int


class Families(Answer):
    """Families, the longest shared prefix first."""

    store: str
    families: list[FamilyInfo]
