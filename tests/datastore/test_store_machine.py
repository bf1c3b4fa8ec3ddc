"""The store against a dict: capture, grow, replace, drop, cut off, resume, reopen and select in any order."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from numpy.typing import NDArray

import datastore
from datastore import maintenance
from datastore.errors import AbsentError, ConflictError, MisuseError
from datastore.planning import plans_directory
from datastore.schema import Plan, Rollout
from datastore.union import load_union
from tests.datastore import making

Cell = tuple[str, int, str]

NAMES = ("a", "b", "c", "d")
LAYERS = (0, 2, 7)
SPECS = {spec.name: spec for spec in making.BOTH}

some_names = st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True)
some_layers = st.lists(st.sampled_from(LAYERS), min_size=1, max_size=2, unique=True)
some_components = st.lists(st.sampled_from(sorted(SPECS)), min_size=1, unique=True)
variants = st.integers(0, 1)


def rollout(name: str, variant: int) -> Rollout:
    """Return one of two token sequences that go by this name; they differ in length as well."""
    return making.rollout(name, 3 + 11 * NAMES.index(name) + variant, tokens=variant)


class Model:
    """The captures as dicts; the rules of the union said once more, as plainly as can be."""

    def __init__(self) -> None:
        self.captures: list[tuple[dict[str, Rollout], dict[Cell, NDArray[Any]]]] = []

    def tokens(self) -> dict[str, Rollout]:
        """Each rollout as the newest capture has it of which anything is left."""
        return {cell[2]: rollouts[cell[2]] for rollouts, cells in self.captures for cell in cells}

    def cells(self) -> dict[Cell, NDArray[Any]]:
        """Rows of each cell: later captures win, those of other tokens than the newest do not count."""
        tokens = self.tokens()
        found: dict[Cell, NDArray[Any]] = {}
        for rollouts, cells in self.captures:
            found |= {c: rows for c, rows in cells.items() if rollouts[c[2]].token_sha256 == tokens[c[2]].token_sha256}
        return found

    def drop(self, names: list[str], layers: list[int] | None, components: list[str] | None) -> None:
        for _, cells in self.captures:
            for component, layer, name in list(cells):
                hit = (layers is None or layer in layers) and (components is None or component in components)
                if hit and name in names:
                    del cells[component, layer, name]


class StoreMachine(RuleBasedStateMachine):
    """Everything that is done to the store is done to the model."""

    @initialize()
    def begin(self) -> None:
        self.directory = tempfile.TemporaryDirectory()
        self.path = Path(self.directory.name) / "run.zarr"
        self.model = Model()
        self.replaced = 0
        self.waiting: list[tuple[list[Rollout], dict[str, Any]]] = []
        self.opened: tuple[datastore.Store, dict[Cell, NDArray[Any]]] | None = None

    def teardown(self) -> None:
        self.directory.cleanup()

    # -- what is done to the store -----------------------------------------------------------------------------------

    @rule(names=some_names, layers=some_layers, components=some_components, variant=variants, replace=st.booleans())
    def capture(self, names: list[str], layers: list[int], components: list[str], variant: int, replace: bool) -> None:
        asked, options = self._request(names, layers, components, variant=variant, replace=replace)
        if not replace and self._conflicts(asked):
            with pytest.raises(ConflictError, match=r"rollout '.' is in .* tokens .* and now has .*use another id"):
                making.plans(self.path, asked, **options)
            return
        self.replaced += replace
        for plan in making.plans(self.path, asked, **options):
            self._finish(plan, version=self.replaced if replace else 0)

    @rule(
        names=some_names,
        layers=some_layers,
        components=some_components,
        variant=variants,
        share=st.floats(0, 1),
        at_commit=st.booleans(),
    )
    def cut_off(
        self, names: list[str], layers: list[int], components: list[str], variant: int, share: float, at_commit: bool
    ) -> None:
        """Begin a capture and leave it: after some of its rows, or with all rows and nothing committed."""
        asked, options = self._request(names, layers, components, variant=variant, replace=False)
        if self._conflicts(asked):
            return
        for plan in making.plans(self.path, asked, **options)[:1]:
            rows = making.rows_of(plan)
            with datastore.create(self.path, plan, memory=1 << 12) as writer:
                for spec, layer, one in rows if at_commit else rows[: int(share * len(rows))]:
                    writer.put(spec.name, layer, one.rollout_id, making.values(spec, layer, one))
            self.waiting.append((asked, options))

    @precondition(lambda self: self.waiting)
    @rule()
    def resume(self) -> None:
        """Ask for the same again: it goes on, or is refused where the store has changed its mind about the tokens."""
        asked, options = self.waiting.pop(0)
        if self._conflicts(asked):
            with pytest.raises(ConflictError):
                making.plans(self.path, asked, **options)
            return
        for plan in making.plans(self.path, asked, **options):
            self._finish(plan, version=0)

    @precondition(lambda self: self.path.exists())
    @rule(names=some_names, layers=st.none() | some_layers, components=st.none() | some_components)
    def drop(self, names: list[str], layers: list[int] | None, components: list[str] | None) -> None:
        try:
            maintenance.drop(self.path, rollouts=names, layers=layers, components=components)
        except MisuseError:  # nothing of it is there, or a name is not known
            there = [(n, c) for c, n, name in self.model.cells() if name in names]
            hit = [1 for n, c in there if (not layers or n in layers) and (not components or c in components)]
            assert not hit or not {*names} <= {*self.model.tokens()} or self._unknown(layers, components)
            return
        self.model.drop(names, layers, components)

    def _unknown(self, layers: list[int] | None, components: list[str] | None) -> bool:
        cells = self.model.cells()
        return not {*(layers or ())} <= {n for _, n, _ in cells} or not {*(components or ())} <= {c for c, *_ in cells}

    @rule()
    def leave_leftovers(self) -> None:
        """What killed processes leave beside a store does no harm."""
        plans = plans_directory(self.path)
        plans.mkdir(exist_ok=True)
        (plans / "0123456789abcdef.0.partial" / "group").mkdir(parents=True, exist_ok=True)

    # -- what must hold ----------------------------------------------------------------------------------------------

    @rule()
    def read(self) -> None:
        """All rows are there to the bit, read with zarr-python alone."""
        for (component, layer, name), rows in self.model.cells().items():
            assert making.same_bits(making.read(self.path, component, layer, name), rows)

    @rule()
    def open(self) -> None:
        if self.path.exists():
            self.opened = datastore.open(self.path), self.model.cells()

    @precondition(lambda self: self.opened)
    @rule(component=st.sampled_from(sorted(SPECS)), layer=st.sampled_from(LAYERS), name=st.sampled_from(NAMES))
    def select(self, component: str, layer: int, name: str) -> None:
        """A reader sees the store as it was when it was opened, whatever was done since."""
        assert self.opened is not None
        store, model = self.opened
        cell = (component, layer, name)
        if cell not in model:
            with pytest.raises(AbsentError):
                store.select(component, rollouts=name, layers=layer, raw=True)
            return
        values = store.select(component, rollouts=name, layers=layer, raw=True)
        assert making.same_bits(np.asarray(values.values), model[cell])

    @invariant()
    def the_union_is_the_model(self) -> None:
        if not hasattr(self, "path") or not self.path.exists():
            return
        union = load_union(self.path)
        assert {(c, layer, name) for name in NAMES for layer, c in union.cells_of(name)} == set(self.model.cells())
        assert set(union.rollout_ids) == set(self.model.tokens())
        for name, one in self.model.tokens().items():
            capture, row = union.newest(name)
            assert capture.token_sha256[row] == one.token_sha256

    # -- shared ------------------------------------------------------------------------------------------------------

    def _request(
        self, names: list[str], layers: list[int], components: list[str], *, variant: int, replace: bool
    ) -> tuple[list[Rollout], dict[str, Any]]:
        specs = tuple(SPECS[name] for name in components)
        return [rollout(n, variant) for n in names], {"layers": layers, "components": specs, "replace": replace}

    def _conflicts(self, asked: list[Rollout]) -> bool:
        known = self.model.tokens()
        return any(known.get(one.rollout_id, one).token_sha256 != one.token_sha256 for one in asked)

    def _finish(self, plan: Plan, *, version: int) -> None:
        """Fill what is missing of a plan and commit; captured again on purpose the rows are others."""
        with datastore.create(self.path, plan, memory=1 << 12) as writer:
            making.fill(writer, version=version)
            number = writer.commit()
        assert number is not None
        cells = {
            (s.name, n, one.rollout_id): making.values(s, n, one, version=version) for s, n, one in making.rows_of(plan)
        }
        self.model.captures.append(({one.rollout_id: one for one in plan.rollouts}, cells))


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=40, stateful_step_count=14)
