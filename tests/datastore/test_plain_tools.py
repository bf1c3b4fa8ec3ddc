"""A capture is a plain Zarr v3 group: xarray, zarr-python and tensorstore read it, each against what was written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr

from datastore.union import load_union
from tests import house
from tests.datastore import making


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "run.zarr"
    making.capture(path, making.rollouts(5, 17, 3), (1, 5))
    return path


@pytest.fixture(scope="module")
def bits(path: Path) -> np.ndarray:
    """Return the residuals at layer 5 as they were put, as unsigned integers."""
    rollouts = {one.rollout_id: one for one in making.rollouts(5, 17, 3)}
    order = load_union(path).captures[0].rollout_ids
    rows = np.concatenate([making.values(making.RESIDUAL, 5, rollouts[name]) for name in order])
    return rows.view(np.uint16)


def test_zarr_opens_the_array_and_the_group(path: Path, bits: np.ndarray) -> None:
    array = zarr.open(path / "captures/0001/residual", mode="r")
    assert isinstance(array, zarr.Array)
    meta: Any = array.metadata
    assert meta.dimension_names == ("token", "layer", "hidden")
    np.testing.assert_array_equal(np.asarray(array[:, 1]).view(np.uint16), bits)
    root = zarr.open_group(path, mode="r")
    assert root.attrs["format"] == "activation-datastore"
    captures = root["captures"]
    assert isinstance(captures, zarr.Group)
    assert list(captures.group_keys()) == ["0001"]


@pytest.mark.parametrize("chunks", [None, {}])
def test_xarray_opens_a_capture(path: Path, bits: np.ndarray, chunks: dict[str, int] | None) -> None:
    with xr.open_zarr(path / "captures/0001", chunks=chunks) as found:
        assert found.residual.dims == ("token", "layer", "hidden")
        np.testing.assert_array_equal(found.residual.sel(layer=5).values.view(np.uint16), bits)
        assert found.role.attrs["flag_meanings"] == "none system user assistant tool"
        assert set(found.coords) >= {"layer", "token_id", "position", "segment", "role", "turn", "thinking", "rollout"}


def test_xarray_opens_the_tree(path: Path, bits: np.ndarray) -> None:
    with xr.open_datatree(path / "captures/0001", engine="zarr") as tree:
        np.testing.assert_array_equal(tree.residual.values[:, 1].view(np.uint16), bits)
        ids = tree["rollouts"].rollout_id.values.tolist()
        assert sorted(ids) == ["0", "1", "2"]
        expected = np.linalg.norm(tree.residual.values.astype(np.float64), axis=2)
        np.testing.assert_allclose(tree["stats/residual"].norm.values, expected, rtol=1e-6)


TENSORSTORE = """
import sys, json
import numpy as np, tensorstore as ts
found = {}
for name in ("residual", "token_id", "layer"):
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": sys.argv[1] + "/" + name}}
    found[name] = ts.open(spec, open=True, read=True).result().read().result()
assert found["residual"].dtype.name == "bfloat16", found["residual"].dtype
assert "datastore" not in sys.modules and "zarr" not in sys.modules
print(json.dumps({k: (v.view(np.uint16) if k == "residual" else v).tolist() for k, v in found.items()}))
"""


def test_tensorstore_opens_the_numbers_without_our_code(path: Path, bits: np.ndarray, tmp_path: Path) -> None:
    pytest.importorskip("tensorstore")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", TENSORSTORE, str(path / "captures/0001")],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    np.testing.assert_array_equal(np.array(found["residual"], np.uint16)[:, 1], bits)
    assert found["layer"] == [1, 5]
    ids = {one.rollout_id: one.token_ids for one in making.rollouts(5, 17, 3)}
    assert found["token_id"] == np.concatenate([ids[i] for i in load_union(path).captures[0].rollout_ids]).tolist()


PLUGIN = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("activation_datastore_zarr", sys.argv[1])
before = set(sys.modules)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert set(sys.modules) == before, "it imports nothing when the interpreter starts"
import zarr
assert not [one for one in sys.meta_path if type(one).__name__ == "WhenZarrIsImported"], "once"
assert "exec_module" not in vars(zarr.__loader__)
array = zarr.open_array(sys.argv[2], mode="r")
print(array.dtype)
"""


@pytest.mark.parametrize("first", ["", "import datastore.dtype", "import datastore.storage"])
def test_zarr_knows_bfloat16_by_installation_alone(path: Path, first: str) -> None:
    """What `activation_datastore_zarr.pth` starts, run as it would be; `first` is what else may have been imported."""
    plugin = house.ROOT / "datastore/zarr_plugin.py"
    code = PLUGIN.replace("import zarr\n", f"{first}\nimport zarr\n")
    arguments = [str(plugin), str(path / "captures/0001/residual")]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-S", "-c", f"import sys; sys.path = {sys.path!r}\n{code}", *arguments],
        cwd=house.ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "bfloat16\n"


def test_a_broken_installation_leaves_zarr_alone(tmp_path: Path) -> None:
    """Where our package can't be imported, zarr goes on working."""
    (tmp_path / "datastore").mkdir()
    (tmp_path / "datastore/__init__.py").write_text("raise RuntimeError('broken')")
    code = PLUGIN.split("array =")[0] + "print(zarr.zeros(3)[0])"
    paths = [str(tmp_path), *(p for p in sys.path if p not in ("", str(house.ROOT)))]
    plugin = str(house.ROOT / "datastore/zarr_plugin.py")
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path = {paths!r}\n{code}", plugin],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "0.0\n"
