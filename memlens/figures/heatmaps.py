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
from memlens.figures.labels import MetricText, hover, metric_text, plain, unique_tokens, visible

SIDE_BY_SIDE = 3
"""The most groups drawn side by side; with more, a menu shows one at a time."""


def heatmap_layer_head(
    ci: xr.Dataset,
    *,
    signed: bool = True,
    title: str = "Effect of each head",
    subtitle: str = "",
) -> go.Figure:
    """Draw a map of layer (up) by head, with a menu where there are several metrics.

    Args:
        ci: Variables `[statistic, layer, head]`, as from `Result.mean_ci`; with a further dimension (a
            group) the maps share one color scale: side by side for up to `SIDE_BY_SIDE` groups, else one at a
            time with a menu.
        signed: Use red-white-blue around 0, else viridis.
        title: Title of the figure.
        subtitle: Number of sequences, and what sign and color mean.

    Returns:
        The figure; hovering shows layer, head, mean, interval and number of sequences.
    """
    return _maps(ci, "head", signed, title, subtitle)


def heatmap_layer_position(
    ci: xr.Dataset,
    *,
    x: str = "position",
    signed: bool = True,
    tokens: Sequence[str] | None = None,
    boundary: float | None = None,
    title: str = "Effect of each layer and position",
    subtitle: str = "",
) -> go.Figure:
    """Draw a map of layer (up) by position (right).

    Args:
        ci: Variables `[statistic, layer, x]` with intervals, or `[layer, x]` of one sequence.
        x: Name of the dimension to the right, `position` or `target`.
        signed: Use red-white-blue around 0, else viridis.
        tokens: The token at each place; shown as labels that are unique and escaped, and on hovering.
        boundary: Where the continuation starts; a dashed line is drawn before that position.
        title: Title of the figure.
        subtitle: Number of sequences, and what sign and color mean.
    """
    fig = _maps(ci, x, signed, title, subtitle, tokens=tokens)
    if boundary is not None:
        places = ci[x].values
        start = boundary if tokens is None else float(np.searchsorted(places, boundary))
        fig.add_vline(x=start - 0.5, line={"dash": "dash", "color": theme.INK, "width": 1.5})
        fig.add_annotation(
            x=start - 0.5,
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
    x: str = "receiver",
    y: str = "sender",
    signed: bool = True,
    title: str = "Effect of each path",
    subtitle: str = "",
) -> go.Figure:
    """Draw a map of sender (up) by receiver (right), or of any other two dimensions.

    Args:
        ci: Variables `[statistic, sender, receiver]` with intervals, or `[sender, receiver]` of one sequence;
            both named, such as `L3H2`.
        x: The dimension to the right.
        y: The dimension up.
        signed: Use red-white-blue around 0, else viridis.
        title: Title of the figure.
        subtitle: Number of sequences, and what sign and color mean.
    """
    return _maps(ci, x, signed, title, subtitle, y=y)


def place_axis(places: np.ndarray, title: str, *, tokens: bool, panels: int = 1) -> dict[str, Any]:
    """Return the axis of heads, positions, … to the right, whose labels are thinned to stay readable.

    Labels of tokens are categories, which plotly thins by the width of the figure, as it does numbers where
    there are more than fit in the narrowest page.
    """
    axis: dict[str, Any] = {"title": {"text": title.replace("_", " ")}, "zeroline": False}
    if tokens or not _whole_numbers(places):
        return {**axis, "type": "category", **({"tickangle": -60} if tokens else {})}
    most = 24 // panels
    many = len(places) > 0 and np.ptp(places) >= most  # the axis has a place for each number in between
    return {**axis, "nticks": most} if many else {**axis, "tick0": 0, "dtick": 1}


def _whole_numbers(places: np.ndarray) -> bool:
    return places.dtype.kind in "iu" or (places.dtype.kind == "f" and bool((places == places.round()).all()))


