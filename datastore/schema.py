"""What is written: rollouts, components, codecs and plans as validated records without behaviour.

Everything here is data that survives the process. Derived values (hashes, chunk sizes, the layout) are computed, never
passed in, and an invalid instance can't be held.
"""

import hashlib
import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from datastore.errors import PlanError
from datastore.layout import Ragged, names_a_label

__all__ = [
    "CODECS",
    "COMPONENTS",
    "DTYPES",
    "FORMAT",
    "FORMAT_VERSION",
    "ROLES",
    "SEGMENTS",
    "STATISTICS",
    "Annotation",
    "Batch",
    "Codec",
    "ComponentSpec",
    "LabelValue",
    "Plan",
    "Rollout",
    "digest",
]

FORMAT = "activation-datastore"
FORMAT_VERSION = 1
ROLES = ("none", "system", "user", "assistant", "tool")
SEGMENTS = ("prompt", "response")
COMPONENTS = (
    "residual",
    "resid_pre",
    "attn_out",
    "mlp_out",
    "attn_contribution",
    "mlp_contribution",
    "k_proj",
    "v_proj",
)
DTYPES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
STATISTICS = ("count", "sum", "sum_squares", "sum_abs", "max_abs", "sum_unit", "nonfinite")
CODECS = ("zstd", "lz4", "none")
RESERVED = (
    *("layer", "token_id", "position", "segment", "role", "turn", "thinking", "rollout"),
    *("rollouts", "annotations", "vocab", "stats", "prefix"),
    *("token", "hidden", "row", "segment_code"),
)
"""Names of a capture's other arrays, groups and axes."""
STATS_SHARE = 0.03
"""Statistics are kept per rollout where they cost at most this share of the raw data."""

LabelValue = str | int | float | bool


