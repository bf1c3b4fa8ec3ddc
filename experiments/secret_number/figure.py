"""The finding as one picture: where it separates, token by token; at which layer; and its controls beside it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from datastore.errors import MisuseError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw", "save_figure"]

_PLACES = {"claim": "token that decides the truth", "start": "first token of the answer", "stop": "full stop"}


def save_figure(found: dict[str, Any], path: Path) -> Path:
    """Draw a finding into a file; its suffix says of which kind.

    Raises
    ------
    MisuseError
        matplotlib is not installed, or draws no such kind of file.
    """
    figure = draw(found)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    except ValueError as error:
        raise MisuseError(f"{path} can't be drawn ({error}); name it OUT.png, OUT.svg or OUT.pdf") from error
    return path


def draw(found: dict[str, Any]) -> "Figure":
    """Return the figure of a finding, as `finding.find` gives it."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MisuseError(
            "a figure needs matplotlib, which is not installed; nothing was drawn, "
            "run: pip install 'activation-datastore[plot]'"
        ) from error
    figure = Figure(figsize=(11, 8), layout="constrained")
    (claim, stop), (layers, controls) = figure.subplots(2, 2)
    _profile(claim, found["profile"], "claim")
    _profile(stop, found["profile"], "stop")
    _layers(layers, found)
    _controls(controls, found["readings"])
    about, answers = found["direction"], found["answers"]
    figure.suptitle(
        f"{about['trait']}, layer {about['layer']}, {about['method']}: {answers['n']} audit answers, "
        f"{answers['false']} false",
        fontsize=11,
    )
    return figure


def _profile(axes: "Axes", profile: dict[str, dict[str, Any]], place: str) -> None:
    for key, label, colour in ((place, "all answers", "C0"), (f"{place}, equal sentences", "equal sentences", "C3")):
        if key not in profile:
            continue
        curve = profile[key]
        axes.plot(curve["offset"], curve["auroc"], marker="o", markersize=4, color=colour, label=label)
        axes.fill_between(curve["offset"], curve["low"], curve["high"], color=colour, alpha=0.15)
        random = (curve["random_low"], curve["random_high"])
        axes.plot(curve["offset"], random[0], color=colour, linewidth=0.7, linestyle=":")
        axes.plot(curve["offset"], random[1], color=colour, linewidth=0.7, linestyle=":", label=f"random, {label}")
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.axhline(0.5, color="grey", linewidth=0.8)
    axes.set_xlabel(f"tokens since the {_PLACES[place]}")
    axes.set_ylabel("AUROC, false over true")
    axes.set_ylim(0, 1.02)
    axes.legend(fontsize=7, loc="lower right")


def _layers(axes: "Axes", found: dict[str, Any]) -> None:
    rows = found["layers"]
    shown = {
        "all_full_stop": ("at the full stop", "C0", "-"),
        "all_before": ("before the answer", "C0", ":"),
        "equal_sentences_full_stop": ("equal sentences", "C3", "-"),
        "equal_sentences_before": ("equal sentences, before the answer", "C3", ":"),
    }
    for key, (label, colour, style) in shown.items():
        kept = [(row["layer"], row[key]) for row in rows if key in row]
        if kept:
            numbers, areas = [layer for layer, _ in kept], [area for _, area in kept]
            values, low, high = ([area[bound] for area in areas] for bound in ("value", "low", "high"))
            axes.plot(numbers, values, marker="o", markersize=4, color=colour, linestyle=style, label=label)
            axes.fill_between(numbers, low, high, color=colour, alpha=0.1)
    axes.axvline(found["direction"]["layer"], color="grey", linewidth=0.8)
    axes.axhline(0.5, color="grey", linewidth=0.8)
    axes.set_xticks([row["layer"] for row in rows])
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("layer (each with its own direction; the grey one was chosen by its fit)")
    axes.set_ylabel("AUROC, false over true")
    axes.legend(fontsize=7, loc="lower right")


def _controls(axes: "Axes", readings: dict[str, dict[str, Any]]) -> None:
    names: list[str] = []
    for reading, colour in (("at the full stop", "C0"), ("equal sentences, at the full stop", "C3")):
        if reading not in readings:
            continue
        one, before = readings[reading], readings[reading.replace("at the full stop", "before the answer")]
        bars = {
            "direction": one["auroc"],
            "the same, before the answer": before["auroc"],
            "token ids only": one["token_ids"],
            "embedding layer": one["embedding"],
            "shuffled labels": one["shuffled_labels"],
            "random directions": one["random_directions"],
        }
        for name, bar in bars.items():
            y, middle = len(names), bar.get("value", bar.get("mean"))
            axes.plot([bar["low"], bar["high"]], [y, y], color=colour, linewidth=2)
            axes.plot([middle], [y], marker="o" if "value" in bar else "|", color=colour)
            names.append(name)
    axes.axvline(0.5, color="grey", linewidth=0.8)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.02)
    axes.set_xlabel("AUROC (blue: all answers, red: equal sentences)")
