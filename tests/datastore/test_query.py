"""What comes back from a store against a dict of NumPy arrays, bit for bit; what is not there; what is broken."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import datastore
from datastore import capture_group, storage
from datastore.errors import AbsentError, ConflictError, MisuseError, NotAStoreError
from datastore.query import Store
from datastore.schema import ROLES, ComponentSpec, Rollout
from datastore.stats import Moments
from tests.datastore import making
from tests.datastore.truth import Key, Truth, add_labels


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    """Four captures: two groups of rollouts, a layer more of one component, and a replacement with other tokens."""
    one = Truth(tmp_path_factory.mktemp("store") / "run.zarr")
    first = making.rollouts(5, 17, 3, 40, 9)
    roles = {"role": np.arange(33) % 5, "turn": np.arange(33) // 7 - 1, "thinking": np.arange(33) % 3 == 0}
    more = [making.rollout("long", 33, prompt_end=10, **roles), making.rollout("p", 6, prompt_end=6)]
    one.capture(first, (1, 5))
    one.capture(more, (1, 5))
    one.capture([*first, *more], (9,), components=(making.RESIDUAL,))
    replaced = making.rollout("1", 21, tokens=1, labels={"length": 21.5, "new": True})
    one.capture([replaced], (1, 5, 9), replace=True)
    one.capture([first[2]], (5,), replace=True, version=1, components=(making.RESIDUAL,))
    return one


@pytest.fixture(scope="module")
def store(truth: Truth) -> Store:
    return datastore.open(truth.path)


# -- the tables --------------------------------------------------------------------------------------------------------


def test_the_rollout_table_is_what_was_captured(store: Store, truth: Truth) -> None:
    table = store.rollouts
    assert table.index.name == "rollout_id"
    assert set(table.index) == set(truth.rollouts)
    for name, one in truth.rollouts.items():
        row = table.loc[name]
        assert (row.n_tokens, row.prompt_end, row.token_sha256) == (one.n_tokens, one.prompt_end, one.token_sha256)
        assert (row.tags, row.prompt_set) == (one.tags, one.prompt_set)
        assert row.length == one.labels["length"]
    assert table["length"].dtype == np.float64, "whole and broken numbers are numbers"
    assert table["new"].tolist() == [True if name == "1" else None for name in table.index]
    assert table["name"].isna()["1"], "the replaced rollout's labels went with its tokens"
    assert list(table[table.n_tokens > 20].index) == list(table.query("n_tokens > 20").index) != []


def test_the_other_tables(store: Store, truth: Truth) -> None:
    assert store.layers == (1, 5, 9)
    assert store.components == ("residual", "k_proj")
    expected = [(r.rollout_id, 0, 1, "first") for r in truth.rollouts.values() if r.annotations]
    assert sorted(store.annotations.itertuples(index=False, name=None)) == sorted(expected)
    captures = store.captures
    assert captures.index.tolist() == [1, 2, 3, 4, 5]
    assert captures.loc[1, "layers"] == (1, 5)
    assert captures.loc[1, "n_rollouts"] == 5
    assert captures.loc[1, "model"] == "toy"
    assert store.provenance[1]["model"]["name"] == "toy"
    residual, keys = store.captured("residual"), store.captured("k_proj")
    for (layer, name), there in residual.stack().swaplevel().items():  # type: ignore[misc]
        assert there == (("residual", layer, name) in truth.values)
    assert not keys.loc["0"].get(9, False)


def test_labels_and_annotations_added_later_count(tmp_path: Path) -> None:
    truth = Truth(tmp_path / "run.zarr")
    truth.capture(making.rollouts(5, 7), (1,))
    add_labels(truth.path, 1, {"0": "good", "nobody": "x"}, name="verdict")
    add_labels(truth.path, 2, {"0": "bad"}, name="verdict")
    add_labels(truth.path, 3, {"1": "long"}, name="length")
    add_labels(truth.path, 4, {"1": 3}, name="n_tokens")
    spans = truth.path / "annotations" / "0001"
    storage.create_group(spans, {})
    columns: dict[str, list[Any]] = {
        "rollout_id": ["1", "1"],
        "token_start": [2, 4],
        "token_end": [3, 6],
        "label": ["first", "other"],
    }
    for name, column in columns.items():
        kind: Any = object if isinstance(column[0], str) else np.int64
        storage.write_array(spans / name, np.asarray(column, dtype=kind), dims=("annotation",))
    store = datastore.open(truth.path)
    assert store.rollouts.loc["0", "verdict"] == "bad"
    assert store.rollouts["verdict"].isna()["1"]
    assert store.rollouts["length"].to_dict() == {"0": "5", "1": "long"}, "types that differ become text"
    assert store.rollouts["n_tokens"].tolist() == [5, 7]
    assert store.rollouts.loc["1", "label_n_tokens"] == 3
    found = list(store.annotations.itertuples(index=False, name=None))
    assert found == [("1", 2, 3, "first"), ("1", 4, 6, "other")]


def test_text_is_whole_though_characters_are_cut(tmp_path: Path) -> None:
    pieces = {0: b"a\xc3", 1: b"\xa9b", 2: "€".encode()[:1], 3: "€".encode()[1:], 4: b"\xff", 5: b"end\xe2"}
    ids = np.array([0, 1, 2, 3, 4, 2, 0, 1, 5])
    making.capture(tmp_path / "run.zarr", [Rollout(rollout_id="t", token_ids=ids)], (1,), vocab=pieces)
    store = datastore.open(tmp_path / "run.zarr")
    whole = b"".join(pieces[i] for i in ids.tolist())
    assert store.text("t") == "".join(store.tokens("t").text) == whole.decode(errors="backslashreplace")
    assert store.tokens("t").text.tolist()[:4] == ["a", "éb", "", "€"]


def test_a_token_without_bytes_has_no_text(tmp_path: Path) -> None:
    one = Rollout(rollout_id="t", token_ids=np.array([1, 7, 2]))
    making.capture(tmp_path / "run.zarr", [one], (1,), vocab={1: b"x\xc3", 2: b"y"})
    store = datastore.open(tmp_path / "run.zarr")
    assert store.tokens("t").text.isna().tolist() == [False, True, False]
    assert store.tokens("t").text.tolist()[0] == "x\\xc3"
    with pytest.raises(AbsentError, match=r"rollout 't' has no text: the bytes of its token id 7 were not given"):
        store.text("t")


def test_tokens_of_a_rollout(store: Store, truth: Truth) -> None:
    table, one = store.tokens("long"), truth.rollouts["long"]
    assert list(table.columns) == ["token_id", "text", "position", "segment", "role", "turn", "thinking"]
    assert table.token_id.tolist() == one.token_ids.tolist()
    assert table.position.tolist() == list(range(33))
    assert table.segment.tolist() == ["prompt"] * 10 + ["response"] * 23
    assert table.role.tolist() == [ROLES[i % 5] for i in range(33)]
    assert table.turn.tolist() == [i // 7 - 1 for i in range(33)]
    assert table.thinking.tolist() == [i % 3 == 0 for i in range(33)]


# -- rows --------------------------------------------------------------------------------------------------------------


def tokens_of(one: Rollout) -> pd.DataFrame:
    """Return the coordinates of a rollout's tokens, made without the store."""
    assert one.role is not None
    return pd.DataFrame(
        {
            "rollout": one.rollout_id,
            "position": np.arange(one.n_tokens),
            "token_id": one.token_ids,
            "segment": np.where(np.arange(one.n_tokens) < one.prompt_end, "prompt", "response"),
            "role": np.array(ROLES)[one.role],
            "turn": one.turn,
            "thinking": one.thinking,
        }
    )


