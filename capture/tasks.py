"""Captures that a server was asked for: their state while it lives, and the SQLite file in which they survive it."""

import asyncio
import json
import sqlite3
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from capture.errors import CaptureError
from capture.messages import ENDED, CaptureOrder, Progress, State, TaskStatus

__all__ = ["INTERRUPTED", "Task", "TaskFile"]

KEPT = 1_000
"""Tasks that the file remembers."""

INTERRUPTED = (
    "the server ended before this capture did; nothing half-done was committed and what is finished is kept, send the "
    "same request again to go on"
)
_SAVED = "saved"
_SCHEMA = "CREATE TABLE IF NOT EXISTS tasks (id TEXT PRIMARY KEY, created REAL NOT NULL, record TEXT NOT NULL)"


@dataclass(slots=True, kw_only=True)
class Task:
    """One capture that was asked for.

    Attributes
    ----------
    tree, variant, store : str
        As the request was understood: directory of the experiment, variant, path of the store.
    created, began, ended : float or None
        Seconds since the epoch.
    progress_from : (float, int) or None
        When this run began to compute, and the raw bytes that were there already.
    """

    id: str
    order: CaptureOrder
    tree: str
    variant: str
    store: str
    created: float = field(default_factory=time.time)
    state: State = "starting"
    began: float | None = None
    ended: float | None = None
    error: str | None = None
    progress: Progress = field(default_factory=Progress)
    progress_from: tuple[float, int] | None = None
    skipped: int = 0
    captures: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    resumes: str | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event, repr=False)

    @property
    def over(self) -> bool:
        """Whether it has ended, however."""
        return self.state in ENDED

    def tell(self) -> None:
        """Wake those who wait for a change."""
        waited, self.changed = self.changed, asyncio.Event()
        waited.set()

    def begin(self) -> None:
        """Note that it runs now."""
        self.state, self.began = "running", time.time()
        self.tell()

    def end(self, state: State, *, error: str | None = None, at: float | None = None) -> None:
        """Note how it ended, now or at some time; the clock stops."""
        self.state, self.error, self.ended = state, error, time.time() if at is None else max(at, self.created)
        self.progress = self.progress.model_copy(update={"eta_seconds": None})
        self.tell()

    def complete(self, *, captures: list[int], notes: list[str], raw_bytes: int, stored_bytes: int) -> None:
        """Note that all of it is in the store."""
        self.captures, self.notes = captures, notes
        whole = {"rollouts": self.progress.of, "tokens": self.progress.tokens_total}
        written = {"raw_bytes": raw_bytes, "stored_bytes": stored_bytes}
        self.progress = self.progress.model_copy(update=whole | written)
        self.end("completed")

    def plan(self, *, rollouts: int, tokens: int, raw_bytes: int, skipped: int) -> None:
        """Note what there is to do."""
        self.progress = Progress(of=rollouts, tokens_total=tokens, raw_bytes_total=raw_bytes)
        self.skipped = skipped
        self.tell()

    def move(self, *, rollouts: int, raw_bytes: int, stored_bytes: int) -> None:
        """Note how far it is, in what is written."""
        now, total = time.time(), self.progress.raw_bytes_total
        since, before = self.progress_from = self.progress_from or (now, raw_bytes)
        speed = (raw_bytes - before) / (now - since) if now > since else 0.0
        self.progress = self.progress.model_copy(
            update={
                "rollouts": rollouts,
                "tokens": round(self.progress.tokens_total * raw_bytes / total) if total else 0,
                "raw_bytes": raw_bytes,
                "stored_bytes": stored_bytes,
                "eta_seconds": (total - raw_bytes) / speed if speed > 0 else None,
            }
        )
        self.tell()

    def status(self, *, ahead: int = 0) -> TaskStatus:
        """What is said of it now."""
        end = self.ended or time.time()
        return TaskStatus(
            task_id=self.id,
            status=self.state,
            experiment=self.order.experiment,
            prompt_set=self.order.prompt_set,
            model_variant=self.variant,
            layers=self.order.layers,
            components=self.order.components,
            store=self.store,
            created=datetime.fromtimestamp(self.created, UTC).isoformat(timespec="seconds"),
            elapsed=round(end - self.created, 3),
            duration=round(self.ended - self.began, 3) if self.ended and self.began else None,
            ahead=ahead,
            progress=self.progress,
            skipped=self.skipped,
            captures=self.captures,
            notes=self.notes,
            error=self.error,
            resumes=self.resumes,
        )

    def record(self) -> str:
        """Everything of it as JSON, and when that was written: a server that is killed says no more."""
        kept = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "changed"}
        order, progress = self.order.model_dump(mode="json"), self.progress.model_dump(mode="json")
        return json.dumps({**kept, "order": order, "progress": progress, _SAVED: time.time()})

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Task":
        """Read back what `record` wrote."""
        order, progress = CaptureOrder.model_validate(record["order"]), Progress.model_validate(record["progress"])
        kept = {name: value for name, value in record.items() if name != _SAVED}
        return cls(**{**kept, "order": order, "progress": progress, "progress_from": None})


class TaskFile:
    """The tasks of a server on disk. Used by one thread at a time.

    Parameters
    ----------
    path : Path
        Made where there is none.

    Raises
    ------
    sqlite3.Error
        The file is not what it should be, or can't be written.
    """

    def __init__(self, path: Path) -> None:
        self._base = sqlite3.connect(path, check_same_thread=False, timeout=10)
        try:
            with self._base:
                self._base.execute(_SCHEMA)
        except sqlite3.Error:
            self._base.close()
            raise

    def load(self) -> list[Task]:
        """Read the tasks, oldest first; those that had not ended were interrupted when a server last wrote here.

        Raises
        ------
        CaptureError
            A record is not what this version writes.
        """
        rows = self._base.execute("SELECT record FROM tasks ORDER BY created, rowid").fetchall()
        try:
            records = [json.loads(record) for (record,) in rows]
            tasks = [Task.of(record) for record in records]
            last = max((float(record.get(_SAVED) or record["created"]) for record in records), default=0.0)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise CaptureError(f"a task in it can't be read: {reason}") from error
        for task in tasks:
            if not task.over:
                task.end("interrupted", error=INTERRUPTED, at=last)
                self.save(task.id, task.created, task.record())
        return tasks

    def save(self, task_id: str, created: float, record: str) -> None:
        """Write a task, and forget those that are too old."""
        with self._base:
            self._base.execute("INSERT OR REPLACE INTO tasks VALUES (?, ?, ?)", (task_id, created, record))
            self._base.execute(
                "DELETE FROM tasks WHERE id NOT IN (SELECT id FROM tasks ORDER BY created DESC LIMIT ?)", (KEPT,)
            )

    def close(self) -> None:
        """Close the file."""
        self._base.close()
