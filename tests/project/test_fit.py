"""Fitting finds a planted direction and says so only where there is one; positions name the tokens they should."""

from pathlib import Path

import numpy as np
import pytest

import datastore
from datastore.dtype import numpy_dtype
from datastore.errors import AbsentError, MisuseError
from datastore.schema import Annotation, Rollout
from experiments.vectors import read_directions
from project.fit import fit_directions
from project.pooling import pooled_means
from project.positions import parse_position, tokens_at
from tests.project.stores import exact, rollout, values_of, write_store
from tests.project.test_commands import answered, run

WIDTH = 24
PLANTED = np.random.default_rng(5).standard_normal(WIDTH)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> datastore.Store:
    """40 rollouts, half of them lying: at layer 10 a direction says which, at layer 20 nothing does."""
    rollouts, given = [], {}
    for i in range(40):
        name, lying = f"r{i}", i % 2 == 0
        one = rollout(name, 20, labels={"lying": lying, "kind": "lie" if lying else "truth", "run": f"run-{i // 4}"})
        rollouts.append(one)
        values = values_of(name, 10, n_tokens=20, width=WIDTH, dtype="float32").astype(np.float64)
        values[10:] += (2.0 if lying else -2.0) * PLANTED
        given[name, 10] = values.astype(numpy_dtype("bfloat16"))
    return write_store(tmp_path_factory.mktemp("s") / "run.zarr", rollouts, layers=(10, 20), given=given)


@pytest.mark.parametrize("method", ["mean_diff", "probe"])
def test_a_planted_direction_is_found_where_it_is(store: datastore.Store, method: str) -> None:
    here, nowhere = fit_directions(store, "lying", method=method, position="response[:5]")
    assert here.auroc.value == 1.0
    planted = PLANTED / np.linalg.norm(PLANTED)
    assert float(here.direction.values.astype(np.float64) @ planted) > 0.9
    np.testing.assert_allclose(np.linalg.norm(here.direction.values), 1, rtol=1e-6)
    assert nowhere.auroc.value < 0.95
    assert 0.2 < here.shuffled.value < 0.8
    assert here.token_ids < 0.95, "the tokens are random"
    assert (here.n_fitted, here.n_judged) == (28, 12)


def test_random_knows_nothing_and_is_the_same_every_time(store: datastore.Store) -> None:
    first, again = (fit_directions(store, "kind=lie", method="random", layers=[20], seed=3)[0] for _ in range(2))
    np.testing.assert_array_equal(first.direction.values, again.direction.values)
    assert first.direction.trait == "fitted/kind_lie"


def test_mean_diff_and_baseline_are_those_of_float64(store: datastore.Store) -> None:
    (found,) = fit_directions(store, "lying", layers=[20], position="all[2:9]", held_out=0.5)
    names = list(store.rollouts.index)
    means = pooled_means(store, "residual", 20, tokens={n: np.arange(2, 9) for n in names})
    plain = [values_of(n, 20, n_tokens=20, width=WIDTH)[2:9].astype(np.float64).mean(axis=0) for n in names]
    np.testing.assert_allclose(means, plain, rtol=1e-12)
    score = exact(means, found.direction.values)
    assert found.direction.baseline is not None
    assert score.min() < found.direction.baseline < score.max()


def test_a_group_stays_on_one_side(store: datastore.Store) -> None:
    (found,) = fit_directions(store, "lying", layers=[10], group="run", held_out=0.3)
    assert found.n_fitted % 4 == found.n_judged % 4 == 0


