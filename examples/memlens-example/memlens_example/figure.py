"""A figure: one bar per layer."""

from __future__ import annotations

import plotly.graph_objects as go

from memlens.figures import TEMPLATE, metric_text
from memlens.results.plots.selection import Selection, takes
from memlens.results.result import Result


@takes(of="effect")
def plot_bars(result: Result, selection: Selection) -> go.Figure:
    """Draw one metric, or its change, as a bar per layer with intervals over sequences."""
    of = selection.of_result(result)
    name = selection.names(result, "layer")[0]
    ci = selection.means(result, [name], ("layer",), of=of)[name]
    mean, low, high = (ci.sel(statistic=part).values for part in ("mean", "low", "high"))
    spread = {"type": "data", "array": high - mean, "arrayminus": mean - low}
    figure = go.Figure(go.Bar(x=ci["layer"].values, y=mean, error_y=spread))
    text = metric_text(name, result[name])
    subtitle = {"text": selection.subtitle(result, of=of)}
    figure.update_layout(
        template=TEMPLATE,
        title={"text": selection.title or "Each MLP scaled", "subtitle": subtitle},
        xaxis_title="layer",
        yaxis_title=f"{text.label} ({text.unit})",
    )
    return figure
