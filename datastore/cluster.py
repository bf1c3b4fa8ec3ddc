"""Tasks on dask.distributed: each is done whole by one worker, by a function of the task and of what all tasks share.

What all tasks share travels once to each worker. A task whose worker died is done again by another. Whoever sends tasks
sees to it that a task done twice does no harm, and that what it returns is small.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from threadpoolctl import threadpool_limits

from datastore.errors import DatastoreError, MisuseError

__all__ = ["Cluster", "connected"]

T = TypeVar("T")
C = TypeVar("C")
R = TypeVar("R")
RETRIES = 3
CONNECT_SECONDS = 10
LOST_SECONDS = 60
"""How long a cluster may have no worker before the work is given up; a nanny starts a new one within seconds."""
_LOOK_SECONDS = 5.0
_POLL_SECONDS = 0.01
_MEND = "nothing was kept, give the workers more memory or lower --memory"


class Cluster:
    """A scheduler with its workers. Made by `connected`."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def map(
        self, fn: Callable[[T, C, int], R], tasks: Sequence[T], *, common: C, memory: int
    ) -> Iterator[tuple[int, R]]:
        """Do tasks on the workers; yield each one's place in `tasks` and result, in the order they are done.

        Parameters
        ----------
        fn : callable
            `fn(task, common, memory)`, importable on the workers; `memory` is its share of the allowance.
        tasks : sequence
        common : object
            What all tasks share.
        memory : int
            Bytes that all workers together may hold at most.

        Raises
        ------
        DatastoreError
            Workers died doing the same task, one ran out of memory, none is left, or the scheduler is gone.
        Exception
            What a task raised four times.
        """
        from distributed import as_completed
        from distributed.comm.core import CommClosedError
        from distributed.scheduler import KilledWorker

        client, futures = self._client, list[Any]()
        try:
            share = max(1, memory // max(1, sum(client.nthreads().values())))
            # a task, not scattered data: when the worker that holds it dies, another makes it again
            sent = client.submit(_handed, common, pure=False, retries=RETRIES)
            futures += client.map(_one, tasks, fn=fn, common=sent, memory=share, pure=False, retries=RETRIES)
            place = {future.key: i for i, future in enumerate(futures)}
            waiting: Any = as_completed(futures, loop=client.loop, with_results=True)  # type: ignore[no-untyped-call]
            while not waiting.is_empty():
                self._wait(waiting)
                future, result = next(waiting)
                yield place[future.key], result
        except KilledWorker as error:
            raise DatastoreError(
                f"several workers died doing the same part of the work, perhaps for want of memory; {_MEND}"
            ) from error
        except MemoryError as error:
            raise DatastoreError(f"a worker ran out of memory ({_first_line(error)}); {_MEND}") from error
        except (CancelledError, CommClosedError) as error:
            raise DatastoreError(
                f"the dask scheduler at {self._address} is gone; nothing was kept, start it and do the same again"
            ) from error
        finally:
            with suppress(Exception):
                client.cancel(futures)

    @property
    def _address(self) -> str:
        return str(self._client.scheduler.address if self._client.scheduler else "its address")

    def _wait(self, waiting: Any) -> None:
        """Return when a task is done; raise when there has been no worker for long, or no scheduler."""
        seen = looked = time.monotonic()
        while not waiting.has_ready():
            time.sleep(_POLL_SECONDS)
            now = time.monotonic()
            if now - looked < _LOOK_SECONDS:
                continue
            looked = now
            if self._client.status != "running":
                raise CancelledError
            if self._client.nthreads():
                seen = now
            elif now - seen > LOST_SECONDS:
                raise DatastoreError(
                    f"the dask scheduler at {self._address} has had no workers for {LOST_SECONDS} s; nothing was kept, "
                    f"start some with `dask worker {self._address}` and do the same again"
                )


@contextmanager
def connected(*, scheduler: str | None = None, workers: int | None = None) -> Iterator[Cluster]:
    """Yield the cluster at an address, or one of processes of this machine, and leave it.

    Parameters
    ----------
    scheduler : str, optional
        Address such as `tcp://host:8786`, or the file that `dask scheduler --scheduler-file` wrote; its workers must
        see the store under the same path.
    workers : int, optional
        Processes to start here, where no scheduler is named.

    Raises
    ------
    MisuseError
        There is no scheduler at the address, it has no workers, or dask.distributed is not installed.
    """
    try:
        import distributed  # loads Tornado, and only a cluster needs it
    except ImportError as error:
        raise MisuseError("dask.distributed is not installed; install activation-datastore[dask]") from error
    if scheduler is not None:
        client = _client(scheduler)
        try:
            yield Cluster(client)
        finally:
            client.close()
        return
    # any free port: the one it takes by default is warned of where another cluster has it
    quiet = {"dashboard": False, "dashboard_address": "127.0.0.1:0"}
    with (
        distributed.LocalCluster(  # type: ignore[no-untyped-call]
            n_workers=workers or 1,
            threads_per_worker=1,
            processes=True,
            dashboard_address=None,
            scheduler_kwargs=quiet,
            memory_limit=0,
        ) as local,
        distributed.Client(local, set_as_default=False) as client,  # type: ignore[no-untyped-call]
    ):
        yield Cluster(client)


def _client(scheduler: str) -> Any:
    from distributed import Client

    try:
        address = _written(Path(scheduler)) if scheduler.endswith(".json") else scheduler
        client: Any = Client(address, timeout=CONNECT_SECONDS, set_as_default=False)  # type: ignore[no-untyped-call]
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
            f"the dask scheduler at {scheduler} had no workers for {CONNECT_SECONDS} s; start some with "
            f"`dask worker {scheduler}`"
        ) from error
    return client


def _written(file: Path) -> str:
    """Return the address in a scheduler's file."""
    found = json.loads(file.read_bytes())
    if not isinstance(found, dict) or not isinstance(found.get("address"), str):
        raise ValueError("the file names no address")
    return str(found["address"])


def _handed(common: C) -> C:
    return common


def _one(task: T, *, fn: Callable[[T, C, int], R], common: C, memory: int) -> R:
    """Do one task in a worker, with one BLAS thread for good: tasks may run side by side in its process."""
    if not _SETTLED:
        _SETTLED.append(threadpool_limits(limits=1, user_api="blas"))
    return fn(task, common, memory)


_SETTLED: list[Any] = []


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
