"""Figures of several panels, and dots with intervals on both axes.

Logit attribution, recall against the number of copies, estimated against exact effects, and recitation
against ability.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from memlens.figures import theme
from memlens.figures.heatmaps import heatmap_trace
from memlens.figures.labels import hover, metric_text, plain
from memlens.figures.lines import line_traces


def attribution_panels(
    ci: xr.Dataset, *, title: str = "What writes the target's logit", subtitle: str = ""
) -> go.Figure:
    """Draw the heads' direct effects as a map, and the layers' attention and MLP as bars next to it.

    Args:
        ci: `head_logit` `[statistic, layer, head]` (optional) and `attn`, `mlp` `[statistic, layer]`,
            in logits; positive pushes toward the target.
        title: Title of the figure.
        subtitle: Number of sequences.
    """
    maps = [str(name) for name, array in ci.data_vars.items() if "head" in array.dims]
    widths = [0.56, 0.44] if maps else [1.0]
    fig = make_subplots(1, len(widths), shared_yaxes=True, column_widths=widths, horizontal_spacing=0.2)
    if maps:
        trace = heatmap_trace(ci[maps[0]], "head", metric_text("head_logit"), signed=True)
        trace.update(colorbar={"x": 0.46, "xanchor": "left", "title": {"text": "logits", "side": "top"}})
        fig.add_trace(trace, row=1, col=1)
        fig.update_xaxes(
            title_text="head", showgrid=False, tick0=0, dtick=theme.tick_step(ci.sizes["head"]), col=1
        )
    for name, color in (("attn", theme.OKABE_ITO[0]), ("mlp", theme.OKABE_ITO[4])):
        if name in ci:
            fig.add_trace(_layer_bars(ci[name], name, color), row=1, col=len(widths))
    fig.update_xaxes(title_text="direct effect (logits)", col=len(widths))
    fig.update_yaxes(theme.layer_axis(ci["layer"].values, ""))
    fig.update_yaxes(showticklabels=True)
    fig.update_yaxes(title_text="layer", col=1)
    fig.update_layout(barmode="group", legend={"x": 1, "xanchor": "right"})
    height = int(np.clip(230 + 28 * ci.sizes["layer"], 360, 900))
    return theme.figure(fig, title=title, subtitle=subtitle, height=height)


def _layer_bars(array: xr.DataArray, name: str, color: str) -> go.Bar:
    mean, low, high = (array.sel(statistic=key).values for key in ("mean", "low", "high"))
    label = metric_text(name).label
    return go.Bar(
        y=array["layer"].values,
        x=mean,
        orientation="h",
        name=label,
        showlegend=True,
        marker_color=color,
        error_x={
            "type": "data",
            "symmetric": False,
            "array": high - mean,
            "arrayminus": mean - low,
            "width": 2,
        },
        customdata=np.stack([low, high], -1),
        hovertemplate=hover(f"layer %{{y}} · {label}", "%{x:.4g}", unit="logits"),
    )


def recall_panels(
    values: xr.DataArray,
    ci: xr.Dataset | None = None,
    *,
    title: str = "What the model recalls",
    subtitle: str = "",
) -> go.Figure:
    """Draw recall rates against a group such as the number of copies, and the histogram of one metric.

    Args:
        values: One value per sequence, for the histogram.
        ci: Variables `[statistic, group]` that are shares; None draws the histogram only.
        title: Title of the figure.
        subtitle: Number of sequences.
    """
    text = metric_text(str(values.name), values)
    fig = make_subplots(1, 2 if ci is not None else 1, horizontal_spacing=0.18)
    if ci is not None:
        _add_curves(fig, ci, [str(name) for name in ci.data_vars])
    finite = values.values[np.isfinite(values.values.astype(float))].astype(float)
    fig.add_trace(
        go.Histogram(
            x=finite,
            nbinsx=24,
            marker_color=theme.OKABE_ITO[0],
            showlegend=False,
            hovertemplate=f"{text.label} %{{x}}<br>%{{y}} sequences<extra></extra>",
        ),
        row=1,
        col=2 if ci is not None else 1,
    )
    last = 2 if ci is not None else 1
    fig.update_xaxes(title_text=text.axis, col=last)
    fig.update_yaxes(title_text="sequences", col=last)
    fig.update_layout(bargap=0.04)
    return theme.figure(fig, title=title, subtitle=subtitle, height=460)


def _add_curves(fig: go.Figure, ci: xr.Dataset, names: list[str]) -> None:
    group = next(str(dim) for dim in ci[names[0]].dims if dim != "statistic")
    for name, color in zip(names, theme.OKABE_ITO, strict=False):
        text = metric_text(name, ci[name])
        places = ci.assign_coords({group: [plain(_short(value)) for value in ci[group].values]})
        band, line = line_traces(places[name], text, x=group)
        band.update(fillcolor=theme.translucent(color), legendgroup=name)
        line.update(line_color=color, showlegend=True, legendgroup=name)
        fig.add_traces([band, line], rows=1, cols=1)
    order = [plain(_short(value)) for value in ci[group].values]
    fig.update_xaxes(
        title_text=plain(group), type="category", categoryorder="array", categoryarray=order, col=1
    )
    fig.update_yaxes(title_text="share", range=[-0.03, 1.03], col=1)


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, int | float | np.number) else str(value)


_AXES = ("estimate", "exact")


def scatter_agreement(
    sites: xr.Dataset, *, metric: str, title: str = "Estimated and exact effects", subtitle: str = ""
) -> go.Figure:
    """Draw each site's exact effect (up) against its estimate (right); on the dashed line they are equal.

    Args:
        sites: `estimate` and `exact` `[statistic, site]`, and along `site` the coordinates `label` and
            `chosen`, which gives the color.
        metric: The metric whose change the effects are.
        title: Title of the figure.
        subtitle: Number of sequences, and how well the two agree.
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
    ends = [[part[n].sel(statistic=s).values for s in ("mean", "low", "high")] for n in _AXES]
    shade = theme.translucent(color, 0.5)
    bars = [theme.error_bars(mean, low, high, shade, 1) for mean, low, high in ends]
    return go.Scatter(
        x=ends[0][0], y=ends[1][0], mode="markers", name=plain(name), showlegend=True,
        error_x=bars[0], error_y=bars[1],
        marker={"color": color, "size": 8},
        text=[plain(value) for value in part["label"].values],
        customdata=np.concatenate([part[n].sel(statistic=["low", "high"]).values for n in _AXES]).T,
        hovertemplate="%{text}<br>estimate %{x:.4g} [%{customdata[0]:.4g}, %{customdata[1]:.4g}]<br>"
        "exact %{y:.4g} [%{customdata[2]:.4g}, %{customdata[3]:.4g}]<extra></extra>",
    )  # fmt: skip


