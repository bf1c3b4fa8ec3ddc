"""Routes of the query API that answer with numbers: activations, norms, scores, spans, comparisons."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal
from urllib.parse import quote

import numpy as np
from fastapi import APIRouter, Query, Response
from numpy.typing import NDArray
from starlette.requests import Request

from datastore.errors import AbsentError, MisuseError
from datastore.query import Store
from view.answers import ComparedGroup, Comparison, DirectionInfo, Norms, RolloutScores, Scores, Slice, SpanInfo, Spans
from view.api_tables import direction_infos
from view.asking import JSON_BYTES, Limits, picked_layers, ranges
from view.formats import ARROW, JSON, NPY, arrow, as_json, chosen_form, npy
from view.request import PROBLEMS, Asked, LayerList, Limited, OneRollout, RolloutIds, Shared, Shelved, known_rollouts
from view.scored import Mode, Wanted, by_rollout, in_mode, read, wanted

__all__ = ["router"]

router = APIRouter(responses=PROBLEMS)

Start = Annotated[int, Query(ge=0, le=2**31, description="Position of the first token.")]
Stop = Annotated[int | None, Query(ge=0, le=2**31, description="Position after the last token.")]
Component = Annotated[str, Query(max_length=200)]
Traits = Annotated[list[str] | None, Query(max_length=1000, description="`category/name`, or just the name; repeated.")]
Segment = Literal["prompt", "response"] | None
Clean = Annotated[
    str, Query(max_length=2000, description="`none`, `top5-3layers`, `all`, or dimensions such as `443,1731`.")
]
BINARY: dict[str, Any] = {
    NPY: {"schema": {"type": "string", "contentMediaType": NPY}},
    ARROW: {"schema": {"type": "string", "contentMediaType": ARROW}},
}


def _forms(model: type[Any]) -> dict[int | str, dict[str, Any]]:
    return {200: {"model": model, "content": BINARY}, 406: PROBLEMS[422]}


# -- activations -------------------------------------------------------------------------------------------------------


@router.get("/slice", responses=_forms(Slice))
def activations(
    request: Request,
    served: Asked,
    *,
    limits: Limited,
    share: Shared,
    rollout: OneRollout,
    component: Component = "residual",
    layers: LayerList = None,
    start: Start = 0,
    stop: Stop = None,
    dims: Annotated[str | None, Query(max_length=2000, description="Such as `443,0-63`; default all.")] = None,
    raw: Annotated[bool, Query(description="npy only: the stored bits, bfloat16 as uint16.")] = False,
) -> Response:
    """Return activations of one rollout, (token, layer, dim): JSON, npy or Arrow, by the Accept header.

    npy says what its axes are in the headers X-Layers, X-Dims, X-Start and X-Dtype. Arrow has a row for each token and
    layer, with the values as a list.
    """
    form = chosen_form(request)
    store = served.now()
    known_rollouts(store, [rollout])
    rows = store.select(
        component,
        rollouts=[rollout],
        layers=_layers(store, component, layers),
        positions=slice(start, stop),
        raw=raw,
    )
    chosen = _dims(dims, rows.shape[2])
    n_values = rows.shape[0] * rows.shape[1] * len(chosen)
    _check(limits, n_values, form, what=f"tokens x layers x dims of {rollout!r}")
    if raw and form != NPY:
        raise MisuseError(f"raw=true sends stored bits, which only npy holds; ask for it with Accept: {NPY}")
    share.take(n_values * _bytes_each(form))
    values = np.asarray(rows.values if dims is None else rows[:, :, chosen].values)
    numbers = [int(n) for n in rows["layer"].values]
    fields: dict[str, Any] = {"store": served.name, "component": component, "rollout_id": rollout}
    where = {**fields, "start": start, "stop": start + len(values), "layers": numbers}
    if form == JSON:
        return as_json(Slice(**where, dims=chosen, values=values.astype(np.float32, copy=False)))
    if form == NPY:
        dtype = values.dtype.name
        bits = values.view(np.uint16) if dtype == "bfloat16" else values
        axis = f"0-{rows.shape[2] - 1}" if dims is None else "".join(dims.split())
        return npy(bits, {"X-Layers": _joined(numbers), "X-Dims": axis, "X-Start": str(start), "X-Dtype": dtype})
    return arrow(
        _long(values, start=start, layers=numbers) | {"values": values.reshape(-1, len(chosen))},
        {**fields, "dims": _joined(chosen)},
    )


@router.get("/norms", responses=_forms(Norms))
def norms(
    request: Request,
    served: Asked,
    *,
    limits: Limited,
    share: Shared,
    rollout: OneRollout,
    component: Component = "residual",
    layers: LayerList = None,
    start: Start = 0,
    stop: Stop = None,
) -> Response:
    """Return the norms of one rollout's tokens, (token, layer), as they were kept at capture."""
    form = chosen_form(request)
    store = served.now()
    known_rollouts(store, [rollout])
    rows = store.norms(component, rollouts=[rollout], layers=_layers(store, component, layers))
    rows = rows.isel(token=slice(start, stop))
    _check(limits, rows.size, form, what=f"norms of {rollout!r}")
    share.take(rows.size * _bytes_each(form))
    values, numbers = rows.values, [int(n) for n in rows["layer"].values]
    fields: dict[str, Any] = {"store": served.name, "component": component, "rollout_id": rollout}
    if form == JSON:
        return as_json(Norms(**fields, start=start, stop=start + len(values), layers=numbers, values=values))
    if form == NPY:
        return npy(values, {"X-Layers": _joined(numbers), "X-Start": str(start), "X-Dtype": "float32"})
    return arrow(_long(values, start=start, layers=numbers) | {"norm": values.reshape(-1)}, fields)


