"""Maps with layers going up: layer by head, layer by position, and sender by receiver."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from memlens.errors import ResultError
from memlens.figures import theme
from memlens.figures.labels import MetricText, metric_text, plain, unique_tokens

__all__ = ["heatmap_layer_head", "heatmap_layer_position", "heatmap_paths", "heatmap_trace", "token_axis"]


def heatmap_layer_head(
    ci: xr.Dataset,
    *,
    metrics: Sequence[str] | None = None,
    signed: bool = True,
    title: str = "Effect of each head",
    subtitle: str = "",
) -> go.Figure:
    """Draw a map of layer (up) by head, with a menu where there are several metrics.

    Args:
        ci: variables `[statistic, layer, head]`, as from `Result.mean_ci`; a further dimension (a group)
            gives maps side by side on one colour scale.
        metrics: which variables; all by default.
        signed: red-white-blue around 0, else viridis.
        title: what is shown.
        subtitle: on how many sequences, and what sign and colour mean.

    Returns:
        The figure; hovering shows layer, head, mean, interval and number of sequences.
    """
    return _maps(ci, "head", metrics, signed, title, subtitle, token_axis(None, ci["head"].values, "head"))


def heatmap_layer_position(
    ci: xr.Dataset,
    *,
    metrics: Sequence[str] | None = None,
    x: str = "position",
    signed: bool = True,
    tokens: Sequence[str] | None = None,
    boundary: float | None = None,
    title: str = "Effect of each layer and position",
    subtitle: str = "",
) -> go.Figure:
    """Draw a map of layer (up) by position (right).

    Args:
        ci: variables `[statistic, layer, x]` with intervals, or `[layer, x]` of one sequence.
        metrics: which variables; all by default.
        x: name of the dimension to the right, `position` or `target`.
        signed: red-white-blue around 0, else viridis.
        tokens: the token at each place; shown as labels that are unique and escaped.
        boundary: where the continuation starts; a dashed line is drawn before that position.
        title: what is shown.
        subtitle: on how many sequences, and what sign and colour mean.
    """
    fig = _maps(ci, x, metrics, signed, title, subtitle, token_axis(tokens, ci[x].values, x))
    if boundary is not None:
        fig.add_vline(x=boundary - 0.5, line={"dash": "dash", "color": "#1f2933", "width": 1.5})
        fig.add_annotation(
            x=boundary - 0.5,
            y=1,
            yref="paper",
            yanchor="bottom",
            text="prefix | continuation",
            showarrow=False,
        )
    return fig


def heatmap_paths(
    ci: xr.Dataset,
    *,
    metrics: Sequence[str] | None = None,
    x: str = "receiver",
    y: str = "sender",
    signed: bool = True,
    title: str = "Effect of each path",
    subtitle: str = "",
) -> go.Figure:
    """Draw a map of sender (up) by receiver (right), or of other named places.

    Args:
        ci: variables `[statistic, sender, receiver]` with intervals, or `[sender, receiver]` of one sequence;
            both named, such as `L3H2`.
        metrics: which variables; all by default.
        x: the dimension to the right.
        y: the dimension up.
        signed: red-white-blue around 0, else viridis.
        title: what is shown.
        subtitle: on how many sequences, and what sign and colour mean.
    """
    axis = token_axis(None, ci[x].values, x.replace("_", " "))
    return _maps(ci, x, metrics, signed, title, subtitle, axis, y=y)


def token_axis(tokens: Sequence[str] | None, places: np.ndarray, title: str) -> dict[str, Any]:
    """Return the axis of positions: token labels where known, thinned so that they stay readable."""
    step = theme.tick_step(len(places), 64 if tokens is not None else 24)
    axis: dict[str, Any] = {"title": {"text": title}, "zeroline": False}
    if tokens is None:
        return {**axis, "tick0": 0, "dtick": step}
    labels, shown = unique_tokens(tokens, places.tolist())[::step], places[::step].tolist()
    return {**axis, "tickmode": "array", "tickvals": shown, "ticktext": labels, "tickangle": -60}


def heatmap_trace(
    array: xr.DataArray,
    x: str,
    text: MetricText,
    *,
    signed: bool,
    limit: float | None = None,
    y: str = "layer",
) -> go.Heatmap:
    """Return one map; `array` is `[statistic, y, x]` with a coordinate `n…`, or `[y, x]`."""
    has_interval = "statistic" in array.dims
    array = array.transpose(*(["statistic"] if has_interval else []), y, x)
    means = array.sel(statistic="mean") if has_interval else array
    rows, hover = [means.values], f"{y} %{{y}} · {x} %{{x}}<br>{text.label}: %{{z:.4g}}"
    if has_interval:
        rows += [array.sel(statistic=name).values for name in ("low", "high")]
        hover += " [%{customdata[1]:.4g}, %{customdata[2]:.4g}]"
    hover += f" {text.unit}" if text.unit else ""
    counts = [c for c in array.coords if str(c).startswith("n_") and array[c].dims == means.dims]
    if has_interval and counts:
        rows.append(array[counts[0]].values)
        hover += "<br>n = %{customdata[3]:d} sequences"
    return go.Heatmap(
        z=means.values,
        x=array[x].values if array[x].dtype.kind in "iuf" else [plain(v) for v in array[x].values],
        y=array[y].values,
        customdata=np.stack(rows, -1).astype(np.float32),
        hovertemplate=hover + "<extra></extra>",
        **_colors(means.values, text, signed, limit),
    )


def _colors(values: np.ndarray, text: MetricText, signed: bool, limit: float | None) -> dict[str, Any]:
    title = f"{text.label}<br>({text.unit})" if text.unit else text.label
    bar = {
        "title": {"text": title, "side": "right", "font": {"size": 12}},
        "thickness": 14,
        "outlinewidth": 0,
    }
    if not signed:
        return {"colorscale": theme.magnitude_scale(), "colorbar": bar, "zmax": limit}
    limit = limit or _limit(values)
    scale = theme.signed_scale(text.better)
    return {"colorscale": scale, "zmid": 0, "zmin": -limit, "zmax": limit, "colorbar": bar}


def _limit(values: np.ndarray) -> float:
    finite = np.abs(values[np.isfinite(values)])
    return float(finite.max()) if finite.size and finite.max() > 0 else 1.0


def _maps(
    ci: xr.Dataset,
    x: str,
    metrics: Sequence[str] | None,
    signed: bool,
    title: str,
    subtitle: str,
    x_axis: dict[str, Any],
    y: str = "layer",
) -> go.Figure:
    names = [str(name) for name in (metrics if metrics is not None else ci.data_vars)]
    if not names:
        raise ResultError("a map needs at least one metric: the dataset has none.")
    first = ci[names[0]]
    group = next((str(dim) for dim in first.dims if dim not in ("statistic", y, x)), None)
    facets = [plain(value) for value in first[group].values] if group else None
    fig = make_subplots(1, len(facets) if facets else 1, shared_yaxes=True, subplot_titles=facets)
    owners: list[int] = []
    texts = [metric_text(name, ci[name]) for name in names]
    for owner, (name, text) in enumerate(zip(names, texts, strict=True)):
        array = ci[name]
        means = array.sel(statistic="mean") if "statistic" in array.dims else array
        limit = _limit(means.values) if signed or group else None
        for column in range(array.sizes[group] if group else 1):
            part = array.isel({group: column}) if group else array
            trace = heatmap_trace(part, x, text, signed=signed, limit=limit, y=y)
            trace.showscale = column == 0
            fig.add_trace(trace, row=1, col=column + 1)
            owners.append(owner)
    fig.update_xaxes(**x_axis, showgrid=False)
    fig.update_yaxes(theme.layer_axis(first[y].values, ""), showgrid=False)
    fig.update_yaxes(title_text=y.replace("_", " "), col=1)
    labels = 60 if "ticktext" in x_axis else 0
    height = int(np.clip(250 + 24 * ci.sizes[y], 360, 760)) + labels
    theme.figure(fig, title=title, subtitle=subtitle, height=height, menu=len(names) > 1)
    if len(names) > 1:
        theme.dropdown(fig, [text.label for text in texts], owners, {})
    return fig
