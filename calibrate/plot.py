"""A calibration as one picture: massive dimensions, norms and alignment by layer, at true layer numbers."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from datastore.errors import MisuseError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw", "save_plot"]

_MOST_LINES = 10


def save_plot(data: xr.Dataset, path: Path) -> Path:
    """Draw a calibration into a file; its suffix says of which kind.

    Raises
    ------
    MisuseError
        matplotlib is not installed, or draws no such kind of file.
    """
    figure = draw(data)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except ValueError as error:
        raise MisuseError(f"{path} can't be drawn ({error}); name it OUT.png, OUT.svg or OUT.pdf") from error
    return path


def draw(data: xr.Dataset) -> "Figure":
    """Return the figure: |mean| of the top dimensions over that of all, token norms, and alignment."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MisuseError(
            "a plot needs matplotlib, which is not installed; nothing was drawn, "
            "run: pip install 'activation-datastore[plot]'"
        ) from error
    figure = Figure(figsize=(9, 10), layout="constrained")
    dims, norms, aligned = figure.subplots(3, 1, sharex=True)
    layers = np.asarray(data["layer"].values)
    _draw_dims(dims, data, layers)
    _draw_norms(norms, data, layers)
    _draw_alignment(aligned, data, layers)
    aligned.set_xlabel("layer")
    aligned.set_xticks(layers if len(layers) <= 30 else layers[:: len(layers) // 20])
    figure.suptitle(f"{data.attrs['component']}, {data.attrs['n_tokens']} tokens: {data.attrs['tokens']}", fontsize=10)
    return figure


def _draw_dims(axes: "Axes", data: xr.Dataset, layers: Any) -> None:
    top = data["top_dims"].values
    dims, counts = np.unique(top, return_counts=True)
    magnitude = data["dim_magnitude"].values
    order = np.lexsort((-magnitude[:, dims].max(axis=0), -counts))
    for dim in dims[order][:_MOST_LINES].tolist():
        axes.plot(layers, magnitude[:, dim], marker="o", markersize=3, label=f"dim {dim}")
    axes.set_yscale("log")
    axes.set_ylabel("|mean| / mean over dims")
    axes.set_title("massive dimensions")
    axes.legend(fontsize=7, ncols=2)


def _draw_norms(axes: "Axes", data: xr.Dataset, layers: Any) -> None:
    axes.plot(layers, data["norm"].values, marker="o", markersize=3, label=f"{data.attrs['component']}, mean")
    if "component_norm" in data:
        for name, values in zip(data["component"].values, data["component_norm"].values, strict=True):
            if str(name) != data.attrs["component"] and not np.isnan(values).all():
                axes.plot(layers, values, marker="o", markersize=3, label=f"{name}, mean")
    wanted = [float(q) for q in data["quantile"].values]
    low, high = (data["norm_quantiles"].values[:, wanted.index(q)] for q in (0.05, 0.95))
    axes.fill_between(layers, low, high, alpha=0.2, label="5 to 95 % of tokens")
    axes.set_yscale("log")
    axes.set_ylabel("token norm")
    axes.set_title("norms")
    axes.legend(fontsize=7)


def _draw_alignment(axes: "Axes", data: xr.Dataset, layers: Any) -> None:
    axes.plot(layers, data["mean_alignment"].values, marker="o", markersize=3, label="tokens with their mean")
    axes.plot(layers, data["consecutive_cosine"].values, marker="s", markersize=3, label="mean with the next layer's")
    if "alignment_min" in data:
        low, high = data["alignment_min"].values, data["alignment_max"].values
        axes.fill_between(layers, _fold(np.fmin, low), _fold(np.fmax, high), alpha=0.15, label="all tokens")
    axes.set_ylabel("cosine")
    axes.set_title("alignment")
    axes.legend(fontsize=7)


def _fold(how: np.ufunc, values: Any) -> Any:
    return how.reduce(values.reshape(-1, values.shape[-1]), axis=0)
