"""How many tokens share a forward pass, and what becomes of a batch that does not fit: arithmetic without tensors."""

from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")

_HOST_BYTES = 1 << 30
_HOST_BYTES_BESIDE_ACCELERATOR = 8 << 30
_WORK_SHARE = 0.15
_LEAST, _MOST = 512, 16_384
_MOST_ON_CPU = 2_048
"""More of them at once cost a CPU a third more of its time for each token, and nothing is told or stopped meanwhile."""


def halves(batch: Sequence[T]) -> tuple[tuple[T, ...], tuple[T, ...]]:
    """The two halves of a batch that did not fit, in order; the first is never the smaller."""
    middle = (len(batch) + 1) // 2
    return tuple(batch[:middle]), tuple(batch[middle:])


def auto_batch_tokens(config: Any, device: Any, *, device_bytes: int | None = None) -> int:
    """Token budget of a batch from the model's sizes and the device, never from what happens to be free.

    Two needs are counted. Rows wait in host memory until their forward has succeeded: width x layers x bytes a token,
    within 1 GiB beside a CPU and 8 GiB beside an accelerator (for one component on all layers). The forward itself
    works on the device: about 16 widths of the residual, the gate, up and down products of the MLP or of the experts a
    token is sent to, all in the compute dtype, and float32 copies of the residual; within 15 % of the device's memory.
    A CPU takes 2048 at most; not so with a device map, whose parts may be read from disk for each batch.

    Parameters
    ----------
    config : transformers config
        Of the model or of its text part.
    device : str or torch.device
        Only its type counts, and for a CUDA device its total memory; whatever is neither CPU nor CUDA counts as a map.
    device_bytes : int, optional
        Total memory of the device; of a CUDA device read from it when not given.

    Returns
    -------
    int
        A power of two from 512 to 16384.
    """
    kind = str(device).partition(":")[0]
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    itemsize = 4 if "float32" in str(getattr(text, "dtype", None)) else 2
    host = text.hidden_size * text.num_hidden_layers * itemsize
    budget = (_HOST_BYTES_BESIDE_ACCELERATOR if kind == "cuda" else _HOST_BYTES) // host
    if kind == "cuda":
        total = device_bytes if device_bytes is not None else _device_bytes(device)
        budget = min(budget, int(total * _WORK_SHARE) // _work_bytes(text, itemsize))
    return _power_of_two(max(_LEAST, min(_MOST_ON_CPU if kind == "cpu" else _MOST, budget)))


def _work_bytes(text: Any, itemsize: int) -> int:
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    active = getattr(text, "num_experts_per_tok", None) or 1
    expert = getattr(text, "moe_intermediate_size", None) or inner
    widest = max(inner, active * (expert + text.hidden_size))
    return int(itemsize * (16 * text.hidden_size + 3 * widest) + 8 * text.hidden_size)


def _device_bytes(device: Any) -> int:
    import torch  # the arithmetic above must work where torch is not installed

    return int(torch.cuda.get_device_properties(device).total_memory)


def _power_of_two(n: int) -> int:
    return 1 << (n.bit_length() - 1)
