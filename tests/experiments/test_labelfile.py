"""Label files: types from the values, ids however they are called, and mistakes named with their line."""

import json
from pathlib import Path
from typing import Any

import pytest

from experiments.annotations import TextSpan, TokenSpan
from experiments.errors import ExperimentError
from experiments.labelfile import read_labels


def file(tmp_path: Path, name: str, content: Any) -> Path:
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_a_table_gives_each_column_the_type_of_all_its_values(tmp_path: Path) -> None:
    text = 'rollout_id,ok,n,x,name,code\n71,true,1,1,"a, b",007\n72,False,,2.5,,12\n'
    assert read_labels(file(tmp_path, "l.csv", text)).labels == {
        "71": {"ok": True, "n": 1, "x": 1.0, "name": "a, b", "code": "007"},
        "72": {"ok": False, "x": 2.5, "code": "12"},
    }
    assert isinstance(read_labels(file(tmp_path, "l.csv", text)).labels["71"]["x"], float)


def test_every_column_is_a_label_also_one_called_as_a_part_of_a_response(tmp_path: Path) -> None:
    text = "file,tokens,response\n1.json,7084,yes\n"
    assert read_labels(file(tmp_path, "l.csv", text)).labels == {"1": {"tokens": 7084, "response": "yes"}}


@pytest.mark.parametrize(
    "content",
    [
        {"71": {"label": "lie", "n": 1}, "72": {"label": "honest"}},
        [{"rollout_id": "71", "label": "lie", "n": 1}, {"id": 72, "label": "honest", "n": None}],
        '{"prompt_id": 71, "label": "lie", "n": 1}\n{"idx": 72, "label": "honest"}\n',
    ],
)
def test_json_in_every_form(content: Any, tmp_path: Path) -> None:
    found = read_labels(file(tmp_path, "l.json", content))
    assert found.labels == {"71": {"label": "lie", "n": 1}, "72": {"label": "honest"}}


def test_classifications_and_annotations_are_told_by_their_shape(tmp_path: Path) -> None:
    audit = {"classifications": [{"run": "run-1", "sample": 4, "label": "lie", "justification": "why"}]}
    assert read_labels(file(tmp_path, "a.json", audit)).samples == {
        ("run-1", 4): {"classification": "lie", "classification_justification": "why"}
    }
    ranges = {"71": {"annotations": [{"token_start": 1, "token_end": 3, "label": "x"}]}}
    assert read_labels(file(tmp_path, "t.json", ranges)).annotations == {
        "71": (TokenSpan(token_start=1, token_end=3, label="x"),)
    }
    texts = {"annotations": [{"idx": 71, "spans": [{"span": "so", "category": "x"}]}]}
    assert read_labels(file(tmp_path, "s.json", texts)).annotations == {"71": (TextSpan(span="so", label="x"),)}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("l.csv", "name,x\na,1\n", "needs a header with a column rollout_id .* it has name, x"),
        ("l.csv", "rollout_id,x,x\na,1,2\n", "needs a header"),
        ("l.csv", "rollout_id,x\na,1,2\n", r"l\.csv, line 2: 3 cells for 2 columns"),
        ("l.csv", "rollout_id,x\na,1\na,2\n", r"l\.csv, line 3: rollout 'a' is there twice"),
        ("l.csv", "rollout_id,x\n", "holds no labels"),
        ("l.json", [{"x": 1}], r"l\.json, line 1: labels of no rollout; each needs a `rollout_id`"),
        ("l.json", {"71": "lie"}, "labels of no rollout"),
        ("l.json", '{"71": {"x": Infinity}}', "a label that is not finite"),
        ("a.json", {"classifications": [{"run": "r"}]}, "a classification without `run`, `sample` and `label`"),
    ],
)
def test_mistakes_are_named_with_their_place(name: str, content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match=message):
        read_labels(file(tmp_path, name, content))
