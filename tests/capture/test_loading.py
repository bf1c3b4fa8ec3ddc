"""Models described and loaded from real directories: only what will run, every weight from the files, nothing "
"guessed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from capture.components import describe_components, find_components
from capture.errors import ModelError, RequestError
from capture.forward import run_batch
from capture.loading import describe, identity, load, provenance
from tests.capture import tiny


def save(model: Any, directory: Path) -> Path:
    model.save_pretrained(directory)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, tiny.VOCAB)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with a head, in bfloat16."""
    return save(
        tiny.tiny_model("llama", dtype=torch.bfloat16, head=True), tmp_path_factory.mktemp("models") / "tiny-llama"
    )


@pytest.fixture
def model_dir(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "model")


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def rows_of(model: Any, layers: list[int]) -> dict[tuple[str, int], Any]:
    rows: dict[tuple[str, int], Any] = {}

    def put(component: str, layer: int, rollout_id: str, values: Any, *, start: int) -> None:
        rows[component, layer] = values.view(np.uint8)

    batch = [("a", np.arange(3, 20))]
    run_batch(model, find_components(model), batch, layers=layers, components=["residual", "mlp_out"], put=put)
    return rows


def test_a_description_reads_no_weights(model_dir: Path) -> None:
    (model_dir / "model.safetensors").unlink()
    info = describe(model_dir)
    assert (info.n_layers, info.hidden, info.context, info.vocab_size) == (3, 32, 128, tiny.VOCAB)
    assert (info.dtype, info.model_id, info.revision) == ("bfloat16", "model", None)
    assert info.tokenizer.encode("w5 w6", add_special_tokens=False) == [5, 6]
    assert describe_components(info.config, dtype=info.dtype).specs(["residual"], [0, 2])[0].dtype == "bfloat16"


def test_the_dtype_is_the_checkpoints_also_where_only_the_weights_say_it(model_dir: Path) -> None:
    edit_config(model_dir, dtype=None, torch_dtype=None)
    info = describe(str(model_dir))
    assert info.dtype == "bfloat16"
    loaded = load(info, device="cpu")
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    assert load(info, device="cpu", dtype="float32").dtype == find_components(load(info, dtype="float32").model).dtype


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss", "deepseek_v3", "gpt2", "falcon_40b"])
def test_only_the_layers_that_will_run_are_loaded_and_their_bits_are_the_same(name: str, tmp_path: Path) -> None:
    model = tiny.tiny_model(name, dtype=torch.bfloat16, head=True)
    info = describe(save(model, tmp_path))
    loaded = load(info, layers=[1, 0], device="cpu")
    assert (loaded.n_layers, find_components(loaded.model).n_layers, info.n_layers) == (2, 2, 3)
    assert not any("lm_head" in key for key, _ in loaded.model.named_parameters())
    assert not loaded.model.training
    loaded.model.config.validate_layer_type()  # type: ignore[operator, union-attr]
    whole, part = rows_of(model, [0, 1]), rows_of(loaded.model, [0, 1])
    assert all(np.array_equal(whole[key], part[key]) for key in whole)


def test_a_multimodal_model_is_cut_in_its_text_part(tmp_path: Path) -> None:
    model = tiny.tiny_multimodal(dtype=torch.bfloat16, head=True)
    info = describe(save(model, tmp_path))
    assert (info.n_layers, info.hidden, info.vocab_size) == (3, 32, tiny.VOCAB)
    loaded = load(info, layers=[0], device="cpu")
    assert len(loaded.model.language_model.layers) == 1  # type: ignore[arg-type, union-attr]
    assert np.array_equal(rows_of(model, [0])["residual", 0], rows_of(loaded.model, [0])["residual", 0])


def test_kimi_k2_is_deepseek_v3_without_its_own_code(tmp_path: Path) -> None:
    model = tiny.tiny_model("deepseek_v3", dtype=torch.bfloat16, head=True)
    save(model, tmp_path)
    code = {"AutoConfig": "configuration_deepseek.DeepseekV3Config", "AutoModel": "modeling_deepseek.DeepseekV3Model"}
    edit_config(tmp_path, model_type="kimi_k2", auto_map=code)
    info = describe(tmp_path)
    assert info.config.model_type == "deepseek_v3"
    whole, part = rows_of(model, [0, 2]), rows_of(load(info, device="cpu").model, [0, 2])
    assert all(np.array_equal(whole[key], part[key]) for key in whole)


def test_attention_implementation_is_what_was_asked_for(saved: Path) -> None:
    info = describe(saved)
    assert load(info, device="cpu").attn_implementation == "sdpa"
    eager = load(info, device="cpu", attn_implementation="eager")
    assert provenance(eager)["attn_implementation"] == "eager"


