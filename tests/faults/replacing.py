"""What is done with a store while it is deleted, or another one is put in its place: a read, a command, an export.

All rows of a store are one number, its own, so that a mixture of two stores shows in anything made from them.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

import datastore
import project
from calibrate.commands import app as calibrate_app
from capture.commands import app as capture_app
from datastore import console
from datastore.dtype import numpy_dtype
from datastore.errors import DatastoreError
from datastore.schema import ComponentSpec, Rollout
from experiments.direction import Direction

WIDTH, LAYERS = 16, (2, 5)
SPEC = ComponentSpec(name="residual", width=WIDTH, dtype="bfloat16")


def make(path: Path, number: float, *, rollouts: int = 30, tokens: int = 50) -> None:
    """Write a store whose rows are all `number`, in many small chunks, without statistics that would spare a pass."""
    asked = [
        Rollout(rollout_id=str(i), token_ids=np.full(tokens, i % 50, np.int32), prompt_end=9) for i in range(rollouts)
    ]
    known = {"model": {"name": "toy", "revision": "1", "hidden_size": WIDTH}}
    rows = np.full((tokens, WIDTH), number, numpy_dtype("bfloat16"))
    for plan in datastore.plan(
        path, asked, layers=LAYERS, components=[SPEC], most_tokens=16, provenance=known, statistics=False
    ):
        with datastore.create(path, plan) as writer:
            for one in plan.rollouts:
                for layer in plan.layers:
                    writer.put("residual", layer, one.rollout_id, rows)
            writer.commit()


def stream(store: str, out: str) -> None:
    """Read all rows; after the first block say so, and go on when told to."""
    found, there = set(), Path(out)
    try:
        for block in datastore.open(store).blocks("residual", layers=LAYERS, memory=1 << 14):
            found |= set(np.unique(block.values.astype(np.float32)).tolist())
            if not (there / "begun").exists():
                (there / "begun").touch()
                while not (there / "go").exists():
                    time.sleep(0.001)
    except DatastoreError as error:
        (there / "numbers").write_text(repr(sorted(found)))
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def select(store: str, out: str) -> None:
    """Begin a selection, and use its values when told to."""
    try:
        rows = datastore.open(store).select("residual", layers=list(LAYERS))
        (Path(out) / "begun").touch()
        while not (Path(out) / "go").exists():
            time.sleep(0.001)
        (Path(out) / "numbers").write_text(repr(np.unique(rows.values).tolist()))
    except DatastoreError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def score(store: str, out: str) -> None:
    """Project along a direction, and keep the scores in the store."""
    given = [
        Direction(trait="a/b", layer=n, values=np.eye(WIDTH, dtype=np.float32)[0], method="probe", position="all")
        for n in LAYERS
    ]
    try:
        project.scores(datastore.open(store), given)
    except DatastoreError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def calibrated(store: str, out: str) -> None:
    """Run `python -m calibrate STORE`."""
    console.run(calibrate_app, [store, "--json"])


def exported(store: str, out: str) -> None:
    """Run `python -m capture export STORE OUT`."""
    console.run(capture_app, ["export", store, f"{out}/files", "--json"])
