"""Projection on dask.distributed: each task is done whole by one worker, which writes its own chunks of the result.

What travels is a description of the job, a few numbers for each task, and how many tokens are done; chunks and scores
do not. A task that is done again writes the same bytes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from datastore.cluster import connected
from project.kernel import run_tasks
from project.tasks import Job, Task

__all__ = ["cluster_runner"]

Runner = Callable[[Job, Sequence[Task]], None]


@contextmanager
def cluster_runner(
    *,
    scheduler: str | None = None,
    workers: int | None = None,
    memory: int = 10**9,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Runner]:
    """Yield a runner for `project.scores` on a cluster: the one at an address, or processes of this machine.

    Parameters
    ----------
    scheduler : str, optional
        Address such as `tcp://host:8786`; its workers must see the store under the same path.
    workers : int, optional
        Processes to start here, where no scheduler is named.
    memory : int
        Bytes of chunks that all workers together hold at most.
    progress : callable, optional
        Given tokens done and tokens to do.

    Raises
    ------
    MisuseError
        There is no scheduler at the address, it has no workers, or dask.distributed is not installed.
    """
    with connected(scheduler=scheduler, workers=workers) as cluster:

        def run(job: Job, tasks: Sequence[Task]) -> None:
            done = 0
            for _, tokens in cluster.map(_one, tasks, common=job, memory=memory):
                done += tokens
                if progress is not None:
                    progress(done, job.axis.n_tokens)

        yield run


def _one(task: Task, job: Job, memory: int) -> int:
    """Do one task in a worker; return its tokens."""
    run_tasks(job, [task], memory=memory, threads=1)
    return task.stop - task.start
