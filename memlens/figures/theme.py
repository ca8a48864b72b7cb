"""The style of all figures and the conventions that they follow.

Layers run up in maps and to the right in curves. Signed values use red-white-blue around 0. Red means that
recall was harmed and blue that it was helped (the scale is reversed for metrics where lower is better); for a
metric without a direction red means lower. Magnitudes use viridis. Groups use the colors of Okabe and Ito
(2008), which people with common color vision deficiencies can tell apart (gray replaces their black, which
would be invisible on a dark page), or steps of viridis where the groups are numbers.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
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
    title = {"x": 0, "xref": "container", "xanchor": "left", "y": 1, "yref": "container", "yanchor": "top"}
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


NARROWEST = 600
"""The width in pixels at which everything in a figure must still be readable."""
_SIDES = {"l": 64, "r": 24}
WIDTH = NARROWEST - sum(_SIDES.values()) - 20
"""The width in pixels of a plot without a color bar in the narrowest page."""
_LETTER = {"title": 9.5, "subtitle": 7.0, "axis": 8.0}  # widths in pixels, of a wide font
_LINE = {"title": 22, "subtitle": 16, "panel": 18}
_TITLES = 62  # the room of a title and a subtitle of one line each
_LOWEST_PLOT = 130


def figure(base: go.Figure, *, title: str, subtitle: str, height: int, menu: bool = False) -> go.Figure:
    """Give `base` the template, its title and its size, and return it. Title and subtitle are plain text.

    Titles, subtitles and titles of axes are broken into lines that fit at a width of `NARROWEST`; without a
    width of its own a figure takes that of the page or cell. `height` is raised where the plot itself would
    otherwise be too low.
    """
    traces = cast("Iterable[Any]", base.select_traces())
    legend = any(trace.showlegend for trace in traces if "showlegend" in trace)
    shown = {"title": plain(title), "subtitle": plain(subtitle)}
    shown = {part: wrapped(text, (NARROWEST - 36) / _LETTER[part]) for part, text in shown.items()}
    panels = _wrap_panel_titles(base)
    above = 136 if menu else 114 if panels else 90
    above += _more_lines(shown) + max(0, panels - 1) * _LINE["panel"]
    below = 108 if legend else 56
    base.update_layout(
        template=TEMPLATE,
        title={
            "text": shown["title"],
            "subtitle": {"text": shown["subtitle"], "font": {"size": 12, "color": "#52606d"}},
            "pad": {"t": 14 + 8 * shown["title"].count("<br>"), "l": 12},
        },
        margin={**_SIDES, "t": above, "b": below},
        height=max(height + _more_lines(shown), above + below + _LOWEST_PLOT),
    )
    _wrap_axis_titles(base)
    return base


def title_room(fig: go.Figure) -> int:
    """Return the height in pixels that title and subtitle take, which a page with headings saves."""
    title: Any = fig.layout["title"]
    return _TITLES + _more_lines({"title": title.text or "", "subtitle": title.subtitle.text or ""})


def _more_lines(texts: Mapping[str, str]) -> int:
    return sum(_LINE[part] * text.count("<br>") for part, text in texts.items())


def wrapped(text: str, most: float, ends: str = " ") -> str:
    """Return escaped text with a line break before each word that would exceed `most` characters.

    Words end after any of the letters `ends`.

    >>> wrapped("change in target log-prob (nats)", 20)
    'change in target<br>log-prob (nats)'
    """
    lines: list[str] = []
    for word in re.split(f"(?<=[{re.escape(ends)}])", text):
        if lines and len(html.unescape(lines[-1] + word).rstrip()) <= most:
            lines[-1] += word
        else:
            lines.append(word)
    return "<br>".join(line.rstrip() for line in lines)


def _wrap_panel_titles(fig: go.Figure) -> int:
    """Break the titles of panels into lines that fit, and return the most lines; 0 without panels."""
    titles: list[Any] = list(fig.layout["annotations"])
    axes: list[Any] = list(fig.select_xaxes())
    widest = min((end - start for start, end in (axis.domain or (0, 1) for axis in axes)), default=1)
    for title in titles:
        title.update(text=wrapped(title.text, (WIDTH - 110) * widest / _LETTER["axis"], " /-"))
    return max((1 + title.text.count("<br>") for title in titles), default=0)


def _wrap_axis_titles(fig: go.Figure) -> None:
    traces = cast("Iterable[Any]", fig.select_traces())
    names = [name for trace in traces for name in (trace.y if "y" in trace and trace.y is not None else ())]
    left = 7 * max((len(name) for name in names if isinstance(name, str)), default=0)  # names along y
    for axis in cast("Iterable[Any]", fig.select_xaxes()):
        axis.update(title_text=_axis_title(axis, max(WIDTH - left, 160)))
    for axis in cast("Iterable[Any]", fig.select_yaxes()):
        axis.update(title_text=_axis_title(axis, _plot_height(fig)))


def _axis_title(axis: Any, room: float, text: str | None = None) -> str:
    start, end = axis.domain or (0, 1)
    words = (axis.title.text or "" if text is None else text).replace("<br>", " ")
    return wrapped(words, room * (end - start) / _LETTER["axis"])


def _plot_height(fig: go.Figure) -> float:
    margin: Any = fig.layout["margin"]
    return float(fig.layout["height"]) - margin.t - margin.b


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
    """Return a color bar with its title alongside, in lines that a low figure has room for."""
    lines = "<br>".join(wrapped(line, 26) for line in title.split("<br>"))
    text = {"text": lines, "side": "right", "font": {"size": 12}}
    return {"title": text, "thickness": 14, "outlinewidth": 0}


def tick_step(count: int, most: int = 16) -> int:
    """Return a step (1, 2, 4, 5, 8, 10, 16, …) that leaves at most `most` ticks.

    >>> tick_step(12), tick_step(32), tick_step(512)
    (1, 2, 32)
    """
    steps = (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 128, 256, 512, 1024)
    return next((step for step in steps if count <= step * most), -(-count // most))


def log_axis(values: Any, room: float, *, upright: bool = True) -> dict[str, Any]:
    """Return a logarithmic axis whose tick labels do not overprint.

    Plotly labels 1 to 9 of every decade, which overlap where there are several. The ticks here are the finest
    of 1-2-3-4-5-7, 1-2-5, 1-3, and every, every second, … decade whose labels fit.

    Args:
        values: What is drawn, of any shape; values that are not positive and finite do not count.
        room: Length of the axis in pixels where it is shortest.
        upright: Whether the axis goes up, so that the height of a label counts, not its width.

    Example:
        >>> log_axis([1.0, 40.0], 200)["ticktext"]
        ['1', '2', '5', '10', '20', '50']
    """
    known = np.asarray(values, dtype=float).ravel()
    known = known[np.isfinite(known) & (known > 0)]
    axis: dict[str, Any] = {"type": "log"}
    if not known.size or known.max() < 2 * known.min():
        return axis  # plotly's own ticks are those of a linear axis there
    low, high = np.log10(known.min()) - 0.1, np.log10(known.max()) + 0.1
    decades = np.arange(np.floor(low), np.ceil(high) + 1)
    for digits, step in (*(((*d,), 1) for d in _DIGITS), *(((1,), step) for step in range(1, 100))):
        places = np.add.outer(decades[decades % step == 0], np.log10(digits)).ravel()
        ticks = 10.0 ** places[(places >= low) & (places <= high)]
        labels = [short_number(float(tick)) for tick in ticks]
        gaps = np.diff(np.log10(ticks)) * room / (high - low)
        need = [20 if upright else 5 * (len(a) + len(b)) + 8 for a, b in pairwise(labels)]
        if (gaps >= need).all():
            return {**axis, "tickmode": "array", "tickvals": ticks.tolist(), "ticktext": labels}
    return axis


_DIGITS = ((1, 2, 3, 4, 5, 7), (1, 2, 3, 5), (1, 2, 5), (1, 3))


def short_number(value: float) -> str:
    """Return a number in few characters, as for a tick.

    >>> [short_number(value) for value in (0.05, 2.0, 30000.0, 7e6, 1e-7)]
    ['0.05', '2', '30k', '7M', '1e-07']
    """
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size <= value < 1000 * size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


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
    layout = {key: _fitting(fig, key, texts) for key, texts in layout.items()}
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


def _fitting(fig: go.Figure, key: str, texts: Sequence[Any]) -> Sequence[Any]:
    """Break the titles of an axis into lines; other values stay."""
    axis, _, rest = key.partition(".")
    if rest != "title.text":
        return texts
    room = _plot_height(fig) if axis.startswith("y") else WIDTH
    return [_axis_title(fig.layout[axis], room, text) for text in texts]


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
    panels = max((1 + str(title.text).count("<br>") for title in fig.layout["annotations"]), default=0)
    menu = {
        "buttons": list(buttons),
        "y": 1.0,
        "yanchor": "bottom",
        "pad": {"b": 26 + _LINE["panel"] * max(0, panels - 1)},
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
