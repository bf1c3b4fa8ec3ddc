"""The union as arrays against the union one cell at a time, and its size at 100,000 rollouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from datastore.cells import Cells, Snapshot
from datastore.union import Capture, Drop, Union

COMPONENTS = ("residual", "k_proj")
IDS = ("a", "b", "c", "d")


def capture(number: int, held: dict[str, str], *, layers: tuple[int, ...], **more: Any) -> Capture:
    """Return a capture in memory that holds these rollouts with these token hashes."""
    components = more.get("components", COMPONENTS)
    specs = [{"name": name, "width": 4, "dtype": "bfloat16", "hook": ""} for name in components]
    return Capture(
        number=number,
        path=Path("nowhere") / f"{number:04d}",
        attrs={
            "layers": list(layers),
            "components": specs,
            "provenance": {"model": {"revision": more.get("model", "x")}},
            "batches": [list(held)],
        },
        rollout_ids=tuple(held),
        counts=np.array([1 + len(sha) for sha in held.values()], dtype=np.int64),
        token_sha256=tuple(held.values()),
        batch=np.zeros(len(held), dtype=np.int64),
    )


def cells_of(captures: list[Capture], drops: list[Drop]) -> Cells:
    snapshot = Snapshot(path=Path("nowhere"), captures=tuple((c.number, (0, 0)) for c in captures), dropped=())
    return Cells(snapshot, Union(captures, drops))


some = st.sets(st.sampled_from([1, 5, 7]), min_size=1)
named = st.sets(st.sampled_from(COMPONENTS), min_size=1)


@st.composite
def stores(draw: st.DrawFn) -> Cells:
    captures, drops = [], []
    for number in range(1, draw(st.integers(1, 4)) + 1):
        held = draw(st.dictionaries(st.sampled_from(IDS), st.sampled_from(["", "x"]), min_size=1))
        layers, components = tuple(sorted(draw(some))), tuple(sorted(draw(named)))
        model = draw(st.sampled_from(["x", "x", "y"]))
        captures.append(capture(number, held, layers=layers, components=components, model=model))
    for _ in range(draw(st.integers(0, 2))):
        rollouts = draw(st.none() | st.sets(st.sampled_from(IDS), min_size=1))
        drops.append(
            Drop(
                captures=tuple(draw(st.sets(st.integers(1, 4), min_size=1))),
                rollouts=None if rollouts is None else frozenset(rollouts),
                layers=draw(st.none() | some.map(frozenset)),
                components=draw(st.none() | named.map(frozenset)),
            )
        )
    return cells_of(captures, drops)


@given(stores())
def test_the_arrays_say_what_the_union_says(cells: Cells) -> None:
    union = cells.union
    assert tuple(cells.ids.tolist()) == union.rollout_ids
    for component in COMPONENTS:
        for layer in (1, 5, 7):
            holder, row = cells.where(component, layer)
            for i, name in enumerate(union.rollout_ids):
                found = union.find(component, layer, name)
                expected = (-1, -1) if found is None else (cells.captures.index(found.capture), found.row)
                assert (int(holder[i]), int(row[i])) == expected
    for i, name in enumerate(union.rollout_ids):
        newest, row_there = union.newest(name)
        assert (cells.captures[cells.newest[i]], int(cells.described_at[i])) == (newest, row_there)
        assert cells.counts[i] == newest.counts[row_there]
    assert set(cells.components) == {c for name in union.rollout_ids for _, c in union.cells_of(name)}
    assert set(cells.layers) == {n for name in union.rollout_ids for n, _ in union.cells_of(name)}
