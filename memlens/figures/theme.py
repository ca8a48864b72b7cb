"""The style of all figures and the conventions that they follow.

Layers run up in maps and to the right in curves. Signed values use red-white-blue around 0. Red means that
recall was harmed and blue that it was helped (the scale is reversed for metrics where lower is better); for a
metric without a direction red means lower. Magnitudes use viridis. Groups use the colors of Okabe and Ito
(2008), which people with common color vision deficiencies can tell apart (gray replaces their black, which
would be invisible on a dark page), or steps of viridis where the groups are numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import plotly.colors as pc
import plotly.graph_objects as go

from memlens.figures.labels import plain

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6B7280", "#F0E442")


def _template(ink: str, grid: str, page: str) -> go.layout.Template:
    axis: dict[str, Any] = {
        "gridcolor": grid,
        "zerolinecolor": "#9aa5b1",
        "linecolor": "#9aa5b1",
        "ticks": "outside",
        "tickcolor": "#9aa5b1",
        "title": {"standoff": 8},
        "automargin": True,
    }
    title = {"x": 0, "xref": "paper", "xanchor": "left", "y": 1, "yref": "container", "yanchor": "top"}
    return go.layout.Template(
        layout={
            "font": {"family": "system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif", "size": 13, "color": ink},
            "title": title,
            "colorway": list(OKABE_ITO),
            "paper_bgcolor": page,
            "plot_bgcolor": page,
            "xaxis": axis,
            "yaxis": axis,
            "hoverlabel": {"align": "left", "bgcolor": page, "font": {"color": ink, "size": 12}},
            "legend": {
                "itemwidth": 40,
                "bgcolor": "rgba(255,255,255,0)",
                "orientation": "h",
                "x": 0,
                "xanchor": "left",
                "y": 0.01,
                "yref": "container",
                "yanchor": "bottom",
            },
        }
    )


INK = "#1f2933"
TEMPLATE = _template(INK, "#e4e7eb", "white")
_DARK_INK, _DARK_PAGE = "#e4e7eb", "#14181d"  # as in the report's style
DARK_TEMPLATE = _template(_DARK_INK, "#3a4450", _DARK_PAGE)


def figure(base: go.Figure, *, title: str, subtitle: str, height: int, menu: bool = False) -> go.Figure:
    """Give `base` the template, its title and its size, and return it. Title and subtitle are plain text."""
    traces = cast("Iterable[Any]", base.select_traces())
    legend = any(trace.showlegend for trace in traces if "showlegend" in trace)
    above = 136 if menu else 114 if base.layout["annotations"] else 90  # titles of panels need room, too
    base.update_layout(
        template=TEMPLATE,
        title={
            "text": plain(title),
            "subtitle": {"text": plain(subtitle), "font": {"size": 12, "color": "#52606d"}},
            "pad": {"t": 14},
        },
        margin={"l": 64, "r": 24, "t": above, "b": 108 if legend else 56},
        height=height,
    )
    return base


def signed_scale(better: int) -> str:
    """Return the color scale of a signed value: red where recall is harmed.

    >>> signed_scale(1), signed_scale(-1)
    ('RdBu', 'RdBu_r')
    """
    return "RdBu_r" if better < 0 else "RdBu"


def magnitude_scale() -> str:
    """Return the color scale of values without a sign."""
    return "Viridis"


def group_colors(groups: Sequence[Any]) -> list[str]:
    """Return a color for each group: Okabe-Ito for names, steps of viridis for more than three numbers."""
    numbers = all(isinstance(group, int | float | np.number) for group in groups)
    if (numbers and len(groups) > 3) or len(groups) > len(OKABE_ITO):
        return [str(color) for color in pc.sample_colorscale("Viridis", np.linspace(0.0, 0.9, len(groups)))]
    return list(OKABE_ITO[: len(groups)])


def translucent(color: str, alpha: float = 0.18) -> str:
    """Return `color` (`#rrggbb` or `rgb(...)`) as an `rgba` with the given opacity."""
    red, green, blue = pc.hex_to_rgb(color) if color.startswith("#") else pc.unlabel_rgb(color)
    return f"rgba({red:.0f},{green:.0f},{blue:.0f},{alpha})"


def error_bars(mean: Any, low: Any, high: Any, color: str, thickness: float = 1.5) -> dict[str, Any]:
    """Return error bars from a mean to both ends of its interval."""
    return {
        "type": "data", "symmetric": False, "array": high - mean, "arrayminus": mean - low,
        "color": color, "thickness": thickness,
    }  # fmt: skip


def color_bar(title: str) -> dict[str, Any]:
    """Return a color bar with its title alongside."""
    text = {"text": title, "side": "right", "font": {"size": 12}}
    return {"title": text, "thickness": 14, "outlinewidth": 0}


def tick_step(count: int, most: int = 16) -> int:
    """Return a step (1, 2, 4, 5, 8, 10, 16, …) that leaves at most `most` ticks.

    >>> tick_step(12), tick_step(32), tick_step(512)
    (1, 2, 32)
    """
    steps = (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 128, 256, 512, 1024)
    return next((step for step in steps if count <= step * most), -(-count // most))


def layer_axis(layers: np.ndarray, title: str = "layer") -> dict[str, Any]:
    """Return the axis of layers: whole numbers, thinned where there are many; names stay names."""
    if layers.dtype.kind not in "iuf":
        return {"title": {"text": title}, "type": "category"}
    return {"title": {"text": title}, "tick0": 0, "dtick": tick_step(len(layers)), "zeroline": False}


def dropdown(
    fig: go.Figure, names: Sequence[str], owners: Sequence[int], layout: Mapping[str, Sequence[Any]]
) -> None:
    """Add a menu that shows the traces of one metric at a time.

    Args:
        fig: The figure; traces of the first metric remain visible.
        names: The menu's entries, one per metric.
        owners: For each trace the number of its metric; -1 for those that always show.
        layout: Layout keys (such as `yaxis.title.text`) and their value for each metric.
    """
    visible = iter([owner in (-1, 0) for owner in owners])
    fig.for_each_trace(lambda trace: trace.update(visible=next(visible)))
    buttons = [
        {
            "label": name,
            "method": "update",
            "args": [
                {"visible": [owner in (-1, place) for owner in owners]},
                {key: texts[place] for key, texts in layout.items()},
            ],
        }
        for place, name in enumerate(names)
    ]
    _add_menu(fig, buttons, {"x": 0, "xanchor": "left"})


def group_menu(fig: go.Figure, names: Sequence[str], owners: Sequence[int]) -> None:
    """Add a menu on the right that shows the maps of one group at a time; it can be combined with `dropdown`.

    Maps of other groups are fully transparent and have no hover text, so that the other menu still controls
    which metric is visible.

    Args:
        fig: The figure; maps of the first group remain visible.
        names: The menu's entries, one per group.
        owners: For each trace the number of its group.
    """
    templates = [str(trace.hovertemplate) for trace in cast("Iterable[Any]", fig.select_traces())]
    states: list[dict[str, list[Any]]] = [
        {
            "opacity": [float(owner == place) for owner in owners],
            "hovertemplate": [
                text if owner == place else "" for text, owner in zip(templates, owners, strict=True)
            ],
        }
        for place in range(len(names))
    ]
    fig.update_traces(hoverinfo="skip")  # counts where the template is empty
    first = iter(zip(*states[0].values(), strict=True))
    fig.for_each_trace(lambda trace: trace.update(dict(zip(states[0], next(first), strict=True))))
    buttons = [
        {"label": name, "method": "restyle", "args": [state]}
        for name, state in zip(names, states, strict=True)
    ]
    _add_menu(fig, buttons, {"x": 1, "xanchor": "right"})


def _add_menu(fig: go.Figure, buttons: Sequence[Mapping[str, Any]], place: Mapping[str, Any]) -> None:
    menu = {
        "buttons": list(buttons),
        "y": 1.0,
        "yanchor": "bottom",
        "pad": {"b": 26},
        "bgcolor": "white",
        "bordercolor": "#9aa5b1",
        "showactive": True,
    }
    fig.update_layout(updatemenus=[*fig.layout["updatemenus"], {**menu, **place}])


def dark(fig: go.Figure) -> go.Figure:
    """Return a copy of a figure for a dark page; the colors of data are unchanged.

    Example:
        >>> from memlens.figures import dark, decoding_panels
        >>> import xarray as xr
        >>> ci = xr.Dataset(
        ...     {name: (("statistic", "layer"), [[1.0], [0.5], [2.0]]) for name in ("probability", "rank")},
        ...     {"statistic": ["mean", "low", "high"], "layer": [0]},
        ... )
        >>> dark(decoding_panels(ci)).layout.template.layout.paper_bgcolor
        '#14181d'
    """
    shown = go.Figure(fig)
    shown.update_layout(template=DARK_TEMPLATE)
    shown.update_layout(title_subtitle_font_color="#a9b4c0")
    shown.for_each_shape(lambda shape: shape.update(line_color=_DARK_INK), selector={"line.color": INK})
    shown.update_layout(updatemenus=[{"bgcolor": _DARK_PAGE} for _ in shown.layout["updatemenus"]])
    return shown
