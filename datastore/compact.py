"""Rewrite many small captures as one: the rows that count, in the batches they were computed in, as a new capture.

The new capture is planned, filled and committed as any other, so that a compaction that was killed goes on where it
was. The captures it was made of are deleted once nothing of them counts. Dropped and superseded rows are left behind.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from datastore import layout, parts, query, storage
from datastore.errors import DatastoreError
from datastore.gc import ADDED, collect, plan_collection
from datastore.planning import form_batches, form_chunks
from datastore.schema import Annotation, Codec, ComponentSpec, Plan, Rollout, digest
from datastore.tables import FIXED, telling
from datastore.union import Capture, Union
from datastore.writer import create

__all__ = ["Compaction", "compact", "plan_compaction"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compaction:
    """What a compaction would write.

    Attributes
    ----------
    store : Path
    plans : tuple of Plan
        The new captures.
    captures : tuple of int
        Those that are rewritten. Afterwards all captures are deleted of which nothing counts.
    seen : (captures, dropped)
        The numbers that the store had.
    """

    store: Path
    plans: tuple[Plan, ...]
    captures: tuple[int, ...]
    seen: tuple[tuple[int, ...], tuple[int, ...]]


class _Product(NamedTuple):
    """Components x layers of one model: what rollouts must have in common to be in one capture."""

    model: str
    components: tuple[ComponentSpec, ...]
    layers: tuple[int, ...]


def plan_compaction(store: str | os.PathLike[str], *, smaller_than: int | None = None) -> Compaction:
    """Say what compacting a store would write; nothing is.

    Parameters
    ----------
    store : path
    smaller_than : int, optional
        Leave captures of this many bytes before compression, or more, as they are. Default none.

    Raises
    ------
    NotAStoreError, NewerFormatError, CorruptError
        The store can't be read.
    """
    path = Path(store).resolve()
    seen = _seen(path)
    source = _Source(query.open(path))
    candidates = {c.number for c in source.union.captures if smaller_than is None or _raw_bytes(c) < smaller_than}
    plans, rewritten = [], set[int]()
    labelled = source.superseded_and_telling()
    for product, names in _groups(source.union, candidates).items():
        holders = _holders(source.union, product, names)
        told = [one for one in labelled if not one.rows.keys().isdisjoint(names)]
        if len(holders) > 1 or told or not _is_all_of(holders[0], product, names):
            plans.append(source.plan(product, names, holders=holders))
            rewritten.update(one.number for one in (*holders, *told))
    return Compaction(store=path, plans=tuple(plans), captures=tuple(sorted(rewritten)), seen=seen)


def compact(compaction: Compaction, *, tick: Callable[[int, int], object] = lambda done, total: None) -> list[int]:
    """Write the new captures, commit them, and delete those of which nothing counts any more.

    Parameters
    ----------
    compaction : Compaction
    tick : callable
        Told (rows written, rows in all), rows of one layer and component.

    Returns
    -------
    list of int
        The numbers of the new captures.

    Raises
    ------
    DatastoreError
        The store changed since it was planned; nothing of the plan at hand is committed.
    """
    store, numbers = compaction.store, list[int]()
    total = sum(plan.n_tokens * len(plan.layers) * len(plan.components) for plan in compaction.plans)
    opened, seen, done = query.open(store), compaction.seen, 0

    def wrote(rows: int) -> None:
        nonlocal done
        done += rows
        tick(done, total)

    _refuse_change(store, seen)
    for plan in compaction.plans:
        with create(store, plan) as writer:
            for spec in plan.components:
                for layer in plan.layers:
                    for name, start, rows in _rows(opened, spec.name, layer, plan=plan):
                        writer.put(spec.name, layer, name, rows, start=start)
                        wrote(len(rows))
            with parts.changing(store):  # a drop or a replacement in between would be undone by the new capture
                _refuse_change(store, seen)
                number = writer.commit()
            assert number is not None
            numbers.append(number)
            seen = ((*seen[0], number), seen[1])
    collect(plan_collection(store, only=frozenset(compaction.seen[0])))
    return numbers


def _rows(opened: query.Store, component: str, layer: int, *, plan: Plan) -> Any:
    """Yield (rollout id, position, rows) as they are stored, in the order of the captures that hold them."""
    captures = {one.number: one for one in opened.cells.captures}
    for block in opened.blocks(component, layers=layer, rollouts=[one.rollout_id for one in plan.rollouts]):
        capture = captures[block.capture]
        for piece in capture.ragged.pieces(block.tokens.start, block.tokens.stop):
            first = piece.start - block.tokens.start
            rows = block.values[first : first + piece.stop - piece.start]
            yield capture.rollout_ids[piece.row], piece.start - capture.ragged.range(piece.row)[0], rows


def _seen(store: Path) -> tuple[tuple[int, ...], tuple[int, ...]]:
    storage.open_root(store)
    return tuple(storage.numbered(store / "captures")), tuple(storage.numbered(store / "dropped"))


def _refuse_change(store: Path, seen: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    if _seen(store) != seen:
        raise DatastoreError(
            f"{store} was changed while it was compacted, so what was to replace its captures may be out of date and "
            "was not committed; run compact again"
        )


def _raw_bytes(capture: Capture) -> int:
    cells = capture.ragged.n_tokens * len(capture.layers)
    return sum(cells * one.width * one.itemsize for one in capture.components.values())


def _groups(union: Union, candidates: set[int]) -> dict[_Product, list[str]]:
    """Group rollouts by what candidates hold of them and counts, split into full products."""
    groups: dict[_Product, list[str]] = {}
    for name in union.rollout_ids:
        layers: dict[ComponentSpec, set[int]] = {}
        for layer, component in union.cells_of(name):
            holder = union.cell(component, layer, name).capture
            if holder.number in candidates:
                layers.setdefault(holder.components[component], set()).add(layer)
        products: dict[tuple[int, ...], list[ComponentSpec]] = {}
        for spec, numbers in layers.items():
            products.setdefault(tuple(sorted(numbers)), []).append(spec)
        for key, specs in products.items():
            product = _Product(union.newest(name)[0].model, tuple(sorted(specs, key=lambda one: one.name)), key)
            groups.setdefault(product, []).append(name)
    return groups


def _holders(union: Union, product: _Product, names: Sequence[str]) -> list[Capture]:
    """Return the captures that hold these cells, ascending."""
    found = {
        holder.number: holder
        for name in names
        for spec in product.components
        for layer in product.layers
        for holder in [union.cell(spec.name, layer, name).capture]
    }
    return [found[number] for number in sorted(found)]


def _is_all_of(capture: Capture, product: _Product, names: Sequence[str]) -> bool:
    """Whether these cells are all that a capture holds, so that nothing in it is wasted."""
    components = {one.name for one in product.components} == set(capture.components)
    return components and product.layers == capture.layers and set(names) == set(capture.rollout_ids)


class _Source:
    """A store to be compacted: its rollouts, and plans for their cells."""

    def __init__(self, store: query.Store) -> None:
        self._store = store
        self.union = store.cells.union
        self._arrays: dict[tuple[int, str], NDArray[Any]] = {}

    def superseded_and_telling(self) -> list[Capture]:
        """Return the captures whose rows no longer count, and whose labels or annotations still show."""
        superseded = [one for one in self.union.captures if one.number not in self.union.counting]
        if not superseded:
            return []
        added = [[path / f"{n:04d}" for n in storage.numbered(path)] for path in map(self._store.path.joinpath, ADDED)]
        shown = telling(self._store.cells, *added)
        return [one for one in superseded if one.number in shown]

    def plan(self, product: _Product, names: Sequence[str], *, holders: Sequence[Capture]) -> Plan:
        """Plan the capture of these cells as they were captured: in the same batches, under the same provenance."""
        newest = holders[-1]
        rollouts = {name: self._rollout(name) for name in names}
        budget = max(int(one.attrs["batch_tokens"]) for one in holders)
        batches = form_batches(self.union, list(rollouts.values()), budget, replace=False)
        stored = tuple(rollouts[name] for batch in batches for name in batch.stored)
        n_tokens = sum(one.n_tokens for one in stored)
        return Plan(
            request=digest(["compact", [one.number for one in holders]])[:16],
            rollouts=stored,
            batches=batches,
            layers=product.layers,
            components=product.components,
            chunk_tokens=form_chunks(product.components, n_tokens, layout.MOST_TOKENS),
            batch_tokens=budget,
            codec=Codec(**newest.attrs["codec"]),
            vocab=self._vocab(holders),
            provenance=_provenance(holders),
            statistics=any(one.attrs["statistics"] != "none" for one in holders),
            after=tuple(one.number for one in holders),
        )

    def _rollout(self, name: str) -> Rollout:
        capture, row = self.union.newest(name)
        start, stop = capture.ragged.range(row)
        per_token = {key: self._array(capture, key)[start:stop] for key in ("token_ids", "role", "turn", "thinking")}
        known = self._table[name]
        labels = {label: _plain(v) for label, v in known.items() if label not in FIXED and not pd.isna(v)}
        return Rollout(
            rollout_id=name,
            **per_token,
            prefix=capture.prefix(name),
            prompt_end=known["prompt_end"],
            prompt_set=known["prompt_set"],
            tags=known["tags"],
            labels=labels,
            annotations=self._annotations.get(name, ()),
        )

    def _array(self, capture: Capture, name: str) -> NDArray[Any]:
        key = (capture.number, name)
        if key not in self._arrays:
            self._arrays[key] = storage.read_array(capture.path / {"token_ids": "token_id"}.get(name, name))
        return self._arrays[key]

    @cached_property
    def _table(self) -> dict[str, dict[str, Any]]:
        found: Any = self._store.rollouts.to_dict("index")
        return {str(name): {str(key): value for key, value in row.items()} for name, row in found.items()}

    @cached_property
    def _annotations(self) -> dict[str, tuple[Annotation, ...]]:
        found: dict[str, tuple[Annotation, ...]] = {}
        for one in self._store.annotations.to_dict("records"):
            name = str(one.pop("rollout_id"))
            known: dict[str, Any] = {str(key): value for key, value in one.items()}
            found[name] = (*found.get(name, ()), Annotation(**known))
        return found

    def _vocab(self, holders: Sequence[Capture]) -> dict[int, bytes]:
        vocab: dict[int, bytes] = {}
        for one in holders:
            text = storage.read_array(one.path / "vocab" / "bytes").tobytes()
            edges = storage.read_array(one.path / "vocab" / "offset").tolist()
            ids = storage.read_array(one.path / "vocab" / "token_id").tolist()
            vocab |= {i: text[a:b] for i, a, b in zip(ids, edges[:-1], edges[1:], strict=True)}
        return vocab


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _provenance(holders: Sequence[Capture]) -> dict[str, Any]:
    """Return the newest capture's provenance, and how each of them differs from it; notes are of each alone."""
    newest = {key: value for key, value in holders[-1].attrs["provenance"].items() if key not in ("notes", "compacted")}
    made_of: list[Any] = []
    for one in holders:
        own = one.attrs["provenance"]
        other = {key: value for key, value in own.items() if newest.get(key) != value and key != "compacted"}
        made_of += own.get("compacted") or [{"created": one.attrs["created"], **other}]
    return newest | {"compacted": made_of}