_LABELLED = 12
"""The most dots of a panel with labels; with more, labels appear on hovering only."""


def frontier_panels(
    data: xr.Dataset,
    exact: xr.DataArray,
    base: Mapping[str, float],
    *,
    title: str = "Recitation against ability",
    subtitle: str = "",
) -> go.Figure:
    """Draw exact match (up) against accuracy (right) with intervals; dashed lines mark the unchanged model.

    Args:
        data: `accuracy`, `accuracy_low`, `accuracy_high`, `accuracy_base` `(scope, site)`, and along `site`
            `model`, `label`, `depth` (0 to 1) and `size`.
        exact: `[statistic, site]`.
        base: Exact match of each unchanged model.
        title: Title of the figure.
        subtitle: What the points are.
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
    gray = "rgba(90,100,110,0.35)"
    ends = [float(np.nanmin([start, *left])), float(np.nanmax([start, *right]))]
    dots = go.Scatter(
        x=x, y=mean, mode="markers+text" if few else "markers", text=labels, textposition="top center",
        textfont={"size": 10, "color": "#52606d"}, showlegend=False,
        error_x=theme.error_bars(x, left, right, gray, 1), error_y=theme.error_bars(mean, low, high, gray, 1),
        marker={
            "color": part["depth"].values, "cmin": 0, "cmax": 1, "colorscale": theme.magnitude_scale(),
            "size": 9 + 2 * np.minimum(part["size"].values - 1, 4), "line": {"width": 0.5, "color": "white"},
            "showscale": bar,
            "colorbar": theme.color_bar("depth"),
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
    return [go.Scatter(x=[start, start], y=[0, 1], **line), go.Scatter(x=ends, y=[base, base], **line), dots]