def _layers(store: Store, component: str, text: str | None) -> list[int] | None:
    known = component in store.cells.components
    return picked_layers(text, store.cells.layers_of(component) if known else ())


def _dims(text: str | None, width: int) -> list[int]:
    if text is None:
        return list(range(width))
    asked = ranges(text, what="dims")
    beyond = [one.stop - 1 for one in asked if one.stop > width]
    if beyond:
        raise AbsentError(f"dim {beyond[0]} is not there; the component has dims 0-{width - 1}")
    return [dim for one in asked for dim in one]


def _check(limits: Limits, values: int, form: str, *, what: str) -> None:
    cure = "ask for fewer tokens (start, stop), layers or dims"
    limits.check(values, what=f"{values:,} {what}", cure=cure, itemsize=None if form == JSON else 4)


def _bytes_each(form: str) -> int:
    return JSON_BYTES if form == JSON else 4


def _joined(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))


def _long(values: NDArray[Any], *, start: int, layers: Sequence[int]) -> dict[str, NDArray[np.int32]]:
    tokens = np.arange(start, start + len(values), dtype=np.int32)
    return {"position": np.repeat(tokens, len(layers)), "layer": np.tile(np.array(layers, np.int32), len(tokens))}


# -- scores ------------------------------------------------------------------------------------------------------------


@router.get("/scores", responses=_forms(Scores))
def scores(
    request: Request,
    shelf: Shelved,
    served: Asked,
    *,
    limits: Limited,
    share: Shared,
    rollout: RolloutIds = None,
    trait: Traits = None,
    layers: LayerList = None,
    mode: Annotated[
        Mode, Query(description="h.v/|v|; that over the token's norm; over the rollout's mean norm.")
    ] = "raw",
    clean: Clean = "none",
    less: Annotated[str | None, Query(max_length=200, description="A store whose scores are subtracted.")] = None,
    start: Start = 0,
    stop: Stop = None,
) -> Response:
    """Return scores, every direction of the traits and layers asked for: JSON, npy or Arrow, by the Accept header.

    They are cleaned of massive dimensions first, of a difference of two stores too, then put in the mode asked for. npy
    is (token, direction), rollouts one after another; Arrow has a column for each direction.
    """
    form = chosen_form(request)
    other = None if less is None else shelf.named(less)
    asked = wanted(served, traits=trait, layers=layers, rollouts=rollout)
    kept = {name: slice(*slice(start, stop).indices(n)[:2]) for name, n in asked.tokens.items()}
    answered = sum(max(0, one.stop - one.start) for one in kept.values()) * len(asked.directions)
    _check_scores(limits, asked, answered, form=form)
    share.take(asked.n_values * 4 + answered * _bytes_each(form))
    found = in_mode(read(asked, less=other, clean=clean), mode)
    infos = direction_infos(asked.directions.loc[found.direction.values.tolist()])
    parts = {name: values[kept[name]] for name, values in by_rollout(found).items()}
    if form != JSON:
        return _binary_scores(form, parts, first={name: one.start for name, one in kept.items()}, infos=infos)
    rows = [
        RolloutScores(rollout_id=name, start=kept[name].start, stop=kept[name].start + len(values), values=values.T)
        for name, values in parts.items()
    ]
    less_name = None if other is None else other.name
    return as_json(Scores(store=served.name, less=less_name, mode=mode, clean=clean, directions=infos, rollouts=rows))


