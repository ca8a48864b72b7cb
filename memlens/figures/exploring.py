"""Maps of one sequence that a reader clicks through: lens, effects of heads and layers, attention of a head.

Positions along an axis have unique labels (`the_3`), so that hovering shows the token and plotly thins out
the labels of long sequences by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from memlens.figures import theme
from memlens.figures.labels import MetricText, metric_text

_FRAME = theme.OKABE_ITO[2]
BRANCHES = {"mlp": "MLP", "bypass": "bypass"}
"""The columns to the right of the heads in `heatmap_effects`, and their names on the axis."""


def heatmap_lens(data: xr.Dataset, labels: Sequence[str]) -> go.Figure:
    """Draw the probability of each target after each layer.

    Args:
        data: `probability` and `rank` `[layer, target]`.
        labels: One unique label per target, escaped (see `unique_tokens`).
    """
    trace = go.Heatmap(
        z=data["probability"].transpose("layer", "target").values,
        x=list(labels),
        y=data["layer"].values,
        customdata=data["rank"].transpose("layer", "target").values,
        zmin=0,
        zmax=1,
        colorscale=theme.magnitude_scale(),
        colorbar=theme.color_bar("probability<br>of the target"),
        hovertemplate="layer %{y} · target %{x}<br>probability %{z:.3f}, rank %{customdata}<extra></extra>",
    )
    fig = go.Figure(trace)
    fig.update_xaxes(type="category", title_text="target", tickangle=-60, showgrid=False)
    fig.update_yaxes(theme.layer_axis(data["layer"].values), showgrid=False)
    height = _height(data.sizes["layer"], 60)
    title = "The prediction after each layer"
    return theme.figure(fig, title=title, subtitle="lens, teacher-forced", height=height)


_RIGHTMOST = {"xref": "container", "x": 1, "xanchor": "right"}


def heatmap_effects(
    heads: xr.DataArray,
    branches: xr.Dataset,
    *,
    metric: str,
    chosen: tuple[int, int] | None = None,
) -> go.Figure:
    """Draw what ablating each head changes, next to each layer's MLP and attention bypass.

    Args:
        heads: `[layer, head]`, intervened minus baseline.
        branches: The same `[layer]`, by the keys of `BRANCHES`.
        metric: The metric that changes.
        chosen: The layer and head with a frame.

    Returns:
        The figure: heads at 0, 1, …, then a gap, then one column per branch (the second
        trace). Branches have their own color scale, because they matter more than any single head.
    """
    text, n = metric_text(metric, heads.assign_attrs(of="effect")), heads.sizes["head"]
    layers = heads["layer"].values
    wide = max(1.0, n / 3)  # a column of a branch stays wide enough for its name, and to be clicked
    places = [n - 0.5 + wide * (1.5 + i) for i in range(len(BRANCHES))]
    next_to = np.stack([branches[name].values for name in BRANCHES], axis=1)
    fig = go.Figure(
        [
            _signed(heads.transpose("layer", "head").values, range(n), layers, "head %{x}", text, "heads"),
            _signed(next_to, places, layers, "%{customdata}", text, " and ".join(BRANCHES.values())),
        ]
    )
    fig.data[1].update(customdata=[list(BRANCHES.values())] * len(layers), colorbar=_RIGHTMOST)
    ticks = list(range(0, n, theme.tick_step(n, 12)))
    fig.update_xaxes(
        title_text="head", tickmode="array", showgrid=False, zeroline=False,
        tickvals=[*ticks, *places], ticktext=[*map(str, ticks), *BRANCHES.values()], tickangle=0,
        range=[-0.5, places[-1] + wide / 2],
    )  # fmt: skip
    fig.update_yaxes(theme.layer_axis(layers), showgrid=False)
    if chosen is not None:
        layer, head = chosen
        fig.add_shape(
            type="rect", x0=head - 0.5, x1=head + 0.5, y0=layer - 0.5, y1=layer + 0.5,
            line={"color": _FRAME, "width": 3},
        )  # fmt: skip
    subtitle = "red = recall harmed" if text.better else "change of the metric"
    title = "What each head and layer contributes"
    theme.figure(fig, title=title, subtitle=subtitle, height=_height(len(layers), 0))
    return fig.update_layout(margin_r=190)  # pixels for two color bars, however narrow the figure is


def heatmap_attention(
    weights: xr.DataArray, labels: Sequence[str], *, boundary: int, title: str = "Attention"
) -> go.Figure:
    """Draw the attention of one head: queries down, keys to the right.

    Args:
        weights: `[query, key]`, from 0 to 1; cells above the diagonal are left blank.
        labels: One unique label per position, escaped.
        boundary: Where the continuation starts; lines are drawn before it.
        title: Title of the figure.
    """
    z = weights.transpose("query", "key").values.astype(float)
    z[np.triu_indices(len(z), 1)] = np.nan
    trace = go.Heatmap(
        z=z,
        x=list(labels),
        y=list(labels),
        zmin=0,
        zmax=1,
        colorscale=theme.magnitude_scale(),
        colorbar=theme.color_bar("attention"),
        hoverongaps=False,
        hovertemplate="from %{y} to %{x}<br>attention %{z:.3f}<extra></extra>",
    )
    fig = go.Figure(trace)
    axis = {"type": "category", "showgrid": False}
    fig.update_xaxes(axis, title_text="attends to (key)", tickangle=-60)
    fig.update_yaxes(axis, title_text="token (query)", autorange="reversed")
    line = {"color": "#9aa5b1", "width": 1, "dash": "dash"}
    end = len(labels) - 0.5
    fig.add_shape(type="line", x0=boundary - 0.5, x1=boundary - 0.5, y0=-0.5, y1=end, line=line)
    fig.add_shape(type="line", y0=boundary - 0.5, y1=boundary - 0.5, x0=-0.5, x1=end, line=line)
    subtitle = "dashed lines: where the continuation starts"
    return theme.figure(fig, title=title, subtitle=subtitle, height=620)


def _signed(
    z: np.ndarray, x: Iterable[float], layers: np.ndarray, place: str, text: MetricText, title: str
) -> go.Heatmap:
    limit = float(np.nanmax(np.abs(z), initial=0)) or 1.0
    return go.Heatmap(
        z=z,
        x=list(x),
        y=layers,
        zmin=-limit,
        zmax=limit,
        colorscale=theme.signed_scale(text.better),
        colorbar=theme.color_bar(f"{title} ({text.unit})" if text.unit else title),
        hoverongaps=False,
        hovertemplate=f"layer %{{y}} · {place}<br>%{{z:.4g}} {text.unit}<extra></extra>",
    )


def _height(n_layers: int, labels: int) -> int:
    return int(np.clip(220 + 24 * n_layers, 330, 760)) + labels
