"""Many models in one figure: rates against size, curves by family, shares, and similarity between models.

The arguments are tidy tables with one row per point, and columns `model` and `family` where these determine
colors or panels. The figure is returned, not shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots

from memlens.errors import ResultError
from memlens.figures import theme
from memlens.figures.labels import hover, plain

_DASHES = ("solid", "dot", "dash", "dashdot")


def sizes(frame: pd.DataFrame, *, title: str = "Recall and size", subtitle: str = "") -> go.Figure:
    """Draw the rate (up) against the number of parameters (right, logarithmic), one line per family.

    Args:
        frame: Columns `model`, `family`, `n_params`, `rate`, `low`, `high`.
        title: Title of the figure.
        subtitle: Number of sequences.
    """
    _check(frame, ("model", "family", "n_params", "rate", "low", "high"))
    fig = go.Figure()
    families = list(dict.fromkeys(frame["family"].astype(str)))
    for family, color in zip(families, theme.group_colors(families), strict=True):
        part = frame.loc[frame["family"].astype(str) == family].sort_values("n_params")
        fig.add_trace(
            go.Scatter(
                x=part["n_params"], y=part["rate"], name=plain(family), mode="lines+markers", showlegend=True,
                line={"color": color, "width": 2}, marker={"size": 8},
                error_y=_bars(part, "rate", color),
                text=[plain(name) for name in part["model"]],
                **_row(part, "%{text}<br>%{x:.3s} parameters<br>rate %{y:.4g}"),
            )
        )  # fmt: skip
    fig.update_xaxes(theme.log_axis(frame["n_params"], theme.WIDTH, upright=False), title_text="parameters")
    fig.update_yaxes(title_text="share recalled exactly", rangemode="tozero")
    return theme.figure(fig, title=title, subtitle=subtitle, height=440)


def curves_by_family(
    frame: pd.DataFrame,
    x: str,
    *,
    dash: str | None = None,
    x_title: str = "",
    y_title: str = "",
    log_x: bool = False,
    order: str = "size",
    title: str = "",
    subtitle: str = "",
) -> go.Figure:
    """Draw one panel per family and one line per model, with its interval as a band.

    The legend names ranks within a family, not models; hovering over a line shows its model. With a single
    family, the legend shows its models.

    Args:
        frame: Columns `model`, `family`, `x`, `mean`, and where there are intervals `low` and `high`; the
            models of a family are in order, smallest first.
        x: The column to the right.
        dash: A column whose values are drawn as solid, dotted or dashed lines (such as memorized and
            control), and in different colors where each family has one model.
        x_title: Title of the x axis.
        y_title: What `mean` is.
        log_x: Use a logarithmic x axis; points at 0 are left out.
        order: What the models of a family are ordered by, for the legend: "1st in size".
        title: Title of the figure.
        subtitle: Number of sequences.
    """
    _check(frame, ("model", "family", x, "mean", *([dash] if dash else [])))
    frame = frame.assign(family=frame["family"].astype(str), model=frame["model"].astype(str))
    families = list(dict.fromkeys(frame["family"]))
    columns = min(4, len(families))
    rows = -(-len(families) // columns)
    fig = make_subplots(
        rows, columns, shared_yaxes=True, subplot_titles=[plain(name) for name in families],
        vertical_spacing=0.3 / rows, horizontal_spacing=0.03,
    )  # fmt: skip
    kinds = list(dict.fromkeys(frame[dash].astype(str))) if dash else [""]
    styles = dict(zip(kinds, _DASHES * len(kinds), strict=False))
    most = max(frame.groupby("family")["model"].nunique())
    by_kind = len(kinds) > 1 and most == 1
    colors = theme.group_colors(kinds if by_kind else [str(number) for number in range(most)])
    for place, family in enumerate(families):
        part = frame.loc[frame["family"] == family]
        at = {"row": place // columns + 1, "col": place % columns + 1}
        for number, (model, of_model) in enumerate(part.groupby("model", sort=False)):
            name = str(model) if len(families) == 1 else f"{_ordinal(number + 1)} in {order}"
            for shade, kind in enumerate(kinds):
                line = of_model.loc[of_model[dash].astype(str) == kind] if dash else of_model
                line = line.loc[line[x] > 0] if log_x else line
                label = f"{model}, {kind}" if kind else str(model)
                color = colors[shade if by_kind else number]
                for trace in _line(line.sort_values(x), x, label, color, styles[kind]):
                    trace.legendgroup = kind if by_kind else name
                    fig.add_trace(trace, at["row"], at["col"])
        lowest = place + columns >= len(families)
        fig.update_xaxes(title_text=plain(x_title or x) if lowest else "", row=at["row"], col=at["col"])
    _add_legend(fig, {} if by_kind else styles)
    scale = theme.log_axis(frame[x], theme.WIDTH / columns - 20, upright=False) if log_x else {}
    fig.update_xaxes(scale, zeroline=False)
    fig.update_yaxes(title_text=y_title, col=1)
    return theme.figure(fig, title=title, subtitle=subtitle, height=200 + 260 * rows)


def _add_legend(fig: go.Figure, styles: Mapping[str, str]) -> None:
    """Show each group of lines once, where there are several, and each style of line."""
    lines = [trace for trace in cast("Sequence[Any]", fig.data) if trace.hovertemplate]
    first = {trace.legendgroup: trace for trace in reversed(lines)}
    for name, trace in first.items():
        trace.update(name=plain(name), showlegend=len(first) > 1)
    if len(styles) > 1:
        line = {"color": "#6B7280", "width": 2}
        for kind, style in styles.items():
            look = go.Scatter(x=[None], y=[None], mode="lines", line={**line, "dash": style})
            fig.add_trace(look.update(name=plain(kind), showlegend=True))


def _ordinal(number: int) -> str:
    """Return a number as a place in an order.

    >>> [_ordinal(number) for number in (1, 2, 3, 4, 11, 22)]
    ['1st', '2nd', '3rd', '4th', '11th', '22nd']
    """
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def _line(part: pd.DataFrame, x: str, label: str, color: str, style: str) -> list[go.Scatter]:
    traces = []
    if _has_interval(part):
        band = part[np.isfinite(part["low"]) & np.isfinite(part["high"])]
        traces.append(
            go.Scatter(
                x=[*band[x], *band[x][::-1]], y=[*band["high"], *band["low"][::-1]], fill="toself",
                fillcolor=theme.translucent(color, 0.12), line={"width": 0}, mode="lines", hoverinfo="skip",
                showlegend=False,
            )
        )  # fmt: skip
    traces.append(
        go.Scatter(
            x=part[x], y=part["mean"], showlegend=False, mode="lines+markers",
            line={"color": color, "dash": style, "width": 2}, marker={"size": 5},
            **_row(part, f"{plain(label)}<br>{plain(x)} %{{x:.4g}}: %{{y:.4g}}"),
        )
    )  # fmt: skip
    return traces


def _row(part: pd.DataFrame, text: str) -> dict[str, Any]:
    """Return the hover text: `text`, then interval and number of sequences where known."""
    ends = ["low", "high"] if _has_interval(part) else []
    values = [*ends, "n"] if "n" in part else ends
    n = len(ends) if "n" in part else None
    template = hover(text, low=0 if ends else None, n=n, counted="")
    return {"hovertemplate": template, "customdata": part[values].to_numpy() if values else None}


def _has_interval(part: pd.DataFrame) -> bool:
    return {"low", "high"} <= set(part) and bool(np.isfinite(part["low"]).any())


def shares_by_model(
    frame: pd.DataFrame, part: str, value: str = "share", *, title: str = "", subtitle: str = ""
) -> go.Figure:
    """Draw one bar per model, divided into the shares of its parts.

    Args:
        frame: Columns `model`, `part`, `value`; the parts of a model add up to 1.
        part: The column that says which part.
        value: The column of shares.
        title: Title of the figure.
        subtitle: Number of sequences.
    """
    _check(frame, ("model", part, value))
    parts = list(dict.fromkeys(frame[part].astype(str)))
    fig = go.Figure()
    for name, color in zip(parts, theme.group_colors(parts), strict=True):
        here = frame[frame[part].astype(str) == name]
        fig.add_trace(
            go.Bar(
                y=[plain(model) for model in here["model"]], x=here[value], name=plain(name), orientation="h",
                marker={"color": color}, showlegend=True,
                hovertemplate=f"%{{y}}<br>{plain(name)}: %{{x:.3g}}<extra></extra>",
            )
        )  # fmt: skip
    fig.update_layout(barmode="stack")
    fig.update_xaxes(title_text="share", range=[0, 1])
    fig.update_yaxes(autorange="reversed", type="category")
    return theme.figure(fig, title=title, subtitle=subtitle, height=220 + 24 * len(set(frame["model"])))


def model_dots(
    frame: pd.DataFrame,
    *,
    x_title: str = "",
    reference: str | None = None,
    title: str = "",
    subtitle: str = "",
) -> go.Figure:
    """Draw a dot with its interval for each model, in its family's color.

    Args:
        frame: Columns `model`, `family`, `mean`, `low`, `high`; a model may have several rows, distinguished
            by a column `kind`.
        x_title: What `mean` is.
        reference: A column drawn as a gray mark next to each dot, such as the value expected by chance.
        title: Title of the figure.
        subtitle: Number of sequences.
    """
    _check(frame, ("model", "family", "mean", "low", "high", *([reference] if reference else [])))
    labels = [
        plain(f"{model}: {kind}" if kind else model)
        for model, kind in zip(
            frame["model"], frame["kind"] if "kind" in frame else [""] * len(frame), strict=True
        )
    ]
    families = list(dict.fromkeys(frame["family"].astype(str)))
    fig = go.Figure()
    for family, color in zip(families, theme.group_colors(families), strict=True):
        here = (frame["family"].astype(str) == family).to_numpy()
        part = frame.loc[here]
        fig.add_trace(
            go.Scatter(
                x=part["mean"], y=[label for label, own in zip(labels, here, strict=True) if own],
                mode="markers", name=plain(family), showlegend=True, marker={"color": color, "size": 9},
                error_x=_bars(part, "mean", color),
                **_row(part, "%{y}<br>%{x:.4g}"),
            )
        )  # fmt: skip
    if reference:
        fig.add_trace(
            go.Scatter(
                x=frame[reference], y=labels, mode="markers", name="chance", showlegend=True,
                marker={"color": "#9aa5b1", "symbol": "line-ns-open", "size": 12, "line": {"width": 2}},
                hovertemplate="%{y}<br>chance %{x:.4g}<extra></extra>",
            )
        )  # fmt: skip
    fig.update_xaxes(title_text=x_title, zeroline=True)
    fig.update_yaxes(type="category", categoryorder="array", categoryarray=labels[::-1], automargin=True)
    return theme.figure(fig, title=title, subtitle=subtitle, height=200 + 26 * len(labels))


def similarity_map(
    similarity: Float[np.ndarray, "model model"],
    labels: Sequence[str],
    merges: Float[np.ndarray, "merge 4"],
    order: Sequence[int],
    *,
    title: str = "Similarity between models",
    subtitle: str = "",
) -> go.Figure:
    """Draw the similarity of all pairs as a map, in the order of the clustering drawn above it.

    Args:
        similarity: Similarity of every pair.
        labels: Names of the models.
        merges: Their clustering in scipy's format; its heights are distances.
        order: Order of the leaves.
        title: Title of the figure.
        subtitle: What similarity is.
    """
    if similarity.shape != (len(labels), len(labels)):
        raise ResultError(
            f"{len(labels)} labels do not fit a map of shape {similarity.shape}: give one label per row."
        )
    fig = make_subplots(2, 1, row_heights=[0.25, 0.75], vertical_spacing=0.02, shared_xaxes=True)
    for xs, ys in _branches(merges, order):
        fig.add_trace(
            go.Scatter(
                x=xs, y=ys, mode="lines", line={"color": "#52606d", "width": 1.5}, hoverinfo="skip",
                showlegend=False,
            ),
            row=1,
            col=1,
        )  # fmt: skip
    names, places = [plain(labels[i]) for i in order], list(range(len(order)))
    values = similarity[np.ix_(order, order)]
    fig.add_trace(
        go.Heatmap(
            z=values, x=places, y=places, colorscale=theme.magnitude_scale(), zmax=1.0,
            customdata=np.array([[f"{a} and {b}" for b in names] for a in names]),
            colorbar={**theme.color_bar("similarity"), "len": 0.72, "y": 0.36},
            hovertemplate="%{customdata}<br>%{z:.3f}<extra></extra>",
        ),
        row=2,
        col=1,
    )  # fmt: skip
    axis: dict[str, Any] = {"tickmode": "array", "tickvals": places, "ticktext": names, "showgrid": False}
    fig.update_xaxes({**axis, "tickangle": -50}, row=2, col=1)
    fig.update_yaxes({**axis, "autorange": "reversed"}, row=2, col=1)
    fig.update_yaxes(title_text="distance", rangemode="tozero", row=1, col=1)
    return theme.figure(fig, title=title, subtitle=subtitle, height=480 + 26 * len(labels))


def _branches(
    merges: Float[np.ndarray, "merge 4"], order: Sequence[int]
) -> list[tuple[list[float], list[float]]]:
    """Return the lines of a dendrogram whose leaves are at 0, 1, … in the given order."""
    n = len(order)
    places: dict[int, tuple[float, float]] = {leaf: (float(i), 0.0) for i, leaf in enumerate(order)}
    lines = []
    for i, (a, b, height, _) in enumerate(merges.tolist()):
        (xa, ya), (xb, yb) = places[int(a)], places[int(b)]
        lines.append(([xa, xa, xb, xb], [ya, height, height, yb]))
        places[n + i] = ((xa + xb) / 2, height)
    return lines


def _bars(part: pd.DataFrame, mean: str, color: str) -> dict[str, Any]:
    return theme.error_bars(part[mean], part["low"], part["high"], theme.translucent(color, 0.6))


def _check(frame: pd.DataFrame, columns: Sequence[str]) -> None:
    missing = [name for name in columns if name not in frame]
    if missing or frame.empty:
        what = f"lacks the columns {', '.join(missing)}" if missing else "has no rows"
        raise ResultError(f"the table to draw {what}: it needs {', '.join(columns)}.")
