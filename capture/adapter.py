"""LoRA adapters over a model without head, perhaps without its last layers: every weight of the file has its place."""

import hashlib
import os
import re
import warnings
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors.torch import load_file

from capture.errors import ModelError, RequestError
from capture.modelinfo import local_path

__all__ = ["apply_adapter", "describe_adapter"]

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


def describe_adapter(adapter: str) -> dict[str, str]:
    """Return the name of an adapter and the sha256 of its weights and config, for the provenance.

    Raises
    ------
    ModelError
        There is no such adapter, or its weights are no safetensors file.
    """
    directory = _directory(adapter)
    digest = hashlib.sha256()
    for name in (_CONFIG, _WEIGHTS):
        digest.update((directory / name).read_bytes())
    return {"name": directory.name if Path(adapter).exists() else adapter, "sha256": digest.hexdigest()}


def apply_adapter(model: Any, adapter: str) -> Any:
    """Put an adapter over a loaded base model.

    Raises
    ------
    RequestError
        peft is not installed.
    ModelError
        The adapter does not fit the model: a weight of either has no counterpart.
    """
    try:
        import peft
    except ImportError:
        raise RequestError(
            f"the adapter {adapter} needs the package peft, which is not installed: pip install peft"
        ) from None
    directory = _directory(adapter)
    n_layers = model.config.get_text_config().num_hidden_layers
    try:
        config = peft.PeftConfig.from_pretrained(str(directory))
        config.inference_mode, config.task_type = True, None  # a model without head has no task
        with warnings.catch_warnings():
            # peft still reads an attribute that transformers renames
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            adapted: Any = peft.get_peft_model(model, config)
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(
            f"the adapter {adapter} can't be put over the model: {' '.join(str(error).split())}"
        ) from error
    wanted = set(peft.get_peft_model_state_dict(adapted))
    weights = {}
    for key, tensor in load_file(directory / _WEIGHTS).items():
        if (place := _place(key, wanted)) is not None:
            weights[place] = tensor
        elif not _left_out(key, n_layers):
            raise ModelError(
                f"the adapter {adapter} has a weight {key} and the model has no place for it; give one made for this "
                "model"
            )
    if missing := sorted(wanted - set(weights)):
        raise ModelError(
            f"the adapter {adapter} lacks {len(missing)} weights, {missing[0]} the first; give one made for this model"
        )
    peft.set_peft_model_state_dict(adapted, weights)
    return adapted.eval().requires_grad_(False)


def _place(key: str, wanted: set[str]) -> str | None:
    """The same weight's name over a base model; files are mostly of the model with head, one `model.` further down."""
    rest = key.removeprefix(_PREFIX)
    places = (key, _PREFIX + rest.removeprefix("model."), _PREFIX + rest.removeprefix("language_model.model."))
    return next((place for place in places if place in wanted), None)


def _left_out(key: str, n_layers: int) -> bool:
    """Whether it belongs to a layer or head that does not run."""
    layer = re.search(r"\.layers\.(\d+)\.", key) or re.search(r"\.h\.(\d+)\.", key)
    return "lm_head" in key or (layer is not None and int(layer[1]) >= n_layers)


def _directory(adapter: str) -> Path:
    path = local_path(adapter)
    if not os.path.isdir(path):
        if os.path.exists(path) or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", adapter):
            raise ModelError(f"{adapter} is no directory of an adapter and no Hub id; give one of them")
        try:
            path = Path(snapshot_download(adapter, allow_patterns=[_CONFIG, _WEIGHTS]))
        except Exception as error:
            raise ModelError(
                f"the adapter {adapter} can't be had from the Hub: {' '.join(str(error).split())[:200]}"
            ) from error
    for name in (_CONFIG, _WEIGHTS):
        if not (path / name).exists():
            raise ModelError(f"the adapter {adapter} has no {name}, so it can't be loaded; save it with peft again")
    return path
