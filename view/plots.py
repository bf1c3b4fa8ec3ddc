"""Bokeh figures that are built once and then only given other numbers: lines over tokens, points, heatmaps."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import panel as pn
from bokeh.events import Tap
from bokeh.models import (
    BasicTicker,
    ColorBar,
    ColumnDataSource,
    FixedTicker,
    HoverTool,
    Legend,
    LegendItem,
    LinearColorMapper,
    Range1d,
    Span,
)
from bokeh.plotting import figure
from numpy.typing import ArrayLike, NDArray

__all__ = ["COLOURS", "Heatmap", "Lines", "Look", "diverging", "robust_range"]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#56b4e9", "#7f3c8d", "#8c564b", "#6b6b6b", "#11a579")
"""Okabe and Ito's, and some beside them; line styles tell apart those that come again."""
DASHES = ("solid", "dashed", "dotted", "dotdash")
ROLES = {"system": "#94a83d", "user": "#3a86d8", "assistant": "#2a9d5c", "tool": "#d9822b", "none": "#8a8a8a"}
BELOW, ABOVE = (43, 131, 226), (230, 97, 1)
STATIC = Path(__file__).with_name("static")
TOOLS = "pan,xwheel_zoom,box_zoom,reset"
SINK = 4
Floats = NDArray[np.floating]


class Look:
    """Colours of a figure, light or dark."""

    def __init__(self, *, dark: bool) -> None:
        self.dark = dark
        self.paper, self.ink, self.grid = (
            ("#1b1e23", "#e8e8e8", "#3a3f47") if dark else ("#ffffff", "#1a1a1a", "#e4e4e4")
        )

    def dress(self, plot: Any) -> None:
        """Put a figure into these colours."""
        plot.background_fill_color = plot.border_fill_color = self.paper
        plot.outline_line_color = self.grid
        plot.title.text_color = self.ink
        plot.title.text_font_size = "14px"
        for axis in plot.axis:
            axis.axis_label_text_color = axis.major_label_text_color = self.ink
            axis.axis_line_color = axis.major_tick_line_color = self.ink
            axis.minor_tick_line_color = None
            axis.axis_label_text_font_style = "normal"
        plot.grid.grid_line_color = self.grid
        plot.toolbar.logo = None
        plot.toolbar.autohide = True

    def dress_legend(self, legend: Legend) -> None:
        """Put a legend into these colours."""
        legend.background_fill_color = self.paper
        legend.border_line_color = None
        legend.label_text_color = self.ink
        legend.label_text_font_size = "12px"


def diverging(*, dark: bool) -> list[str]:
    """Return 255 colours from blue over the paper's to orange, which people with colour blindness can tell apart."""
    middle = np.array((27, 30, 35) if dark else (250, 250, 250), float)
    share = np.linspace(-1, 1, 255)[:, np.newaxis]
    ends = np.where(share < 0, np.array(BELOW, float), np.array(ABOVE, float))
    mixed = middle + np.abs(share) * (ends - middle)
    return ["#{:02x}{:02x}{:02x}".format(*row) for row in np.rint(mixed).astype(int).tolist()]


def robust_range(values: ArrayLike, *, skip: int = SINK) -> tuple[float, float]:
    """Return the range of curves, (token, line), that the first tokens do not own: without them, and 15 % added."""
    array = np.asarray(values, np.float64)
    beyond = array[skip:] if len(array) > 2 * skip else array
    finite = beyond[np.isfinite(beyond)]
    if not finite.size:
        return -1.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    room = 0.15 * (high - low) or 0.1 * max(abs(high), 1e-3)
    return low - room, high + room


