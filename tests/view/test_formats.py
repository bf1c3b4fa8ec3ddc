"""Answers as bytes: large ones in pieces, and what JSON can't say."""

from __future__ import annotations

import asyncio
import io
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from starlette.responses import StreamingResponse

from view.answers import Norms
from view.formats import PIECE, arrow, as_json, npy


def body(answer: Any) -> tuple[bytes, int]:
    """What is sent, and in how many pieces; it is as long as it says."""
    assert isinstance(answer, StreamingResponse)

    async def collected() -> list[bytes]:
        return [bytes(piece) async for piece in answer.body_iterator]  # type: ignore[arg-type]

    pieces = asyncio.run(collected())
    assert max(map(len, pieces), default=0) <= PIECE
    assert int(answer.headers["content-length"]) == sum(map(len, pieces))
    return b"".join(pieces), len(pieces)


@pytest.mark.parametrize("shape", [(3, 2, 4), (0, 2, 4), (700, 3, 500), (PIECE // 4, 1, 1)])
@pytest.mark.parametrize("dtype", ["float32", "uint16"])
def test_npy_comes_back(shape: tuple[int, ...], dtype: str) -> None:
    values = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    sent, pieces = body(npy(values, {"X-Start": "0"}))
    found = np.load(io.BytesIO(sent), allow_pickle=False)
    assert (found.dtype, found.shape) == (values.dtype, values.shape)
    np.testing.assert_array_equal(found, values)
    assert pieces == 1 + -(-values.nbytes // PIECE)


def test_npy_of_an_array_that_does_not_lie_in_order() -> None:
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1)[::2]
    np.testing.assert_array_equal(np.load(io.BytesIO(body(npy(values, {}))[0])), values)


def test_arrow_comes_back() -> None:
    values = np.arange(900_000, dtype=np.float32).reshape(-1, 9)
    sent, pieces = body(arrow({"name": ["a"] * len(values), "values": values}, {"dims": "0-8"}))
    table = pa.ipc.open_stream(sent).read_all()
    assert pieces > 3
    np.testing.assert_array_equal(table["values"].combine_chunks().flatten().to_numpy(), values.reshape(-1))
    assert table["name"].unique().to_pylist() == ["a"]
    assert table.schema.metadata == {b"dims": b"0-8"}


def test_what_is_not_finite_is_null_and_the_rest_comes_back_to_the_bit() -> None:
    random = np.random.default_rng(0)
    values = random.integers(0, 2**32, (500, 2), dtype=np.uint32).view(np.float32)
    values[0] = np.nan, np.inf
    about: dict[str, Any] = {"store": "s", "component": "c", "rollout_id": "r", "start": 0, "stop": 500}
    sent = as_json(Norms(**about, layers=[1, 2], values=values.T.copy().T))
    found = json.loads(bytes(sent.body))
    assert found["values"][0] == [None, None]
    ours = np.array([[np.nan if v is None else v for v in row] for row in found["values"]], np.float32)
    finite = np.isfinite(values)
    np.testing.assert_array_equal(ours[finite].view(np.uint32), values[finite].view(np.uint32))
    assert np.isnan(ours[~finite]).all()
    assert {name: value for name, value in found.items() if name != "values"} == {**about, "layers": [1, 2]}