def _check_scores(limits: Limits, asked: Wanted, answered: int, *, form: str = ARROW) -> None:
    """Refuse what is too much to send, or to read for it."""
    what = f"the scores of {len(asked.tokens)} rollouts along {len(asked.directions)} directions"
    cure = "ask for fewer of them with rollout, trait and layers, or for fewer tokens with start and stop"
    limits.check(answered, what=what, cure=cure, itemsize=None if form == JSON else 4)
    limits.check(asked.n_values, what=f"to read, {what}", cure=cure, itemsize=4)


def _binary_scores(
    form: str, parts: Mapping[str, NDArray[np.float32]], *, first: Mapping[str, int], infos: Sequence[DirectionInfo]
) -> Response:
    values = np.concatenate(list(parts.values()))
    labels = [one.direction for one in infos]
    if form == NPY:
        counts = ",".join(f"{quote(name)}={len(one)}" for name, one in parts.items())
        return npy(values, {"X-Directions": ",".join(map(quote, labels)), "X-Rollouts": counts})
    names = [name for name, one in parts.items() for _ in range(len(one))]
    positions = [np.arange(first[name], first[name] + len(one), dtype=np.int32) for name, one in parts.items()]
    columns: dict[str, Any] = {"rollout_id": names, "position": np.concatenate(positions)}
    return arrow(columns | {label: values[:, j] for j, label in enumerate(labels)}, {})


# -- what follows from scores ------------------------------------------------------------------------------------------


@router.get("/spans")
def spans(
    served: Asked,
    limits: Limited,
    *,
    share: Shared,
    direction: Annotated[str, Query(max_length=1000, description="Its label, such as `bs/lying@20`.")],
    rollout: RolloutIds = None,
    by: Literal["window", "clause"] = "window",
    window: Annotated[int, Query(ge=1, le=1000, description="Tokens in a window.")] = 10,
    most: Annotated[int, Query(ge=1, le=1000)] = 20,
    per_rollout: Annotated[int, Query(ge=1, le=1000)] = 5,
    segment: Segment = None,
    clean: Clean = "none",
) -> Spans:
    """Return where a direction's mean score is strongest: windows or clauses, none overlapping another."""
    from project.spans import top_spans

    asked = wanted(served, labels=[direction], rollouts=rollout)
    _check_scores(limits, asked, 0)
    share.take(asked.n_values * 4)
    found = top_spans(
        served.now(),
        read(asked, clean=clean),
        direction,
        by=by,
        window=window,
        most=most,
        per_rollout=per_rollout,
        segment=segment,
    )
    columns = [found[name].tolist() for name in ("rollout", "start", "stop", "mean", "text")]
    rows = [
        SpanInfo(rollout_id=name, start=start, stop=stop, mean=mean, text=text)
        for name, start, stop, mean, text in zip(*columns, strict=True)
    ]
    return Spans(store=served.name, direction=direction, spans=rows)


@router.get("/compare")
def compare(
    served: Asked,
    limits: Limited,
    *,
    share: Shared,
    label: Annotated[str, Query(max_length=1000, description="A column of the rollout table.")],
    trait: Traits = None,
    layers: LayerList = None,
    rollout: RolloutIds = None,
    per: Literal["rollout", "turn", "role", "annotation"] = "rollout",
    segment: Segment = None,
    mode: Mode = "raw",
    clean: Clean = "none",
) -> Comparison:
    """Compare the groups that a label makes, along each direction: means with intervals, effect sizes, AUROC."""
    from project.groups import compare as compared

    asked = wanted(served, traits=trait, layers=layers, rollouts=rollout)
    _check_scores(limits, asked, 0)
    share.take(asked.n_values * 4)
    found = read(asked, clean=clean)
    table = compared(served.now(), found.assign(score=in_mode(found, mode)), label, per=per, segment=segment)
    groups = [
        ComparedGroup(part=row.pop(per, None), **{str(name): value for name, value in row.items()})
        for row in table.to_dict("records")
    ]
    return Comparison(store=served.name, label=label, per=per, groups=groups)
