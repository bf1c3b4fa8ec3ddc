"""Selection: the rule sets against straight readings of the files, layer specs, snapping, and what is skipped."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datastore.errors import AbsentError, MisuseError
from experiments.direction import Direction, DirectionEntry
from experiments.steering import SteeringFile, SteeringResults, find_steering, read_steering
from experiments.vectors import DirectionIndex, find_directions, write_directions
from project.criteria import Criteria
from project.layerspec import parse_layer_requests, snapped
from project.ranking import RULES, rank
from project.selection import COLUMNS, Selection, select

DATA = Path(__file__).parents[1] / "data"
TOY = DATA / "golden" / "toy_experiment"
QWEN = DATA / "vectors" / "qwen3-4b"
FILES = find_steering(DATA / "steering")


# --- rules ------------------------------------------------------------------------------------------------------------


def candidates_of(runs: Sequence[dict[str, Any]]) -> list[DirectionEntry]:
    """A vector for every layer, method and component that was steered with, in a fixed order."""
    firsts = [run["config"]["vectors"][0] for run in runs]
    keys = sorted({(v["component"], v["method"], v["layer"]) for v in firsts})
    return [
        DirectionEntry(trait="a/b", component=c, method=m, layer=layer, position=firsts[0]["position"])
        for c, m, layer in keys
    ]


@pytest.mark.parametrize("rules", ["dev", "main", "seed"])
@pytest.mark.parametrize(
    "file", FILES, ids=lambda f: f"{f.experiment}-{f.trait}-{f.variant}-{f.position}-{f.prompt_set}"
)
def test_the_best_vector_of_a_real_file_is_that_of_a_straight_reading(file: SteeringFile, rules: str) -> None:
    rows = [json.loads(line) for line in Path(file.file).read_text().splitlines()]
    before = next(row for row in rows if row.get("type") == "baseline")["result"]["trait_mean"]
    runs = [row for row in rows if "config" in row]
    threshold = 70 if rules == "seed" else 77
    best: tuple[float, Any] | None = None
    for entry in candidates_of(runs):
        for run in runs:
            vector, result = run["config"]["vectors"][0], run["result"]
            if (vector["layer"], vector["method"], vector["component"]) != (entry.layer, entry.method, entry.component):
                continue
            change = result["trait_mean"] - before
            if result["coherence_mean"] >= threshold and (best is None or change > best[0]):
                best = (change, (entry.layer, entry.method, entry.component, vector["weight"]))
    ranked = rank(candidates_of(runs), {file.position: read_steering(file.file)}, rules=RULES[rules])
    got = [(b.delta, (b.entry.layer, b.entry.method, b.entry.component, b.coefficient)) for b in ranked[:1]]
    assert got == ([best] if best else [])


def run(layer: int, trait: float | None, coherence: float | None, **vector: Any) -> dict[str, Any]:
    chosen = {"layer": layer, "method": "probe", "component": "residual", "weight": float(layer), **vector}
    return {"result": {"trait_mean": trait, "coherence_mean": coherence}, "config": {"vectors": [chosen]}}


def results(
    tmp_path: Path, *runs: dict[str, Any], direction: str = "positive", before: float = 10.0
) -> SteeringResults:
    path = tmp_path / "results.jsonl"
    rows = [{"type": "header", "direction": direction}, {"type": "baseline", "result": {"trait_mean": before}}, *runs]
    path.write_text("\n".join(map(json.dumps, rows)))
    return read_steering(path, strict=True)


def entry(layer: int, **more: Any) -> DirectionEntry:
    return DirectionEntry(**{"trait": "a/b", "layer": layer, "method": "probe", "position": "response[:5]", **more})


def ranked(
    found: SteeringResults, *entries: DirectionEntry, rules: str = "dev", **more: Any
) -> list[tuple[int, float]]:
    return [(b.entry.layer, b.delta) for b in rank(entries, {"response[:5]": found}, rules=RULES[rules], **more)]


def test_the_threshold_is_part_of_the_rules(tmp_path: Path) -> None:
    found = results(tmp_path, run(1, 40, 90), run(3, 70, 80), run(3, 90, 72), run(5, 55, 76.9))
    assert ranked(found, entry(1), entry(3), entry(5)) == [(3, 60.0), (1, 30.0)]
    assert ranked(found, entry(1), entry(3), entry(5), rules="seed") == [(3, 80.0), (5, 45.0), (1, 30.0)]


def test_coherence_at_the_threshold_counts_and_the_first_of_equal_runs_stays(tmp_path: Path) -> None:
    found = results(tmp_path, run(1, 40, 77, weight=2.0), run(1, 40, 90, weight=9.0), run(1, 90, 76.999))
    (best,) = rank([entry(1)], {"response[:5]": found}, rules=RULES["dev"])
    assert (best.delta, best.coefficient, best.coherence) == (30.0, 2.0, 77.0)


def test_a_trait_to_be_lowered_is_best_where_it_fell_most(tmp_path: Path) -> None:
    found = results(
        tmp_path, run(1, 80, 90), run(2, 5, 90), run(2, 3, 90), run(3, 30, 90), direction="negative", before=50
    )
    for rules in ("dev", "main"):
        assert ranked(found, entry(1), entry(2), entry(3), rules=rules)[0] == (2, -47.0)
    assert ranked(found, entry(1), entry(2), entry(3), rules="seed")[0] == (1, 30.0), "it never looked"


def test_a_null_coherence_counts_as_below_and_a_null_trait_for_nothing(tmp_path: Path) -> None:
    found = results(tmp_path, run(1, 99, None), run(2, None, 99), run(3, 11, 99))
    for rules in RULES:
        assert ranked(found, entry(1), entry(2), entry(3), rules=rules) == [(3, 1.0)]


def test_only_seed_takes_a_run_of_another_component(tmp_path: Path) -> None:
    found = results(tmp_path, run(1, 60, 90, component="attn_contribution"))
    assert ranked(found, entry(1), rules="seed") == [(1, 50.0)]
    assert ranked(found, entry(1)) == ranked(found, entry(1), rules="main") == []
    assert ranked(found, entry(1, component="attn_contribution")) == [(1, 50.0)]


def test_ties_go_to_the_first_and_dev_keeps_one_of_a_layer(tmp_path: Path) -> None:
    found = results(tmp_path, run(4, 60, 90), run(2, 60, 90), run(2, 70, 90, method="mean_diff"))
    entries = entry(4), entry(2), entry(2, method="mean_diff")
    assert ranked(found, *entries[:2]) == [(4, 50.0), (2, 50.0)]
    assert ranked(found, *entries) == [(2, 60.0), (4, 50.0)]
    assert ranked(found, *entries, rules="main") == [(2, 60.0), (4, 50.0), (2, 50.0)]


def test_naturalness_is_mains_and_dev_keeps_all_when_none_is_natural(tmp_path: Path) -> None:
    found = results(tmp_path, run(1, 90, 90), run(2, 50, 90))
    unnatural = {(1, "probe", "residual"): 49.0}
    both = {**unnatural, (2, "probe", "residual"): 10.0}
    assert ranked(found, entry(1), entry(2), rules="main", naturalness=unnatural) == [(2, 40.0)]
    assert ranked(found, entry(1), entry(2), rules="main", naturalness=both) == []
    assert ranked(found, entry(1), entry(2), naturalness=both)[0] == (1, 80.0)
    strict = Criteria(min_naturalness=50.0).resolved_rules()
    assert [
        b.entry.layer for b in rank([entry(1), entry(2)], {"response[:5]": found}, rules=strict, naturalness=unnatural)
    ] == [2]
    assert len(rank([entry(1), entry(2)], {"response[:5]": found}, rules=strict, naturalness=both)) == 2


def test_a_least_change_is_asked_of_either_sign(tmp_path: Path) -> None:
    found = results(tmp_path, run(1, 14, 90), run(2, -40, 90))
    assert ranked(found, entry(1), entry(2), min_delta=5) == [(2, -50.0)]


# --- layers -----------------------------------------------------------------------------------------------------------


def test_the_grammar_of_layers() -> None:
    found = parse_layer_requests("best, best+5,best-3,16,10-20,0-75:5")
    assert [r.offset for r in found] == [0, 5, -3, None, None, None]
    assert found[3].layer == 16
    assert [list(r.span) for r in found[4:] if r.span is not None] == [list(range(10, 21)), list(range(0, 76, 5))]
    assert [r.layer for r in parse_layer_requests([3, 4])] == [3, 4]


@pytest.mark.parametrize("spec", ["beast", "best5", "-1", "5-", "9-3", "1-9:0", "1.5", "best+", "10;11"])
def test_what_is_no_layer_is_refused(spec: str) -> None:
    with pytest.raises(MisuseError, match=r"is no layer; write best, best\+5, best-5, 16, 10-20 or 0-75:5"):
        parse_layer_requests(spec)


def test_no_layer_at_all_is_refused() -> None:
    with pytest.raises(MisuseError, match=r"layers ' ,' name no layer; give for example best,best\+5"):
        Criteria(layers=" ,")


@pytest.mark.parametrize(
    ("layer", "within", "used"),
    [(12, 2, 10), (13, 2, 15), (15, 0, 15), (8, 2, 10), (52, 2, 50), (12, 5, 10), (-1, 12, 10)],
)
def test_the_nearest_captured_layer_is_used(layer: int, within: int, used: int) -> None:
    assert snapped(layer, range(10, 51, 5), within=within) == used


@given(st.integers(-5, 60), st.lists(st.integers(0, 50), min_size=1, max_size=9, unique=True), st.integers(0, 60))
def test_snapping_prefers_the_near_and_then_the_lower(layer: int, captured: list[int], within: int) -> None:
    inside = [
        other for distance in range(within + 1) for other in (layer - distance, layer + distance) if other in captured
    ]
    if inside:
        assert snapped(layer, captured, within=within) == inside[0]
    else:
        with pytest.raises(AbsentError, match=f"layer {layer} is not captured"):
            snapped(layer, captured, within=within)


def test_ties_go_to_the_lower_and_beyond_is_an_error() -> None:
    assert snapped(12, [14, 10]) == 10
    with pytest.raises(AbsentError, match=r"no captured layer is within 2 of it; captured are 10, 20, so choose one"):
        snapped(15, [20, 10])


# --- the table --------------------------------------------------------------------------------------------------------


def toy(captured: Sequence[int] = (1, 3, 5), *, layers: str = "best,best+5", **more: Any) -> Selection:
    criteria = Criteria(layers=layers, **more)
    return select(find_directions(TOY), captured, steering=find_steering(TOY), criteria=criteria)


def rows(found: Selection) -> list[tuple[Any, ...]]:
    columns = ["layer", "source", "requested", "requested_layer"]
    return [tuple(row) for row in found.directions[columns].itertuples(index=False)]


def test_best_of_the_golden_tree_is_what_the_old_tool_projected() -> None:
    old = json.loads((TOY / "inference/instruct/projections/alignment/deception/set1/1.json").read_text())[
        "projections"
    ][0]
    found = toy(layers="best")
    (row,) = found.directions.to_dict("records")
    assert tuple(found.directions.columns) == COLUMNS
    assert {key: row[key] for key in ("method", "layer", "baseline")} == {
        k: old[k] for k in ("method", "layer", "baseline")
    }
    assert (row["source"], row["delta"], row["coefficient"], row["sign"]) == (old["selection_source"], 60.0, 6.0, 1)
    assert (row["sha256"], row["norm"]) == (found.vectors[0].sha256, found.vectors[0].norm)
    assert row["file"].endswith("response__5/residual/probe/layer3.pt")
    assert (row["model"], found.skipped.empty, found.notes) == ("toy/base", True, ())


def test_a_layer_that_was_not_captured_keeps_what_was_asked_for() -> None:
    found = toy((0, 2, 5), layers="best,best+1,4")
    assert rows(found) == [(2, "steering", "best", 3), (5, "layers_arg", "best+1,4", 4)]
    assert found.directions["why"].tolist()[0] == "layer 3 is not captured, 2 is the nearest within 2"


def test_requests_that_meet_are_one_direction_and_steering_is_not_forgotten() -> None:
    assert rows(toy(layers="1-3,best,best+1")) == [(1, "layers_arg", "1-3", 1), (3, "steering", "1-3,best,best+1", 3)]
    assert rows(toy((1, 4), layers="4,best", snap=1)) == [(4, "steering", "4,best", 3)]


def test_a_range_is_the_captured_layers_in_it() -> None:
    assert [row[0] for row in rows(toy(layers="0-4"))] == [1, 3]
    with pytest.raises(AbsentError, match=r"no layer of 6-9 is captured; captured are 1, 3, 5"):
        toy(layers="6-9")


def test_beyond_the_snap_a_number_is_an_error_and_an_offset_is_skipped() -> None:
    with pytest.raises(AbsentError, match="layer 9 is not captured and no captured layer is within 2 of it"):
        toy(layers="best,9")
    found = toy(layers="best,best+5")
    assert len(found.vectors) == 1
    assert found.skipped.to_dict("records")[0]["requested"] == "best+5"
    assert "captured are 1, 3, 5" in found.skipped["why"][0]


def why(found: Selection) -> str:
    assert found.directions.empty
    return str(found.skipped["why"][0])


def test_without_steering_results_best_is_skipped_and_numbers_are_not() -> None:
    index = find_directions(TOY)
    found = select(index, [1, 3], criteria=Criteria(layers="best,3"))
    assert rows(found) == [(3, "layers_arg", "3", 3)]
    assert (
        found.skipped["why"][0]
        == "there are no steering results of trait alignment/deception, so none of its layers is best"
    )


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"traits": ["bs/lying"]}, "there are no vectors of trait 'bs/lying'; there are alignment/deception"),
        ({"component": "attn_contribution"}, "has no vectors of component 'attn_contribution'; it has residual"),
        ({"position": "prompt[-1]"}, r"has no vectors of position 'prompt\[-1\]'; it has response\[:5\]"),
        ({"variant": "instruct"}, "has no vectors of variant 'instruct'; it has base"),
        ({"steering_variant": "base"}, "has no steering results of variant 'base'; it has instruct"),
        ({"prompt_set": "pv"}, "has no steering results of prompt_set 'pv'; it has steering"),
        ({"method": "rfm"}, r"has no vector of method 'rfm' at layer 3 and position response\[:5\]; it has"),
        ({"min_coherence": 99.0}, "no steering run of trait alignment/deception with coherence of 99 or more used one"),
        ({"width": 128}, r"layer3\.pt has width 64 and the store's residual has 128; it is of another"),
        ({"model": "other/llm"}, r"belongs to toy/base, toy/it and the store to other/llm; .*give --force-model"),
    ],
)  # fmt: skip
def test_what_is_skipped_says_why(more: dict[str, Any], sentence: str) -> None:
    assert re.search(sentence, why(toy(layers="best", **more)))


@pytest.mark.parametrize("model", ["toy/it", "toy/base", "models/IT", None])
def test_the_model_that_was_steered_is_no_other_model(model: str | None) -> None:
    assert len(toy(layers="best", model=model).vectors) == 1


def test_another_model_is_taken_when_it_is_forced() -> None:
    assert len(toy(layers="best", model="other/llm", force_model=True).vectors) == 1


def test_a_trait_is_known_by_its_last_name_where_only_one_has_it() -> None:
    index = find_directions(QWEN)
    named = Criteria(layers="best", traits=["conflicted", "concealment", "ulterior_motive", "tonal/mocking"])
    found = select(index, range(36), criteria=named)
    assert found.directions["trait"].tolist() == ["rm_hack/ulterior_motive"]
    assert (
        found.skipped["why"][0]
        == "trait 'conflicted' is in several categories; name one of alignment/conflicted, emotion_set/conflicted"
    )
    assert found.skipped["why"][2].endswith("tonal__mocking.pt, named in manifest.json, is not there")


def test_a_manifest_says_which_layer_is_best() -> None:
    manifest = json.loads((QWEN / "manifest.json").read_text())["traits"]
    found = select(
        find_directions(QWEN), range(36), criteria=Criteria(layers="best", width=2560, model="Qwen/Qwen3-4B")
    )
    assert len(found.directions) == 20
    for row in found.directions.to_dict("records"):
        told = manifest[row["trait"]]
        assert (row["layer"], row["delta"], row["coefficient"]) == (told["layer"], told["delta"], told["coefficient"])
        assert row["source"] == "manifest"
        assert row["sign"] == (-1 if told["delta"] < 0 else 1)
        assert math.isnan(row["baseline"])


def vector(layer: int, method: str = "probe", position: str = "response[:5]", fill: float = 1.0) -> Direction:
    return Direction(trait="a/b", layer=layer, method=method, position=position, values=np.full(4, fill, np.float32))


def test_the_method_is_steerings_at_its_layer_and_the_first_known_elsewhere(tmp_path: Path) -> None:
    kept = (
        [vector(2, m) for m in ("mean_diff", "probe")]
        + [vector(4, m) for m in ("gradient", "mean_diff")]
        + [vector(6, "rfm")]
    )
    write_directions(tmp_path / "extraction", kept, variant="base")
    place = tmp_path / "steering/a/b/it/response__5/steering"
    place.mkdir(parents=True)
    results(place, run(2, 60, 90, method="mean_diff"))
    criteria = Criteria(layers="best,best+2,6")
    found = select(find_directions(tmp_path), [2, 4, 6], steering=find_steering(tmp_path), criteria=criteria)
    assert found.directions["method"].tolist() == ["mean_diff", "mean_diff", "rfm"]
    criteria = Criteria(layers="best", method="probe")
    found = select(find_directions(tmp_path), [2, 4, 6], steering=find_steering(tmp_path), criteria=criteria)
    assert (found.directions["method"].tolist(), found.directions["source"].tolist()) == (["probe"], ["steering"])


def test_a_cut_steering_file_is_noted_and_its_whole_lines_count(tmp_path: Path) -> None:
    write_directions(tmp_path / "extraction", [vector(2)], variant="base")
    place = tmp_path / "steering/a/b/it/response__5/steering"
    place.mkdir(parents=True)
    results(place, run(2, 60, 90), run(2, 99, 90))
    file = place / "results.jsonl"
    file.write_text(file.read_text()[:-20])
    found = select(find_directions(tmp_path), [2], steering=find_steering(tmp_path), criteria=Criteria(layers="best"))
    assert found.directions["delta"].tolist() == [50.0]
    assert found.notes[0].startswith(f"{file}, line 4: the line is cut off after")


def test_positions_and_variants_are_not_guessed(tmp_path: Path) -> None:
    write_directions(tmp_path, [vector(2), vector(2, position="prompt[-1]")], variant="base")
    assert "has vectors of the positions prompt[-1], response[:5]; name one with --position" in why(
        select(find_directions(tmp_path), [2], criteria=Criteria(layers="2"))
    )
    write_directions(tmp_path, [vector(2)], variant="it")
    assert "trait a/b has vectors of the variants base, it; name one" in why(
        select(find_directions(tmp_path), [2], criteria=Criteria(layers="2", position="response[:5]"))
    )


def test_a_vector_that_points_nowhere_is_skipped_and_the_others_go_on(tmp_path: Path) -> None:
    import torch

    (file, _) = write_directions(tmp_path, [vector(2), vector(3)], variant="base")
    torch.save(torch.zeros(4), file)
    found = select(find_directions(tmp_path), [2, 3], criteria=Criteria(layers="2,3"))
    assert found.directions["layer"].tolist() == [3]
    assert found.skipped["why"][0].endswith(
        "layer2.pt is all zeros, so it points nowhere; extract it again or leave the trait out"
    )


def test_directions_at_hand_are_selected_without_a_file() -> None:
    index = DirectionIndex(entries=(vector(2), vector(4, fill=2.0)))
    found = select(index, [2, 4], criteria=Criteria(layers="2,4", width=4))
    assert [v.values[0] for v in found.vectors] == [1.0, 2.0]


def test_wrong_criteria_are_refused_at_birth() -> None:
    with pytest.raises(MisuseError, match="there are no selection rules 'new'; choose one of dev, main, seed"):
        Criteria(rules="new")
    with pytest.raises(MisuseError, match="snap is -1 layers, which no layer is within; give 0 or more"):
        Criteria(snap=-1)
