"""Which capture counts: the newest, as long as its tokens and model are those that go by the name now."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from datastore import maintenance, storage
from datastore.errors import AbsentError, CorruptError
from datastore.union import load_union, model_identity
from tests.datastore import making


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.zarr"


def numbers(path: Path, name: str) -> dict[tuple[int, str], int]:
    """Return which capture holds each cell of a rollout."""
    union = load_union(path)
    return {
        (layer, component): union.cell(component, layer, name).capture.number
        for layer, component in union.cells_of(name)
    }


def test_the_higher_number_counts(path: Path) -> None:
    asked = making.rollouts(5, 6)
    making.capture(path, asked, [1, 5], components=(making.RESIDUAL,))
    making.capture(path, asked[:1], [5, 7], components=(making.RESIDUAL,), replace=True, version=1)
    assert numbers(path, "0") == {(1, "residual"): 1, (5, "residual"): 2, (7, "residual"): 2}
    assert numbers(path, "1") == {(1, "residual"): 1, (5, "residual"): 1}
    union = load_union(path)
    assert union.rollout_ids == ("0", "1")
    assert (union.layers, list(union.components)) == ((1, 5, 7), ["residual"])
    assert union.cell("residual", 7, "0").tokens == (0, 5)
    assert making.same_bits(
        making.read(path, "residual", 5, "0"), making.values(making.RESIDUAL, 5, asked[0], version=1)
    )


def test_other_tokens_hide_what_was_captured_before(path: Path) -> None:
    """Layer 1 of the old tokens would have another number of rows than layer 5 of the new ones."""
    making.capture(path, making.rollouts(5, 6), [1, 5])
    other = making.rollout("0", 8, tokens=1)
    making.capture(path, [other], [5], components=(making.KEYS,), replace=True)
    assert numbers(path, "0") == {(5, "k_proj"): 2}
    union = load_union(path)
    capture, row = union.newest("0")
    assert (capture.number, int(capture.counts[row])) == (2, 8)
    assert union.rollout_ids == ("0", "1")
    maintenance.drop(path, rollouts=["0"])
    assert load_union(path).rollout_ids == ("1",)


def test_another_model_hides_what_was_captured_before(path: Path) -> None:
    making.capture(path, making.rollouts(5), [1, 5])
    other = {"model": {"name": "toy", "revision": "2", "dtype": "bfloat16"}}
    making.capture(path, making.rollouts(5), [5], replace=True, provenance=other)
    assert {layer for layer, _ in numbers(path, "0")} == {5}


def test_what_was_dropped_uncovers_what_was_there_before(path: Path) -> None:
    asked = making.rollouts(5)
    making.capture(path, asked, [1], components=(making.RESIDUAL,))
    making.capture(path, asked, [1], components=(making.RESIDUAL,), replace=True, version=1)
    aside = path.parent / "drop"
    storage.create_group(aside, {"dropped": [{"captures": [2], "rollouts": None, "layers": None, "components": None}]})
    storage.publish(aside, path / "dropped")
    assert numbers(path, "0") == {(1, "residual"): 1}


def test_absent_is_an_error_that_says_what_is_there(path: Path) -> None:
    making.capture(path, making.rollouts(*[3] * 10), [1, 5])
    making.capture(path, making.rollouts(3), [7], components=(making.KEYS,))
    union = load_union(path)
    with pytest.raises(
        AbsentError,
        match=r"residual at layer 7 of rollout '0' is not captured; captured for it: k_proj at layers 1, 5, 7; "
        r"residual at layers 1, 5; capture it to add it to the store",
    ):
        union.cell("residual", 7, "0")
    with pytest.raises(
        AbsentError, match=r"rollout 'x' is not in the store, which holds 0, 1, 2, 3, 4, 5, 6, 7 and 2 more"
    ):
        union.cell("residual", 1, "x")
    with pytest.raises(AbsentError, match="rollout 'x' is not in the store"):
        union.newest("x")


def test_a_capture_that_is_none(path: Path) -> None:
    making.capture(path, making.rollouts(3))
    storage.set_attributes(path / "captures" / "0001", {})
    with pytest.raises(
        CorruptError, match=r"0001 is no capture \(its zarr.json lacks the layers\); remove it or restore it"
    ):
        load_union(path)


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ({"name": "x", "revision": "1"}, {"name": "y", "revision": "1"}, True),
        ({"name": "x", "weights_sha256": "1", "revision": "a"}, {"name": "x", "weights_sha256": "1"}, True),
        ({"name": "x", "revision": "1"}, {"name": "x", "revision": "2"}, False),
        ({"revision": "1", "dtype": "bfloat16"}, {"revision": "1", "dtype": "float32"}, False),
        ({"revision": "1", "adapter": "z"}, {"revision": "1"}, False),
        ({"name": "x"}, {"name": "y"}, False),
        ({"name": "x"}, {"name": "x"}, True),
    ],
)
def test_a_model_is_its_weights_dtype_and_adapter(a: dict[str, Any], b: dict[str, Any], same: bool) -> None:
    assert (model_identity({"model": a}) == model_identity({"model": b})) is same
