"""Routes of the query API that answer from tables: stores, rollouts, tokens, calibrations, families."""

from typing import Annotated, Any

import numpy as np
import pandas as pd
from fastapi import APIRouter, Query
from pydantic import JsonValue

from datastore.errors import AbsentError
from datastore.query import Store
from datastore.storage import numbered
from datastore.tables import FIXED
from view.answers import (
    AnnotationInfo,
    CalibrationInfo,
    CaptureInfo,
    ComponentInfo,
    DirectionInfo,
    Families,
    FamilyInfo,
    RolloutDetail,
    RolloutInfo,
    Rollouts,
    StoreInfo,
    Stores,
    TokenInfo,
    Tokens,
)
from view.asking import CELL_BYTES, Limits, filtered
from view.inflight import Share
from view.request import PROBLEMS, Asked, Condition, Limited, RolloutIds, Shared, Shelved, known_rollouts
from view.shelf import Served

__all__ = ["direction_infos", "router"]

router = APIRouter(responses=PROBLEMS)

VALUE_BYTES = 10
"""Characters that count as one of the values of `Limits.json_values`."""
TEXT_BYTES = 4
"""Of memory that a character takes on its way to JSON: itself, quoted, encoded."""
TOKEN_BYTES = 16
"""Of memory that a token takes where prefixes are compared: its id as it was read, as it is sorted, and the sort's."""
Labels = Annotated[list[str], Query(max_length=20, description="NAME=VALUE; repeated, all must hold.")]
Tags = Annotated[list[str], Query(max_length=20, description="Repeated, all must be there.")]


@router.get("/stores")
def stores(shelf: Shelved) -> Stores:
    """List the stores as they are now: layers, components, captures, labels, directions that have scores."""
    return Stores(stores=[_store_info(one) for one in shelf.served])


def _store_info(served: Served) -> StoreInfo:
    store = served.now()
    table = store.rollouts
    return StoreInfo(
        name=served.name,
        n_rollouts=len(table),
        n_tokens=int(store.cells.counts.sum()),
        layers=list(store.layers),
        components=[_component_info(store, name) for name in store.components],
        captures=[_capture_info(served.name, number, row) for number, row in store.captures.iterrows()],
        labels=[str(name) for name in table.columns if name not in FIXED],
        prompt_sets=sorted(set(table["prompt_set"])),
        directions=direction_infos(served.directions()) if served.results() else [],
        calibrations=numbered(served.path / "calibration"),
    )


def _component_info(store: Store, name: str) -> ComponentInfo:
    spec, layers = store.cells.components[name], store.cells.layers_of(name)
    there = [float((store.cells.where(name, layer)[0] >= 0).mean()) for layer in layers]
    return ComponentInfo(
        name=name, width=spec.width, dtype=spec.dtype, layers=list(layers), captured=float(np.mean(there))
    )


def _capture_info(name: str, number: Any, row: "pd.Series[Any]") -> CaptureInfo:
    return CaptureInfo(
        number=int(number),
        created=row["created"],
        model=row["model"],
        n_rollouts=int(row["n_rollouts"]),
        n_tokens=int(row["n_tokens"]),
        layers=list(row["layers"]),
        components=list(row["components"]),
        stored_bytes=int(row["stored_bytes"]),
        zarr=f"{name}/captures/{int(number):04d}",
    )


def direction_infos(table: pd.DataFrame) -> list[DirectionInfo]:
    """Return the rows of `Served.directions` as they are answered."""
    return [
        DirectionInfo(
            direction=str(label),
            trait=row["trait"],
            layer=int(row["layer"]),
            component=row["component"],
            method=row["method"],
            position=str(row["vector_position"] or ""),
            source=str(row.get("source") or ""),
            baseline=float(row.get("baseline", np.nan)),
            sha256=row["sha256"],
        )
        for label, row in table.iterrows()
    ]


@router.get("/rollouts")
def rollouts(
    served: Asked,
    *,
    where: Condition = None,
    label: Labels = [],  # noqa: B006 - FastAPI makes a new list for every request
    tag: Tags = [],  # noqa: B006
    prompt_set: Annotated[str | None, Query(max_length=1000)] = None,
    offset: Annotated[int, Query(ge=0)] = 0,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 100,
    limits: Limited,
    share: Shared,
) -> Rollouts:
    """List rollouts that satisfy all of what is asked, a page at a time, in the store's order."""
    table = filtered(served.now().rollouts, where=where, labels=label, tags=tag, prompt_set=prompt_set)
    page = table.iloc[offset : offset + limit]
    _reserve(page, limits, share, cure="ask for fewer at once with limit and offset")
    infos = [RolloutInfo(**_rollout_fields(str(name), row)) for name, row in page.iterrows()]
    return Rollouts(store=served.name, total=len(table), offset=offset, rollouts=infos)


