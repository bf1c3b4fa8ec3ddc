"""Models and caches from the Hugging Face Hub and back: a pinned revision, and no more than fits on the disk."""

import shutil
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download, upload_folder
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.hf_api import RepoSibling

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


def pull(repository: str, revision: str | None = None) -> Path:
    """Download a cache from a Hub repository, going on where it was interrupted, and return its directory.

    Raises
    ------
    ModelError
        As `snapshot`.
    """
    return _download(repository, revision, _CACHE)


def push(repository: str, directory: Path) -> str:
    """Upload a cache to a Hub repository, made private where there is none, and return the commit's address.

    Raises
    ------
    ModelError
        The Hub can't be reached or refuses.
    """
    try:
        HfApi().create_repo(repository, private=True, exist_ok=True)
        done = upload_folder(
            repo_id=repository,
            folder_path=str(directory),
            allow_patterns=list(_CACHE),
            delete_patterns=list(_CACHE),  # what an earlier cache had and this one has not
        )
    except Exception as error:
        raise ModelError(f"the cache could not be pushed to {repository}: {_reason(error)}") from error
    return str(done)


def _download(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    try:
        if not constants.HF_HUB_OFFLINE:
            _refuse_full_disk(name, revision, patterns)
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except ModelError:
        raise
    except Exception as error:
        offline = " (offline mode is on)" if constants.HF_HUB_OFFLINE else ""
        raise ModelError(
            f"{name} can't be had from the Hub{offline}: {_reason(error)}; files that were downloaded whole are kept, "
            "the same command goes on with the others"
        ) from error


def _refuse_full_disk(name: str, revision: str | None, patterns: Sequence[str]) -> None:
    try:
        files = HfApi().model_info(name, revision=revision, files_metadata=True).siblings or []
    except Exception:
        return  # the download says what is wrong, unless all of it is here and the Hub is not needed
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")
    need = sum(
        file.size or 0
        for file in files
        if any(fnmatch(file.rfilename, pattern) for pattern in patterns) and not _blob(folder, file).exists()
    )
    place = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(place).free
    if need > free:
        raise ModelError(
            f"{name} takes {need:,} more bytes and {free:,} are free at {place}, so it would not fit; nothing was "
            "downloaded, make room or set HF_HOME to another disk"
        )


def _blob(folder: Path, file: RepoSibling) -> Path:
    """Where the Hub's cache keeps a file's bytes, whichever commits it is of."""
    return folder / "blobs" / str(file.lfs.sha256 if file.lfs else file.blob_id)


def _reason(error: Exception) -> str:
    told = " ".join(f"{error} {error.__cause__ or ''}".split())
    return told[:300] or type(error).__name__
