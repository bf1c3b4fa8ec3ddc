"""Run a model over rollouts into a store: plan, forward batch by batch, commit. The main job, without a command line."""

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
from capture.tokenbytes import token_bytes
from datastore import layout
from datastore.dtype import upcast
from datastore.planning import plans_directory
from datastore.schema import Batch, Codec, Plan, Rollout
from datastore.writer import Writer

__all__ = ["Done", "Tick", "carry_out", "in_memory_provenance", "run"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """How far a capture is, after a batch."""

    rollouts: int
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
        Computed and stored by this call.
    raw_bytes, stored_bytes : int
        Of the chunks of the plans carried out, before and after compression.
    seconds : float
        Spent in the model and the writer.
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
        For `carry_out`: `part`, `memory`, `strict`, `tick`.

    Raises
    ------
    DatastoreError
        As `datastore.plan` and `datastore.create`.
    CaptureError
        As `run_batch`.
    """
    table = find_components(model, hook_paths=hook_paths)
    numbers = parse_layers(layers, table.n_layers) if isinstance(layers, str) else tuple(layers)
    used = sorted({int(i) for r in rollouts for i in np.unique(r.token_ids)})
    plans = datastore.plan(
        store,
        rollouts,
        layers=numbers,
        components=table.specs(components, numbers),
        provenance=provenance or in_memory_provenance(model, table),
        batch_tokens=batch_tokens or auto_batch_tokens(model.config, next(model.parameters()).device),
        codec=codec,
        most_tokens=most_tokens,
        vocab=token_bytes(tokenizer, used) if tokenizer is not None else {},
        replace=replace,
    )
    return carry_out(plans, model, store, table=table, **options)


def in_memory_provenance(model: nn.Module, table: ComponentTable) -> dict[str, Any]:
    """What a model that came from no known place says of itself; its weights are hashed as they are in memory."""
    import hashlib

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
    model: nn.Module,
    store: str | os.PathLike[str],
    *,
    table: ComponentTable,
    part: tuple[int, int] = (1, 1),
    memory: int = 1 << 30,
    strict: bool = False,
    environment: Mapping[str, Any] | None = None,
    tick: Callable[[Tick], object] = lambda _: None,
) -> Done:
    """Fill and commit plans with a model.

    Parameters
    ----------
    plans : sequence of Plan
        From `datastore.plan`.
    model : nn.Module
    store : path
    table : ComponentTable
        Found in `model`.
    part : (int, int)
        Part i of N of every plan.
    memory : int
        Bytes the writer may hold.
    strict : bool
        Fail at the first non-finite value instead of storing and counting it.
    environment : mapping, optional
        Versions, device and threads of this process. A plan begun elsewhere is refused where versions or device differ;
        its number of threads is taken over.
    tick : callable
        Told after each batch.
    """
    done, began = Done(), time.monotonic()
    for plan in plans:
        threads = torch.get_num_threads()
        _take_over(plan, environment, store)
        try:
            with datastore.create(store, plan, part=part, memory=memory) as writer:
                _fill(writer, model, table, done=done, strict=strict, tick=tick)
                number = writer.commit()
        finally:
            torch.set_num_threads(threads)
        if number is None:
            done.pending += 1
        else:
            done.captures.append(number)
        state = writer.progress()
        done.raw_bytes += state.raw_bytes
        done.stored_bytes += state.stored_bytes
    done.seconds = time.monotonic() - began
    return done


def _take_over(plan: Plan, now: Mapping[str, Any] | None, store: str | os.PathLike[str]) -> None:
    """Compute as the plan was begun: its number of threads, and no other versions or device."""
    then = plan.provenance.get("environment") or {}
    if then.get("threads"):
        torch.set_num_threads(int(then["threads"]))
    for name in ("versions", "device"):
        if now is not None and name in then and then[name] != now.get(name):
            changed = _difference(then[name], now.get(name))
            raise CaptureError(
                f"this capture was begun with {changed[0]} and now runs with {changed[1]}, so its rows would not be the "
                f"same bits; go on with {changed[0]}, or delete {plans_directory(Path(store)) / plan.key} to begin anew"
            )


def _difference(then: Any, now: Any) -> tuple[str, str]:
    if not isinstance(then, Mapping) or not isinstance(now, Mapping):
        return str(then), str(now)
    names = [n for n in sorted({*then, *now}) if then.get(n) != now.get(n)]
    return tuple(", ".join(f"{n} {side.get(n)}" for n in names) for side in (then, now))  # type: ignore[return-value]


def _fill(
    writer: Writer,
    model: nn.Module,
    table: ComponentTable,
    *,
    done: Done,
    strict: bool,
    tick: Callable[[Tick], object],
) -> None:
    plan = writer.plan
    for batch in writer.todo():

        def put(component: str, layer: int, rollout_id: str, values: NDArray[Any], *, start: int) -> None:
            if rollout_id not in stored:
                return
            if strict:
                _refuse_nonfinite(values, component=component, layer=layer, rollout_id=rollout_id, start=start)
            writer.put(component, layer, rollout_id, values, start=start)

        def on_halve(what: Halved, batch: Batch = batch) -> None:
            done.notes.append(_record(writer, batch, what))

        stored = frozenset(batch.stored)
        run_batch(
            model,
            table,
            [(name, plan.tokens(batch, name)) for name in batch.members],
            layers=plan.layers,
            components=[c.name for c in plan.components],
            put=put,
            on_halve=on_halve,
        )
        done.rollouts += len(stored)
        done.tokens += sum(plan.rollouts[plan.rows[name]].n_tokens for name in stored)
        state = writer.progress()
        tick(
            Tick(
                rollouts=done.rollouts,
                tokens=done.tokens,
                raw_bytes=done.raw_bytes + state.raw_bytes,
                stored_bytes=done.stored_bytes + state.stored_bytes,
            )
        )


def _record(writer: Writer, batch: Batch, what: Halved) -> str:
    """Write down that a batch did not fit, so that a resumed or later capture computes the same way; say it."""
    if what.into:
        writer.halved(batch.of(what.rollout_ids), [batch.of(members) for members in what.into])
        return f"a batch of {len(what.rollout_ids)} rollouts did not fit in memory and was halved"
    name = what.rollout_ids[0]
    split = {"rollout_id": name, "from_token": what.from_token, "piece_tokens": what.piece_tokens}
    writer.note("split", split)
    return f"rollout {name} did not fit in memory and was computed in pieces of {what.piece_tokens} tokens"


def _refuse_nonfinite(values: NDArray[Any], *, component: str, layer: int, rollout_id: str, start: int) -> None:
    bad = ~np.isfinite(upcast(values)).all(axis=1)
    if bad.any():
        raise RequestError(
            f"{component} at layer {layer} of rollout {rollout_id!r} is not finite at token {start + int(bad.argmax())} "
            f"({int(bad.sum())} tokens in all); --strict stops here and commits nothing, leave it out to store and count"
        )
