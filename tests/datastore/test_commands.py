"""The store's command line on a small store. Oracles: the rows that were put, the tables of the store, exit codes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datastore import console, storage
from datastore.commands import app
from tests.datastore import making

ASKED = making.rollouts(5, 17, 3)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "run.zarr"
    making.capture(path, ASKED)
    return path


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        console.run(app, [str(word) for word in words])
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def output(capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    assert run(*words, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_info_adds_up(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    making.capture(store, ASKED[:1], layers=(7,), components=[making.RESIDUAL])
    found = output(capsys, "info", store)
    assert (found["rollouts"], found["tokens"], found["layers"]) == (3, 25, [1, 5, 7])
    assert found["raw_bytes"] == 25 * 2 * (32 + 24) + 5 * 32
    files = [f for name in ("residual", "k_proj") for f in store.glob(f"captures/*/{name}/c/**/*") if f.is_file()]
    assert found["stored_bytes"] == sum(f.stat().st_size for f in files)
    present = {one["name"]: one["present"] for one in found["components"]}
    assert present == {"residual": pytest.approx(7 / 9), "k_proj": pytest.approx(6 / 9)}
    assert [one["n_tokens"] for one in found["captures"]] == [25, 5]
    assert found["models"][0]["name"] == "toy"
    assert found["labels"] == ["length", "name"]
    assert run("info", store) == 0
    assert "3 rollouts, 25 tokens" in capsys.readouterr().out


def test_ls_chooses_by_label_and_id(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = output(capsys, "ls", store, "--where", "length > 4")
    assert {(r["rollout_id"], r["n_tokens"], r["length"]) for r in rows} == {("0", 5, 5), ("1", 17, 17)}
    assert len(output(capsys, "ls", store, "--limit", "2")) == 2
    assert [r["rollout_id"] for r in output(capsys, "ls", store, "--ids", "2")] == ["2"]
    assert run("ls", store) == 0
    assert "prompt_end" in capsys.readouterr().out


def test_head_shows_text_and_norms(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = output(capsys, "head", store, "1", "-n", "4")
    assert [r["token_id"] for r in rows] == ASKED[1].token_ids[:4].tolist()
    assert [r["text"] for r in rows] == [chr(65 + i % 26) for i in ASKED[1].token_ids[:4]]
    for i, row in enumerate(rows):
        for layer in (1, 5):
            exact = np.linalg.norm(making.values(making.RESIDUAL, layer, ASKED[1])[i].astype(np.float64))
            assert row["norm"][str(layer)] == pytest.approx(exact, rel=1e-6)
    assert run("head", store, "1") == 0
    assert "|residual| 5" in capsys.readouterr().out


def test_verify_passes_fails_and_repairs(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", store) == 0
    assert "all is well" in capsys.readouterr().out
    storage.chunk_file(store / "captures" / "0001" / "residual", (1, 0, 0)).unlink()
    assert run("verify", store, "--full") == 1
    shown = capsys.readouterr().out
    assert "residual at layer 1, tokens 16-25" in shown
    assert "mended by verify --repair" in shown
    assert run("verify", store, "--repair", "--json") == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["ok"], report["dropped"], len(report["problems"])) == (False, 1, 1)
    assert run("verify", store) == 0


def test_drop_asks_first(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert output(capsys, "drop", store, "--ids", "1", "--layers", "5", "--dry-run")["cells"] == 2
    assert run("drop", store, "--ids", "1") == 2
    assert "give --yes to go on" in capsys.readouterr().err
    assert output(capsys, "drop", store, "--ids", "1", "--yes")["number"] == 1
    assert [r["rollout_id"] for r in output(capsys, "ls", store)] == ["2", "0"]


def test_compact_gc_and_merge(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    making.capture(store, [making.rollout("more", 7)])
    assert output(capsys, "compact", store, "--dry-run") | {"raw_bytes": 0} == {
        "captures": [1, 2],
        "becomes": 1,
        "raw_bytes": 0,
        "numbers": [],
    }
    assert output(capsys, "compact", store, "--smaller-than", "1")["captures"] == []
    assert output(capsys, "compact", store, "--yes")["numbers"] == [3]
    assert storage.numbered(store / "captures") == [3]
    assert run("compact", store) == 0
    assert capsys.readouterr().out == f"nothing of {store} is to be compacted; gc frees what no longer counts\n"
    other = tmp_path / "other.zarr"
    making.capture(other, [making.rollout("other", 4)])
    found = output(capsys, "merge", store, other, tmp_path / "both.zarr")
    assert (found["captures"], found["rollouts"], found["shared"]) == (2, 5, [])
    assert output(capsys, "verify", tmp_path / "both.zarr", "--full")["captures"] == 2
    assert run("merge", store, other, tmp_path / "both.zarr") == 2
    assert "is there already, and a merge makes a new store" in capsys.readouterr().err
    making.capture(other, [making.rollout("other", 4)], replace=True)
    assert run("gc", other, "--dry-run") == 0
    assert "captures/0001: nothing of it counts any more" in capsys.readouterr().out
    assert run("gc", other) == 2  # no terminal to ask on
    capsys.readouterr()
    assert output(capsys, "gc", other, "--yes")["done"]
    assert storage.numbered(other / "captures") == [2]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("info", "{tmp}/none.zarr"), 2, "does not exist, so there is no store to read"),
        (("info", "{tmp}"), 2, "is not an activation store"),
        (("ls", "{store}", "--where", "honesty > 1"), 2, "names a column that is not there"),
        (("ls", "{store}", "--where", "length >"), 2, "is not a query"),
        (("ls", "{store}", "--where", "length + 1"), 2, "is not a condition"),
        (("ls", "{store}", "--where", "length > 99"), 2, "nothing is selected"),
        (("ls", "{store}", "--ids", "7,0"), 2, "1 of the ids asked for are not there: 7"),
        (("head", "{store}", "9"), 2, "'9'"),
        (("head", "{store}", "1", "--components", "mlp_out"), 2, "'mlp_out' is not captured"),
        (("drop", "{store}", "--layers", "a-b", "--yes"), 2, "not a list of layer numbers"),
        (("drop", "{store}", "--yes"), 2, "nothing is named to drop"),
    ],
)
def test_a_mistake_is_one_sentence(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], code: int, said: str
) -> None:
    (tmp_path / "file").touch()
    assert run(*(word.format(tmp=tmp_path, store=store) for word in words)) == code
    shown = capsys.readouterr().err
    assert said in shown
    assert "Traceback" not in shown


def test_a_newer_store_is_refused(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = store / "zarr.json"
    meta = json.loads(file.read_text())
    meta["attributes"]["version"] = 99
    file.write_text(json.dumps(meta))
    assert run("info", store) == 2
    assert "format version 99, and this release reads up to 1" in capsys.readouterr().err


def test_the_module_runs(store: Path) -> None:
    command = [sys.executable, "-m", "datastore", "verify", str(store), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["ok"] is True
