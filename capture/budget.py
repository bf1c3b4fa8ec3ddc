"""The token budget of a batch from a measured forward, remembered for each model, device and request.

Two dry forwards of different sizes give the memory that a batch takes at all and that each token adds: attention masks,
experts' workspace, rows on their way out. What is left of the device then says how many tokens fit.
"""

import fcntl
import json
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from huggingface_hub import constants
from torch import nn

from capture.components import ComponentTable
from capture.forward import run_batch
from capture.staging import Staging
from datastore.storage import write_atomic

__all__ = ["Measured", "batch_tokens", "measure", "recall", "remember"]

LOG = logging.getLogger("capture")

SIZES = (2048, 8192)
"""Tokens of the two dry forwards, in sequences of `SEQUENCE`."""
SEQUENCE = 512
_SHARE = 0.8
_LEAST, _MOST = 512, 16_384
_HOST_SHARE = 0.25
"""Of the host's memory, for the rows of the two batches that may be on their way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What forwards took.

    Attributes
    ----------
    fixed, per_token : float
        Bytes on the device for a batch at all, and for each of its padded tokens.
    row : int
        Bytes of the rows of a token.
    free : int
        Bytes that were free on the device with the model on it.
    """

    fixed: float
    per_token: float
    row: int
    free: int


def measure(
    model: nn.Module,
    table: ComponentTable,
    *,
    layers: Sequence[int],
    components: Sequence[str],
    sizes: tuple[int, int] = SIZES,
) -> Measured:
    """Run two dry forwards with the hooks of a capture.

    Parameters
    ----------
    model : nn.Module
    table : ComponentTable
    layers, components : sequences
        What will be captured.
    sizes : (int, int)
        Padded tokens of the two.

    Raises
    ------
    NoMemoryError
        Not even the smaller one fits.
    """
    device = next(model.parameters()).device
    names, random = list(components), np.random.default_rng(0)
    length = min(SEQUENCE, *sizes)
    peaks = []
    for tokens in (min(sizes), *sizes):  # the first warms up: workspaces of libraries are taken once
        ids = random.integers(0, table.vocab_size or 2, (max(1, tokens // length), length))
        batch = [(str(i), one) for i, one in enumerate(ids)]
        with _Peak(device) as peak, Staging() as staging:
            run_batch(model, table, batch, layers=layers, components=names, put=lambda *_, **__: None, staging=staging)
        peaks.append(peak.bytes)
    slope = max(1.0, (peaks[2] - peaks[1]) / (sizes[1] - sizes[0]))
    widths = sum(table.hook(name, layer).width for name in names for layer in layers)
    return Measured(
        fixed=max(0.0, peaks[1] - slope * sizes[0]),
        per_token=slope,
        row=widths * getattr(torch, table.dtype).itemsize,
        free=_free(device),
    )


def batch_tokens(measured: Measured, *, host_bytes: int | None = None) -> int:
    """Return how many padded tokens a batch may have: a power of two from 512 to 16384.

    Parameters
    ----------
    measured : Measured
    host_bytes : int, optional
        Memory of the host; default what there is.
    """
    host = (host_bytes or psutil.virtual_memory().total) * _HOST_SHARE / 2
    fit = min((measured.free * _SHARE - measured.fixed) / measured.per_token, host / measured.row)
    return 1 << (int(max(_LEAST, min(_MOST, fit))).bit_length() - 1)


def recall(key: Mapping[str, Any], *, directory: Path | None = None) -> int | None:
    """Return the budget that was remembered under this key, or None."""
    return _tokens(_read(_file(directory)).get(_name(key)))


def remember(key: Mapping[str, Any], measured: Measured, *, directory: Path | None = None) -> int:
    """Remember the budget of what was measured, unless another process did so first, and return the one that counts.

    Processes that measure at the same moment may find different numbers, and parts of one capture must have one: the
    first that writes decides. Where nothing can be written, one's own is returned with a warning.
    """
    path, tokens = _file(directory), batch_tokens(measured)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            found = _read(path)
            earlier = _tokens(found.get(_name(key)))
            if earlier is not None:
                return earlier
            write_atomic(
                path, json.dumps({**found, _name(key): {"batch_tokens": tokens, **asdict(measured)}}, indent=1).encode()
            )
    except OSError as error:
        LOG.warning(
            "the token budget %d can't be remembered in %s (%s), so parts of one capture may find different ones; give "
            "each the same --batch-tokens, or set HF_HOME to a directory that can be written",
            tokens,
            path,
            error.strerror,
        )
    return tokens


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock beside a file, which the system releases when the process dies."""
    with path.with_name(f"{path.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read(path: Path) -> dict[str, Any]:
    """What is remembered; nothing where the file is absent or damaged."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _tokens(one: Any) -> int | None:
    found = one.get("batch_tokens") if isinstance(one, dict) else None
    return found if isinstance(found, int) and found > 0 else None


def _file(directory: Path | None) -> Path:
    return (directory or Path(constants.HF_HOME) / "activation_cache") / "budgets.json"


def _name(key: Mapping[str, Any]) -> str:
    return json.dumps(dict(key), sort_keys=True)


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


class _Peak:
    """The most memory held on a device beyond what was held before; on the CPU by looking every millisecond."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.bytes = 0

    def __enter__(self) -> "_Peak":
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            self._process, self._stop = psutil.Process(), threading.Event()
            self._before = self._most = self._process.memory_info().rss
            self._watch = threading.Thread(target=self._look, daemon=True)
            self._watch.start()
        return self

    def _look(self) -> None:
        while not self._stop.wait(0.001):
            self._most = max(self._most, self._process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            self._most = torch.cuda.max_memory_allocated(self._device)
        else:
            self._stop.set()
            self._watch.join()
        self.bytes = max(0, self._most - self._before)
