"""The command line on the golden tree: the same best vector, the same files; what is skipped says why."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import datastore
from datastore import console
from experiments.projections import read_projection
from experiments.vectors import write_directions
from project.commands import app
from tests.project.stores import GOLDEN, direction, golden_store, rollout, write_store


def run(*words: str | Path) -> int:
    with pytest.raises(SystemExit) as stopped:
        console.run(app, [str(word) for word in words])
    return int(str(stopped.value.code))


@pytest.fixture
def golden(tmp_path: Path) -> datastore.Store:
    return golden_store(tmp_path / "run.zarr")


def answered(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def test_the_golden_tree_gives_its_best_vector_and_projections(
    golden: datastore.Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "projections"
    words = (golden.path, "--vectors", GOLDEN, "--steering", GOLDEN, "--layers", "best,5", "--force-model")
    assert run(*words, "--export", "json", "--out", out, "--json") == 0
    rows = answered(capsys)["directions"]
    assert [(row["layer"], row["source"]) for row in rows] == [(3, "steering"), (5, "layers_arg")]
    for name in ("1", "2", "3"):
        ours = read_projection(out / "alignment/deception/set1" / f"{name}.json")
        theirs = read_projection(GOLDEN / f"inference/instruct/projections/alignment/deception/set1/{name}.json")
        assert ours.metadata.n_prompt_tokens == theirs.metadata.n_prompt_tokens
        for entry in theirs.projections:
            mine = ours.entry(entry.layer)
            assert (mine.method, mine.selection_source) == (entry.method, entry.selection_source)
            assert mine.baseline == entry.baseline
            for half in ("prompt", "response"):
                np.testing.assert_allclose(getattr(mine, half), getattr(entry, half), rtol=0, atol=1e-5)
                assert mine.token_norms is not None
                assert entry.token_norms is not None
                # the old norms were taken in bfloat16
                np.testing.assert_allclose(
                    getattr(mine.token_norms, half), getattr(entry.token_norms, half), rtol=2.0**-8
                )


def test_an_experiment_stands_for_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = tmp_path / "toy"
    shutil.copytree(GOLDEN, tree, ignore=shutil.ignore_patterns("raw", "projections"))
    golden_store(tree / "inference/instruct/set1.zarr")
    words = ("--experiment", tree, "--prompt-set", "set1", "--layers", "best", "--force-model")
    assert run(*words, "--dry-run", "--json") == run(*words, "--out", tmp_path / "beside.zarr", "--json") == 0
    assert not (tree / "inference/instruct/projections").exists()
    capsys.readouterr()
    assert run(*words, "--json") == 0
    assert answered(capsys)["written"] == 3
    written = tree / "inference/instruct/projections/alignment/deception/set1/1.json"
    assert read_projection(written).entry(3).baseline == pytest.approx(0.3)
    assert run(*words, "--export", "json", "--out", tmp_path / "elsewhere", "--json") == 0
    assert (tmp_path / "elsewhere/alignment/deception/set1/1.json").is_file()
    assert run("--experiment", tree, "--layers", "best") == 2
    assert "--prompt-set" in capsys.readouterr().err


def test_a_dry_run_computes_nothing(golden: datastore.Store, capsys: pytest.CaptureFixture[str]) -> None:
    words = (golden.path, "--vectors", GOLDEN, "--layers", "3", "--force-model", "--json", "--ids", "1,2")
    assert run(*words, "--dry-run") == 0
    said = answered(capsys)
    tokens = int(golden.rollouts.loc[["1", "2"], "n_tokens"].sum())
    assert said["computed"] == {"directions": 1, "decoded_bytes": tokens * 64 * 2}
    assert not list((golden.path / "scores").glob("0*"))
    assert run(*words) == 0
    assert answered(capsys)["rollouts"] == 2
    assert run(*words) == 0
    assert answered(capsys)["computed"] == {"directions": 0, "decoded_bytes": 0}


def test_skipped_traits_say_why_and_only_nothing_at_all_is_a_failure(
    golden: datastore.Store, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (golden.path, "--vectors", GOLDEN, "--force-model", "--json")
    assert run(*words, "--layers", "best,3") == 0
    said = answered(capsys)
    assert [row["layer"] for row in said["directions"]] == [3]
    assert "no steering results" in said["skipped"][0]["why"]
    assert run(*words, "--layers", "best") == 1
    assert run(*words, "--layers", "3", "--traits", "nothing/there") == 1
    assert "nothing/there" in capsys.readouterr().out


def test_the_table_for_people(golden: datastore.Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(golden.path, "--vectors", GOLDEN, "--layers", "best,3", "--force-model") == 0
    text = capsys.readouterr().out
    assert "skipped" in text
    assert "3 rollouts; computed: 1 directions" in text


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--layers", "20"), 2, "layer 20 is not captured and no captured layer is within 2"),
        (("--layers", "x"), 2, "'x' is no layer"),
        (("--component", "mlp_out"), 2, "does not hold the component 'mlp_out'; it holds residual"),
        (("--segment", "middle"), 2, "neither prompt nor response"),
        (("--export", "csv"), 2, "--export 'csv' is not known"),
        (("--export", "json"), 2, "--export json needs --out DIR"),
        (("--where", "n_tokens > 1e9"), 2, "nothing is selected: no rollout is left after --where"),
        (("--ids", "9"), 2, "of the ids asked for are not there"),
        (("--rules", "best"), 2, "no selection rules 'best'"),
        (("--scheduler", "tcp://127.0.0.1:1"), 2, "there is no dask scheduler at tcp://127.0.0.1:1"),
    ],
)
def test_misuse_is_one_sentence(
    words: tuple[str, ...],
    code: int,
    message: str,
    golden: datastore.Store,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("datastore.cluster.CONNECT_SECONDS", 1)
    assert run(golden.path, "--vectors", GOLDEN, "--force-model", "--layers", "3", *words) == code
    assert message in " ".join(capsys.readouterr().err.split())


def test_vectors_of_another_width_or_model_are_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = write_store(tmp_path / "run.zarr", [rollout("a", 5)])
    write_directions(tmp_path / "wide", [direction("x/wide", 10, width=30)], variant="base")
    assert run(store.path, "--vectors", tmp_path / "wide", "--layers", "10", "--json") == 1
    assert "has width 30 and the store's residual has 24" in answered(capsys)["skipped"][0]["why"]
    write_directions(tmp_path / "other", [direction("x/other", 10, model="some/model")], variant="base")
    assert run(store.path, "--vectors", tmp_path / "other", "--layers", "10", "--json") == 1
    assert "--force-model" in answered(capsys)["skipped"][0]["why"]
    assert run(store.path, "--vectors", tmp_path / "other", "--layers", "10", "--force-model", "--json") == 0


def test_centring_needs_baselines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = write_store(tmp_path / "run.zarr", [rollout("a", 5)])
    write_directions(tmp_path / "v", [direction("x/known", 10, baseline=0.5)], variant="base")
    words = (store.path, "--layers", "10", "--export", "json", "--out", tmp_path / "out", "--json")
    assert run(*words, "--vectors", tmp_path / "v", "--centered") == 0
    centred = read_projection(tmp_path / "out/x/known/run/a.json")
    assert run(*words, "--vectors", tmp_path / "v") == 0
    plain = read_projection(tmp_path / "out/x/known/run/a.json")
    ours, theirs = (np.array(one.entry().response, np.float64) for one in (centred, plain))
    np.testing.assert_allclose(ours, theirs - 0.5, rtol=1e-6)
    assert (centred.metadata.centered, plain.metadata.centered) == (True, False)
    write_directions(tmp_path / "w", [direction("x/unknown", 10)], variant="base")
    capsys.readouterr()
    assert run(*words, "--vectors", tmp_path / "w", "--centered") == 2
    assert "have no baseline" in capsys.readouterr().err
