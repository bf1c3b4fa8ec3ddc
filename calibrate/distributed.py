"""Calibration on dask.distributed: each task reads some rollouts at one layer whole; results are brought into order.

What travels is a description of the selection, a few numbers for each task and rollout, and sums; chunks do not.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from calibrate.passes import Tick
from calibrate.tasks import Job, Runner, Task
from datastore.cluster import connected

__all__ = ["cluster_runner"]

R = TypeVar("R")


@contextmanager
def cluster_runner(
    *,
    scheduler: str | None = None,
    workers: int | None = None,
    memory: int = 10**9,
    tick: Tick | None = None,
) -> Iterator[Runner]:
    """Yield a runner for `calibrate.fit` on a cluster: the one at an address, or processes of this machine.

    Parameters
    ----------
    scheduler : str, optional
        Address such as `tcp://host:8786`; its workers must see the stores under the same paths.
    workers : int, optional
        Processes to start here, where no scheduler is named.
    memory : int
        Bytes that all workers together hold at most.
    tick : callable, optional
        Told the number of tokens × layers of each task that is done.

    Raises
    ------
    MisuseError
        There is no scheduler at the address, it has no workers, or dask.distributed is not installed.
    """
    with connected(scheduler=scheduler, workers=workers) as cluster:

        def run(job: Job, tasks: Sequence[Task[R]]) -> Iterator[R]:
            early: dict[int, R] = {}
            due = 0
            for place, result in cluster.map(_one, tasks, common=job, memory=memory) if tasks else ():
                early[place] = result
                if tick is not None:
                    tick(tasks[place].tokens)
                while due in early:
                    yield early.pop(due)
                    due += 1

        yield run


def _one(task: Task[Any], job: Job, memory: int) -> Any:
    """Do one task in a worker."""
    return task.do(replace(job, settings=replace(job.settings, memory=memory)), _unheard)


def _unheard(tokens: int) -> None:
    """Tell nobody."""
