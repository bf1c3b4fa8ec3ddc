"""Who fills which part of a plan, and who changes the store: locks, records of living processes and of parts done.

A record says host, boot, process and token range. It protects only against the mistake of starting the same part twice;
correctness never depends on it, because chunks are written whole and hold the same bits whoever writes them.
"""

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError

from datastore.errors import BusyError, PlanError
from datastore.storage import write_atomic

__all__ = ["Holder", "acquire", "changing", "living", "locked", "mark_done", "release", "reopen", "unfinished"]


class Holder(BaseModel):
    """The process that fills a part, and the tokens it fills."""

    model_config = ConfigDict(frozen=True)

    part: int
    parts: int
    start: int
    stop: int
    host: str
    boot_id: str
    pid: int
    started: float

    @property
    def alive(self) -> bool:
        """Whether the process may still run; another host's process can't be asked and counts as alive."""
        if self.host != socket.gethostname():
            return True
        if self.boot_id != _boot_id():
            return False
        with suppress(psutil.Error):
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started) < 1.0
            return same and process.status() != psutil.STATUS_ZOMBIE  # killed, and its parent has not asked yet
        return False

    @property
    def mine(self) -> bool:
        """Whether it is this process."""
        return self.host == socket.gethostname() and self.pid == os.getpid() and self.alive


def _boot_id() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return str(int(psutil.boot_time()))


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the plan's exclusive lock, which the system releases when the process dies.

    Whoever commits holds it to the end, so that no part is begun or reopened meanwhile.

    Raises
    ------
    PlanError
        The plan is gone: another process committed it.
    """
    try:
        file = (directory / "lock").open("w")
    except FileNotFoundError as error:
        raise _gone(directory) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not (directory.parent / "group").is_dir():
            raise _gone(directory)
        yield


_changed: ContextVar[frozenset[Path]] = ContextVar("_changed", default=frozenset())


@contextmanager
def changing(store: Path) -> Iterator[None]:
    """Hold the store's exclusive lock, so that nothing comes between a look at it and the rename that changes it.

    The lock is on the store's directory itself, and the system releases it when the process dies. Where the file system
    knows no such lock it is left out. Inside itself it does nothing.
    """
    path = store.resolve()
    if path in _changed.get():
        yield
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        mine = _changed.set(_changed.get() | {path})
        try:
            yield
        finally:
            _changed.reset(mine)
    finally:
        os.close(descriptor)


def _gone(directory: Path) -> PlanError:
    return PlanError(
        f"the plan {directory.parent.name} was carried out by another process meanwhile; nothing is left to do for it, "
        "plan again to see what is missing"
    )


def _holders(directory: Path) -> Iterator[tuple[Path, Holder]]:
    for file in sorted(directory.glob("*-of-*.json")):
        with suppress(OSError, ValidationError):
            yield file, Holder.model_validate_json(file.read_bytes())


def living(directory: Path) -> list[Holder]:
    """Return the living processes that fill parts of a plan."""
    return [one for _, one in _holders(directory) if one.alive]


def acquire(directory: Path, part: tuple[int, int], *, start: int, stop: int) -> Path:
    """Record this process as the holder of the tokens `[start, stop)` and return the record's file.

    Raises
    ------
    BusyError
        A living process holds some of these tokens; its pid and host are named.
    PlanError
        The plan was committed meanwhile.
    """
    with locked(directory):
        for file, other in _holders(directory):
            if not other.alive:
                file.unlink(missing_ok=True)
            elif max(start, other.start) < min(stop, other.stop):
                raise BusyError(
                    f"part {part[0]}/{part[1]} of this plan is being filled by process {other.pid} on {other.host} "
                    f"(part {other.part}/{other.parts}), so it is not started twice; wait for it or stop it, and if "
                    f"that process is gone from another machine, delete {file}"
                )
        me = psutil.Process()
        holder = Holder(
            part=part[0],
            parts=part[1],
            start=start,
            stop=stop,
            host=socket.gethostname(),
            boot_id=_boot_id(),
            pid=os.getpid(),
            started=me.create_time(),
        )
        record = directory / f"{part[0]}-of-{part[1]}.json"
        write_atomic(record, holder.model_dump_json().encode())
    return record


def release(record: Path) -> None:
    """Delete this process's record; one that another process has put in its place stays."""
    with suppress(OSError, ValidationError):
        if Holder.model_validate_json(record.read_bytes()).mine:
            record.unlink(missing_ok=True)


def mark_done(directory: Path, *, start: int, stop: int) -> None:
    """Record durably that every chunk of the tokens `[start, stop)` is written and synced."""
    write_atomic(directory / f"{start}-{stop}.done", json.dumps([start, stop]).encode(), durable=True)


def reopen(directory: Path, *, start: int, stop: int) -> None:
    """Take back what says that tokens of `[start, stop)` are done, because a chunk there is lost; under the lock."""
    for file, low, high in _done(directory):
        if max(start, low) < min(stop, high):
            file.unlink(missing_ok=True)


def _done(directory: Path) -> Iterator[tuple[Path, int, int]]:
    for file in directory.glob("*.done"):
        with suppress(ValueError, TypeError, OSError):
            start, stop = json.loads(file.read_text())
            yield file, int(start), int(stop)


def unfinished(directory: Path, n_tokens: int, *, besides: tuple[int, int] | None = None) -> list[tuple[int, int]]:
    """Return the token ranges that no part has finished, ascending; those `besides` count as finished."""
    gaps, at = [], 0
    finished = {(low, high) for _, low, high in _done(directory)} | ({besides} if besides else set())
    for start, stop in sorted(finished):
        if start > at:
            gaps.append((at, start))
        at = max(at, stop)
    return [*gaps, (at, n_tokens)] if at < n_tokens else gaps
