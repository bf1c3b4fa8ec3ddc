"""The `.pt` form of raw activation files: dictionaries of prompt and response parts, as `torch.save` writes them.

    {"prompt":   {"text", "tokens", "token_ids", "activations": {layer: {component: tensor [Np, H]}}, "attention": {}},
     "response": {the same of the response, where Nr may be 0}}

What a file may name is scanned before anything is unpickled: `weights_only` alone still allocates what it is told to.
"""

import hashlib
import pickletools
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from experiments.errors import ExperimentError
from experiments.jsonfile import MAX_BYTES
from experiments.rawfile import Array, RawFile, Rows, checked, integers

__all__ = ["parts_of", "read", "write"]

PARTS = ("prompt", "response")
_NAMES = frozenset(
    {"torch._utils _rebuild_tensor_v2", "collections OrderedDict"}
    | {f"torch {kind}Storage" for kind in ("BFloat16", "Half", "Float", "Double")}
)
"""All that the pickle of a raw activation file refers to."""
_BITS = {"bfloat16": "uint16"}  # NumPy has no bfloat16 of its own, so torch hands over the bits

Parts = Mapping[str, Mapping[str, Any]]


def read(path: Path) -> RawFile:
    """Describe a `.pt` file; see `read_raw`."""
    fingerprint = _scan(path)
    parts = _load(path)
    ids = [integers(path, _get(path, parts, part, key="token_ids"), f"{part} token ids") for part in PARTS]
    arrays = [_arrays(path, parts, part, n=len(own)) for part, own in zip(PARTS, ids, strict=True)]
    prompt, response = arrays
    one_sided = sorted(prompt.keys() ^ response.keys())
    before = ids[0][:0]
    if len(ids[0]) and response and not prompt:
        before, ids[0] = ids[0], before
    elif len(ids[1]) and len(ids[0]) and one_sided:
        component, layer = one_sided[0]
        have, lack = PARTS if (component, layer) in prompt else PARTS[::-1]
        raise ExperimentError(
            f"{path} has {component} at layer {layer} for the {have} and not for the {lack}; leave it out"
        )
    found = {**prompt, **response}
    if any(prompt.get(cell, array) != array for cell, array in response.items()):
        raise ExperimentError(f"{path} has other widths or dtypes for the prompt than for the response; leave it out")
    token_ids = np.concatenate(ids)
    if not found or not len(token_ids):
        raise ExperimentError(
            f"{path} holds no activations ({len(token_ids)} tokens); capture it again or leave it out"
        )
    return RawFile(
        path=path,
        token_ids=token_ids,
        prompt_end=len(ids[0]),
        before=before,
        before_strings=_strings(parts, [len(before), 0]) or (),
        arrays=found,
        strings=_strings(parts, [len(one) for one in ids]),
        fingerprint=fingerprint,
        size=path.stat().st_size,
        source=partial(_rows, path, len(ids[0])),
    )


def write(path: Path, arrays: Mapping[tuple[str, int], NDArray[Any]], record: Mapping[str, Any]) -> None:
    """Write a `.pt` file in which every tensor owns its own rows and nothing else; see `write_raw`.

    Of the first `left_out` tokens of the record there are no rows: those of the prompt, where only responses were kept.
    """
    import torch  # seconds to load, and only this form needs it

    parts = parts_of(arrays, record, lambda cell, rows: _tensor(arrays[cell][rows]))
    torch.save(parts, path)


def parts_of(
    cells: Iterable[tuple[str, int]], record: Mapping[str, Any], tensor: Callable[[tuple[str, int], slice], Any]
) -> dict[str, dict[str, Any]]:
    """Return the dictionary of a file; `tensor(cell, rows)` gives the tensors, called in the order in which they lie.

    Rows count from the first token that has any.
    """
    cut, n, left_out = record["prompt_end"], len(record["token_ids"]), record.get("left_out", 0)
    parts: dict[str, dict[str, Any]] = {}
    for part, (start, stop) in zip(PARTS, ((0, cut), (cut, n)), strict=True):
        activations: dict[int, dict[str, Any]] = {}
        for component, layer in sorted(cells, key=lambda cell: (cell[1], cell[0])):
            if stop > left_out or not left_out:  # else the part has tokens and no rows
                rows = slice(max(start - left_out, 0), max(stop - left_out, 0))
                activations.setdefault(layer, {})[component] = tensor((component, layer), rows)
        parts[part] = {
            "text": record.get(part) or "",
            "tokens": list(record["tokens"][start:stop]),
            "token_ids": [int(i) for i in record["token_ids"][start:stop]],
            "activations": activations,
            "attention": {} if part == "prompt" else [],
        }
    return parts


def _tensor(values: NDArray[Any]) -> Any:
    """Return rows as a tensor whose storage is these rows: `torch.save` writes all of the storage that a tensor views.

    A storage that torch makes over an array ends with the array, also where that is part of a larger one.
    """
    import torch

    own = np.require(values, requirements=("C", "W"))  # torch warns of memory that it could not write to
    bits = _BITS.get(str(own.dtype))
    return torch.from_numpy(own.view(bits)).view(torch.bfloat16) if bits else torch.from_numpy(own)


