"""Memory by batch, on stderr, where the environment asks for it: `GENERATION_MEMORY_LOG=1`."""

import os
from collections.abc import Sequence

import psutil
import torch

from datastore import console

__all__ = ["log_memory"]

_VARIABLE = "GENERATION_MEMORY_LOG"


def log_memory(members: Sequence[str]) -> None:
    """Say how much memory there is in use after a batch of these rollouts, and what was the most on each GPU."""
    if os.environ.get(_VARIABLE, "0") in ("", "0"):
        return
    parts = [f"host {console.human_bytes(psutil.Process().memory_info().rss)}"]
    for gpu in range(torch.cuda.device_count()):
        now, most = torch.cuda.memory_allocated(gpu), torch.cuda.max_memory_allocated(gpu)
        parts.append(f"cuda:{gpu} {console.human_bytes(now)}, at most {console.human_bytes(most)}")
        torch.cuda.reset_peak_memory_stats(gpu)
    console.stderr().print(f"memory after {len(members)} rollouts from {members[0]}: {'; '.join(parts)}")
