"""Scores of a store against float64, and what is computed again: only what no result holds for the same bits."""

import tempfile
from functools import partialmethod
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

import calibrate
import datastore
import project
from datastore import scores
from datastore.errors import AbsentError, CorruptError, MisuseError, ReadOnlyError
from experiments.projections import read_projection
from project import cleaning, derive, kernel
from project.export import export_json
from project.tasks import Job
from tests.project.stores import direction, exact, rollout, values_of, write_store
from tests.unwritable import read_only

WIDTH = 24
NAMES = {"a": 9, "b": 40, "c": 1, "d": 23}
BOUND = (WIDTH + 2) * 2.0**-24


@pytest.fixture
def store(tmp_path: Path) -> datastore.Store:
    return write_store(tmp_path / "run.zarr", [rollout(name, n) for name, n in NAMES.items()])


def check(found: xr.Dataset, name: str, one: project.Direction, *, n_tokens: int) -> None:
    """One column of one rollout against float64 within the bound of the dot product."""
    here = found.isel(token=np.flatnonzero(found.rollout.values == name))
    column = np.flatnonzero(found.sha256.values == one.sha256)[0]
    values = values_of(name, one.layer, n_tokens=n_tokens, width=WIDTH)
    unit = one.values.astype(np.float64) / np.linalg.norm(one.values.astype(np.float64))
    limit = BOUND * (np.abs(values.astype(np.float64)) @ np.abs(unit))
    assert (np.abs(here.score.values[:, column] - exact(values, one.values)) <= limit).all()
    norms = np.linalg.norm(values.astype(np.float64), axis=1)
    np.testing.assert_allclose(here.norm.values[:, column], norms, rtol=2**-23)


def test_scores_and_norms_are_those_of_float64(store: datastore.Store) -> None:
    given_ = [direction("bs/lying", 10), direction("bs/lying", 20), direction("x/calm", 20)]
    found = project.scores(store, given_)
    assert found.score.dtype == found.norm.dtype == np.float32
    assert list(found.sha256.values) == [one.sha256 for one in given_]
    assert list(found.direction.values) == ["bs/lying@10", "bs/lying@20", "x/calm@20"]
    assert found.sizes["token"] == sum(NAMES.values())
    for name, n in NAMES.items():
        for one in given_:
            check(found, name, one, n_tokens=n)


def test_tokens_carry_the_stores_coordinates(store: datastore.Store) -> None:
    found = project.scores(store, [direction("bs/lying", 10)], rollouts=["d", "a"])
    assert list(dict.fromkeys(found.rollout.values)) == ["d", "a"]
    of_d = found.isel(token=found.rollout.values == "d")
    assert list(of_d.position.values) == list(range(NAMES["d"]))
    assert list(of_d.token_id.values) == list(rollout("d", NAMES["d"]).token_ids)
    assert list(np.unique(of_d.segment.values[:11])) == ["prompt"]
    check(found, "d", direction("bs/lying", 10), n_tokens=NAMES["d"])


@settings(max_examples=10)
@given(
    counts=st.lists(st.integers(1, 70), min_size=1, max_size=5),
    chunk=st.sampled_from([1, 4, 32]),
    statistics=st.booleans(),
    chosen=st.data(),
)
def test_any_shape_any_selection(
    tmp_path_factory: pytest.TempPathFactory, counts: list[int], chunk: int, statistics: bool, chosen: st.DataObject
) -> None:
    names = {f"r{i}": n for i, n in enumerate(counts)}
    store = write_store(
        tmp_path_factory.mktemp("s") / "run.zarr",
        [rollout(name, n) for name, n in names.items()],
        layers=(3, 4),
        most_tokens=chunk,
        statistics=statistics,
    )
    subset = chosen.draw(st.lists(st.sampled_from(sorted(names)), min_size=1, unique=True))
    given_ = [direction("bs/lying", 4), direction("x/calm", 3)]
    found = project.scores(store, given_, rollouts=subset)
    for name in subset:
        for one in given_:
            check(found, name, one, n_tokens=names[name])