class _Plot:
    """A figure with buttons that save it."""

    def __init__(self, plot: Any, source: ColumnDataSource, *, look: Look, name: str) -> None:
        self.plot, self.source, self.look, self.name = plot, source, look, name
        look.dress(plot)
        self.columns = ColumnDataSource(tags=[[]])  # which columns the CSV has: (key, heading)
        self.heat: ColumnDataSource | None = None

    def panel(self) -> pn.Column:
        """The figure, its title and its buttons."""
        args: dict[str, Any] = {"figure": self.plot, "source": self.source, "columns": self.columns, "heat": self.heat}
        code = (STATIC / "download.js").read_text(encoding="utf-8")
        buttons = []
        for kind in ("png", "svg", "csv"):
            button = pn.widgets.Button(
                name=kind.upper(),
                description=f"Save {self.name} as {kind.upper()}",
                css_classes=["save", f"save-{kind}", f"save-{self.name.replace(' ', '-')}"],
                height=26,
                margin=(0, 2),
            )
            stem = self.name.replace(" ", "-")
            button.js_on_click(args=args, code=f"const kind = {kind!r}; const name = {stem!r};\n{code}")
            buttons.append(button)
        drawn = pn.pane.Bokeh(self.plot, sizing_mode="stretch_width", margin=0)
        return pn.Column(
            drawn, pn.Row(*buttons, align="end", margin=0), sizing_mode="stretch_width", margin=(0, 0, 10, 0)
        )


