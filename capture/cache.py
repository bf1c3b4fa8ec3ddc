"""The fast-load cache of a model: its tensors as they stand in memory, in files by layer, with a manifest written last.

What is wrong with a cache is said in one sentence and the cache is not used; a cache never makes up a weight.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from torch import Tensor, nn

from capture.errors import CacheError
from capture.skeleton import tensors_of
from capture.tensorfiles import Stored, checksum, fill, header, write

__all__ = [
    "FORMAT",
    "Entry",
    "Manifest",
    "Wanted",
    "build",
    "check",
    "default_directory",
    "fingerprint",
    "link",
    "read",
    "sources",
    "verify",
    "verify_tensors",
]

FORMAT = 1
"""Goes up when a tensor comes to mean something else, such as another order of packed experts."""
MANIFEST = "manifest.json"
GROUP_BYTES = 4 << 30
_REST = "rest"

Tick = Callable[[int, int], object]


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a cache: its file, and what `capture.tensorfiles.checksum` says of it."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    checksum: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The model that a cache must be of.

    Attributes
    ----------
    model, revision : str
        Name, and commit on the Hub where it came from there.
    fingerprint : str
        Of a directory's files; see `fingerprint`. Empty where there is a revision.
    dtype : str
    quantization : str
        Empty where there is none.
    n_layers : int
        Layers that are wanted; a cache may hold more.
    """

    model: str
    revision: str | None
    fingerprint: str
    dtype: str
    quantization: str
    n_layers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a cache holds and of which model; the last file that is written."""

    format: int
    of: Wanted
    blocks: str
    versions: Mapping[str, str]
    files: Mapping[str, int]
    tensors: Mapping[str, Entry]

    @property
    def n_bytes(self) -> int:
        """Bytes of the files."""
        return sum(self.files.values())


def fingerprint(directory: Path) -> str:
    """Hash the names, sizes and times of change of a model's weight files, and its config: no weights are read."""
    parts = [f"{p.name} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in sorted(directory.glob("*.safetensors"))]
    return hashlib.sha256("\n".join([*parts, (directory / "config.json").read_text()]).encode()).hexdigest()


def default_directory(wanted: Wanted) -> Path:
    """Return where the cache of a model is looked for: below HF_HOME, by name, revision or fingerprint, and dtype."""
    mark = (wanted.revision or wanted.fingerprint)[:12]
    name = "--".join(filter(None, (wanted.model.replace("/", "--"), mark, wanted.dtype, wanted.quantization)))
    return Path(constants.HF_HOME) / "activation_cache" / name


def build(
    tensors: Mapping[str, Tensor],
    directory: Path,
    *,
    of: Wanted,
    blocks: str,
    versions: Mapping[str, str],
    tick: Tick = lambda _, __: None,
) -> Manifest:
    """Write a cache aside, and put it in place whole; one that is there already is replaced.

    Parameters
    ----------
    tensors : mapping of name to Tensor
        All of a model's parameters and buffers, wherever they are; one at a time is in host memory.
    directory : Path
    of : Wanted
    blocks : str
        Path of the list of blocks, by which files are made.
    versions : mapping
        Of packages; for information.
    tick : callable
        Told (bytes done, bytes of all).

    Raises
    ------
    CacheError
        The disk has not the room, or the directory holds something else than a cache.
    """
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    directory = _room_for_a_cache(directory)
    free = shutil.disk_usage(directory.parent).free
    if total > free:
        raise CacheError(
            f"a cache of {of.model} takes {total:,} bytes and {free:,} are free at {directory.parent}, so it would not "
            "fit; nothing was written, make room or name another --dir"
        )
    aside = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        manifest = _write_files(tensors, aside, of=of, blocks=blocks, versions=versions, tick=tick)
        _put_in_place(aside, directory)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return manifest


def _write_files(
    tensors: Mapping[str, Tensor],
    aside: Path,
    *,
    of: Wanted,
    blocks: str,
    versions: Mapping[str, str],
    tick: Tick,
) -> Manifest:
    entries: dict[str, Entry] = {}
    total, done = sum(t.numel() * t.element_size() for t in tensors.values()), 0
    for file, names in _groups(tensors, blocks).items():
        write(aside / file, {name: tensors[name] for name in names})
        for name in names:
            one = tensors[name]
            kind = str(one.dtype).removeprefix("torch.")
            entries[name] = Entry(file, kind, tuple(one.shape), checksum(one.contiguous()))
            done += one.numel() * one.element_size()
        tick(done, total)
    manifest = Manifest(
        format=FORMAT,
        of=of,
        blocks=blocks,
        versions=dict(versions),
        files={path.name: path.stat().st_size for path in sorted(aside.glob("*.safetensors"))},
        tensors=entries,
    )
    _write_json(aside / MANIFEST, asdict(manifest))
    return manifest


def _groups(tensors: Mapping[str, Tensor], blocks: str) -> dict[str, list[str]]:
    """Names of the tensors of each file: consecutive blocks up to `GROUP_BYTES`, and what is in no block."""
    by_layer: dict[int, list[str]] = {}
    for name in tensors:
        by_layer.setdefault(layer_of(name, blocks), []).append(name)
    groups: dict[str, list[str]] = {f"{_REST}.safetensors": by_layer.pop(-1, [])}
    file, held = "", GROUP_BYTES
    for layer, names in sorted(by_layer.items()):
        size = sum(tensors[name].numel() * tensors[name].element_size() for name in names)
        if not file or held + size > GROUP_BYTES:
            file, held = f"layers-from-{layer:03}.safetensors", 0
            groups[file] = []
        groups[file] += names
        held += size
    return {name: names for name, names in groups.items() if names}


def layer_of(name: str, blocks: str) -> int:
    """Return the layer that a tensor belongs to, or -1."""
    rest = name.removeprefix(f"{blocks}.")
    first = rest.partition(".")[0]
    return int(first) if rest != name and first.isdecimal() else -1


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    with path.open("w") as file:
        json.dump(values, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def link(found: Path, directory: Path) -> None:
    """Make a directory the cache that lies, whole, in another one, by links to its files.

    Raises
    ------
    CacheError
        The directory holds something else than a cache.
    """
    directory = _room_for_a_cache(directory)
    aside = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        for file in (*read(found).files, MANIFEST):
            (aside / file).symlink_to((found / file).resolve())
        _put_in_place(aside, directory)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _room_for_a_cache(directory: Path) -> Path:
    """A directory that nothing is lost by replacing, made absolute."""
    directory = directory.absolute()
    others = directory.iterdir() if directory.is_dir() else [directory] if directory.exists() else []
    for one in others:
        if one.name != MANIFEST and (one.suffix != ".safetensors" or directory == one):
            raise CacheError(f"{directory} holds {one.name}, so it is no cache and is not replaced; name another --dir")
    directory.parent.mkdir(parents=True, exist_ok=True)
    return directory


def _put_in_place(aside: Path, directory: Path) -> None:
    old = directory.with_name(f".{directory.name}.{os.getpid()}.old")
    if directory.exists():
        directory.rename(old)
    aside.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


def read(directory: Path) -> Manifest:
    """Read a cache's manifest and check that its files are there and whole; no weights are read.

    Raises
    ------
    CacheError
        There is no manifest (a cache that was not finished has none), or a file is missing or of another size.
    """
    if not directory.is_dir():
        raise CacheError(f"there is no cache at {directory}; build it with python -m capture cache build")
    try:
        raw = json.loads((directory / MANIFEST).read_text())
        if raw["format"] != FORMAT:
            raise CacheError(
                f"the cache {directory} is of format {raw['format']} and this version reads {FORMAT}; build it again"
            )
        tensors = {name: Entry(**{**one, "shape": tuple(one["shape"])}) for name, one in raw["tensors"].items()}
        manifest = Manifest(**{**raw, "of": Wanted(**raw["of"]), "tensors": tensors})
    except FileNotFoundError:
        raise CacheError(f"the cache {directory} has no {MANIFEST}, so it was never finished; build it again") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheError(f"the manifest of the cache {directory} can't be read: {error}; build it again") from error
    for file, size in manifest.files.items():
        there = (directory / file).stat().st_size if (directory / file).exists() else None
        if there != size:
            what = "is missing" if there is None else f"has {there:,} bytes and should have {size:,}"
            raise CacheError(f"{file} of the cache {directory} {what}; build it again")
    return manifest


def check(manifest: Manifest, wanted: Wanted, directory: Path) -> None:
    """Refuse a cache of another model, revision, dtype or quantization, or of fewer layers."""
    for what in ("model", "revision", "fingerprint", "dtype", "quantization"):
        has, needs = getattr(manifest.of, what), getattr(wanted, what)
        if has != needs:
            why = "the files of the model have changed since" if what == "fingerprint" else f"{has!r}, not {needs!r}"
            raise CacheError(f"the cache {directory} is of {what} {why}; build it again")
    if manifest.of.n_layers < wanted.n_layers:
        raise CacheError(
            f"the cache {directory} holds {manifest.of.n_layers} layers and {wanted.n_layers} are wanted; build it "
            "again"
        )


def sources(manifest: Manifest, model: nn.Module, directory: Path) -> dict[str, Stored]:
    """Find where each tensor of a skeleton is in a cache, and give the skeleton's tensors their dtypes.

    Raises
    ------
    CacheError
        A key is missing or unexpected, or a tensor has another shape than the model's or the manifest's.
    """
    wanted = tensors_of(model)
    n_layers = 1 + max((layer_of(name, manifest.blocks) for name in wanted), default=-1)
    there = {name: one for name, one in manifest.tensors.items() if layer_of(name, manifest.blocks) < n_layers}
    for names, what in ((wanted.keys() - there.keys(), "misses"), (there.keys() - wanted.keys(), "has an unexpected")):
        if names:
            raise CacheError(f"the cache {directory} {what} key {min(names)} ({len(names)} in all); build it again")
    stored = {name: one for file in manifest.files for name, one in header(directory / file).items()}
    for name, entry in there.items():
        found, kind = stored.get(name), getattr(torch, entry.dtype)
        if found is None or found.dtype is not kind or found.shape != entry.shape:
            raise CacheError(
                f"{entry.file} of the cache {directory} does not hold {name} as the manifest says; build it again"
            )
        if entry.shape != tuple(wanted[name].shape) or kind.is_floating_point != wanted[name].is_floating_point():
            raise CacheError(
                f"{name} in the cache {directory} is {list(entry.shape)} and the model's is "
                f"{list(wanted[name].shape)}; build it again"
            )
        if kind is not wanted[name].dtype:
            wanted[name].data = wanted[name].data.to(kind)
    return {name: stored[name] for name in there}


def verify_tensors(manifest: Manifest, tensors: Mapping[str, Tensor], directory: Path) -> None:
    """Compare tensors that were loaded, wherever they are, with the manifest's checksums."""
    for name, tensor in tensors.items():
        if not tensor.is_meta and checksum(tensor) != manifest.tensors[name].checksum:
            entry = manifest.tensors[name]
            raise CacheError(
                f"{name} in {entry.file} of the cache {directory} is not what was written, a byte of it has changed; "
                "build it again"
            )


def verify(directory: Path) -> Manifest:
    """Read every tensor of a cache and compare it with its checksum.

    Raises
    ------
    CacheError
        At the first thing that is wrong.
    """
    manifest = read(directory)
    for file in manifest.files:
        stored = header(directory / file)
        names = [name for name, entry in manifest.tensors.items() if entry.file == file]
        if set(names) != set(stored):
            raise CacheError(
                f"{file} of the cache {directory} holds other tensors than the manifest says; build it again"
            )
        for name in names:
            tensor = torch.empty(stored[name].shape, dtype=stored[name].dtype)
            fill([(stored[name], tensor)])
            verify_tensors(manifest, {name: tensor}, directory)
    return manifest
