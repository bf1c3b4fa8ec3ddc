"""Say that parts of captures no longer count: one commit to `dropped/`, nothing is changed or deleted."""

import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from datastore import parts, storage
from datastore.errors import AbsentError, MisuseError
from datastore.union import Drop, load_union

__all__ = ["Dropping", "commit_drops", "drop", "drop_record", "plan_drop"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropping:
    """What a drop would do.

    Attributes
    ----------
    drop : Drop
    rollouts : tuple of str
        That lose rows.
    cells : int
        (rollout, layer, component) cells that no longer count.
    """

    drop: Drop
    rollouts: tuple[str, ...]
    cells: int


def plan_drop(
    store: Path,
    *,
    rollouts: Iterable[str] | None = None,
    layers: Iterable[int] | None = None,
    components: Iterable[str] | None = None,
) -> Dropping:
    """Return what dropping this product of rollouts, layers and components would do; None means all of them.

    Raises
    ------
    AbsentError
        Something named is not in the store.
    MisuseError
        Nothing is named, or nothing that counts would be dropped.
    """
    storage.open_root(store)
    union = load_union(store)
    asked = {"rollouts": rollouts, "layers": layers, "components": components}
    if all(values is None for values in asked.values()):
        raise MisuseError(f"nothing is named to drop from {store}; name rollouts, layers or components")
    named = {what: None if values is None else frozenset(values) for what, values in asked.items()}
    there = {"rollouts": union.rollout_ids, "layers": union.layers, "components": tuple(union.components)}
    for what, values in named.items():
        unknown = sorted(map(str, (values or frozenset()) - set(there[what])))
        if unknown:
            raise AbsentError(
                f"{what} {', '.join(unknown[:8])} can't be dropped, because {store} does not hold them; it holds "
                f"{', '.join(map(str, there[what][:12])) or 'nothing'}"
            )
    one = Drop(captures=tuple(c.number for c in union.captures), **named)  # type: ignore[arg-type]
    lost = {
        name: sum(one.names(name, layer=layer, component=component) for layer, component in union.cells_of(name))
        for name in union.rollout_ids
    }
    cells = sum(lost.values())
    if not cells:
        raise MisuseError(f"none of this is captured in {store}, so there is nothing to drop")
    return Dropping(drop=one, rollouts=tuple(name for name, n in lost.items() if n), cells=cells)


def drop(
    store: Path,
    *,
    rollouts: Iterable[str] | None = None,
    layers: Iterable[int] | None = None,
    components: Iterable[str] | None = None,
    reason: str = "",
) -> int:
    """Drop a product of rollouts, layers and components of all captures there are; return the number of the commit.

    Errors are those of `plan_drop`. Bytes are freed by `gc`, not by this.
    """
    storage.open_root(store)
    with parts.changing(store):  # a compaction in between would bring back what is dropped
        planned = plan_drop(store, rollouts=rollouts, layers=layers, components=components)
        return commit_drops(store, [planned.drop], reason=reason)


def commit_drops(store: Path, drops: Sequence[Drop], *, reason: str) -> int:
    """Publish drops as one number under `dropped/` and return it."""
    aside = store.with_name(f"{store.name}.{uuid.uuid4().hex}.partial")
    try:
        with storage.writable(store):
            storage.create_group(
                aside,
                {
                    "created": datetime.now(UTC).isoformat(timespec="seconds"),
                    "reason": reason,
                    "dropped": [drop_record(one) for one in drops],
                },
            )
            storage.sync_files(aside)
            with parts.changing(store):
                return storage.publish(aside, store / "dropped")
    finally:
        storage.remove(aside)


def drop_record(one: Drop) -> dict[str, list[int] | list[str] | None]:
    """Return a drop as JSON, as `load_drops` reads it."""
    return {
        "captures": list(one.captures),
        "rollouts": None if one.rollouts is None else sorted(one.rollouts),
        "layers": None if one.layers is None else sorted(one.layers),
        "components": None if one.components is None else sorted(one.components),
    }
