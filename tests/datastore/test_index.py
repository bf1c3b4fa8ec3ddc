"""Ordinary xarray on what a store gives: every operation against the same one on plain NumPy or a plain xarray copy."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

import datastore
from datastore.axis import Axis
from datastore.errors import AbsentError, MisuseError
from datastore.index import RolloutIndex
from datastore.query import Store
from tests.datastore import making


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("store") / "run.zarr"
    known = {"role": np.arange(40) % 5, "turn": np.arange(40) // 7, "thinking": np.arange(40) % 3 == 0}
    making.capture(path, [*making.rollouts(5, 17, 3), making.rollout("71", 40, **known)], (1, 20))
    return datastore.open(path)


@pytest.fixture
def lazy(store: Store) -> xr.DataArray:
    return store.select("residual", layers=20)


@pytest.fixture
def plain(lazy: xr.DataArray) -> xr.DataArray:
    """The same in memory, without our index."""
    return lazy.copy().load().drop_indexes("rollout")


def is_lazy(array: xr.DataArray) -> bool:
    return not array.variable._in_memory


@pytest.mark.parametrize("by", ["rollout", "role", "turn", "segment", "thinking"])
@pytest.mark.parametrize("chunked", [False, True])
def test_groupby(lazy: xr.DataArray, plain: xr.DataArray, by: str, chunked: bool) -> None:
    found = (lazy.chunk({"token": 16}) if chunked else lazy).groupby(by).mean().compute()
    expected = pd.DataFrame(plain.values).groupby(plain[by].values).mean()
    assert found[by].values.tolist() == expected.index.tolist()
    np.testing.assert_allclose(found.values, expected.to_numpy(), rtol=1e-5, atol=1e-6)


def test_where_and_mean(lazy: xr.DataArray, plain: xr.DataArray) -> None:
    mask = (plain.role.values == "user") & (plain.segment.values == "response")
    found = lazy.where((lazy.role == "user") & (lazy.segment == "response"), drop=True)
    np.testing.assert_array_equal(found.values, plain.values[mask])
    assert set(found.rollout.values.tolist()) == set(plain.rollout.values[mask].tolist())
    kept = lazy.where(lazy.position > 2)
    np.testing.assert_array_equal(np.isnan(kept.values).all(axis=1), plain.position.values <= 2)
    np.testing.assert_allclose(lazy.mean("token").values, plain.values.mean(axis=0), rtol=1e-6)


def test_sel_by_rollout_and_layer(store: Store) -> None:
    whole = store.dataset()
    dense = {n: store.select("residual", rollouts=n).values for n in ("0", "1", "2", "71")}
    np.testing.assert_array_equal(whole.sel(rollout="71", layer=20).residual.values, dense["71"][:, 1])
    several = whole.residual.sel(rollout=["71", "0"])
    np.testing.assert_array_equal(several.values, np.concatenate([dense["71"], dense["0"]]))
    chained = several.sel(layer=[20]).sel(rollout="0").isel(token=slice(1, None))
    np.testing.assert_array_equal(chained.values, dense["0"][1:, 1:])
    assert is_lazy(store.dataset().residual.sel(rollout=["71", "0"]).sel(layer=20))
    picked = whole.residual.isel(token=[50, 3, 4]).sel(rollout="71")
    assert picked.rollout.values.tolist() == ["71"] * picked.sizes["token"] != []
    by_array = whole.residual.sel(rollout=xr.DataArray(["0", "1"], dims="any"))
    np.testing.assert_array_equal(by_array.values, np.concatenate([dense["0"], dense["1"]]))


def test_a_label_that_is_not_there(lazy: xr.DataArray) -> None:
    with pytest.raises(AbsentError, match=r"rollout 'zz' is not here; there are .*71"):
        lazy.sel(rollout="zz")
    with pytest.raises(AbsentError, match=r"rollout '1' is not here; there are 71"):
        lazy.sel(rollout="71").sel(rollout="1")
    with pytest.raises(
        MisuseError, match=r"rollout was asked for as slice\('0', '1', None\).*give one id or a list of ids"
    ):
        lazy.sel(rollout=slice("0", "1"))


def test_repr_reads_nothing(store: Store) -> None:
    whole = store.dataset()
    text = repr(whole) + whole._repr_html_()
    assert "RolloutIndex(4 rollouts, 65 tokens)" in text
    assert is_lazy(whole.residual)


def test_isel_concat_copy_pickle_rename(lazy: xr.DataArray, plain: xr.DataArray) -> None:
    a, b = lazy.isel(token=slice(60, 10, -7)), lazy.isel(token=slice(None, 6))
    both = xr.concat([a, b], dim="token")
    np.testing.assert_array_equal(both.values, np.concatenate([plain.values[60:10:-7], plain.values[:6]]))
    expected = np.concatenate([plain.rollout.values[60:10:-7], plain.rollout.values[:6]])
    assert both.rollout.values.tolist() == expected.tolist()
    for other in (lazy.copy(), copy.deepcopy(lazy), pickle.loads(pickle.dumps(lazy))):
        xr.testing.assert_identical(other, lazy)
        np.testing.assert_array_equal(other.sel(rollout="1").values, plain.values[plain.rollout.values == "1"])
    renamed = lazy.rename(rollout="transcript", token="t")
    np.testing.assert_array_equal(renamed.sel(transcript="1").values, plain.values[plain.rollout.values == "1"])
    one = lazy.isel(token=7)
    assert (one.dims, str(one.rollout.values)) == (("hidden",), plain.rollout.values[7])
    rolled = lazy.roll(token=3, roll_coords=True)
    assert rolled.rollout.values.tolist() == np.roll(plain.rollout.values, 3).tolist()


def test_a_pickle_carries_no_values(store: Store) -> None:
    """Little more than the axis travels: the tables are read again where it arrives."""
    assert len(pickle.dumps(store.dataset())) < 20_000


def test_arithmetic_of_the_same_tokens(store: Store, plain: xr.DataArray) -> None:
    a, b = store.select("residual", layers=20), store.select("residual", layers=1)
    np.testing.assert_array_equal((a - b).values, a.values - b.values)
    with pytest.raises(MisuseError, match=r"one array has 65 tokens of 4 rollouts and the other 40 tokens of 1"):
        _ = a - b.sel(rollout="71")


def test_dask_chunks(store: Store, plain: xr.DataArray) -> None:
    chunked = store.dataset().chunk({"token": 16})
    assert chunked.residual.chunks[0] == (16, 16, 16, 16, 1)
    np.testing.assert_array_equal(chunked.residual.sel(layer=20).values, plain.values)
    mine = plain.rollout.values == "71"
    np.testing.assert_array_equal(chunked.sel(rollout="71", layer=20).residual.values, plain.values[mine])
    auto = store.dataset().chunk("auto")
    np.testing.assert_array_equal(auto.residual.sel(layer=20).values, plain.values)
    bare = chunked.residual.reset_index("rollout").reset_coords(drop=True)
    doubled = xr.map_blocks(lambda rows: rows * 2, bare, template=bare)
    np.testing.assert_array_equal(doubled.sel(layer=20).values, plain.values * 2)


def test_to_dataframe(lazy: xr.DataArray, plain: xr.DataArray) -> None:
    frame = lazy.isel(hidden=[0, 3]).reset_index("rollout").to_dataframe(name="h")
    assert frame.h.tolist() == plain.values[:, [0, 3]].ravel().tolist()
    assert frame.rollout.tolist() == np.repeat(plain.rollout.values, 2).tolist()


def test_set_xindex_makes_the_same_index(lazy: xr.DataArray, plain: xr.DataArray) -> None:
    made = plain.set_xindex("rollout", RolloutIndex)
    np.testing.assert_array_equal(made.sel(rollout="1").values, lazy.sel(rollout="1").values)


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=12), st.sampled_from("abc"))
def test_sel_finds_every_token_of_a_label(labels: list[str], wanted: str) -> None:
    array = xr.DataArray(np.arange(len(labels)), dims="token", coords={"rollout": ("token", labels)})
    made = array.drop_indexes([]).set_xindex("rollout", RolloutIndex)
    expected = [i for i, label in enumerate(labels) if label == wanted]
    if expected:
        assert made.sel(rollout=wanted).values.tolist() == expected
        assert made.rollout.values.tolist() == labels
    else:
        with pytest.raises(AbsentError):
            made.sel(rollout=wanted)


def test_concat_of_two_stores_names_each_rollout_once(tmp_path: Path) -> None:
    ids = (np.array(["a", "b"]), np.array(["b", "long"]))
    axes = (
        Axis.of(np.array([0, 1]), np.zeros(2), np.array([2, 1])),
        Axis.of(np.array([1, 0]), np.zeros(2), np.ones(2)),
    )
    both = RolloutIndex.concat([RolloutIndex(*one) for one in zip(ids, axes, strict=True)], "token")
    assert both.to_pandas_index().tolist() == ["a", "a", "b", "long", "b"]
    assert sorted(both.ids.tolist()) == ["a", "b", "long"]