def test_the_command_writes_a_tree_that_project_reads(
    store: datastore.Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (store.path, "--label", "lying", "--out", tmp_path / "v", "--trait", "bs/lying", "--layers", "10")
    assert run("fit", *words, "--position", "response[:5]", "--method", "probe", "--json") == 0
    (row,) = answered(capsys)["fitted"]
    (read,) = read_directions(tmp_path / "v")
    assert (read.trait, read.layer, read.method, read.position) == ("bs/lying", 10, "probe", "response[:5]")
    assert read.facts["auroc"] == row["auroc"] == 1.0
    assert len(read.facts["activations_sha256"]) == 64
    assert run(store.path, "--vectors", tmp_path / "v", "--layers", "10", "--json") == 0
    assert run("fit", *words) == 0
    assert "AUROC held out" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("label", "more", "message"),
    [
        ("kind", {}, "label 'kind' is not true or false but lie, truth; give --label kind=VALUE"),
        ("nothing", {}, "the rollouts have no label 'nothing'"),
        ("kind=other", {}, "none of the 40 rollouts are 'kind=other'"),
        ("lying", {"method": "rfm"}, "method 'rfm' is not known; choose one of mean_diff"),
        ("lying", {"position": "reply[:]"}, "'reply\\[:\\]' is no position"),
        ("lying", {"position": "thinking[:]"}, "with tokens at thinking\\[:\\], 0 are 'lying' and 0 are not"),
        ("lying", {"held_out": 1.5}, "a share of 1.5 can't be held out"),
    ],
)
def test_what_cannot_be_fitted(store: datastore.Store, label: str, more: dict[str, object], message: str) -> None:
    with pytest.raises(MisuseError, match=message):
        fit_directions(store, label, layers=[10], **more)  # type: ignore[arg-type]
    with pytest.raises(AbsentError, match="layer 11"):
        fit_directions(store, "lying", layers=[11])


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> datastore.Store:
    """System 0-1, user 2-4, assistant 5-9 (header 90 91, thinking 7), tool 10-11, user 12-13, assistant 14-19."""
    ids = [1, 1, 2, 2, 2, 90, 91, 5, 5, 5, 6, 6, 2, 2, 90, 91, 8, 8, 8, 8]
    role = np.array([1] * 2 + [2] * 3 + [3] * 5 + [4] * 2 + [2] * 2 + [3] * 6, np.int8)
    turn = np.array([0] * 2 + [1] * 3 + [2] * 5 + [3] * 2 + [4] * 2 + [5] * 6, np.int32)
    thinking = np.isin(np.arange(20), [7, 16, 17])
    one = Rollout(
        rollout_id="chat",
        token_ids=np.array(ids, np.int32),
        prompt_end=16,
        role=role,
        turn=turn,
        thinking=thinking,
        annotations=(Annotation(token_start=8, token_end=10, label="tool_call"),),
    )
    plain = Rollout(rollout_id="plain", token_ids=np.arange(6, dtype=np.int32), prompt_end=4)
    whole = Rollout(rollout_id="whole", token_ids=np.arange(6, dtype=np.int32), prompt_end=6)
    return write_store(tmp_path_factory.mktemp("s") / "run.zarr", [one, plain, whole], layers=(1,))


@pytest.mark.parametrize(
    ("name", "position", "tokens"),
    [
        ("chat", "response[:]", [18, 19]),
        ("chat", "response[:1]", [18]),
        ("chat", "turn[0]:response[:]", [8, 9]),
        ("chat", "turn[-1]:response[:]", [18, 19]),
        ("chat", "thinking[:]", [16, 17]),
        ("chat", "turn[0]:thinking[:]", [7]),
        ("chat", "prompt[-1]", [15]),
        ("chat", "turn[0]:prompt[:]", [2, 3, 4]),
        ("chat", "turn[5]:prompt[:]", []),
        ("chat", "system[:]", [0, 1]),
        ("chat", "tool_result[:]", [10, 11]),
        ("chat", "tool_call[-1]", [9]),
        ("chat", "all[18:99]", [18, 19]),
        ("plain", "response[:5]", [4, 5]),
        ("plain", "prompt[-1]", [3]),
        ("plain", "thinking[:]", []),
        ("whole", "response[:]", []),
        ("whole", "prompt[1:3]", [1, 2]),
    ],
)
def test_positions(chat: datastore.Store, name: str, position: str, tokens: list[int]) -> None:
    assert tokens_at(chat, position, name).tolist() == tokens


@pytest.mark.parametrize("text", ["response", "response[a]", "turn[1]:all[:]", "turn[x]:prompt[:]", "response[1:2:3]"])
def test_what_is_no_position(text: str) -> None:
    with pytest.raises(MisuseError, match=r"is no position|which has no turns"):
        parse_position(text)
