"""A power cut at every point: what a process did to files is recorded, and replayed as a disk may have kept it.

Recorded is each operation that changes a directory or a file below one directory, and each sync, in order. What no sync
followed may be lost, singly and in any choice: an entry without its file's bytes, a file without its entry, a later
operation without an earlier one. That is more than journaling file systems allow themselves, and what POSIX permits.
Only a rename is one operation: it happened or it did not.
"""

from __future__ import annotations

import os
import pickle
import random
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from datastore import storage

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclass(frozen=True, slots=True)
class Op:
    """One recorded operation: its name, the paths it is about, and for `data` the content."""

    name: str
    paths: tuple[str, ...] = ()
    data: bytes = b""


class Recorder:
    """Records what this process does below a directory, by the interpreter's own audit events.

    Python tells of every open, rename, link, unlink, mkdir and rmdir before it is done; what was written since is read
    from the files themselves at that time.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.ops = str(root), list[Op]()
        self._written: dict[str, bytes] = {}
        self._lock, self._owner = threading.RLock(), 0
        self._fsync, self._sync_files = os.fsync, storage.sync_files
        sys.addaudithook(self._hook)
        os.fsync = self._on_fsync  # type: ignore[assignment]
        storage.sync_files = self._on_sync_files

    def finish(self) -> list[Op]:
        """Return what was recorded."""
        with self._lock:
            self._look()
            return list(self.ops)

    def note(self, what: str) -> None:
        """Record a moment."""
        with self._lock:
            self._look()
            self.ops.append(Op(what))

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        names = {"os.rename": 2, "os.link": 2, "os.remove": 1, "os.mkdir": 1, "os.rmdir": 1}
        if threading.get_ident() == self._owner:
            return  # our own look
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING:
            self._add("open", [self._path(arguments[0], -1)])
        elif event in names:
            n = names[event]
            descriptors = arguments[n:] if event in ("os.rename", "os.link") else arguments[-1:]
            descriptors = tuple(descriptors) + (-1,) * n
            self._add(event[3:], [self._path(one, at) for one, at in zip(arguments[:n], descriptors, strict=False)])

    def _path(self, path: Any, descriptor: int) -> str:
        if isinstance(path, int):
            return os.readlink(f"/proc/self/fd/{path}")
        text = os.fsdecode(path)
        base = os.readlink(f"/proc/self/fd/{descriptor}") if descriptor >= 0 else os.getcwd()
        return os.path.normpath(os.path.join(base, text))

    def _add(self, name: str, paths: list[str]) -> None:
        if not any(path.startswith(self.root + "/") for path in paths):
            return
        with self._lock:
            self._look()
            if name == "open":
                self._written.setdefault(paths[0], b"")
            self.ops.append(Op(name, tuple(os.path.relpath(path, self.root) for path in paths)))
            if name in ("rename", "remove"):
                self._written.pop(paths[0], None)

    def _look(self) -> None:
        """Record what was written to files since the last operation."""
        self._owner = threading.get_ident()
        try:
            for path, known in self._written.items():
                with suppress(OSError):
                    now = Path(path).read_bytes()
                    if now != known:
                        self._written[path] = now
                        self.ops.append(Op("data", (os.path.relpath(path, self.root),), now))
        finally:
            self._owner = 0

    def _on_fsync(self, descriptor: int) -> None:
        self._fsync(descriptor)
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if path == self.root or path.startswith(self.root + "/"):
            with self._lock:
                self._look()
                self.ops.append(Op("fsync", (os.path.relpath(path, self.root),)))

    def _on_sync_files(self, path: Path, descriptor: int | None = None) -> None:
        with self._lock:
            self._look()
        self._sync_files(path, descriptor)
        with self._lock:
            self.ops.append(Op("syncfs"))


def record(root: str, log: str, call: str, *words: str) -> None:
    """Run `module:function` with words, and leave what it did below `root` in the file `log`."""
    module, _, function = call.partition(":")
    task = getattr(import_module(module), function)
    recorder = Recorder(Path(root))
    try:
        task(*words)
    except SystemExit as left:
        if left.code:
            raise
    recorder.note("done")
    Path(log).write_bytes(pickle.dumps([(one.name, one.paths, one.data) for one in recorder.finish()]))


def recorded(log: Path) -> list[Op]:
    """Read what `record` left."""
    return [Op(*one) for one in pickle.loads(log.read_bytes())]


# -- what a disk may have kept -----------------------------------------------------------------------------------------

Effect = tuple[tuple[Any, ...], ...]
"""What happens at once: ("enter", directory, name, number), ("leave", directory, name), ("data", number, content)."""


@dataclass(slots=True)
class Disk:
    """Files and directories by number; 0 is the root. What no directory names is there and can't be found."""

    entries: dict[int, dict[str, int]] = field(default_factory=lambda: {0: {}})
    content: dict[int, bytes] = field(default_factory=dict)

    def copy(self) -> Disk:
        """Return a disk of its own."""
        return Disk({n: dict(one) for n, one in self.entries.items()}, dict(self.content))

    def find(self, path: str) -> int | None:
        """Return the number of what is at a path."""
        at: int | None = 0
        for part in [] if path == "." else path.split("/"):
            at = self.entries.get(at, {}).get(part) if at is not None else None
        return at

    def new(self, *, directory: bool) -> int:
        """Return the number of a new file or directory that is empty."""
        number = len(self.entries) + len(self.content)
        if directory:
            self.entries[number] = {}
        else:
            self.content[number] = b""
        return number

    def load(self, root: Path, at: int = 0) -> None:
        """Take over what is below a real directory."""
        for path in sorted(root.iterdir()):
            number = self.new(directory=path.is_dir())
            self.entries[at][path.name] = number
            if path.is_dir():
                self.load(path, number)
            else:
                self.content[number] = path.read_bytes()

    def effect(self, op: Op) -> Effect:
        """Return what an operation does, by numbers; nothing where it fails."""
        at = self.find(op.paths[0]) if op.paths else None
        (first, name), (last, other) = [self._place(path) for path in (*op.paths, "", "")][:2]
        if op.name == "data" and at is not None:
            return (("data", at, op.data),)
        if op.name in ("open", "mkdir") and at is None and first is not None:
            return (("enter", first, name, self.new(directory=op.name == "mkdir")),)
        if at is None:
            return ()
        if (op.name == "remove" and at in self.content) or (op.name == "rmdir" and not self.entries.get(at, "file")):
            return (("leave", first, name),)
        there = self.find(op.paths[-1])
        if op.name == "link" and there is None and last is not None:
            return (("enter", last, other, at),)
        if op.name == "rename" and last is not None and (there is None or not self.entries.get(there)):
            return ("enter", last, other, at), ("leave", first, name)
        return ()

    def _place(self, path: str) -> tuple[int | None, str]:
        directory, _, name = path.rpartition("/")
        return self.find(directory or "."), name

    def apply(self, effect: Effect) -> None:
        """Carry out an effect."""
        for kind, number, *rest in effect:
            if kind == "data":
                self.content[number] = rest[0]
            elif kind == "enter":
                self.entries[number][rest[0]] = rest[1]
            else:
                self.entries[number].pop(rest[0], None)

    def write(self, root: Path, at: int = 0) -> None:
        """Make real files of it."""
        root.mkdir()
        for name, number in self.entries[at].items():
            if number in self.content:
                (root / name).write_bytes(self.content[number])
            else:
                self.write(root / name, number)

    def fingerprint(self, at: int) -> int:
        """Return a hash of a directory and all in it but leftovers, whose names no reader looks at."""
        below = [
            (name, hash(self.content[n]) if n in self.content else self.fingerprint(n))
            for name, n in sorted(self.entries[at].items())
            if not name.endswith(".partial")
        ]
        return hash(tuple(below))