class Lines(_Plot):
    """Curves over one axis, with a cursor, bands and marks.

    Parameters
    ----------
    name : str
        What it is called when saved, and its title.
    look : Look
    x, y : str
        Labels of the axes.
    height : int
    tapped : callable, optional
        Called with x when a reader clicks.
    """

    def __init__(
        self,
        name: str,
        look: Look,
        *,
        x: str = "position",
        y: str = "",
        height: int = 320,
        tapped: Callable[[float], None] | None = None,
    ) -> None:
        source = ColumnDataSource({"x": np.empty(0)})
        plot = figure(
            height=height,
            sizing_mode="stretch_width",
            title=name,
            tools=TOOLS,
            active_scroll=None,
            x_axis_label=x,
            y_axis_label=y,
            x_range=Range1d(0, 1),
            y_range=Range1d(-1, 1),
            name=name.replace(" ", "-"),
        )
        super().__init__(plot, source, look=look, name=name)
        self._x_label, self._renderers, self._areas = x, list[Any](), list[Any]()
        self.bands = ColumnDataSource({"x0": [], "x1": [], "colour": [], "alpha": [], "label": []})
        self._add_bands()
        self.legend = Legend(click_policy="hide", location="center", orientation="vertical")
        look.dress_legend(self.legend)
        plot.add_layout(self.legend, "right")
        self.cursor = Span(dimension="height", line_color=look.ink, line_width=1, visible=False, name="cursor")
        self.fork = Span(
            dimension="height", line_color="#d55e00", line_dash="dashed", line_width=2, visible=False, name="fork"
        )
        self.zero = Span(location=0, dimension="width", line_color=look.ink, line_width=0.5, line_alpha=0.5)
        for mark in (self.cursor, self.fork, self.zero):
            plot.add_layout(mark)
        if tapped is not None:
            plot.on_event(Tap, lambda event: tapped(event.x))

    def _add_bands(self) -> None:
        self.plot.vstrip(
            x0="x0",
            x1="x1",
            source=self.bands,
            fill_color="colour",
            fill_alpha="alpha",
            line_color=None,
            level="underlay",
        )

    def draw(
        self,
        x: ArrayLike,
        curves: Mapping[str, ArrayLike],
        *,
        bands: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
        texts: Sequence[str] | None = None,
        colours: Sequence[str] | None = None,
    ) -> None:
        """Show other curves.

        Parameters
        ----------
        x : array (point,)
        curves : mapping of name to array (point,)
        bands : mapping of a curve's name to its lower and upper bound
        texts : sequence of str, optional
            What stands at each point, for the hover.
        colours : sequence of str, optional
        """
        keys = [f"y{j}" for j in range(len(curves))]
        data: dict[str, Any] = {
            "x": np.asarray(x),
            "text": list(texts) if texts is not None else [""] * len(np.asarray(x)),
        }
        data |= {key: np.asarray(values, np.float32) for key, values in zip(keys, curves.values(), strict=True)}
        for j, name in enumerate(curves):
            low, high = (bands or {}).get(name, (data[keys[j]], data[keys[j]]))
            if bands:
                data |= {f"low{j}": np.asarray(low, np.float32), f"high{j}": np.asarray(high, np.float32)}
        headings = [("x", self._x_label), *([("text", "text")] if texts is not None else [])]
        for j, name in enumerate(curves):
            headings += [
                (f"y{j}", name),
                *([(f"low{j}", f"{name} low"), (f"high{j}", f"{name} high")] if bands else []),
            ]
        self._make(len(curves), areas=bool(bands))
        self._give(data)
        self.columns.tags = [headings]
        self._name(list(curves), colours or COLOURS, areas=bool(bands))
        everything = [data[key] for key in keys] + [
            data[f"{side}{j}"] for j in range(len(keys)) for side in ("low", "high") if bands
        ]
        self._frame(np.asarray(x, np.float64), np.stack(everything, axis=1) if everything else np.empty((0, 0)))

    def _give(self, data: dict[str, Any]) -> None:
        """Send only the columns that are other ones, where the points are the same."""
        now: Any = self.source.data
        same = now.keys() == data.keys() and len(now["x"]) == len(data["x"])
        if same and self._same_texts(now["text"], data["text"]) and np.array_equal(now["x"], data["x"]):
            now.update({key: values for key, values in data.items() if key not in ("x", "text")})
        else:
            self.source.data = data

    @staticmethod
    def _same_texts(a: Sequence[str], b: Sequence[str]) -> bool:
        return a is b or list(a) == list(b)

    def _frame(self, x: Floats, values: Floats) -> None:
        low, high = robust_range(values, skip=SINK if not len(x) or x[0] == 0 else 0)
        self.plot.y_range.update(start=low, end=high, reset_start=low, reset_end=high)
        first, last = (float(x[0]), float(x[-1])) if len(x) > 1 else (0.0, 1.0)
        if (self.plot.x_range.reset_start, self.plot.x_range.reset_end) != (first, last):
            self.plot.x_range.update(start=first, end=last, reset_start=first, reset_end=last)

    def _make(self, count: int, *, areas: bool) -> None:
        while areas and len(self._areas) < count:
            j = len(self._areas)
            self._areas.append(self.plot.varea("x", f"low{j}", f"high{j}", source=self.source, fill_alpha=0.2))
        while len(self._renderers) < count:
            j = len(self._renderers)
            line = self.plot.line("x", f"y{j}", source=self.source, line_width=1.6)
            hover = HoverTool(
                renderers=[line],
                line_policy="nearest",
                tooltips=[("", "$name"), (self._x_label, "@x"), ("text", "@text"), ("value", "$snap_y")],
                visible=False,
            )
            self.plot.add_tools(hover)
            self._renderers.append(line)

    def _name(self, names: Sequence[str], colours: Sequence[str], *, areas: bool) -> None:
        items = []
        for j, line in enumerate(self._renderers):
            shown = j < len(names)
            line.visible = shown
            if not shown:
                continue
            line.name = names[j]
            colour, dash = colours[j % len(colours)], DASHES[(j // len(colours)) % len(DASHES)]
            line.glyph.update(line_color=colour, line_dash=dash)
            items.append(LegendItem(label=names[j], renderers=[line]))
        for j, area in enumerate(self._areas):
            area.visible = areas and j < len(names)
            area.glyph.fill_color = colours[j % len(colours)]
        if [item.label.value for item in self.legend.items] != list(names):
            self.legend.items = items

    def show_bands(self, bands: Sequence[tuple[float, float, str, float, str]]) -> None:
        """Shade ranges of x: (from, to, colour, opacity, label)."""
        columns: list[Any] = list(zip(*bands, strict=True)) if bands else [[]] * 5
        self.bands.data = {
            key: list(column) for key, column in zip(("x0", "x1", "colour", "alpha", "label"), columns, strict=True)
        }

    def name_ticks(self, names: Sequence[str] | None) -> None:
        """Write names on the axis at 0, 1, 2...; numbers again for None."""
        axis = self.plot.xaxis[0]
        if names is None:
            axis.ticker, axis.major_label_overrides = BasicTicker(), {}
        else:
            axis.ticker = FixedTicker(ticks=list(range(len(names))))
            axis.major_label_overrides = dict(enumerate(names))

    def show_cursor(self, at: float | None) -> None:
        """Mark the pinned token."""
        self.cursor.update(visible=at is not None, **({} if at is None else {"location": at}))

    def show_fork(self, at: float | None) -> None:
        """Mark where rollouts part."""
        self.fork.update(visible=at is not None, **({} if at is None else {"location": at}))


class Heatmap(_Plot):
    """A matrix as colours, blue below 0 and orange above, with named rows.

    Parameters
    ----------
    name : str
    look : Look
    x, unit : str
        Labels of the axis and of the colours.
    tapped : callable, optional
        Called with the column and row that a reader clicks.
    """

    def __init__(
        self,
        name: str,
        look: Look,
        *,
        x: str = "position",
        unit: str = "",
        tapped: Callable[[int, int], None] | None = None,
    ) -> None:
        source = ColumnDataSource({"image": [np.zeros((1, 1), np.float32)], "dw": [1], "dh": [1]})
        plot = figure(
            height=160,
            sizing_mode="stretch_width",
            title=name,
            tools=TOOLS,
            active_scroll=None,
            x_axis_label=x,
            x_range=Range1d(0, 1),
            y_range=Range1d(0, 1),
            name=name.replace(" ", "-"),
        )
        super().__init__(plot, source, look=look, name=name)
        plot.grid.visible = False
        self.mapper = LinearColorMapper(palette=diverging(dark=look.dark), low=-1, high=1, nan_color="#8a8a8a")
        image = plot.image("image", x=0, y=0, dw="dw", dh="dh", source=source, color_mapper=self.mapper)
        self.bar = ColorBar(
            color_mapper=self.mapper,
            title=unit,
            width=10,
            major_label_text_color=look.ink,
            ticker=BasicTicker(desired_num_ticks=3),
        )
        self.bar.update(title_text_color=look.ink, background_fill_color=look.paper)
        plot.add_layout(self.bar, "right")
        self.cursor = Span(dimension="height", line_color=look.ink, line_width=1, visible=False, name="cursor")
        plot.add_layout(self.cursor)
        plot.add_tools(HoverTool(renderers=[image], tooltips=[(x, "$x{0}"), ("value", "@image")], visible=False))
        self.heat = ColumnDataSource(tags=[{"rows": [], "columns": []}])
        if tapped is not None:
            plot.on_event(Tap, lambda event: tapped(int(event.x), int(event.y)))

    def draw(
        self,
        values: NDArray[np.floating],
        rows: Sequence[str],
        *,
        columns: Sequence[Any] | None = None,
        unit: str = "",
        skip: int = 0,
        named_columns: bool = False,
        limit: float | None = None,
    ) -> None:
        """Show another matrix.

        Parameters
        ----------
        values : array of shape (row, column)
        rows : sequence of str
        columns : sequence, optional
            Names of the columns; their numbers where it is left out.
        unit : str
        skip : int
            First columns that do not count for the range of the colours.
        named_columns : bool
            Write the columns' names on the axis.
        limit : float, optional
            Value of the strongest colour; the 99th percentile of the magnitudes otherwise.
        """
        image = np.ascontiguousarray(values, np.float32)
        n_rows, n_columns = image.shape
        names = [str(name) for name in (columns if columns is not None else range(n_columns))]
        beyond = np.abs(image[:, skip:] if n_columns > 2 * skip else image)
        beyond = beyond[np.isfinite(beyond)]
        top = limit or (float(np.percentile(beyond, 99)) if beyond.size else 1.0) or 1.0
        self.mapper.update(low=-top, high=top)
        self.bar.title = unit
        self.source.data = {"image": [image], "dw": [max(1, n_columns)], "dh": [max(1, n_rows)]}
        assert self.heat is not None
        self.heat.tags = [{"rows": list(rows), "columns": names}]
        plot = self.plot
        plot.height = 90 + 20 * max(2, min(n_rows, 24))
        for bounds, size in ((plot.x_range, max(1, n_columns)), (plot.y_range, max(1, n_rows))):
            bounds.update(start=0, end=size, reset_start=0, reset_end=size)
        _label(plot.yaxis[0], rows, step=max(1, -(-n_rows // 24)))
        if named_columns:
            _label(plot.xaxis[0], names, step=max(1, -(-n_columns // 30)))
            plot.xaxis[0].major_label_orientation = 0.9 if n_columns > 6 else 0.0

    def show_cursor(self, at: float | None) -> None:
        """Mark the pinned token."""
        self.cursor.update(visible=at is not None, **({} if at is None else {"location": at + 0.5}))


def _label(axis: Any, names: Sequence[str], *, step: int) -> None:
    places = list(range(0, len(names), step))
    axis.ticker = FixedTicker(ticks=[place + 0.5 for place in places])
    axis.major_label_overrides = {place + 0.5: str(names[place]) for place in places}
