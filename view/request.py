"""What every route of the query API is given: the store that a request names, the limits, and shared parameters."""

from typing import Annotated, Any, cast

from fastapi import Depends, Query
from starlette.requests import Request

from datastore.errors import AbsentError
from datastore.query import Store
from view.answers import Problem
from view.asking import Limits
from view.inflight import SHARE, Share
from view.shelf import Served, Shelf

__all__ = [
    "PROBLEMS",
    "Asked",
    "Condition",
    "LayerList",
    "Limited",
    "OneRollout",
    "RolloutIds",
    "Shared",
    "Shelved",
    "known_rollouts",
]

PROBLEMS: dict[int | str, dict[str, Any]] = {
    404: {"model": Problem, "description": "What is asked for is not there; the sentence lists what is."},
    413: {"model": Problem, "description": "The answer would be too large; the sentence says how to ask for less."},
    422: {"model": Problem, "description": "A parameter is wrong."},
    503: {"model": Problem, "description": "Busy, or the store changed meanwhile; ask again, as Retry-After says."},
}
"""What a route may answer instead, for its documentation."""


def _shelf(request: Request) -> Shelf:
    return cast(Shelf, request.app.state.shelf)


def _limits(request: Request) -> Limits:
    return cast(Limits, request.app.state.limits)


def _share(request: Request) -> Share:
    return cast(Share, request.scope[SHARE])


Shelved = Annotated[Shelf, Depends(_shelf)]
Limited = Annotated[Limits, Depends(_limits)]
Shared = Annotated[Share, Depends(_share)]


def _asked(
    shelf: Shelved,
    store: Annotated[
        str | None, Query(max_length=200, description="A store's name; needed where several are served.")
    ] = None,
) -> Served:
    return shelf.named(store)


Asked = Annotated[Served, Depends(_asked)]
LayerList = Annotated[
    str | None,
    Query(max_length=2000, description="Layers such as `10,15,20` or `10-20`; default all that are captured."),
]
RolloutIds = Annotated[
    list[str] | None, Query(max_length=1000, description="Rollout ids, the parameter repeated; default all.")
]
OneRollout = Annotated[str, Query(min_length=1, max_length=1000, description="A rollout id.")]
Condition = Annotated[
    str | None,
    Query(
        max_length=2000, description="A condition on the rollout table: `label == 'fabrication' and n_tokens > 500`."
    ),
]


def known_rollouts(store: Store, names: list[str]) -> list[str]:
    """Return the ids, each once.

    Raises
    ------
    AbsentError
        One is not in the store; the message lists some that are.
    """
    for name in names:
        if name not in store.cells.index:
            there = store.cells.ids[:8].tolist()
            more = len(store.cells.ids) - len(there)
            raise AbsentError(
                f"rollout {name[:80]!r} is not in the store, which holds {', '.join(there) or 'no rollouts'}"
                + (f" and {more} more" if more > 0 else "")
            )
    return list(dict.fromkeys(names))
