"""Run a model over rollouts into a store: plan, forward batch by batch, commit. The main job without a command line."""

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import datastore
from capture.batching import auto_batch_tokens
from capture.components import ComponentTable, find_components
from capture.errors import CaptureError, RequestError
from capture.forward import Halved, run_batch
from capture.layerspec import parse_layers
from capture.memorylog import log_memory
from capture.processes import launched
from capture.staging import Staging
from capture.tokenbytes import token_bytes
from datastore import layout, storage
from datastore.chunkprocesses import prepare
from datastore.dtype import upcast
from datastore.planning import plans_directory
from datastore.schema import Batch, Codec, Plan, Rollout
from datastore.stats import WORTH_COMPILING
from datastore.union import load_union
from datastore.writer import Writer

__all__ = ["Done", "Source", "Tick", "carry_out", "expected_bytes", "in_memory_provenance", "run"]

Source = Callable[[], tuple[nn.Module, ComponentTable]]
"""Gives the model and its components; called once, and only when something is left to compute."""

MOST_ROWS = 4 << 30
"""Bytes of rows of one rollout at which it is computed in pieces: all rows of a forward wait in host memory."""

_LEAST_PIECE = 16

_RATIO = {"bfloat16": 1.43, "float16": 1.2, "float32": 1.15, "float64": 1.1}
"""Compression to expect of a dtype, for estimates only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """How far a capture is: rollouts done of all, tokens computed by this call, bytes of chunks."""

    rollouts: int
    of: int
    tokens: int
    raw_bytes: int
    stored_bytes: int


@dataclass(slots=True, kw_only=True)
class Done:
    """What a call captured.

    Attributes
    ----------
    captures : list of int
        Numbers committed, ascending; empty where the store had everything or other parts are not done.
    pending : int
        Plans of which other parts are not done.
    rollouts, tokens : int
        Computed and stored by this call; where there are several plans, tokens count once for each.
    raw_bytes, stored_bytes : int
        Of the chunks of the plans carried out, before and after compression.
    seconds : float
        Spent in the model's forwards and the writer; loading is not counted.
    notes : list of str
        What happened that a reader of the data should know: batches halved, rollouts split.
    """

    captures: list[int] = field(default_factory=list)
    pending: int = 0
    rollouts: int = 0
    tokens: int = 0
    raw_bytes: int = 0
    stored_bytes: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)


def run(
    model: nn.Module,
    tokenizer: Any,
    rollouts: Sequence[Rollout],
    store: str | os.PathLike[str],
    *,
    layers: str | Sequence[int] = "all",
    components: Sequence[str] = ("residual",),
    provenance: Mapping[str, Any] | None = None,
    batch_tokens: int | None = None,
    codec: Codec | None = None,
    most_tokens: int = layout.MOST_TOKENS,
    hook_paths: Mapping[str, str] | None = None,
    replace: bool = False,
    **options: Any,
) -> Done:
    """Capture rollouts with a model that is already loaded.

    Parameters
    ----------
    model : nn.Module
        Any transformers model; only its decoder runs.
    tokenizer : transformers tokenizer or None
        Gives the bytes of the token ids used, so that the text is readable without it.
    rollouts : sequence of Rollout
    store : path
    layers : str or sequence of int
        Layer numbers, or a spec such as "all", "5-20", "50%".
    components : sequence of str
    provenance : mapping, optional
        JSON with `model`, `tokenizer`, `settings`, `environment`; default what the model itself says, with a hash of
        its weights in memory.
    batch_tokens : int, optional
        Padded tokens a batch; default from the model and device.
    codec : Codec, optional
    most_tokens : int
        Most tokens of a chunk.
    hook_paths : mapping, optional
        Component to module path, for architectures that are not known.
    replace : bool
        Capture again what is there; the new capture counts.
    **options
        For `carry_out`: `part`, `memory`, `strict`, `tick`, `processes`.

    Raises
    ------
    DatastoreError
        As `datastore.plan` and `datastore.create`.
    CaptureError
        As `run_batch`.
    """
    table = find_components(model, hook_paths=hook_paths)
    numbers = parse_layers(layers, table.n_layers) if isinstance(layers, str) else tuple(layers)
    specs = table.specs(components, numbers)
    helping = options.get("processes")
    if helping or (helping is None and _writing_processes()):
        rows = sum(r.n_tokens for r in rollouts) * len(numbers) * sum(c.width * c.itemsize for c in specs)
        prepare(compiled=rows >= WORTH_COMPILING)
    known = dict(provenance or in_memory_provenance(model, table))
    plans = datastore.plan(
        store,
        rollouts,
        layers=numbers,
        components=specs,
        provenance=known,
        batch_tokens=batch_tokens or auto_batch_tokens(model.config, next(model.parameters()).device),
        codec=codec,
        most_tokens=most_tokens,
        vocab=token_bytes(tokenizer, _ids_used(rollouts)) if tokenizer is not None else {},
        replace=replace,
    )
    return carry_out(plans, store, source=lambda: (model, table), environment=known.get("environment"), **options)


def _ids_used(rollouts: Sequence[Rollout]) -> list[int]:
    found: list[int] = np.unique(np.concatenate([np.unique(r.computed_ids) for r in rollouts])).tolist()
    return found


def in_memory_provenance(model: nn.Module, table: ComponentTable) -> dict[str, Any]:
    """What a model that came from no known place says of itself; its weights are hashed as they are in memory."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    config: Any = model.config
    return {
        "model": {
            "name": config._name_or_path or table.model_type,
            "model_type": table.model_type,
            "weights_sha256": digest.hexdigest(),
            "dtype": table.dtype,
            "hidden_size": table.hidden,
        },
        "environment": {
            "device": str(next(model.parameters()).device),
            "threads": torch.get_num_threads(),
            "versions": {"torch": torch.__version__},
        },
    }


