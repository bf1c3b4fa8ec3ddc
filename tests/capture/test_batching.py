"""Batches against their definition, and the token budget against the sizes of known models."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capture.batching import auto_batch_tokens, batches, halves

KIMI = SimpleNamespace(
    hidden_size=7168,
    num_hidden_layers=61,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    num_experts_per_tok=8,
    dtype="bfloat16",
)
STORIES = SimpleNamespace(hidden_size=64, num_hidden_layers=5, intermediate_size=172, dtype="float32")


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 1000))
def test_each_rollout_once_within_the_budget_and_by_length(lengths: list[int], batch_tokens: int) -> None:
    made = batches(lengths, batch_tokens=batch_tokens)
    order = [index for batch in made for index in batch]
    assert order == sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for batch in made:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= batch_tokens
    for batch, following in pairwise(made):
        assert (len(batch) + 1) * lengths[batch[0]] > batch_tokens, "the next rollout would have fitted"
        assert lengths[batch[-1]] >= lengths[following[0]]


def test_a_longer_rollout_is_a_batch_of_its_own_and_padding_counts() -> None:
    assert batches([10, 100, 10, 9, 50], batch_tokens=60) == ((1,), (4,), (0, 2, 3))
    assert batches({"b": 3, "a": 3, "c": 4}, batch_tokens=8) == ((2, 0), (1,))
    assert batches([], batch_tokens=8) == ()


@pytest.mark.parametrize(("lengths", "budget"), [([0, 4], 8), ([4], 0)])
def test_impossible_batches(lengths: list[int], budget: int) -> None:
    with pytest.raises(ValueError, match=f"no batch of {budget} tokens holds a rollout of {min(lengths)} tokens"):
        batches(lengths, batch_tokens=budget)


@given(st.lists(st.integers(), min_size=2))
def test_halves_are_the_batch_in_order(batch: list[int]) -> None:
    first, second = halves(batch)
    assert [*first, *second] == batch
    assert 0 <= len(first) - len(second) <= 1


def test_the_budget_of_a_small_model_is_the_most_and_of_a_large_one_bounds_host_and_device() -> None:
    assert auto_batch_tokens(STORIES, "cpu") == 16_384
    on_cpu = auto_batch_tokens(KIMI, "cpu")
    assert on_cpu * 7168 * 61 * 2 <= 1 << 30 < 2 * on_cpu * 7168 * 61 * 2
    on_gpu = auto_batch_tokens(KIMI, "cuda:3", device_bytes=80 << 30)
    assert on_gpu * 7168 * 61 * 2 <= 8 << 30
    assert auto_batch_tokens(KIMI, "cuda", device_bytes=4 << 30) < on_gpu
    assert auto_batch_tokens(KIMI, "cuda", device_bytes=1) == 512


def test_the_budget_of_a_multimodal_config_is_that_of_its_text() -> None:
    wrapped = SimpleNamespace(get_text_config=lambda: KIMI)
    assert auto_batch_tokens(wrapped, "cpu") == auto_batch_tokens(KIMI, "cpu")
