"""A store of format version 1, kept in the repository: it must stay readable to the bit, whatever is written later.

Made once by `python -m tests.datastore.test_fixture`; its rows are a function of their names, made again here.
"""

import sys
from pathlib import Path

import numpy as np
import pytest

import datastore
from datastore.schema import ComponentSpec
from datastore.verify import verify
from tests.datastore import making

STORE = Path(__file__).parents[1] / "data" / "store_v1" / "run.zarr"
ASKED = making.rollouts(5, 17, 3, 40)
GROWN = (2, ASKED[0])


def make(path: Path) -> None:
    """Three captures: two rollouts, two more, one more layer of one rollout; then one rollout's keys dropped."""
    from datastore.maintenance import drop

    making.capture(path, ASKED[:2])
    making.capture(path, ASKED[2:])
    making.capture(path, ASKED[:1], layers=(GROWN[0],), components=[making.RESIDUAL])
    drop(path, rollouts=["3"], components=["k_proj"], reason="fixture")


@pytest.mark.parametrize("component", [making.RESIDUAL, making.KEYS], ids=lambda one: one.name)
def test_rows_of_the_first_format_are_read_to_the_bit(component: ComponentSpec) -> None:
    store = datastore.open(STORE)
    for one in ASKED[: 4 if component is making.RESIDUAL else 3]:
        for layer in (1, 5):
            found = store.select(component.name, rollouts=one.rollout_id, layers=layer, raw=True)
            assert making.same_bits(np.asarray(found.values), making.values(component, layer, one))
            assert found.token_id.values.tolist() == one.token_ids.tolist()


def test_growth_and_drops_of_the_first_format_count() -> None:
    store = datastore.open(STORE)
    layer, one = GROWN
    found = store.select("residual", rollouts=one.rollout_id, layers=layer, raw=True)
    assert making.same_bits(np.asarray(found.values), making.values(making.RESIDUAL, layer, one))
    with pytest.raises(datastore.AbsentError, match="k_proj"):
        store.select("k_proj", rollouts="3")
    assert store.layers == (1, 2, 5)


def test_tables_of_the_first_format_are_read() -> None:
    table = datastore.open(STORE).rollouts
    for one in ASKED:
        row = table.loc[one.rollout_id]
        assert (row["n_tokens"], row["prompt_end"], row["length"]) == (one.n_tokens, one.prompt_end, one.n_tokens)
        assert (row["tags"], row["name"], row["token_sha256"]) == (one.tags, one.rollout_id, one.token_sha256)
    spans = datastore.open(STORE).annotations
    assert sorted(spans["rollout_id"]) == ["1", "3"]


def test_the_first_format_verifies() -> None:
    report = verify(STORE, full=True)
    assert report.ok, [p.message for p in report.problems]
    assert report.captures == 3


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else STORE)
