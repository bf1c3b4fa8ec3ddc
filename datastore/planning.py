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
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from datastore import layout, storage
from datastore.capture_group import build_group
from datastore.errors import ConflictError, PlanError, ReadOnlyError
from datastore.schema import Batch, Codec, ComponentSpec, Plan, Rollout, digest
from datastore.union import Capture, Union, load_union, model_identity

__all__ = ["PlanFile", "lay_down", "plan", "plans_directory", "read_plan"]

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

    What the store holds already is left out. One plan is a full product; where the remainder is ragged there are several.
    Plans of the same request that are on disk unfinished come first, as they were made.

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
    path, provenance = Path(store), dict(provenance or {})
    asked = _check(rollouts)
    wanted: Cells = frozenset((c.name, layer) for c in components for layer in layers)
    if not wanted:
        raise PlanError("nothing is asked for: give at least one layer and one component")
    common = {
        "codec": codec or Codec(),
        "batch_tokens": batch_tokens,
        "statistics": statistics,
        "provenance": provenance,
    }
    request = _request(rollouts, wanted, components, most_tokens=most_tokens, replace=replace, **common)
    union = load_union(path) if _is_store(path) else Union(())
    if not replace:
        _refuse_conflicts(union, rollouts, provenance, path)
    unfinished = _unfinished(path, request, asked, vocab or {})
    planned = {
        (r.rollout_id, c.name, n) for p in unfinished for r in p.rollouts for c in p.components for n in p.layers
    }
    fresh = []
    for cells, names in _products(union, asked, wanted, planned=planned, replace=replace):
        group_layers = tuple(sorted({layer for _, layer in cells}))
        specs = tuple(c for c in components if any(c.name == name for name, _ in cells))
        batches = _batches(union, [asked[n] for n in names], batch_tokens, replace=replace)
        stored = [asked[n] for b in batches for n in b.stored]
        used = {int(i) for r in stored for i in np.unique(r.token_ids)}
        chunks = _chunks(specs, sum(r.n_tokens for r in stored), most_tokens)
        fresh.append(
            Plan(
                request=request,
                rollouts=tuple(stored),
                batches=batches,
                layers=group_layers,
                components=specs,
                chunk_tokens=chunks,
                vocab={i: b for i, b in sorted((vocab or {}).items()) if i in used},
                **common,  # type: ignore[arg-type]
            )
        )
    return (*unfinished, *fresh)


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


def _request(rollouts: Sequence[Rollout], wanted: Cells, components: Sequence[ComponentSpec], **settings: Any) -> str:
    provenance = settings.pop("provenance")
    codec = settings.pop("codec")
    return digest(
        {
            "rollouts": sorted([r.rollout_id, r.token_sha256] for r in rollouts),
            "cells": sorted(wanted),
            "components": sorted([c.name, c.width, c.dtype, c.hook] for c in components),
            "model": provenance.get("model"),
            "settings": provenance.get("settings"),
            "codec": codec_record(codec),
            **settings,
        }
    )[:16]


def _refuse_conflicts(union: Union, rollouts: Sequence[Rollout], provenance: Mapping[str, Any], path: Path) -> None:
    known, model = set(union.rollout_ids), model_identity(provenance)
    for one in rollouts:
        if one.rollout_id not in known:
            continue
        capture, row = union.newest(one.rollout_id)
        there = capture.token_sha256[row]
        if there != one.token_sha256:
            raise ConflictError(
                f"rollout {one.rollout_id!r} is in {path} with {int(capture.counts[row])} tokens (sha256 {there[:12]}) "
                f"and now has {one.n_tokens} tokens (sha256 {one.token_sha256[:12]}); nothing was captured, use another "
                "id, or --replace to let the new one count"
            )
        if capture.model != model:
            name = (provenance.get("model") or {}).get("name", "unknown")
            raise ConflictError(
                f"rollout {one.rollout_id!r} is in {path} from model {capture.model_name} and is now asked for from "
                f"model {name} with other weights or dtype; nothing was captured, use another store, or --replace"
            )


def _unfinished(path: Path, request: str, asked: Mapping[str, Rollout], vocab: Mapping[int, bytes]) -> list[Plan]:
    plans = []
    for file in sorted(plans_directory(path).glob("*/plan.json")):
        with suppress(OSError, ValueError):
            record = PlanFile.model_validate_json(file.read_bytes())
            if record.request != request:
                continue
            if (file.parent / "group").is_dir():
                plans.append(record.plan(asked, vocab))
            else:
                storage.remove(file.parent)  # committed; the process died before it cleaned up
    return plans


def _products(
    union: Union,
    asked: Mapping[str, Rollout],
    wanted: Cells,
    *,
    planned: set[tuple[str, str, int]],
    replace: bool,
) -> list[tuple[Cells, list[str]]]:
    """Split what is missing into full products of rollouts and cells."""
    missing: dict[Cells, list[str]] = {}
    for name in asked:
        have = set() if replace else {(c, layer) for layer, c in union.cells_of(name)}
        rest = frozenset(cell for cell in wanted if cell not in have and (name, *cell) not in planned)
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


def _batches(union: Union, rollouts: Sequence[Rollout], batch_tokens: int, *, replace: bool) -> tuple[Batch, ...]:
    """Form batches; rollouts that the store knows keep the company they were computed in."""
    known = set() if replace else {r.rollout_id for r in rollouts} & set(union.rollout_ids)
    recorded: dict[tuple[int, int, tuple[str, ...]], tuple[Capture, set[str]]] = {}
    for name in sorted(known):
        capture, _ = union.newest(name)
        key = (capture.number, *capture.computed_with(name))
        recorded.setdefault(key, (capture, set()))[1].add(name)
    new = [r for r in rollouts if r.rollout_id not in known]
    formed = layout.batches([r.n_tokens for r in new], budget=batch_tokens)
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


def _chunks(components: Sequence[ComponentSpec], n_tokens: int, most_tokens: int) -> dict[str, int]:
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
        The plan on disk was begun with other versions, on another device or with another number of threads.
    ReadOnlyError
        The directory beside the store can't be written.
    """
    directory = plans_directory(store) / plan.key
    if (directory / "plan.json").exists():
        _refuse_other_environment(directory, plan)
        return directory
    aside = directory.with_name(f"{plan.key}.{uuid.uuid4().hex}.partial")
    try:
        aside.mkdir(parents=True)
        record = PlanFile.of(plan)
        build_group(aside / "group", plan, created=record.created)
        storage.write_atomic(aside / "plan.json", record.model_dump_json().encode())
        (aside / "parts").mkdir()
        storage.sync_files(aside)
        with suppress(OSError):  # another process laid the same plan down first
            os.rename(aside, directory)
        if not directory.is_dir():
            os.rename(aside, directory)
    except PermissionError as error:
        raise ReadOnlyError(f"{aside.parent} can't be written: {error.strerror}; nothing was captured") from error
    finally:
        storage.remove(aside)
    return directory


def _refuse_other_environment(directory: Path, plan: Plan) -> None:
    then = read_plan(directory).provenance.get("environment") or {}
    now = plan.provenance.get("environment") or {}
    for name in sorted(then.keys() | now.keys()):
        if json.dumps(then.get(name), sort_keys=True) != json.dumps(now.get(name), sort_keys=True):
            raise PlanError(
                f"this capture was begun with {name} {then.get(name)} and now has {now.get(name)}, so its rows would not "
                f"be the same bits; go on with {then.get(name)}, or delete {directory} to begin anew"
            )
