"""A store together with what should be in it: the dict of NumPy arrays that readers are compared with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datastore import storage
from datastore.schema import Rollout
from tests.datastore import making

Key = tuple[str, int, str]


@dataclass
class Truth:
    """A store, and what should be in it."""

    path: Path
    rollouts: dict[str, Rollout] = field(default_factory=dict, repr=False)
    values: dict[Key, NDArray[Any]] = field(default_factory=dict, repr=False)

    def capture(self, asked: list[Rollout], layers: tuple[int, ...], *, version: int = 0, **options: Any) -> None:
        """Capture, and keep the same rows in the dict; other tokens replace all that was there."""
        making.capture(self.path, asked, layers, version=version, **options)
        for one in asked:
            if one.rollout_id in self.rollouts and self.rollouts[one.rollout_id].token_sha256 != one.token_sha256:
                self.values = {key: rows for key, rows in self.values.items() if key[2] != one.rollout_id}
            self.rollouts[one.rollout_id] = one
            for spec in options.get("components", making.BOTH):
                for layer in layers:
                    key = (spec.name, layer, one.rollout_id)
                    if options.get("replace") or key not in self.values:
                        self.values[key] = making.values(spec, layer, one, version=version)

    def drop(self, **what: Any) -> None:
        """Record that something no longer counts."""
        number = len(storage.numbered(self.path / "dropped")) + 1
        storage.create_group(self.path / "dropped" / f"{number:04d}", {"dropped": [what]})

    def rows(self, component: str, layer: int, rollout_id: str) -> NDArray[np.float32]:
        return self.values[component, layer, rollout_id].astype(np.float32)


def add_labels(path: Path, number: int, values: dict[str, Any], *, name: str) -> None:
    group = path / "labels" / f"{number:04d}"
    storage.create_group(group, {})
    storage.create_group(group / "labels", {})
    column = np.asarray(list(values.values()))
    storage.write_array(group / "rollout_id", np.asarray(list(values), dtype=object), dims=("row",))
    storage.write_array(group / "labels" / name, column, dims=("row",), attrs={"label": name, "missing": []})
