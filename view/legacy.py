"""A store as the JSON tree that the older experiment viewer reads: responses, annotations, projections, calibration.

    config.json
    inference/{variant}/responses/{prompt_set}/{id}.json, responses/{prompt_set}_annotations.json
    inference/{variant}/projections/{category}/{trait}/{prompt_set}/{id}.json
    inference/{variant}/massive_activations/{prompt_set}.json, calibration.json
    extraction/{category}/{trait}/{variant}/vectors/{position}/{component}/{method}/metadata.json

That viewer lists an experiment only where something stands below `extraction`, so what is known of the directions does.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from calibrate.export import write_experiment
from datastore.errors import AbsentError, MisuseError
from datastore.query import Store
from experiments.direction import directory_of_position
from experiments.rawfile import whole
from experiments.responsefile import response_record
from experiments.tree import Experiment
from project.export import export_json

__all__ = ["write_tree"]

DEFAULT_VARIANT = "exported"


def write_tree(
    store: Store, root: str | Path, *, rollouts: Sequence[str] | None = None, variant: str | None = None
) -> int:
    """Write the tree of an experiment; return how many files were written.

    Response files and a config.json that are there are kept; everything else is written anew.

    Parameters
    ----------
    store : Store
    root : path
        The experiment's directory.
    rollouts : sequence of str, optional
        Default all that have scores.
    variant : str, optional
        The model variant; default that of the config.json there, or `exported`.

    Raises
    ------
    AbsentError
        The store holds no scores of these rollouts: there is nothing that the viewer could show.
    MisuseError
        A rollout, trait, prompt set or variant would be written outside the tree.
    """
    root = Path(root)
    scores = store.scores(rollouts=rollouts)
    names = list(dict.fromkeys(str(name) for name in scores.rollout.values))
    if variant is None:
        there = (root / "config.json").is_file()
        variant = Experiment(root).variant_name() if there else DEFAULT_VARIANT
    inference = _inside(root, root / "inference" / variant)
    sets = {name: str(store.rollouts.loc[name, "prompt_set"]) or store.path.stem for name in names}
    written = _write_new(root / "config.json", _config(store, variant))
    written += sum(_write_response(store, name, inference=inference, prompt_set=sets[name]) for name in names)
    written += _write_annotations(store, sets, inference=inference)
    written += export_json(store, scores, inference / "projections")
    written += _write_directions(scores, root, variant=variant)
    return written + _write_calibration(store, scores, sets, root=root, variant=variant)


def _inside(root: Path, path: Path) -> Path:
    if not path.resolve().is_relative_to(root.resolve()) or path.resolve() == root.resolve():
        raise MisuseError(f"{path} would be written outside {root}; rename the rollout, prompt set, trait or variant")
    return path


def _write_new(path: Path, value: Mapping[str, Any]) -> int:
    """Write a JSON file unless it is there; return how many were written."""
    return 0 if path.exists() else _write(path, value)


def _write(path: Path, value: Mapping[str, Any]) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path, overwrite=True) as staged:
        staged.write_text(json.dumps(value, ensure_ascii=False, allow_nan=False), encoding="utf-8")
    return 1


def _config(store: Store, variant: str) -> dict[str, Any]:
    model = {"model": str(store.captures["model"].iloc[-1])}
    return {"defaults": {"application": variant, "extraction": variant}, "model_variants": {variant: model}}


# -- responses and their annotations -----------------------------------------------------------------------------------


def _write_response(store: Store, name: str, *, inference: Path, prompt_set: str) -> int:
    path = _inside(inference, inference / "responses" / prompt_set / f"{name}.json")
    if path.exists():
        return 0
    row = store.rollouts.loc[[name]].iloc[0].to_dict()
    capture = store.captures.iloc[-1]
    known = {
        "system_prompt": None,
        "inference_model": str(capture["model"]),
        "prompt_note": None,
        "capture_date": str(capture["created"]),
    }
    record = known | response_record(name, row, store.tokens(name), stem=path.stem)
    turns = [one for one in record.pop("turn_boundaries") if one["role"] != "none"]
    return _write(path, record | ({"turn_boundaries": turns} if turns else {}))


def _write_annotations(store: Store, sets: Mapping[str, str], *, inference: Path) -> int:
    """Write one file for each prompt set that has any: verbatim texts, by which that viewer finds the spans."""
    spans = store.annotations[store.annotations["rollout_id"].isin(list(sets))]
    entries: dict[str, list[dict[str, Any]]] = {}
    for name, mine in spans.groupby("rollout_id", sort=False):
        found = _texts(store, str(name), mine)
        if found:
            entries.setdefault(sets[str(name)], []).append({"id": str(name), "spans": found})
    for prompt_set, listed in entries.items():
        path = inference / "responses" / f"{prompt_set}_annotations.json"
        _write(_inside(inference, path), {"annotations": listed})
    return len(entries)


def _texts(store: Store, name: str, spans: pd.DataFrame) -> list[dict[str, Any]]:
    """Return spans as text; of one that begins in the prompt only what is response, where that viewer looks."""
    texts = [text if isinstance(text, str) else "" for text in store.tokens(name)["text"]]
    cut = int(store.cells.column("prompt_end")[store.cells.index[name]])
    found = []
    columns = (spans[column].tolist() for column in ("token_start", "token_end", "label"))
    for start, stop, label in zip(*columns, strict=True):
        text = "".join(texts[max(start, cut) if stop > cut else start : stop])
        if text:
            places = {"token_start": start, "token_end": stop}
            found.append({"span": text, "category": str(label), **places})
    return found


# -- directions and calibration ----------------------------------------------------------------------------------------


def _write_directions(scores: xr.Dataset, root: Path, *, variant: str) -> int:
    """Write what is known of the directions, a file for each method of a trait; the vectors stay in the store."""
    by_folder: dict[Path, list[int]] = {}
    for j, trait in enumerate(scores.trait.values.tolist()):
        place = directory_of_position(str(scores.vector_position.values[j] or "response[:]"))
        method = Path(place, str(scores.component.values[j]), str(scores.method.values[j]))
        folder = root / "extraction" / trait / variant / "vectors" / method
        by_folder.setdefault(_inside(root, folder), []).append(j)
    written = 0
    for folder, columns in by_folder.items():
        first = columns[0]
        layers = {
            str(int(scores.layer.values[j])): {
                "norm": float(scores.vector_norm.values[j]),
                **({"baseline": float(base)} if np.isfinite(base := scores.baseline.values[j]) else {}),
            }
            for j in columns
        }
        written += _write_new(
            folder / "metadata.json",
            {
                "model": str(scores.model.values[first] or "unknown"),
                "trait": str(scores.trait.values[first]),
                "method": str(scores.method.values[first]),
                "component": str(scores.component.values[first]),
                "position": str(scores.vector_position.values[first] or "response[:]"),
                "layers": layers,
            },
        )
    return written


def _write_calibration(store: Store, scores: xr.Dataset, sets: Mapping[str, str], *, root: Path, variant: str) -> int:
    """Write the newest calibration of the component that was scored; one of several prompt sets is named for none."""
    try:
        found = store.calibration(str(scores.component.values[0]))
    except AbsentError:
        return 0
    names = sorted(set(sets.values()))
    prompt_set = names[0] if len(names) == 1 else "calibration"
    return len(write_experiment(found, root, variant=variant, prompt_set=prompt_set))
