"""Sizes of the GPU benchmark: the true shapes, and small ones that run anywhere."""

from dataclasses import dataclass, field
from typing import Any

__all__ = ["FULL", "TINY", "Sizes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What is measured.

    Attributes
    ----------
    experts, hidden, inner, active : int
        Of one mixture-of-experts layer.
    expert_tokens : tuple of int
    llama : dict
        Config of the model that rows are captured of.
    batch_tokens, rollout_tokens : int
    batches : dict of int to int
        For a number of layers (0 is all), how many batches are captured.
    copy_layers : int
        Layers of one batch in the measurement of copies.
    kimi : dict
        Config of the model with INT4 experts that is loaded.
    llama_layers : int
        Layers of the Llama that is loaded.
    rounds : int
    """

    experts: int
    hidden: int
    inner: int
    active: int
    expert_tokens: tuple[int, ...]
    llama: dict[str, Any]
    batch_tokens: int
    rollout_tokens: int
    batches: dict[int, int]
    copy_layers: int
    kimi: dict[str, Any]
    llama_layers: int
    rounds: int = 5
    seed: int = field(default=0)


_LATENT = {"first_k_dense_replace": 1, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}

FULL = Sizes(
    experts=384,
    hidden=7168,
    inner=2048,
    active=8,
    expert_tokens=(256, 2048, 16_384),
    llama={
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
        "max_position_embeddings": 8192,
    },
    batch_tokens=16_384,
    rollout_tokens=2048,
    batches={1: 12, 9: 48, 0: 6},
    copy_layers=32,
    kimi={
        **_LATENT,
        "hidden_size": 7168,
        "intermediate_size": 18_432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 2,
        "n_routed_experts": 192,
        "num_experts_per_tok": 8,
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "vocab_size": 32_768,
    },
    llama_layers=12,
)

TINY = Sizes(
    experts=8,
    hidden=256,
    inner=256,
    active=2,
    expert_tokens=(16, 64),
    llama={
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 512,
        "max_position_embeddings": 512,
    },
    batch_tokens=512,
    rollout_tokens=64,
    batches={1: 2, 0: 2},
    copy_layers=2,
    kimi={
        **_LATENT,
        "hidden_size": 128,
        "intermediate_size": 128,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "vocab_size": 512,
    },
    llama_layers=2,
    rounds=1,
)