@pytest.mark.parametrize(
    "positions", [slice(-5, None), slice(None, -3), slice(-7, -2), slice(2, -1, 2), slice(-9, None, 3), slice(-50, 4)]
)
def test_positions_count_from_either_end_of_each_rollout(store: Store, truth: Truth, positions: slice) -> None:
    names = ["0", "1", "long"]
    rows = store.select("residual", rollouts=names, layers=5, positions=positions)
    expected = np.concatenate([truth.rows("residual", 5, name)[positions] for name in names])
    np.testing.assert_array_equal(rows.values, expected)


BOUND = st.none() | st.integers(-45, 45)
SOME = {
    "segment": st.sampled_from(["prompt", "response", ["response", "prompt"]]),
    "role": st.sampled_from(["user", ["system", "assistant"], "tool"]),
    "turn": st.sampled_from([0, 1, -1, [0, 2]]),
    "positions": st.builds(slice, BOUND, BOUND, st.none() | st.integers(1, 4)),
}


@settings(max_examples=50)
@given(st.data())
def test_any_selection_is_that_of_the_dict(store: Store, truth: Truth, data: st.DataObject) -> None:
    component = data.draw(st.sampled_from(["residual", "k_proj"]))
    layers = data.draw(st.permutations((1, 5, 9) if component == "residual" else (1, 5)))[
        : data.draw(st.integers(1, 3))
    ]
    names = data.draw(st.lists(st.sampled_from(list(truth.rollouts)), min_size=1, max_size=4))
    asked: dict[str, Any] = data.draw(st.fixed_dictionaries({}, optional=SOME))
    odd = data.draw(st.booleans())
    rows = store.select(
        component, rollouts=names, layers=layers, **asked, where=(lambda t: t.token_id % 2 == 1) if odd else None
    )

    tokens = pd.concat([tokens_of(truth.rollouts[name]) for name in names], ignore_index=True)
    lengths = tokens.rollout.map({name: one.n_tokens for name, one in truth.rollouts.items()})
    keep = np.ones(len(tokens), dtype=np.bool_)
    for what in ("segment", "role", "turn"):
        if what in asked:
            keep &= tokens[what].isin(asked[what] if isinstance(asked[what], list) else [asked[what]]).to_numpy()
    if "positions" in asked:
        keep &= np.array([p in range(n)[asked["positions"]] for p, n in zip(tokens.position, lengths, strict=True)])
    if odd:
        keep &= (tokens.token_id % 2 == 1).to_numpy()
    dense = [np.concatenate([truth.rows(component, n, name) for name in names]) for n in layers]
    expected = np.stack(dense, axis=1)[keep]

    assert rows.dtype == np.float32
    assert rows.layer.values.tolist() == list(layers)
    np.testing.assert_array_equal(rows.values, expected)
    for name in tokens.columns:
        what = str(name)
        assert rows[what].values.tolist() == tokens[what][keep].tolist()


