"""Which capture counts for each (rollout, layer, component): the store as the union of its captures.

Where two captures hold the same cell the higher number counts; what `dropped/` names no longer counts for the captures
it was written against. A rollout has one row of tokens and one model: those of the newest capture of which anything
counts, and what older captures hold of it from other tokens or another model no longer counts.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datastore.errors import AbsentError, ConflictError, CorruptError, DatastoreError
from datastore.layout import Ragged
from datastore.plainfile import MOST_TABLE
from datastore.schema import ComponentSpec, Rollout, digest
from datastore.storage import array_metadata, attributes, numbered, read_array

__all__ = [
    "Capture",
    "Cell",
    "Drop",
    "Union",
    "gone",
    "load_capture",
    "load_captures",
    "load_drops",
    "load_union",
    "model_identity",
    "plan_of",
]


@dataclass(frozen=True, eq=False)
class Capture:
    """One committed capture as its metadata and table describe it; no component data is read."""

    number: int
    path: Path
    attrs: Mapping[str, Any]
    rollout_ids: tuple[str, ...]
    counts: NDArray[np.int64]
    token_sha256: tuple[str, ...]
    batch: NDArray[np.int64]

    @cached_property
    def ragged(self) -> Ragged:
        """Rollout <-> token range on this capture's token axis."""
        return Ragged(self.counts)

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Real layer numbers, ascending."""
        return tuple(self.attrs["layers"])

    @cached_property
    def components(self) -> dict[str, ComponentSpec]:
        """Components by name."""
        return {c["name"]: ComponentSpec(**c) for c in self.attrs["components"]}

    @cached_property
    def rows(self) -> dict[str, int]:
        """Row of each rollout id."""
        return {name: row for row, name in enumerate(self.rollout_ids)}

    @cached_property
    def batches(self) -> list[list[str]]:
        """Rollout ids computed together, company included."""
        return [list(b) for b in self.attrs["batches"]]

    def computed_with(self, rollout_id: str) -> tuple[int, tuple[str, ...]]:
        """Return the index of a rollout's batch and the members it was computed with, after any halving for memory."""
        index = int(self.batch[self.rows[rollout_id]])
        members = tuple(self.batches[index])
        halved = self.attrs["provenance"].get("notes", {}).get("halved", [])
        split = {tuple(one["batch"]): one["into"] for one in halved}
        while members in split:
            members = next(tuple(piece) for piece in split[members] if rollout_id in piece)
        return index, members

    def company_sha256(self, batch: int, rollout_id: str) -> str:
        """Return the hash of the token ids with which a member of a batch was computed."""
        if rollout_id in self.rows:
            return self.token_sha256[self.rows[rollout_id]]
        return str(self.attrs["company"][str(batch)][rollout_id])

    @cached_property
    def model(self) -> str:
        """Identity of the model, for comparison."""
        return model_identity(self.attrs["provenance"])

    @property
    def model_name(self) -> str:
        """Name of the model, for people."""
        return str(self.attrs["provenance"].get("model", {}).get("name", "unknown"))

    def tokens(self, rollout_id: str) -> NDArray[np.int32]:
        """Read the token ids with which one rollout was computed: what is before its first stored token comes first."""
        start, stop = self.ragged.range(self.rows[rollout_id])
        stored = np.asarray(read_array(self.path / "token_id")[start:stop], dtype=np.int32)
        return np.concatenate([self.prefix(rollout_id), stored])

    def prefix(self, rollout_id: str) -> NDArray[np.int32]:
        """Read the token ids that were computed before a rollout's first stored token and have no rows."""
        if "+" not in self.token_sha256[self.rows[rollout_id]]:
            return np.empty(0, dtype=np.int32)
        edges = np.cumsum([0, *read_array(self.path / "prefix" / "n_tokens")])
        row = self.rows[rollout_id]
        ids = read_array(self.path / "prefix" / "token_id")[edges[row] : edges[row + 1]]
        return np.asarray(ids, dtype=np.int32)


