"""The token budget: what two forwards took, extrapolated, remembered for this model and device and no other."""

from pathlib import Path

import pytest

from capture import budget
from capture.budget import Measured, batch_tokens
from capture.components import find_components
from tests.capture import tiny

GB = 1 << 30


@pytest.mark.parametrize(
    ("measured", "host", "tokens"),
    [
        (Measured(fixed=0, per_token=1e6, row=1, free=10 * GB), 1000 * GB, 8192),
        (Measured(fixed=6 * GB, per_token=1e6, row=1, free=10 * GB), 1000 * GB, 2048),
        (Measured(fixed=0, per_token=1, row=1, free=100 * GB), 1000 * GB, 16_384),
        (Measured(fixed=0, per_token=1e9, row=1, free=1 * GB), 1000 * GB, 512),
        (Measured(fixed=0, per_token=1, row=1 << 20, free=100 * GB), 8 * GB, 1024),
    ],
    ids=["the device's memory", "less what a batch takes at all", "the most", "the least", "rows in the host's memory"],
)
def test_the_budget_is_what_fits(measured: Measured, host: int, tokens: int) -> None:
    assert batch_tokens(measured, host_bytes=host) == tokens


def test_a_forward_is_measured() -> None:
    model = tiny.tiny_model("llama", hidden_size=256, intermediate_size=2048)
    found = budget.measure(model, find_components(model), layers=[0, 2], components=["residual"], sizes=(256, 2048))
    assert found.row == 2 * 256 * 4
    assert found.per_token >= 1
    assert found.free > 0
    assert batch_tokens(found) >= 512


def test_it_is_remembered_for_its_key_alone(tmp_path: Path) -> None:
    key = {"model": "a", "device": "x", "layers": [0, 1]}
    found = Measured(fixed=1.0, per_token=1e6, row=8, free=10 * GB)
    assert budget.recall(key, directory=tmp_path) is None
    assert budget.remember(key, found, directory=tmp_path) == batch_tokens(found)
    assert budget.recall(dict(reversed(key.items())), directory=tmp_path) == batch_tokens(found)
    assert budget.recall(key | {"device": "y"}, directory=tmp_path) is None
    (tmp_path / "budgets.json").write_text("{")
    assert budget.recall(key, directory=tmp_path) is None
    assert budget.remember(key, found, directory=tmp_path) == batch_tokens(found), "a damaged file stops nobody"
