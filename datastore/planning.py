"""Plan a capture: leave out what the store has, form batches, fix the token axis, and put the plan on disk whole.

A plan lies beside the store, `run.zarr.plans/{key}/`, until it is committed:

    plan.json    what decides the bits, so that the same command goes on with it
    group/       the capture as it will be, every array with its final shape and all coordinates filled
    parts/       who fills what, and what is done
    partials/    statistics of each finished chunk
"""

import json
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from datastore import layout, storage
from datastore.capture_group import build_group
from datastore.errors import PlanError
from datastore.partials import Partials
from datastore.schema import Batch, Codec, ComponentSpec, Plan, Rollout, digest
from datastore.union import Capture, Union, gone, load_union, plan_of

__all__ = [
    "PlanFile",
    "form_batches",
    "form_chunks",
    "laid_down",
    "lay_down",
    "plan",
    "plans_directory",
    "read_plan",
]

Cells = frozenset[tuple[str, int]]


class PlanFile(BaseModel):
    """plan.json: all of a plan but the token ids, which the group and the caller hold."""

    model_config = ConfigDict(frozen=True)

    request: str
    created: str
    rollout_ids: list[str]
    token_sha256: list[str]
    batches: list[list[str]]
    company: list[dict[str, list[int]]]
    layers: list[int]
    components: list[dict[str, Any]]
    codec: dict[str, Any]
    chunk_tokens: dict[str, int]
    batch_tokens: int
    statistics: bool
    replace: bool
    after: list[int]
    provenance: dict[str, Any]

    @classmethod
    def of(cls, plan: Plan) -> "PlanFile":
        """Describe `plan`."""
        return cls(
            request=plan.request,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            rollout_ids=[r.rollout_id for r in plan.rollouts],
            token_sha256=[r.token_sha256 for r in plan.rollouts],
            batches=[list(b.members) for b in plan.batches],
            company=[{name: ids.tolist() for name, ids in b.company.items()} for b in plan.batches],
            layers=list(plan.layers),
            components=[component_record(c) for c in plan.components],
            codec=codec_record(plan.codec),
            chunk_tokens=dict(plan.chunk_tokens),
            batch_tokens=plan.batch_tokens,
            statistics=plan.statistics,
            replace=plan.replace,
            after=list(plan.after),
            provenance=dict(plan.provenance),
        )

    def plan(self, rollouts: Mapping[str, Rollout], vocab: Mapping[int, bytes]) -> Plan:
        """Return the plan again, given the rollouts it names."""
        return Plan(
            request=self.request,
            rollouts=tuple(rollouts[name] for name in self.rollout_ids),
            batches=tuple(
                Batch(
                    members=tuple(members),
                    company={name: np.asarray(ids, dtype=np.int32) for name, ids in company.items()},
                )
                for members, company in zip(self.batches, self.company, strict=True)
            ),
            layers=tuple(self.layers),
            components=tuple(ComponentSpec(**c) for c in self.components),
            codec=Codec(**self.codec),
            chunk_tokens=self.chunk_tokens,
            batch_tokens=self.batch_tokens,
            statistics=self.statistics,
            replace=self.replace,
            after=tuple(self.after),
            vocab=vocab,
            provenance=self.provenance,
        )


def component_record(one: ComponentSpec) -> dict[str, Any]:
    """Return a component as JSON."""
    return {"name": one.name, "width": one.width, "dtype": one.dtype, "hook": one.hook}


def codec_record(codec: Codec) -> dict[str, Any]:
    """Return a codec as JSON."""
    return {"name": codec.name, "level": codec.level, "blocksize": codec.blocksize}


def plans_directory(store: Path) -> Path:
    """Return the directory beside the store that holds its unfinished plans."""
    return store.with_name(f"{store.name}.plans")


def laid_down(store: Path) -> list[Path]:
    """Return the directories of the plans beside the store, unfinished or just carried out.

    What a killed process left, `.partial`, is none: it was not whole yet, or was being removed. It may hold all files
    of a plan, which another process may have laid down since.
    """
    found = (file.parent for file in plans_directory(store).glob("*/plan.json"))
    return sorted(one for one in found if one.suffix != ".partial")


