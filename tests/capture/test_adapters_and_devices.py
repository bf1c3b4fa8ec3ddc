"""Adapters over a loaded model, and models spread over devices: the rows of the plain way."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import datastore
from capture import loaders, skeleton
from capture.components import find_components
from capture.errors import ModelError, RequestError
from capture.forward import run_batch
from capture.loading import describe, identity, load, order_of, provenance
from tests import house, kimi
from tests.capture import tiny
from tests.capture.cli import Command, command

__all__ = ["command"]


def rows_of(model: Any, layers: list[int]) -> dict[Any, Any]:
    rows: dict[Any, Any] = {}

    def put(component: str, layer: int, rollout_id: str, values: Any, *, start: int) -> None:
        rows[component, layer] = np.array(values).view(np.uint8)

    batch = [("a", np.arange(3, 40))]
    run_batch(model, find_components(model), batch, layers=layers, components=["residual", "mlp_out"], put=put)
    return rows


def same(a: dict[Any, Any], b: dict[Any, Any]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    saved = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny.tiny_model("llama", dtype=torch.bfloat16, head=True).save_pretrained(saved)
    kimi.save_tokenizer(saved)
    return saved


@pytest.fixture(scope="module")
def adapter(model: Path) -> Path:
    """An adapter of the model with head, as training leaves one; it changes the rows."""
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        saved = model.with_name("adapter")
        get_peft_model(AutoModelForCausalLM.from_pretrained(model), lora).save_pretrained(str(saved))
    return saved


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_rows_with_an_adapter_are_pefts_own(model: Path, adapter: Path) -> None:
    loaded = load(describe(model, adapter=str(adapter)), device="cpu", cache=False)
    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter).eval()
    assert same(rows_of(loaded.model, [0, 1, 2]), rows_of(whole, [0, 1, 2]))
    assert not same(rows_of(loaded.model, [0]), rows_of(load(describe(model), device="cpu").model, [0]))
    cut = load(describe(model, adapter=str(adapter)), device="cpu", layers=[1], cache=False)
    assert same(rows_of(cut.model, [0, 1]), rows_of(whole, [0, 1]))


def test_an_adapter_is_part_of_the_provenance(model: Path, adapter: Path) -> None:
    info = describe(model, adapter=str(adapter))
    said = provenance(load(info, device="cpu", layers=[0], cache=False))
    assert said["adapter"]["name"] == "adapter"
    assert len(said["adapter"]["sha256"]) == 64
    assert identity(info, device="cpu") == said
    assert "adapter" not in identity(describe(model), device="cpu")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_the_command_captures_with_an_adapter_and_says_so(
    model: Path, adapter: Path, tmp_path: Path, command: Command
) -> None:
    conversation = tmp_path / "rollouts.json"
    conversation.write_text('[{"id": "a", "text": "w5 w6 w7 w8"}]')
    words = ("--model", model, "--input", conversation, "--device", "cpu", "--layers", "1")
    told = command("--store", tmp_path / "with.zarr", *words, "--adapter", adapter)
    assert told.code == 0, told.err
    store = datastore.open(tmp_path / "with.zarr")
    assert store.provenance[1]["model"]["adapter"]["name"] == "adapter"
    loaded = load(describe(model, adapter=str(adapter)), device="cpu", cache=False)
    ids = store.tokens("a")["token_id"].to_numpy()
    rows: list[Any] = []
    batch, layer = [("a", ids)], [1]
    put: Any = lambda c, l, r, values, *, start: rows.append(np.array(values))  # noqa: E731, E741
    run_batch(loaded.model, find_components(loaded.model), batch, layers=layer, components=["residual"], put=put)
    stored = store.select("residual", rollouts="a", layers=1).to_numpy()
    assert np.array_equal(stored.reshape(rows[0].shape), rows[0].astype(np.float32))
    assert command("--store", tmp_path / "no.zarr", "--adapter", adapter).code == 2


def rewrite(adapter: Path, into: Path, change: Any) -> Path:
    from safetensors.torch import load_file, save_file

    into.mkdir()
    (into / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    save_file(change(load_file(adapter / "adapter_model.safetensors")), into / "adapter_model.safetensors")
    return into


def test_an_adapter_that_does_not_fit_is_never_ignored(model: Path, adapter: Path, tmp_path: Path) -> None:
    def drop(weights: dict[str, Any]) -> dict[str, Any]:
        return {name: one for name, one in weights.items() if "layers.1.self_attn.q_proj.lora_A" not in name}

    def other(weights: dict[str, Any]) -> dict[str, Any]:
        return {name.replace("layers.1.self_attn", "layers.1.attention"): one for name, one in weights.items()}

    missing, unknown = "lacks 1 weights, .*layers.1.self_attn.q_proj.lora_A", "has a weight .*layers.1.att"
    for change, why in ((drop, missing), (other, unknown)):
        broken = rewrite(adapter, tmp_path / change.__name__, change)
        with pytest.raises(ModelError, match=why):
            load(describe(model, adapter=str(broken)), device="cpu")
    with pytest.raises(ModelError, match=r"has no adapter_config.json, so it can't be loaded"):
        load(describe(model, adapter=str(tmp_path)), device="cpu")
    with pytest.raises(ModelError, match="is no directory of an adapter and no Hub id"):
        load(describe(model, adapter="/no/such"), device="cpu")
    with pytest.raises(ModelError, match="is no directory of an adapter and no Hub id"):
        load(describe(model, adapter=f"/{'x' * 300}"), device="cpu")


def test_quantising_needs_its_package(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("capture.loading.importlib.util.find_spec", lambda _: None)
    with pytest.raises(RequestError, match="quantising to 8bit needs the package bitsandbytes, which is not installed"):
        describe(model, quantize="8bit")
    with pytest.raises(RequestError, match="quantize '3bit' is not known; choose 8bit or 4bit"):
        describe(model, quantize="3bit")


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_a_model_is_quantised_while_it_is_loaded_and_says_so(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="quantising is not tested: pip install bitsandbytes, 125 MB")
    saved = tmp_path / "llama"
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    tiny.tiny_model("llama", dtype=torch.bfloat16, head=True, **sizes).save_pretrained(saved)
    kimi.save_tokenizer(saved)
    plain, quantised = (load(describe(saved, quantize=one), device="cpu") for one in (None, kind))
    assert "quantization" not in provenance(plain)
    assert provenance(quantised)["quantization"] == f"bitsandbytes {kind}"
    assert quantised.model.get_submodule("layers.0.mlp.up_proj").weight.dtype in (torch.int8, torch.uint8)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.inference_mode():
        exact, rounded = (one.model(input_ids=ids).last_hidden_state[0].float() for one in (plain, quantised))
    alike = torch.nn.functional.cosine_similarity(exact, rounded, dim=-1)
    assert not torch.equal(exact, rounded)
    assert alike.min() > (0.99 if kind == "8bit" else 0.7), alike


AT_HAND = dict.fromkeys(("embed_tokens", "layers.0", "norm", "rotary_emb"), "cpu")
SPREAD = AT_HAND | {"layers.1": "disk", "layers.2": "disk"}


def test_a_model_partly_on_disk_gives_the_same_bits(model: Path, tmp_path: Path) -> None:
    plain = rows_of(load(describe(model), device="cpu").model, [0, 1, 2])
    spread = load(describe(model), device=SPREAD, cache=False)
    assert any(parameter.is_meta for parameter in spread.model.parameters())
    assert same(rows_of(spread.model, [0, 1, 2]), plain)
    file = tmp_path / "map.json"
    file.write_text(json.dumps(SPREAD))
    assert same(rows_of(load(describe(model), device=str(file), cache=False).model, [0, 1, 2]), plain)


HOLDER = """
import os, sys
from capture.offload import offload_folder
made = offload_folder()
(made / "weights").write_bytes(b"1234")
os.utime(made, (0, 0))
if os.fork() == 0:
    sys.exit()  # a fork that ends deletes nothing
