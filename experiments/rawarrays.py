"""The array forms of raw activation files: `token_ids` [T] with `hidden_states` [T, L, H], as safetensors or npz.

Files written here hold one array for each component under its own name, the layer numbers, and the rollout's record as
JSON. NumPy's format knows no bfloat16: an npz holds it widened to float32, exactly, and says so, so that it comes back.
"""

import json
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from experiments.errors import ExperimentError
from experiments.jsonfile import parse
from experiments.rawfile import DTYPES, Array, RawFile, Rows, checked, integers

__all__ = ["read_npz", "read_safetensors", "write_npz", "write_safetensors"]

MOST_HEADER = 64 << 20
MOST_UNPACKING = 20
"""Activations shrink to half, token ids to a few percent; more than this is a decompression bomb."""
_PLAIN = ("token_ids", "layers", "about")
_SAFE = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
_ALIAS = {"hidden_states": "residual"}


def read_safetensors(path: Path, layers: Sequence[int] | None) -> RawFile:
    """Describe a safetensors file; see `read_raw`."""
    from safetensors import safe_open  # an optional dependency

    with path.open("rb") as file:
        head = file.read(8)
    if len(head) < 8 or struct.unpack("<Q", head)[0] > min(MOST_HEADER, path.stat().st_size):
        raise ExperimentError(f"{path} is truncated or no safetensors file; copy it again or leave it out")
    with safe_open(path, framework="pt") as archive:
        about = _about(path, (archive.metadata() or {}).get("about"))
        names = list(archive.keys())
        _require(path, names)
        if str(archive.get_slice("token_ids").get_dtype()) not in ("I64", "I32", "U32", "U16", "I16"):
            raise ExperimentError(f"{path} has token_ids that are not whole numbers; leave it out")
        ids = archive.get_tensor("token_ids").numpy()
        shapes = {
            name: (tuple(archive.get_slice(name).get_shape()), _SAFE.get(str(archive.get_slice(name).get_dtype()), "?"))
            for name in names
            if name not in _PLAIN
        }
    stat = path.stat()
    return _described(path, ids, shapes, about=about, layers=layers, fingerprint=f"{stat.st_size}-{stat.st_mtime_ns}")


def read_npz(path: Path, layers: Sequence[int] | None) -> RawFile:
    """Describe an npz file; see `read_raw`."""
    shapes: dict[str, tuple[tuple[int, ...], str]] = {}
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        total, size = sum(one.file_size for one in members), path.stat().st_size
        if total > MOST_UNPACKING * size:
            raise ExperimentError(
                f"{path} would unpack to {total:,} bytes from {size:,}; it was not opened, leave it out"
            )
        for one in members:
            shapes[one.filename.removesuffix(".npy")] = _npy_header(path, archive, one)
    _require(path, shapes)
    fingerprint = repr(sorted((one.filename, one.file_size, one.CRC) for one in members))
    with np.load(path, allow_pickle=False) as loaded:
        ids = np.asarray(loaded["token_ids"])
        about = _about(path, str(loaded["about"]) if "about" in shapes else None)
        if "layers" in shapes:
            about = {"layers": [int(n) for n in integers(path, np.atleast_1d(loaded["layers"]), "layers")], **about}
    widened = about.get("dtypes")
    stored: Mapping[str, Any] = widened if isinstance(widened, dict) else {}
    arrays = {name: found for name, found in shapes.items() if name not in _PLAIN}
    shapes = {name: (shape, str(stored.get(name, dtype))) for name, (shape, dtype) in arrays.items()}
    return _described(path, ids, shapes, about=about, layers=layers, fingerprint=fingerprint)


def write_safetensors(path: Path, arrays: Mapping[tuple[str, int], NDArray[Any]], record: Mapping[str, Any]) -> None:
    """Write a safetensors file; see `write_raw`. A lone residual is called `hidden_states`, as others call it."""
    import torch
    from safetensors.torch import save_file

    stacks, layers = _stacked(path, arrays)
    tensors = {name: _as_torch(torch, values) for name, values in stacks.items()}
    if list(tensors) == ["residual"]:
        tensors = {"hidden_states": tensors["residual"]}
    tensors["token_ids"] = torch.tensor([int(i) for i in record["token_ids"]], dtype=torch.int64)
    save_file(tensors, path, metadata={"about": json.dumps({"layers": layers, "record": dict(record)})})


def write_npz(path: Path, arrays: Mapping[tuple[str, int], NDArray[Any]], record: Mapping[str, Any]) -> None:
    """Write an npz file; see `write_raw`."""
    stacks, layers = _stacked(path, arrays)
    dtypes = {name: str(values.dtype) for name, values in stacks.items()}
    plain = {n: _widened(v) if v.dtype == ml_dtypes.bfloat16 else v for n, v in stacks.items()}
    about = json.dumps({"dtypes": dtypes, "record": dict(record)})
    ids = np.asarray(record["token_ids"], dtype=np.int64)
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, token_ids=ids, layers=np.asarray(layers), about=np.array(about), **plain)


