"""The Hub without a network: a snapshot is used at its commit; what is missing, and a full disk, are said."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from capture import hub
from capture.errors import ModelError
from tests import kimi
from tests.house import ROOT

COMMIT = "0123456789abcdef0123456789abcdef01234567"

LOAD = """
import json
from capture.loading import describe, load, provenance
info = describe("owner/tiny")
print(json.dumps(provenance(load(info, device="cpu", layers=[0]))))
"""


def offline(home: Path) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    return subprocess.run([sys.executable, "-c", LOAD], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_a_snapshot_is_loaded_at_its_commit_and_a_missing_shard_is_named(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--owner--tiny"
    snapshot = repository / "snapshots" / COMMIT
    shutil.copytree(kimi.save_kimi(tmp_path / "k", shards=3), snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    done = offline(tmp_path)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["model"], said["revision"], said["weights_sha256"]) == ("owner/tiny", COMMIT, None)
    (snapshot / "model-00002-of-00003.safetensors").unlink()
    done = offline(tmp_path)
    assert done.returncode != 0
    assert "lacks 1 of 3 shards, model-00002-of-00003.safetensors the first" in done.stderr


def test_what_does_not_fit_the_disk_is_not_begun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = [
        SimpleNamespace(rfilename="model.safetensors", size=1 << 50),
        SimpleNamespace(rfilename="a.bin", size=1 << 60),
    ]
    asked: list[Any] = []

    class Api:
        def model_info(self, *what: Any, **how: Any) -> Any:
            asked.append((what, how))
            return SimpleNamespace(siblings=files)

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(
        ModelError, match=r"owner/big takes 1,125,899,906,842,624 more bytes and .* nothing was downloaded"
    ):
        hub.snapshot("owner/big", COMMIT)
    assert asked == [(("owner/big",), {"revision": COMMIT, "files_metadata": True})]
    assert not (tmp_path / "hub").exists()
