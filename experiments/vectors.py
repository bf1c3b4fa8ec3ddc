"""Direction files: finding, reading and writing trait directions in every form they are kept in.

Four forms are read: the vector tree of an experiment
(`{category}/{trait}/{variant}/vectors/{position}/{component}/{method}/layerN.pt` with a `metadata.json` beside the
layers), a flat directory with a `manifest.json`, and single `.safetensors` or `.npz` files. Finding opens no vector, so
that a tree of thousands costs one walk; `load_direction` opens the one that was chosen.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from experiments.direction import Direction, DirectionEntry, directory_of_position, position_of_directory
from experiments.errors import ExperimentError
from experiments.jsonfile import load_json
from experiments.transcript import sentence

__all__ = [
    "DirectionIndex",
    "find_directions",
    "load_direction",
    "read_directions",
    "write_directions",
    "write_flat",
]

_LAYER_FILE = re.compile(r"layer(\d+)\.pt")
_FLAT_KEY = re.compile(r"(?P<trait>.+?)[/._:@~-]?(?:layer|L)_?(?P<layer>\d+)")
_FLAT_SUFFIXES = (".npz", ".safetensors")
_TABLE_KEY = "directions"
_SAFE_DTYPES: Mapping[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
}


class _About(BaseModel):
    """What a manifest, a table or a `metadata.json` says of one direction; null is as good as nothing."""

    model_config = ConfigDict(extra="ignore", coerce_numbers_to_str=True)
    trait: str = ""
    layer: int = Field(strict=True, ge=0)
    component: str = "residual"
    method: str = "given"
    position: str = ""
    variant: str | None = None
    baseline: float | None = None
    model: str | None = None
    extraction_model: str | None = None
    application_model: str | None = None
    delta: float | None = None
    coefficient: float | None = None
    facts: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectionIndex:
    """What `find_directions` found: the entries in a fixed order, and what a manifest names that is not there."""

    entries: tuple[DirectionEntry, ...]
    absent: tuple[tuple[str, str], ...] = ()

    @property
    def traits(self) -> tuple[str, ...]:
        """The names of all traits that have a file, sorted."""
        return tuple(sorted({entry.trait for entry in self.entries}))


def find_directions(path: str | Path, *, variant: str | None = None) -> DirectionIndex:
    """List the directions at or below a path without opening a vector.

    Parameters
    ----------
    path : path
        A `.safetensors` or `.npz` file; a directory with `manifest.json` or with such files; or any directory at or
        above a vector tree (an experiment, its `extraction/`, one trait).
    variant : str, optional
        Keep only the tree's files of this model variant.

    Raises
    ------
    ExperimentError
        If there is nothing at the path, or what describes the vectors can't be read.
    """
    root = Path(path).absolute()
    if not root.exists():
        raise ExperimentError(f"{path} does not exist, so no directions can be read from it; check --vectors")
    index = _find(root)
    entries = [e for e in index.entries if variant in (None, e.variant)]
    if not entries and not index.absent:
        kept = f" of variant {variant!r}" if variant else ""
        raise ExperimentError(
            f"{path} holds no directions{kept}; expected .../vectors/<position>/<component>/<method>/layerN.pt, "
            "a manifest.json, .safetensors or .npz"
        )
    return DirectionIndex(entries=tuple(sorted(entries, key=_order)), absent=index.absent)


def load_direction(entry: DirectionEntry) -> Direction:
    """Open the file of an entry; an entry that already has its numbers comes back as it is.

    Raises
    ------
    ExperimentError
        If the file can't be read or does not hold one usable vector; the text names file, trait and layer.
    """
    if isinstance(entry, Direction):
        return entry
    path = Path(entry.file)
    values = _read_array(path, entry.key or "")
    return Direction(**{f.name: getattr(entry, f.name) for f in fields(DirectionEntry)}, values=values)


def read_directions(path: str | Path, *, variant: str | None = None) -> list[Direction]:
    """Find and load every direction at or below a path, in the order of `find_directions`."""
    return [load_direction(entry) for entry in find_directions(path, variant=variant).entries]


def write_directions(root: str | Path, directions: Iterable[Direction], *, variant: str) -> list[Path]:
    """Write directions as a vector tree below `root`; layers already described in a `metadata.json` stay described.

    Each file appears whole by a rename; values are written as the float32 or float64 they are.

    Returns
    -------
    list of Path
        The `.pt` files, in the order of the directions.

    Raises
    ------
    ExperimentError
        If a trait is not `category/name`, or a directory describes vectors of another model.
    """
    written = []
    for direction in directions:
        if len(direction.trait.split("/")) != 2 or ".." in direction.trait:
            raise ExperimentError(f"trait {direction.trait!r} can't be placed in a vector tree; name it category/name")
        place = directory_of_position(direction.position)
        folder = Path(root, direction.trait, variant, "vectors", place, direction.component, direction.method)
        folder.mkdir(parents=True, exist_ok=True)
        metadata = _merged_metadata(folder / "metadata.json", direction)
        file = folder / f"layer{direction.layer}.pt"
        _write_pt(file, direction.values)
        _replace(folder / "metadata.json", json.dumps(metadata, indent=2, allow_nan=False).encode())
        written.append(file)
    return written


def write_flat(path: str | Path, directions: Iterable[Direction]) -> Path:
    """Write directions into one `.npz` or `.safetensors` file that carries its own table of traits and layers.

    Raises
    ------
    ExperimentError
        If the suffix is another one.
    """
    path = Path(path)
    kept = list(directions)
    arrays = {f"{d.trait}/{d.component}/{d.method}/{d.position}/layer{d.layer}": d.values for d in kept}
    if len(arrays) != len(kept):
        raise ExperimentError(f"{path} would hold one direction twice; each trait, layer, component, method once")
    table = json.dumps({key: _description(d) for key, d in zip(arrays, kept, strict=True)}, allow_nan=False)
    staged = path.with_name(f".{path.name}.writing{path.suffix}")
    if path.suffix == ".npz":
        np.savez(staged, allow_pickle=False, **{_TABLE_KEY: np.array(table), **arrays})
    elif path.suffix == ".safetensors":
        from safetensors.numpy import save_file  # an optional dependency

        save_file(arrays, staged, metadata={_TABLE_KEY: table})
    else:
        raise ExperimentError(f"{path} has no known form of directions; name it .npz or .safetensors")
    os.replace(staged, path)
    return path


def _find(root: Path) -> DirectionIndex:
    if root.is_file():
        if root.suffix in _FLAT_SUFFIXES:
            return DirectionIndex(entries=tuple(_flat_entries(root)))
        raise ExperimentError(f"{root} is not a directory, .safetensors or .npz; give the directory above its vectors")
    if (root / "manifest.json").is_file():
        return _manifest_entries(root)
    flat = [file for suffix in _FLAT_SUFFIXES for file in sorted(root.glob(f"*{suffix}"))]
    if flat:
        return DirectionIndex(entries=tuple(entry for file in flat for entry in _flat_entries(file)))
    return DirectionIndex(entries=tuple(_tree_entries(root)))


def _order(entry: DirectionEntry) -> tuple[Any, ...]:
    place = (entry.trait, entry.variant or "", entry.position, entry.component, entry.method)
    return (*place, entry.layer, entry.file, entry.key or "")


def _tree_entries(root: Path) -> Iterator[DirectionEntry]:
    # an experiment also holds raw activations, many files deep: only its extraction is walked
    top = root / "extraction" if (root / "extraction").is_dir() else root
    describe = cache(_read_json)
    for file in top.rglob("layer*.pt"):
        layer = _LAYER_FILE.fullmatch(file.name)
        parts = file.parts
        if layer is None or len(parts) < 8 or parts[-5] != "vectors":
            continue
        described = file.with_name("metadata.json")
        metadata = describe(described)
        layers = _object(metadata.get("layers", {}), f"{described}: `layers`")
        facts = dict(_object(layers.get(layer[1], {}), f"{described}: layer {layer[1]}"))
        known = {"layer": int(layer[1]), "baseline": facts.pop("baseline", None), "model": metadata.get("model")}
        about = _about(known, described)
        facts.pop("norm", None)
        facts.pop("sha256", None)
        named = str(metadata.get("position", ""))
        yield DirectionEntry(
            trait=f"{parts[-8]}/{parts[-7]}",
            variant=parts[-6],
            position=named if directory_of_position(named) == parts[-4] else position_of_directory(parts[-4]),
            component=parts[-3],
            method=parts[-2],
            layer=about.layer,
            file=str(file),
            baseline=about.baseline,
            model=about.model,
            facts=facts,
        )


def _manifest_entries(root: Path) -> DirectionIndex:
    described = root / "manifest.json"
    manifest = _read_json(described)
    entries, absent = [], []
    for trait, listed in _object(manifest.get("traits", {}), f"{described}: `traits`").items():
        for one in listed if isinstance(listed, list) else [listed]:
            about = _object(one, f"{described}: trait {trait!r}")
            entry = _described(trait, {**manifest, **about}, file=root / str(about.get("file")), key=None)
            if os.path.isfile(entry.file):  # False too for a name that is too long for one
                entries.append(entry)
            else:
                absent.append((trait, f"{entry.file:.500}, named in manifest.json, is not there"))
    return DirectionIndex(entries=tuple(entries), absent=tuple(absent))


def _described(trait: str, given: Mapping[str, Any], *, file: Path, key: str | None) -> DirectionEntry:
    if type(given.get("layer")) is not int:
        raise ExperimentError(f"{file} names no integer layer for trait {trait!r}; add `layer` to its description")
    about = _about(given, file)
    return DirectionEntry(
        trait=about.trait or trait,
        layer=about.layer,
        component=about.component,
        method=about.method,
        position=about.position,
        file=str(file),
        key=key,
        variant=about.variant,
        baseline=about.baseline,
        model=about.extraction_model or about.model,
        applied_model=about.application_model,
        delta=about.delta,
        coefficient=about.coefficient,
        facts=about.facts,
    )


def _about(given: Mapping[str, Any], path: Path) -> _About:
    try:
        return _About.model_validate({name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        raise ExperimentError(f"the description of {path} {sentence(error)}; mend it") from None


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ExperimentError(f"{what} is a JSON {type(value).__name__} where an object is expected; mend it")
    return value


def _flat_entries(file: Path) -> Iterator[DirectionEntry]:
    keys, table = _flat_table(file)
    for key in keys:
        about = None if table.get(key) is None else _object(table[key], f"{file}: {key!r} in its table")
        found = _FLAT_KEY.fullmatch(key)
        if about is None and found is None:
            raise ExperimentError(
                f"{file} names an array {key!r} from which no trait and layer follow; call it like 'bs/lying/layer20'"
            )
        if about is None and found is not None:
            about = {"trait": found["trait"], "layer": int(found["layer"])}
        yield _described(key, about or {}, file=file, key=key)


def _flat_table(file: Path) -> tuple[list[str], dict[str, Any]]:
    try:
        if file.suffix == ".npz":
            with file.open("rb") as raw, np.load(raw, allow_pickle=False) as archive:
                keys = [key for key in archive.files if key != _TABLE_KEY]
                text = str(archive[_TABLE_KEY]) if _TABLE_KEY in archive.files else "{}"
        else:
            from safetensors import safe_open  # an optional dependency

            with safe_open(file, framework="numpy") as archive:
                keys, text = sorted(archive.keys()), (archive.metadata() or {}).get(_TABLE_KEY, "{}")
        table = json.loads(text)
    except Exception as error:  # each library raises its own kinds for a damaged file
        raise ExperimentError(_unreadable(file, error)) from error
    return keys, _object(table, f"{file}: its table")


def _read_array(path: Path, key: str) -> NDArray[Any]:
    try:
        if path.suffix == ".npz":
            with path.open("rb") as raw, np.load(raw, allow_pickle=False) as archive:
                return np.asarray(archive[key])
        if path.suffix == ".safetensors":
            return _read_safetensors(path, key)
        return _read_pt(path)
    except ExperimentError:
        raise
    except Exception as error:  # each library raises its own kinds for a damaged file
        raise ExperimentError(_unreadable(path, error)) from error


def _read_pt(path: Path) -> NDArray[Any]:
    import torch  # seconds to load, and only this form needs it

    tensor = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        kind = str(tensor.dtype) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise ExperimentError(f"{path} holds {kind} where a floating-point tensor of shape [hidden] is expected")
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    values: NDArray[Any] = tensor.detach().to(wide).numpy()
    return values


def _read_safetensors(path: Path, key: str) -> NDArray[Any]:
    from safetensors import deserialize  # an optional dependency; its NumPy reader knows no bfloat16

    for name, about in deserialize(path.read_bytes()):  # type: ignore[no-untyped-call]
        if name == key:
            if about["dtype"] not in _SAFE_DTYPES:
                raise ExperimentError(f"{path} holds {about['dtype']} under {key!r}; a direction is floating point")
            return np.frombuffer(about["data"], dtype=_SAFE_DTYPES[about["dtype"]]).reshape(about["shape"])
    raise ExperimentError(f"{path} no longer holds {key!r}; find the directions again")


def _write_pt(path: Path, values: NDArray[Any]) -> None:
    import torch  # seconds to load, and only this form needs it

    staged = path.with_name(f".{path.name}.writing")
    torch.save(torch.from_numpy(values.copy()), staged)
    os.replace(staged, path)


def _merged_metadata(path: Path, direction: Direction) -> dict[str, Any]:
    old = _read_json(path)
    if old.get("model", direction.model) != direction.model:
        raise ExperimentError(
            f"{path} describes vectors of {old['model']}, and {direction.trait} is of {direction.model}; "
            "write it under another variant"
        )
    layer = {"norm": direction.norm, "baseline": direction.baseline, "sha256": direction.sha256, **direction.facts}
    layers = {**old.get("layers", {}), str(direction.layer): {k: v for k, v in layer.items() if v is not None}}
    return {
        **old,
        "model": direction.model,
        "trait": direction.trait,
        "method": direction.method,
        "component": direction.component,
        "position": direction.position,
        "layers": {key: layers[key] for key in sorted(layers, key=int)},
        "timestamp": datetime.now(UTC).isoformat(),
    }


def _description(direction: Direction) -> dict[str, Any]:
    left_out = {"file", "key"}
    known = {f.name: getattr(direction, f.name) for f in fields(DirectionEntry) if f.name not in left_out}
    known["application_model"] = known.pop("applied_model")
    known["facts"] = dict(direction.facts)
    return {name: value for name, value in known.items() if value is not None}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    return _object(load_json(path), str(path))


def _replace(path: Path, data: bytes) -> None:
    staged = path.with_name(f".{path.name}.writing")
    staged.write_bytes(data)
    os.replace(staged, path)


def _unreadable(path: Path, error: Exception) -> str:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
    return f"{path} can't be read ({first}); copy it again or leave it out"
