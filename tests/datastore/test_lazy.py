"""Only the chunks needed are read; what is broken, gone or replaced is an error; large stores attach at once."""

from __future__ import annotations

import pickle
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import zarr

import datastore
from datastore import storage
from datastore.cells import Cells, Snapshot
from datastore.errors import CorruptError, DatastoreError
from datastore.query import Store
from datastore.union import Capture, Union
from tests.datastore import making
from tests.datastore.truth import Truth, add_labels

OPENED: list[str] | None = None


def _opened(event: str, args: tuple[Any, ...]) -> None:
    if OPENED is not None and event == "open":
        OPENED.append(str(args[0]))


sys.addaudithook(_opened)


def test_one_rollout_and_layer_touch_only_their_chunks(tmp_path: Path) -> None:
    global OPENED
    making.capture(tmp_path / "run.zarr", making.rollouts(50, 60, 70, 80), (1, 5), components=(making.RESIDUAL,))
    rows = datastore.open(tmp_path / "run.zarr").dataset().residual.sel(rollout="2", layer=5)
    OPENED = []
    rows.load()
    files, OPENED = OPENED, None
    read = [name for name in files if "/residual/c/" in name]
    places = [Path(name).relative_to(tmp_path / "run.zarr/captures/0001/residual/c").parts for name in read]
    opened = Counter(int(chunk) for chunk, *_ in places)
    assert sorted(opened) == list(range(110 // 16, 179 // 16 + 1))
    assert {layer for _, layer, _ in places} == {"1"}
    assert max(opened.values()) <= 2, "each once, and once ahead of its turn"


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    making.capture(tmp_path / "run.zarr", making.rollouts(10, 20, 30), (1, 5), components=(making.RESIDUAL,))
    return tmp_path / "run.zarr"


def test_a_missing_chunk_names_whose_tokens_are_lost(broken: Path) -> None:
    (broken / "captures/0001/residual/c/1/1/0").unlink()
    store = datastore.open(broken)
    where = (
        r"residual at layer 5 of rollout '1' tokens 6-20, '2' tokens 0-2 \(chunk .*/c/1/1/0 of capture 1\) is missing"
    )
    for read in (
        lambda: store.select("residual", layers=5).load(),
        lambda: list(store.blocks("residual", layers=5)),
        lambda: store.dataset().sel(rollout="1").residual.load(),
    ):
        with pytest.raises(CorruptError, match=where):
            read()
    assert store.select("residual", rollouts="0", layers=5).load().shape == (10, 16)


def test_a_flipped_bit_is_an_error(broken: Path) -> None:
    file = broken / "captures/0001/residual/c/1/1/0"
    raw = bytearray(file.read_bytes())
    raw[40] ^= 1
    file.write_bytes(raw)
    with pytest.raises(CorruptError, match=r"rollout '1' tokens 6-20.* can't be used: its bytes were changed"):
        datastore.open(broken).select("residual", layers=5).load()


def test_a_missing_coordinate_is_not_zero(broken: Path) -> None:
    (broken / "captures/0001/role/c/0").unlink()
    with pytest.raises(CorruptError, match=r"role/c/0 is missing; what it holds is lost"):
        datastore.open(broken).dataset().role.load()


def test_an_unknown_codec_list_is_read_through_zarr(broken: Path) -> None:
    """Without crc32c before Blosc it is another list than ours; zarr-python reads it, and missing is still missing."""
    array = broken / "captures/0001/residual"
    values = np.asarray(zarr.open_array(array, mode="r")[...])
    shutil.rmtree(array)
    again = zarr.create_array(
        array, data=values, chunks=(16, 1, 16), compressors=[zarr.codecs.GzipCodec()],
        dimension_names=("token", "layer", "hidden"), config={"write_empty_chunks": True},
    )  # fmt: skip
    meta: Any = again.metadata
    assert meta.codecs[-1].to_dict()["name"] == "gzip"
    store = datastore.open(broken)
    np.testing.assert_array_equal(
        store.select("residual", layers=5, raw=True).values.astype(np.float32), values[:, 1].astype(np.float32)
    )
    (array / "c/1/1/0").unlink()
    with pytest.raises(CorruptError, match=r"c/1/1/0 is missing; what it holds is lost"):
        store.select("residual", layers=5).load()


# -- the store as it was when opened -----------------------------------------------------------------------------------


def test_a_reader_keeps_what_it_opened(tmp_path: Path) -> None:
    truth = Truth(tmp_path / "run.zarr")
    truth.capture(making.rollouts(5, 7), (1,))
    before = datastore.open(truth.path)
    table, rows = before.rollouts, before.dataset()
    truth.capture([making.rollout("new", 4)], (1,))
    truth.capture([making.rollout("0", 9, tokens=1)], (1,), replace=True)
    add_labels(truth.path, 1, {"0": "late"}, name="verdict")
    pd.testing.assert_frame_equal(Store(before._cells).rollouts[table.columns], table)
    assert rows.sel(rollout="0").residual.shape == (5, 1, 16)
    assert pickle.loads(pickle.dumps(rows)).residual.equals(rows.residual)
    assert datastore.open(truth.path).dataset().sel(rollout="0").residual.shape == (9, 1, 16)


def test_a_deleted_or_replaced_capture_is_an_error(broken: Path) -> None:
    store = datastore.open(broken)
    rows, blocks = store.select("residual", layers=5), store.blocks("residual", layers=5)
    shutil.copytree(broken, broken.with_name("copy"))
    shutil.rmtree(broken)
    gone = (
        r"capture 1 of .*run.zarr was deleted after the store was opened, so nothing more can be read through it; open"
    )
    with pytest.raises(DatastoreError, match=gone):
        rows.copy().load()
    with pytest.raises(DatastoreError, match=gone):
        list(blocks)
    with pytest.raises(DatastoreError, match=gone):
        _ = store.annotations
    making.capture(broken, making.rollouts(11, 20, 30), (1, 5), components=(making.RESIDUAL,))
    for read in (rows.load, lambda: list(store.blocks("residual", layers=5)), lambda: store.dataset().token_id.load()):
        with pytest.raises(DatastoreError, match=r"capture 1 of .*run.zarr was replaced after the store was opened"):
            read()


def test_a_large_store_attaches_without_reading_tokens(tmp_path: Path) -> None:
    """100,000 rollouts and 50 million tokens, of which only the metadata exist."""
    group, n = tmp_path / "captures/0001", 100_000
    group.parent.mkdir()
    storage.create_group(group, {})
    shape: dict[str, Any] = {"shape": (500 * n, 2, 8), "chunks": (1024, 1, 8), "dims": ("token", "layer", "hidden")}
    storage.create_array(group / "residual", dtype="bfloat16", **shape)
    spec = {"name": "residual", "width": 8, "dtype": "bfloat16", "hook": ""}
    capture = Capture(
        number=1,
        path=group,
        attrs={"layers": [3, 4], "components": [spec], "provenance": {}, "statistics": "none"},
        rollout_ids=tuple(str(i) for i in range(n)),
        counts=np.full(n, 500),
        token_sha256=("",) * n,
        batch=np.zeros(n, dtype=np.int64),
    )
    seen = Snapshot(path=tmp_path, captures=((1, ((group / "zarr.json").stat().st_mtime_ns, 0)),), dropped=())
    store = Store(Cells(seen, Union([capture])))
    whole = store.dataset()
    assert whole.sizes["token"] == 50_000_000
    assert "50000000 tokens" in repr(whole).replace("_", "")
    one = whole.sel(rollout="70001", layer=4)
    assert one.residual.shape == (500, 8)
    assert set(one.rollout.values.tolist()) == {"70001"}
    assert one.position.values.tolist() == list(range(500))
    many = store.select("residual", rollouts=[str(i) for i in range(0, n, 2)], layers=3, positions=slice(-1, None))
    assert many.shape == (n // 2, 8)
    assert many.position.values.tolist() == [499] * (n // 2)