def plan(
    store: str | os.PathLike[str],
    rollouts: Sequence[Rollout],
    *,
    layers: Iterable[int],
    components: Sequence[ComponentSpec],
    provenance: Mapping[str, Any] | None = None,
    batch_tokens: int = 16384,
    codec: Codec | None = None,
    most_tokens: int = layout.MOST_TOKENS,
    vocab: Mapping[int, bytes] | None = None,
    statistics: bool = True,
    replace: bool = False,
) -> tuple[Plan, ...]:
    """Plan the capture of `rollouts` x `layers` x `components`; nothing is written.

    What the store holds already is left out. One plan is a full product; where the remainder is ragged there are
    several. Plans of the same request that are on disk unfinished come first, as they were made.

    Parameters
    ----------
    store : path
        The store; it need not exist.
    rollouts : sequence of Rollout
    layers : iterable of int
        Real layer numbers.
    components : sequence of ComponentSpec
    provenance : mapping
        JSON with `model`, `tokenizer`, `settings`, `environment`; `model` decides whether a rollout may be added to.
    batch_tokens : int
        Padded tokens a batch may hold.
    codec : Codec
    most_tokens : int
        Most tokens of a chunk.
    vocab : mapping of token id to bytes
    statistics : bool
        Keep statistics and token norms.
    replace : bool
        Capture again what is there; the new capture counts.

    Raises
    ------
    ConflictError
        A rollout is there with other tokens, or from another model, and `replace` is not set.
    PlanError
        The request contradicts itself.
    """
    path = Path(store).resolve()
    request = Request.of(
        rollouts,
        wanted=frozenset((c.name, layer) for layer in layers for c in components),
        components=tuple(components),
        settings={"batch_tokens": batch_tokens, "most_tokens": most_tokens, "statistics": statistics},
        codec=codec or Codec(),
        provenance=dict(provenance or {}),
        vocab=dict(vocab or {}),
        replace=replace,
    )
    unfinished = _unfinished(path, request)  # before the store: what is committed in between is then in both
    union = load_union(path) if _is_store(path) else Union(())
    if not replace:
        union.refuse_conflicts(rollouts, request.provenance, store=path)
    committed = {capture.attrs.get("plan") for capture in union.captures}
    unfinished = [one for one in unfinished if one.key not in committed]
    planned = {
        (r.rollout_id, c.name, n) for p in unfinished for r in p.rollouts for c in p.components for n in p.layers
    }
    products = _products(union, request, planned)
    return (*unfinished, *(_fresh(union, request, cells=cells, names=names) for cells, names in products))


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What was asked for, before what the store has is left out."""

    asked: Mapping[str, Rollout]
    wanted: Cells
    components: tuple[ComponentSpec, ...]
    settings: Mapping[str, Any]
    codec: Codec
    provenance: Mapping[str, Any]
    vocab: Mapping[int, bytes]
    replace: bool

    @classmethod
    def of(cls, rollouts: Sequence[Rollout], *, wanted: Cells, **others: Any) -> "Request":
        """Check what is asked; rollouts are put in order of their ids, so that no order of reading files matters."""
        if not wanted:
            raise PlanError("nothing is asked for: give at least one layer and one component")
        return cls(asked=dict(sorted(_check(rollouts).items())), wanted=wanted, **others)

    @property
    def key(self) -> str:
        """Hash of all that decides what is captured and how, by which an unfinished plan is found again."""
        asked = {
            "rollouts": [one.sha256 for one in self.asked.values()],
            "cells": sorted(self.wanted),
            "components": sorted([c.name, c.width, c.dtype, c.hook] for c in self.components),
            "codec": codec_record(self.codec),
            "replace": self.replace,
            "settings": self.settings,
            "provenance": {name: self.provenance.get(name) for name in ("model", "tokenizer", "settings")},
        }
        return digest(asked)[:16]


def _fresh(union: Union, request: Request, *, cells: Cells, names: Sequence[str]) -> Plan:
    """Plan the capture of some cells of some rollouts."""
    specs = tuple(c for c in request.components if any(c.name == name for name, _ in cells))
    budget, most_tokens = request.settings["batch_tokens"], request.settings["most_tokens"]
    batches = form_batches(union, [request.asked[n] for n in names], budget, replace=request.replace)
    stored = tuple(request.asked[n] for b in batches for n in b.stored)
    return Plan(
        request=request.key,
        rollouts=stored,
        batches=batches,
        layers=tuple(sorted({layer for _, layer in cells})),
        components=specs,
        chunk_tokens=form_chunks(specs, sum(r.n_tokens for r in stored), most_tokens),
        batch_tokens=budget,
        codec=request.codec,
        vocab=_used(request, names),
        provenance=request.provenance,
        statistics=request.settings["statistics"],
        replace=request.replace,
        after=_earlier(union, cells, names),
    )


def _used(request: Request, names: Sequence[str]) -> dict[int, bytes]:
    """Return the bytes of the token ids that these rollouts use."""
    used = {int(i) for i in np.unique(np.concatenate([request.asked[name].computed_ids for name in names]))}
    return {i: text for i, text in sorted(request.vocab.items()) if i in used}


def _earlier(union: Union, cells: Cells, names: Sequence[str]) -> tuple[int, ...]:
    held = (
        capture.number
        for capture in union.captures
        if any(c in capture.components and n in capture.layers for c, n in cells)
        and any(name in capture.rows for name in names)
    )
    return tuple(sorted({*held, *gone(union.drops)}))  # what is gone may be unreadable: it may have held them


def _is_store(path: Path) -> bool:
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return False
    storage.open_root(path)
    return True


def _check(rollouts: Sequence[Rollout]) -> dict[str, Rollout]:
    asked: dict[str, Rollout] = {}
    for one in rollouts:
        if one.rollout_id in asked:
            raise PlanError(
                f"rollout id {one.rollout_id!r} is there more than once in the input; rollout ids must be unique, "
                "rename one of them"
            )
        asked[one.rollout_id] = one
    if not asked:
        raise PlanError("there are no rollouts to capture: the input is empty, or nothing was selected from it")
    return asked


def _unfinished(path: Path, request: Request) -> list[Plan]:
    plans = []
    for directory in laid_down(path):
        with suppress(OSError, ValueError):
            record = read_plan(directory)
            if record.request == request.key and (directory / "group").is_dir():
                plans.append(record.plan(request.asked, _used(request, record.rollout_ids)))
    return plans


def _products(union: Union, request: Request, planned: set[tuple[str, str, int]]) -> list[tuple[Cells, list[str]]]:
    """Split what is missing into full products of rollouts and cells."""
    missing: dict[Cells, list[str]] = {}
    for name in request.asked:
        have = set() if request.replace else {(c, layer) for layer, c in union.cells_of(name)}
        rest = frozenset(cell for cell in request.wanted if cell not in have and (name, *cell) not in planned)
        if rest:
            missing.setdefault(rest, []).append(name)
    products = []
    for cells, names in missing.items():
        by_layers: dict[frozenset[int], set[str]] = {}
        for component in {c for c, _ in cells}:
            by_layers.setdefault(frozenset(n for c, n in cells if c == component), set()).add(component)
        for numbers, found in sorted(by_layers.items(), key=lambda item: sorted(item[1])):
            products.append((frozenset((c, n) for c in found for n in numbers), names))
    return products


def form_batches(union: Union, rollouts: Sequence[Rollout], batch_tokens: int, *, replace: bool) -> tuple[Batch, ...]:
    """Form batches; rollouts that the store knows keep the company they were computed in."""
    known = set() if replace else {r.rollout_id for r in rollouts} & set(union.rollout_ids)
    recorded: dict[tuple[int, int, tuple[str, ...]], tuple[Capture, set[str]]] = {}
    for name in sorted(known):
        capture, _ = union.newest(name)
        key = (capture.number, *capture.computed_with(name))
        recorded.setdefault(key, (capture, set()))[1].add(name)
    new = [r for r in rollouts if r.rollout_id not in known]
    formed = layout.batches([len(r.computed_ids) for r in new], budget=batch_tokens)
    batches = [Batch(members=tuple(new[i].rollout_id for i in group)) for group in formed]
    for (_, index, members), (capture, stored) in sorted(recorded.items(), key=lambda item: item[0]):
        batches.append(_recorded_batch(union, capture, index, members=members, stored=stored))
    return tuple(batches)


def _recorded_batch(union: Union, capture: Capture, index: int, *, members: tuple[str, ...], stored: set[str]) -> Batch:
    kept, company = [], {}
    for name in members:
        if name not in stored:
            tokens = union.tokens(name, capture.company_sha256(index, name))
            if tokens is None:
                continue  # compacted away since; the rest keep each other's company
            company[name] = tokens
        kept.append(name)
    return Batch(members=tuple(kept), company=company)


def form_chunks(components: Sequence[ComponentSpec], n_tokens: int, most_tokens: int) -> dict[str, int]:
    """Tokens a chunk by component; never more than the next power of two that holds all tokens."""
    whole = 1 << max(0, n_tokens - 1).bit_length()
    return {c.name: layout.chunk_tokens(c.width, c.itemsize, most_tokens=min(most_tokens, whole)) for c in components}


def read_plan(directory: Path) -> PlanFile:
    """Read plan.json of a plan's directory."""
    return PlanFile.model_validate_json((directory / "plan.json").read_bytes())