KEYS = st.one_of(
    st.builds(slice, BOUND, BOUND, st.sampled_from([None, 1, 2, -1, -3])),
    st.lists(st.integers(-500, 500), max_size=6),
    st.integers(0, 500),
)


def within(key: Any, size: int) -> Any:
    """Return a key for an axis of this size."""
    if isinstance(key, list):
        return np.array([k % (2 * size) - size for k in key], dtype=np.int64)
    if isinstance(key, slice) and (key.step or 1) < 0 and key.start is not None:
        return slice(key.start % size, key.stop, key.step)  # xarray takes a start before the axis for its end
    return key if isinstance(key, slice) else key % size


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 2), KEYS), min_size=1, max_size=3))
def test_any_index_reads_what_numpy_would(store: Store, truth: Truth, keys: list[tuple[int, Any]]) -> None:
    names = store.rollouts.index.tolist()
    found = store.dataset().residual
    expected = np.stack(
        [np.concatenate([truth.rows("residual", n, name) for name in names]) for n in (1, 5, 9)], axis=1
    )
    for place, key in keys:
        if not found.ndim or not found.size:
            break
        axis = place % found.ndim
        asked = within(key, found.shape[axis])
        found, expected = found.isel({found.dims[axis]: asked}), expected[(slice(None),) * axis + (asked,)]
    np.testing.assert_array_equal(found.values, expected)


def test_scalars_drop_their_dimension_and_raw_keeps_the_bits(store: Store, truth: Truth) -> None:
    rows = store.select("residual", rollouts="3", layers=5, raw=True)
    assert rows.dims == ("token", "hidden")
    assert int(rows.layer) == 5
    assert making.same_bits(rows.values, truth.values["residual", 5, "3"])
    assert store.select("k_proj", rollouts="3", layers=[5]).dims == ("token", "layer", "k_proj_hidden")
    table = store.rollouts.query("n_tokens > 30")
    assert set(store.select("residual", rollouts=table, layers=1).rollout.values.tolist()) == {"3", "long"}


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_other_dtypes_come_back_exactly(dtype: str, tmp_path: Path) -> None:
    spec = ComponentSpec(name="residual", width=4, dtype=dtype)
    asked = making.rollouts(9)
    making.capture(tmp_path / "run.zarr", asked, (0,), components=(spec,))
    found = datastore.open(tmp_path / "run.zarr").select("residual", layers=0)
    assert found.dtype == (np.float64 if dtype == "float64" else np.float32)
    np.testing.assert_array_equal(found.values, making.values(spec, 0, asked[0]))


