"""Plain sampling from a model that was loaded without its head, which is read from the checkpoint when first asked."""

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils.hub import cached_file

from capture.errors import ModelError, RequestError
from capture.loading import Loaded
from capture.modelinfo import ModelInfo

__all__ = ["generate", "with_head"]

LEAST_TEMPERATURE = 0.01


def with_head(loaded: Loaded) -> Any:
    """Put the loaded base model into its class with a head, and read that head's weights.

    Raises
    ------
    RequestError
        Where layers were left out at loading.
    ModelError
        Where the checkpoint has no head of that name.
    """
    info, base = loaded.info, loaded.model
    config: Any = base.config
    if loaded.n_layers < info.n_layers:
        raise RequestError(
            f"only layers 0 to {loaded.n_layers - 1} of {info.n_layers} are loaded, so this model can't speak; start "
            "the server without --layers to generate"
        )
    make: Any = AutoModelForCausalLM
    with torch.device("meta"):
        whole = make.from_config(config, dtype=getattr(torch, loaded.dtype))
    setattr(whole, whole.base_model_prefix, base)
    if getattr(config.get_text_config(), "tie_word_embeddings", False):
        embedding: Any = base.get_input_embeddings()  # type: ignore[operator]
        whole.get_output_embeddings().weight = embedding.weight
    else:
        _read_head(whole, info, device=torch.device(loaded.device))
    whole.generation_config = _generation_config(info)
    return whole.eval().requires_grad_(False)


def _read_head(whole: nn.Module, info: ModelInfo, *, device: torch.device) -> None:
    prefix = f"{whole.base_model_prefix}."
    missing = [name for name, p in whole.named_parameters() if not name.startswith(prefix) and p.is_meta]
    for name in missing:
        parent, _, attribute = name.rpartition(".")
        module, dtype = whole.get_submodule(parent), whole.get_parameter(name).dtype
        setattr(module, attribute, nn.Parameter(_tensor(info, name).to(device, dtype), requires_grad=False))


def _tensor(info: ModelInfo, name: str) -> Tensor:
    """One tensor of the checkpoint."""
    for path in _files(info):
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118 - not a dict
                found: Tensor = file.get_tensor(name)
                return found
    raise ModelError(
        f"the files of {info.name} hold no {name}, so this model has no head to sample with; where it was loaded from "
        "a cache alone, download the model too"
    )


def _files(info: ModelInfo) -> list[Path]:
    if info.directory:
        return sorted(info.directory.glob("*.safetensors"))
    there = cached_file(info.name, "config.json", revision=info.revision, local_files_only=True)
    return sorted(Path(str(there)).parent.glob("*.safetensors"))


def _generation_config(info: ModelInfo) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(info.name, revision=info.revision or "main")
    except OSError:  # a checkpoint without generation_config.json
        return GenerationConfig.from_model_config(info.config)


def generate(whole: Any, loaded: Loaded, prompt: str, *, max_new_tokens: int, temperature: float) -> str:
    """Continue a prompt as it stands.

    Parameters
    ----------
    whole : nn.Module
        From `with_head`.
    temperature : float
        Below 0.01 the most likely token is taken each time, which is what sampling tends to and can't compute.

    Raises
    ------
    RequestError
        Where prompt and continuation are longer than the model's context.
    """
    tokens = loaded.tokenizer(prompt, return_tensors="pt")["input_ids"]
    context = loaded.info.context
    if not tokens.shape[1]:
        raise RequestError(f"the prompt {prompt!r} has no tokens; give some text")
    if context is not None and tokens.shape[1] + max_new_tokens > context:
        raise RequestError(
            f"a prompt of {tokens.shape[1]} tokens and {max_new_tokens} new ones are more than the {context} of "
            f"{loaded.info.model_id}; shorten the prompt or lower max_new_tokens"
        )
    tokens = tokens.to(whole.get_input_embeddings().weight.device)
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature} if temperature >= LEAST_TEMPERATURE else {"do_sample": False}
    )
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # settings of generation_config.json that do not apply here
        out = whole.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=max_new_tokens, **sampling)
    text: str = loaded.tokenizer.decode(out[0, tokens.shape[1] :], skip_special_tokens=True)
    return text
