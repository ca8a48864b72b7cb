"""The explorer's figures in a notebook, drawn by plotly's script in the browser."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets as widgets
import plotly.graph_objects as go
import traitlets
from plotly.offline import get_plotlyjs

from memlens.files import json_text

_CSS = """
.memlens-figures { container-type: inline-size; }
.memlens-figures .js-plotly-plot .plotly .modebar { top: 32px; }
@container (max-width: 420px) { .memlens-figures .js-plotly-plot .plotly .modebar { display: none; } }
"""
"""Figures follow a cell that gets narrower; plotly's buttons lie beside the subtitle, not on the title."""


class _Plots(anywidget.AnyWidget):
    """All figures of an explorer, one below the other.

    A `FigureWidget` has plotly's script (5 MB) as its module, each figure its own. A slow or busy browser
    does not load three of them within the two seconds that anywidget allows; such figures stay empty, and get
    no message any more. Here the module is small, the script comes once, as data that may take its time, and
    figures come through models of ipywidgets, which wait for no module. A figure is drawn when it is on the
    page, as wide as the cell, and always as last sent.

    Args:
        figures: By kind ("lens", "effects", "attention").
        on_click: Called with the kind, the number of the trace, and row and column of the cell that was
            clicked.

    Attributes:
        script: Plotly's script.
        sources: By kind, the id of the model whose value is the figure as JSON.
        shown: By kind, that model.
    """

    _esm = Path(__file__).with_name("plots.js")
    _css = _CSS
    script: Any = traitlets.Unicode().tag(sync=True)
    sources: Any = traitlets.Dict().tag(sync=True)
    shown: dict[str, Any]

    def __init__(
        self, figures: Mapping[str, go.Figure], on_click: Callable[[str, int, int, int], None]
    ) -> None:
        self.shown = {kind: widgets.Label(_json(figure)) for kind, figure in figures.items()}
        sources = {kind: shown.model_id for kind, shown in self.shown.items()}
        super().__init__(script=get_plotlyjs(), sources=sources, layout={"width": "100%"})
        self._on_click = on_click
        self.on_msg(self._heard)

    def draw(self, kind: str, figure: go.Figure) -> None:
        """Show another figure of a kind."""
        self.shown[kind].value = _json(figure)

    def _heard(self, widget: Any, content: Mapping[str, Any], buffers: Any) -> None:
        if "clicked" in content:
            row, column = content["cell"]
            self._on_click(content["clicked"], int(content["trace"]), int(row), int(column))


def show_plots(figures: Mapping[str, go.Figure], on_click: Callable[[str, int, int, int], None]) -> Any:
    """Return the widget that shows figures by kind; `draw(kind, figure)` shows another one of a kind.

    Args:
        figures: By kind ("lens", "effects", "attention").
        on_click: Called with the kind, the number of the trace, and row and column of the cell that was
            clicked.
    """
    return _Plots(figures, on_click)


def _json(figure: go.Figure) -> str:
    """Return a figure as strictly valid JSON, with null for NaN and infinity."""
    parts: Any = figure
    traces = [trace.to_plotly_json() for trace in parts.data]
    return json_text({"data": traces, "layout": parts.layout.to_plotly_json()})
