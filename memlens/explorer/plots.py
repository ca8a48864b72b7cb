"""The explorer's figures in a notebook, drawn by plotly's script in the browser."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import anywidget
import plotly.graph_objects as go
import traitlets
from plotly.offline import get_plotlyjs

from memlens.files import json_text


class Plots(anywidget.AnyWidget):
    """All figures of an explorer, one below the other.

    A `FigureWidget` has plotly's script (5 MB) as its module, each figure its own. On a slow or busy machine
    a browser does not load three of them within the two seconds that anywidget allows, and figures then stay
    empty. Here the script comes once, as data, and may take its time. A figure is drawn when it is on the
    page, as wide as the cell, and always as last sent.

    Args:
        figures: By kind ("lens", "effects", "attention").
        on_click: Called with the kind, the number of the trace, and row and column of the cell that was
            clicked.

    Attributes:
        script: Plotly's script.
        lens: The figure as JSON types.
        effects: The same.
        attention: The same.
    """

    _esm = Path(__file__).with_name("plots.js")
    script: Any = traitlets.Unicode().tag(sync=True)
    lens: Any = traitlets.Dict().tag(sync=True)
    effects: Any = traitlets.Dict().tag(sync=True)
    attention: Any = traitlets.Dict().tag(sync=True)

    def __init__(
        self, figures: Mapping[str, go.Figure], on_click: Callable[[str, int, int, int], None]
    ) -> None:
        drawn = {kind: _plain(figure) for kind, figure in figures.items()}
        super().__init__(script=get_plotlyjs(), layout={"width": "100%"}, **drawn)
        self._on_click = on_click
        self.on_msg(self._heard)

    def draw(self, kind: str, figure: go.Figure) -> None:
        """Show another figure of a kind."""
        self.set_trait(kind, _plain(figure))

    def _heard(self, widget: Any, content: Mapping[str, Any], buffers: Any) -> None:
        if "clicked" in content:
            row, column = content["cell"]
            self._on_click(content["clicked"], int(content["trace"]), int(row), int(column))


def _plain(figure: go.Figure) -> dict[str, Any]:
    """Return a figure as JSON types, with None for NaN and infinity, which messages do not have."""
    parts = {
        "data": [trace.to_plotly_json() for trace in figure.data],
        "layout": figure.layout.to_plotly_json(),
    }
    return json.loads(json_text(parts))