def carry_out(
    plans: Sequence[Plan],
    store: str | os.PathLike[str],
    *,
    source: Source,
    part: tuple[int, int] = (1, 1),
    memory: int = 1 << 30,
    strict: bool = False,
    environment: Mapping[str, Any] | None = None,
    processes: int | None = None,
    tick: Callable[[Tick], object] = lambda _: None,
) -> Done:
    """Fill and commit plans with a model.

    Parameters
    ----------
    plans : sequence of Plan
        From `datastore.plan`.
    store : path
    source : callable
        Gives the model and its components; called only where something is left to compute.
    part : (int, int)
        Part i of N of every plan.
    memory : int
        Bytes the writer may hold.
    strict : bool
        Fail at the first non-finite value instead of storing and counting it.
    environment : mapping, optional
        Versions, device and threads of this process. A plan begun elsewhere is refused where versions or device differ;
        its number of threads is taken over.
    processes : int, optional
        Processes that compress and write, 0 for threads of this one; default as many as CPUs beside a GPU, which waits
        where threads take the interpreter lock from the model's, and else threads.
    tick : callable
        Told when the model is there, and after each batch.

    Raises
    ------
    DatastoreError
        As `datastore.create` and `Writer.commit`.
    CaptureError
        As `run_batch`; where the disk has not the room; where the plan was begun in another environment.
    """
    done, loaded = Done(), _Loaded(source)
    helping = _writing_processes() if processes is None else processes
    _refuse_full_disk(Path(store), plans)
    for plan in plans:
        began, loading = time.monotonic(), loaded.seconds
        with (
            _as_begun(plan, environment, store),
            datastore.create(store, plan, part=part, memory=memory, processes=helping) as writer,
        ):
            _Filling(writer=writer, store=Path(store), done=done, strict=strict, tick=tick).fill(loaded)
            number = writer.commit()
        if number is None:
            done.pending += 1
        else:
            done.captures.append(number)
        state = writer.progress()
        done.raw_bytes += state.raw_bytes
        done.stored_bytes += state.stored_bytes
        done.seconds += time.monotonic() - began - (loaded.seconds - loading)
    return done


