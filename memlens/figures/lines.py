"""Curves over layers with interval bands, and dots with intervals for lists of interventions."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from memlens.figures import theme
from memlens.figures.labels import MetricText, hover, metric_text, plain


def line_over_layers(
    ci: xr.Dataset,
    *,
    baseline: xr.Dataset | None = None,
    x: str = "layer",
    x_title: str = "",
    title: str = "Each layer in turn",
    subtitle: str = "",
) -> go.Figure:
    """Draw the mean over layers (or another dimension) with its interval as a band, one line per group.

    Args:
        ci: Variables `[statistic, layer]`, or with one more dimension for groups; several give a menu.
        baseline: The same variables without `layer`; drawn as dashed lines.
        x: Name of the dimension to the right.
        x_title: What it is called; its name by default.
        title: Title of the figure.
        subtitle: Number of sequences.
    """
    names = [str(name) for name in ci.data_vars]
    texts = [metric_text(name, ci[name]) for name in names]
    fig, owners = go.Figure(), []
    for owner, (name, text) in enumerate(zip(names, texts, strict=True)):
        traces = line_traces(ci[name], text, x)
        if baseline is not None and name in baseline:
            traces[-1].showlegend = True
            traces += _baseline_traces(baseline[name], ci[x].values)
        fig.add_traces(traces)
        owners += [owner] * len(traces)
    numbers = _layers_right(ci[x].values) if x == "layer" else {"zeroline": False}
    fig.update_xaxes({**numbers, "title": {"text": x_title or x}})
    fig.update_yaxes(title_text=texts[0].axis)
    height = 440 + 20 * max(0, len(_by_group(ci[names[0]], x)) - 2)
    theme.figure(fig, title=title, subtitle=subtitle, height=height, menu=len(names) > 1)
    if len(names) > 1:
        titles = {"yaxis.title.text": [text.axis for text in texts]}
        theme.dropdown(fig, [text.label for text in texts], owners, titles)
    return fig


def decoding_panels(
    ci: xr.Dataset, *, title: str = "What each layer would predict", subtitle: str = ""
) -> go.Figure:
    """Draw the target's probability (above) and rank (below, 1 at the top) over layers, one line per group.

    Args:
        ci: `probability` and `rank`, each `[statistic, layer]` or with a group; `rank` counts from 1 and is
            drawn on a logarithmic axis.
        title: Title of the figure.
        subtitle: Number of sequences.
    """
    fig = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.06)
    texts = (MetricText("probability", "", 1), MetricText("rank", "1 = top", -1))
    for row, (name, text) in enumerate(zip(("probability", "rank"), texts, strict=True), 1):
        for trace in line_traces(ci[name], text):
            trace.showlegend = bool(trace.showlegend) and row == 1
            fig.add_trace(trace, row=row, col=1)
    fig.update_xaxes({**_layers_right(ci["layer"].values), "title": {"text": ""}})
    fig.update_xaxes(title_text="layer", row=2)
    fig.update_yaxes(title_text="mean probability", rangemode="tozero", row=1)
    fig.update_yaxes(theme.log_axis(ci["rank"].values, 150), row=2)
    fig.update_yaxes(title_text="geometric mean rank", autorange="reversed", row=2)
    return theme.figure(fig, title=title, subtitle=subtitle, height=620)


def dots_with_intervals(
    ci: xr.Dataset,
    *,
    dim: str = "intervention",
    most: int = 40,
    title: str = "Every intervention",
    subtitle: str = "",
) -> go.Figure:
    """Draw a dot with its interval for each intervention, sorted by the mean.

    Args:
        ci: Variables `[statistic, dim]`, or with one more dimension for groups; several give a menu.
        dim: The dimension whose entries become rows.
        most: The most rows to draw; the ones farthest from 0 are kept and the subtitle says so.
        title: Title of the figure.
        subtitle: Number of sequences, and what the sign means.
    """
    names = [str(name) for name in ci.data_vars]
    texts = [metric_text(name, ci[name]) for name in names]
    fig, owners, orders = go.Figure(), [], []
    for owner, (name, text) in enumerate(zip(names, texts, strict=True)):
        rows = _sorted_rows(ci[name], dim, most)
        orders.append([plain(value) for value in rows[dim].values])
        traces = _dot_traces(rows, dim, text)
        fig.add_traces(traces)
        owners += [owner] * len(traces)
    if ci.sizes[dim] > most:
        subtitle += f" · the {most} of {ci.sizes[dim]} farthest from 0"
    fig.update_xaxes(title_text=texts[0].axis, zeroline=True)
    fig.update_yaxes(type="category", categoryorder="array", categoryarray=orders[0])
    height = 170 + 24 * min(ci.sizes[dim], most) + (40 if len(names) > 1 else 0)
    theme.figure(fig, title=title, subtitle=subtitle, height=max(height, 300), menu=len(names) > 1)
    if len(names) > 1:
        titles = {"xaxis.title.text": [text.axis for text in texts], "yaxis.categoryarray": orders}
        theme.dropdown(fig, [text.label for text in texts], owners, titles)
    return fig


def _layers_right(layers: np.ndarray) -> dict[str, Any]:
    """Return the axis of layers, without the ticks before the first that plotly's own margin would add."""
    axis = theme.layer_axis(layers)
    if layers.dtype.kind not in "iuf" or len(layers) < 2:
        return axis
    room = 0.04 * float(layers[-1] - layers[0])
    return {**axis, "range": [float(layers[0]) - room, float(layers[-1]) + room]}