def test_values_that_are_no_numbers_come_back(tmp_path: Path) -> None:
    bits = np.array([0x7FC1, 0xFF80, 0x8000, 0x0001] * 4, np.uint16)
    rows = np.tile(bits.view(ml_dtypes.bfloat16), (3, 1))
    (plan,) = making.plans(tmp_path / "run.zarr", making.rollouts(3), (0,), components=(making.RESIDUAL,))
    with datastore.create(tmp_path / "run.zarr", plan) as writer:
        writer.put("residual", 0, "0", rows)
        writer.commit()
    found = datastore.open(tmp_path / "run.zarr").select("residual", layers=0).values
    np.testing.assert_array_equal(found.view(np.uint32), rows.view(np.uint16).astype(np.uint32) << 16)


def test_the_dataset_selects_by_rollout_and_layer(store: Store, truth: Truth) -> None:
    whole = store.dataset()
    assert whole.residual.dims == ("token", "layer", "hidden")
    assert whole.k_proj.dims == ("token", "layer", "k_proj_hidden")
    for name in truth.rollouts:
        np.testing.assert_array_equal(whole.sel(rollout=name, layer=5).residual.values, truth.rows("residual", 5, name))
    xr.testing.assert_identical(
        whole.residual.sel(rollout="3", layer=5), store.select("residual", rollouts="3", layers=5).assign_attrs()
    )


# -- blocks and statistics ---------------------------------------------------------------------------------------------


def gathered(store: Store, found: Iterator[tuple[Any, NDArray[Any]]]) -> dict[Key, NDArray[Any]]:
    """Put blocks together again by rollout, each position exactly once."""
    cells: dict[Key, dict[int, NDArray[Any]]] = {}
    for span, values in found:
        for name, positions, rows in store.rows_of(span):
            cell = cells.setdefault((span.component, span.layer, name), {})
            for position, row in zip(range(positions.start, positions.stop), values[rows], strict=True):
                assert position not in cell
                cell[position] = row
    return {key: np.stack([cell[i] for i in range(len(cell))]) for key, cell in cells.items()}


@pytest.mark.parametrize("names", [None, ["3"], ["long", "2", "1", "0"]])
def test_blocks_hold_every_row_that_counts_once(store: Store, truth: Truth, names: list[str] | None) -> None:
    expected = {k: v for k, v in truth.values.items() if k[0] == "residual" and k[2] in (names or truth.rollouts)}
    found = gathered(
        store, ((b.span, b.values.copy()) for b in store.blocks("residual", layers=(1, 5, 9), rollouts=names))
    )
    mapped = gathered(store, store.map_blocks(lambda b: b.values.copy(), "residual", layers=(1, 5, 9), rollouts=names))
    assert found.keys() == mapped.keys() == expected.keys()
    assert all(
        making.same_bits(found[key], rows) and making.same_bits(mapped[key], rows) for key, rows in expected.items()
    )


def test_neighbours_come_as_one_block(tmp_path: Path) -> None:
    making.capture(tmp_path / "run.zarr", making.rollouts(5, 5, 5, 5), (1,), components=(making.RESIDUAL,))
    blocks = list(datastore.open(tmp_path / "run.zarr").blocks("residual", layers=1, memory=1 << 20))
    assert [(b.tokens.start, b.tokens.stop) for b in blocks] == [(0, 16), (16, 20)]


def expected_moments(truth: Truth, component: str, layer: int, name: str, segment: str) -> Moments:
    one = truth.rollouts[name]
    rows = truth.values[component, layer, name]
    return Moments.of(rows[: one.prompt_end] if segment == "prompt" else rows[one.prompt_end :])[0]


def close(a: Moments, b: Moments) -> bool:
    return all(
        np.allclose(getattr(a, name), getattr(b, name), rtol=1e-12, atol=1e-12)
        for name in ("count", "sum", "sum_squares", "sum_abs", "max_abs", "sum_unit", "nonfinite")
    )


