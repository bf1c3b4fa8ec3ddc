"""A published Kimi-K2 loaded with its experts packed, against the same model multiplied out in transformers' class."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from capture import loaders
from capture.components import find_components
from capture.errors import ModelError
from capture.experts import Int4Experts
from capture.forward import run_batch
from capture.loading import describe, load, provenance
from tests import kimi


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kimi.save_kimi(tmp_path_factory.mktemp("kimi") / "tiny-kimi", shards=3)


def rows_of(model: Any, layers: list[int], components: tuple[str, ...] = ("residual", "mlp_out")) -> dict[Any, Any]:
    rows: dict[tuple[str, int], Any] = {}

    def put(component: str, layer: int, rollout_id: str, values: Any, *, start: int) -> None:
        rows[component, layer] = values.astype(np.float64)

    table = find_components(model)
    run_batch(model, table, [("a", np.arange(3, 90))], layers=layers, components=list(components), put=put)
    return rows


def same(a: dict[Any, Any], b: dict[Any, Any], tolerance: float) -> bool:
    return a.keys() == b.keys() and all(np.linalg.norm(a[k] - b[k]) <= tolerance * np.linalg.norm(b[k]) for k in a)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 2e-2), ("float32", 1e-6)])
def test_rows_are_those_of_the_model_multiplied_out(saved: Path, dtype: str, tolerance: float) -> None:
    info = describe(saved)
    assert info.config.model_type == "deepseek_v3"
    loaded = load(info, device="cpu", dtype=dtype, cache=False)
    fused = [module for module in loaded.model.modules() if isinstance(module, Int4Experts)]
    assert [module.n_experts for module in fused] == [8, 8]
    assert not any(tensor.is_meta for tensor in loaded.model.state_dict().values())
    expected = kimi.plain_model(saved, dtype=getattr(torch, dtype))
    assert same(rows_of(loaded.model, [0, 1, 2]), rows_of(expected, [0, 1, 2]), tolerance)


def test_the_router_is_kept_in_float32(saved: Path) -> None:
    state = load(describe(saved), device="cpu", cache=False).model.state_dict()
    kinds = {name.rpartition(".")[2]: tensor.dtype for name, tensor in state.items()}
    assert kinds["e_score_correction_bias"] is torch.float32
    assert kinds["gate_packed"] is torch.int32
    assert kinds["gate_scale"] is torch.bfloat16


@pytest.mark.parametrize(("every", "least"), [(0.0, 3), (1e9, 1)])
def test_the_log_says_which_way_was_taken_how_much_is_read_and_how_fast(
    every: float, least: int, saved: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaders, "LOGGED_EVERY", every)
    caplog.set_level(logging.INFO, "capture")
    read = list[tuple[int, int]]()
    load(describe(saved), device="cpu", cache=False, tick=lambda done, total: read.append((done, total)))
    first, *moved, last = [record.getMessage() for record in caplog.records]
    assert first == "from_pretrained tiny-kimi: its INT4 shards, read in place"
    assert last == "Fused INT4 experts of 2 layers"
    assert len(moved) == (len(read) - 1 if every == 0 else 1) >= least
    done, total = read[-1]
    assert done == total
    assert moved[-1].startswith(f"from_pretrained: {done / 1e9:.2f} of {total / 1e9:.2f} GB, ")


def test_only_layers_that_run_are_read(saved: Path) -> None:
    done: list[tuple[int, int]] = []
    loaded = load(describe(saved), device="cpu", layers=[1], cache=False, tick=lambda *now: done.append(now))
    assert find_components(loaded.model).n_layers == 2
    assert (loaded.n_layers, provenance(loaded)["n_layers"]) == (2, 3)
    weights = sum(t.numel() * t.element_size() for t in loaded.model.state_dict().values())
    assert done[-1] == (weights, weights), "every byte read once, and none of the last layer or the head"
    assert same(rows_of(loaded.model, [1]), rows_of(kimi.plain_model(saved, n_layers=2), [1]), 2e-2)


def test_dense_layers_alone_have_no_experts_to_pack(saved: Path) -> None:
    loaded = load(describe(saved), device="cpu", layers=[0], cache=False)
    assert same(rows_of(loaded.model, [0]), rows_of(kimi.plain_model(saved, n_layers=1), [0]), 1e-6)


def edit(directory: Path, name: str, change: Any) -> None:
    for path in directory.glob("*.safetensors"):
        weights = load_file(path)
        if name in weights:
            changed = change(weights.pop(name))
            save_file(weights | ({name: changed} if changed is not None else {}), path, metadata={"format": "pt"})


AN_EXPERT = "model.layers.2.mlp.experts.5.up_proj.weight_packed"


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    saved = kimi.save_kimi(tmp_path / "k", shards=4)
    (saved / "model-00003-of-00004.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks 1 of 4 shards, model-00003-of-00004.safetensors the first"):
        load(describe(saved), device="cpu")


def test_weights_that_do_not_fit_are_named_and_none_is_made_up(tmp_path: Path) -> None:
    saved = kimi.save_kimi(tmp_path / "k", shards=1)
    edit(saved, AN_EXPERT, lambda t: t[:, :4].contiguous())
    with pytest.raises(ModelError, match=r"experts.5.up_proj.weight_packed is \[32, 4\] and should be \[32, 8\]"):
        load(describe(saved), device="cpu")
    edit(saved, AN_EXPERT, lambda _: None)
    with pytest.raises(ModelError, match=r"experts.5.up_proj.weight_packed is missing; download"):
        load(describe(saved), device="cpu")
    edit(saved, "model.norm.weight", lambda _: None)
    with pytest.raises(ModelError, match=r"is missing; download the model again"):
        load(describe(saved), device="cpu")


def test_a_shard_that_ends_early_is_named(tmp_path: Path) -> None:
    saved = kimi.save_kimi(tmp_path / "k", shards=2)
    path = saved / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ModelError, match=r"model-00002-of-00002.safetensors has .* bytes and its header speaks of"):
        load(describe(saved), device="cpu")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"num_bits": 8}, "8 bits, and only pack-quantized with 4 bits, symmetric, in one group is read"),
        ({"symmetric": False}, "and only pack-quantized with 4 bits, symmetric"),
    ],
)
def test_other_quantizations_are_refused(saved: Path, tmp_path: Path, change: dict[str, Any], why: str) -> None:
    config = json.loads((saved / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    for path in saved.iterdir():
        if path.name != "config.json":
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(ModelError, match=why):
        load(describe(tmp_path), device="cpu")
