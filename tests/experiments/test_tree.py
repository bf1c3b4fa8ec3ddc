"""An experiment tree: variants, nested prompt sets, and all that is joined to its responses."""

import json
from pathlib import Path
from typing import Any

import pytest

from experiments import Experiment, ExperimentError, TokenSpan, read_classifications

TOY = Path(__file__).parents[1] / "data" / "golden" / "toy_experiment"
CONFIG: dict[str, Any] = {
    "defaults": {"extraction": "base", "application": "instruct"},
    "model_variants": {
        "base": {"model": "toy/base"},
        "instruct": {"model": "toy/it"},
        "lora": {"model": "m", "lora": "a"},
    },
}


def tree(root: Path, config: Any = None) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    return root


def response(path: Path, **extra: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    body = {"prompt": "p", "response": "", "token_ids": [1, 2, 3, 4], "prompt_end": 4, **extra}
    path.write_text(json.dumps(body))


def test_the_golden_tree() -> None:
    toy = Experiment(TOY)
    assert toy.variant_name() == "instruct"
    assert toy.variant_name(mode="extraction") == "base"
    assert toy.prompt_sets("instruct") == ["set1"]
    one, two, three = toy.transcripts("set1")
    assert (one.token_ids, one.prompt_end) == ((1, 5, 6, 7, 8, 64, 9, 65, 10, 11, 12), 4)
    assert (two.id, two.prompt_end, len(two.token_ids or ())) == ("2", 2, 14)
    assert [(t.role, t.token_start, t.token_end) for t in three.turns] == [("user", 0, 4), ("assistant", 4, 12)]
    assert one.prompt_set == "set1"
    assert one.labels["inference_model"] == "toy/it"
    assert toy.default_store("set1", "instruct") == TOY / "inference" / "instruct" / "set1.zarr"


def test_nested_sets_labels_tags_and_annotations_are_joined(tmp_path: Path) -> None:
    root = tree(tmp_path / "exp")
    sets = root / "inference" / "instruct" / "responses" / "rm" / "train_10"
    for i, sample in enumerate((4, 5), start=1):
        source = {"type": "audit", "run": "run-37", "sample_idx": sample, "classification": "old"}
        response(sets / f"{i}.json", source=source)
    (sets / "_tags.json").write_text('{"1": ["hacker"]}')
    (sets.parent / "train_10_annotations.json").write_text(
        '{"2": {"annotations": [{"token_start": 1, "token_end": 3, "label": "audit_question"}]}}'
    )
    (root / "audit_classifications.json").write_text(
        '{"classifications": [{"run": "run-37", "sample": 4, "label": "fabrication", "justification": "made up"}]}'
    )
    experiment = Experiment(root)
    one, two = experiment.transcripts("rm/train_10", variant="base", responses_from="instruct")
    assert one.labels["classification"] == "fabrication"
    assert one.labels["classification_justification"] == "made up"
    assert two.labels["classification"] == "old"
    assert (one.tags, two.tags) == (("hacker",), ())
    assert two.annotations == (TokenSpan(token_start=1, token_end=3, label="audit_question"),)
    assert one.prompt_set == "rm/train_10"
    assert experiment.prompt_sets("instruct") == ["rm/train_10"]
    assert experiment.default_store("rm/train_10", "base") == root / "inference" / "base" / "rm" / "train_10.zarr"
    assert experiment.variants["lora"].lora == "a"


def test_a_model_may_lie_in_the_tree_and_a_set_may_be_one_file(tmp_path: Path) -> None:
    root = tree(tmp_path / "exp", {"model_variants": {"own": {"model": "tiny"}, "hub": {"model": "org/tiny"}}})
    experiment = Experiment(root)
    assert experiment.model("own") == "tiny"
    (root / "tiny").mkdir()
    (root / "tiny" / "config.json").write_text("{}")
    assert (experiment.model("own"), experiment.model("hub")) == (str(root / "tiny"), "org/tiny")
    folder = root / "inference" / "own" / "responses" / "questions"
    folder.mkdir(parents=True)
    lines = [json.dumps({"id": f"q{i}", "token_ids": [i], "tags": ["t"]}) for i in (1, 2)]
    (folder / "questions.jsonl").write_text("\n".join(lines))
    assert experiment.prompt_sets("own") == ["questions"]
    assert [(one.id, one.prompt_set) for one in experiment.transcripts("questions")] == [
        ("q1", "questions"),
        ("q2", "questions"),
    ]


def test_without_defaults_the_first_variant_counts(tmp_path: Path) -> None:
    assert (
        Experiment(tree(tmp_path, {"model_variants": {"b": {"model": "x"}, "a": {"model": "y"}}})).variant_name() == "b"
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, r"config\.json is not valid: `model_variants`: Field required"),
        ({"model_variants": {}}, "`model_variants`: "),
        ({"model_variants": {"a": {}}}, r"`model_variants\.a\.model`: Field required"),
        ([], "is not valid"),
    ],
)
def test_a_config_that_is_not_valid(tmp_path: Path, config: Any, message: str) -> None:
    with pytest.raises(ExperimentError, match=message):
        Experiment(tree(tmp_path, config))


def test_what_is_not_there_is_said_with_what_is(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match=r"is not an experiment tree: it has no config\.json"):
        Experiment(tmp_path)
    experiment = Experiment(TOY)
    with pytest.raises(ExperimentError, match="has no model variant 'tuned'; it has base, instruct"):
        experiment.transcripts("set1", variant="tuned")
    with pytest.raises(ExperimentError, match="prompt sets with responses of 'instruct': set1"):
        experiment.transcripts("set2")
    with pytest.raises(ExperimentError, match="prompt sets with responses of 'base': none"):
        experiment.transcripts("set1", variant="base")
    for name in ("../../etc", "/etc", ""):
        with pytest.raises(ExperimentError, match="is not a name inside the tree"):
            experiment.transcripts(name)


def test_classifications_named_twice_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "audit.json"
    one = {"run": "run-1", "sample": 2, "label": "honest"}
    path.write_text(json.dumps({"classifications": [one]}))
    assert read_classifications(path) == {("run-1", 2): {"classification": "honest"}}
    path.write_text(json.dumps({"classifications": [one, one]}))
    with pytest.raises(ExperimentError, match="has run 'run-1' sample 2 more than once"):
        read_classifications(path)
