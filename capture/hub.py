"""Models and caches from the Hugging Face Hub and back: a pinned revision, and no more than fits on the disk."""

import shutil
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache, upload_folder

from capture.errors import ModelError

__all__ = ["pull", "push", "snapshot"]

_WEIGHTS = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
_CACHE = ("*.safetensors", "manifest.json")


def snapshot(name: str, revision: str | None) -> Path:
    """Download a model's weights, going on where it was interrupted, and return their directory.

    Raises
    ------
    ModelError
        The Hub has no such model or can't be reached, or the disk has not the room; where offline mode is on, the model
        is not there.
    """
    return _download(name, revision, _WEIGHTS)


def pull(repository: str, revision: str | None, directory: Path) -> None:
    """Fetch a cache from a Hub repository into a directory; the manifest comes last.

    Raises
    ------
    ModelError
        As `snapshot`.
    """
    found = _download(repository, revision, _CACHE)
    aside = directory.with_name(f".{directory.name}.pulled")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        for file in sorted(found.iterdir(), key=lambda path: path.name == "manifest.json"):
            if any(fnmatch(file.name, pattern) for pattern in _CACHE):
                (aside / file.name).symlink_to(file.resolve())
        shutil.rmtree(directory, ignore_errors=True)
        aside.rename(directory)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def push(repository: str, directory: Path) -> str:
    """Upload a cache to a Hub repository, made private where there is none, and return the commit's address.

    Raises
    ------
    ModelError
        The Hub can't be reached or refuses.
    """
    try:
        HfApi().create_repo(repository, private=True, exist_ok=True)
        done = upload_folder(repo_id=repository, folder_path=str(directory), allow_patterns=list(_CACHE))
    except Exception as error:
        raise ModelError(f"the cache could not be pushed to {repository}: {_reason(error)}") from error
    return str(done)


def _download(name: str, revision: str | None, patterns: Iterable[str]) -> Path:
    try:
        if not constants.HF_HUB_OFFLINE:
            _refuse_full_disk(name, revision, tuple(patterns))
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except ModelError:
        raise
    except Exception as error:
        offline = " (offline mode is on)" if constants.HF_HUB_OFFLINE else ""
        raise ModelError(f"{name} can't be had from the Hub{offline}: {_reason(error)}") from error


def _refuse_full_disk(name: str, revision: str | None, patterns: tuple[str, ...]) -> None:
    files = HfApi().model_info(name, revision=revision, files_metadata=True).siblings or []
    need = sum(
        file.size or 0
        for file in files
        if any(fnmatch(file.rfilename, pattern) for pattern in patterns)
        and not isinstance(try_to_load_from_cache(name, file.rfilename, revision=revision), str)
    )
    place = next(
        path for path in (Path(constants.HF_HUB_CACHE), *Path(constants.HF_HUB_CACHE).parents) if path.exists()
    )
    free = shutil.disk_usage(place).free
    if need > free:
        raise ModelError(
            f"{name} takes {need:,} more bytes and {free:,} are free at {place}, so it would not fit; nothing was "
            "downloaded, make room or set HF_HOME to another disk"
        )


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