def _reserve(page: pd.DataFrame, limits: Limits, share: Share, *, cure: str) -> None:
    """Refuse rows that are too much to send, and wait for room for the others; a label's text may have any length."""
    cells, characters = page.size + len(page), sum(map(_characters, page.to_numpy(object).flat))
    limits.check(cells + characters // VALUE_BYTES, what=f"{len(page)} rows, counted by their length,", cure=cure)
    share.take(cells * CELL_BYTES + characters * TEXT_BYTES)


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    return sum(map(_characters, value)) if isinstance(value, list | tuple) else 0


def _rollout_fields(name: str, row: "pd.Series[Any]") -> dict[str, Any]:
    labels = {str(key): _plain(value) for key, value in row.items() if key not in FIXED}
    return {
        "rollout_id": name,
        "n_tokens": int(row["n_tokens"]),
        "prompt_end": int(row["prompt_end"]),
        "prompt_set": str(row["prompt_set"]),
        "tags": list(row["tags"]),
        "token_sha256": str(row["token_sha256"]),
        "labels": labels,
    }


def _plain(value: Any) -> JsonValue:
    plain = value.item() if isinstance(value, np.generic) else value
    missing = plain is None or (isinstance(plain, float) and not np.isfinite(plain)) or plain is pd.NA
    return None if missing else plain


@router.get("/rollouts/{rollout_id:path}/tokens")
def tokens(
    rollout_id: str,
    served: Asked,
    limits: Limited,
    *,
    share: Shared,
    start: Annotated[int, Query(ge=0, description="Position of the first token.")] = 0,
    stop: Annotated[int | None, Query(ge=0, description="Position after the last one.")] = None,
) -> Tokens:
    """Return a rollout's tokens with their text, segment, role and turn."""
    store = served.now()
    known_rollouts(store, [rollout_id])
    n_tokens = int(store.cells.counts[store.cells.index[rollout_id]])
    first, last, _ = slice(start, stop).indices(n_tokens)
    columns = list(TokenInfo.model_fields)
    limits.check(
        max(0, last - first) * len(columns),
        what=f"tokens {first}-{last} of rollout {rollout_id!r}",
        cure="ask for fewer with start and stop",
    )
    share.take(max(0, last - first) * len(columns) * CELL_BYTES)
    table = store.tokens(rollout_id).iloc[first:last]
    values = {name: table[name].tolist() for name in columns}
    values["text"] = [text if isinstance(text, str) else None for text in values["text"]]
    rows = zip(*values.values(), strict=True)
    found = [TokenInfo(**dict(zip(columns, row, strict=True))) for row in rows]
    return Tokens(store=served.name, rollout_id=rollout_id, n_tokens=n_tokens, tokens=found)


@router.get("/rollouts/{rollout_id:path}")
def rollout(rollout_id: str, served: Asked, *, limits: Limited, share: Shared) -> RolloutDetail:
    """Return one rollout: its row, its annotations, and what is captured of it."""
    store = served.now()
    known_rollouts(store, [rollout_id])
    spans = store.annotations[store.annotations["rollout_id"] == rollout_id]
    place = store.cells.index[rollout_id]
    for table in (store.rollouts.iloc[[place]], spans):
        _reserve(table, limits, share, cure="read labels and annotations below /zarr instead")
    captured = {
        name: [layer for layer in store.cells.layers_of(name) if store.cells.where(name, layer)[0][place] >= 0]
        for name in store.components
    }
    return RolloutDetail(
        **_rollout_fields(rollout_id, store.rollouts.iloc[place]),
        annotations=[
            AnnotationInfo(token_start=start, token_end=stop, label=label)
            for start, stop, label in zip(spans["token_start"], spans["token_end"], spans["label"], strict=True)
        ],
        captured={name: layers for name, layers in captured.items() if layers},
    )


@router.get("/calibration")
def calibration(
    served: Asked,
    *,
    share: Shared,
    component: Annotated[str, Query(max_length=200)] = "residual",
    number: Annotated[int | None, Query(ge=1, description="That calibration; default the newest.")] = None,
) -> CalibrationInfo:
    """Return a calibration: norms, alignment and massive dimensions of every layer."""
    from calibrate.calibration import Calibration
    from calibrate.report import summary

    data = served.now().calibration(component, number=number)
    share.take(data.nbytes)
    found = Calibration(data=data)
    return CalibrationInfo(store=served.name, **summary(found))


@router.get("/families")
def families(
    served: Asked,
    *,
    limits: Limited,
    share: Shared,
    rollout: RolloutIds = None,
    least: Annotated[int | None, Query(ge=1, description="Tokens that neighbours must share.")] = None,
) -> Families:
    """List rollouts that begin with the same tokens: the pairs that are worth comparing."""
    from project.groups import families as found_in

    store = served.now()
    names = None if rollout is None else known_rollouts(store, rollout)
    if not len(store.cells.ids):
        raise AbsentError(f"store {served.name!r} holds no rollouts yet; capture into it first")
    asked = range(len(store.cells.ids)) if names is None else [store.cells.index[name] for name in names]
    limits.check(len(asked), what=f"{len(asked)} rollouts", cure="name fewer with rollout")
    share.take(int(store.cells.counts[list(asked)].sum()) * TOKEN_BYTES + len(asked) * CELL_BYTES)
    found = found_in(store, rollouts=names, least=least)
    infos = [FamilyInfo(rollouts=list(one.rollouts), fork=one.fork) for one in found]
    return Families(store=served.name, families=infos)
