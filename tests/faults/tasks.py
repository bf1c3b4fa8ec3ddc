"""What is done to a store while it is killed, or the power goes: real commands, and captures of rows from NumPy."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datastore
from calibrate.commands import app as calibrate_app
from capture.commands import app as capture_app
from datastore import console
from datastore.commands import app as store_app
from datastore.labels import add_labels
from datastore.maintenance import drop
from experiments.rawfiles import write_raw
from experiments.vectors import write_directions
from project.commands import app as project_app
from tests.datastore import making
from tests.project.stores import direction

COUNTS = (7, 130, 41, 64, 90, 5, 33, 77)
ASKED = making.rollouts(*COUNTS)
MORE = [making.rollout("new", 50), making.rollout("newer", 21)]


def store_command(*words: str) -> None:
    """Run `python -m datastore WORDS`."""
    console.run(store_app, list(words))


def capture_command(*words: str) -> None:
    """Run `python -m capture WORDS`."""
    console.run(capture_app, list(words))


def calibrate_command(*words: str) -> None:
    """Run `python -m calibrate WORDS`."""
    console.run(calibrate_app, list(words))


def project_command(*words: str) -> None:
    """Run `python -m project WORDS`."""
    console.run(project_app, list(words))


def grow(store: str, which: str) -> None:
    """Capture what is missing, as the first capture or as one more, a batch at a time as from a model."""
    asked, layers = (ASKED, (0, 3)) if which == "first" else (ASKED[2:] + MORE, (3, 4))
    for plan in making.plans(Path(store), asked, layers, most_tokens=32):
        with datastore.create(store, plan, memory=16 << 10, threads=1) as writer:
            for batch in writer.todo():
                for layer in plan.layers:
                    for name in batch.stored:
                        for spec in plan.components:
                            one = plan.rollouts[plan.rows[name]]
                            writer.put(spec.name, layer, name, making.values(spec, layer, one))
            writer.commit()


def nothing(root: Path) -> None:
    """Begin with nothing."""


def one_capture(root: Path) -> None:
    """Begin with one capture."""
    grow(str(root / "run.zarr"), "first")


def files(root: Path) -> None:
    """Begin with activation files of rollouts, as other tools write them."""
    (root / "files").mkdir()
    for one in ASKED:
        arrays = {("residual", layer): making.values(making.RESIDUAL, layer, one) for layer in (0, 3)}
        strings = [f"t{i}" for i in one.token_ids.tolist()]
        about = {"token_ids": one.token_ids.tolist(), "prompt_end": one.prompt_end, "tokens": strings}
        text = {"prompt": "".join(strings[: one.prompt_end]), "response": "".join(strings[one.prompt_end :])}
        write_raw(root / "files" / f"{one.rollout_id}.pt", arrays, about | text)


def grown(root: Path) -> None:
    """Begin with a store grown in every direction: rollouts, layers, a component, a replacement, a drop, labels."""
    path = root / "run.zarr"
    making.capture(path, ASKED[:3])
    making.capture(path, ASKED[3:6])
    making.capture(path, ASKED[6:], layers=(1,), components=[making.RESIDUAL])
    making.capture(path, ASKED[:4], layers=(7,))
    making.capture(path, ASKED[1:2], layers=(5,), replace=True, version=1)
    drop(path, rollouts=["2"], layers=[5])
    add_labels(path, {"0": {"mood": "good"}})


def littered(root: Path) -> None:
    """Begin with a store of which much no longer counts, and leftovers beside it."""
    grown(root)
    path = root / "run.zarr"
    making.capture(path, ASKED[3:6], replace=True, version=2)
    making.capture(path, ASKED[:2], layers=(9,))
    drop(path, layers=[9])
    old = time.time() - 7200
    for place in (path / "captures" / "0009.ab.partial", root / "run.zarr.ab.partial"):
        shutil.copytree(path / "captures" / "0001", place)
        os.utime(place, (old, old))


def labelled(root: Path) -> None:
    """Begin with a store and a file of labels."""
    one_capture(root)
    (root / "labels.csv").write_text("rollout_id,mood\n0,good\n3,bad\n")


def small(root: Path) -> None:
    """Begin with a store of two captures."""
    making.capture(root / "run.zarr", ASKED[:2])
    making.capture(root / "run.zarr", ASKED[2:4])


def with_directions(root: Path) -> None:
    """Begin with a store and directions."""
    small(root)
    made = [direction("tone/dry", layer, width=making.RESIDUAL.width) for layer in (1, 5)]
    write_directions(root / "vectors", made, variant="base")


def two_stores(root: Path) -> None:
    """Begin with two stores to be merged."""
    grown(root)
    making.capture(root / "other.zarr", [*MORE, ASKED[0]], layers=(1, 9))


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Something done to a store by a process that may die.

    Attributes
    ----------
    name : str
    begin : callable
        Makes what is there before, below a directory.
    call : str
        `module:function` of the zygote.
    words : tuple of str
        Its arguments; `{root}` is the directory.
    stores : tuple of str
        The stores that must read as before or as after.
    """

    name: str
    begin: Callable[[Path], None]
    call: str
    words: tuple[str, ...]
    stores: tuple[str, ...] = ("run.zarr",)

    def arguments(self, root: Path) -> list[str]:
        """Return the words for one directory."""
        return [word.format(root=root) for word in self.words]


_GROW, _STORE, _CAPTURE = (f"tests.faults.tasks:{name}" for name in ("grow", "store_command", "capture_command"))
_MODEL = ("--store", "{root}/run.zarr", "--components", "residual,mlp_out", "--chunk-tokens", "64")
TASKS = {
    one.name: one
    for one in (
        Task(name="capture", begin=nothing, call=_GROW, words=("{root}/run.zarr", "first")),
        Task(name="growth", begin=one_capture, call=_GROW, words=("{root}/run.zarr", "more")),
        Task(
            name="import",
            begin=files,
            call=_CAPTURE,
            words=("import", "{root}/files", "--store", "{root}/run.zarr", "--chunk-tokens", "32"),
        ),
        Task(
            name="merge",
            begin=two_stores,
            call=_STORE,
            words=("merge", "{root}/run.zarr", "{root}/other.zarr", "{root}/out.zarr"),
            stores=("run.zarr", "other.zarr", "out.zarr"),
        ),
        Task(name="compact", begin=grown, call=_STORE, words=("compact", "{root}/run.zarr", "--yes")),
        Task(name="gc", begin=littered, call=_STORE, words=("gc", "{root}/run.zarr", "--yes", "--older-than", "0")),
        Task(name="model", begin=nothing, call=_CAPTURE, words=_MODEL),
        Task(
            name="drop",
            begin=grown,
            call=_STORE,
            words=("drop", "{root}/run.zarr", "--ids", "0,3", "--layers", "1", "--yes"),
        ),
        Task(
            name="calibrate",
            begin=small,
            call="tests.faults.tasks:calibrate_command",
            words=("{root}/run.zarr", "--layers", "1", "--export", "json", "--out", "{root}/massive.json"),
        ),
        Task(
            name="project",
            begin=with_directions,
            call="tests.faults.tasks:project_command",
            words=("{root}/run.zarr", "--vectors", "{root}/vectors", "--layers", "1", "--force-model"),
        ),
        Task(name="label", begin=labelled, call=_CAPTURE, words=("label", "{root}/run.zarr", "{root}/labels.csv")),
    )
}
