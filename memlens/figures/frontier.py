"""Recitation against ability: one panel a model, one dot for each bypass, colored by depth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from memlens.figures import theme
from memlens.figures.labels import plain

_LABELLED = 12
"""Dots of a panel that carry their label; of more, only the hover tells."""


def frontier_panels(
    data: xr.Dataset,
    exact: xr.DataArray,
    base: Mapping[str, float],
    *,
    title: str = "Recitation against ability",
    subtitle: str = "",
) -> go.Figure:
    """Draw exact match (up) against accuracy (right) with intervals, the unchanged model as dashed lines.

    Args:
        data: `accuracy`, `accuracy_low`, `accuracy_high`, `accuracy_base` `(scope, site)`, and along `site`
            `model`, `label`, `depth` (0 to 1) and `size`.
        exact: `[statistic, site]`.
        base: Exact match of each unchanged model.
        title: What is shown.
        subtitle: On what.
    """
    models = list(base)
    fig = make_subplots(
        1, len(models), shared_yaxes=True, horizontal_spacing=0.04,
        subplot_titles=[plain(name) for name in models] if len(models) > 1 else None,
    )  # fmt: skip
    scopes = [str(value) for value in data["scope"].values]
    owners = []
    for column, model in enumerate(models, 1):
        mine = data["model"].values == model
        for owner, scope in enumerate(scopes):
            part = data.sel(scope=scope).isel(site=mine)
            traces = _panel(part, exact.isel(site=mine), base[model], bar=column == len(models))
            for trace in traces:
                fig.add_trace(trace, row=1, col=column)
            owners += [owner] * len(traces)
    fig.update_xaxes(title_text="accuracy", zeroline=False)
    fig.update_yaxes(title_text="exact match", row=1, col=1)
    fig.update_yaxes(range=[-0.05, 1.08], zeroline=False)
    theme.figure(fig, title=title, subtitle=subtitle, height=520, menu=len(scopes) > 1)
    if len(scopes) > 1:
        theme.dropdown(fig, scopes, owners, {})
    fig.update_layout(margin={"r": 96})
    return fig


def _panel(part: xr.Dataset, exact: xr.DataArray, base: float, *, bar: bool) -> list[go.Scatter]:
    mean, low, high = (exact.sel(statistic=name).values for name in ("mean", "low", "high"))
    x, left, right = (part[name].values for name in ("accuracy", "accuracy_low", "accuracy_high"))
    start = float(part["accuracy_base"].values[0])
    labels = [plain(value) for value in part["label"].values]
    few = len(labels) <= _LABELLED
    error: dict[str, Any] = {
        "type": "data",
        "symmetric": False,
        "color": "rgba(90,100,110,0.35)",
        "thickness": 1,
    }
    ends = [float(min(start, np.nanmin(left))), float(max(start, np.nanmax(right)))]
    dots = go.Scatter(
        x=x, y=mean, mode="markers+text" if few else "markers", text=labels, textposition="top center",
        textfont={"size": 10, "color": "#52606d"}, showlegend=False,
        error_x={**error, "array": right - x, "arrayminus": x - left},
        error_y={**error, "array": high - mean, "arrayminus": mean - low},
        marker={
            "color": part["depth"].values, "cmin": 0, "cmax": 1, "colorscale": theme.magnitude_scale(),
            "size": 9 + 2 * np.minimum(part["size"].values - 1, 4), "line": {"width": 0.5, "color": "white"},
            "showscale": bar,
            "colorbar": {"title": {"text": "depth"}, "thickness": 12, "len": 0.8},
        },
        customdata=np.stack([left, right, low, high, part["depth"].values], -1),
        hovertemplate=(
            "layers %{text}<br>exact match %{y:.3g} [%{customdata[2]:.3g}, %{customdata[3]:.3g}]<br>"
            "accuracy %{x:.3g} [%{customdata[0]:.3g}, %{customdata[1]:.3g}]<br>"
            "depth %{customdata[4]:.2f}<extra></extra>"
        ),
    )  # fmt: skip
    line: dict[str, Any] = {
        "mode": "lines", "showlegend": False, "hoverinfo": "skip",
        "line": {"dash": "dash", "width": 1.2, "color": "#9aa5b1"},
    }  # fmt: skip
    return [
        go.Scatter(x=[start, start], y=[0, 1], **line),
        go.Scatter(x=ends, y=[base, base], **line),
        dots,
    ]