def lay_down(store: Path, plan: Plan) -> Path:
    """Put the plan on disk, whole, or find it there, and return its directory.

    Raises
    ------
    PlanError
        The plan on disk was begun with other versions, on another device or with another number of threads; or it was
        committed meanwhile.
    ReadOnlyError
        The directory beside the store can't be written.
    """
    plans = plans_directory(store)
    directory = plans / plan.key
    with storage.writable(plans):
        plans.mkdir(exist_ok=True)
        _clear_committed(store)
        if not (directory / "plan.json").exists():
            _refuse_committed(store, plan)
            _build(directory, plan)
    _refuse_other_environment(directory, plan)
    return directory


def _clear_committed(store: Path) -> None:
    """Remove what is left of plans whose process died between publishing them and cleaning up."""
    for directory in laid_down(store):
        if not (directory / "group").is_dir():
            storage.discard(directory)


def _refuse_committed(store: Path, plan: Plan) -> None:
    for number in storage.numbered(store / "captures"):
        if plan_of(store / "captures" / f"{number:04d}") == plan.key:
            raise PlanError(
                f"this plan was carried out already, by another process, as capture {number} of {store}; plan again to "
                "see what is missing"
            )


def _build(directory: Path, plan: Plan) -> None:
    aside = directory.with_name(f"{plan.key}.{uuid.uuid4().hex}.partial")
    try:
        aside.mkdir(parents=True)  # whoever finished the last plan may have removed their directory
        record = PlanFile.of(plan)
        build_group(aside / "group", plan, created=record.created)
        storage.write_atomic(aside / "plan.json", record.model_dump_json().encode())
        (aside / "parts").mkdir()
        Partials.make_directories(aside / "partials", plan)
        storage.sync_files(aside)
        try:
            os.rename(aside, directory)
        except OSError:
            if not (directory / "plan.json").exists():
                raise
        # else another process laid the same plan down first
    finally:
        storage.remove(aside)


def _refuse_other_environment(directory: Path, plan: Plan) -> None:
    then = read_plan(directory).provenance.get("environment") or {}
    now = plan.provenance.get("environment") or {}
    for name in sorted(then.keys() | now.keys()):
        if json.dumps(then.get(name), sort_keys=True) != json.dumps(now.get(name), sort_keys=True):
            raise PlanError(
                f"this capture was begun with {name} {then.get(name)} and now has {now.get(name)}, so its rows would "
                f"not be the same bits; go on with {then.get(name)}, or delete {directory} to begin anew"
            )