def line_traces(array: xr.DataArray, text: MetricText, x: str = "layer") -> list[go.Scatter]:
    """Return a band and a line for each group of `array` (`[statistic, x]`, or with a group)."""
    traces: list[go.Scatter] = []
    for part, label, color in _by_group(array, x):
        mean, low, high = (part.sel(statistic=name).values for name in ("mean", "low", "high"))
        places, known = part[x].values, np.isfinite(low) & np.isfinite(high)
        band = np.concatenate([high[known], low[known][::-1]])
        around = np.concatenate([places[known], places[known][::-1]])
        key, named = label or "all", [label] if label else []
        traces.append(
            go.Scatter(
                x=around, y=band, fill="toself", fillcolor=theme.translucent(color), line={"width": 0},
                mode="lines", hoverinfo="skip", showlegend=False, legendgroup=key,
            )
        )  # fmt: skip
        traces.append(
            go.Scatter(
                x=places, y=mean, mode="lines+markers", name=label or text.label, legendgroup=key,
                line={"color": color, "width": 2}, marker={"size": 6}, showlegend=label is not None,
                customdata=np.stack([low, high, _counts(part, x)], -1),
                hovertemplate=hover(*named, f"{x} %{{x}}", f"{text.label}: %{{y:.4g}}", unit=text.unit, n=2),
            )
        )  # fmt: skip
    return traces


def _baseline_traces(array: xr.DataArray, layers: np.ndarray) -> list[go.Scatter]:
    """Return a dashed line per group, and one entry of the legend for all."""
    traces = []
    parts = _by_group(array, "")
    for part, label, color in parts:
        mean, low, high = (float(part.sel(statistic=name)) for name in ("mean", "low", "high"))
        name = f"{label}, {_BASELINE}" if label else _BASELINE
        traces.append(
            go.Scatter(
                x=[layers[0], layers[-1]], y=[mean, mean], mode="lines",
                name=name, legendgroup=label or "all", showlegend=len(parts) == 1,
                line={"color": color, "dash": "dash", "width": 1.5},
                hovertemplate=f"{name}<br>%{{y:.4g}} [{low:.4g}, {high:.4g}]<extra></extra>",
            )
        )  # fmt: skip
    if len(parts) > 1:
        line = {"color": theme.OKABE_ITO[6], "dash": "dash", "width": 1.5}
        traces.append(
            go.Scatter(x=[None], y=[None], mode="lines", name=_BASELINE, showlegend=True, line=line)
        )
    return traces


_BASELINE = "unchanged model"


def _by_group(array: xr.DataArray, x: str) -> list[tuple[xr.DataArray, str | None, str]]:
    """Split `array` by the dimension that is neither `statistic` nor `x`, with a label and a color each."""
    group = next((str(dim) for dim in array.dims if dim not in ("statistic", x)), None)
    if group is None:
        return [(array, None, theme.OKABE_ITO[0])]
    values = array[group].values.tolist()
    names = [plain(v) if isinstance(v, str) else f"{plain(group)} {v:g}" for v in values]
    colors = theme.group_colors(values)
    return [(array.isel({group: i}), names[i], colors[i]) for i in range(len(values))]


def _counts(part: xr.DataArray, x: str) -> np.ndarray:
    found = [str(name) for name in part.coords if str(name).startswith("n_") and part[name].dims == (x,)]
    return part[found[0]].values if found else np.full(part.sizes[x], np.nan)


def _sorted_rows(array: xr.DataArray, dim: str, most: int) -> xr.DataArray:
    means = array.sel(statistic="mean")
    others = [extra for extra in means.dims if extra != dim]
    key = np.nan_to_num((means.mean(others) if others else means).values)
    kept = np.argsort(-np.abs(key), kind="stable")[:most]
    return array.isel({dim: kept[np.argsort(key[kept], kind="stable")]})


def _dot_traces(rows: xr.DataArray, dim: str, text: MetricText) -> list[go.Scatter]:
    traces = []
    for part, label, color in _by_group(rows, dim):
        named = [label] if label else []
        mean, low, high = (part.sel(statistic=name).values for name in ("mean", "low", "high"))
        traces.append(
            go.Scatter(
                x=mean, y=[plain(value) for value in part[dim].values], mode="markers",
                name=label or text.label,
                marker={"color": color, "size": 8}, showlegend=label is not None,
                error_x=theme.error_bars(mean, low, high, color),
                customdata=np.stack([low, high, _counts(part, dim)], -1),
                hovertemplate=hover(*named, "%{y}", f"{text.label}: %{{x:.4g}}", unit=text.unit, n=2),
            )
        )  # fmt: skip
    return traces
