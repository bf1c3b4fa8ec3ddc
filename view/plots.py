"""Bokeh figures that are built once and then only given other numbers: lines over tokens, points, heatmaps."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import panel as pn
from bokeh.events import RangesUpdate, Tap
from bokeh.models import (
    BasicTicker,
    ColorBar,
    ColumnDataSource,
    CustomJS,
    CustomJSHover,
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

__all__ = ["COLOURS", "SINK", "Heatmap", "Lines", "Look", "diverging", "robust_range", "thin"]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#56b4e9", "#7f3c8d", "#8c564b", "#6b6b6b", "#11a579")
"""Okabe and Ito's, and some beside them; line styles tell apart those that come again."""
DASHES = ("solid", "dashed", "dotted", "dotdash")
ROLES = {"system": "#94a83d", "user": "#3a86d8", "assistant": "#2a9d5c", "tool": "#d9822b", "none": "#8a8a8a"}
BELOW, ABOVE = (43, 131, 226), (230, 97, 1)
STATIC = Path(__file__).with_name("static")
TOOLS = "pan,xwheel_zoom,box_zoom,reset"
SINK = 4
MOST_POINTS = 3000
"""Of one curve: more than a screen has columns for."""
TEXT_AT = "const all = texts.data.text; return all.length > value ? all[Math.round(value)] : '';"
Floats = NDArray[Any]
Curve = tuple[NDArray[np.float32], ...]
"""Values, and perhaps a lower and an upper bound."""


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


