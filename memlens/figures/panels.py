"""Figures of two panels: logit attribution, and recall against the number of copies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from memlens.figures import theme
from memlens.figures.heatmaps import heatmap_trace
from memlens.figures.labels import metric_text, plain
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
    fig.update_yaxes(title_text="layer", showticklabels=True)
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
        hovertemplate=f"layer %{{y}} · {label}<br>%{{x:.4g}} [%{{customdata[0]:.4g}}, "
        "%{customdata[1]:.4g}] logits<extra></extra>",
    )


def recall_panels(
    values: xr.DataArray,
    ci: xr.Dataset | None = None,
    *,
    metrics: Sequence[str] | None = None,
    title: str = "What the model recalls",
    subtitle: str = "",
) -> go.Figure:
    """Draw recall rates against a group such as the number of copies, and the histogram of one metric.

    Args:
        values: one value per sequence, for the histogram.
        ci: Variables `[statistic, group]` that are shares; None draws the histogram only.
        metrics: which variables of `ci`; all by default.
        title: Title of the figure.
        subtitle: Number of sequences.
    """
    text = metric_text(str(values.name), values)
    fig = make_subplots(1, 2 if ci is not None else 1, horizontal_spacing=0.12)
    if ci is not None:
        _add_curves(fig, ci, [str(name) for name in (metrics if metrics is not None else ci.data_vars)])
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
