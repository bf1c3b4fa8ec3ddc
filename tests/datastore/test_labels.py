"""Labels and annotations added later: the newest value of a rollout's label counts, nothing that is there changes."""

from pathlib import Path

import numpy as np
import pytest

import datastore
from datastore.errors import MisuseError, NotAStoreError, PlanError
from datastore.labels import add_annotations, add_labels
from datastore.schema import Annotation
from tests.datastore import making


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "run.zarr"
    first = making.rollout(
        "a", 5, labels={"reward": 1, "kind": "old"}, annotations=(span(0, 2, "lie"), span(2, 3, "act"))
    )
    making.capture(path, [first, making.rollout("b", 4, labels={"reward": 2})])
    return path


def span(start: int, stop: int, label: str) -> Annotation:
    return Annotation(token_start=start, token_end=stop, label=label)


def test_what_is_added_counts_over_what_was_captured_and_the_newest_most(store: Path) -> None:
    before = making.on_disk(store)
    assert add_labels(store, {"a": {"kind": "new", "ok": True}, "b": {"a/b": 0.5}}) == 1
    assert add_labels(store, {"a": {"kind": "newest"}}, attrs={"source": ["x.csv"]}) == 2
    table = datastore.open(store).rollouts
    assert table["kind"].to_dict() == {"a": "newest", "b": pytest.approx(np.nan, nan_ok=True)}
    assert table["reward"].to_dict() == {"a": 1, "b": 2}
    assert (table.loc["a", "ok"], table.loc["b", "a/b"]) == (True, 0.5)
    assert {name: data for name, data in making.on_disk(store).items() if name in before} == before


def test_a_label_of_another_type_makes_the_whole_label_text(store: Path) -> None:
    add_labels(store, {"b": {"reward": "high"}})
    assert datastore.open(store).rollouts["reward"].to_dict() == {"a": "1", "b": "high"}


def test_annotations_replace_those_of_the_same_label_only(store: Path) -> None:
    assert add_annotations(store, {"a": [span(3, 5, "lie"), span(4, 5, "lie")], "b": [span(0, 1, "x")]}) == 1
    assert sorted(datastore.open(store).annotations.values.tolist()) == [
        ["a", 2, 3, "act"],
        ["a", 3, 5, "lie"],
        ["a", 4, 5, "lie"],
        ["b", 0, 1, "x"],
    ]


def test_nothing_or_nonsense_is_refused_and_leaves_no_trace(store: Path, tmp_path: Path) -> None:
    before = making.on_disk(store)
    with pytest.raises(MisuseError, match="there are no labels to add"):
        add_labels(store, {"a": {}})
    with pytest.raises(MisuseError, match="there are no annotations to add"):
        add_annotations(store, {"a": []})
    with pytest.raises(MisuseError, match="label 'x' has the value None; a label is text, a number or a truth value"):
        add_labels(store, {"a": {"x": None}})  # type: ignore[dict-item]
    with pytest.raises(MisuseError, match="can't name a label"):
        add_labels(store, {"a": {"x" * 300: 1}})
    with pytest.raises(NotAStoreError, match="does not exist"):
        add_labels(tmp_path / "nowhere.zarr", {"a": {"x": 1}})
    assert making.on_disk(store) == before


@pytest.mark.parametrize("name", ["x" * 300, "ü" * 200, "_" + "x" * 200])
def test_a_rollout_with_a_label_too_long_for_its_array_is_refused(name: str) -> None:
    with pytest.raises(PlanError, match=r"^rollout 'a': .* can't name a label; give it a shorter one$"):
        making.rollout("a", 5, labels={name: True})


def test_a_label_may_be_as_long_as_a_name_of_a_directory(tmp_path: Path) -> None:
    first, later = "x" * 255, "y" * 255
    making.capture(tmp_path / "run.zarr", [making.rollout("a", 5, labels={first: 1})])
    add_labels(tmp_path / "run.zarr", {"a": {later: 2}})
    table = datastore.open(tmp_path / "run.zarr").rollouts
    assert (table.loc["a", first], table.loc["a", later]) == (1, 2)