def digest(value: Any) -> str:
    """Return the sha256 of `value` as canonical JSON (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _whole(value: object, what: str) -> int:
    """Return a plain int, NumPy's among them: only that is written as JSON."""
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError as error:
        raise PlanError(f"{what} is {value!r}, which is no whole number; tokens are counted from 0") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotation:
    """A labelled token span of a rollout, half-open, counted from the rollout's first token."""

    token_start: int
    token_end: int
    label: str

    def __post_init__(self) -> None:
        for name in ("token_start", "token_end"):
            object.__setattr__(self, name, _whole(getattr(self, name), f"annotation {self.label!r}: {name}"))
        if not 0 <= self.token_start <= self.token_end:
            raise PlanError(
                f"annotation {self.label!r} spans tokens [{self.token_start}, {self.token_end}), which is no range; "
                "give 0 <= token_start <= token_end"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Rollout:
    """One token sequence and what is known of it before the model runs.

    Parameters
    ----------
    rollout_id : str
        Its name, unique in a store.
    token_ids : int32 array, shape (T,)
        The truth about its text; T >= 1.
    prompt_end : int
        Position of the first response token; T when all of it is prompt. Default T.
    role : int8 array (T,), optional
        Codes into `ROLES`; default all "none".
    turn : int32 array (T,), optional
        Turn number from 0, -1 outside any turn; default all -1.
    thinking : bool array (T,), optional
        Inside a reasoning range; default all False.
    labels : mapping
        Named properties of the rollout: str, int, float or bool.
    annotations : tuple of Annotation
    tags : tuple of str
    prompt_set : str
    prefix : int32 array, shape (P,), optional
        Token ids before the first of `token_ids`: the model computes them, and no row of them is stored. All positions
        and ranges count from the first stored token.
    """

    rollout_id: str
    token_ids: NDArray[np.int32]
    prompt_end: int = -1
    role: NDArray[np.int8] | None = None
    turn: NDArray[np.int32] | None = None
    thinking: NDArray[np.bool_] | None = None
    labels: Mapping[str, LabelValue] = field(default_factory=dict)
    annotations: tuple[Annotation, ...] = ()
    tags: tuple[str, ...] = ()
    prompt_set: str = ""
    prefix: NDArray[np.int32] | None = None

    def __post_init__(self) -> None:
        ids = np.asarray(self.token_ids)
        if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
            raise PlanError(
                f"rollout {self.rollout_id!r}: token ids must be one row of integers, got {ids.dtype} {ids.shape}"
            )
        if ids.size == 0:
            raise PlanError(f"rollout {self.rollout_id!r} has 0 tokens; there is nothing to capture, leave it out")
        name: object = self.rollout_id
        if not isinstance(name, str) or not name:
            raise PlanError(f"a rollout is named {name!r}; rollout ids are text that is not empty, name every rollout")
        if ids.min() < 0 or ids.max() > np.iinfo(np.int32).max:
            raise PlanError(f"rollout {self.rollout_id!r} has token id {ids.min()}..{ids.max()}, outside int32")
        self._set("token_ids", np.ascontiguousarray(ids, dtype=np.int32))
        self._set("prefix", np.asarray([] if self.prefix is None else self.prefix, dtype=np.int32).reshape(-1))
        end = _whole(self.prompt_end, f"rollout {self.rollout_id!r}: prompt_end")
        self._set("prompt_end", ids.size if end == -1 else end)
        self._set("role", self._per_token("role", 0, np.int8))
        self._set("turn", self._per_token("turn", -1, np.int32))
        self._set("thinking", self._per_token("thinking", False, np.bool_))
        self._set("labels", {name: self._label(name, value) for name, value in self.labels.items()})
        self._check_ranges()
        self._check_text()

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _per_token(self, name: str, default: int, dtype: type[np.generic]) -> NDArray[Any]:
        value = getattr(self, name)
        array = np.full(self.n_tokens, default, dtype) if value is None else np.ascontiguousarray(value, dtype=dtype)
        if array.shape != (self.n_tokens,):
            raise PlanError(
                f"rollout {self.rollout_id!r}: {name} has shape {array.shape} for {self.n_tokens} tokens; "
                "give one value per token"
            )
        return array

    def _label(self, name: object, value: object) -> LabelValue:
        plain = value.item() if isinstance(value, np.generic) else value
        if not isinstance(name, str) or not name or not isinstance(plain, (str, int, float, bool)):
            raise PlanError(
                f"rollout {self.rollout_id!r}: label {name!r} is {value!r}; a label has a name and is text, a number "
                "or a truth value, leave it out where it is not known"
            )
        return plain

    def _check_text(self) -> None:
        spans = [one.label for one in self.annotations]
        labels = [*self.labels, *(v for v in self.labels.values() if isinstance(v, str))]
        for text in (self.rollout_id, self.prompt_set, *self.tags, *spans, *labels):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise PlanError(
                    f"rollout {self.rollout_id!r} has the text {text!r}, which holds half of a surrogate pair and "
                    "can't be stored as Unicode; replace that character"
                ) from error
        for name in self.labels:
            if not names_a_label(name):
                raise PlanError(f"rollout {self.rollout_id!r}: {name!r:.80} can't name a label; give it a shorter one")

    def _check_ranges(self) -> None:
        codes = np.asarray(self.role)
        if not 0 <= codes.min() <= codes.max() < len(ROLES):
            raise PlanError(
                f"rollout {self.rollout_id!r} has role codes {codes.min()}..{codes.max()}, and there are only 0 to "
                f"{len(ROLES) - 1} ({', '.join(ROLES)})"
            )
        if not 0 <= self.prompt_end <= self.n_tokens:
            raise PlanError(
                f"rollout {self.rollout_id!r}: prompt_end {self.prompt_end} is outside 0..{self.n_tokens} tokens"
            )
        for one in self.annotations:
            if one.token_end > self.n_tokens:
                raise PlanError(
                    f"rollout {self.rollout_id!r}: annotation {one.label!r} ends at token {one.token_end}, "
                    f"beyond its {self.n_tokens} tokens"
                )

    @property
    def n_tokens(self) -> int:
        """Number of tokens."""
        return int(self.token_ids.shape[0])

    @cached_property
    def segment(self) -> NDArray[np.int8]:
        """Codes into `SEGMENTS`, one per token."""
        return (np.arange(self.n_tokens) >= self.prompt_end).astype(np.int8)

    @cached_property
    def computed_ids(self) -> NDArray[np.int32]:
        """Token ids that the model is given: the prefix and the stored ones."""
        return np.concatenate([np.asarray(self.prefix, dtype=np.int32), self.token_ids])

    @property
    def n_prefix(self) -> int:
        """Number of tokens that are computed before the first stored one."""
        return len(self.computed_ids) - self.n_tokens

    @cached_property
    def token_sha256(self) -> str:
        """Hash of the token ids as little-endian int32; `+P` behind it where the first P of them are a prefix."""
        computed = hashlib.sha256(self.computed_ids.astype("<i4").tobytes()).hexdigest()
        return f"{computed}+{self.n_prefix}" if self.n_prefix else computed

    @cached_property
    def sha256(self) -> str:
        """Hash of the token ids and of everything that is known of them."""
        per_token = [np.asarray(a).tobytes() for a in (self.role, self.turn, self.thinking)]
        spans = [[one.token_start, one.token_end, one.label] for one in self.annotations]
        known = [self.rollout_id, self.token_sha256, self.prompt_end, self.labels, spans, self.tags, self.prompt_set]
        return digest([known, hashlib.sha256(b"".join(per_token)).hexdigest()])


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentSpec:
    """A component as stored: its name, width, dtype, and the module path it is read from."""

    name: str
    width: int
    dtype: str
    hook: str = ""

    def __post_init__(self) -> None:
        if not self.name.isidentifier() or not self.name.isascii():
            raise PlanError(f"component {self.name!r} is not a name; use letters, digits and underscores")
        if self.name in RESERVED:
            raise PlanError(f"component {self.name!r} has the name of something else in a capture; give it another")
        if self.width < 1:
            raise PlanError(f"component {self.name} has width {self.width}; it must be at least 1")
        if self.dtype not in DTYPES:
            raise PlanError(f"component {self.name} has dtype {self.dtype!r}; a store holds {', '.join(DTYPES)}")

    @property
    def itemsize(self) -> int:
        """Bytes per value."""
        return DTYPES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class Codec:
    """How a chunk is compressed; crc32c always follows.

    Blosc with byte shuffle and blocks of 512 KiB was measured best for bfloat16 (docs/design/0001-store.md).
    """

    name: Literal["zstd", "lz4", "none"] = "zstd"
    level: int = 1
    blocksize: int = 512 * 1024

    def __post_init__(self) -> None:
        if self.name not in CODECS:
            raise PlanError(f"codec {self.name!r} is not known; choose one of {', '.join(CODECS)}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Rollouts that are computed together.

    Parameters
    ----------
    members : tuple of str
        Rollout ids, in the order of the batch's rows.
    company : mapping of rollout id to token ids
        Members that are computed and not stored, because they were in the batch when its other layers were captured: a
        rollout's bits may depend on the rollouts beside it.
    """

    members: tuple[str, ...]
    company: Mapping[str, NDArray[np.int32]] = field(default_factory=dict)

    @property
    def stored(self) -> tuple[str, ...]:
        """Members whose rows are stored."""
        return tuple(name for name in self.members if name not in self.company)

    def of(self, members: Sequence[str]) -> "Batch":
        """Return the batch of some of the members, in the order given."""
        company = {name: ids for name, ids in self.company.items() if name in members}
        return Batch(members=tuple(members), company=company)


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """One capture before it is carried out: which rows, in which batches, on which layout.

    Parameters
    ----------
    rollouts : tuple of Rollout
        In the order of the token axis, which is batch order.
    batches : tuple of Batch
    layers : tuple of int
        Real layer numbers, ascending.
    components : tuple of ComponentSpec
    codec : Codec
    chunk_tokens : mapping of component name to tokens per chunk
    batch_tokens : int
        The padded token budget the batches were formed with.
    vocab : mapping of token id to its bytes
    provenance : mapping
        JSON: `model`, `tokenizer`, `settings`, `environment`.
    request : str
        Hash of what was asked, before what the store had was left out.
    statistics : bool
        Keep statistics and token norms.
    replace : bool
        Captured again on purpose: the capture may hold other tokens or another model than the store.
    after : tuple of int
        Captures that held some of these cells when the plan was made, dropped or not: doing the same once more after
        them is another plan.
    """

    rollouts: tuple[Rollout, ...]
    batches: tuple[Batch, ...]
    layers: tuple[int, ...]
    components: tuple[ComponentSpec, ...]
    chunk_tokens: Mapping[str, int]
    batch_tokens: int
    codec: Codec = field(default_factory=Codec)
    vocab: Mapping[int, bytes] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    request: str = ""
    statistics: bool = True
    replace: bool = False
    after: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        ids = [r.rollout_id for r in self.rollouts]
        if not ids:
            raise PlanError("the plan has no rollouts; give at least one")
        twice = sorted({i for i in ids if ids.count(i) > 1}) if len(set(ids)) < len(ids) else []
        if twice:
            raise PlanError(f"rollout id {twice[0]!r} is there more than once; rollout ids must be unique")
        if not self.layers or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0:
            raise PlanError(f"layers {list(self.layers)} must be at least one, ascending, without repeats, from 0")
        names = [c.name for c in self.components]
        if not names or len(set(names)) < len(names):
            raise PlanError(f"components {names} must be at least one, each once")
        sizes = {name: self.chunk_tokens.get(name, 0) for name in names}
        if any(n < 1 or n & (n - 1) for n in sizes.values()):
            raise PlanError(f"chunks of {sizes} tokens do not tile the token axis; give each component a power of two")
        self._check_batches(ids)

    def _check_batches(self, ids: list[str]) -> None:
        members = [name for batch in self.batches for name in batch.stored]
        if members != ids:
            raise PlanError(
                f"the plan's batches hold {len(members)} stored rollouts in an order that differs from its table of "
                f"{len(ids)}; rollouts must lie in batch order, each once"
            )

    @cached_property
    def ragged(self) -> Ragged:
        """Rollout <-> token range on the token axis."""
        return Ragged([r.n_tokens for r in self.rollouts])

    @property
    def n_tokens(self) -> int:
        """Length of the token axis."""
        return self.ragged.n_tokens

    @property
    def stride(self) -> int:
        """Tokens of the largest chunk: parts are cut at multiples of it."""
        return max(self.chunk_tokens[c.name] for c in self.components)

    @cached_property
    def rows(self) -> dict[str, int]:
        """Row of each stored rollout id."""
        return {r.rollout_id: row for row, r in enumerate(self.rollouts)}

    def component(self, name: str) -> ComponentSpec:
        """Return the component called `name`."""
        for one in self.components:
            if one.name == name:
                return one
        raise PlanError(
            f"component {name!r} is not in this plan, which has {', '.join(c.name for c in self.components)}"
        )

    def tokens(self, batch: Batch, rollout_id: str) -> NDArray[np.int32]:
        """Return the token ids with which a member of a batch is computed, stored or company."""
        if rollout_id in batch.company:
            return batch.company[rollout_id]
        return self.rollouts[self.rows[rollout_id]].computed_ids

    @property
    def raw_bytes(self) -> int:
        """Bytes of all components before compression."""
        return sum(self.n_tokens * len(self.layers) * c.width * c.itemsize for c in self.components)

    @property
    def table_bytes(self) -> int:
        """Bytes of coordinates, table and statistics before compression, about: what a commit still writes."""
        rows = len(self.rollouts) if self.stats_level == "rollout" else 1
        sums = rows * len(SEGMENTS) * len(STATISTICS) * 8 * sum(c.width for c in self.components)
        norms = 4 * self.n_tokens * len(self.components)
        kept = (sums + norms) * len(self.layers) if self.statistics else 0
        return kept + 32 * self.n_tokens + 1024 * len(self.rollouts) + (1 << 16)

    @property
    def stats_level(self) -> Literal["rollout", "capture"]:
        """Keep statistics per rollout where that costs at most `STATS_SHARE` of the raw data, else per capture."""
        segments = sum(1 + (0 < r.prompt_end < r.n_tokens) for r in self.rollouts)
        cost = segments * 5 * 8 * sum(c.width for c in self.components)
        raw = self.n_tokens * sum(c.width * c.itemsize for c in self.components)
        return "rollout" if cost <= STATS_SHARE * raw else "capture"

    @cached_property
    def key(self) -> str:
        """Name of the plan's directory: a hash of all that decides the bits, so the same command finds it again."""
        return digest(
            {
                "request": self.request,
                "rollouts": [r.sha256 for r in self.rollouts],
                "batches": [[b.members, {n: i.tolist() for n, i in b.company.items()}] for b in self.batches],
                "batch_tokens": self.batch_tokens,
                "after": self.after,
                "replace": self.replace,
                "layers": self.layers,
                "components": [[c.name, c.width, c.dtype, c.hook] for c in self.components],
                "codec": [self.codec.name, self.codec.level, self.codec.blocksize],
                "chunk_tokens": dict(self.chunk_tokens),
                "statistics": self.statistics,
                "model": self.provenance.get("model"),
            }
        )[:16]
