"""Real `dask scheduler` and `dask worker` processes for tests, as a cluster has them."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distributed import Client

__all__ = ["scheduler", "wait_for_workers", "worker"]

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def _dask(*arguments: str, **environment: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "dask", *arguments], env=ENVIRONMENT | environment, cwd=ROOT, stderr=subprocess.DEVNULL
    )


@contextmanager
def scheduler(*, deaths: int = 3, file: Path | None = None) -> "Iterator[tuple[str, subprocess.Popen[bytes]]]":
    """Start a scheduler; yield its address and process. A task may lose so many workers before it is given up.

    Where a file is named, it writes its address there.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words: tuple[str, ...] = ("scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard", "--no-show")
    words += ("--scheduler-file", str(file)) if file else ()
    process = _dask(*words, DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES=str(deaths))
    try:
        _wait_for(port)
        yield f"tcp://127.0.0.1:{port}", process
    finally:
        process.terminate()
        process.wait()


def _wait_for(port: int) -> None:
    for _ in range(600):
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError(f"no scheduler listens at port {port}")


@contextmanager
def worker(address: str) -> "Iterator[subprocess.Popen[bytes]]":
    """Start a worker of one thread, which nobody starts again when it dies; the address may be a scheduler's file."""
    at = ("--scheduler-file", address) if address.endswith(".json") else (address,)
    process = _dask("worker", *at, "--nthreads", "1", "--no-nanny", "--no-dashboard", "--memory-limit", "0")
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def wait_for_workers(address: str, n: int) -> None:
    """Return when so many workers are there."""
    with Client(address, set_as_default=False) as client:  # type: ignore[no-untyped-call]
        client.wait_for_workers(n, timeout=60)