def _scan(path: Path) -> str:
    """Refuse a file that is no plain archive of a plain dictionary of tensors; return a hash of its own checksums."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        packed = [one for one in members if one.compress_type != zipfile.ZIP_STORED]
        total, size = sum(one.file_size for one in members), path.stat().st_size
        if packed or total > size:
            raise ExperimentError(
                f"{path} would unpack to {total:,} bytes from {size:,}, and torch.save packs nothing; it is no raw "
                "activation file, leave it out"
            )
        pickles = [one for one in members if one.filename.endswith("/data.pkl")]
        if len(pickles) != 1 or pickles[0].file_size > MAX_BYTES:
            raise ExperimentError(
                f"{path} is no raw activation file: its archive has {len(pickles)} usable dictionaries"
            )
        _refuse_other_names(path, archive.read(pickles[0]))
        return table_hash(archive)


def table_hash(archive: zipfile.ZipFile) -> str:
    """Return the sha256 of what a zip says of its members: names below its top directory, sizes, CRC-32s."""
    table = [(one.filename.partition("/")[2], one.file_size, one.CRC) for one in archive.infolist()]
    return hashlib.sha256(repr(sorted(table)).encode()).hexdigest()


def _refuse_other_names(path: Path, pickle: bytes) -> None:
    for opcode, argument, _ in pickletools.genops(pickle):
        if opcode.name == "GLOBAL" and argument not in _NAMES:
            name = str(argument).replace(" ", ".")
            raise ExperimentError(
                f"{path} refers to {name:.80}, which raw activations never do; it was not opened, leave it out"
            )
        if opcode.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
            raise ExperimentError(
                f"{path} is pickled in a way that torch.save does not use; it was not opened, leave it out"
            )


def _load(path: Path) -> Parts:
    import torch  # seconds to load, and only this form needs it

    loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(loaded, dict) or not all(isinstance(loaded.get(part), dict) for part in PARTS):
        kind = "a dictionary without prompt and response" if isinstance(loaded, dict) else type(loaded).__name__
        raise ExperimentError(
            f"{path} holds {kind}, not the prompt and response parts of raw activations; leave it out"
        )
    return loaded


def _get(path: Path, parts: Parts, part: str, *, key: str) -> Any:
    if key not in parts[part]:
        raise ExperimentError(f"{path} has no {key!r} in its {part} part; it is no raw activation file")
    return parts[part][key]


def _tensors(path: Path, parts: Parts, part: str) -> Iterator[tuple[Any, Any, Any]]:
    by_layer = _get(path, parts, part, key="activations")
    if not isinstance(by_layer, dict) or not all(isinstance(one, dict) for one in by_layer.values()):
        raise ExperimentError(f"{path} has {part} activations that are not layer -> component -> tensor; leave it out")
    for layer, by_component in by_layer.items():
        for component, tensor in by_component.items():
            yield layer, component, tensor


def _arrays(path: Path, parts: Parts, part: str, *, n: int) -> dict[tuple[str, int], Array]:
    import torch

    found = {}
    for layer, component, tensor in _tensors(path, parts, part):
        if type(tensor) is not torch.Tensor or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise ExperimentError(
                f"{path} has no plain tensor as {component!r:.60} at layer {layer!r:.20}; leave it out"
            )
        if tensor.ndim != 2 or tensor.shape[0] != n:
            raise ExperimentError(
                f"{path} has {component!r:.60} at layer {layer!r:.20} of shape {list(tensor.shape)} for the {n} tokens "
                f"of its {part}; the rows can't be told apart, leave it out"
            )
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ExperimentError(
                f"{path} declares {tensor.nbytes:,} bytes for {component!r:.60} at layer {layer!r:.20} and holds "
                f"{tensor.untyped_storage().nbytes():,}; it is damaged, leave it out"
            )
        array = Array(int(tensor.shape[1]), str(tensor.dtype).removeprefix("torch."))
        found[checked(path, array, component=component, layer=layer)] = array
    return found


def _rows(path: Path, prompt_end: int) -> Iterator[Rows]:
    parts = _load(path)
    for part, start in zip(PARTS, (0, prompt_end), strict=True):
        for layer, component, tensor in _tensors(path, parts, part):
            if tensor.shape[0]:
                yield Rows(component, layer, start, _numpy(tensor))


def _numpy(tensor: Any) -> NDArray[Any]:
    import torch

    if tensor.dtype == torch.bfloat16:
        values: NDArray[Any] = tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return values
    plain: NDArray[Any] = tensor.numpy()
    return plain


def _strings(parts: Parts, counts: list[int]) -> tuple[str, ...] | None:
    """The decoded tokens with rows, where the file has one for each."""
    found: list[str] = []
    for part, n in zip(PARTS, counts, strict=True):
        tokens = parts[part].get("tokens")
        if not n:
            continue
        if not isinstance(tokens, list) or len(tokens) != n or not all(isinstance(one, str) for one in tokens):
            return None
        found.extend(tokens)
    return tuple(found)
