"""Tasks on dask.distributed: each is done whole by one worker, which writes its own chunks of the result.

What travels is a description of the job, a few numbers for each task, and the names of what is done; chunks and scores
do not. A task whose worker died is done again by another: it writes the same bytes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from threadpoolctl import threadpool_limits

from datastore.errors import DatastoreError, MisuseError
from project.kernel import run_tasks
from project.tasks import Job, Task

__all__ = ["cluster_runner"]

Runner = Callable[[Job, Sequence[Task]], None]
RETRIES = 3
CONNECT_SECONDS = 10


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
        There is no scheduler at the address, or dask.distributed is not installed.
    """
    client, close = _connected(scheduler, workers)
    try:
        yield lambda job, tasks: _run(client, job, tasks, memory=memory, progress=progress)
    finally:
        close()


def _connected(scheduler: str | None, workers: int | None) -> tuple[Any, Callable[[], None]]:
    try:
        from distributed import Client, LocalCluster  # loads Tornado, and only a cluster needs it
    except ImportError as error:
        raise MisuseError("dask.distributed is not installed; install activation-datastore[dask]") from error
    if scheduler is not None:
        try:
            client: Any = Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False)  # type: ignore[no-untyped-call]
        except (OSError, ValueError) as error:
            raise MisuseError(
                f"there is no dask scheduler at {scheduler} ({_first_line(error)}); start one with `dask scheduler`, "
                "or use --workers N on this machine"
            ) from error
        try:
            client.wait_for_workers(1, timeout=CONNECT_SECONDS)
        except TimeoutError as error:
            client.close()
            raise MisuseError(
                f"the dask scheduler at {scheduler} has no workers; start some with `dask worker {scheduler}`"
            ) from error
        return client, client.close
    cluster: Any = LocalCluster(  # type: ignore[no-untyped-call]
        n_workers=workers or 1, threads_per_worker=1, processes=True, dashboard_address=None, memory_limit=0
    )
    client = Client(cluster, set_as_default=False)  # type: ignore[no-untyped-call]

    def close() -> None:
        client.close()
        cluster.close()

    return client, close


def _run(
    client: Any,
    job: Job,
    tasks: Sequence[Task],
    *,
    memory: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    from distributed import as_completed
    from distributed.scheduler import KilledWorker

    total = job.axis.n_tokens
    slots = max(1, sum(client.nthreads().values()))
    share = max(1, memory // slots)
    # a task, not scattered data: when the worker that holds it dies, another makes it again
    sent = client.submit(_handed, job, pure=False, retries=RETRIES)
    futures = client.map(_one, tasks, job=sent, memory=share, pure=False, retries=RETRIES)
    done = 0
    try:
        finished: Any = as_completed(futures, loop=client.loop, with_results=True)  # type: ignore[no-untyped-call]
        for _, tokens in finished:
            done += tokens
            if progress is not None:
                progress(done, total)
    except KilledWorker as error:
        raise DatastoreError(
            "several workers died doing the same part of the work, perhaps for want of memory; nothing was kept, "
            "give the workers more memory or lower --memory"
        ) from error
    finally:
        with suppress(Exception):
            client.cancel(futures)


def _handed(job: Job) -> Job:
    return job


def _one(task: Task, *, job: Job, memory: int) -> int:
    """Do one task in a worker; return its tokens."""
    _settle()
    run_tasks(job, [task], memory=memory, threads=1)
    return task.stop - task.start


def _settle() -> None:
    """Keep BLAS to one thread for good in a worker's process, where tasks may run side by side."""
    if not _SETTLED:
        _SETTLED.append(threadpool_limits(limits=1, user_api="blas"))


_SETTLED: list[Any] = []


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
