"""Statistics: against plain float64 NumPy, under any split, to the bit in any memory, and from damaged files."""

import functools
import hashlib
import importlib
import itertools
import pickle
import random
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from datastore import stats
from datastore.dtype import numpy_dtype
from datastore.errors import CorruptError, MisuseError
from datastore.schema import DTYPES, STATISTICS
from datastore.stats import Moments, MomentsTable
from tests.synthetic import activations

ROUNDING = 1e-13
"""Float64 rounding of a few thousand terms, relative to the sum of their magnitudes."""


@pytest.fixture(scope="module", params=["numpy", "compiled"], autouse=True)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test here runs with either way of computing the sums: nothing may tell them apart."""
    assert stats.compile_sums()
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "numpy":
            patch.setattr(stats._Compiled, "module", None)
        yield request.param


@st.composite
def blocks(draw: st.DrawFn, dtypes: tuple[str, ...] = tuple(DTYPES)) -> NDArray[Any]:
    """Rows with widely differing scales, some zero, some elements NaN or infinite."""
    dtype = numpy_dtype(draw(st.sampled_from(dtypes)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = draw(st.integers(0, 40)), draw(st.integers(1, 33))
    spread = draw(st.sampled_from([0.0, 1.0, 3.0]))
    values = rng.standard_normal(shape) * np.exp(spread * rng.standard_normal((shape[0], 1)))
    values[rng.random(shape[0]) < draw(st.sampled_from([0.0, 0.3]))] = 0.0
    broken = rng.random(shape) < draw(st.sampled_from([0.0, 0.02, 0.5]))
    values[broken] = rng.choice([np.nan, np.inf, -np.inf], int(broken.sum()))
    return values.astype(dtype)


def plain(values: NDArray[Any]) -> tuple[dict[str, NDArray[Any]], NDArray[np.float64]]:
    """The definitions, one line each, on everything at once: what `Moments.of` must give."""
    x = values.astype(np.float64)
    finite = np.isfinite(x)
    kept = np.where(finite, x, 0.0)
    norms = np.sqrt((x * x).sum(axis=1))
    whole = finite.all(axis=1) & (norms > 0)
    return {
        "count": finite.sum(axis=0),
        "sum": kept.sum(axis=0),
        "sum_squares": (kept * kept).sum(axis=0),
        "sum_abs": np.abs(kept).sum(axis=0),
        "max_abs": np.abs(kept).max(axis=0, initial=0.0),
        "sum_unit": (x[whole] / norms[whole, None]).sum(axis=0),
        "nonfinite": (~finite).sum(axis=0),
    }, norms


def assert_agree(found: Moments, expected: dict[str, NDArray[Any]]) -> None:
    for name in ("count", "nonfinite", "max_abs"):
        np.testing.assert_array_equal(getattr(found, name), expected[name], err_msg=name)
    tokens = float((expected["count"] + expected["nonfinite"]).max(initial=0))
    scales = {"sum": expected["sum_abs"], "sum_unit": np.full_like(expected["sum_unit"], tokens)}
    for name in ("sum", "sum_squares", "sum_abs", "sum_unit"):
        error = np.abs(getattr(found, name) - expected[name])
        assert (error <= ROUNDING * scales.get(name, expected[name])).all(), name


def as_dict(moments: Moments) -> dict[str, NDArray[Any]]:
    return {name: getattr(moments, name) for name in STATISTICS}


def bits(moments: Moments, norms: NDArray[np.float32]) -> bytes:
    return MomentsTable(moments={(): moments}, norms=norms).to_bytes()


@given(blocks(), st.sampled_from([1, 64, 1 << 18]))
def test_equals_plain_numpy(values: NDArray[Any], tile: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stats, "_TILE_VALUES", tile)
        moments, norms = Moments.of(values)
    expected, expected_norms = plain(values)
    assert_agree(moments, expected)
    assert norms.dtype == np.float32
    np.testing.assert_allclose(norms, expected_norms, rtol=1e-7)


@given(blocks(), st.lists(st.integers(0, 40), max_size=6), st.randoms(use_true_random=False))
def test_any_split_added_in_any_tree_agrees(values: NDArray[Any], cuts: list[int], rng: random.Random) -> None:
    edges = [0, *sorted(min(cut, len(values)) for cut in cuts), len(values)]
    parts = [Moments.of(values[a:b]) for a, b in itertools.pairwise(edges)]
    nodes = [moments for moments, _ in parts]
    while len(nodes) > 1:
        at = rng.randrange(len(nodes) - 1)
        nodes[at : at + 2] = [nodes[at] + nodes[at + 1]]
    whole, norms = Moments.of(values)
    assert_agree(nodes[0], as_dict(whole))
    np.testing.assert_array_equal(np.concatenate([part for _, part in parts]).view(np.uint32), norms.view(np.uint32))


@given(blocks())
def test_zero_is_neutral_to_the_bit(values: NDArray[Any]) -> None:
    moments, norms = Moments.of(values)
    zero = Moments.zero(values.shape[1])
    assert bits(zero + moments, norms) == bits(moments, norms) == bits(moments + zero, norms)


@given(blocks(), st.lists(st.tuples(st.integers(0, 40), st.booleans()), max_size=6))
def test_a_total_is_the_sum_one_after_the_other_to_the_bit(values: NDArray[Any], cuts: list[tuple[int, bool]]) -> None:
    parts = [(Moments.of(values[:cut])[0], wanted) for cut, wanted in [*cuts, (len(values), True)]]
    stacked = Moments(**{name: np.stack([getattr(one, name) for one, _ in parts]) for name in STATISTICS})
    expected = Moments.zero(values.shape[1])
    for one, wanted in parts:
        expected = expected + one if wanted else expected
    found = stacked.total(np.array([wanted for _, wanted in parts]))
    for name, sums in as_dict(found).items():
        np.testing.assert_array_equal(sums, getattr(expected, name), strict=True)
        np.testing.assert_array_equal(getattr(stacked[-1], name), getattr(parts[-1][0], name))


@given(blocks(), st.data())
def test_pieces_with_one_key_are_counted_together(values: NDArray[Any], data: st.DataObject) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(values)), max_size=6).map(sorted))
    edges = [0, *cuts, len(values)]
    keys = [(data.draw(st.integers(0, 2)), index % 2) for index in range(len(edges) - 1)]
    pieces = list(zip(keys, edges[:-1], edges[1:], strict=True))
    table = MomentsTable.of_pieces(values, pieces)
    assert list(table.moments) == list(dict.fromkeys(keys))
    np.testing.assert_array_equal(table.norms, Moments.of(values)[1])
    for key in keys:
        rows = np.concatenate([np.arange(start, stop) for at, start, stop in pieces if at == key])
        assert_agree(table.moments[key], plain(values[rows])[0])


def test_wide_block_of_many_tiles_equals_plain_numpy() -> None:
    values = activations(101, 7168, seed=1)
    values[[3, 90], [5, 6000]] = np.nan, -np.inf
    moments, norms = Moments.of(values)
    expected, expected_norms = plain(values)
    assert_agree(moments, expected)
    np.testing.assert_allclose(norms, expected_norms, rtol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_whatever_strides_and_alignment(dtype: str) -> None:
    values = activations(70, 515, seed=2, dtype=dtype)
    values[11, 7] = np.nan
    expected = bits(*Moments.of(values))
    spaced = np.zeros((140, 1545), values.dtype)
    spaced[::2, 1::3] = values
    layouts = [np.asfortranarray(values), spaced[::2, 1::3], values[::-1].copy()[::-1]]
    for offset in (1, 2, 3, 8):
        raw = np.zeros(values.nbytes + offset, np.uint8)
        moved = raw[offset:].view(values.dtype).reshape(values.shape)
        moved[...] = values
        layouts.append(moved)
    for layout in layouts:
        assert bits(*Moments.of(layout)) == expected


def test_same_bits_from_many_threads_at_once() -> None:
    inputs = [activations(64 + 7 * seed, 2048 + 256 * (seed % 3), seed=seed) for seed in range(6)]
    expected = [bits(*Moments.of(values)) for values in inputs]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda index: bits(*Moments.of(inputs[index % 6])), range(60)))
    assert found == expected * 10


def test_same_bits_on_every_machine() -> None:
    """Recorded once; the same from SSE2 to AVX-512. Another number means another order of sums or another file."""
    scrambled = (np.arange(300 * 1031, dtype=np.uint64) * 2654435761) >> 7
    patterns = (0x3C00 + (scrambled & 0x83FF)).astype(np.uint16)
    values = patterns.view(numpy_dtype("bfloat16")).reshape(300, 1031)
    assert hashlib.sha256(bits(*Moments.of(values))).hexdigest()[:16] == "6d3f524c561c2a8e"


@pytest.mark.parametrize("width", [1, 7, 8, 9, 127, 128, 129, 257, 1031, 2880, 7168])
def test_compiled_sums_are_those_of_numpy_to_the_bit(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Widths around the leaves of the pairwise sum; several tiles, zero rows, a column of minus zero, two pieces."""
    values = activations(300, width, seed=width)
    values[17] = 0
    values[:, width // 2] = -0.0
    pieces = [((0, 0), 0, 130), ((0, 1), 130, 131), ((0, 0), 131, 300)]
    ran = []
    loop = importlib.import_module("datastore.compiled")

    def add_tiles(*given: Any) -> Any:
        ran.append(given)
        return loop.add_tiles(*given)

    spy = SimpleNamespace(leaves=loop.leaves, add_tiles=add_tiles)
    found = []
    for module in (None, spy):
        monkeypatch.setattr(stats._Compiled, "module", module)
        found.append(MomentsTable.of_pieces(values, pieces).to_bytes())
    assert found[0] == found[1]
    assert len(ran) == len(pieces)


def test_sums_are_numpys_where_the_loop_gives_other_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine whose NumPy adds in another order."""
    loop = importlib.import_module("datastore.compiled")
    other = SimpleNamespace(leaves=lambda width: loop.leaves(width)[:-1], add_tiles=loop.add_tiles)
    monkeypatch.setitem(sys.modules, "datastore.compiled", other)
    for name, value in (("tried", False), ("module", None)):
        monkeypatch.setattr(stats._Compiled, name, value)
    assert not stats.compile_sums()


def test_every_bfloat16_is_widened_exactly() -> None:
    patterns = np.arange(1 << 16, dtype=np.uint16)
    singles = (patterns.astype(np.uint32) << 16).view(np.float32)
    finite = np.isfinite(singles)
    values = patterns.view(numpy_dtype("bfloat16"))
    _, norms = Moments.of(values[:, None])
    np.testing.assert_array_equal(norms, np.abs(singles))
    moments, _ = Moments.of(values[None, :])
    np.testing.assert_array_equal(moments.sum, np.where(finite, singles, 0.0))
    np.testing.assert_array_equal(moments.max_abs, np.where(finite, np.abs(singles), 0.0))


def test_nonfinite_elements_are_left_out_and_counted() -> None:
    nan, inf = np.nan, np.inf
    rows = [[3, -4, 0], [nan, 1, 1], [2, inf, 0], [-inf, nan, 7], [0, 0, 0]]
    moments, norms = Moments.of(np.array(rows, numpy_dtype("bfloat16")))
    np.testing.assert_array_equal(norms, np.array([5, nan, inf, nan, 0], np.float32))
    assert moments.count.tolist() == [3, 3, 5]
    assert moments.nonfinite.tolist() == [2, 2, 0]
    assert moments.sum.tolist() == [5, -3, 8]
    assert moments.sum_squares.tolist() == [13, 17, 50]
    assert moments.sum_abs.tolist() == [5, 5, 8]
    assert moments.max_abs.tolist() == [3, 4, 7]
    np.testing.assert_allclose(moments.sum_unit, [0.6, -0.8, 0.0], rtol=1e-15)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [("bfloat16", 778240.0), ("bfloat16", 1e30), ("bfloat16", 1e-40), ("float16", 6e4), ("float32", 1e-45)],
)
def test_huge_and_tiny_values_keep_norm_and_direction(dtype: str, value: float) -> None:
    values = np.full((3, 4), value, numpy_dtype(dtype))
    moments, norms = Moments.of(values)
    assert norms.tolist() == [2 * float(values[0, 0])] * 3
    assert moments.sum_unit.tolist() == [1.5] * 4
    assert moments.sum_squares.tolist() == [3 * float(values[0, 0]) ** 2] * 4


def test_a_norm_beyond_float32_is_infinite_and_its_row_still_has_a_direction() -> None:
    moments, norms = Moments.of(np.full((1, 4), 3e38, numpy_dtype("bfloat16")))
    assert norms.tolist() == [np.inf]
    assert moments.sum_unit.tolist() == [0.5] * 4
    assert moments.nonfinite.tolist() == [0] * 4


@pytest.mark.parametrize("value", [1e300, 1e200, 1e-170, 5e-324])
def test_float64_rows_keep_their_direction_where_squares_leave_the_range(value: float) -> None:
    moments, norms = Moments.of(np.array([[value, 0.0, 0.0], [0.0, 3.0, 4.0], [0.0, 0.0, 0.0]]))
    np.testing.assert_allclose(moments.sum_unit, [1.0, 0.6, 0.8], rtol=1e-15)
    assert moments.max_abs.dtype == np.float64
    assert moments.max_abs.tolist() == [value, 3.0, 4.0]
    assert moments.sum_abs.tolist() == [value, 3.0, 4.0]
    assert norms.tolist() == [np.inf if value > 1 else 0.0, 5.0, 0.0]


def test_finalise_equals_numpy() -> None:
    values = activations(300, 40, seed=3, dtype="float32").astype(np.float64)
    values[7, 3] = np.nan
    values[:, 5] = np.inf
    found = Moments.of(values)[0].finalise()
    usual = np.delete(values, [3, 5], axis=1)
    expected = {
        "count": np.full(38, 300.0),
        "nonfinite": np.zeros(38),
        "mean": usual.mean(axis=0),
        "rms": np.sqrt((usual**2).mean(axis=0)),
        "std": usual.std(axis=0),
        "mean_abs": np.abs(usual).mean(axis=0),
        "max_abs": np.abs(usual).max(axis=0),
    }
    for name, array in expected.items():
        assert found[name].dtype == np.float64
        np.testing.assert_allclose(np.delete(found[name], [3, 5]), array, rtol=1e-9, atol=1e-12, err_msg=name)
    assert (found["count"][3], found["nonfinite"][3]) == (299, 1)
    assert found["mean"][3] == pytest.approx(np.nanmean(values[:, 3]))
    assert (found["count"][5], found["nonfinite"][5]) == (0, 300)
    for name in ("mean", "rms", "std", "mean_abs", "max_abs"):
        assert np.isnan(found[name][5]), name


def test_mean_unit_is_over_all_tokens() -> None:
    rows = np.array([[3.0, 4.0], [0.0, 0.0], [np.nan, 1.0], [4.0, 3.0]], np.float32)
    np.testing.assert_allclose(Moments.of(rows)[0].finalise()["mean_unit"], [0.35, 0.35], rtol=1e-15)


def test_nothing_counted_has_no_mean() -> None:
    found = Moments.zero(2).finalise()
    assert found["count"].tolist() == [0, 0]
    for name in ("mean", "rms", "std", "mean_abs", "max_abs", "mean_unit"):
        assert np.isnan(found[name]).all(), name


def test_moments_travel_between_processes() -> None:
    moments, norms = Moments.of(activations(9, 16, seed=4))
    assert bits(pickle.loads(pickle.dumps(moments)), norms) == bits(moments, norms)


@given(blocks(), st.integers(0, 40))
def test_partial_file_comes_back_to_the_bit(values: NDArray[Any], cut: int) -> None:
    cut = min(cut, len(values))
    table = MomentsTable.of_pieces(values, [((7, 0), 0, cut), ((7, 1), cut, len(values))])
    back = MomentsTable.from_bytes(table.to_bytes())
    assert list(back.moments) == [(7, 0), (7, 1)]
    for key, moments in table.moments.items():
        for name in STATISTICS:
            np.testing.assert_array_equal(getattr(back.moments[key], name), getattr(moments, name), err_msg=name)
    np.testing.assert_array_equal(back.norms.view(np.uint32), table.norms.view(np.uint32))
    assert back.to_bytes() == table.to_bytes()


def test_partial_file_of_nothing() -> None:
    back = MomentsTable.from_bytes(MomentsTable(moments={}, norms=np.zeros(0, np.float32)).to_bytes())
    assert (dict(back.moments), back.norms.tolist()) == ({}, [])


def test_partial_file_is_compact() -> None:
    table = MomentsTable.of_pieces(activations(32, 1000, seed=5), [((0,), 0, 32)])
    assert len(table.to_bytes()) < 1000 * (4 * 8 + 4) + 32 * 4 + 100


def test_any_damage_to_a_partial_file_is_noticed() -> None:
    raw = MomentsTable.of_pieces(activations(3, 5, seed=6), [((0, 1), 0, 3)]).to_bytes()
    for at in range(len(raw)):
        flipped = raw[:at] + bytes([raw[at] ^ 0x10]) + raw[at + 1 :]
        with pytest.raises(CorruptError, match="compute it from its chunk again"):
            MomentsTable.from_bytes(flipped)
        with pytest.raises(CorruptError, match=r"was cut off|can't be trusted"):
            MomentsTable.from_bytes(raw[:at])


def test_a_file_of_zeros_is_noticed_though_its_checksum_of_nothing_holds() -> None:
    with pytest.raises(CorruptError, match="has 4 bytes, fewer than its header and checksum"):
        MomentsTable.from_bytes(bytes(4))


def test_partial_file_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    table = MomentsTable.of_pieces(activations(3, 5, seed=6), [((0,), 0, 3)])
    with monkeypatch.context() as patch:
        patch.setattr(stats, "_VERSION", 2)
        raw = table.to_bytes()
    with pytest.raises(CorruptError, match="version 2, where b'MOMT', version 1 is read"):
        MomentsTable.from_bytes(raw)


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([((0,), 0, 2), ((1,), 3, 4)], r"Piece \(1,\) covers rows 3 to 4 where row 2 comes next"),
        ([((0,), 0, 2), ((1,), 1, 4)], r"Piece \(1,\) covers rows 1 to 4 where row 2 comes next"),
        ([((0,), 0, 3)], "The pieces end at row 3 of 4"),
        ([((0,), 0, 5)], "The pieces end at row 5 of 4"),
        ([((0,), 0, 4), ((0, 1), 4, 4)], r"keys of lengths \[1, 2\]"),
    ],
)
def test_pieces_that_are_not_the_chunk_are_refused(pieces: list[tuple[stats.Key, int, int]], message: str) -> None:
    with pytest.raises(MisuseError, match=message):
        MomentsTable.of_pieces(np.ones((4, 2), np.float32), pieces)


@pytest.mark.parametrize(
    "values", [np.ones((2, 2), np.int32), np.ones(3, np.float32), np.ones((2, 2), np.dtype(np.float32).newbyteorder())]
)
def test_values_that_are_not_stored_rows_are_refused(values: NDArray[Any]) -> None:
    with pytest.raises(MisuseError, match="pass them as stored"):
        Moments.of(values)


def test_moments_of_other_shapes_or_dtypes_are_refused() -> None:
    with pytest.raises(MisuseError, match=r"shapes \(2,\) and \(3,\) can't be added"):
        Moments.zero(2) + Moments.zero(3)
    with pytest.raises(MisuseError, match=r"sum_abs is float32 of shape \(2,\)"):
        Moments(**as_dict(Moments.zero(2)) | {"sum_abs": np.zeros(2, np.float32)})
    with pytest.raises(MisuseError, match=r"max_abs is float32 of shape \(1,\)"):
        Moments(**as_dict(Moments.zero(2)) | {"max_abs": np.zeros(1, np.float32)})


def test_moments_of_many_rollouts_are_one_array_each() -> None:
    parts = [Moments.of(activations(5, 8, seed=seed))[0] for seed in range(3)]
    stacked = Moments(**{name: np.stack([getattr(part, name) for part in parts]) for name in STATISTICS})
    summed = functools.reduce(Moments.__add__, parts)
    np.testing.assert_array_equal(stacked.finalise()["mean"][1], parts[1].finalise()["mean"])
    np.testing.assert_allclose(stacked.sum.sum(axis=0), summed.sum, rtol=1e-12)