def _as_torch(torch: Any, values: NDArray[Any]) -> Any:
    if values.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(values.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def _stacked(path: Path, arrays: Mapping[tuple[str, int], NDArray[Any]]) -> tuple[dict[str, NDArray[Any]], list[int]]:
    """Return (T, L, H) for each component; these formats have one list of layers for all."""
    by_component: dict[str, list[int]] = {}
    for component, layer in sorted(arrays):
        by_component.setdefault(component, []).append(layer)
    layers = next(iter(by_component.values()))
    for component, own in by_component.items():
        if own != layers:
            raise ExperimentError(
                f"{path} would hold {component} at layers {own} and others at {layers}, and this format has one list "
                "of layers; choose with --layers and --components, or use pt"
            )
    return {name: np.stack([arrays[name, n] for n in layers], axis=1) for name in by_component}, layers


def _about(path: Path, text: str | None) -> dict[str, Any]:
    about = parse(text, path) if text else {}
    return about if isinstance(about, dict) else {}


def _require(path: Path, names: Any) -> None:
    if "token_ids" not in names or not set(names) - set(_PLAIN):
        listed = ", ".join(sorted(map(str, names))[:6]) or "nothing"
        raise ExperimentError(f"{path} holds {listed:.200}; a raw activation file has token_ids and hidden_states")


def _npy_header(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> tuple[tuple[int, ...], str]:
    """Return shape and dtype of a member if they are those of its bytes; NumPy allocates what a header declares."""
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = reader(file)
        held = member.file_size - file.tell()
    declared = int(np.prod([int(n) for n in shape], dtype=object)) * dtype.itemsize
    if declared != held or dtype.hasobject:
        raise ExperimentError(
            f"{path} declares {declared:,} bytes for {member.filename:.60} and holds {held:,}; leave it out"
        )
    return shape, str(dtype)


def _described(
    path: Path,
    ids: NDArray[Any],
    shapes: Mapping[str, tuple[tuple[int, ...], str]],
    *,
    about: Mapping[str, Any],
    layers: Sequence[int] | None,
    fingerprint: str,
) -> RawFile:
    token_ids = integers(path, ids, "token_ids")
    numbers = about.get("layers") if layers is None else list(layers)
    if not isinstance(numbers, list) or not all(type(n) is int for n in numbers) or len(set(numbers)) < len(numbers):
        raise ExperimentError(f"{path} does not say which layers it holds; name them in order with --layers")
    arrays = {}
    for name, (shape, dtype) in shapes.items():
        if len(shape) != 3 or shape[:2] != (len(token_ids), len(numbers)):
            raise ExperimentError(
                f"{path} has {name:.60} of shape {list(shape)} for {len(token_ids)} tokens and {len(numbers)} layers "
                f"({numbers[:8]}); it must be [tokens, layers, width], name its layers with --layers"
            )
        for layer in numbers:
            array = Array(int(shape[2]), dtype)
            arrays[checked(path, array, component=_ALIAS.get(name, name), layer=layer)] = array
    if not len(token_ids):
        raise ExperimentError(f"{path} holds no activations (0 tokens); capture it again or leave it out")
    record = about.get("record") if isinstance(about.get("record"), dict) else None
    cut = (record or {}).get("prompt_end", len(token_ids))
    prompt_end = cut if type(cut) is int and 0 <= cut <= len(token_ids) else len(token_ids)
    names = {name: (_ALIAS.get(name, name), dtype) for name, (_, dtype) in shapes.items()}
    rows = _safetensors_rows if path.suffix == ".safetensors" else _npz_rows
    return RawFile(
        path=path,
        token_ids=token_ids,
        prompt_end=prompt_end,
        arrays=arrays,
        strings=_strings(record, len(token_ids)),
        record=record,
        fingerprint=fingerprint,
        size=path.stat().st_size,
        source=partial(rows, path, names, tuple(numbers)),
    )


def _strings(record: Mapping[str, Any] | None, n: int) -> tuple[str, ...] | None:
    tokens = (record or {}).get("tokens")
    good = isinstance(tokens, list) and len(tokens) == n and all(isinstance(one, str) for one in tokens)
    return tuple(tokens) if good and tokens else None


def _safetensors_rows(path: Path, names: Mapping[str, tuple[str, str]], layers: tuple[int, ...]) -> Iterator[Rows]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as archive:
        for name, (component, dtype) in names.items():
            cut = archive.get_slice(name)
            for index, layer in enumerate(layers):
                tensor = cut[:, index, :].contiguous()
                bits = tensor.view(_uint16()) if dtype == "bfloat16" else tensor
                yield Rows(component, layer, 0, bits.numpy().view(_dtype(dtype)))


def _npz_rows(path: Path, names: Mapping[str, tuple[str, str]], layers: tuple[int, ...]) -> Iterator[Rows]:
    with np.load(path, allow_pickle=False) as archive:
        for name, (component, dtype) in names.items():
            values = archive[name]
            for index, layer in enumerate(layers):
                rows = np.ascontiguousarray(values[:, index])
                yield Rows(component, layer, 0, _narrowed(path, rows, dtype))


def _widened(values: NDArray[Any]) -> NDArray[Any]:
    """bfloat16 as float32, bit for bit: it is the upper half."""
    return (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _narrowed(path: Path, rows: NDArray[Any], dtype: str) -> NDArray[Any]:
    if str(rows.dtype) == dtype:
        return rows
    bits = rows.view(np.uint32) if rows.dtype == np.float32 and dtype == "bfloat16" else None
    if bits is None or (bits & 0xFFFF).any():
        raise ExperimentError(f"{path} says that it was {dtype} and holds {rows.dtype} that is not; leave it out")
    return (bits >> 16).astype(np.uint16).view(ml_dtypes.bfloat16)


def _dtype(name: str) -> np.dtype[Any]:
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name if name in DTYPES else "float32")


def _uint16() -> Any:
    import torch

    return torch.uint16