class _Loaded:
    """The model, loaded at its first use; how long that took."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._found: tuple[nn.Module, ComponentTable] | None = None
        self.seconds = 0.0

    def get(self) -> tuple[nn.Module, ComponentTable]:
        if self._found is None:
            began = time.monotonic()
            self._found = self._source()
            self.seconds = time.monotonic() - began
        return self._found


def _writing_processes() -> int:
    """Beside a GPU, this process's share of the machine's CPUs."""
    if not torch.cuda.is_available() or not hasattr(os, "memfd_create"):
        return 0
    launch = launched()
    return max(1, len(os.sched_getaffinity(0)) // (launch.neighbours if launch else 1))


def expected_bytes(plan: Plan) -> int:
    """Estimate the bytes of a plan's chunks on disk."""
    rows = plan.n_tokens * len(plan.layers)
    return int(sum(rows * c.width * c.itemsize / _RATIO[c.dtype] for c in plan.components))


def _refuse_full_disk(store: Path, plans: Sequence[Plan]) -> None:
    need = 0
    for plan in plans:
        directory = plans_directory(store) / plan.key
        there = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
        need += max(0, expected_bytes(plan) - there)
    free = storage.free_bytes(store)
    if need > free:
        raise CaptureError(
            f"about {need:,} bytes are still to be written to {store} and {free:,} bytes are free, so they would not "
            "fit; nothing was computed, make room, ask for fewer layers, components or rollouts, or use another disk"
        )


@contextmanager
def _as_begun(plan: Plan, now: Mapping[str, Any] | None, store: str | os.PathLike[str]) -> Iterator[None]:
    """Compute as the plan was begun: its number of threads while this lasts, and no other versions or device."""
    then = plan.provenance.get("environment") or {}
    for name in ("versions", "device"):
        if now is not None and name in then and then[name] != now.get(name):
            before, after = _difference(then[name], now.get(name))
            raise CaptureError(
                f"this capture was begun with {before} and now runs with {after}, so its rows would not be the same "
                f"bits; go on with {before}, or delete {plans_directory(Path(store)) / plan.key} to begin anew"
            )
    threads = torch.get_num_threads()
    torch.set_num_threads(int(then.get("threads") or threads))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _difference(then: Any, now: Any) -> tuple[str, str]:
    if not isinstance(then, Mapping) or not isinstance(now, Mapping):
        return str(then), str(now)
    names = [n for n in sorted({*then, *now}) if then.get(n) != now.get(n)]
    return ", ".join(f"{n} {then.get(n)}" for n in names), ", ".join(f"{n} {now.get(n)}" for n in names)


