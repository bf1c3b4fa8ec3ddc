"""`python -m capture cache`: built, shown, verified, removed; used by itself; the Hub said to be out of reach."""

from pathlib import Path

import pytest

from tests import kimi
from tests.capture.cli import Command, command

__all__ = ["command"]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    return kimi.save_kimi(tmp_path / "tiny-kimi")


def test_a_cache_is_built_shown_verified_used_and_removed(model: Path, tmp_path: Path, command: Command) -> None:
    built = command("cache", "build", model, "--json")
    assert built.code == 0, built.err
    place = Path(built.json["directory"])
    assert place.is_relative_to(tmp_path / "home")
    assert (built.json["layers"], built.json["quantization"]) == (3, "int4-group32")
    assert command("cache", "info", model, "--json").json == built.json
    assert command("cache", "verify", model, "--json").json == built.json | {"verified": True}
    conversation = tmp_path / "rollouts.json"
    conversation.write_text('[{"id": "a", "text": "w5 w6 w7 w8"}]')
    words = ("--model", model, "--input", conversation, "--device", "cpu", "--layers", "0,2")
    for store in ("with", "without"):
        told = command("--store", tmp_path / f"{store}.zarr", *words)
        assert told.code == 0, told.err
        if store == "with":
            assert command("cache", "rm", model, "--yes").code == 0
            assert not place.exists()
    assert command("cache", "info", model).code == 1


def test_what_is_not_a_cache_is_never_removed(model: Path, tmp_path: Path, command: Command) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("mine")
    told = command("cache", "rm", model, "--dir", precious, "--yes")
    assert told.code == 1
    assert "has no manifest.json, so it was never finished" in told.err
    told = command("cache", "build", model, "--dir", precious)
    assert (told.code, "holds thesis.txt, so it is no cache and is not replaced" in told.err) == (1, True)
    assert (precious / "thesis.txt").read_text() == "mine"
    assert "there is no cache at" in command("cache", "verify", model, "--dir", tmp_path / "none").err


def test_a_flipped_byte_is_found(model: Path, tmp_path: Path, command: Command) -> None:
    assert command("cache", "build", model, "--dir", tmp_path / "c").code == 0
    file = tmp_path / "c" / "rest.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 4
    file.write_bytes(data)
    told = command("cache", "verify", model, "--dir", tmp_path / "c")
    assert told.code == 1
    assert "a byte of it has changed; build it again" in told.err


def test_the_hub_out_of_reach_is_said(
    model: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    told = command("cache", "build", model, "--dir", tmp_path / "c", "--from-hub", "no-such/cache")
    assert told.code == 1
    assert "no-such/cache can't be had from the Hub (offline mode is on)" in told.err
    assert not (tmp_path / "c").exists()
    told = command("cache", "build", model, "--dir", tmp_path / "c", "--to-hub", "no-such/cache")
    assert told.code == 2
    assert "its cache would fit no other machine's; give the model's name on the Hub" in told.err
    assert not (tmp_path / "c").exists()
    assert "belong to build, not to rm" in command("cache", "rm", model, "--from-hub", "a/b").err
