"""The query API against its own description: whatever a client sends, it answers as documented and never breaks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.view import served
from view import api_numbers, api_tables

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
ROUTES = [route for router in (api_tables.router, api_numbers.router) for route in router.routes]
PATHS = [str(getattr(route, "path", "")).replace(":path", "") for route in ROUTES]
GOOD: dict[str, dict[str, Any]] = {
    "/stores": {},
    "/rollouts": {"where": "lying", "label": ["lying=true"], "tag": ["audit"]},
    "/rollouts/{rollout_id}": {},
    "/rollouts/{rollout_id}/tokens": {"start": 1},
    "/calibration": {},
    "/families": {"least": 4},
    "/slice": {"rollout": "alone", "layers": "1-9", "dims": "0,3", "stop": 4},
    "/norms": {"rollout": "alone"},
    "/scores": {"mode": "cosine", "clean": "all"},
    "/spans": {"direction": "bs/lying@1", "by": "clause"},
    "/compare": {"label": "lying", "per": "annotation"},
}


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    store = served.scored_store(tmp_path_factory.mktemp("schema") / "run.zarr")
    with served.inside([store.path]) as server:
        yield schemathesis.openapi.from_url(f"{server.url}/openapi.json")


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_answers_are_as_described(described: Any, path: str, data: st.DataObject) -> None:
    case = data.draw(described[path]["GET"].as_strategy())
    case.call_and_validate(checks=CHECKS)


@pytest.mark.parametrize("path", PATHS)
def test_right_questions_are_answered_as_described(described: Any, path: str) -> None:
    parameters = {"rollout_id": "alone"} if "{" in path else {}
    answer = described[path]["GET"].Case(path_parameters=parameters, query=GOOD[path]).call_and_validate(checks=CHECKS)
    assert answer.status_code == 200