def heatmap_trace(
    array: xr.DataArray,
    x: str,
    text: MetricText,
    *,
    signed: bool,
    limit: float | None = None,
    y: str = "layer",
    tokens: Sequence[str] | None = None,
) -> go.Heatmap:
    """Return one map, of `[statistic, y, x]` with a coordinate `n…`, or of `[y, x]`; `tokens` go along x."""
    has_interval = "statistic" in array.dims
    array = array.transpose(*(["statistic"] if has_interval else []), y, x)
    means = array.sel(statistic="mean") if has_interval else array
    places = array[x].values
    named = None
    if tokens is not None:
        named = [
            f"{place} · {plain(visible(str(token)))}" for place, token in zip(places, tokens, strict=True)
        ]
    words = {name: name.replace("_", " ") for name in (x, y)}
    place = f"{words[y]} %{{y}} · {words[x]} {'%{text}' if named else '%{x}'}"
    rows = [array.sel(statistic=name).values for name in ("mean", "low", "high")] if has_interval else [means]
    counts = [c for c in array.coords if str(c).startswith("n_") and array[c].dims == means.dims]
    rows += [array[name].values for name in counts[:1] if has_interval]
    low, n = (1 if has_interval else None), (3 if len(rows) == 4 else None)
    return go.Heatmap(
        z=means.values,
        x=_labels(places, tokens),
        y=array[y].values,
        customdata=np.stack(rows, -1).astype(np.float32),
        text=[named] * array.sizes[y] if named else None,
        hovertemplate=hover(place, f"{text.label}: %{{z:.4g}}", low=low, unit=text.unit, n=n),
        **_colors(means.values, text, signed, limit),
    )


def _labels(places: np.ndarray, tokens: Sequence[str] | None) -> Any:
    if tokens is not None:
        return unique_tokens(tokens, places.tolist())
    return places if places.dtype.kind in "iuf" else [plain(place) for place in places]


def _colors(values: np.ndarray, text: MetricText, signed: bool, limit: float | None) -> dict[str, Any]:
    bar = theme.color_bar(f"{text.label}<br>({text.unit})" if text.unit else text.label)
    if not signed:
        return {"colorscale": theme.magnitude_scale(), "colorbar": bar, "zmax": limit}
    limit = limit or _limit(values, text)
    scale = theme.signed_scale(text.better)
    return {"colorscale": scale, "zmid": 0, "zmin": -limit, "zmax": limit, "colorbar": bar}


def _limit(values: np.ndarray, text: MetricText) -> float:
    """Return the end of the color scale: the largest value, or less where the metric has a natural end."""
    finite = np.abs(values[np.isfinite(values)])
    largest = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
    return min(largest, text.whole) if text.whole else largest


def _maps(
    ci: xr.Dataset,
    x: str,
    signed: bool,
    title: str,
    subtitle: str,
    *,
    y: str = "layer",
    tokens: Sequence[str] | None = None,
) -> go.Figure:
    names = [str(name) for name in ci.data_vars]
    if not names:
        raise ResultError("a map needs at least one metric: the dataset has none.")
    first = ci[names[0]]
    group = next((str(dim) for dim in first.dims if dim not in ("statistic", y, x)), None)
    groups = [plain(value) for value in first[group].values] if group else []
    beside = groups if len(groups) <= SIDE_BY_SIDE else []
    fig = make_subplots(1, len(beside) or 1, shared_yaxes=True, subplot_titles=beside or None)
    texts = [metric_text(name, ci[name]) for name in names]
    owners = [(m, g) for m in range(len(names)) for g in range(len(groups) or 1)]
    for m, g in owners:
        array = ci[names[m]]
        means = array.sel(statistic="mean") if "statistic" in array.dims else array
        limit = _limit(means.values, texts[m]) if signed or group else None
        part = array.isel({group: g}) if group else array
        trace = heatmap_trace(part, x, texts[m], signed=signed, limit=limit, y=y, tokens=tokens)
        trace.showscale = g == 0
        fig.add_trace(trace, row=1, col=g + 1 if beside else 1)
    axis = place_axis(first[x].values, x, tokens=tokens is not None, panels=len(beside) or 1)
    fig.update_xaxes(axis, showgrid=False, matches="x" if beside else None)  # also of a panel without values
    places = first[y].values
    numbered = _whole_numbers(places) or places.dtype.kind != "f"
    fig.update_yaxes(theme.layer_axis(places, "") if numbered else {"type": "category"}, showgrid=False)
    fig.update_yaxes(title_text=y.replace("_", " "), col=1)
    one_by_one = group is not None and not beside
    height = int(np.clip(250 + 24 * ci.sizes[y], 360, 760)) + (60 if tokens is not None else 0)
    menu = len(names) > 1 or one_by_one
    theme.figure(fig, title=title, subtitle=subtitle, height=height, menu=menu)
    if len(names) > 1:
        theme.dropdown(fig, [text.label for text in texts], [m for m, _ in owners], {})
    if one_by_one:
        theme.group_menu(fig, [f"{plain(group)}: {name}" for name in groups], [g for _, g in owners])
    return fig
