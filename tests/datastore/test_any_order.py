"""Growth in any order reads as one capture of everything: other rollouts, layers, components, parts, cut off, twice.

Oracle: a store captured all at once. The producer computes a rollout's rows from its name, and one column from its
company in the batch, as a model's kernels may, so that company that is not kept shows.
"""

from __future__ import annotations

import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import datastore
from datastore.compact import compact, plan_compaction
from datastore.gc import collect, plan_collection
from datastore.planning import plans_directory
from datastore.schema import Batch, ComponentSpec, Plan
from datastore.union import load_union
from datastore.verify import verify
from datastore.writer import Writer
from tests.datastore import making

ASKED = making.rollouts(5, 17, 3, 40, 9, 12)
LAYERS = (0, 2, 7)
Step = dict[str, Any]
Cell = tuple[str, str, int]

steps = st.lists(
    st.fixed_dictionaries(
        {
            "rollouts": st.lists(st.integers(0, len(ASKED) - 1), min_size=1, max_size=4, unique=True),
            "layers": st.lists(st.sampled_from(LAYERS), min_size=1, unique=True),
            "components": st.lists(st.integers(0, 1), min_size=1, unique=True),
            "how": st.sampled_from(["whole", "parts", "cut off", "two at once", "replaced", "compacted"]),
            "share": st.floats(0, 1),
        }
    ),
    min_size=1,
    max_size=5,
)


def rows(spec: ComponentSpec, layer: int, plan: Plan, *, batch: Batch, name: str) -> NDArray[Any]:
    """Return the rows of a rollout computed in the company of a batch: the company is in the last bits."""
    one = plan.rollouts[plan.rows[name]]
    company = zlib.crc32(",".join(sorted(batch.members)).encode()) % 97
    found = making.values(spec, layer, one)
    found[:, 0] = company
    return found


def fill(writer: Writer, *, share: float = 1.0) -> None:
    """Put the rows of a share of the batches that are still to do."""
    batches = writer.todo()
    for batch in batches[: round(share * len(batches))]:
        for layer in writer.plan.layers:
            for name in batch.stored:
                for spec in writer.plan.components:
                    writer.put(spec.name, layer, name, rows(spec, layer, writer.plan, batch=batch, name=name))


def carry_out(path: Path, plan: Plan, part: tuple[int, int] = (1, 1)) -> int | None:
    with datastore.create(path, plan, part=part, threads=1) as writer:
        fill(writer)
        return writer.commit()


def do(path: Path, step: Step) -> None:
    """Take one step of growth."""
    if step["how"] == "compacted":
        if path.exists():
            compact(plan_compaction(path))
        return
    asked = [ASKED[i] for i in step["rollouts"]]
    options = {"components": [making.BOTH[i] for i in step["components"]], "replace": step["how"] == "replaced"}
    plans = making.plans(path, asked, step["layers"], **options)
    if step["how"] == "cut off" and plans:
        with datastore.create(path, plans[0], threads=1) as writer:
            fill(writer, share=step["share"])
        return  # whoever asks for the same later goes on with it
    if step["how"] == "two at once" and len(plans) > 1:
        with (
            datastore.create(path, plans[0], threads=1) as first,
            datastore.create(path, plans[1], threads=1) as second,
        ):
            fill(second)
            fill(first)
            second.commit()
            first.commit()
        plans = plans[2:]
    for plan in plans:
        for part in [(2, 2), (1, 2)] if step["how"] == "parts" else [(1, 1)]:
            if carry_out(path, plan, part) is not None:
                break  # of a plan of one chunk a part is all


def everything(path: Path) -> dict[Cell, NDArray[Any]]:
    """Return every cell that counts, read with zarr-python."""
    union, arrays, found = load_union(path), dict[Path, NDArray[Any]](), dict[Cell, NDArray[Any]]()
    for name in union.rollout_ids:
        for layer, component in union.cells_of(name):
            cell = union.cell(component, layer, name)
            where = cell.capture.path / component
            if where not in arrays:
                arrays[where] = np.asarray(zarr.open_array(where, mode="r")[...])
            found[name, component, layer] = arrays[where][slice(*cell.tokens), cell.capture.layers.index(layer)]
    return found


def same_rows(a: dict[Cell, NDArray[Any]], b: dict[Cell, NDArray[Any]]) -> bool:
    """Whether both hold the same bits but for the column of the company."""
    return a.keys() == b.keys() and all(a[key][:, 1:].tobytes() == b[key][:, 1:].tobytes() for key in a)


@settings(max_examples=8)
@given(sequence=steps)
def test_any_order_of_growth_reads_as_all_at_once(sequence: list[Step]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        grown, once = Path(directory) / "grown.zarr", Path(directory) / "once.zarr"
        for step in sequence:
            do(grown, step)
        for path in (grown, once):
            for plan in making.plans(path, ASKED, LAYERS):
                carry_out(path, plan)
        cells, wanted = everything(grown), everything(once)
        assert same_rows(cells, wanted)
        mine, other = (datastore.open(path) for path in (grown, once))
        assert mine.rollouts.sort_index(axis=0).equals(other.rollouts.sort_index(axis=0)[mine.rollouts.columns])
        spans = [sorted(store.annotations.itertuples(index=False, name=None)) for store in (mine, other)]
        assert spans[0] == spans[1]
        for name in mine.rollouts.index:
            assert mine.tokens(str(name)).equals(other.tokens(str(name)))
        if not any(step["how"] in ("compacted", "replaced", "cut off") for step in sequence):
            companies = {(name, float(v)) for (name, _, _), values in cells.items() for v in values[:, 0]}
            assert len(companies) == len(ASKED), "every layer of a rollout was computed in the same company"
        assert verify(grown, full=True).ok
        collect(plan_collection(grown, plans=True, older_than=0))
        assert same_rows(everything(grown), wanted)
        assert not plans_directory(grown).exists()
