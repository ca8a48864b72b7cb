"""Estimated effects against exact ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from memlens.figures import theme
from memlens.figures.labels import metric_text, plain

_AXES = ("estimate", "exact")


def scatter_agreement(
    sites: xr.Dataset, *, metric: str, title: str = "Estimated and exact effects", subtitle: str = ""
) -> go.Figure:
    """Draw each site's exact effect (up) against its estimate (right); on the dashed line both are equal.

    Args:
        sites: `estimate` and `exact` `[statistic, site]`, and along `site` the coordinates `label` and
            `chosen`, which gives the color.
        metric: what the effects are changes of.
        title: what is shown.
        subtitle: on how many sequences, and how well both agree.
    """
    fig = go.Figure()
    text = metric_text(metric)
    groups = list(dict.fromkeys(str(value) for value in sites["chosen"].values))
    ends = np.array([f(sites[n].values) for n in ("estimate", "exact") for f in (np.nanmin, np.nanmax)])
    line = [float(min(0.0, ends.min())), float(max(0.0, ends.max()))]
    fig.add_trace(
        go.Scatter(
            x=line, y=line, mode="lines", name="equal", showlegend=True, hoverinfo="skip",
            line={"color": "#9aa5b1", "dash": "dash", "width": 1.5},
        )
    )  # fmt: skip
    for group, color in zip(groups, theme.group_colors(groups), strict=True):
        fig.add_trace(_dots(sites.isel(site=sites["chosen"].values == group), group, color))
    fig.update_xaxes(title_text=f"estimated change in {text.axis}", zeroline=True)
    fig.update_yaxes(title_text="exact change", zeroline=True)
    return theme.figure(fig, title=title, subtitle=subtitle, height=480)


def _dots(part: xr.Dataset, name: str, color: str) -> go.Scatter:
    x, y = (part[n].sel(statistic="mean").values for n in _AXES)
    bars = [_bars(part[n], color) for n in _AXES]
    return go.Scatter(
        x=x, y=y, mode="markers", name=plain(name), showlegend=True, error_x=bars[0], error_y=bars[1],
        marker={"color": color, "size": 8},
        text=[plain(value) for value in part["label"].values],
        customdata=np.concatenate([part[n].sel(statistic=["low", "high"]).values for n in _AXES]).T,
        hovertemplate="%{text}<br>estimate %{x:.4g} [%{customdata[0]:.4g}, %{customdata[1]:.4g}]<br>"
        "exact %{y:.4g} [%{customdata[2]:.4g}, %{customdata[3]:.4g}]<extra></extra>",
    )  # fmt: skip


def _bars(array: xr.DataArray, color: str) -> dict[str, Any]:
    mean, low, high = (array.sel(statistic=name).values for name in ("mean", "low", "high"))
    return {
        "type": "data", "symmetric": False, "array": high - mean, "arrayminus": mean - low,
        "color": theme.translucent(color, 0.5), "thickness": 1,
    }  # fmt: skip
