"""Steering results: every real file parses, files of every era say the same, and a damaged line is named."""

import json
from pathlib import Path

import pytest

from experiments.errors import ExperimentError
from experiments.steering import find_steering, read_naturalness, read_steering

DATA = Path(__file__).parents[1] / "data"
TOY = DATA / "golden" / "toy_experiment"
REAL = sorted((DATA / "steering").glob("*results.jsonl"))
VECTOR = {"layer": 1, "component": "residual", "position": "response[:5]", "method": "probe", "weight": 5.0}
RUN = {"result": {"trait_mean": 40.0, "coherence_mean": 90.0, "n": 5}, "config": {"vectors": [VECTOR]}}


def test_there_are_all_the_real_files() -> None:
    assert len(REAL) == len(find_steering(DATA / "steering")) == 23


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.name.removesuffix("~results.jsonl"))
def test_a_real_file_reads_as_its_lines_do(path: Path) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    results = read_steering(path, strict=True)
    header, runs = rows[0], [row for row in rows if "config" in row]
    assert (results.header.trait, results.header.steering_model) == (header["trait"], header["steering_model"])
    assert results.sign == 1, "files from before the header had a direction are of traits to be raised"
    assert results.baseline is not None
    assert results.baseline.trait_mean == next(r for r in rows if r.get("type") == "baseline")["result"]["trait_mean"]
    got = [
        (r.vector.layer, r.vector.method, r.vector.weight, r.result.trait_mean, r.result.coherence_mean)
        for r in results.runs
    ]
    assert got == [
        (v["layer"], v["method"], v["weight"], r["result"]["trait_mean"], r["result"]["coherence_mean"])
        for r in runs
        for v in r["config"]["vectors"][:1]
    ]
    place = next(file for file in find_steering(path.parent) if file.file == str(path))
    assert place.trait == header["trait"]
    assert place.experiment == header["steering_experiment"]
    assert {run.vector.position for run in results.runs} == {place.position}


def test_nested_prompt_sets_are_told_from_positions() -> None:
    places = {(f.trait, f.variant, f.prompt_set) for f in find_steering(DATA / "steering") if f.experiment == "rm_syco"}
    assert ("rm_hack/eval_awareness", "rm_lora", "rm_syco/train_100") in places
    assert ("rm_hack/eval_awareness", "instruct", "steering") in places


@pytest.mark.parametrize(
    "below", [".", "steering", "steering/alignment/deception", "steering/alignment/deception/instruct/response__5"]
)
def test_results_are_found_from_any_directory_above_them(below: str) -> None:
    (found,) = find_steering(TOY / below)
    assert (found.trait, found.variant) == ("alignment/deception", "instruct")
    assert (found.position, found.prompt_set) == ("response[:5]", "steering")


def test_below_a_position_every_prompt_set_is_found(tmp_path: Path) -> None:
    for prompt_set in ("steering", "pv"):
        place = tmp_path / "a/b/it/response__5" / prompt_set
        place.mkdir(parents=True)
        write(place / "results.jsonl", RUN)
    found = find_steering(tmp_path / "a/b/it/response__5")
    assert [file.prompt_set for file in found] == ["pv", "steering"]


def write(path: Path, *rows: object, cut: int = 0) -> Path:
    text = "\n".join(json.dumps(row) for row in rows)
    path.write_text(text[: len(text) - cut])
    return path


def test_a_file_without_header_or_baseline_counts_from_zero(tmp_path: Path) -> None:
    results = read_steering(write(tmp_path / "results.jsonl", RUN))
    assert (results.header.trait, results.baseline, results.sign) == (None, None, 1)
    assert results.delta(results.runs[0]) == 40.0


def test_null_and_nan_means_are_none(tmp_path: Path) -> None:
    row = {**RUN, "result": {"trait_mean": float("nan"), "coherence_mean": None}}
    results = read_steering(write(tmp_path / "results.jsonl", row), strict=True)
    assert results.runs[0].result.coherence_mean is None
    assert results.delta(results.runs[0]) is None


def test_a_trait_to_be_lowered_has_a_negative_sign(tmp_path: Path) -> None:
    header = {"type": "header", "trait": "a/b", "direction": "negative"}
    assert read_steering(write(tmp_path / "results.jsonl", header, RUN)).sign == -1


@pytest.mark.parametrize("cut", [1, 3, 30, 90, 150])
def test_a_line_cut_short_is_named_and_the_others_count(tmp_path: Path, cut: int) -> None:
    path = write(tmp_path / "results.jsonl", RUN, RUN, cut=cut)
    results = read_steering(path)
    assert len(results.runs) == 1
    (problem,) = results.problems
    assert str(problem).startswith(f"{path}, line 2: the line is cut off after ")
    with pytest.raises(ExperimentError, match=r"results\.jsonl, line 2: the line is cut off after \d+ characters"):
        read_steering(path, strict=True)


def test_a_line_of_another_shape_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "results.jsonl", RUN, {"result": {}, "config": {"vectors": []}}, [1], {"layer": 3})
    problems = [str(problem) for problem in read_steering(path).problems]
    assert [p.split(": ", 1)[0].rsplit(" ", 1)[-1] for p in problems] == ["2", "3", "4"]
    assert "config.vectors" in problems[0]


def test_there_is_something_to_read(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="is not a directory, so no steering results can be read from it"):
        find_steering(tmp_path / "nowhere")
    with pytest.raises(ExperimentError, match="does not exist"):
        read_steering(tmp_path / "results.jsonl")


def test_naturalness_is_by_layer_method_and_component(tmp_path: Path) -> None:
    path = tmp_path / "naturalness.json"
    score = {"layer": 15, "method": "probe", "component": "residual", "mean": 41.5}
    path.write_text(json.dumps({"trait": "a/b", "scores": {"L15_probe_residual_c6.0": score}}))
    assert read_naturalness(path) == {(15, "probe", "residual"): 41.5}
    path.write_text('{"scores": {"L15": {"layer": 15}}}')
    with pytest.raises(ExperimentError, match=r"naturalness\.json is not a table of naturalness scores \(KeyError"):
        read_naturalness(path)
