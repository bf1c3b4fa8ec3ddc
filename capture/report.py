"""What a capture says of itself: its plans before, its summary after, for people and as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from capture.request import Request
from capture.runner import Done, expected_bytes
from datastore import console, storage
from datastore.layout import n_chunks
from datastore.schema import Plan

__all__ = ["report_done", "report_plans"]

WRITING = 0.45e9
"""Raw bytes a second that two cores of the machine of docs/LOG.md compressed, counted and wrote; a model on a CPU is
slower than that, so it bounds the time from below."""


def report_plans(request: Request, plans: Sequence[Plan], *, memory: int, hashed: bool, as_json: bool) -> None:
    """Say what would be captured.

    Parameters
    ----------
    hashed : bool
        Whether the weights' hash is known: where not, the plans' keys are not either.
    """
    report: dict[str, Any] = {
        "store": request.store,
        "model": request.info.model_id,
        "asked": {"rollouts": len(request.rendered), "layers": request.layers, "components": request.components},
        "weights_hashed": hashed,
        "free_bytes": storage.free_bytes(request.store),
        "plans": [_plan(p, memory=memory, hashed=hashed) for p in plans],
    }
    if as_json:
        console.emit_json(report)
        return
    if not plans:
        print(f"{request.store} holds all of it already; nothing would be captured")
    for one in report["plans"]:
        print(
            f"would capture {one['rollouts']} rollouts, {one['tokens']:,} tokens, layers {ranges(one['layers'])}, "
            f"{', '.join(one['components'])} of {request.info.model_id}: {one['batches']} batches of up to "
            f"{one['batch_tokens']:,} padded tokens, {one['chunks']:,} chunks, {console.human_bytes(one['raw_bytes'])} "
            f"raw, about {console.human_bytes(one['expected_bytes'])} on disk "
            f"({console.human_bytes(report['free_bytes'])} free), {console.human_bytes(memory)} of memory for writing, "
            f"{_duration(one['write_seconds'])} to write at {WRITING / 1e9:.2f} GB/s, beside the model's own time"
        )
    if plans and not hashed:
        print("the weights were not read, so that the plan's key is not known yet")


def _plan(plan: Plan, *, memory: int, hashed: bool) -> dict[str, Any]:
    return {
        "key": plan.key if hashed else None,
        "rollouts": len(plan.rollouts),
        "tokens": plan.n_tokens,
        "layers": list(plan.layers),
        "components": {c.name: {"width": c.width, "dtype": c.dtype, "hook": c.hook} for c in plan.components},
        "batches": len(plan.batches),
        "batch_tokens": plan.batch_tokens,
        "chunks": sum(n_chunks(plan.n_tokens, plan.chunk_tokens[c.name]) * len(plan.layers) for c in plan.components),
        "raw_bytes": plan.raw_bytes,
        "expected_bytes": expected_bytes(plan),
        "memory": memory,
        "write_bytes_per_second": WRITING,
        "write_seconds": plan.raw_bytes / WRITING,
    }


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min"


def report_done(request: Request, done: Done, *, skipped: int, as_json: bool) -> None:
    """Say what was captured, what is odd about it, and what to type next."""
    nonfinite, named = _nonfinite(request.store, done.captures)
    if as_json:
        console.emit_json(
            {
                "store": request.store,
                **asdict(done),
                "skipped": skipped,
                "tokens_per_second": done.tokens / done.seconds if done.tokens else None,
                "ratio": done.raw_bytes / done.stored_bytes if done.stored_bytes else None,
                "nonfinite": nonfinite,
                "nonfinite_tokens": named,
            }
        )
        return
    for line in _summary(request, done, skipped):
        print(line)
    for note in done.notes:
        console.warn(note)
    for one in named:
        console.warn(
            f"not finite: {one['component']} at layer {one['layer']} of rollout {one['rollout_id']!r}, "
            f"token {one['position']}"
        )
    if sum(nonfinite.values()):
        console.warn(f"{sum(nonfinite.values()):,} values are not finite; they are stored as they are")


def _summary(request: Request, done: Done, skipped: int) -> list[str]:
    lines = []
    if done.captures:
        lines.append(
            f"captured {done.rollouts} rollouts, {done.tokens:,} tokens, layers {ranges(request.layers)} of "
            f"{', '.join(request.components)} from {request.info.model_id} in {done.seconds:.1f} s: "
            f"{console.human_bytes(done.raw_bytes)} raw, {console.human_bytes(done.stored_bytes)} stored"
            + (f" ({done.raw_bytes / done.stored_bytes:.2f}x)" if done.stored_bytes else "")
        )
    if skipped:
        lines.append(f"{skipped} of {len(request.rendered)} rollouts were in the store already and were skipped")
    if done.pending:
        lines.append("this part is done; the capture is committed when its other parts are done")
    return [*lines, f"next: python -m datastore info {request.store}; python -m datastore verify {request.store}"]


def _nonfinite(store: Path, captures: Sequence[int]) -> tuple[dict[str, int], list[Mapping[str, Any]]]:
    """Count what is not finite by component, over the captures just made, and name the first places."""
    total: dict[str, int] = {}
    named: list[Mapping[str, Any]] = []
    for number in captures:
        attrs = storage.attributes(store / "captures" / f"{number:04d}")
        for component, count in attrs.get("nonfinite", {}).items():
            total[component] = total.get(component, 0) + count
        named.extend(attrs.get("nonfinite_tokens", []))
    return total, named


def ranges(numbers: Sequence[int]) -> str:
    """Write layer numbers short: 0-4, 10, 15.

    Examples
    --------
    >>> ranges([0, 1, 2, 10])
    '0-2, 10'
    """
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][-1] == n - 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)