os.wait()
print(made, flush=True)
sys.stdin.read()
"""


def test_what_was_put_on_disk_goes_with_its_process_or_by_the_next_one(tmp_path: Path) -> None:
    def started() -> tuple[subprocess.Popen[str], Path]:
        command, where = [sys.executable, "-c", HOLDER], {**os.environ, "TMPDIR": str(tmp_path)}
        pipes: Any = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
        process = subprocess.Popen(command, env=where, cwd=house.ROOT, text=True, **pipes)
        assert process.stdout is not None
        return process, Path(process.stdout.readline().strip())

    killed, left = started()
    running, held = started()
    killed.kill()
    killed.communicate(timeout=60)
    assert [(left / "weights").exists(), (held / "weights").exists()] == [True, True]
    last, own = started()
    assert {one.name for one in tmp_path.iterdir()} == {held.name, own.name}
    for process in (running, last):
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_packed_experts_on_disk_are_read_from_the_cache(tmp_path: Path) -> None:
    saved = kimi.save_kimi(tmp_path / "k")
    info = describe(saved)
    plain = load(info, device="cpu", cache=False)
    with pytest.raises(RequestError, match="would be on disk, which needs a cache to read them from; build it"):
        load(info, device=SPREAD, cache=False)
    order = order_of(info, device="cpu")
    loaders.build_cache(order, plain.model, tmp_path / "c", blocks="layers", versions={}, tick=lambda _, __: None)
    spread = load(info, device=SPREAD, cache=tmp_path / "c")
    assert any(tensor.is_meta for tensor in spread.model.state_dict().values())
    assert same(rows_of(spread.model, [0, 1, 2]), rows_of(plain.model, [0, 1, 2]))


def test_a_device_map_that_lacks_a_module_is_said(model: Path, tmp_path: Path) -> None:
    saved = kimi.save_kimi(tmp_path / "k")
    with pytest.raises(RequestError, match=r"the device map has no device for layers.1"):
        load(describe(saved), device=AT_HAND)
    with pytest.raises(RequestError, match=r"names the whole model \(''\) and parts of it; name every part instead"):
        load(describe(saved), device=SPREAD | {"": "cpu"})
    with pytest.raises(RequestError, match=r"the device map .*none.json can't be read"):
        load(describe(model), device=str(tmp_path / "none.json"))


def test_blocks_are_spread_evenly_and_never_cut(tmp_path: Path) -> None:
    config = describe(kimi.save_kimi(tmp_path / "k", num_hidden_layers=12)).config
    model = skeleton.skeleton(config, dtype=torch.bfloat16, int4=skeleton.int4_layout(config))
    size = sum(t.numel() * t.element_size() for t in skeleton.tensors_of(model).values())
    placed = skeleton.balanced(model, memory={0: size, 1: size, "cpu": size})
    assert [name for name in placed if name.count(".") > 1] == [], "blocks are whole"
    held = dict.fromkeys(placed.values(), 0)
    for name, tensor in skeleton.tensors_of(model).items():
        held[skeleton.device_of(name, placed)] += tensor.numel() * tensor.element_size()
    assert set(held) == {0, 1}
    assert max(held.values()) <= 0.65 * size
    assert "disk" in skeleton.balanced(model, memory={0: size // 3, "cpu": size // 3}).values()