@dataclass(slots=True)
class Cut:
    """What may be found after a power cut: how, after how many operations, and whether the work was done by then."""

    how: str
    after: int
    done: bool
    disk: Disk


def cuts(before: Path, ops: Iterable[Op], choice: random.Random, *, samples: int, every: int = 1) -> Iterator[Cut]:
    """Yield what the disk may hold after each operation, or after every rename and sync and some of the others.

    That is all of it; only what was synced; entries without bytes; bytes without entries; and samples of any choice,
    some with bytes cut short.
    """
    now, waiting, done = Disk(), list[Effect](), False
    now.load(before)
    safe = now.copy()
    for index, op in enumerate(ops):
        done |= op.name == "done"
        if op.name in ("syncfs", "fsync"):
            number = now.find(op.paths[0]) if op.paths else None
            kept = [one for one in waiting if op.name == "syncfs" or any(part[1] == number for part in one)]
            for one in kept:
                safe.apply(one)
            waiting = [one for one in waiting if one not in kept]
        elif effect := now.effect(op):
            safe.entries.update({n: {} for n in now.entries.keys() - safe.entries.keys()})
            safe.content.update(dict.fromkeys(now.content.keys() - safe.content.keys(), b""))
            now.apply(effect)
            waiting.append(effect)
        if index % every and op.name not in ("rename", "fsync", "syncfs", "done"):
            continue
        for how, kept in _kept(waiting, choice, samples=samples):
            disk = safe.copy()
            for one in kept:
                disk.apply(one)
            yield Cut(how, index, done, disk)


def _kept(waiting: list[Effect], choice: random.Random, *, samples: int) -> Iterator[tuple[str, list[Effect]]]:
    yield "all", waiting
    if not waiting:
        return
    yield "synced only", []
    yield "entries only", [one for one in waiting if one[0][0] != "data"]
    yield "bytes only", [one for one in waiting if one[0][0] == "data"]
    yield "last only", waiting[-1:]
    for _ in range(samples):
        share, torn = choice.random(), choice.random() < 0.3
        kept = [one for one in waiting if choice.random() < share]
        yield "some", [_torn(one, choice.random()) if torn else one for one in kept]


def _torn(effect: Effect, share: float) -> Effect:
    """Cut bytes short."""
    return tuple((*part[:2], part[2][: int(share * len(part[2]))]) if part[0] == "data" else part for part in effect)
