"""The fast-load cache: the same bits as the normal load; every way in which one can be wrong is named, and not used."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from capture import cache, gpucache, loaders
from capture.components import find_components
from capture.errors import CacheError
from capture.loading import describe, load, order_of
from capture.skeleton import tensors_of
from tests import kimi
from tests.capture import tiny


def build(model: Path, directory: Path, **options: Any) -> cache.Manifest:
    info = describe(model)
    loaded = load(info, device="cpu", cache=False, **options)
    order = order_of(info, device="cpu", **options)
    blocks = find_components(loaded.model).blocks
    return loaders.build_cache(order, loaded.model, directory, blocks=blocks, versions={}, tick=lambda *_: None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kimi.save_kimi(tmp_path_factory.mktemp("cached") / "tiny-kimi")


@pytest.fixture(scope="module")
def built(model: Path) -> Path:
    directory = model.with_name("cache")
    build(model, directory)
    return directory


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "cache"))


def same_model(a: Any, b: Any) -> bool:
    left, right = tensors_of(a), tensors_of(b)
    return left.keys() == right.keys() and all(
        left[k].dtype is right[k].dtype and torch.equal(left[k].view(torch.uint8), right[k].view(torch.uint8))
        for k in left
        if left[k].ndim
    )


def used(caplog: pytest.LogCaptureFixture) -> bool:
    return not any("the cache is not used" in record.message for record in caplog.records)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss", "deepseek_v3", "gpt2", "falcon_alibi"])
def test_every_tensor_is_the_same_as_after_the_normal_load(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = tmp_path / "model"
    tiny.tiny_model(name, dtype=torch.bfloat16, head=True).save_pretrained(saved)
    kimi.save_tokenizer(saved)
    build(saved, tmp_path / "cache")
    cached = load(describe(saved), device="cpu", cache=tmp_path / "cache")
    assert used(caplog)
    normal = load(describe(saved), device="cpu", cache=False)
    assert same_model(cached.model, normal.model)
    assert cached.attn_implementation == normal.attn_implementation
    ids = torch.arange(3, 20)[None]
    with torch.inference_mode():
        assert torch.equal(cached.model(ids).last_hidden_state, normal.model(ids).last_hidden_state)


def test_packed_experts_come_back_to_the_bit_and_fewer_layers_read_less(
    model: Path, built: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "capture")
    info, done = describe(model), list[int]()
    assert same_model(load(info, device="cpu", cache=built).model, load(info, device="cpu", cache=False).model)
    load(info, device="cpu", cache=built, layers=[1], tick=lambda now, _: done.append(now))
    assert used(caplog)
    assert any("Loading from cache" in record.message for record in caplog.records)
    assert 0 < done[-1] < cache.read(built).n_bytes


def test_a_cache_in_the_usual_place_is_used_by_itself(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    caplog.set_level(logging.INFO, "capture")
    info = describe(model)
    load(info, device="cpu")
    assert not caplog.records or "Loading from cache" not in caplog.text
    wanted = loaders.wanted_cache(info, model, dtype="bfloat16", n_layers=3)
    build(model, cache.default_directory(wanted))
    load(info, device="cpu")
    assert "Loading from cache" in caplog.text
    assert used(caplog)


def flip(directory: Path, name: str = "layers-from-000.safetensors", at: int = -700) -> None:
    path = directory / name
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def edit(directory: Path, change: Callable[[Any], None]) -> None:
    path = directory / "manifest.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def rename_key(directory: Path) -> None:
    path = directory / "rest.safetensors"
    weights = load_file(path)
    weights["other.weight"] = weights.pop("norm.weight")
    save_file(weights, path)

    def change(raw: Any) -> None:
        raw["tensors"]["other.weight"] = raw["tensors"].pop("norm.weight")
        raw["files"]["rest.safetensors"] = path.stat().st_size

    edit(directory, change)


WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "flipped byte": (flip, r"is not what was written, a byte of it has changed; build it again"),
    "no manifest": (lambda d: (d / "manifest.json").unlink(), "has no manifest.json, so it was never finished"),
    "half a manifest": (lambda d: (d / "manifest.json").write_text("{"), r"the manifest of the cache .* can't be read"),
    "a file missing": (lambda d: (d / "rest.safetensors").unlink(), "rest.safetensors of the cache .* is missing"),
    "a short file": (lambda d: (d / "rest.safetensors").write_bytes(b""), "rest.safetensors .* has 0 bytes and should"),
    "other format": (lambda d: edit(d, lambda m: m.update(format=9)), "is of format 9 and this version reads 1"),
    "other model": (lambda d: edit(d, lambda m: m["of"].update(model="x")), "is of model 'x', not 'tiny-kimi'"),
    "other revision": (lambda d: edit(d, lambda m: m["of"].update(revision="abc")), "is of revision 'abc', not None"),
    "changed files": (
        lambda d: edit(d, lambda m: m["of"].update(fingerprint="")),
        "the files of the model have changed",
    ),
    "other dtype": (
        lambda d: edit(d, lambda m: m["of"].update(dtype="float32")),
        "is of dtype 'float32', not 'bfloat16'",
    ),
    "unquantised": (
        lambda d: edit(d, lambda m: m["of"].update(quantization="")),
        "is of quantization '', not 'int4-gro",
    ),
    "fewer layers": (lambda d: edit(d, lambda m: m["of"].update(n_layers=2)), "holds 2 layers and 3 are wanted"),
    "missing key": (lambda d: edit(d, lambda m: m["tensors"].pop("norm.weight")), "misses key norm.weight"),
    "unexpected key": (
        lambda d: edit(d, lambda m: m["tensors"].update(extra=m["tensors"]["norm.weight"])),
        "has an unexpected key extra",
    ),
    "other key": (rename_key, "misses key norm.weight"),
    "other shape": (
        lambda d: edit(d, lambda m: m["tensors"]["norm.weight"].update(shape=[32])),
        "does not hold norm.weight as the manifest says",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named_and_the_normal_way_is_taken(
    case: str, model: Path, copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    break_it, why = WRONG[case]
    break_it(copy)
    info = describe(model)
    loaded = load(info, device="cpu", cache=copy)
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 1
    with pytest.raises(CacheError, match=why):
        raise CacheError(caplog.records[0].getMessage())
    assert same_model(loaded.model, load(info, device="cpu", cache=False).model)


def test_verify_reads_every_tensor(copy: Path) -> None:
    assert cache.verify(copy).of.n_layers == 3
    flip(copy, "rest.safetensors", -1)
    with pytest.raises(CacheError, match=r"in rest.safetensors of the cache .* is not what was written"):
        cache.verify(copy)


def test_a_full_disk_is_said_before_anything_is_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("capture.cache.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10, 0, 10))
    with pytest.raises(CacheError, match=r"bytes and 10 are free at .*, so it would not fit; nothing was written"):
        build(model, tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


def test_files_are_cut_by_layer(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "GROUP_BYTES", 1)
    manifest = build(model, tmp_path / "cache")
    assert sorted(manifest.files) == [*(f"layers-from-00{i}.safetensors" for i in range(3)), "rest.safetensors"]
    assert load(describe(model), device="cpu", cache=tmp_path / "cache").n_layers == 3


# -- the older kind, one file per GPU --------------------------------------------------------------------------------


def save_gpu_cache(model: Path, home: Path, n_gpus: int) -> Path:
    """Written from its description: the whole state of a model with head, layers dealt out over the GPUs."""
    state = load(describe(model), device="cpu", cache=False).model.state_dict()
    directory = home / "fused_cache" / f"{model.name}__{n_gpus}gpu"
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(n_gpus)]
    for name, tensor in state.items():
        layer = cache.layer_of(name, "layers")
        path, _, last = name.rpartition(".")
        name = f"{path.removesuffix('.experts')}._{last}" if path.endswith(".experts") else name
        shards[max(layer, 0) % n_gpus][f"model.{name}"] = tensor
    shards[0]["lm_head.weight"] = torch.zeros(kimi.VOCAB, 64, dtype=torch.bfloat16)
    directory.mkdir(parents=True)
    for gpu, shard in enumerate(shards):
        save_file(shard, directory / f"shard_gpu{gpu}.safetensors")
    (directory / "metadata.json").write_text(json.dumps({"model_name": model.name, "n_gpus": n_gpus, "moe_shapes": {}}))
    return directory


@pytest.mark.parametrize("n_gpus", [1, 3])
def test_the_older_kind_is_read_whatever_number_of_gpus_wrote_it(
    n_gpus: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    save_gpu_cache(model, tmp_path, n_gpus)
    info = describe(model)
    assert same_model(load(info, device="cpu").model, load(info, device="cpu", cache=False).model)
    assert used(caplog)
    assert "records neither revision nor checksums" in caplog.text
    assert load(info, device="cpu", layers=[1]).n_layers == 2
    assert used(caplog)


def drop_key(directory: Path) -> None:
    path = directory / "shard_gpu1.safetensors"
    weights = load_file(path)
    weights.pop("model.layers.1.mlp._up_scale")
    save_file(weights, path)


@pytest.mark.parametrize(
    ("break_it", "why"),
    [
        (lambda d: (d / "shard_gpu1.safetensors").unlink(), "was never finished: shard_gpu1.safetensors is missing"),
        (lambda d: (d / "shard_gpu1.safetensors").write_bytes(b"x"), "is no safetensors file that can be read"),
        (drop_key, "misses key layers.1.mlp.experts.up_scale"),
        (lambda d: (d / "metadata.json").write_text('{"model_name": "other", "n_gpus": 2}'), "is of the model 'other'"),
        (lambda d: (d / "metadata.json").write_text("{"), "the metadata.json of the cache .* can't be read"),
    ],
)
def test_an_older_one_that_is_not_whole_is_named_and_not_used(
    break_it: Callable[[Path], Any],
    why: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    break_it(save_gpu_cache(model, tmp_path, 2))
    assert gpucache.find(model.name) is not None
    info = describe(model)
    assert same_model(load(info, device="cpu").model, load(info, device="cpu", cache=False).model)
    with pytest.raises(CacheError, match=why):
        raise CacheError(caplog.text)