def test_statistics_kept_per_rollout(tmp_path: Path) -> None:
    truth = Truth(tmp_path / "run.zarr")
    spec = ComponentSpec(name="residual", width=4, dtype="bfloat16")
    truth.capture(making.rollouts(4000, 3000, 3500), (1, 2), components=(spec,), batch_tokens=4000, most_tokens=1024)
    store = datastore.open(truth.path)
    kept = store.statistics("residual", 2, rollouts=["2", "0"])
    assert (set(kept.per_rollout), kept.per_capture, kept.needs_pass) == ({"0", "2"}, (), ())
    found = {(name, segment): moments for name, segment, moments in kept}
    assert set(found) == {(name, segment) for name in ("0", "2") for segment in ("prompt", "response")}
    for (name, segment), moments in found.items():
        assert close(moments, expected_moments(truth, "residual", 2, str(name), segment))
    prompts = [expected_moments(truth, "residual", 2, name, "prompt") for name in ("0", "2")]
    assert close(kept.total("prompt"), prompts[0] + prompts[1])


@pytest.mark.parametrize("names", [None, ["3", "0", "1"]])
def test_tables_of_statistics_in_memory_that_is_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str] | None
) -> None:
    monkeypatch.setattr(capture_group, "STATS_ROW_BYTES", 3 * 2 * 4 * 8)  # chunks of three rollouts
    truth = Truth(tmp_path / "run.zarr")
    spec = ComponentSpec(name="residual", width=4, dtype="bfloat16")
    counts = (4000, 3000, 3500, 2000, 2500)
    truth.capture(making.rollouts(*counts), (1, 2), components=(spec,), batch_tokens=4000, most_tokens=1024)
    store, memory = datastore.open(truth.path), dict[str, NDArray[Any]]()
    for layer in (1, 2):
        seen = []
        for table in store.statistics("residual", layer, rollouts=names).tables(memory=memory):
            for i, name in enumerate(table.rollouts):
                seen.append(name)
                for code, segment in enumerate(("prompt", "response")):
                    assert close(table.moments[i, code], expected_moments(truth, "residual", layer, name, segment))
        assert sorted(seen) == sorted(names or truth.rollouts)
    (first, *_) = store.statistics("residual", 1).tables(("sum",), memory=memory)
    assert set(first.values) == {"sum"}
    assert np.shares_memory(first.values["sum"], memory["sum"])


def test_statistics_kept_per_capture_answer_for_all_of_it_only(tmp_path: Path) -> None:
    truth = Truth(tmp_path / "run.zarr")
    truth.capture(making.rollouts(5, 17, 6), (1,))
    store = datastore.open(truth.path)
    kept = store.statistics("residual", 1)
    assert (kept.per_rollout, kept.per_capture, kept.needs_pass) == ((), (1,), ())
    parts = [expected_moments(truth, "residual", 1, name, "response") for name in truth.rollouts]
    assert close(kept.total("response"), parts[0] + parts[1] + parts[2])
    some = store.statistics("residual", 1, rollouts=["0", "2"])
    assert (some.per_capture, set(some.needs_pass)) == ((), {"0", "2"})
    with pytest.raises(AbsentError, match=r"not kept for 2 rollouts by themselves, the first is '0'; sum Moments.of"):
        some.total()


def test_norms_are_those_of_the_rows(store: Store, truth: Truth) -> None:
    for layers, dims in (((5, 1), ("token", "layer")), (9, ("token",))):
        norms = store.norms("residual", rollouts=["long", "1"], layers=layers)
        assert norms.dims == dims
        numbers = layers if isinstance(layers, tuple) else (layers,)
        rows = [np.concatenate([truth.rows("residual", n, name) for name in ("long", "1")]) for n in numbers]
        expected = np.stack([np.linalg.norm(r.astype(np.float64), axis=1) for r in rows], axis=1)
        np.testing.assert_allclose(norms.values.reshape(expected.shape), expected, rtol=1e-6)


def test_a_capture_without_statistics_says_so(tmp_path: Path) -> None:
    making.capture(tmp_path / "run.zarr", making.rollouts(5), (1,), statistics=False)
    store = datastore.open(tmp_path / "run.zarr")
    with pytest.raises(AbsentError, match=r"capture 1 was made without statistics, so it holds no norms of residual"):
        store.norms("residual")
    assert store.statistics("residual", 1).needs_pass == ("0",)