def model_identity(provenance: Mapping[str, Any]) -> str:
    """Return a hash of the model part of a provenance: equal where the weights, dtype and adapters are equal."""
    model = provenance.get("model") or {}
    known = model.get("weights_sha256") or model.get("revision")
    if not known:
        return digest(model)
    return digest([known, model.get("dtype"), model.get("adapter")])


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """What no longer counts: a product of rollouts, layers and components of the captures named (None means all)."""

    captures: tuple[int, ...]
    rollouts: frozenset[str] | None = None
    layers: frozenset[int] | None = None
    components: frozenset[str] | None = None

    @property
    def everything(self) -> bool:
        """Whether it leaves nothing of its captures."""
        return self.rollouts is None and self.layers is None and self.components is None

    def hits(self, capture: int, rollout_id: str, *, layer: int, component: str) -> bool:
        """Whether it drops this cell of this capture."""
        return capture in self.captures and self.names(rollout_id, layer=layer, component=component)

    def names(self, rollout_id: str, *, layer: int, component: str) -> bool:
        """Whether it drops this cell of the captures that it is about."""
        return (
            (self.rollouts is None or rollout_id in self.rollouts)
            and (self.layers is None or layer in self.layers)
            and (self.components is None or component in self.components)
        )


@dataclass(frozen=True, slots=True)
class Cell:
    """Where one rollout's rows of one layer and component are: a capture and a row of its table."""

    capture: Capture
    row: int

    @property
    def tokens(self) -> tuple[int, int]:
        """Half-open range on the capture's token axis."""
        return self.capture.ragged.range(self.row)


