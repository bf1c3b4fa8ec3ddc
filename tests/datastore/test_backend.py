"""The xarray engine: the same Dataset as the store's own, on threads, processes and dask."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import datastore
from datastore.backend import ActivationsBackend
from datastore.errors import NotAStoreError
from tests import house
from tests.datastore import making

ENGINE = ActivationsBackend


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "run.zarr"
    making.capture(path, making.rollouts(5, 17, 3, 40), (1, 5))
    making.capture(path, [making.rollout("more", 30)], (1, 5))
    return path


def test_the_engine_gives_the_store_s_dataset(path: Path) -> None:
    expected = datastore.open(path).dataset()
    for name in (path, str(path)):
        with xr.open_dataset(name, engine=ENGINE) as found:
            xr.testing.assert_identical(found, expected)
            np.testing.assert_array_equal(
                found.sel(rollout="more", layer=5).residual.values,
                expected.sel(rollout="more", layer=5).residual.values,
            )
    with xr.open_dataset(path, engine=ENGINE, drop_variables=["k_proj"]) as found:
        assert list(found.data_vars) == ["residual"]


def test_it_knows_a_store(path: Path, tmp_path: Path) -> None:
    backend = ActivationsBackend()
    assert backend.guess_can_open(path)
    assert backend.guess_can_open(str(path))
    assert not backend.guess_can_open(path / "captures" / "0001")
    assert not backend.guess_can_open(tmp_path)
    assert not backend.guess_can_open(b"run.zarr")
    with pytest.raises(NotAStoreError, match=r"exists and is not an activation store"):
        backend.open_dataset(tmp_path)


def test_chunks_of_the_engine_are_the_same_for_all_variables(path: Path) -> None:
    with xr.open_dataset(path, engine=ENGINE, chunks={}) as found:
        assert found.chunksizes["token"] == (16, 16, 16, 16, 16, 15), "as stored, so that the engine warns of none"
        xr.testing.assert_equal(found.compute(), datastore.open(path).dataset())
        by_rollout = found.residual.sel(layer=5).groupby("rollout").mean().compute()
        assert by_rollout.rollout.values.tolist() == ["0", "1", "2", "3", "more"]
    with xr.open_dataset(path, engine=ENGINE, chunks={"token": 48}) as found:
        xr.testing.assert_equal(found.compute(), datastore.open(path).dataset())


PROCESS = """
import pickle, sys, numpy as np
array = pickle.load(open(sys.argv[1], "rb"))
np.save(sys.argv[2], array.values)
"""


def test_it_is_read_in_another_process(path: Path, tmp_path: Path) -> None:
    rows = datastore.open(path).dataset().sel(rollout="3", layer=5).residual
    (tmp_path / "rows.pickle").write_bytes(pickle.dumps(rows))
    arguments = [str(tmp_path / "rows.pickle"), str(tmp_path / "rows.npy")]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROCESS, *arguments], cwd=house.ROOT, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    np.testing.assert_array_equal(np.load(tmp_path / "rows.npy"), rows.values)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    distributed = pytest.importorskip("distributed")
    options = {"n_workers": 1, "threads_per_worker": 2, "processes": True, "dashboard_address": None}
    with distributed.Client(**options):
        yield


# distributed leaves sockets and its own loops to the collector when a cluster ends.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("cluster")
def test_it_is_read_on_a_cluster(path: Path) -> None:
    with xr.open_dataset(path, engine=ENGINE, chunks={"token": 32}) as found:
        mean = found.residual.sel(layer=5).mean("token").compute()
    np.testing.assert_allclose(mean.values, datastore.open(path).select("residual", layers=5).values.mean(0), rtol=1e-5)
