"""Halves of a batch, and the token budget against the sizes of known models."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from capture.batching import auto_batch_tokens, halves

KIMI = SimpleNamespace(
    hidden_size=7168,
    num_hidden_layers=61,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    num_experts_per_tok=8,
    dtype="bfloat16",
)
STORIES = SimpleNamespace(hidden_size=64, num_hidden_layers=5, intermediate_size=172, dtype="float32")


@given(st.lists(st.integers(), min_size=2))
def test_halves_are_the_batch_in_order(batch: list[int]) -> None:
    first, second = halves(batch)
    assert [*first, *second] == batch
    assert 0 <= len(first) - len(second) <= 1


def test_the_budget_of_a_small_model_is_the_most_and_of_a_large_one_bounds_host_and_device() -> None:
    assert auto_batch_tokens(STORIES, "cpu") == 2_048
    assert auto_batch_tokens(STORIES, "cuda", device_bytes=80 << 30) == 16_384
    in_host_memory = auto_batch_tokens(KIMI, "cpu")
    assert in_host_memory * 7168 * 61 * 2 <= 1 << 30 < 2 * in_host_memory * 7168 * 61 * 2
    on_gpu = auto_batch_tokens(KIMI, "cuda:3", device_bytes=80 << 30)
    assert on_gpu * 7168 * 61 * 2 <= 8 << 30
    assert auto_batch_tokens(KIMI, "cuda", device_bytes=4 << 30) < on_gpu
    assert auto_batch_tokens(KIMI, "cuda", device_bytes=1) == 512


@pytest.mark.parametrize("device", ["map.json", torch.device("meta"), "mps"])
def test_a_device_map_has_large_batches_and_what_is_no_gpu_of_cuda_is_not_asked_for_its_memory(device: object) -> None:
    assert auto_batch_tokens(STORIES, device) == 16_384
    assert auto_batch_tokens(KIMI, device) == auto_batch_tokens(KIMI, "cpu")


def test_the_budget_of_a_multimodal_config_is_that_of_its_text() -> None:
    wrapped = SimpleNamespace(get_text_config=lambda: KIMI)
    assert auto_batch_tokens(wrapped, "cpu") == auto_batch_tokens(KIMI, "cpu")
