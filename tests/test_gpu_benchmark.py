"""The GPU benchmark runs small on a CPU, so that it runs where a GPU is: every section, and its checks."""

import json

import pytest

from benchmarks import gpu


def test_every_section_runs_and_says_what_was_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv("BENCH_DIR", str(tmp_path_factory.mktemp("bench")))
    gpu.main(["--tiny", "--json", "--device", "cpu"])
    said, decoder, parts = capsys.readouterr().out, json.JSONDecoder(), []
    while said.strip():
        part, end = decoder.raw_decode(said.lstrip())
        parts.append(part)
        said = said.lstrip()[end:]
    machine, *sections = parts
    assert machine["device"] == "cpu"
    assert [one["title"].partition(" ")[0] for one in sections] == list(gpu.SECTIONS)
    assert "the same bits" in sections[0]["title"]
    rows = [row for one in sections for row in one["rows"]]
    assert {row["rival"] for row in rows} >= {
        "loop over experts",
        "bare forward",
        "the same files read",
        "the normal load",
    }
    assert all(row["value"] > 0 and row["rival_value"] > 0 and row["ratio"] > 0 for row in rows if row["unit"] != "GB")
