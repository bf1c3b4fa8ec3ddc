"""The table of directions as it is printed: which were scored, why these, and their mean score."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from project.fit import Fitted
from project.selection import Selection

__all__ = ["direction_rows", "fitted_rows"]

_NAMES = ("trait", "layer", "requested", "method", "component", "source", "why", "sha256", "baseline", "file")


def direction_rows(chosen: Selection, found: xr.Dataset | None, *, segment: str | None = None) -> list[dict[str, Any]]:
    """Return a row for each direction; `mean_score` is over all tokens, or those of a segment, None where unknown."""
    means: dict[tuple[str, int], float] = {}
    if found is not None:
        kept = found if segment is None else found.isel(token=np.flatnonzero(found.segment.values == segment))
        scores = kept.score.values
        for j, key in enumerate(zip(found.sha256.values, found.layer.values, strict=True)):
            column = scores[:, j][np.isfinite(scores[:, j])].astype(np.float64)  # one at a time: there may be hundreds
            if len(column):
                means[str(key[0]), int(key[1])] = float(column.mean())
    return [
        {
            **{name: row[name] for name in _NAMES},
            "vector_position": row["position"],
            "mean_score": means.get((str(row["sha256"]), int(row["layer"]))),
        }
        for row in chosen.directions.to_dict("records")
    ]


def fitted_rows(fitted: Sequence[Fitted], files: Sequence[Path]) -> list[dict[str, Any]]:
    """Return a row for each fitted direction and the file that it was written to."""
    return [
        {
            "trait": one.direction.trait,
            "layer": one.direction.layer,
            "auroc": one.auroc.value,
            "auroc_low": one.auroc.low,
            "auroc_high": one.auroc.high,
            "auroc_shuffled": one.shuffled.value,
            "auroc_shuffled_low": one.shuffled.low,
            "auroc_shuffled_high": one.shuffled.high,
            "auroc_token_ids": one.token_ids,
            "n_fitted": one.n_fitted,
            "n_judged": one.n_judged,
            "file": str(file),
        }
        for one, file in zip(fitted, files, strict=True)
    ]
