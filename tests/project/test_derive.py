"""What follows from scores, on ragged rollouts, against float64 written out."""

from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import project
from datastore.errors import AbsentError, MisuseError
from project import derive, modeldiff
from tests.project.stores import direction, exact, rollout, values_of, write_store

NAMES = {"a": 9, "b": 31}
ONE, OTHER = direction("bs/lying", 10, baseline=0.25), direction("x/calm", 20, baseline=-1.0)
DIMS = [3, 8]


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> xr.Dataset:
    store = write_store(tmp_path_factory.mktemp("s") / "run.zarr", [rollout(name, n) for name, n in NAMES.items()])
    return project.scores(store, [ONE, OTHER], dims=DIMS, rollouts=list(NAMES))


def wide(name: str, layer: int, seed: int = 0) -> np.ndarray:
    return values_of(name, layer, n_tokens=NAMES[name], width=24, seed=seed).astype(np.float64)


def test_cosine_and_normalised(scored: xr.Dataset) -> None:
    values = wide("b", 20)
    norms, score = np.linalg.norm(values, axis=1), exact(values, OTHER.values)
    ours = derive.cosine(scored).sel(rollout="b").values[:, 1]
    np.testing.assert_allclose(ours, score / norms, rtol=1e-5, atol=1e-6)
    response = norms[NAMES["b"] // 2 :].mean()
    ours = derive.normalised(scored).sel(rollout="b").values[:, 1]
    np.testing.assert_allclose(ours, score / response, rtol=1e-5, atol=1e-6)


def test_what_looks_at_neighbours_stays_inside_a_rollout(scored: xr.Dataset) -> None:
    score = exact(wide("b", 10), ONE.values)
    np.testing.assert_allclose(derive.centred(scored).sel(rollout="b").values[:, 0], score - score[0], atol=1e-4)
    moved = derive.velocity(scored).sel(rollout="b").values[:, 0]
    assert np.isnan(moved[0])
    np.testing.assert_allclose(moved[1:], np.diff(score), atol=1e-4)
    flat = derive.smooth(scored, 3).sel(rollout="b").values[:, 0]
    np.testing.assert_allclose(flat[[0, -1]], [score[:2].mean(), score[-2:].mean()], atol=1e-4)
    np.testing.assert_allclose(derive.less_baseline(scored).sel(rollout="b").values[:, 0], score - 0.25, atol=1e-4)


def test_cleaning_is_scoring_without_the_dimensions(scored: xr.Dataset) -> None:
    clean = derive.cleaned(scored, [8], top_dims={})
    for j, one in enumerate((ONE, OTHER)):
        values = wide("b", one.layer)
        values[:, 8] = 0
        np.testing.assert_allclose(clean.score.sel(rollout="b").values[:, j], exact(values, one.values), atol=1e-4)
        # of |h| about 40 nearly all lies in the dimension: 2^-12 of it is what float32 norms leave
        np.testing.assert_allclose(clean.norm.sel(rollout="b").values[:, j], np.linalg.norm(values, axis=1), atol=0.02)
    ranked = {10: [8, 3], 15: [8], 20: [8]}
    xr.testing.assert_identical(derive.cleaned(scored, "top5-3layers", top_dims=ranked), clean)
    assert derive.cleaned(scored, "none", top_dims=ranked).score.identical(scored.score)
    with pytest.raises(AbsentError, match=r"activations at dimensions \[5\] of layer 10 were not kept"):
        derive.cleaned(scored, [5, 8], top_dims={})


def test_ensembles(scored: xr.Dataset) -> None:
    both = derive.ensemble(scored, {"bs/lying@10": 3.0, "x/calm@20": 1.0}).sel(rollout="b").values
    expected = 0.75 * exact(wide("b", 10), ONE.values) + 0.25 * exact(wide("b", 20), OTHER.values)
    np.testing.assert_allclose(both, expected, atol=1e-4)
    with pytest.raises(MisuseError, match="'y@1' has no scores here; there are bs/lying@10, x/calm@20"):
        derive.ensemble(scored, {"y@1": 1.0})


def test_two_models_over_the_same_rollouts(tmp_path: Path) -> None:
    names = {f"r{i}": 12 + i for i in range(5)}
    rollouts = [rollout(name, n) for name, n in names.items()]
    a = write_store(tmp_path / "a.zarr", rollouts)
    b = write_store(tmp_path / "b.zarr", [*rollouts[:4], rollout("r4", 16, seed=9)], seed=1, model="toy/other")
    table = modeldiff.model_diff(a, b, [ONE, OTHER])
    for j, one in enumerate((ONE, OTHER)):
        means = np.array(
            [
                [
                    exact(values_of(n, one.layer, n_tokens=names[n], width=24, seed=s), one.values)[
                        names[n] // 2 :
                    ].mean()
                    for n in list(names)[:4]
                ]
                for s in (0, 1)
            ]
        )
        row = table.iloc[j]
        assert row["n_rollouts"] == 4, "r4 has other tokens in b"
        np.testing.assert_allclose([row["mean_a"], row["mean_b"]], means.mean(axis=1), rtol=1e-9)
        change = means[1] - means[0]
        np.testing.assert_allclose(row["paired_effect_size"], change.mean() / change.std(), rtol=1e-9)
        spread = np.sqrt((means[0].var(ddof=1) + means[1].var(ddof=1)) / 2)
        np.testing.assert_allclose(row["effect_size"], change.mean() / spread, rtol=1e-9)
        moved = np.mean(
            [
                (
                    values_of(n, one.layer, n_tokens=names[n], width=24, seed=1).astype(np.float64)
                    - values_of(n, one.layer, n_tokens=names[n], width=24).astype(np.float64)
                )[names[n] // 2 :].mean(axis=0)
                for n in list(names)[:4]
            ],
            axis=0,
        )
        np.testing.assert_allclose(row["cosine"], exact(moved, one.values) / np.linalg.norm(moved), rtol=1e-9)
    with pytest.raises(MisuseError, match="no rollout of the same id and tokens in common"):
        modeldiff.model_diff(a, b, [ONE], rollouts="r4")


def test_a_difference_is_cleaned_of_the_difference(tmp_path: Path) -> None:
    rollouts = [rollout(name, n) for name, n in NAMES.items()]
    stores = [write_store(tmp_path / f"{seed}.zarr", rollouts, seed=seed) for seed in (0, 1)]
    a, b = (project.scores(store, [ONE], dims=DIMS) for store in stores)
    change = modeldiff.difference(a, b)
    clean = derive.cleaned(change, [8], top_dims={})
    values = wide("b", 10, seed=1) - wide("b", 10)
    np.testing.assert_allclose(change.score.sel(rollout="b").values[:, 0], exact(values, ONE.values), atol=1e-4)
    values[:, 8] = 0
    np.testing.assert_allclose(clean.score.sel(rollout="b").values[:, 0], exact(values, ONE.values), atol=1e-4)


def test_a_difference_of_what_was_calibrated_otherwise_is_cleaned_as_far_as_both_kept_it(tmp_path: Path) -> None:
    rollouts = [rollout(name, n) for name, n in NAMES.items()]
    stores = [write_store(tmp_path / f"{seed}.zarr", rollouts, seed=seed) for seed in (0, 1)]
    a, b = (project.scores(store, [ONE], dims=dims) for store, dims in zip(stores, ([3, 8], [8, 5]), strict=True))
    change = modeldiff.difference(a, b)
    assert change.dim.values.tolist() == [8]
    values = wide("b", 10, seed=1) - wide("b", 10)
    values[:, 8] = 0
    clean = derive.cleaned(change, [8], top_dims={})
    np.testing.assert_allclose(clean.score.sel(rollout="b").values[:, 0], exact(values, ONE.values), atol=1e-4)
    with pytest.raises(AbsentError, match=r"dimensions \[5\] of layer 10 were not kept"):
        derive.cleaned(change, [5], top_dims={})
