"""Complete a plan's group from its partials and publish it: the one rename that makes a capture exist."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from datastore import layout, parts, storage
from datastore.combine import Pending
from datastore.errors import CorruptError, DatastoreError, PlanError
from datastore.partials import chunks_within, grid_index
from datastore.schema import Plan
from datastore.union import load_drops, load_union, plan_of

__all__ = ["commit_group", "committed_as"]


def commit_group(
    store: Path, directory: Path, pending: Pending, *, done: tuple[int, int], sync: Callable[[], None]
) -> int | None:
    """Complete and publish the plan if the tokens `done`, which are written, were the last; else record them as done.

    Of several processes that come here at once one publishes and the others return the same number. What is recorded
    or published was synced before. The last part is synced with the statistics, after the partials that they were added
    up from are deleted: what the disk has not taken of those by then it need not take.

    Parameters
    ----------
    store, directory : Path
    pending : Pending
        The statistics.
    done : (int, int)
    sync : callable
        Brings all to disk that this process wrote, or raises.

    Returns
    -------
    int or None
        The capture's number; None where a part is not done.

    Raises
    ------
    ConflictError
        Meanwhile another capture brought one of the rollouts with other tokens or from another model.
    CorruptError
        A chunk of a part that was done is gone; its part is to do again.
    """
    group, plan, records = directory / "group", pending.combiner.plan, directory / "parts"
    try:
        synced = bool(parts.unfinished(records, plan.n_tokens, besides=done))
        if synced:
            sync()  # before the lock, for which the others would wait
        with parts.locked(records):
            if parts.unfinished(records, plan.n_tokens, besides=done):
                if not synced:
                    sync()
                parts.mark_done(records, start=done[0], stop=done[1])
                return None
            seen = storage.numbered(store / "captures")
            if not plan.replace:
                load_union(store).refuse_conflicts(plan.rollouts, plan.provenance, store=store)
            stored = _stored_bytes(directory, plan, done=done, sync=sync)
            counted = pending.finish() if plan.statistics else {}
            _clear_leftovers(group, plan)
            pending.combiner.partials.clear()
            sync()
            _describe(group, counted | {"stored_bytes": stored}, notes=pending.combiner.partials.notes())
            with parts.changing(store):
                if not plan.replace and storage.numbered(store / "captures") != seen:
                    load_union(store).refuse_conflicts(plan.rollouts, plan.provenance, store=store)
                used = [number for drop in load_drops(store) for number in drop.captures]
                number = storage.publish(group, store / "captures", above=max(used, default=0))
            storage.discard(directory)
    except PlanError:
        if group.is_dir():
            raise
        return committed_as(store, plan)
    with suppress(OSError):
        directory.parent.rmdir()  # where no other plan waits
    return number


def _describe(group: Path, found: dict[str, Any], *, notes: dict[str, list[Any]]) -> None:
    """Write what the group's metadata says at the end; a power cut leaves the old or the new, never an empty file."""
    attrs = storage.attributes(group) | found
    if notes:
        attrs["provenance"] = attrs["provenance"] | {"notes": notes}
    storage.set_attributes(group, attrs, durable=True)
    storage.consolidate(group, durable=True)


def _stored_bytes(directory: Path, plan: Plan, *, done: tuple[int, int], sync: Callable[[], None]) -> dict[str, int]:
    """Return the bytes of each component's chunks; where one is gone, its part is to do again, and ours is done."""
    total = {one.name: 0 for one in plan.components}
    for chunk in chunks_within(plan, (0, plan.n_tokens)):
        size = storage.chunk_size(directory / "group" / chunk.component, grid_index(chunk))
        if not size:
            start, stop = layout.chunk_range(chunk.chunk, plan.chunk_tokens[chunk.component], plan.n_tokens)
            sync()
            parts.mark_done(directory / "parts", start=done[0], stop=done[1])
            parts.reopen(directory / "parts", start=start, stop=stop)
            raise CorruptError(
                f"the chunk of {chunk.component} at layer {plan.layers[chunk.layer_index]}, tokens {start}-{stop}, was "
                "written and is gone, so nothing was committed; run the same command again to fill it"
            )
        total[chunk.component] += size
    return total


def _clear_leftovers(group: Path, plan: Plan) -> None:
    """Delete the temporary files of a commit that was killed; those among the chunks went when their part began."""
    storage.clear_leftovers(group)
    for entry in group.iterdir():
        if entry.is_dir() and entry.name not in plan.chunk_tokens:
            for leftover in entry.rglob("*.partial"):
                leftover.unlink(missing_ok=True)


def committed_as(store: Path, plan: Plan) -> int:
    """Return the number under which a plan was published.

    Raises
    ------
    DatastoreError
        It was not.
    """
    for number in reversed(storage.numbered(store / "captures")):
        if plan_of(store / "captures" / f"{number:04d}") == plan.key:
            return number
    raise DatastoreError(f"the plan {plan.key} is neither on disk nor among the captures of {store}; plan again")
