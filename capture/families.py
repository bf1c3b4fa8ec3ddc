"""The table of architectures: where each family keeps attention, MLP, keys and values. A new family is one row.

Paths are relative to a decoder block. Facts are those of transformers 5; tests run a tiny random model of every row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Columns `start : start + width` of each of `groups` equal parts of a fused projection's output, side by "
    "side."""

    groups: int
    start: int
    width: int

    def __post_init__(self) -> None:
        if self.groups < 1 or self.width < 1 or self.start < 0:
            raise ValueError(f"columns {self.start} + {self.width} of {self.groups} groups select nothing")


FusedColumns = Callable[[Any], tuple[Columns, Columns]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One architecture.

    Attributes
    ----------
    name : str
    model_types : tuple of str
        `config.model_type` of the models whose live forwards were checked against this row.
    attention, mlp : str
        Child modules of a block; their (first) output is `attn_out`, `mlp_out`.
    added : tuple of str
        Modules whose output is what attention and MLP add to the residual stream, where it is not their own output.
    fused : tuple of (str, function), optional
        The projection inside the attention that makes queries, keys and values at once, and a function from the
        (text) config to the columns that are keys and values.
    """

    name: str
    model_types: tuple[str, ...]
    attention: str = "self_attn"
    mlp: str = "mlp"
    added: tuple[str, str] = ("", "")
    fused: tuple[str, FusedColumns] | None = None

    @property
    def paths(self) -> dict[str, str]:
        """Path in the block of each component that is a module's whole output."""
        return {
            "attn_out": self.attention,
            "mlp_out": self.mlp,
            "attn_contribution": self.added[0] or self.attention,
            "mlp_contribution": self.added[1] or self.mlp,
        }


def _head(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _thirds(config: Any) -> tuple[Columns, Columns]:
    width = config.hidden_size
    return Columns(groups=1, start=width, width=width), Columns(groups=1, start=2 * width, width=width)


def _per_head(config: Any) -> tuple[Columns, Columns]:
    heads, head = config.num_attention_heads, _head(config)
    return Columns(groups=heads, start=head, width=head), Columns(groups=heads, start=2 * head, width=head)


def _queries_first(config: Any) -> tuple[Columns, Columns]:
    queries, keys = config.num_attention_heads * _head(config), config.num_key_value_heads * _head(config)
    return Columns(groups=1, start=queries, width=keys), Columns(groups=1, start=queries + keys, width=keys)


def _falcon(config: Any) -> tuple[Columns, Columns]:
    if not config.new_decoder_architecture and not config.multi_query:
        return _per_head(config)
    head = _head(config)
    groups = config.num_kv_heads if config.new_decoder_architecture else 1
    queries = config.num_attention_heads // groups * head
    return Columns(groups=groups, start=queries, width=head), Columns(groups=groups, start=queries + head, width=head)


_NORMED = ("post_attention_layernorm", "post_feedforward_layernorm")

FAMILIES: tuple[Family, ...] = (
    Family(name="llama", model_types=("llama",)),
    Family(name="mistral", model_types=("mistral",)),
    Family(name="qwen2", model_types=("qwen2",)),
    Family(name="qwen3", model_types=("qwen3",)),
    Family(name="qwen3_moe", model_types=("qwen3_moe",)),
    Family(name="mixtral", model_types=("mixtral",)),
    Family(name="gpt_oss", model_types=("gpt_oss",)),
    Family(name="deepseek", model_types=("deepseek_v2", "deepseek_v3")),
    Family(name="cohere", model_types=("cohere", "cohere2")),
    Family(name="gemma", model_types=("gemma",)),
    Family(name="gemma2", model_types=("gemma2",), added=_NORMED),
    Family(name="gemma3", model_types=("gemma3", "gemma3_text"), added=_NORMED),
    Family(name="olmo2", model_types=("olmo2", "olmo3"), added=_NORMED),
    Family(name="phi3", model_types=("phi3",), fused=("qkv_proj", _queries_first)),
    Family(name="gpt2", model_types=("gpt2",), attention="attn", fused=("c_attn", _thirds)),
    Family(name="gpt_neox", model_types=("gpt_neox",), attention="attention", fused=("query_key_value", _per_head)),
    Family(name="falcon", model_types=("falcon",), attention="self_attention", fused=("query_key_value", _falcon)),
)

ATTENTION_NAMES = tuple(dict.fromkeys(family.attention for family in FAMILIES))
MLP_NAMES = (*dict.fromkeys(family.mlp for family in FAMILIES), "feed_forward", "block_sparse_moe", "ffn")


def family_of(model_type: str) -> Family | None:
    """The row whose `model_types` hold this model type, or None."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)
