"""What the page computes, without a page: thinned curves, chosen lines, pairs, first moves, addresses, percentiles."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from datastore.errors import AbsentError, MisuseError
from datastore.labels import add_labels
from tests.view import oracle, stores
from view import comparing, summaries
from view.model import Model
from view.plots import robust_range, thin
from view.state import State, from_query, to_query
from view.transcript import scales_of
from view.treatment import Treatment, picked


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Four games, each honest and not."""
    return Model(stores.game_store(tmp_path_factory.mktemp("model") / "games.zarr"))


@given(st.integers(1, 5000), st.integers(10, 400), st.integers(0, 2**32 - 1))
def test_a_thinned_curve_keeps_its_extremes(count: int, most: int, seed: int) -> None:
    y = np.random.default_rng(seed).standard_normal(count)
    y[: count // 7] = np.nan
    places = thin(np.arange(count), y, between=(0, count), most=most)
    assert len(places) <= max(most, 2) + 2
    assert (np.diff(places) > 0).all()
    if np.isfinite(y).any():
        assert np.nanmax(y[places]) == np.nanmax(y)
        assert np.nanmin(y[places]) == np.nanmin(y)


def test_a_part_that_is_zoomed_into_is_whole() -> None:
    x = np.arange(10_000)
    assert thin(x, x.astype(float), between=(500, 600), most=1000).tolist() == list(range(499, 602))


def test_the_range_is_not_the_first_tokens() -> None:
    values = np.concatenate([np.full((4, 2), 1000.0), np.tile([[-1.0, 2.0]], (20, 1))])
    assert robust_range(values) == pytest.approx((-1.45, 2.45))
    assert robust_range(np.empty((0, 0))) == (-1.0, 1.0)


TABLE = pd.DataFrame(
    [("a", 4, "residual"), ("a", 8, "residual"), ("a", 8, "attn_out"), ("b", 5, "residual")],
    columns=["trait", "layer", "component"],
)


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ({}, [0, 3]),
        ({"layer": 7}, [1, 3]),  # of several layers the nearest
        ({"traits": ["b"]}, [3]),
        ({"by": "layer", "trait": "a"}, [0, 1]),
        ({"by": "layer", "trait": "nobody"}, [0, 1]),
        ({"by": "component", "trait": "a", "layer": 8}, [1, 2]),
    ],
)
def test_which_lines_are_drawn(asked: dict[str, Any], wanted: list[int]) -> None:
    assert picked(TABLE, **asked) == wanted


def test_what_can_not_be_drawn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisuseError, match=r"mode 'loud' is not known; choose one of cosine, normalised, raw"):
        Treatment(mode="loud")
    with pytest.raises(MisuseError, match="a smoothing window of 26 tokens is not between 1 and 25"):
        Treatment(smooth=26)
    with pytest.raises(MisuseError, match="lines by 'mood' are not known"):
        picked(TABLE, by="mood")
    plain = Model(stores.plain_store(tmp_path / "plain.zarr", pairs=1))
    assert plain.values("g0-lie", Treatment()).shape == (72, 0)
    with pytest.raises(AbsentError, match="the store holds no scores"):
        plain.treated(("g0-lie",), Treatment())


def test_pairs_come_the_most_telling_first(model: Model) -> None:
    found = comparing.pairs(model.store, "label", reference="honest")
    assert set(zip(found["a"], found["b"], strict=True)) == {(f"g{i}-honest", f"g{i}-lie") for i in range(4)}
    assert (found["fork"] == stores.FORK).all()
    assert found["differ"].all()
    other = comparing.pairs(model.store, "label", reference="fabrication")
    assert set(other["a"]) == {f"g{i}-lie" for i in range(4)}


def test_a_lie_is_found_where_it_was_planted(model: Model) -> None:
    for game in range(4):
        names = (f"g{game}-honest", f"g{game}-lie")
        values = model.treated(names, Treatment(smooth=1))
        aligned = comparing.aligned_curves(model.scores(names), values, names, fork=model.fork(names))
        moved = comparing.first_moves(aligned).set_index("direction")
        for trait, after in stores.FIRST_MOVE.items():
            assert abs(moved["tokens_after"][f"{trait}@8"] - after) <= 1
        assert moved.index[0].startswith("bs/lying")


def test_what_is_before_a_fork_and_after_it_is_smoothed_by_itself(model: Model) -> None:
    names = ("g0-honest", "g0-lie")
    values = model.treated(names, Treatment(smooth=1))
    aligned = comparing.aligned_curves(model.scores(names), values, names, fork=stores.FORK)
    found = comparing.smoothed_apart(aligned, 5).sel(direction="bs/lying@4").values
    np.testing.assert_array_equal(found[0, : stores.FORK], found[1, : stores.FORK])
    curve = oracle.drawn(model.store, "g0-lie", "bs/lying@4", smooth=1)
    wanted = [curve[max(stores.FORK, i - 2) : i + 3].mean() for i in range(stores.FORK, len(curve))]
    np.testing.assert_allclose(found[1, stores.FORK :], wanted, rtol=1e-5)


