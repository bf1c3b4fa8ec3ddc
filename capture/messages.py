"""What client and server say to each other: the fields of requests and answers. Imports neither torch nor FastAPI."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

__all__ = [
    "ENDED",
    "MAX_IDS",
    "CaptureOrder",
    "GenerateOrder",
    "Generated",
    "Health",
    "ModelAnswer",
    "Problem",
    "Progress",
    "SaveAnswer",
    "Started",
    "State",
    "TaskList",
    "TaskStatus",
]

MAX_IDS = 5_000
"""Rollout ids of one request."""

State = Literal["starting", "running", "completed", "failed", "cancelled", "interrupted"]
"""`starting`: waits for the model or for captures before it; `interrupted`: the server ended before the capture did."""

ENDED: frozenset[State] = frozenset({"completed", "failed", "cancelled", "interrupted"})

# A JSON string may hold a NUL, which no file name does.
Name = Annotated[str, Field(min_length=1, max_length=255, pattern=r"^[^\x00-\x1f]+$")]


def _whole(value: Any) -> Any:
    """JSON's 5.0 is the integer 5."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]


def _not_too_many(ids: Any) -> Any:
    if isinstance(ids, list) and len(ids) > MAX_IDS:
        raise PydanticCustomError(
            "too_many_ids",
            "{given} ids are more than the {most} that one request takes; leave prompt_ids out to take all rollouts of "
            "the prompt set, or send several requests",
            {"given": f"{len(ids):,}", "most": f"{MAX_IDS:,}"},
        )
    return ids


class _Asked(BaseModel):
    """A request: what is not a field is a slip, and is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class CaptureOrder(_Asked):
    """A capture from an experiment tree.

    Attributes
    ----------
    experiment, prompt_set : str
        The tree below the server's root, and which responses of it.
    model_variant : str, optional
        Default the config's for application; its model must be the one that is loaded.
    layers : str, optional
        A layer spec; all layers where not given.
    components : str
        Names joined by commas.
    response_only : bool
        Store the response's rows only.
    responses_from : str, optional
        Another variant, over whose responses the model is run.
    skip_existing : bool, optional
        What the store has is left out unless this is false: then it is captured again, and the new capture counts.
    output_suffix : str, optional
        The store is `{prompt_set}_{suffix}.zarr`.
    prompt_ids : list of str or int, optional
        Rollout ids; all where not given.
    limit : int, optional
        At most the first so many.
    store : str, optional
        Path of the store below the server's store root; default `inference/{variant}/{prompt_set}.zarr` of the tree.
    """

    experiment: Name
    prompt_set: Name
    model_variant: Name | None = None
    components: Name = "residual"
    layers: Name | None = None
    response_only: bool = False
    responses_from: Name | None = None
    skip_existing: bool | None = None
    output_suffix: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,100}$")] | None = None
    prompt_ids: (
        Annotated[list[Name | Whole], Field(min_length=1, max_length=MAX_IDS), BeforeValidator(_not_too_many)] | None
    ) = None
    limit: Annotated[int, Field(ge=1, le=2**53), BeforeValidator(_whole)] | None = None
    store: Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^\x00-\x1f]+$")] | None = None

    @property
    def ids(self) -> tuple[str, ...] | None:
        """The rollout ids asked for, each once; None for all."""
        return None if self.prompt_ids is None else tuple(dict.fromkeys(map(str, self.prompt_ids)))


class GenerateOrder(_Asked):
    """Plain sampling: each prompt is continued as it stands, no chat template; a temperature below 0.01 is greedy."""

    prompts: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=400_000)]], Field(min_length=1, max_length=64)
    ]
    max_new_tokens: Annotated[int, Field(ge=1, le=8192), BeforeValidator(_whole)] = 256
    temperature: Annotated[float, Field(ge=0.0, le=5.0)] = 0.0


class Problem(BaseModel):
    """Every answer that is no success: one sentence, and the task that stands in the way where there is one."""

    detail: str
    task_id: str | None = None


class Health(BaseModel):
    """Whether the server answers and its model is loaded; `active_evals` counts captures that wait or run."""

    status: Literal["ok"] = "ok"
    model: str | None
    loaded: bool
    active_evals: int


class Started(BaseModel):
    """A capture that was accepted."""

    task_id: str
    status: State
    prompt_set: str
    layers: str | None
    n_prompt_ids: int | Literal["all"]
    store: str
    ahead: int


class Progress(BaseModel):
    """How far a capture is, what earlier runs of it finished included; zeros until it is planned.

    Attributes
    ----------
    rollouts, of : int
        Whole rollouts captured, of those that the store did not have.
    tokens, tokens_total : int
    raw_bytes, raw_bytes_total, stored_bytes : int
        Written, before and after compression.
    eta_seconds : float or None
        At the mean speed of this run.
    """

    rollouts: int = 0
    of: int = 0
    tokens: int = 0
    tokens_total: int = 0
    raw_bytes: int = 0
    raw_bytes_total: int = 0
    stored_bytes: int = 0
    eta_seconds: float | None = None


class TaskStatus(BaseModel):
    """A capture's state.

    Attributes
    ----------
    elapsed : float
        Seconds since it was accepted; stops when it ends.
    duration : float or None
        Seconds from its start to its end, once it has ended.
    ahead : int
        Captures before it in the queue.
    skipped : int
        Rollouts that the store had already.
    captures : list of int
        Numbers committed to the store.
    notes : list of str
        What a reader of the data should know, such as batches that had to be halved.
    error : str or None
        One sentence.
    resumes : str or None
        The task of the same store that was interrupted or cancelled before.
    traits : None
        Always null; steering evaluations had it.
    """

    task_id: str
    status: State
    traits: None = None
    experiment: str
    prompt_set: str
    model_variant: str
    layers: str | None
    components: str
    store: str
    created: str
    elapsed: float
    duration: float | None = None
    ahead: int = 0
    progress: Progress
    skipped: int = 0
    captures: list[int] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)
    error: str | None = None
    resumes: str | None = None


class TaskList(BaseModel):
    """Tasks, newest first."""

    tasks: list[TaskStatus]


class ModelAnswer(BaseModel):
    """What became of a request to load a model."""

    status: Literal["loaded", "already_loaded", "loading"]
    model: str


class SaveAnswer(BaseModel):
    """Where the fast-load cache lies."""

    status: Literal["saved", "already_saved"]
    cache_dir: str


class Generated(BaseModel):
    """Continuations, in the order of the prompts."""

    responses: list[str]
