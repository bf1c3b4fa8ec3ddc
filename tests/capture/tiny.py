"""Tiny random models of every family: real classes of transformers with small configs."""

import warnings
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

VOCAB = 97
BASE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
WINDOW = {"head_dim": 8, "sliding_window": 4}
FALCON = {"num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": 4}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "num_experts": 4, "head_dim": 8}),
    "mixtral": ("mixtral", {**EXPERTS, "num_local_experts": 4}),
    "gpt_oss": ("gpt_oss", {**EXPERTS, **WINDOW, "num_local_experts": 4}),
    "deepseek_v2": ("deepseek_v2", {**LATENT, "topk_method": "greedy"}),
    "deepseek_v3": ("deepseek_v3", LATENT),
    "cohere": ("cohere", {}),
    "cohere2": ("cohere2", {"sliding_window": 4}),
    "gemma": ("gemma", {"head_dim": 8}),
    "gemma2": ("gemma2", WINDOW),
    "gemma3_text": ("gemma3_text", WINDOW),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"sliding_window": 4}),
    "phi3": ("phi3", {}),
    "gpt2": ("gpt2", {"n_inner": 48}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox_serial": ("gpt_neox", {"use_parallel_residual": False}),
    "falcon_7b": ("falcon", {**FALCON, "multi_query": True, "parallel_attn": True}),
    "falcon_40b": ("falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_alibi": ("falcon", {**FALCON, "multi_query": False, "parallel_attn": False, "alibi": True}),
}
PARALLEL_BRANCHES_FIRST = ("gpt_neox", "falcon_7b", "falcon_40b")
"""out = (mlp + attn) + in; in the others out = (in + attn) + mlp."""


def tiny_config(name: str, **changes: Any) -> Any:
    model_type, extra = CONFIGS[name]
    return AutoConfig.for_model(model_type, **{**BASE, **extra, **changes})


def tiny_model(name: str, *, dtype: torch.dtype = torch.float32, head: bool = False, **changes: Any) -> Any:
    """A random model, the same at every call, whose norms and biases are random too, so that no branch is zero."""
    torch.manual_seed(3)
    kind: Any = AutoModelForCausalLM if head else AutoModel
    return shaken(kind.from_config(tiny_config(name, **changes), dtype=dtype))


def shaken(model: Any) -> Any:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.add_(noise.to(parameter.dtype))
    return model.eval()


def tiny_multimodal(*, dtype: torch.dtype = torch.float32, head: bool = False) -> Any:
    """Gemma-3 with its vision tower, whose blocks look like the text's and are as many."""
    config = AutoConfig.for_model(
        "gemma3",
        text_config={**BASE, **WINDOW},
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
        image_token_index=VOCAB - 1,
        boi_token_index=VOCAB - 2,
        eoi_token_index=VOCAB - 3,
    )
    torch.manual_seed(3)
    kind: Any = AutoModelForImageTextToText if head else AutoModel
    return shaken(kind.from_config(config, dtype=dtype))


def tiny_peft(*, dtype: torch.dtype = torch.float32) -> Any:
    """A Llama with a head under a LoRA adapter that changes its results."""
    lora = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        # peft still reads an attribute that transformers renames
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return shaken(get_peft_model(tiny_model("llama", dtype=dtype, head=True), lora))
