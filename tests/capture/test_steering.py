"""Steering against a Llama written in NumPy, in float64: the forward with the vector added."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import AutoModelForCausalLM

from capture.components import find_components
from capture.errors import CaptureError, RequestError
from capture.hooks import tapped
from capture.steering import steered
from experiments.direction import Direction
from tests.capture import tiny
from tests.capture.stories import MODEL

Floats = NDArray[np.float64]
IDS = [1, 40, 77, 12, 300, 5, 5, 260]


def a_direction(width: int, *, layer: int, component: str = "residual", seed: int = 0) -> Direction:
    values = np.random.default_rng(seed).standard_normal(width) * 7
    return Direction(trait="test/up", layer=layer, component=component, values=values)


def unit(direction: Direction) -> Floats:
    return np.asarray(direction.values, np.float64) / np.linalg.norm(np.asarray(direction.values, np.float64))


class Oracle:
    """A Llama's forward as formulas over its weights: RMS norm, rotary attention with shared keys, gated MLP."""

    def __init__(self, model: Any) -> None:
        self.config = model.config
        self.weights = {name: value.detach().double().numpy() for name, value in model.state_dict().items()}

    def logits(self, ids: list[int], added: dict[tuple[str, int], Floats]) -> Floats:
        h = self.weights["model.embed_tokens.weight"][ids]
        for layer in range(self.config.num_hidden_layers):
            h = h + added.get(("resid_pre", layer), 0.0)
            h = h + self._attention(self._norm(h, f"model.layers.{layer}.input_layernorm"), layer)
            h = h + self._mlp(self._norm(h, f"model.layers.{layer}.post_attention_layernorm"), layer)
            h = h + added.get(("residual", layer), 0.0)
        return np.asarray(self._norm(h, "model.norm") @ self.weights["lm_head.weight"].T)

    def _norm(self, h: Floats, name: str) -> Floats:
        scale = np.sqrt((h**2).mean(axis=-1, keepdims=True) + self.config.rms_norm_eps)
        return np.asarray(h / scale * self.weights[f"{name}.weight"])

    def _mlp(self, h: Floats, layer: int) -> Floats:
        gate, up, down = (self.weights[f"model.layers.{layer}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
        g = h @ gate.T
        return np.asarray((g / (1 + np.exp(-g)) * (h @ up.T)) @ down.T)

    def _attention(self, h: Floats, layer: int) -> Floats:
        q, k, v = (self._heads(h, layer, name) for name in "qkv")
        q, k = self._rotated(q), self._rotated(k)
        shared = len(q) // len(k)
        k, v = np.repeat(k, shared, axis=0), np.repeat(v, shared, axis=0)
        scores = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])
        scores = np.where(np.tril(np.ones(scores.shape[1:], bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = (weights / weights.sum(axis=-1, keepdims=True)) @ v
        flat = mixed.swapaxes(0, 1).reshape(len(h), -1)
        return np.asarray(flat @ self.weights[f"model.layers.{layer}.self_attn.o_proj.weight"].T)

    def _heads(self, h: Floats, layer: int, name: str) -> Floats:
        out = h @ self.weights[f"model.layers.{layer}.self_attn.{name}_proj.weight"].T
        return np.asarray(out.reshape(len(h), -1, self.config.head_dim).swapaxes(0, 1))

    def _rotated(self, x: Floats) -> Floats:
        half = x.shape[-1] // 2
        theta = self.config.rope_parameters["rope_theta"]
        angles = np.outer(np.arange(x.shape[1]), theta ** (-np.arange(half) / half))
        low, high, cos, sin = x[..., :half], x[..., half:], np.cos(angles), np.sin(angles)
        return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


@pytest.fixture(scope="module")
def model() -> Any:
    loaded: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float64)
    return loaded.eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def no_hooks_left(model: Any) -> Iterator[None]:
    yield
    assert not hooks_left(model)


def hooks_left(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def logits_of(model: Any, ids: list[int]) -> Floats:
    with torch.inference_mode():
        return np.asarray(model(torch.tensor([ids])).logits[0].numpy(), np.float64)


@pytest.mark.parametrize(("component", "layer"), [("residual", 0), ("residual", 2), ("resid_pre", 1)])
@pytest.mark.parametrize("coefficient", [3.0, -1.5, 0.0])
def test_logits_are_those_of_a_forward_with_the_vector_added(
    model: Any, component: str, layer: int, coefficient: float
) -> None:
    direction = a_direction(model.config.hidden_size, layer=layer, component=component)
    with steered(model, [(direction, coefficient)]):
        found = logits_of(model, IDS)
    oracle = Oracle(model)
    expected = oracle.logits(IDS, {(component, layer): coefficient * unit(direction)})
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-5)  # its norms and angles are made in float32
    moved = np.abs(expected - oracle.logits(IDS, {})).max()
    assert moved > 0.05 if coefficient else moved == 0


def test_several_directions_add_up_and_the_model_is_as_before_afterwards(model: Any) -> None:
    width = model.config.hidden_size
    one, other = a_direction(width, layer=1), a_direction(width, layer=1, seed=1)
    below = a_direction(width, layer=0, seed=2)
    before = logits_of(model, IDS)
    with steered(model, [(one, 2.0), (other, -3.0), (below, 1.0)]):
        found = logits_of(model, IDS)
    added = {("residual", 1): 2 * unit(one) - 3 * unit(other), ("residual", 0): unit(below)}
    np.testing.assert_allclose(found, Oracle(model).logits(IDS, added), rtol=0, atol=3e-5)
    assert np.array_equal(logits_of(model, IDS), before)


def test_generation_with_a_cache_is_steered_at_every_step(model: Any) -> None:
    direction = a_direction(model.config.hidden_size, layer=1)
    oracle, expected = Oracle(model), list(IDS)
    for _ in range(6):
        expected.append(int(oracle.logits(expected, {("residual", 1): 4 * unit(direction)})[-1].argmax()))
    ids = torch.tensor([IDS])
    settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with steered(model, [(direction, 4.0)]):
        made = model.generate(ids, max_new_tokens=6, **settings)
    assert made[0].tolist() == expected
    assert made[0].tolist() != model.generate(ids, max_new_tokens=6, **settings)[0].tolist()


@pytest.mark.parametrize("name", [*tiny.CONFIGS])
def test_every_family_is_pushed_at_its_own_blocks(name: str) -> None:
    """The residual of a layer moves by the vector and nothing else; below it nothing moves."""
    model = tiny.tiny_model(name)  # the experts of some do not compute in float64
    table = find_components(model)
    direction = a_direction(table.hidden, layer=1)
    hooks = [table.hook("residual", layer) for layer in range(3)]

    def seen() -> dict[int, Floats]:
        rows: dict[int, Floats] = {}
        with (
            tapped(model, hooks, lambda _, layer, h: rows.__setitem__(layer, h.numpy().copy())),
            torch.inference_mode(),
        ):
            model(input_ids=torch.tensor([[2, 3, 5, 7, 11]]))
        return rows

    plain = seen()
    with steered(model, [(direction, 2.5)], table=table):
        pushed = seen()
    assert np.array_equal(pushed[0], plain[0])
    np.testing.assert_allclose(pushed[1] - plain[1], np.broadcast_to(2.5 * unit(direction), plain[1].shape), atol=1e-5)
    assert np.abs(pushed[2] - plain[2]).max() > 0.1
    assert not hooks_left(model)


def test_a_low_precision_model_rounds_the_sum_once() -> None:
    model = tiny.tiny_model("llama", dtype=torch.bfloat16)
    table = find_components(model)
    direction, rows = a_direction(table.hidden, layer=0), []
    with steered(model, [(direction, 1.0)]), tapped(model, [table.hook("residual", 0)], lambda *a: rows.append(a[2])):
        model(input_ids=torch.tensor([[2, 3, 5]]))
    with tapped(model, [table.hook("residual", 0)], lambda *a: rows.append(a[2])):
        model(input_ids=torch.tensor([[2, 3, 5]]))
    pushed, plain = rows
    assert torch.equal(pushed, (plain.float() + torch.from_numpy(unit(direction)).float()).bfloat16())


def test_an_input_by_name_and_a_tuple_are_pushed() -> None:
    class Block(nn.Module):
        def forward(self, *, hidden_states: torch.Tensor) -> tuple[torch.Tensor, str]:
            return hidden_states * 2, "kept"

    model = tiny.tiny_model("llama")
    model.layers[1] = Block()
    table = find_components(tiny.tiny_model("llama"))
    pushes = [(a_direction(32, layer=1, component=c), 1.0) for c in ("resid_pre", "residual")]
    with steered(model, pushes, table=table):
        out, rest = model.layers[1](hidden_states=torch.zeros(1, 1, 32))
    np.testing.assert_allclose(out[0, 0].numpy(), 3 * unit(pushes[0][0]), atol=1e-6)
    assert rest == "kept"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 8}, r"has width 8 and residual of llama has \d+; it is of another model"),
        ({"layer": 99}, "llama has no layer 99"),
        ({"coefficient": float("nan")}, "a coefficient of nan can't steer"),
        ({"component": "sae"}, "'sae' is not a component"),
    ],
)
def test_what_can_not_steer_is_refused(model: Any, change: dict[str, Any], message: str) -> None:
    asked = {"width": model.config.hidden_size, "layer": 1, "coefficient": 1.0, "component": "residual", **change}
    direction = a_direction(asked["width"], layer=asked["layer"], component=asked["component"])
    good = a_direction(model.config.hidden_size, layer=0)
    with pytest.raises(RequestError, match=message), steered(model, [(good, 1.0), (direction, asked["coefficient"])]):
        pass


def test_part_of_a_fused_projection_is_refused() -> None:
    model = tiny.tiny_model("gpt2")
    with (
        pytest.raises(RequestError, match=r"only some columns of h\.0\.attn\.c_attn"),
        steered(model, [(a_direction(32, layer=0, component="v_proj"), 1.0)]),
    ):
        pass


def test_a_module_without_a_tensor_is_an_error_and_leaves_no_hook() -> None:
    class Empty(nn.Module):
        def forward(self, hidden_states: torch.Tensor, **_: Any) -> None:
            return None

    model = tiny.tiny_model("llama")
    table = find_components(model)
    model.layers[1] = Empty()
    with (
        pytest.raises(CaptureError, match=r"layers\.1 gave a NoneType as its output"),
        steered(model, [(a_direction(32, layer=1), 1.0)], table=table),
    ):
        model(input_ids=torch.tensor([[1, 2]]))
    assert not hooks_left(model)
