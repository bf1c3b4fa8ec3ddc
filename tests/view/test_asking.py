"""What a request may ask: ranges, layers, conditions on the rollout table that can reach nothing else, sizes."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from datastore.errors import AbsentError, MisuseError
from view.asking import Limits, TooLargeError, check_condition, filtered, picked_layers, ranges

COLUMNS = ["rollout_id", "n_tokens", "label", "reward", "lying", "tags", "prompt_set"]
TABLE = pd.DataFrame(
    {
        "n_tokens": [3, 900, 12],
        "label": ["honest", "fabrication", None],
        "reward": [0.5, float("nan"), 1.0],
        "lying": [False, True, False],
        "tags": [("a",), ("a", "b"), ()],
        "prompt_set": ["x", "x", "y"],
    },
    index=pd.Index(["1", "2", "3"], name="rollout_id"),
)


def test_ranges_include_both_ends() -> None:
    assert [list(one) for one in ranges("3, 10-12", what="dims")] == [[3], [10, 11, 12]]


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "1--2", "1.5", "٣", "1,,2", "1234567890123"])
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(MisuseError, match="are no numbers; write them like"):
        ranges(text, what="dims")


def test_a_range_that_goes_backwards_is_refused() -> None:
    with pytest.raises(MisuseError, match=r"dims '5-2' go backwards"):
        ranges("1,5-2", what="dims")


def test_a_range_of_layers_takes_those_that_are_there() -> None:
    assert picked_layers("20,9-15,10", (10, 15, 20)) == [20, 10, 15]
    assert picked_layers(None, (10,)) is None
    assert picked_layers("7", (10,)) == [7]  # a layer named by itself is for the store to refuse
    assert picked_layers("0-999999999", (10,)) == [10]  # without counting to it
    with pytest.raises(AbsentError, match=r"no layer in 1-9 is there; there are 10, 15"):
        picked_layers("1-9", (10, 15))


@pytest.mark.parametrize(
    ("where", "ids"),
    [
        ("label == 'fabrication' and n_tokens > 500", ["2"]),
        ("n_tokens in [3, 12] and not lying", ["1", "3"]),
        ("(reward + 1) / 2 - 0.5 >= 0.5 | n_tokens < 4", ["1", "3"]),
        ("label.isna()", ["3"]),
        ("label.str.startswith('hon') == True", ["1"]),
        ("rollout_id == '2'", ["2"]),
        ("n_tokens > 1000", []),
    ],
)
def test_conditions_select(where: str, ids: list[str]) -> None:
    assert list(filtered(TABLE, where=where).index) == ids


@pytest.mark.parametrize(
    "where",
    [
        "@pd.io.common.os.system('touch {marker}')",
        "__import__('os').system('touch {marker}') == 0",
        "n_tokens.__class__.__init__.__globals__['os'] == 1",
        "label.map(print).isna()",
        "label.str.contains('(a+)+$')",
        "label.str.startswith(label)",
        "label.str.startswith(*['x'])",
        "(lambda: 1)() == 1",
        "[x for x in [1]] == n_tokens",
        "f'{{label}}' == 'x'",
        "10 ** 10 ** 10 > n_tokens",
        "'a' * 1000000000 == label",
        "'%1000000000d' % n_tokens == label",
        "n_tokens[0] == 3",
        "`n_tokens` == 3",
        "label is None",
        "n_tokens == 1j",
        "n_tokens := 3",
        "n_tokens == 3; import os",
        "n_tokens if lying else reward",
        "sin(n_tokens) > 0",
        "(" * 300 + "n_tokens" + ")" * 300,
        "n_tokens > 1" + " and n_tokens > 1" * 500,
        "\0",
        "",
    ],
)
def test_a_condition_that_is_more_than_that_is_refused(where: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    with pytest.raises(MisuseError, match=r"where .*(is not a condition|may not; compare columns)"):
        filtered(TABLE, where=where.format(marker=marker) if "{marker}" in where else where)
    assert not marker.exists()


def test_the_attacks_above_would_work_unchecked(tmp_path: Path) -> None:
    """Else the test above proves nothing: pandas itself runs them."""
    marker = tmp_path / "marker"
    TABLE.eval(f"@pd.io.common.os.system('touch {marker}')", engine="python", local_dict={"pd": pd})
    assert marker.exists()


def test_a_column_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(MisuseError, match=r"where names 'lable', which is no column; there are rollout_id, n_tokens"):
        check_condition("lable == 'x'", COLUMNS)


def test_labels_tags_and_sets_all_must_hold() -> None:
    assert list(filtered(TABLE, labels=["lying=false"]).index) == ["1", "3"]
    assert list(filtered(TABLE, labels=["lying=False", "reward=1"]).index) == ["3"]
    assert list(filtered(TABLE, labels=["label=honest"]).index) == ["1"]
    assert list(filtered(TABLE, labels=["reward=much"]).index) == []
    assert list(filtered(TABLE, tags=["a", "b"]).index) == ["2"]
    assert list(filtered(TABLE, prompt_set="y", tags=["a"]).index) == []
    with pytest.raises(MisuseError, match=r"label 'lying' is not NAME=VALUE of a column that is there: n_tokens"):
        filtered(TABLE, labels=["lying"])


def test_an_answer_that_is_too_large_says_how_to_ask_for_less() -> None:
    limits = Limits(json_values=100, binary_bytes=1000)
    limits.check(100, what="they", cure="ask for less")
    limits.check(250, what="they", cure="ask for less", itemsize=4)
    with pytest.raises(TooLargeError, match=r"they are 101 values, .* at most 100, .*; ask for less; npy and Arrow"):
        limits.check(101, what="they", cure="ask for less")
    with pytest.raises(TooLargeError, match=r"they are 251 values, .* binary form .* at most 250, .*; ask for less$"):
        limits.check(251, what="they", cure="ask for less", itemsize=4)
