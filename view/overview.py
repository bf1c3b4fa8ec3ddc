"""The overview of a store: a table of its rollouts, heatmaps, strongest spans, correlations, calibration, captures."""

from typing import Any

import panel as pn

from view.frame import Host, View
from view.heatmaps import Captured, Heatmaps
from view.model_view import Calibration, Correlation
from view.rollout_table import RolloutTable, Spans
from view.tables import choice

__all__ = ["Overview"]


class Overview(View):
    """Sections, of which one is shown; what a section shows is read when it is shown."""

    def __init__(self, page: Host) -> None:
        super().__init__(page)
        self._makers: dict[str, Any] = {
            "Rollouts": RolloutTable,
            "Heatmaps": Heatmaps,
            "Spans": Spans,
            "Correlation": Correlation,
            "Calibration": Calibration,
            "Captured": Captured,
        }
        self._parts: dict[str, View] = {}
        self._stale = {name: frozenset(page.state.param) for name in self._makers}
        sections = choice(page.state.param.section, name="Section")
        self._panel = pn.Column(sections, sizing_mode="stretch_width")

    def panel(self) -> pn.Column:
        """The choice, and the section that is shown."""
        return self._panel

    def update(self, changed: frozenset[str]) -> None:
        """Draw the section that is shown."""
        shown = self.state.section
        for name in self._stale:
            self._stale[name] |= changed
        new = shown not in self._parts
        if new:
            self._parts[shown] = self._makers[shown](self.page)
        for name, part in self._parts.items():
            part.panel().visible = name == shown
        stale, self._stale[shown] = self._stale[shown], frozenset()
        self._parts[shown].update(stale)
        if new:  # drawn before it is sent: the browser would be told of changes to what it does not know yet
            self._panel.append(self._parts[shown].panel())
