"""The table of directions as it is printed: which were scored, why these, and their mean score."""

from typing import Any

import numpy as np
import xarray as xr

from project.selection import Selection

__all__ = ["direction_rows"]

_NAMES = ("trait", "layer", "requested", "method", "component", "source", "why", "sha256", "baseline", "file")


def direction_rows(chosen: Selection, found: xr.Dataset | None, *, segment: str | None = None) -> list[dict[str, Any]]:
    """Return a row for each direction; `mean_score` is over all tokens, or those of a segment, None where unknown."""
    means: dict[tuple[str, int], float] = {}
    if found is not None:
        kept = found if segment is None else found.isel(token=np.flatnonzero(found.segment.values == segment))
        wide = kept.score.values.astype(np.float64)
        there = np.isfinite(wide)
        for j, key in enumerate(zip(found.sha256.values, found.layer.values, strict=True)):
            if there[:, j].any():
                means[str(key[0]), int(key[1])] = float(wide[there[:, j], j].mean())
    return [
        {
            **{name: row[name] for name in _NAMES},
            "vector_position": row["position"],
            "mean_score": means.get((str(row["sha256"]), int(row["layer"]))),
        }
        for row in chosen.directions.to_dict("records")
    ]
