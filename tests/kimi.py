"""A tiny Kimi-K2 as it is published: model type `kimi_k2`, experts packed to INT4 one by one, several shards.

Everything is made here from the format's description, and nothing by the code under test.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast

GROUP = 32
VOCAB = 97
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.827,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCAB,
    "max_position_embeddings": 4096,
    "rope_theta": 50000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "num_nextn_predict_layers": 0,
}
QUANTIZATION: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "kv_cache_scheme": None,
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
    "config_groups": {
        "group_0": {
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "group_size": GROUP,
                "symmetric": True,
                "strategy": "group",
                "type": "int",
                "dynamic": False,
            },
        }
    },
}


def save_kimi(directory: Path, *, shards: int = 2, dtype: torch.dtype = torch.bfloat16, **sizes: Any) -> Path:
    """Write a random model with INT4 experts: config, tokenizer, safetensors shards with their index.

    Parameters
    ----------
    directory : Path
        Made where there is none.
    shards : int
        Over which the tensors are spread in the order of their names.
    dtype : torch.dtype
        Of everything but the experts' integers.
    **sizes
        Over `SIZES`, such as `num_hidden_layers=61`.
    """
    sizes = {**SIZES, **sizes}
    torch.manual_seed(5)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model("deepseek_v3", **sizes), dtype=dtype)  # type: ignore[no-untyped-call]
    weights: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if ".experts." in name:
            continue
        kind = torch.float32 if name.endswith("e_score_correction_bias") else dtype
        weights[name] = (tensor.float() + 0.05 * torch.randn(tensor.shape)).to(kind)
    for layer in range(sizes["first_k_dense_replace"], sizes["num_hidden_layers"]):
        for expert in range(sizes["n_routed_experts"]):
            for projection in PROJECTIONS:
                shape = (sizes["moe_intermediate_size"], sizes["hidden_size"])
                shape = shape[::-1] if projection == "down_proj" else shape
                weights |= _packed(f"model.layers.{layer}.mlp.experts.{expert}.{projection}", shape, dtype)
    directory.mkdir(parents=True, exist_ok=True)
    _save_shards(directory, weights, shards)
    auto = {"AutoConfig": "configuration_deepseek.DeepseekV3Config", "AutoModel": "modeling_deepseek.DeepseekV3Model"}
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "kimi_k2",
        "auto_map": auto,
        "dtype": str(dtype).removeprefix("torch."),
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "quantization_config": QUANTIZATION,
    }
    (directory / "config.json").write_text(json.dumps({**config, **sizes}))
    save_tokenizer(directory)
    return directory


def save_tokenizer(directory: Path) -> None:
    """Words `w3` to `w96`, and a chat template that names the speaker."""
    names = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    backend = Tokenizer(models.WordLevel(names, unk_token="w3"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>").save_pretrained(directory)


def unpack(packed: Tensor, scale: Tensor) -> Tensor:
    """Weights that packed ones stand for, [out, in] in the scale's dtype: eight signed nibbles a word, low first."""
    words = packed.long() & 0xFFFFFFFF
    nibbles = torch.stack([(words >> (4 * i)) & 15 for i in range(8)], dim=-1).reshape(packed.shape[0], -1) - 8
    return (nibbles.to(scale.dtype).reshape(*scale.shape, -1) * scale[..., None]).reshape(packed.shape[0], -1)


def plain_model(directory: Path, *, n_layers: int | None = None, dtype: torch.dtype | None = None) -> Any:
    """The same model with its experts multiplied out beforehand, in transformers' own class: the oracle."""
    config = json.loads((directory / "config.json").read_text())
    for key in ("auto_map", "model_type", "quantization_config", "architectures"):
        config.pop(key)
    config["num_hidden_layers"] = n_layers or config["num_hidden_layers"]
    kind = dtype or getattr(torch, config["dtype"])
    weights = read_shards(directory)
    kept = {k.removeprefix("model."): v for k, v in weights.items() if ".experts." not in k and "lm_head" not in k}
    for layer in range(config["first_k_dense_replace"], config["num_hidden_layers"]):
        parts: dict[str, list[Tensor]] = {projection: [] for projection in PROJECTIONS}
        for expert in range(config["n_routed_experts"]):
            for projection in PROJECTIONS:
                at = f"model.layers.{layer}.mlp.experts.{expert}.{projection}"
                scale = weights[f"{at}.weight_scale"].to(kind)
                parts[projection].append(unpack(weights[f"{at}.weight_packed"], scale))
        gate, up, down = (torch.stack(parts[projection]) for projection in PROJECTIONS)
        kept[f"layers.{layer}.mlp.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
        kept[f"layers.{layer}.mlp.experts.down_proj"] = down
    made: Any = AutoModel.from_config(AutoConfig.for_model("deepseek_v3", **config), dtype=kind)  # type: ignore[no-untyped-call]
    for name, buffer in made.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data = buffer.data.float()
    known = set(made.state_dict())
    made.load_state_dict({k: v for k, v in kept.items() if k in known})
    return made.eval().requires_grad_(False)


def read_shards(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint."""

    return {
        name: tensor for path in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(path).items()
    }


def _packed(name: str, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    rows, columns = shape
    values = torch.randint(0, 16, (rows, columns), dtype=torch.int64)
    words = sum(values[:, i::8] << (4 * i) for i in range(8))
    assert isinstance(words, Tensor)
    signed = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    scale = (0.02 * torch.rand(rows, columns // GROUP) + 0.005).to(dtype)
    return {
        f"{name}.weight_packed": signed,
        f"{name}.weight_scale": scale,
        f"{name}.weight_shape": torch.tensor(shape, dtype=torch.int32),
    }


def _save_shards(directory: Path, weights: dict[str, Tensor], shards: int) -> None:
    names, index = sorted(weights), dict[str, str]()
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        chosen = names[len(names) * shard // shards : len(names) * (shard + 1) // shards]
        save_file({name: weights[name].contiguous() for name in chosen}, directory / file, metadata={"format": "pt"})
        index |= dict.fromkeys(chosen, file)
    size = sum(t.numel() * t.element_size() for t in weights.values())
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": index})
    )