@dataclass(frozen=True, eq=False)
class Union:
    """The captures of a store, resolved.

    Parameters
    ----------
    captures : sequence of Capture
        Ascending by number.
    drops : sequence of Drop
    """

    captures: Sequence[Capture]
    drops: Sequence[Drop] = ()
    _holders: dict[str, list[tuple[Capture, int]]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for capture in reversed(self.captures):
            for row, name in enumerate(capture.rollout_ids):
                if self.drops and not self._counts(capture, name):
                    continue
                holders = self._holders.setdefault(name, [])
                if not holders or _same(holders[0], (capture, row)):
                    holders.append((capture, row))

    @cached_property
    def rollout_ids(self) -> tuple[str, ...]:
        """Rollouts of which anything still counts, in order of first capture."""
        order = dict.fromkeys(name for capture in self.captures for name in capture.rollout_ids)
        return tuple(name for name in order if name in self._holders)

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """All layer numbers that count anywhere, ascending."""
        return tuple(sorted({layer for layer, _ in self._counted}))

    @cached_property
    def components(self) -> dict[str, ComponentSpec]:
        """All components that count anywhere; the newest capture describes each."""
        found: dict[str, ComponentSpec] = {}
        for capture in self.captures:
            found |= capture.components
        counted = {component for _, component in self._counted}
        return {name: one for name, one in found.items() if name in counted}

    @cached_property
    def _counted(self) -> set[tuple[int, str]]:
        """(layer, component) of which anything counts."""
        if self.drops:
            return {cell for name in self._holders for cell in self.cells_of(name)}
        held = {id(capture): capture for holders in self._holders.values() for capture, _ in holders}
        return {(layer, name) for capture in held.values() for layer in capture.layers for name in capture.components}

    @cached_property
    def counting(self) -> frozenset[int]:
        """Numbers of the captures of which any cell counts; the rest may be deleted."""
        found: set[int] = set()
        for name in self._holders:
            held: set[tuple[int, str]] = set()
            for capture, _ in self._current(name):
                cells = {(layer, component) for layer in capture.layers for component in capture.components} - held
                mine = {one for one in cells if not self._dropped(capture, name, layer=one[0], component=one[1])}
                if mine:
                    found.add(capture.number)
                    held |= mine
        return frozenset(found)

    def newest(self, rollout_id: str) -> tuple[Capture, int]:
        """Return the newest capture that names the rollout, and its row there."""
        for holder in self._holders.get(rollout_id, ()):
            return holder
        raise AbsentError(f"rollout {rollout_id!r} is not in the store, which holds {_some(self.rollout_ids)}")

    def _current(self, rollout_id: str) -> Sequence[tuple[Capture, int]]:
        """Holders with the tokens and model of the newest: once replaced, the rows of other tokens no longer count."""
        holders = self._holders.get(rollout_id, [])
        if len(holders) < 2:
            return holders
        newest = next(((c, row) for c, row in holders if not self.drops or self._counts(c, rollout_id)), None)
        if newest is None:
            return []
        tokens, model = newest[0].token_sha256[newest[1]], newest[0].model
        return [(c, row) for c, row in holders if c.token_sha256[row] == tokens and c.model == model]

    def _counts(self, capture: Capture, rollout_id: str) -> bool:
        return any(
            not self._dropped(capture, rollout_id, layer=layer, component=component)
            for layer in capture.layers
            for component in capture.components
        )

    def _dropped(self, capture: Capture, rollout_id: str, *, layer: int, component: str) -> bool:
        return any(d.hits(capture.number, rollout_id, layer=layer, component=component) for d in self.drops)

    def tokens(self, rollout_id: str, token_sha256: str) -> NDArray[np.int32] | None:
        """Return the token ids with which a rollout was computed from any capture that has them with this hash."""
        computed = token_sha256.partition("+")[0]
        for capture in self.captures:
            row = capture.rows.get(rollout_id)
            if row is not None and capture.token_sha256[row].partition("+")[0] == computed:
                return capture.tokens(rollout_id)
        return None

    def refuse_conflicts(self, rollouts: Iterable[Rollout], provenance: Mapping[str, Any], *, store: Path) -> None:
        """Check that rollouts which are there have the same tokens and come from the same model.

        Raises
        ------
        ConflictError
            One does not; it is named with both.
        """
        model = model_identity(provenance)
        for one in rollouts:
            if one.rollout_id not in self._holders:
                continue
            capture, row = self.newest(one.rollout_id)
            there = capture.token_sha256[row]
            if there != one.token_sha256:
                raise ConflictError(
                    f"rollout {one.rollout_id!r} is in {store} with {int(capture.counts[row])} tokens (sha256 "
                    f"{there[:12]}) and now has {one.n_tokens} tokens (sha256 {one.token_sha256[:12]}); nothing was "
                    "captured, use another id, or --replace to let the new one count"
                )
            if capture.model != model:
                name = (provenance.get("model") or {}).get("name", "unknown")
                raise ConflictError(
                    f"rollout {one.rollout_id!r} is in {store} from model {capture.model_name} and is now asked for "
                    f"from model {name} with other weights or dtype; nothing was captured, use another store, or "
                    "--replace to let the new one count"
                )

    def find(self, component: str, layer: int, rollout_id: str) -> Cell | None:
        """Return where the cell is, or None where it is not captured."""
        for capture, row in self._current(rollout_id):
            held = component in capture.components and layer in capture.layers
            if held and not self._dropped(capture, rollout_id, layer=layer, component=component):
                return Cell(capture, row)
        return None

    def cell(self, component: str, layer: int, rollout_id: str) -> Cell:
        """Return where the cell is.

        Raises
        ------
        AbsentError
            It is not captured; the message lists what is.
        """
        found = self.find(component, layer, rollout_id)
        if found is None:
            raise AbsentError(self.what_is_there(component, layer, rollout_id))
        return found

    def cells_of(self, rollout_id: str) -> set[tuple[int, str]]:
        """Return the (layer, component) pairs captured for a rollout."""
        return {
            (layer, component)
            for capture, _ in self._current(rollout_id)
            for layer in capture.layers
            for component in capture.components
            if not self._dropped(capture, rollout_id, layer=layer, component=component)
        }

    def what_is_there(self, component: str, layer: int, rollout_id: str) -> str:
        """Return one sentence: the cell is not captured, and what is."""
        if rollout_id not in self._holders:
            return f"rollout {rollout_id!r} is not in the store, which holds {_some(self.rollout_ids)}"
        have = self.cells_of(rollout_id)
        there = "; ".join(
            f"{name} at layers {', '.join(str(n) for n, c in sorted(have) if c == name)}"
            for name in sorted({c for _, c in have})
        )
        return (
            f"{component} at layer {layer} of rollout {rollout_id!r} is not captured; captured for it: "
            f"{there or 'nothing'}; capture it to add it to the store"
        )


def _same(a: tuple[Capture, int], b: tuple[Capture, int]) -> bool:
    """Whether two captures hold the same tokens of the same model in these rows."""
    return a[0].token_sha256[a[1]] == b[0].token_sha256[b[1]] and a[0].model == b[0].model


def _some(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    listed = ", ".join(names[:most]) or "no rollouts"
    return listed if len(names) <= most else f"{listed} and {len(names) - most} more"


def load_union(path: Path) -> Union:
    """Read the metadata and tables of all captures of a store and the record of what was dropped."""
    drops = load_drops(path)
    return Union(load_captures(path, numbered(path / "captures"), drops), drops)


def load_captures(path: Path, numbers: Iterable[int], drops: Sequence[Drop]) -> list[Capture]:
    """Read the metadata and tables of captures; one that was dropped whole is left out, for it may be unreadable."""
    dropped = gone(drops)
    return [load_capture(path / "captures" / f"{n:04d}", n) for n in numbers if n not in dropped]


def gone(drops: Iterable[Drop]) -> frozenset[int]:
    """Return the captures that were dropped whole: nothing of them is ever read."""
    return frozenset(n for one in drops if one.everything for n in one.captures)


def load_capture(path: Path, number: int) -> Capture:
    """Read one capture's metadata and table."""
    if path.is_symlink():
        raise CorruptError(f"{path} is a link, which a store does not hold; put what it leads to in its place")
    described = array_metadata(path)
    attrs, members = described.get("attributes"), _members(described)
    if not isinstance(attrs, dict) or "layers" not in attrs:
        raise CorruptError(f"{path} is no capture (its zarr.json lacks the layers); remove it or restore it")

    def column(name: str) -> NDArray[Any]:
        return read_array(path / "rollouts" / name, members.get(f"rollouts/{name}"), most=MOST_TABLE)

    capture = Capture(
        number=number,
        path=path,
        attrs=attrs,
        rollout_ids=tuple(map(str, column("rollout_id").tolist())),
        counts=column("n_tokens").astype(np.int64),
        token_sha256=tuple(map(str, column("token_sha256").tolist())),
        batch=column("batch").astype(np.int64),
    )
    _check(capture)
    return capture


def _members(described: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the metadata of a group's arrays from its consolidated metadata, as far as there is any."""
    consolidated = described.get("consolidated_metadata")
    found = consolidated.get("metadata") if isinstance(consolidated, dict) else None
    known = found if isinstance(found, dict) else {}
    return {name: one for name, one in known.items() if isinstance(one, dict)}


def _check(capture: Capture) -> None:
    """Refuse a capture whose description could not be of one, so that nothing that reads it meets the unexpected."""
    attrs, n = capture.attrs, len(capture.rollout_ids)
    try:
        layers, components = capture.layers, capture.components
        sound = (
            all(type(layer) is int and layer >= 0 for layer in layers)
            and components
            and n == len(capture.counts) == len(capture.token_sha256) == len(capture.batch)
            and bool((capture.counts > 0).all())
            and isinstance(attrs["provenance"], dict)
            and isinstance(attrs["provenance"].get("model") or {}, dict)
            and isinstance(attrs["batches"], list)
            and isinstance(attrs["statistics"], str)
            and isinstance(attrs.get("stored_bytes") or {}, dict)
        )
        _ = capture.model, capture.model_name, capture.batches
    except (KeyError, TypeError, ValueError, AttributeError, DatastoreError) as error:
        raise CorruptError(f"{capture.path} is no capture ({error!r:.200}); remove it or restore it") from error
    if not sound:
        raise CorruptError(f"{capture.path} is no capture (its metadata and table do not fit); remove it or restore it")


def load_drops(path: Path, numbers: Iterable[int] | None = None) -> list[Drop]:
    """Read what no longer counts: all records, or those of the numbers given."""
    drops = []
    for number in numbered(path / "dropped") if numbers is None else numbers:
        for one in attributes(path / "dropped" / f"{number:04d}").get("dropped", []):
            drops.append(
                Drop(
                    captures=tuple(one["captures"]),
                    rollouts=_set(one.get("rollouts")),
                    layers=_set(one.get("layers")),
                    components=_set(one.get("components")),
                )
            )
    return drops


def _set(values: Iterable[Any] | None) -> frozenset[Any] | None:
    return None if values is None else frozenset(values)


def plan_of(capture: Path) -> str | None:
    """Return the key of the plan that a capture carried out; None where a dropped one can't be read any more."""
    with suppress(CorruptError):
        return str(attributes(capture).get("plan"))
    return None