@pytest.mark.parametrize("most", [20_000, 2, 1])
def test_a_result_longer_than_its_chunks_and_many_tasks(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks of single chunks, and of several where there would be too many tasks."""
    monkeypatch.setattr(Job, "tasks", partialmethod(Job.tasks, most=most))
    monkeypatch.setattr("project.tasks.CHUNK", 32)
    monkeypatch.setattr("datastore.scores.CHUNK", 32)
    names = {"a": 50, "b": 47, "c": 61}
    store = write_store(tmp_path / "run.zarr", [rollout(name, n) for name, n in names.items()])
    found = project.scores(store, [direction("bs/lying", 10), direction("x/calm", 20)], rollouts=["b", "c"])
    for name in ("b", "c"):
        check(found, name, direction("bs/lying", 10), n_tokens=names[name])
        check(found, name, direction("x/calm", 20), n_tokens=names[name])
    assert len(list((store.path / "scores/0001/score/c").iterdir())) == -(-(47 + 61) // 32)


def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Note the (layer, directions) of every block that is scored."""
    seen: list[tuple[int, int]] = []
    original = kernel._Kernel.score

    def noting(self: kernel._Kernel, block: datastore.Block) -> object:
        found = original(self, block)
        seen.append((block.layer, 0 if found.scores is None else found.scores.shape[1]))
        return found

    monkeypatch.setattr(kernel._Kernel, "score", noting)
    return seen


def test_only_what_is_new_is_computed(store: datastore.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = direction("bs/lying", 10), direction("x/calm", 10)
    before = project.scores(store, [first], rollouts=["a", "b"])
    seen = computed(monkeypatch)
    again = project.scores(store, [first], rollouts=["a", "b"])
    assert seen == []
    xr.testing.assert_identical(before, again)
    project.scores(store, [first, second], rollouts=["a", "b"])
    assert set(seen) == {(10, 1)}, "only the new column"
    seen.clear()
    found = project.scores(store, [first, second])
    assert set(seen) == {(10, 2)}
    for name, n in NAMES.items():
        check(found, name, first, n_tokens=n)
        check(found, name, second, n_tokens=n)
    assert len(list((store.path / "scores").glob("0*"))) == 3


def test_only_the_layers_asked_for_are_opened(store: datastore.Store) -> None:
    for chunk in (store.path / "captures/0001/residual/c").iterdir():
        for other in (0, 1):
            (chunk / str(other) / "0").unlink()
    found = project.scores(store, [direction("bs/lying", 20)])
    check(found, "b", direction("bs/lying", 20), n_tokens=NAMES["b"])
    with pytest.raises(CorruptError, match="chunk"):
        project.scores(store, [direction("bs/lying", 10)])
    assert len(list((store.path / "scores").iterdir())) == 2, "one result and zarr.json: a failure leaves nothing"


def test_a_changed_vector_is_noticed_and_computed_anew(store: datastore.Store) -> None:
    old, new = direction("bs/lying", 10), direction("bs/lying", 10, seed=1)
    project.scores(store, [old])
    with pytest.raises(AbsentError, match="new, or their files changed after they were scored; project them again"):
        project.stored_scores(store, [new])
    (said,) = project.work(store, [new]).changed
    assert "bs/lying" in said
    assert "has changed since scores/0001" in said
    check(project.scores(store, [new]), "b", new, n_tokens=NAMES["b"])
    assert list(project.stored_scores(store).sha256.values) == [new.sha256], "the latest counts where nothing is named"
    assert project.work(store, [old]).changed == ()


def test_a_replaced_capture_is_scored_anew(store: datastore.Store) -> None:
    one = direction("bs/lying", 10)
    project.scores(store, [one])
    newer = write_store(store.path, [rollout("b", NAMES["b"])], layers=(10,), replace=True, seed=7)
    values = values_of("b", 10, n_tokens=NAMES["b"], width=WIDTH, seed=7)
    todo = project.work(newer, [one])
    assert [[str(todo.cells.ids[i]) for i in group.rollouts] for group in todo.groups] == [["b"]]
    found = project.scores(newer, [one])
    of_b = found.isel(token=found.rollout.values == "b")
    np.testing.assert_allclose(of_b.score.values[:, 0], exact(values, one.values), atol=1e-4)
    check(found, "d", one, n_tokens=NAMES["d"])


def test_a_layer_that_some_rollouts_lack_has_no_score_there(store: datastore.Store) -> None:
    more = write_store(store.path, [rollout("b", NAMES["b"])], layers=(30,))
    one = direction("bs/lying", 30)
    found = project.scores(more, [one, direction("x/calm", 10)])
    absent = project.work(more, [one]).absent
    assert {tuple(place): sorted(names) for place, names in absent.items()} == {("residual", 30): ["a", "c", "d"]}
    lacking = found.isel(token=found.rollout.values != "b")
    assert np.isnan(lacking.score.values[:, 0]).all()
    assert np.isfinite(lacking.score.values[:, 1]).all()
    check(found, "b", one, n_tokens=NAMES["b"])
    with pytest.raises(AbsentError, match="layer 30 is not captured for any of the 2 rollouts"):
        project.scores(more, [one], rollouts=["a", "c"])


def test_what_cleaning_needs_is_kept(store: datastore.Store) -> None:
    one, other = direction("bs/lying", 10), direction("x/calm", 20)
    found = project.scores(store, [one, other], dims=[8, 3])
    assert list(zip(found.dim_layer.values, found.dim.values, strict=True)) == [(10, 3), (10, 8), (20, 3), (20, 8)]
    here = found.isel(token=found.rollout.values == "b")
    values = values_of("b", 20, n_tokens=NAMES["b"], width=WIDTH).astype(np.float32)
    np.testing.assert_array_equal(here.dim_value.values[:, 2:], values[:, [3, 8]])
    unit = other.values / np.linalg.norm(other.values)
    np.testing.assert_allclose(found.dim_unit.values[:, 1], [0, 0, *unit[[3, 8]]], rtol=1e-6)


def test_wrong_directions_are_refused(store: datastore.Store) -> None:
    with pytest.raises(MisuseError, match=r"bs/lying .* has width 30 and the store's residual has 24"):
        project.scores(store, [direction("bs/lying", 10, width=30)])
    with pytest.raises(MisuseError, match="of a component that the store does not hold; it holds residual"):
        project.scores(store, [direction("bs/lying", 10, component="mlp_out")])
    with pytest.raises(MisuseError, match="no directions to score along"):
        project.scores(store, [])
    with pytest.raises(AbsentError, match="rollout 'zz' is not in the store"):
        project.scores(store, [direction("bs/lying", 10)], rollouts=["zz"])
    with pytest.raises(AbsentError, match="the store holds no scores"):
        project.stored_scores(store)
    with pytest.raises(MisuseError, match=r"dimensions \[24\] are not all in \[0, 24\)"):
        project.scores(store, [direction("bs/lying", 10)], dims=[24])


def test_a_labelled_array_of_directions(store: datastore.Store) -> None:
    one = direction("bs/lying", 15)
    array = xr.DataArray(
        one.values[np.newaxis],
        dims=("direction", "hidden"),
        coords={"trait": ("direction", ["t"]), "layer": ("direction", [15])},
    )
    check(project.scores(store, array), "a", one, n_tokens=NAMES["a"])


def test_a_store_that_cannot_be_written() -> None:
    with tempfile.TemporaryDirectory() as directory:  # pytest's own can't be entered by other users
        Path(directory).chmod(0o755)
        store = write_store(Path(directory, "run.zarr"), [rollout("a", 5)])
        one = direction("bs/lying", 10)
        beside = project.scores(store, [one], out=Path(directory, "beside.zarr"))
        with (
            read_only(store.path / "scores"),
            pytest.raises(ReadOnlyError, match=r"run\.zarr can't be written, so no scores .* give --out other\.zarr"),
        ):
            project.scores(store, [one])
        assert not list((store.path / "scores").glob("0*"))
        np.testing.assert_array_equal(project.scores(store, [one]).score, beside.score)


def test_results_beside_a_store(store: datastore.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, beside = direction("bs/lying", 10), tmp_path / "beside.zarr"
    check(project.scores(store, [one], out=beside), "b", one, n_tokens=NAMES["b"])
    assert not list((store.path / "scores").glob("0*"))
    seen = computed(monkeypatch)
    project.scores(store, [one], out=beside)
    assert seen == []


def test_a_calibrated_store_keeps_what_cleaning_needs(store: datastore.Store, tmp_path: Path) -> None:
    found = calibrate.fit(store, top_k=2)
    calibrate.save(found)
    tops = cleaning.top_dims(store, "residual")
    assert set(tops) == {10, 15, 20}
    assert all(dims[0] == WIDTH // 3 for dims in tops.values()), "the planted massive dimension comes first"
    one = direction("bs/lying", 10)
    scores = project.scores(store, [one])
    assert set(scores.dim.values) == {dim for dims in tops.values() for dim in dims}
    clean = derive.cleaned(scores, "top5-3layers", top_dims=tops)
    values = values_of("b", 10, n_tokens=NAMES["b"], width=WIDTH).astype(np.float64)
    values[:, clean.attrs["cleaned_dims"]] = 0
    np.testing.assert_allclose(clean.score.sel(rollout="b").values[:, 0], exact(values, one.values), atol=1e-4)
    export_json(store, scores, tmp_path / "out")
    data = read_projection(tmp_path / "out/bs/lying/run/b.json").massive_dim_data
    assert data is not None
    assert data.top_dims_by_layer == {layer: list(dims) for layer, dims in tops.items()}
    response = [float(v) for v in values_of("b", 10, n_tokens=NAMES["b"], width=WIDTH)[NAMES["b"] // 2 :, WIDTH // 3]]
    assert data.activation_values.response[WIDTH // 3] == response
    np.testing.assert_allclose(data.vec_components[WIDTH // 3], one.values[WIDTH // 3], rtol=1e-6)


def test_a_result_is_read_some_chunks_at_a_time() -> None:
    assert list(scores._some_at_a_time([(5, 23), (24, 40)], most=8)) == [(5, 8), (8, 16), (16, 23), (24, 32), (32, 40)]
    assert list(scores._some_at_a_time([(0, 8), (9, 10)], most=8)) == [(0, 8), (9, 10)]