@dataclass(slots=True, kw_only=True)
class _Filling:
    """One plan while it is filled."""

    writer: Writer
    store: Path
    done: Done
    strict: bool
    tick: Callable[[Tick], object]
    of: int = 0
    left: int = 0

    def fill(self, loaded: _Loaded) -> None:
        """Compute every batch of which rows are missing."""
        todo = self.writer.todo()
        if not todo:
            return
        model, table = loaded.get()
        pieces = _pieces(self.store, self.writer)
        self.of, self.left = len(self.writer.plan.rollouts), sum(len(batch.stored) for batch in todo)
        self._tell()
        with Staging() as staging:
            for batch in todo:
                piece = pieces.get(batch.members[0]) or self._piece(batch)
                self._batch(model, table, batch, piece_tokens=piece, staging=staging)

    def _piece(self, batch: Batch) -> int | None:
        """Tokens a piece of a rollout whose rows would be too many at once; written down for layers that come later."""
        plan, name = self.writer.plan, batch.members[0]
        row = sum(c.width * c.itemsize for c in plan.components) * len(plan.layers)
        if len(batch.members) > 1 or plan.tokens(batch, name).size * row <= MOST_ROWS:
            return None
        piece = max(_LEAST_PIECE, MOST_ROWS // row)
        self.writer.note("split", {"rollout_id": name, "from_token": 0, "piece_tokens": piece})
        self.done.notes.append(f"rollout {name!r} has too many rows for one forward: pieces of {piece} tokens")
        return piece

    def _batch(
        self, model: nn.Module, table: ComponentTable, batch: Batch, *, piece_tokens: int | None, staging: Staging
    ) -> None:
        plan, stored = self.writer.plan, frozenset(batch.stored)
        run_batch(
            model,
            table,
            [(name, plan.tokens(batch, name)) for name in batch.members],
            layers=plan.layers,
            components=[c.name for c in plan.components],
            put=partial(self._put, stored=stored, staging=staging),
            on_halve=partial(self._halved, batch),
            piece_tokens=piece_tokens,
            staging=staging,
        )
        log_memory(batch.members)
        self.left -= len(stored)
        self.done.rollouts += len(stored)
        self.done.tokens += sum(plan.rollouts[plan.rows[name]].n_tokens for name in stored)
        self._tell()

    def _put(
        self,
        component: str,
        layer: int,
        rollout_id: str,
        values: NDArray[Any],
        *,
        start: int,
        stored: frozenset[str],
        staging: Staging,
    ) -> None:
        if rollout_id not in stored:
            return
        plan = self.writer.plan
        first = start - plan.rollouts[plan.rows[rollout_id]].n_prefix
        values, first = values[max(0, -first) :], max(0, first)
        if self.strict:
            _refuse_nonfinite(values, component=component, layer=layer, rollout_id=rollout_id, start=first)
        if len(values):
            self.writer.put(component, layer, rollout_id, values, start=first, copy=staging.used)

    def _halved(self, batch: Batch, what: Halved) -> None:
        """Write down that a batch did not fit, so that a resumed or later capture computes the same way; say it."""
        if what.into:
            self.writer.halved(batch.of(what.rollout_ids), [batch.of(members) for members in what.into])
            note = f"a batch of {len(what.rollout_ids)} rollouts did not fit in memory and was halved"
        else:
            name = what.rollout_ids[0]
            split = {"rollout_id": name, "from_token": what.from_token, "piece_tokens": what.piece_tokens}
            self.writer.note("split", split)
            note = f"rollout {name!r} did not fit in memory and was computed in pieces of {what.piece_tokens} tokens"
        self.done.notes.append(note)

    def _tell(self) -> None:
        state = self.writer.progress()
        self.tick(
            Tick(
                rollouts=self.of - self.left,
                of=self.of,
                tokens=self.done.tokens,
                raw_bytes=self.done.raw_bytes + state.raw_bytes,
                stored_bytes=self.done.stored_bytes + state.stored_bytes,
            )
        )


def _pieces(store: Path, writer: Writer) -> dict[str, int]:
    """Tokens a piece of each rollout that was split for memory before, in this plan or when its other layers were."""
    noted = [c.attrs["provenance"].get("notes", {}) for c in load_union(store).captures]
    found: dict[str, int] = {}
    for notes in [*noted, writer.notes()]:
        here: dict[str, int] = {}
        for one in notes.get("split", []):
            if one["from_token"] == 0:
                here[one["rollout_id"]] = min(one["piece_tokens"], here.get(one["rollout_id"], one["piece_tokens"]))
        found |= here
    return found


def _refuse_nonfinite(values: NDArray[Any], *, component: str, layer: int, rollout_id: str, start: int) -> None:
    bad = ~np.isfinite(upcast(values)).all(axis=1)
    if bad.any():
        raise RequestError(
            f"{component} at layer {layer} of rollout {rollout_id!r} is not finite at token "
            f"{start + int(bad.argmax())} (one of {int(bad.sum())} tokens); --strict stops here and nothing was "
            "committed, leave it out to store and count such values"
        )
