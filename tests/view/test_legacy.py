"""The tree for the older viewer: its own numbers come back from it, in the shapes of files which that tool wrote."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import calibrate
import datastore
import project
from datastore.errors import AbsentError, MisuseError
from experiments import read_massive, read_projection
from experiments.tree import Experiment
from experiments.vectors import find_directions
from project.criteria import Criteria
from tests import house
from tests.datastore import making
from tests.project.stores import golden_store
from tests.view import served
from tests.view.served import BY_ID, ROLLOUTS, TRAITS, directions, exact
from view.legacy import write_tree

GOLDEN = house.ROOT / "tests/data/golden/toy_experiment"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> datastore.Store:
    return served.scored_store(tmp_path_factory.mktemp("legacy") / "run.zarr")


@pytest.fixture(scope="module")
def tree(store: datastore.Store) -> Path:
    root = store.path.parent / "experiments/toy"
    files = write_tree(store, root, variant="kimi")
    assert files == sum(path.is_file() for path in root.rglob("*"))
    return root


def loaded(path: Path) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{path} holds {name}, which a browser does not read")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_every_file_is_json_that_a_browser_reads(tree: Path) -> None:
    files = list(tree.rglob("*.json"))
    assert len(files) > len(ROLLOUTS) * len(TRAITS)
    for path in files:
        loaded(path)


def test_projections_are_the_scores(tree: Path) -> None:
    for one in ROLLOUTS:
        for trait in TRAITS:
            folder = tree / "inference/kimi/projections" / trait / one.prompt_set
            found = read_projection(folder / f"{one.rollout_id}.json")
            cut = one.prompt_end
            assert (found.metadata.n_prompt_tokens, found.metadata.prompt_id) == (cut, one.rollout_id)
            for direction in (d for d in directions() if d.trait == trait):
                entry, expected = found.entry(direction.layer), exact(one.rollout_id, direction)
                halves = np.array(entry.prompt, np.float64), np.array(entry.response, np.float64)
                assert [len(half) for half in halves] == [cut, len(expected) - cut]
                np.testing.assert_allclose(np.concatenate(halves), expected, rtol=1e-4, atol=1e-5)
                assert entry.baseline == 0.25
                assert entry.massive_dim_data is not None, "cleaning is to work at every layer"


def test_responses_are_the_rollouts(tree: Path) -> None:
    """Read back as any experiment tree is."""
    found = [one for name in ("games", "audits") for one in Experiment(tree).transcripts(name, variant="kimi")]
    assert {one.id for one in found} >= {"twin-a", "twin-b", "alone"}
    for one in found:
        rollout = BY_ID[one.id]
        assert one.token_ids == tuple(rollout.token_ids.tolist())
        assert one.prompt_end == rollout.prompt_end
        assert one.prompt + one.response == "".join(chr(65 + i % 26) for i in one.token_ids)  # type: ignore[operator]
        assert {**rollout.labels, **one.labels} == one.labels
        assert [(turn.role, turn.token_start, turn.token_end) for turn in one.turns] == [
            ("user", 0, rollout.prompt_end),
            ("assistant", rollout.prompt_end, len(rollout.token_ids)),
        ]


def test_annotations_are_found_as_that_viewer_finds_them(tree: Path) -> None:
    """It looks for the text of a span in the response, and takes the tokens that it overlaps."""
    for prompt_set, names in {"games": ["twin-a", "twin-b"], "audits": ["alone", "run/4 ü"]}.items():
        entries = loaded(tree / f"inference/kimi/responses/{prompt_set}_annotations.json")["annotations"]
        assert [entry["id"] for entry in entries] == sorted(names, key=[e["id"] for e in entries].index)
        for entry in entries:
            response = loaded(tree / f"inference/kimi/responses/{prompt_set}/{entry['id']}.json")["response"]
            (span,) = entry["spans"]
            assert span["category"] == "claim"
            assert response.find(span["span"]) == 0, "annotated are the first two tokens of each response"
            assert (span["token_end"] - span["token_start"], len(span["span"])) == (2, 2)


def test_the_calibration_lies_where_it_is_looked_for(tree: Path, store: datastore.Store) -> None:
    kept = store.calibration()
    places = [tree / "inference/kimi/massive_activations", tree / "inference/massive_activations"]
    for place in places:
        found = read_massive(place / "calibration.json")
        assert found.layers == [1, 5, 9]
        assert list(found.aggregate.top_dims_by_layer.values()) == kept["top_dims"].values.tolist()
        norms = np.array(list(found.aggregate.layer_norms.values()), np.float64)
        np.testing.assert_allclose(norms, kept["norm"].values, atol=0.06)


def test_the_experiment_is_listed(tree: Path) -> None:
    """That viewer lists what has something below `extraction/{category}/{trait}/{variant}/vectors`."""
    for trait in TRAITS:
        (file,) = (tree / "extraction" / trait / "kimi/vectors").rglob("metadata.json")
        assert file.parts[-4:-1] == ("response__5", "residual", "probe")
        assert {layer: about["baseline"] for layer, about in loaded(file)["layers"].items()} == {"1": 0.25, "5": 0.25}


def shape(value: Any) -> Any:
    """Keys and kinds of a document: those of a mapping with numbers for keys are all alike."""
    if isinstance(value, dict):
        named = {("#" if key.isdigit() else key): shape(one) for key, one in value.items()}
        return dict(sorted(named.items()))
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__


def lacking(theirs: Any, ours: Any, at: str = "") -> list[str]:
    """Where a document lacks a key of the other one, or holds another kind."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        return [
            line
            for key in theirs
            for line in (lacking(theirs[key], ours[key], f"{at}.{key}") if key in ours else [f"{at}.{key}"])
        ]
    if isinstance(theirs, list) and isinstance(ours, list):
        return lacking(theirs[0], ours[0], f"{at}[]") if theirs and ours else []
    return [] if theirs == ours else [f"{at}: {theirs} there, {ours} here"]


