"""One batch: the rows of each rollout alone, nothing lost or doubled when memory runs out, pieces equal the whole."""

import weakref
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from capture.components import find_components
from capture.errors import CaptureError, NoMemoryError, RequestError
from capture.forward import Halved, run_batch
from tests.capture import tiny

Batch = Sequence[tuple[str, NDArray[np.int64]]]
SPLIT = [*tiny.CONFIGS, "gemma3_multimodal"]


class Sink:
    """Keeps rows, refuses a row that it already has."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, int, str], dict[int, NDArray[Any]]] = {}
        self.halved: list[Halved] = []

    def put(self, component: str, layer: int, rollout_id: str, values: NDArray[Any], *, start: int) -> None:
        parts = self.rows.setdefault((component, layer, rollout_id), {})
        assert start == sum(len(part) for part in parts.values()), "rows in order, none twice, none left out"
        parts[start] = values

    def values(self, component: str, layer: int, rollout_id: str) -> NDArray[Any]:
        return np.concatenate(list(self.rows[component, layer, rollout_id].values()))


def run(model: Any, batch: Batch, *, layers: Sequence[int] = (0, 1, 2), components: Any = None, **options: Any) -> Sink:
    sink, table = Sink(), find_components(model)
    names = components or table.components
    run_batch(
        model, table, batch, layers=layers, components=names, put=sink.put, on_halve=sink.halved.append, **options
    )
    assert set(sink.rows) == {(c, layer, r) for c in names for layer in layers for r, _ in batch}
    for rollout_id, ids in batch:
        assert len(sink.values(names[0], layers[0], rollout_id)) == len(ids)
    return sink


def rollouts(*lengths: int) -> Batch:
    rng = np.random.default_rng(5)
    return [(f"r{i}", rng.integers(1, tiny.VOCAB, n)) for i, n in enumerate(lengths)]


class Scarce(nn.Module):
    """A decoder block whose device has room for so many tokens and no more, cached ones not counted."""

    def __init__(self, block: nn.Module, tokens: int, error: Exception | None = None, lasts: int = 10**9) -> None:
        super().__init__()
        self.block, self.tokens, self.lasts = block, tokens, lasts
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        self.self_attn, self.mlp = block.self_attn, block.mlp
        self.tried: list[tuple[int, int]] = []
        self.leaked: list[weakref.ref[torch.Tensor]] = []

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        assert not any(ref() is not None for ref in self.leaked), "the failed attempt's tensors are still held"
        self.tried.append((hidden_states.shape[0], hidden_states.shape[1]))
        if hidden_states.shape[0] * hidden_states.shape[1] > self.tokens and self.lasts > 0:
            self.lasts -= 1
            held = hidden_states * 3
            self.leaked.append(weakref.ref(held))
            raise self.error
        return self.block(hidden_states, **kwargs)


def scarce(tokens: int, **options: Any) -> Any:
    model = tiny.tiny_model("llama")
    model.layers[2] = Scarce(model.layers[2], tokens, **options)
    return model


def test_rows_are_those_of_each_rollout_without_padding_or_the_other_rollouts() -> None:
    model = tiny.tiny_model("llama")
    batch = rollouts(11, 6, 1)
    sink = run(model, batch)
    for rollout_id, ids in batch:
        with torch.no_grad():
            alone = model(input_ids=torch.from_numpy(ids)[None], output_hidden_states=True).hidden_states
        for layer in (0, 1):
            assert np.allclose(sink.values("residual", layer, rollout_id), alone[layer + 1][0].numpy(), atol=1e-5)
    assert not sink.halved


def test_bfloat16_leaves_as_the_bits_that_the_model_made() -> None:
    model = tiny.tiny_model("llama", dtype=torch.bfloat16)
    values = run(model, rollouts(4), components=["residual"]).values("residual", 0, "r0")
    assert values.dtype == ml_dtypes.bfloat16
    with torch.no_grad():
        ids = torch.from_numpy(rollouts(4)[0][1])[None]
        expected = model(input_ids=ids, output_hidden_states=True).hidden_states[1][0]
    assert np.array_equal(values.view(np.uint16), expected.view(torch.uint16).numpy())


def test_rows_stay_what_they_were_when_the_model_runs_again_or_writes_in_place() -> None:
    model = tiny.tiny_model("falcon_7b")  # adds attention into the MLP's output in place
    first = run(model, rollouts(9, 9))
    copies = {key: {start: part.copy() for start, part in parts.items()} for key, parts in first.rows.items()}
    run(model, rollouts(8, 8))
    assert all(np.array_equal(part, copies[key][s]) for key, parts in first.rows.items() for s, part in parts.items())
    added = first.values("attn_out", 1, "r0") + first.values("mlp_out", 1, "r0")
    assert np.array_equal(first.values("resid_pre", 1, "r0") + added, first.values("residual", 1, "r0"))


def test_nothing_above_the_highest_layer_runs_and_the_model_is_left_as_it_was() -> None:
    model = tiny.tiny_model("llama", head=True).train()
    blocks = model.model.layers
    model.model.layers[2].register_forward_pre_hook(lambda *_: pytest.fail("layer 2 ran"))
    model.lm_head.register_forward_pre_hook(lambda *_: pytest.fail("the head ran"))
    run(model, rollouts(5, 4), layers=(1,), components=["residual", "resid_pre"])
    assert model.model.layers is blocks
    assert len(blocks) == 3
    assert model.training
    assert model.model.layers[0].training


def test_values_that_are_not_finite_are_handed_out_as_they_are() -> None:
    model = tiny.tiny_model("llama")
    with torch.no_grad():
        model.layers[1].mlp.down_proj.weight[3, :] = torch.nan
    values = run(model, rollouts(5, 3)).values("mlp_out", 1, "r0")
    assert np.isnan(values[:, 3]).all()
    assert np.isfinite(np.delete(values, 3, 1)).all()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("CUDA error: out of memory"),
        MemoryError(),
    ],
    ids=["torch", "cpu", "driver", "python"],
)
def test_out_of_memory_halves_until_it_fits_and_says_so(error: Exception) -> None:
    batch = rollouts(8, 8, 7, 6, 5)
    plain = run(tiny.tiny_model("llama"), batch)
    model = scarce(16, error=error)
    sink = run(model, batch)
    ids = [rollout_id for rollout_id, _ in batch]
    assert model.layers[2].tried == [(5, 8), (3, 8), (2, 8), (1, 7), (2, 6)]
    assert [(halved.rollout_ids, halved.into) for halved in sink.halved] == [
        (tuple(ids), (tuple(ids[:3]), tuple(ids[3:]))),
        (tuple(ids[:3]), (tuple(ids[:2]), tuple(ids[2:3]))),
    ]
    for key in plain.rows:
        assert np.allclose(sink.values(*key), plain.values(*key), atol=1e-5)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=7), st.integers(31, 150))
@settings(max_examples=15)
def test_no_row_is_lost_or_doubled_whatever_fits(lengths: list[int], tokens: int) -> None:
    model, batch = scarce(tokens), rollouts(*lengths)
    sink = run(model, batch, components=["residual", "k_proj"])
    plain = run(tiny.tiny_model("llama"), batch, components=["residual", "k_proj"])
    for key in plain.rows:
        assert np.allclose(sink.values(*key), plain.values(*key), atol=1e-5)


def test_a_batch_that_failed_leaves_nothing_behind() -> None:
    sink, model = Sink(), scarce(4)
    table = find_components(model)
    model.layers[2].error = RuntimeError("another fault")
    with pytest.raises(RuntimeError, match="another fault"):
        run_batch(model, table, rollouts(5, 5), layers=[0, 1, 2], components=["residual"], put=sink.put)
    assert not sink.rows
    assert len(model.layers) == 3


def test_a_fault_of_the_receiver_is_not_taken_for_the_models() -> None:
    model = tiny.tiny_model("llama")
    calls: list[str] = []

    def full(component: str, layer: int, rollout_id: str, values: Any, *, start: int) -> None:
        calls.append(rollout_id)
        raise MemoryError("the writer's")

    with pytest.raises(MemoryError, match="the writer's"):
        run_batch(model, find_components(model), rollouts(3, 3), layers=[0], components=["residual"], put=full)
    assert calls == ["r0"]


def test_one_rollout_that_does_not_fit_is_computed_in_pieces() -> None:
    batch = rollouts(100)
    whole = run(tiny.tiny_model("llama"), batch)
    sink = run(scarce(30), batch)
    assert sink.halved == [
        Halved(rollout_ids=("r0",), piece_tokens=50),
        Halved(rollout_ids=("r0",), piece_tokens=25),
    ]
    assert list(sink.rows["residual", 1, "r0"]) == [0, 25, 50, 75]
    for key in whole.rows:
        assert np.allclose(sink.values(*key), whole.values(*key), atol=1e-5)


def test_memory_that_runs_out_later_keeps_what_was_handed_out_and_goes_on_smaller() -> None:
    class Shrinking(Scarce):
        def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
            if len(self.tried) == 2:
                self.tokens = 20
            return super().forward(hidden_states, **kwargs)

    batch = rollouts(120)
    whole = run(tiny.tiny_model("llama"), batch)
    model = tiny.tiny_model("llama")
    model.layers[2] = Shrinking(model.layers[2], 40)
    sink = run(model, batch, piece_tokens=40)
    assert sink.halved == [Halved(rollout_ids=("r0",), from_token=80, piece_tokens=20)]
    assert list(sink.rows["residual", 0, "r0"]) == [0, 40, 80, 100]
    prefix = [(1, 20)] * 4
    assert model.layers[2].tried == [(1, 40)] * 3 + prefix + [(1, 20)] * 2
    for key in whole.rows:
        assert np.allclose(sink.values(*key), whole.values(*key), atol=1e-5)


@pytest.mark.parametrize("name", SPLIT)
def test_pieces_with_a_cache_equal_the_whole_in_every_family(name: str) -> None:
    model = tiny.tiny_multimodal() if name == "gemma3_multimodal" else tiny.tiny_model(name)
    whole = run(model, rollouts(50))
    pieces = run(model, rollouts(50), piece_tokens=13)
    assert list(pieces.rows["residual", 0, "r0"]) == [0, 13, 26, 39]
    assert not pieces.halved
    for key in whole.rows:
        assert np.allclose(pieces.values(*key), whole.values(*key), rtol=1e-3, atol=2e-4), key


def test_a_rollout_that_never_fits_names_itself_and_what_to_do() -> None:
    with pytest.raises(
        NoMemoryError, match=r"rollout r0 of 100 tokens ran out of memory at token 0 even in pieces of 25"
    ):
        run(scarce(0), rollouts(100))
    with pytest.raises(NoMemoryError, match=r"rollout r0 of 9 tokens .* ask for fewer layers"):
        run(scarce(0), rollouts(9))


def test_a_model_without_a_cache_can_not_be_split() -> None:
    model = scarce(30)
    forward = model.forward
    model.forward = lambda input_ids, **kwargs: forward(input_ids, **{**kwargs, "use_cache": False})
    with pytest.raises(NoMemoryError, match=r"rollout r0 of 100 tokens does not fit .* llama gives no KV cache"):
        run(model, rollouts(100))


@pytest.mark.parametrize(
    ("batch", "why"),
    [
        ([("a", np.array([], np.int64))], "rollout a has no tokens"),
        ([("a", np.array([1, tiny.VOCAB]))], f"rollout a has token id {tiny.VOCAB}, and llama knows ids 0 to 96"),
        ([("a", np.array([3])), ("b", np.array([-1]))], "rollout b has token id -1"),
    ],
)
def test_refusals_before_anything_runs(batch: Batch, why: str) -> None:
    model = tiny.tiny_model("llama")
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(RequestError, match=why):
        run(model, batch)


def test_nothing_selected() -> None:
    with pytest.raises(RequestError, match="1 components on 0 layers select nothing"):
        run(tiny.tiny_model("llama"), rollouts(3), layers=(), components=["residual"])


def test_tensors_that_do_not_fit_the_plan_are_refused() -> None:
    model = tiny.tiny_model("llama")
    table = find_components(model)
    half = model.layers[1].register_forward_hook(lambda _, __, out: out.half())
    with pytest.raises(
        CaptureError, match=r"residual of layer 1 is \(1, 3, 32\) in float16, not \(1, 3, width\) in float32"
    ):
        run_batch(model, table, rollouts(3), layers=[1], components=["residual"], put=Sink().put)
    half.remove()
    wide = find_components(model, hook_paths={"k_proj": "layers.{layer}.mlp.act_fn"})
    with pytest.raises(CaptureError, match=r"k_proj of layer 1 at layers.1.mlp.act_fn is 48 wide, not 32"):
        run_batch(model, wide, rollouts(3), layers=[1], components=["k_proj"], put=Sink().put)


def test_a_module_that_never_runs_is_named() -> None:
    model = tiny.tiny_model("llama")
    for layer in model.layers:
        layer.spare = nn.Linear(32, 32)
    table = find_components(model, hook_paths={"k_proj": "layers.{layer}.spare"})
    with pytest.raises(CaptureError, match=r"layers.0.spare did not run, so k_proj of layer 0 is missing"):
        run_batch(model, table, rollouts(3), layers=[0], components=["k_proj"], put=Sink().put)
