"""What a server lets requests reach: experiment trees, stores and models below the directories it was given."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from capture.errors import RequestError
from capture.messages import CaptureOrder
from capture.modelinfo import local_path
from experiments.reading import is_sidecar
from experiments.tree import Experiment

__all__ = ["NotThereError", "OutsideError", "Roots", "Target", "missing_ids", "same_model"]

NAMED = 20
"""Names listed in an error."""
MOST_NAME = 255
"""Bytes of a file's name, on the file systems in use."""


class OutsideError(RequestError):
    """A path in a request leads out of the directories that the server was given."""


class NotThereError(RequestError):
    """The experiment or prompt set that a request names does not exist."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A request as it was understood: which tree and variant, with which model, into which store."""

    tree: Path
    variant: str
    model: str
    lora: str | None
    store: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Roots:
    """Directories that requests may reach, resolved; nothing outside them is read or written for a request."""

    experiments: Path
    stores: Path
    models: Path | None

    def target(self, order: CaptureOrder) -> Target:
        """Find what a request names; reads `config.json` and lists directories, no transcript.

        Raises
        ------
        NotThereError
            No such experiment or prompt set; what there is is named.
        RequestError, ExperimentError
            A path leads out of the roots; no such variant.
        """
        tree = Experiment(self._experiment(order.experiment))
        variant = tree.variant_name(order.model_variant)
        owner = order.responses_from or variant
        folder = self._below(tree.responses_dir(order.prompt_set, owner), self.experiments, f"{order.prompt_set!r}")
        if not folder.is_dir():
            known = _some(tree.prompt_sets(owner))
            raise NotThereError(
                f"experiment {order.experiment!r} has no responses of {owner!r} to prompt set {order.prompt_set!r}; "
                f"prompt sets it has: {known}"
            )
        chosen = tree.variants[variant]
        return Target(
            tree=tree.root,
            variant=variant,
            model=tree.model(variant),
            lora=chosen.lora,
            store=self._store(order, tree, variant),
        )

    def _experiment(self, name: str) -> Path:
        path = self._below(self.experiments / name, self.experiments, f"experiment {name!r}")
        if not (path / "config.json").is_file():
            known = _some(sorted(p.parent.name for p in self.experiments.glob("*/config.json")))
            raise NotThereError(f"there is no experiment {name!r} here; the server has: {known}")
        return path

    def _store(self, order: CaptureOrder, tree: Experiment, variant: str) -> Path:
        if order.store is not None:
            path = self._below(self.stores / order.store, self.stores, f"store {order.store!r}")
        else:
            suffix = f"_{order.output_suffix}" if order.output_suffix else ""
            there = tree.default_store(f"{order.prompt_set}{suffix}", variant)
            path = self._below(there, self.experiments, f"store {there.name!r}")
        if path.suffix != ".zarr":
            raise RequestError(f"store {order.store!r} is not called like a store; give a name that ends in .zarr")
        return path

    def model(self, name: str) -> str:
        """Allow a model by name: a Hub id, or a directory below the root for models.

        Raises
        ------
        RequestError
            A directory elsewhere.
        """
        if not os.path.exists(local_path(name)) and not name.startswith(("/", ".", "~")):
            return name
        if self.models is None:
            raise RequestError(
                f"model {name!r} is a directory, and this server loads none; start it with --models-root"
            )
        return str(self._below(local_path(name).absolute(), self.models, f"model {name!r}"))

    def _below(self, path: Path, root: Path, what: str) -> Path:
        longest = max(len(os.fsencode(part)) for part in path.parts)
        if longest > MOST_NAME:
            raise RequestError(
                f"{what:.100} holds a name of {longest} bytes, and a file's has {MOST_NAME} at most; shorten it"
            )
        found = path.resolve()
        if not found.is_relative_to(root) or found == root:
            raise OutsideError(f"{what} leads out of the directory that this server was given, so it is refused")
        return found


def missing_ids(target: Target, order: CaptureOrder) -> list[str]:
    """Which of the ids asked for the prompt set does not have, in order.

    The files' names settle it mostly; only where they do not are all transcripts read.
    """
    tree, ids = Experiment(target.tree), order.ids or ()
    folder = tree.responses_dir(order.prompt_set, order.responses_from or target.variant)
    stems = {path.stem for path in folder.glob("*.json") if not is_sidecar(path)}
    if stems.issuperset(ids):
        return []
    found = tree.transcripts(order.prompt_set, variant=target.variant, responses_from=order.responses_from)
    known = {one.id for one in found}
    return [one for one in ids if one not in known]


def same_model(one: str, other: str) -> bool:
    """Whether two names are of one model: the same name, or the same directory."""
    if one == other:
        return True
    a, b = local_path(one), local_path(other)
    return os.path.isdir(a) and os.path.isdir(b) and a.resolve() == b.resolve()


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more if names else "none"