def test_provenance_is_json_without_paths_and_follows_every_byte(saved: Path, model_dir: Path) -> None:
    there = provenance(load(describe(saved), device="cpu", layers=[0]))
    again = provenance(load(describe(model_dir), device="cpu", layers=[0]))
    assert identity(describe(saved), device="cpu") == there, "known before anything is loaded"
    assert json.loads(json.dumps(there)) == there
    assert str(saved.parent) not in json.dumps(there)
    assert there["model"] == "tiny-llama"
    assert {key for key in there if there[key] != again[key]} == {"model"}
    assert set(there["versions"]) >= {"python", "torch", "transformers", "numpy", "zarr", "activation-datastore"}
    weights = load_file(model_dir / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, model_dir / "model.safetensors", metadata={"format": "pt"})
    (model_dir / "tokenizer_config.json").write_text((model_dir / "tokenizer_config.json").read_text() + " ")
    changed = provenance(load(describe(model_dir), device="cpu", layers=[0]))
    assert {key for key in again if again[key] != changed[key]} == {"weights_sha256", "tokenizer_sha256"}


def test_a_snapshot_of_the_hub_cache_is_named_by_its_commit(saved: Path, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    directory = tmp_path / "models--owner--tiny" / "snapshots" / commit
    shutil.copytree(saved, directory)
    there = provenance(load(describe(directory), device="cpu", layers=[0]))
    assert (there["model"], there["revision"], there["weights_sha256"]) == ("owner/tiny", commit, None)


def drop_weight(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def to_pickle(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("break_it", "why"),
    [
        (lambda d: (d / "model.safetensors").unlink(), r"has no \*\.safetensors file, .*; download them too"),
        (to_pickle, r"has no \*\.safetensors file, .*; pytorch_model.bin is a pickle, which is never read"),
        (drop_weight, r"do not fit its config: 1 missing keys, layers.1.mlp.up_proj.weight the first"),
        (truncate, "can't be loaded"),
        (lambda d: edit_config(d, intermediate_size=40), "can't be loaded|do not fit its config"),
        (lambda d: edit_config(d, vocab_size=90), "can't be loaded|do not fit its config"),
    ],
    ids=["no weights", "pickle", "missing weight", "truncated", "other shape", "other vocabulary"],
)
def test_weights_that_are_not_all_there_are_never_made_up(
    break_it: Callable[[Path], Any], why: str, model_dir: Path
) -> None:
    break_it(model_dir)
    with pytest.raises(ModelError, match=why) as caught:
        load(describe(model_dir), device="cpu")
    assert str(model_dir) in str(caught.value)


@pytest.mark.parametrize(
    ("break_it", "why"),
    [
        (lambda d: (d / "config.json").unlink(), "has no config.json, so it is not a model's directory"),
        (lambda d: (d / "config.json").write_text("{"), "has no config that can be read"),
        (lambda d: edit_config(d, model_type="no_such_type"), "has no config that can be read"),
        (
            lambda d: edit_config(d, dtype="float8_e4m3fn"),
            "has dtype 'float8_e4m3fn', and a store holds bfloat16, float16",
        ),
        (lambda d: edit_config(d, dtype="float31"), "has no config that can be read|has dtype 'float31'"),
        (lambda d: (d / "tokenizer.json").write_text("[]"), "has no tokenizer that can be read"),
        (
            lambda d: (d / "adapter_config.json").write_text("{}"),
            r"holds an adapter \(adapter_config.json\), not a model",
        ),
    ],
)
def test_directories_that_do_not_describe_a_model(break_it: Callable[[Path], Any], why: str, model_dir: Path) -> None:
    break_it(model_dir)
    with pytest.raises(ModelError, match=why):
        describe(model_dir)


@pytest.mark.parametrize(
    "name",
    [
        *("/no/such/model", "./no-such-model", Path("no-such-model"), "a/b/c"),
        *("~/no-such", "~nobody-of-that-name", "~\x00", f"/{'x' * 300}"),
    ],
)
def test_a_directory_that_is_not_there(name: str | Path) -> None:
    with pytest.raises(ModelError, match=f"{name} is not a directory, so there is no model in it"):
        describe(name)


def test_a_hub_name_that_can_not_be_had() -> None:
    with pytest.raises(ModelError, match="the model no-such-owner/no-such-model has no config that can be read"):
        describe("no-such-owner/no-such-model")


def test_options_that_do_not_exist(saved: Path) -> None:
    info = describe(saved)
    with pytest.raises(RequestError, match="dtype 'int8' is not one that a store holds; choose bfloat16, float16"):
        load(info, dtype="int8")
    with pytest.raises(RequestError, match="tiny-llama has no layer 3; its layers are 0 to 2"):
        load(info, layers=[1, 3])
    with pytest.raises(RequestError, match=r"tiny-llama has no layer \(none was asked for\)"):
        load(info, layers=[])
    with pytest.raises(RequestError, match="device 'gpu0' is not one that torch knows"):
        load(info, device="gpu0")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there(saved: Path) -> None:
    with pytest.raises(RequestError, match="device 'cuda:1' is not there: torch sees no CUDA GPU"):
        load(describe(saved), device="cuda:1")
