"""Foreign files of every known form with values changed or removed: they read, or are refused in one sentence.

Random JSON seldom gets past the first check of a reader; a file that is right but for a value or two gets far in.
"""

import errno
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import experiments
from experiments.annotations import read_annotations
from experiments.errors import ExperimentError
from experiments.labelfile import read_labels
from experiments.rawfile import named
from experiments.reading import read_tags
from experiments.steering import find_steering, read_naturalness, read_steering
from experiments.tree import Experiment, read_classifications

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "toy_experiment"
ARRAYS = {"bs/lying/layer3": np.ones(4, np.float32), "bs/lying/layer5": np.ones(4, np.float32)}
LEAF = Path("a/b/base/vectors/response__5/residual/probe")
MANIFEST = {
    "extraction_model": "toy/base",
    "application_model": "toy/it",
    "position": "response[:5]",
    "traits": {
        "bs/lying": {"layer": 3, "method": "probe", "file": "bs.pt", "delta": 1.5, "coefficient": 2.0, "facts": {}},
        "bs/vanity": [{"layer": 3, "file": "missing.pt", "baseline": 0.5}],
    },
}
TABLE = {
    key: {"trait": "bs/lying", "layer": 3, "component": "residual", "position": "x", "facts": {"bias": 1}}
    for key in ARRAYS
}
NATURALNESS = {"scores": {"a": {"layer": 3, "method": "probe", "component": "residual", "mean": 71.5}}}
TEXT_SPANS = {"annotations": [{"idx": 3, "spans": [{"span": "words", "category": "lie", "borderline": False}]}]}
TOKEN_SPANS = {"7": {"annotations": [{"token_start": 1, "token_end": 4, "label": "lie"}]}}
CLASSIFIED = {"classifications": [{"run": "a", "sample": 1, "label": "lie", "justification": "so"}]}
LABELLED = [{"rollout_id": "1", "score": 3, "lying": True}, {"rollout_id": "2", "score": 2.5, "note": "x"}]


