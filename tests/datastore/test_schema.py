"""What is written can't be held in an invalid state, and says what is wrong with it."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest

from datastore.errors import PlanError
from datastore.schema import Annotation, Batch, Codec, ComponentSpec, Plan, Rollout
from tests.datastore import making


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"token_ids": []}, "rollout 'a' has 0 tokens; there is nothing to capture, leave it out"),
        ({"token_ids": [[1, 2]]}, r"rollout 'a': token ids must be one row of integers, got int64 \(1, 2\)"),
        ({"token_ids": [0.5]}, "token ids must be one row of integers, got float64"),
        ({"token_ids": [-1]}, r"has token id -1\.\.-1, outside int32"),
        ({"token_ids": [2**31]}, "outside int32"),
        ({"rollout_id": ""}, "a rollout is named ''; rollout ids are text that is not empty, name every rollout"),
        ({"rollout_id": 71}, "a rollout is named 71; rollout ids are text"),
        (
            {"rollout_id": "\ud800"},
            "holds half of a surrogate pair and can't be stored as Unicode; replace that character",
        ),
        ({"labels": {"x": "\udfff"}}, "half of a surrogate pair"),
        (
            {"labels": {"x": None}},
            "rollout 'a': label 'x' is None; a label has a name and is text, a number or a truth",
        ),
        ({"labels": {"": 1}}, "label '' is 1; a label has a name"),
        ({"prompt_end": 4}, r"rollout 'a': prompt_end 4 is outside 0\.\.3 tokens"),
        ({"prompt_end": 1.0}, r"rollout 'a': prompt_end is 1\.0, which is no whole number"),
        ({"role": [1, 2]}, r"rollout 'a': role has shape \(2,\) for 3 tokens; give one value per token"),
        (
            {"role": [0, 1, 5]},
            r"has role codes 0\.\.5, and there are only 0 to 4 \(none, system, user, assistant, tool\)",
        ),
        ({"turn": [1]}, "turn has shape"),
        ({"thinking": [True]}, "thinking has shape"),
        (
            {"annotations": (Annotation(token_start=1, token_end=4, label="x"),)},
            "annotation 'x' ends at token 4, beyond its 3 tokens",
        ),
    ],
)
def test_an_invalid_rollout(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Rollout(**({"rollout_id": "a", "token_ids": [1, 2, 3]} | fields))


def test_an_invalid_annotation() -> None:
    with pytest.raises(
        PlanError, match=r"'x' spans tokens \[3, 2\), which is no range; give 0 <= token_start <= token_end"
    ):
        Annotation(token_start=3, token_end=2, label="x")


def test_numpy_integers_are_as_good_as_plain_ones() -> None:
    two = np.int64(2)
    spans = (Annotation(token_start=np.int32(1), token_end=two, label="x"),)  # type: ignore[arg-type]
    given = Rollout(rollout_id="a", token_ids=[1, 2, 3], prompt_end=two, annotations=spans)  # type: ignore[arg-type]
    span = Annotation(token_start=1, token_end=2, label="x")
    plain = Rollout(rollout_id="a", token_ids=[1, 2, 3], prompt_end=2, annotations=(span,))  # type: ignore[arg-type]
    assert given.sha256 == plain.sha256
    with pytest.raises(PlanError, match=r"annotation 'x': token_end is '2', which is no whole number"):
        Annotation(token_start=1, token_end="2", label="x")  # type: ignore[arg-type]


def test_what_a_rollout_says_of_itself() -> None:
    one = Rollout(rollout_id="a", token_ids=np.array([5, 6, 7]), prompt_end=1, labels={"n": np.float64(0.5)})
    assert one.n_tokens == 3
    assert one.segment.tolist() == [0, 1, 1]
    assert one.token_sha256 == hashlib.sha256(np.array([5, 6, 7], "<i4").tobytes()).hexdigest()
    assert one.labels == {"n": 0.5}
    assert type(one.labels["n"]) is float
    plain = Rollout(rollout_id="a", token_ids=np.array([5, 6, 7]))
    assert plain.prompt_end == 3
    assert np.asarray(plain.turn).tolist() == [-1, -1, -1]


@pytest.mark.parametrize(
    "known",
    [
        {"prompt_end": 2},
        {"role": [0, 0, 1]},
        {"turn": [0, 0, 1]},
        {"thinking": [True, False, False]},
        {"labels": {"n": 1}},
        {"tags": ("t",)},
        {"prompt_set": "p"},
        {"annotations": (Annotation(token_start=0, token_end=1, label="x"),)},
    ],
)
def test_everything_known_of_a_rollout_is_in_its_hash(known: dict[str, Any]) -> None:
    plain = Rollout(rollout_id="a", token_ids=np.array([5, 6, 7], np.int32))
    other = Rollout(rollout_id="a", token_ids=np.array([5, 6, 7], np.int32), **known)
    assert plain.token_sha256 == other.token_sha256
    assert plain.sha256 != other.sha256


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "a b"}, "component 'a b' is not a name; use letters, digits and underscores"),
        ({"name": "stats"}, "component 'stats' has the name of something else in a capture; give it another"),
        ({"width": 0}, "component x has width 0; it must be at least 1"),
        ({"dtype": "int8"}, "component x has dtype 'int8'; a store holds bfloat16, float16, float32, float64"),
    ],
)
def test_an_invalid_component(fields: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"name": "x", "width": 4, "dtype": "float32"} | fields
    with pytest.raises(PlanError, match=message):
        ComponentSpec(**given)


def test_an_invalid_codec() -> None:
    with pytest.raises(PlanError, match="codec 'zip' is not known; choose one of zstd, lz4, none"):
        Codec(name="zip")  # type: ignore[arg-type]


def plan(**fields: Any) -> Plan:
    rollouts = tuple(making.rollouts(2, 3))
    given: dict[str, Any] = {
        "rollouts": rollouts,
        "batches": (Batch(members=("0", "1")),),
        "layers": (1, 5),
        "components": making.BOTH,
        "chunk_tokens": {"residual": 16, "k_proj": 8},
        "batch_tokens": 40,
    }
    return Plan(**(given | fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rollouts": ()}, "the plan has no rollouts; give at least one"),
        (
            {"rollouts": tuple(making.rollouts(2)) * 2},
            "rollout id '0' is there more than once; rollout ids must be unique",
        ),
        ({"layers": (5, 1)}, r"layers \[5, 1\] must be at least one, ascending, without repeats, from 0"),
        ({"layers": ()}, r"layers \[\] must be"),
        ({"layers": (-1,)}, r"layers \[-1\] must be"),
        ({"components": ()}, r"components \[\] must be at least one, each once"),
        ({"components": (making.KEYS,) * 2}, r"components \['k_proj', 'k_proj'\] must be"),
        (
            {"chunk_tokens": {"residual": 12, "k_proj": 8}},
            "chunks of .*12.* tokens do not tile .* give each .* a power of",
        ),
        ({"chunk_tokens": {"residual": 8}}, "do not tile the token axis"),
        (
            {"batches": (Batch(members=("1", "0")),)},
            "the plan's batches hold 2 stored rollouts in an order that differs",
        ),
    ],
)
def test_an_invalid_plan(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan(**fields)


def test_what_a_plan_says_of_itself() -> None:
    one = plan()
    assert (one.n_tokens, one.stride, one.rows) == (5, 16, {"0": 0, "1": 1})
    assert one.raw_bytes == 5 * 2 * (16 * 2 + 6 * 4)
    with pytest.raises(PlanError, match="component 'mlp_out' is not in this plan, which has residual, k_proj"):
        one.component("mlp_out")


@pytest.mark.parametrize(
    "fields",
    [
        {"request": "x"},
        {"layers": (1,)},
        {"components": (making.RESIDUAL,)},
        {"codec": Codec(name="lz4")},
        {"chunk_tokens": {"residual": 8, "k_proj": 8}},
        {"batches": (Batch(members=("0",)), Batch(members=("1",)))},
        {"batches": (Batch(members=("0", "1", "c"), company={"c": np.array([1], np.int32)}),)},
        {"statistics": False},
        {"replace": True},
        {"after": (1,)},
        {"provenance": making.MODEL},
    ],
)
def test_all_that_decides_the_bits_is_in_the_key(fields: dict[str, Any]) -> None:
    assert plan().key == plan().key
    assert plan(**fields).key != plan().key


def test_statistics_are_kept_per_rollout_where_they_cost_little() -> None:
    """The threshold is at 3 percent: two segments x 40 bytes per width against 2 bytes per width and token."""

    def level(n_tokens: int, prompt_end: int) -> str:
        one = making.rollout("0", n_tokens, prompt_end=prompt_end)
        batches, chunks = (Batch(members=("0",)),), {"residual": 16}
        return plan(rollouts=(one,), batches=batches, components=(making.RESIDUAL,), chunk_tokens=chunks).stats_level

    assert [level(1333, 5), level(1334, 5)] == ["capture", "rollout"]
    assert [level(666, 666), level(667, 667)] == ["capture", "rollout"]
