"""Every family's components by live forwards of tiny random models: bits, the residual identity, widths, refusals."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import AutoConfig, DynamicCache

from capture.components import describe_components, find_components, text_decoder
from capture.errors import CaptureError, ModelError, RequestError
from capture.families import FAMILIES, Columns
from capture.forward import run_batch
from capture.hooks import tapped
from datastore.schema import COMPONENTS, ComponentSpec
from tests.capture import tiny

MODELS: dict[str, Callable[[torch.dtype], Any]] = {
    **{name: lambda dtype, name=name: tiny.tiny_model(name, dtype=dtype) for name in tiny.CONFIGS},  # type: ignore[misc]
    "llama_with_head": lambda dtype: tiny.tiny_model("llama", dtype=dtype, head=True),
    "gemma3_multimodal": lambda dtype: tiny.tiny_multimodal(dtype=dtype),
    "gemma3_multimodal_with_head": lambda dtype: tiny.tiny_multimodal(dtype=dtype, head=True),
    "llama_peft": lambda dtype: tiny.tiny_peft(dtype=dtype),
}
LATENT = ("deepseek_v2", "deepseek_v3")
BATCH = [("a", np.arange(3, 14)), ("b", np.arange(20, 26)), ("c", np.arange(1, 12) * 5)]
NORMED_KEYS = ("qwen3", "qwen3_moe", "gemma3_text", "olmo2", "olmo3")
FINAL_NORMS = ("norm", "ln_f", "final_layer_norm")
Rows = dict[tuple[str, int, str], NDArray[Any]]


def captured(model: Any, batch: Any = BATCH) -> Rows:
    table = find_components(model)
    rows: Rows = {}

    def put(component: str, layer: int, rollout_id: str, values: NDArray[Any], *, start: int) -> None:
        assert start == 0
        assert (component, layer, rollout_id) not in rows
        rows[component, layer, rollout_id] = values

    run_batch(model, table, batch, layers=range(table.n_layers), components=table.components, put=put)
    return rows


def as_tensor(values: NDArray[Any], dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32)).to(dtype)


def padded(batch: Any = BATCH) -> dict[str, Any]:
    longest = max(len(ids) for _, ids in batch)
    mask = torch.tensor([[int(i < len(ids)) for i in range(longest)] for _, ids in batch])
    ids = torch.stack([nn.functional.pad(torch.from_numpy(ids), (0, longest - len(ids))) for _, ids in batch])
    return {"input_ids": ids, "attention_mask": mask, "position_ids": torch.arange(longest).expand_as(ids)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_residual_is_output_hidden_states_and_what_blocks_add_is_all_there_is(name: str, dtype: torch.dtype) -> None:
    model = MODELS[name](dtype)
    rows = captured(model)
    with torch.no_grad():
        states = model(**padded(), use_cache=False, output_hidden_states=True).hidden_states
    decoder = text_decoder(model)
    final_norm = next(getattr(decoder, norm) for norm in FINAL_NORMS if hasattr(decoder, norm))
    for layer in range(3):
        for row, (rollout_id, ids) in enumerate(BATCH):
            keys = [key for key in rows if key[1:] == (layer, rollout_id)]
            there = {key[0]: as_tensor(rows[key], dtype) for key in keys}
            with torch.no_grad():
                residual = there["residual"] if layer < 2 else final_norm(there["residual"])
            assert torch.equal(residual, states[layer + 1][row, : len(ids)]), "the last entry is after the final norm"
            assert torch.equal(there["resid_pre"], states[layer][row, : len(ids)])
            start, attn, mlp = (there[c] for c in ("resid_pre", "attn_contribution", "mlp_contribution"))
            total = (mlp + attn) + start if name in tiny.PARALLEL_BRANCHES_FIRST else (start + attn) + mlp
            assert torch.equal(total, there["residual"]), "in the order of the block's own additions"
            assert attn.abs().max() > 0 < mlp.abs().max(), "branches that are zero would prove nothing"


@pytest.mark.parametrize("name", MODELS)
def test_widths_from_the_config_alone_are_those_of_the_rows(name: str) -> None:
    model = MODELS[name](torch.float32)
    found = find_components(model)
    rows = captured(model)
    assert {key[:2]: values.shape[1] for key, values in rows.items()} == {k: h.width for k, h in found.hooks.items()}
    assert set(found.hooks) | set(found.absent) == {(c, layer) for c in COMPONENTS for layer in range(3)}
    assert found.vocab_size == getattr(model.config.get_text_config(), "vocab_size", None)
    if not hasattr(model, "peft_config"):
        described = describe_components(model.config, dtype="bfloat16")
        widths = {key: hook.width for key, hook in described.hooks.items()}
        assert widths == {key: hook.width for key, hook in found.hooks.items()}
        assert (described.hidden, described.n_layers, described.dtype) == (32, 3, "bfloat16")


@pytest.mark.parametrize("name", [name for name in tiny.CONFIGS if name not in LATENT])
def test_keys_and_values_are_those_that_the_attention_keeps(name: str) -> None:
    """Values enter the KV cache as projected; keys rotated, by angle 0 at the first position, and in YaRN scaled."""
    typed = name in ("gpt_oss", "gemma2", "gemma3_text", "cohere2", "olmo3")
    everywhere: dict[str, Any] = {"layer_types": ["full_attention"] * 3} if typed else {}
    if name == "mistral":
        everywhere = {"sliding_window": None}
    model = tiny.tiny_model(name, **everywhere)
    ids = np.arange(3, 14)
    rows = captured(model, [("a", ids)])
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.from_numpy(ids)[None], past_key_values=cache, use_cache=True)
    for layer in range(3):
        kept: Any = cache.layers[layer]
        values = as_tensor(rows["v_proj", layer, "a"], torch.float32)
        heads = values.reshape(len(ids), -1, kept.values.shape[-1]).transpose(0, 1)
        repeats = kept.values.shape[1] // heads.shape[0]
        assert torch.allclose(heads.repeat_interleave(repeats, 0), kept.values[0], atol=1e-6)
        keys = as_tensor(rows["k_proj", layer, "a"], torch.float32).reshape(len(ids), -1, heads.shape[-1])
        if name not in NORMED_KEYS:
            first = nn.functional.normalize(keys[0], dim=-1).repeat_interleave(repeats, 0)
            assert torch.allclose(first, nn.functional.normalize(kept.keys[0, :, 0], dim=-1), atol=1e-6)


def test_every_row_of_the_table_has_its_tiny_model() -> None:
    tried = {tiny.CONFIGS[name][0] for name in tiny.CONFIGS} | {"gemma3"}
    untried = {family.name: set(family.model_types) - tried for family in FAMILIES}
    assert not any(untried.values()), untried


def test_raw_and_added_differ_where_a_norm_follows() -> None:
    for name, differs in (("gemma2", True), ("olmo2", True), ("llama", False)):
        rows = captured(tiny.tiny_model(name))
        assert np.array_equal(rows["attn_out", 1, "a"], rows["attn_contribution", 1, "a"]) is not differs
        assert np.array_equal(rows["mlp_out", 1, "a"], rows["mlp_contribution", 1, "a"]) is not differs


def test_raw_attention_is_the_output_of_o_proj() -> None:
    model = tiny.tiny_model("llama")
    seen: list[torch.Tensor] = []
    handle = model.layers[1].self_attn.o_proj.register_forward_hook(lambda _, __, out: seen.append(out.clone()))
    rows = captured(model)
    handle.remove()
    assert np.array_equal(seen[0][0].numpy(), rows["attn_out", 1, "a"])


def test_latent_attention_has_no_keys_to_capture_but_its_own_modules_can_be() -> None:
    model = tiny.tiny_model("deepseek_v3")
    table = find_components(model)
    assert "k_proj" not in table.components
    with pytest.raises(RequestError, match=r"layer 2 of deepseek_v3 has no k_proj \(its latent .* leave k_proj out"):
        table.hook("k_proj", 2)
    with pytest.raises(RequestError, match=r"give --hook-path v_proj=layers\.\{layer\}\.self_attn\.kv_b_proj"):
        table.specs(["v_proj"], [0])
    own = find_components(model, hook_paths={"k_proj": "layers.{layer}.self_attn.kv_b_proj"})
    assert own.specs(["k_proj"], [0, 2])[0].width == 4 * (8 + 8)


def test_specs_are_what_a_plan_records() -> None:
    table = find_components(tiny.tiny_model("gpt_neox", dtype=torch.bfloat16))
    residual, before, keys = table.specs(["residual", "resid_pre", "k_proj"], [0, 2])
    assert residual == ComponentSpec(name="residual", width=32, dtype="bfloat16", hook="layers.{layer}")
    assert before.hook == "layers.{layer}:input"
    assert keys.hook == "layers.{layer}.attention.query_key_value[4 x 8:16]"


def test_refusals_of_components_and_layers() -> None:
    table = find_components(tiny.tiny_model("llama"))
    with pytest.raises(RequestError, match=r"'embedding' is not a component; they are residual, resid_pre,"):
        table.hook("embedding", 0)
    with pytest.raises(RequestError, match="llama has no layer 3; its layers are 0 to 2"):
        table.specs(["residual"], [1, 3])


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn, self.ffn = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, hidden_states: torch.Tensor) -> Any:
        hidden_states = hidden_states + 2 * self.attn(hidden_states)
        return hidden_states + self.ffn(hidden_states)


class Foreign(nn.Module):
    """A model of no family: other names, a scaled branch, no config."""

    def __init__(self, block: type[nn.Module] = Block) -> None:
        super().__init__()
        self.wte = nn.Embedding(50, 8)
        self.trunk = nn.ModuleDict({"blocks": nn.ModuleList(block(8) for _ in range(2))})

    def forward(self, input_ids: torch.Tensor) -> Any:
        hidden = self.wte(input_ids)
        for block in self.get_submodule("trunk.blocks").children():
            hidden = block(hidden_states=hidden)
        return hidden


class Opaque(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mixer = nn.Linear(width, width)

    def forward(self, hidden_states: torch.Tensor) -> Any:
        return self.mixer(hidden_states)


def test_an_unknown_architecture_is_found_by_structure_without_guessing_what_is_added() -> None:
    model = Foreign().eval()
    table = find_components(model)
    assert table.components == ("residual", "resid_pre", "attn_out", "mlp_out")
    assert table.hook("mlp_out", 1).path == "trunk.blocks.1.ffn"
    with pytest.raises(
        RequestError, match=r"what Foreign adds to the residual stream is not known .* --hook-path attn_c"
    ):
        table.hook("attn_contribution", 0)
    rows = captured(model, [("a", np.arange(5))])
    with torch.no_grad():
        assert np.array_equal(rows["residual", 1, "a"], model(torch.arange(5)[None])[0].numpy())
    assert np.array_equal(rows["resid_pre", 1, "a"], rows["residual", 0, "a"])


def test_where_structure_says_nothing_the_error_names_what_was_looked_for_and_a_hook_path_is_the_cure() -> None:
    model = Foreign(Opaque).eval()
    with pytest.raises(
        ModelError, match=r"one of self_attn, .* \(lists seen: trunk.blocks\).*--hook-path residual=mod"
    ):
        find_components(model)
    paths = {"residual": "model.trunk.blocks.{layer}", "mlp_out": "trunk.blocks.{layer}.mixer:input"}
    table = find_components(model, hook_paths=paths)
    rows: Rows = {}
    run_batch(
        model,
        table,
        [("a", np.arange(5))],
        layers=[0, 1],
        components=["residual", "mlp_out"],
        put=lambda c, n, r, values, *, start: rows.__setitem__((c, n, r), values),
    )
    with torch.no_grad():
        assert np.array_equal(rows["residual", 1, "a"], model(torch.arange(5)[None])[0].numpy())
    assert np.array_equal(rows["mlp_out", 1, "a"], rows["residual", 0, "a"])
    assert table.components == ("residual", "resid_pre", "mlp_out"), "a block is not its own attention"
    for component in ("attn_out", "k_proj"):
        with pytest.raises(RequestError, match=rf"none of self_attn, .* its {component} is not found; it has mixer"):
            table.hook(component, 0)


@pytest.mark.parametrize(
    ("paths", "why"),
    [
        ({"resid": "layers.{layer}"}, "hook path for 'resid', which is not a component"),
        ({"residual": "layers.3"}, "can't be read; write it as residual=model.blocks"),
        ({"residual": "layers.{layer}:inputs"}, "with :input at its end"),
        (
            {"residual": "h.{layer}"},
            "the model has no module h; its modules are embed_tokens, layers, norm, rotary_emb",
        ),
        ({"residual": "norm.{layer}"}, "norm is a LlamaRMSNorm, not the list of blocks"),
        ({"residual": "layers.{layer}.nope"}, "hook path residual=layers.0.nope names no module"),
    ],
)
def test_refusals_of_hook_paths(paths: dict[str, str], why: str) -> None:
    with pytest.raises(RequestError, match=why.replace("(", r"\(")):
        find_components(tiny.tiny_model("llama"), hook_paths=paths)


def test_a_dtype_that_no_store_holds() -> None:
    model = tiny.tiny_model("llama").to(torch.float8_e4m3fn)
    with pytest.raises(ModelError, match="computes in float8_e4m3fn, which a store does not hold"):
        find_components(model)


def test_a_module_that_gives_no_tensor() -> None:
    model = tiny.tiny_model("llama")
    hook = find_components(model, hook_paths={"residual": "layers.{layer}.self_attn:input"}).hook("residual", 0)
    model.layers[0].self_attn.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "hidden_states": None}), with_kwargs=True
    )
    refusal = pytest.raises(CaptureError, match=r"layers.0.self_attn gave a NoneType as its input, not a tensor")
    with refusal, tapped(model, [hook], lambda *_: None):
        model(**padded())


def test_prompt_tuning_is_refused() -> None:
    wrapper = tiny.tiny_peft()
    wrapper.peft_config = {"mine": SimpleNamespace(is_prompt_learning=True)}
    with pytest.raises(ModelError, match=r"adapter 'mine' .* adds tokens of its own to the prompt"):
        find_components(wrapper)


def test_columns_that_select_nothing_are_not_made() -> None:
    with pytest.raises(ValueError, match="columns 0 \\+ 0 of 1 groups select nothing"):
        Columns(groups=1, start=0, width=0)


def test_the_full_size_of_a_large_model_is_described_without_its_weights() -> None:
    heads = {"num_attention_heads": 64, "num_key_value_heads": 64}
    sizes = {"hidden_size": 7168, "num_hidden_layers": 61, "n_routed_experts": 384, **heads}
    config = AutoConfig.for_model("deepseek_v3", **{**tiny.LATENT, **sizes})
    table = describe_components(config, dtype="bfloat16")
    assert (table.n_layers, table.hidden) == (61, 7168)
    assert table.specs(["residual", "mlp_out"], range(61))[1].hook == "layers.{layer}.mlp"