def written(path: Path, document: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def from_manifest(folder: Path, document: Any) -> None:
    (folder / "bs.pt").write_bytes(b"")
    written(folder / "manifest.json", document)
    experiments.find_directions(folder)


def from_metadata(folder: Path, document: Any) -> None:
    """The tree's own file of what is known of its layers."""
    written(folder / LEAF / "metadata.json", document)
    (folder / LEAF / "layer0.pt").write_bytes(b"")
    for entry in experiments.find_directions(folder).entries:
        assert (entry.trait, entry.layer) == ("a/b", 0)


def from_npz(folder: Path, document: Any) -> None:
    np.savez(folder / "v.npz", allow_pickle=False, directions=np.array(json.dumps(document)), **ARRAYS)
    experiments.read_directions(folder)


def from_safetensors(folder: Path, document: Any) -> None:
    save_file(ARRAYS, folder / "v.safetensors", metadata={"directions": json.dumps(document)})
    experiments.read_directions(folder / "v.safetensors")


def from_config(folder: Path, document: Any) -> None:
    written(folder / "config.json", document)
    experiment = Experiment(folder)
    for name in experiment.variants:
        assert experiment.variant_name(name) == name
        experiment.model(name)
    experiment.variant_name(mode="extraction")


def from_steering(folder: Path, document: Any) -> None:
    """Lines: what can't be used is a problem of its line, and the others still count."""
    path = folder / "steering/a/b/it/response__5/steering/results.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = document if isinstance(document, list) else [document]
    path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    for one in find_steering(folder):
        found = read_steering(one.file)
        assert all("\n" not in str(problem) for problem in found.problems)
        assert len(found.runs) + len(found.problems) <= len(lines)
        for run in found.runs:
            found.delta(run)


def plain(reader: Callable[[Path], Any]) -> Callable[[Path, Any], None]:
    def read(folder: Path, document: Any) -> None:
        reader(written(folder / "x.json", document))

    return read


def golden(name: str | Path) -> Any:
    return json.loads((GOLDEN / name).read_text())


def lines_of(name: str) -> list[Any]:
    return [json.loads(line) for line in (GOLDEN / name).read_text().splitlines()]


KNOWN: dict[str, tuple[Callable[[Path, Any], None], Any]] = {
    "manifest": (from_manifest, MANIFEST),
    "metadata": (from_metadata, golden("extraction/alignment/deception" / LEAF.relative_to("a/b") / "metadata.json")),
    "npz": (from_npz, TABLE),
    "safetensors": (from_safetensors, TABLE),
    "config": (from_config, golden("config.json")),
    "steering": (from_steering, lines_of("steering/alignment/deception/instruct/response__5/steering/results.jsonl")),
    "naturalness": (plain(read_naturalness), NATURALNESS),
    "projection": (
        plain(experiments.read_projection),
        golden("inference/instruct/projections/alignment/deception/set1/1.json"),
    ),
    "massive": (plain(experiments.read_massive), golden("inference/instruct/massive_activations/calibration.json")),
    "response": (plain(experiments.read), golden("inference/instruct/responses/set1/1.json")),
    "text spans": (plain(read_annotations), TEXT_SPANS),
    "token spans": (plain(read_annotations), TOKEN_SPANS),
    "classifications": (plain(read_classifications), CLASSIFIED),
    "tags": (plain(read_tags), {"1": ["a", "b"], "2": []}),
    "labels": (plain(read_labels), LABELLED),
    "labels by id": (plain(read_labels), {"1": {"score": 3}, "2": {"score": 4}}),
    "labels of spans": (plain(read_labels), TOKEN_SPANS),
    "labels of samples": (plain(read_labels), CLASSIFIED),
}  # fmt: skip

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.just(10**400) | st.just("../x"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
edits = st.lists(st.tuples(st.floats(0, 1), values, st.booleans()), min_size=1, max_size=3)
BOUNDED = settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every value of a JSON document."""
    yield path
    for key, one in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(one, (*path, key))


def edited(document: Any, place: float, value: Any, *, remove: bool) -> Any:
    """Return a document with the value at a place changed or left out."""
    ways = list(places(document))
    way = ways[int(place * (len(ways) - 1))]
    if not way:
        return value
    inner = document
    for key in way[:-1]:
        inner = inner[key]
    if remove:
        del inner[way[-1]]
    else:
        inner[way[-1]] = value
    return document


def refused(read: Callable[[Path, Any], None], folder: Path, document: Any) -> None:
    try:
        read(folder, document)
    except ExperimentError as error:
        text = str(error)
        assert "\n" not in text.strip(), text
        assert 0 < len(text) < 2000


@pytest.mark.parametrize("name", KNOWN)
def test_it_reads_unchanged(name: str, tmp_path: Path) -> None:
    """Else the edits below would test nothing but the first check."""
    read, document = KNOWN[name]
    read(tmp_path, document)


@pytest.mark.parametrize("name", KNOWN)
@BOUNDED
@given(changes=edits)
def test_values_changed_or_removed(name: str, changes: list[tuple[float, Any, bool]], tmp_path: Path) -> None:
    read, original = KNOWN[name]
    document = json.loads(json.dumps(original))
    for place, value, remove in changes:
        document = edited(document, place, value, remove=remove)
    refused(read, tmp_path, document)


BYTES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "manifest": ("manifest.json", experiments.read_directions),
    "metadata": (str(LEAF / "metadata.json"), experiments.read_directions),
    "npz": ("v.npz", experiments.read_directions),
    "safetensors": ("v.safetensors", experiments.read_directions),
    "config": ("config.json", Experiment),
    "naturalness": ("x.json", lambda folder: read_naturalness(folder / "x.json")),
}


@pytest.mark.parametrize("name", BYTES)
@BOUNDED
@given(data=st.binary(max_size=200), edit=st.tuples(st.floats(0, 1), st.integers(0, 255)), fresh=st.booleans())
def test_any_bytes(name: str, data: bytes, edit: tuple[float, int], fresh: bool, tmp_path: Path) -> None:
    """Any bytes at all, or those of a good file with one changed."""
    where, reader = BYTES[name]
    path = tmp_path / where
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / "layer0.pt").write_bytes(b"")
    if not fresh and name in KNOWN:
        KNOWN[name][0](tmp_path, KNOWN[name][1])
        good = bytearray(path.read_bytes())
        good[int(edit[0] * (len(good) - 1))] = edit[1]
        data = bytes(good)
    path.write_bytes(data)
    refused(lambda folder, _: reader(folder), tmp_path, None)


def test_a_disk_that_can_not_read_a_file_is_no_misuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    path = written(tmp_path / "x.json", {})
    monkeypatch.setattr(Path, "open", broken)
    with pytest.raises(ExperimentError, match=r"x\.json can't be read \(Input/output error\); copy it") as refused:
        read_labels(path)
    assert (refused.value.exit_code, ExperimentError("x").exit_code) == (1, 2)


def test_so_it_is_however_deep_below_and_whatever_is_left_of_it() -> None:
    """An importer wraps what a reader wrapped; torch says it in words only."""
    for cause in (OSError(errno.EIO, "x"), RuntimeError(f"unable to open: {os.strerror(errno.EIO)} (5)")):
        middle, outer = ValueError("x can't be read"), ExperimentError("x can't be read")
        middle.__cause__, outer.__cause__ = cause, middle
        assert outer.exit_code == 1
    outer.__cause__ = OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    assert outer.exit_code == 2


def test_a_library_that_takes_it_for_damage_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    path = written(tmp_path / "x.pt", {})
    for patched, said, code in ((False, "File is not a zip file", 2), (True, "Input/output error", 1)):
        if patched:
            monkeypatch.setattr(Path, "open", broken)
        with pytest.raises(ExperimentError, match=said) as refused, named(path):
            raise zipfile.BadZipFile("File is not a zip file")
        assert refused.value.exit_code == code
