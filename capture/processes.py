"""Which part of a capture a process is given by whoever launched it: torchrun, accelerate, SLURM."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from capture.errors import RequestError

__all__ = ["Launched", "launched"]

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# Those of a job step, which srun sets: in a batch script itself SLURM_NTASKS is set too, and it is one process alone.
_SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")


@dataclass(frozen=True, slots=True, kw_only=True)
class Launched:
    """This process among those that were launched together.

    Attributes
    ----------
    by : str
        torchrun (accelerate sets the same variables) or SLURM.
    part : (int, int)
        This process and how many there are, from 1.
    local : int
        Its number on this machine, from 0.
    neighbours : int
        Processes on this machine, this one among them; 1 where it is not known.
    """

    by: str
    part: tuple[int, int]
    local: int
    neighbours: int

    def device(self, asked: str) -> str:
        """Give each of several processes of a machine a GPU of its own, unless a device was asked for.

        Where the launcher shows each process only its own GPU, or there are fewer GPUs than processes, `auto` stays.
        """
        if asked != "auto" or self.neighbours == 1:
            return asked
        import torch  # seconds, and needed here alone

        return f"cuda:{self.local}" if torch.cuda.device_count() >= self.neighbours else asked


def launched(environ: Mapping[str, str] = os.environ) -> Launched | None:
    """Read what the launcher says; None where there is none, or it started one process only.

    Raises
    ------
    RequestError
        Its variables contradict each other.

    Examples
    --------
    >>> launched({"RANK": "1", "WORLD_SIZE": "4"}).part
    (2, 4)
    """
    for by, (rank, size, local, neighbours) in (("torchrun", _TORCHRUN), ("SLURM", _SLURM)):
        if rank not in environ or size not in environ:
            continue
        i, n = _number(environ, rank), _number(environ, size)
        if not 0 <= i < n:
            raise RequestError(f"{rank}={i} is not a process of {size}={n}; mend the launch, or give --part I/N")
        if n > 1:
            here = environ.get(neighbours, "1").partition("(")[0].partition(",")[0]
            return Launched(
                by=by,
                part=(i + 1, n),
                local=_number(environ, local) if local in environ else 0,
                neighbours=int(here) if here.isdecimal() else 1,
            )
    return None


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ[name]
    if not text.isdecimal():
        raise RequestError(f"{name}={text!r} is not a number; mend the launch, or give --part I/N")
    return int(text)