# -- absent is not zero ------------------------------------------------------------------------------------------------


def test_what_is_not_captured_is_an_error_that_lists_what_is(store: Store) -> None:
    with pytest.raises(AbsentError, match=r"component 'mlp_out' is not captured in .*, which holds residual, k_proj"):
        store.select("mlp_out")
    with pytest.raises(
        AbsentError, match=r"residual at layer 2 is not captured for any rollout; it is captured at layers 1, 5"
    ):
        store.select("residual", layers=2)
    with pytest.raises(AbsentError, match=r"rollout 'zz' is not in the store, which holds .*0"):
        store.select("residual", rollouts=["0", "zz"])
    absent = r"k_proj at layer 9 of rollout '.*' is not captured; captured for it: k_proj at layers 1, 5; residual at"
    with pytest.raises(AbsentError, match=absent):
        store.select("k_proj", layers=9)
    with pytest.raises(
        AbsentError, match=r"\(6 of the 21 rollouts x layers asked for are not captured; store.captured"
    ):
        store.blocks("k_proj", layers=(1, 5, 9))
    with pytest.raises(AbsentError, match=absent):
        store.dataset().k_proj.sel(layer=9).load()
    np.testing.assert_array_equal(store.dataset().k_proj.sel(layer=[1, 5]).shape, (117, 2, 6))
    assert store.dataset().k_proj.sel(rollout="1", layer=9).load().shape == (21, 6)


def test_what_was_dropped_is_absent_or_is_what_was_before(tmp_path: Path) -> None:
    truth = Truth(tmp_path / "run.zarr")
    asked = making.rollouts(5, 7)
    truth.capture(asked, (1, 5), components=(making.RESIDUAL,))
    before = dict(truth.values)
    truth.capture(asked[:1], (5,), components=(making.RESIDUAL,), replace=True, version=1)
    truth.drop(captures=[2])
    truth.drop(captures=[1], rollouts=["1"], layers=[1])
    store = datastore.open(truth.path)
    np.testing.assert_array_equal(
        store.select("residual", rollouts="0", layers=5, raw=True).values, before["residual", 5, "0"]
    )
    with pytest.raises(
        AbsentError, match=r"residual at layer 1 of rollout '1' is not captured; captured for it: residual at"
    ):
        store.select("residual", layers=1)
    assert not store.captured("residual").loc["1", 1]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"segment": "answer"}, r"segment 'answer' is not known; choose from prompt, response"),
        ({"role": ["user", "bot"]}, r"role 'bot' is not known; choose from none, system, user, assistant, tool"),
        ({"positions": slice(5, 1, -1)}, r"positions slice\(5, 1, -1\) goes backwards"),
        (
            {"where": lambda tokens: tokens.position},
            r"where returned int32 of shape \(\d+,\) for \d+ tokens; return one bool",
        ),
        ({"rollouts": []}, r"no rollouts are asked for: the ids or the table are empty"),
    ],
)
def test_a_wrong_argument_says_what_is_right(store: Store, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(MisuseError, match=message):
        store.select("residual", layers=1, **asked)


def test_rows_of_two_widths_are_not_one_array(tmp_path: Path) -> None:
    making.capture(tmp_path / "run.zarr", making.rollouts(5), (1,), components=(making.RESIDUAL,))
    other = ComponentSpec(name="residual", width=8, dtype="float32")
    making.capture(tmp_path / "run.zarr", [making.rollout("b", 4)], (1,), components=(other,))
    store = datastore.open(tmp_path / "run.zarr")
    with pytest.raises(ConflictError, match=r"residual has not one width but 16 in capture 1, 8 in capture 2"):
        store.select("residual")
    assert store.select("residual", rollouts="b").shape == (4, 1, 8)


def test_a_path_that_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(NotAStoreError, match=r"does not exist, so there is no store to read"):
        datastore.open(tmp_path / "nowhere.zarr")


def test_an_empty_store_is_empty(tmp_path: Path) -> None:
    storage.create_root(tmp_path / "run.zarr")
    store = datastore.open(tmp_path / "run.zarr")
    assert len(store.rollouts) == len(store.annotations) == len(store.captures) == 0
    assert (store.components, store.layers) == ((), ())
    assert store.dataset().sizes["token"] == 0
