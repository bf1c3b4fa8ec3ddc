"""Which capture counts for each (rollout, layer, component): the store as the union of its captures.

Where two captures hold the same cell the higher number counts; what `dropped/` names no longer counts for the captures
it was written against.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datastore.errors import AbsentError, CorruptError
from datastore.layout import Ragged
from datastore.schema import ComponentSpec, digest
from datastore.storage import attributes, numbered, read_array

__all__ = ["Capture", "Cell", "Drop", "Union", "load_capture", "load_drops", "load_union", "model_identity"]


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
        """Read the token ids of one rollout."""
        start, stop = self.ragged.range(self.rows[rollout_id])
        return np.asarray(read_array(self.path / "token_id")[start:stop], dtype=np.int32)


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

    def hits(self, capture: int, rollout_id: str, *, layer: int, component: str) -> bool:
        """Whether it drops this cell of this capture."""
        return (
            capture in self.captures
            and (self.rollouts is None or rollout_id in self.rollouts)
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
                self._holders.setdefault(name, []).append((capture, row))

    @cached_property
    def rollout_ids(self) -> tuple[str, ...]:
        """Rollouts of which anything still counts, in order of first capture."""
        order = dict.fromkeys(name for capture in self.captures for name in capture.rollout_ids)
        return tuple(name for name in order if not self.drops or self.cells_of(name))

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """All layer numbers that count anywhere, ascending."""
        if not self.drops:
            return tuple(sorted({layer for capture in self.captures for layer in capture.layers}))
        return tuple(sorted({layer for name in self.rollout_ids for layer, _ in self.cells_of(name)}))

    @cached_property
    def components(self) -> dict[str, ComponentSpec]:
        """All components that count anywhere; the newest capture describes each."""
        found: dict[str, ComponentSpec] = {}
        for capture in self.captures:
            found |= capture.components
        if not self.drops:
            return found
        counted = {component for name in self.rollout_ids for _, component in self.cells_of(name)}
        return {name: one for name, one in found.items() if name in counted}

    def newest(self, rollout_id: str) -> tuple[Capture, int]:
        """Return the newest capture that names the rollout, and its row there."""
        for capture, row in self._holders.get(rollout_id, ()):
            if not self.drops or self._counts(capture, rollout_id):
                return capture, row
        raise AbsentError(f"rollout {rollout_id!r} is not in the store, which holds {_some(self.rollout_ids)}")

    def _counts(self, capture: Capture, rollout_id: str) -> bool:
        return any(
            not self._dropped(capture, rollout_id, layer=layer, component=component)
            for layer in capture.layers
            for component in capture.components
        )

    def _dropped(self, capture: Capture, rollout_id: str, *, layer: int, component: str) -> bool:
        return any(d.hits(capture.number, rollout_id, layer=layer, component=component) for d in self.drops)

    def tokens(self, rollout_id: str, token_sha256: str) -> NDArray[np.int32] | None:
        """Return a rollout's token ids from any capture that holds them with this hash."""
        for capture, row in self._holders.get(rollout_id, ()):
            if capture.token_sha256[row] == token_sha256:
                return capture.tokens(rollout_id)
        return None

    def find(self, component: str, layer: int, rollout_id: str) -> Cell | None:
        """Return where the cell is, or None where it is not captured."""
        for capture, row in self._holders.get(rollout_id, ()):
            if component in capture.components and layer in capture.layers:
                if not self._dropped(capture, rollout_id, layer=layer, component=component):
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
            for capture, _ in self._holders.get(rollout_id, ())
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


def _some(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    listed = ", ".join(names[:most]) or "no rollouts"
    return listed if len(names) <= most else f"{listed} and {len(names) - most} more"


def load_union(path: Path) -> Union:
    """Read the metadata and tables of all captures of a store and the record of what was dropped."""
    captures = [load_capture(path / "captures" / f"{n:04d}", n) for n in numbered(path / "captures")]
    return Union(captures, load_drops(path))


def load_capture(path: Path, number: int) -> Capture:
    """Read one capture's metadata and table."""
    attrs = attributes(path)
    table = path / "rollouts"
    if "layers" not in attrs:
        raise CorruptError(f"{path} is no capture (its zarr.json lacks the layers); remove it or restore it")
    return Capture(
        number=number,
        path=path,
        attrs=attrs,
        rollout_ids=tuple(str(v) for v in read_array(table / "rollout_id")),
        counts=read_array(table / "n_tokens").astype(np.int64),
        token_sha256=tuple(str(v) for v in read_array(table / "token_sha256")),
        batch=read_array(table / "batch").astype(np.int64),
    )


def load_drops(path: Path) -> list[Drop]:
    """Read what no longer counts."""
    drops = []
    for number in numbered(path / "dropped"):
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