def test_a_move_is_two_tokens_in_a_row_on_one_side() -> None:
    still = np.tile([1.0, -1.0], 20)  # spread 1 over the shared prefix
    second = still.copy()
    second[20:22], second[22:24], second[26:28] = [9.0, -0.5], [9.0, -9.0], [-9.0, -9.0]  # the first is alone: -1 + 0.5
    aligned = xr.DataArray(
        np.stack([still, second])[:, :, np.newaxis],
        dims=("rollout", "position", "direction"),
        coords={"direction": ["d"]},
        attrs={"fork": 18},
    )
    (found,) = comparing.first_moves(aligned).to_dict("records")
    assert (found["moved_at"], found["tokens_after"]) == (26, 8)
    assert found["difference"] == second[26] - still[26]
    assert (found["peak"], found["peak_at"]) == (-10.0, 26)
    (found,) = comparing.first_moves(aligned, run=1).to_dict("records")
    assert (found["moved_at"], found["tokens_after"]) == (20, 2)


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        (["fabrication", "honest", "omission"], "honest"),
        (["True", "False", "False"], "False"),
        (["a", "b", "b"], "b"),
        ([], None),
    ],
)
def test_the_side_that_others_are_compared_with(values: list[str], wanted: str | None) -> None:
    assert comparing.reference_of(values) == wanted


def test_means_peaks_and_percentiles_of_all_rollouts(model: Model) -> None:
    how = Treatment(smooth=1)
    found = summaries.summarise(model, how)
    curves = {name: oracle.drawn(model.store, name, "bs/lying@8", smooth=1) for name in model.scored}
    for name, curve in curves.items():
        assert found.means["bs/lying@8"][name] == pytest.approx(curve[20:].mean(), rel=1e-5)
        assert found.peaks["bs/lying@8"][name] == pytest.approx(curve[20:][np.abs(curve[20:]).argmax()], rel=1e-5)
    quantiles, sampled = summaries.percentiles(model, how)
    every = np.concatenate(list(curves.values()))
    assert sampled == len(every)
    row = list(model.directions["direction"]).index("bs/lying@8")
    np.testing.assert_allclose(quantiles[row], np.quantile(every, np.linspace(0, 1, 201)), rtol=1e-4)


@pytest.mark.parametrize("by", ["window", "clause"])
def test_the_strongest_spans_of_all_are_those_of_each(model: Model, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summaries, "BATCH", 1)  # so that it stops before the last rollout, if it stops rightly
    how = Treatment(smooth=1)
    peaks = summaries.summarise(model, how, segment=None).peaks["bs/lying@4"]
    found = summaries.strongest(model, how, "bs/lying@4", by=by, window=6, peaks=peaks, most=5)
    each = [summaries.strongest(model, how, "bs/lying@4", by=by, window=6, rollout=name) for name in model.scored]
    every = pd.concat(each).sort_values("mean", key=lambda means: -means.abs(), kind="stable")
    np.testing.assert_allclose(found["mean"], every["mean"][:5])


def test_the_shade_is_about_the_median(model: Model) -> None:
    values = model.values("g0-lie", Treatment(smooth=1))
    centres, scales = scales_of(values)
    np.testing.assert_allclose(centres, np.median(values[4:].astype(float), axis=0), rtol=1e-6)
    np.testing.assert_allclose(scales, np.percentile(np.abs(values[4:].astype(float) - centres), 99, axis=0), rtol=1e-5)
    assert scales_of(np.full((9, 1), np.nan, np.float32)) == (np.array([0.0]), np.array([1.0]))


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)


@given(
    rollouts=st.lists(TEXTS, min_size=1, max_size=3, unique=True),
    trait=TEXTS,
    smooth=st.integers(1, 25),
    velocity=st.booleans(),
    token=st.integers(-1, 10**6),
    view=st.sampled_from(["Overview", "Transcript", "Trajectories", "Compare"]),
)
def test_an_address_is_read_as_it_was_written(rollouts: list[str], **fields: Any) -> None:
    state = State(store="run.zarr", rollout=rollouts[0], others=rollouts[1:], **fields)
    values, wrong = from_query(to_query(state))
    assert wrong == []
    again = State(**values)
    assert again.param.values() | {"name": ""} == state.param.values() | {"name": ""}


def test_a_store_that_grew_is_another_one(tmp_path: Path) -> None:
    path = tmp_path / "games.zarr"
    first = Model(stores.plain_store(path, pairs=1))
    assert not first.changed()
    add_labels(path, {"g0-lie": {"verdict": "caught"}})
    assert first.changed()
    assert "verdict" in first.reopened().labels