def thin(x: Floats, y: Floats, *, between: tuple[float, float], most: int = MOST_POINTS) -> NDArray[np.int64]:
    """Return the points that show a curve: all of a short curve or part, else each run's smallest and largest.

    Parameters
    ----------
    x, y : arrays (point,)
        x ascending.
    between : (float, float)
        The part of x that is seen; one point more to each side is kept, so that the line leaves the frame.
    most : int
        Points at most.
    """
    if len(x) <= most:
        return np.arange(len(x))
    first = max(0, int(np.searchsorted(x, between[0])) - 1)
    last = min(len(x), int(np.searchsorted(x, between[1], side="right")) + 1)
    if last - first <= most:
        return np.arange(first, last)
    size = -(-(last - first) // (most // 2))
    runs = -(-(last - first) // size)
    padded = np.full(runs * size, np.nan)
    padded[: last - first] = y[first:last]
    known = np.isfinite(padded).reshape(runs, size)
    rows = padded.reshape(runs, size)
    ends = (np.where(known, rows, np.inf).argmin(axis=1), np.where(known, rows, -np.inf).argmax(axis=1))
    places = np.unique(np.concatenate([first + np.arange(runs) * size + end for end in ends]))
    return places[places < last]


class _Plot:
    """A figure with buttons that save it."""

    def __init__(self, plot: Any, *, look: Look, name: str) -> None:
        self.plot, self.look, self.name = plot, look, name
        look.dress(plot)
        self.saved = ColumnDataSource()

    def table(self) -> dict[str, Any]:
        """All that is drawn, by heading."""
        raise NotImplementedError

    def panel(self, *, static: bool = False) -> pn.Column:
        """The figure, its title and its buttons.

        Parameters
        ----------
        static : bool
            There will be no server to ask for the numbers, so that they go with the page.
        """
        stem = self.name.replace(" ", "-")
        code = (STATIC / "download.js").read_text(encoding="utf-8")
        args: dict[str, Any] = {"figure": self.plot, "saved": self.saved, "stem": stem}
        buttons = []
        for kind in ("png", "svg", "csv"):
            button = pn.widgets.Button(name=kind.upper(), css_classes=["save"], height=26, margin=(0, 2))
            buttons.append(button)
            if kind != "csv" or static:
                button.js_on_click(args=args, code=f"const kind = {kind!r};\n{code}")
        if static:
            self.saved.data = self.table()
        else:
            self.saved.js_on_change("data", CustomJS(args=args, code=f'const kind = "csv";\n{code}'))
            buttons[-1].on_click(lambda _: self._save())
        drawn = pn.pane.Bokeh(self.plot, sizing_mode="stretch_width", margin=0)
        row = pn.Row(*buttons, align="end", margin=0)
        return pn.Column(drawn, row, sizing_mode="stretch_width", margin=(0, 0, 10, 0))

    def _save(self) -> None:
        self.saved.data = {}
        self.saved.data = self.table()


class Lines(_Plot):
    """Curves over one axis, with a cursor, bands and marks.

    Of a long curve only what a screen can show is sent, the smallest and largest value of each run of points; a part
    that is zoomed into is sent as it is.

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
        plot = figure(
            height=height,
            sizing_mode="stretch_width",
            title=name,
            tools=TOOLS,
            toolbar_location="above",
            active_scroll=None,
            x_axis_label=x,
            y_axis_label=y,
            x_range=Range1d(0, 1),
            y_range=Range1d(-1, 1),
            name=name.replace(" ", "-"),
        )
        super().__init__(plot, look=look, name=name)
        self._x_label = x
        self._lines, self._areas = list[Any](), dict[int, Any]()
        self._x: Floats = np.empty(0)
        self._curves: dict[str, Curve] = {}
        self._shown: tuple[str, ...] = ()
        self._texts = ColumnDataSource({"text": []})
        self._hover = CustomJSHover(args={"texts": self._texts}, code=TEXT_AT)
        self.bands = ColumnDataSource({"x0": [], "x1": [], "colour": [], "alpha": [], "label": []})
        self._dress()
        plot.on_event(RangesUpdate, lambda event: self._zoomed(event.x0, event.x1))
        if tapped is not None:
            plot.on_event(Tap, lambda event: tapped(event.x))

    def _dress(self) -> None:
        plot, look = self.plot, self.look
        strips = {"fill_color": "colour", "fill_alpha": "alpha", "line_color": None, "level": "underlay"}
        plot.vstrip(x0="x0", x1="x1", source=self.bands, **strips)
        self.legend = Legend(click_policy="hide", location="center", orientation="vertical")
        look.dress_legend(self.legend)
        plot.add_layout(self.legend, "right")
        upright: dict[str, Any] = {"dimension": "height", "visible": False}
        self.cursor = Span(line_color=look.ink, line_width=1, name="cursor", **upright)
        self.fork = Span(line_color="#d55e00", line_dash="dashed", line_width=2, name="fork", **upright)
        self.zero = Span(location=0, dimension="width", line_color=look.ink, line_width=0.5, line_alpha=0.5)
        for mark in (self.cursor, self.fork, self.zero):
            plot.add_layout(mark)
        tooltips = [("", "$name"), (self._x_label, "$snap_x"), ("text", "@x{custom}"), ("value", "$snap_y")]
        settings: dict[str, Any] = {"line_policy": "nearest", "formatters": {"@x": self._hover}, "visible": False}
        self._pointed = HoverTool(renderers=[], tooltips=tooltips, **settings)
        plot.add_tools(self._pointed)

    def draw(
        self,
        x: ArrayLike,
        curves: Mapping[str, ArrayLike],
        *,
        bands: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
        texts: Sequence[str] | None = None,
        shown: Sequence[str] | None = None,
    ) -> None:
        """Show other curves.

        Parameters
        ----------
        x : array (point,)
            Ascending.
        curves : mapping of name to array (point,)
        bands : mapping of a curve's name to its lower and upper bound
        texts : sequence of str, optional
            What stands at each point, for the hover.
        shown : sequence of str, optional
            What the legend calls each curve; its name where it is left out. A legend whose words stay is not laid out
            anew.
        """
        self._x = np.asarray(x)
        self._curves = {
            name: tuple(np.asarray(one, np.float32) for one in (values, *((bands or {}).get(name, ()))))
            for name, values in curves.items()
        }
        given = list(texts or [])
        if self._texts.data["text"] != given:
            self._texts.data = {"text": given}
        while len(self._lines) < len(curves):
            self._add()
        columns = [one for curve in self._curves.values() for one in curve]
        self._frame(np.stack(columns, axis=1) if columns else np.empty((0, 0)))
        self._send(float(self.plot.x_range.start), float(self.plot.x_range.end))
        self._name(list(curves), list(shown or curves))  # last: a curve has its name when its numbers are there

    def table(self) -> dict[str, Any]:
        """All that is drawn, by heading; nothing is thinned out."""
        columns: dict[str, Any] = {self._x_label: self._x}
        texts = self._texts.data["text"]
        if len(texts) == len(self._x) and len(texts):
            columns["text"] = texts
        for name, curve in self._curves.items():
            columns |= dict(zip((name, f"{name} low", f"{name} high"), curve, strict=False))
        return columns

    def _frame(self, values: Floats) -> None:
        x = self._x
        low, high = robust_range(values, skip=SINK if not len(x) or x[0] == 0 else 0)
        self.plot.y_range.update(start=low, end=high, reset_start=low, reset_end=high)
        first, last = (float(x[0]), float(x[-1])) if len(x) > 1 else (0.0, 1.0)
        if (self.plot.x_range.reset_start, self.plot.x_range.reset_end) != (first, last):
            self.plot.x_range.update(start=first, end=last, reset_start=first, reset_end=last)

    def _zoomed(self, start: float, end: float) -> None:
        if len(self._x) > MOST_POINTS:
            self._send(start, end)

    def _send(self, start: float, end: float) -> None:
        for j, curve in enumerate(self._curves.values()):
            places = thin(self._x, curve[0], between=(start, end))
            data = {"x": self._x[places], "y": curve[0][places]}
            if len(curve) > 1:
                data |= {"low": curve[1][places], "high": curve[2][places]}
            elif j in self._areas:
                data |= {"low": data["y"], "high": data["y"]}
            self._lines[j].data_source.data = data

    def _add(self) -> None:
        """Add one more curve, drawn when it has a name."""
        source = ColumnDataSource({name: [] for name in ("x", "y")})
        self._lines.append(self.plot.line("x", "y", source=source, line_width=1.6))
        self._pointed.renderers = list(self._lines)

    def _area(self, j: int) -> Any:
        """Return the band of a curve, which shares its numbers; made for the first curve that has one."""
        if j not in self._areas:
            source = self._lines[j].data_source
            self._areas[j] = self.plot.varea("x", "low", "high", source=source, fill_alpha=0.2)
        return self._areas[j]

    def _name(self, names: Sequence[str], shown: Sequence[str]) -> None:
        """Name the curves, and what the legend calls them; one that a reader hid by its legend stays hidden."""
        hidden = {word for word, line in zip(self._shown, self._lines, strict=False) if not line.visible}
        self._shown = tuple(shown)
        for j, line in enumerate(self._lines):
            if j < len(names):
                colour, dash = COLOURS[j % len(COLOURS)], DASHES[(j // len(COLOURS)) % len(DASHES)]
                line.name = names[j]
                line.glyph.update(line_color=colour, line_dash=dash)
                if len(self._curves[names[j]]) > 1:
                    self._area(j).glyph.fill_color = colour
            line.visible = j < len(names) and shown[j] not in hidden  # last: what is shown has its name
        for j, area in self._areas.items():
            area.visible = self._lines[j].visible and len(self._curves[names[j]]) > 1
        drawn = [[line, *([self._areas[j]] if j in self._areas else [])] for j, line in enumerate(self._lines)]
        items = list(zip(shown, drawn, strict=False))
        if [(item.label.value, item.renderers) for item in self.legend.items] != items:
            self.legend.items = [LegendItem(label=word, renderers=renderers) for word, renderers in items]

    def look_at(self, start: float, end: float) -> None:
        """Show this part of the curves first; the reset button shows all."""
        self.plot.x_range.update(start=start, end=end)
        self._send(start, end)

    def fit_height(self) -> None:
        """Give the y axis the range of what is shown of x; the reset button shows all."""
        bounds = (float(self.plot.x_range.start), float(self.plot.x_range.end))
        first, stop = (int(place) for place in np.searchsorted(self._x, bounds, side="left"))
        seen = [
            one[max(first, SINK if len(self._x) and self._x[0] == 0 else 0) : stop + 1]
            for curve in self._curves.values()
            for one in curve
        ]
        if seen and len(seen[0]):
            low, high = robust_range(np.stack(seen, axis=1), skip=0)
            self.plot.y_range.update(start=low, end=high)

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
            toolbar_location="above",
            active_scroll=None,
            x_axis_label=x,
            x_range=Range1d(0, 1),
            y_range=Range1d(0, 1),
            name=name.replace(" ", "-"),
        )
        super().__init__(plot, look=look, name=name)
        self.source = source
        self._rows: list[str] = []
        self._columns: list[str] = []
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
        if tapped is not None:
            plot.on_event(Tap, lambda event: tapped(int(event.x), int(event.y)))

    def table(self) -> dict[str, Any]:
        """A row for each of the matrix."""
        image, axis = self.source.data["image"][0], self.plot.below[0].axis_label
        # a heading that is a number alone would come before all others in JavaScript
        return {"": self._rows, **{f"{axis} {name}": image[:, j] for j, name in enumerate(self._columns) if self._rows}}

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
        self._rows, self._columns = list(rows), names
        plot = self.plot
        upright = named_columns and n_columns > 6  # names that stand need room below the axis
        room = min(120, 6 * max((len(name) for name in names), default=0)) if upright else 0
        plot.height = 90 + room + 20 * max(2, min(n_rows, 24))
        for bounds, size in ((plot.x_range, max(1, n_columns)), (plot.y_range, max(1, n_rows))):
            bounds.update(start=0, end=size, reset_start=0, reset_end=size)
        _label(plot.yaxis[0], rows, step=max(1, -(-n_rows // 24)))
        if named_columns:
            _label(plot.xaxis[0], names, step=max(1, -(-n_columns // 30)))
            plot.xaxis[0].major_label_orientation = 0.9 if upright else 0.0

    def show_cursor(self, at: float | None) -> None:
        """Mark the pinned token."""
        self.cursor.update(visible=at is not None, **({} if at is None else {"location": at + 0.5}))


def _label(axis: Any, names: Sequence[str], *, step: int) -> None:
    places = list(range(0, len(names), step))
    axis.ticker = FixedTicker(ticks=[place + 0.5 for place in places])
    axis.major_label_overrides = {place + 0.5: str(names[place]) for place in places}