def test_the_files_have_what_that_tool_wrote(tmp_path: Path) -> None:
    """The same rollouts through the store, against files that the tool itself wrote of them."""
    store = golden_store(tmp_path / "run.zarr")
    calibrate.save(calibrate.fit(store))
    project.scores(store, project.select(find_directions(GOLDEN), (1, 3, 5), criteria=Criteria(layers="3")))
    write_tree(datastore.open(store.path), tmp_path / "toy", variant="instruct")
    inference = Path("inference/instruct")
    files = [
        inference / "projections/alignment/deception/set1/1.json",
        inference / "responses/set1/1.json",
        inference / "massive_activations/set1.json",
        inference / "massive_activations/calibration.json",
        Path("inference/massive_activations/calibration.json"),
    ]
    for file in files:
        assert (GOLDEN / file).is_file(), file
        theirs, ours = loaded_loosely(GOLDEN / file), loaded(tmp_path / "toy" / file)
        assert set(lacking(shape(theirs), shape(ours))) == set(), file
    (theirs,), (ours,) = (loaded_loosely(root / files[0])["projections"] for root in (GOLDEN, tmp_path / "toy"))
    assert (theirs["layer"], ours["layer"]) == (3, 3)
    np.testing.assert_allclose(ours["response"], theirs["response"], rtol=1e-4, atol=1e-4)


def loaded_loosely(path: Path) -> Any:
    return json.loads(path.read_text())


def test_what_is_there_is_kept(store: datastore.Store, tmp_path: Path) -> None:
    root = tmp_path / "toy"
    response = root / "inference/mine/responses/games/twin-a.json"
    response.parent.mkdir(parents=True)
    response.write_text('{"mine": 1}')
    config = (
        '{"defaults": {"application": "mine"}, "model_variants": {"other": {"model": "a"}, "mine": {"model": "b"}}}'
    )
    (root / "config.json").write_text(config)
    write_tree(store, root, rollouts=["twin-a"])
    assert response.read_text() == '{"mine": 1}'
    assert (root / "config.json").read_text() == config
    written = sorted(path.name for path in (root / "inference/mine/projections").rglob("*.json"))
    assert written == ["twin-a.json", "twin-a.json"], "of the variant that the config names, and that rollout alone"


def test_without_scores_there_is_nothing_to_show(tmp_path: Path) -> None:
    store = served.store_of(tmp_path / "run.zarr")
    with pytest.raises(AbsentError, match=r"holds no scores; compute them with python -m project"):
        write_tree(store, tmp_path / "toy")
    assert not (tmp_path / "toy").exists()


def test_a_name_that_leads_out_of_the_tree_is_refused(tmp_path: Path) -> None:
    rollout = making.rollout("../../../../../outside", 6)
    store = served.store_of(tmp_path / "run.zarr", [rollout])
    project.scores(store, directions()[:1])
    with pytest.raises(MisuseError, match=r"would be written outside .*; rename the rollout, prompt set, trait"):
        write_tree(datastore.open(store.path), tmp_path / "a/b/toy")
    with pytest.raises(MisuseError, match=r"would be written outside"):
        write_tree(datastore.open(store.path), tmp_path / "a/b/toy", variant="../../../elsewhere")
    assert sorted(path.name for path in tmp_path.rglob("*.json") if "run.zarr" not in str(path)) in (
        [],
        ["config.json"],
    )


def test_the_command_writes_it(store: datastore.Store, tmp_path: Path) -> None:
    words = ["export", str(store.path), "--export", "json", "--out", str(tmp_path / "toy"), "--ids", "alone"]
    done = subprocess.run([sys.executable, "-m", "view", *words], cwd=house.ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    files = sum(path.is_file() for path in (tmp_path / "toy").rglob("*"))
    assert done.stdout == f"{files} files written under {tmp_path / 'toy'}\n"
