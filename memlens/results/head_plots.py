"""What sets of heads and kinds of bypass show."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import xarray as xr

from memlens.results.plots import asked, means, plot_head_map, plot_layer_lines, subtitle_of, with_dims
from memlens.results.result import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = ["plot_bypass", "plot_cumulative", "plot_pairs"]


def plot_bypass(
    result: Result,
    metric: str | None,
    *,
    of: str | None = None,
    group: str | None = None,
    title: str | None = None,
    **intervals: Any,
) -> go.Figure:
    """Draw curves over layers, one a strength where there are several; a map where heads are told apart."""
    from memlens import figures

    options: dict[str, Any] = {"group": group, "title": title, **intervals}
    if with_dims(result, "layer", "head"):
        return plot_head_map(result, metric, of=of, **options)
    of = of or "value"
    names = asked(metric) or with_dims(result, "layer")
    if group is None and result.data.sizes.get("strength", 1) > 1:
        ci = means(result, names, ("layer", "strength"), of=of, **intervals)
        subtitle = subtitle_of(result, of=of, level=ci.attrs["level"], note="strength 1 = full bypass")
        heading = title or "Each layer in turn: attention bypass in part"
        return figures.line_over_layers(ci, title=heading, subtitle=subtitle)
    return plot_layer_lines(result, metric, of=of, **options)


def plot_cumulative(
    result: Result,
    metric: str | None,
    *,
    of: str = "value",
    group: str | None = None,
    title: str | None = None,
    **intervals: Any,
) -> go.Figure:
    """Draw a metric over the number of heads that are gone: the ranked order beside random ones.

    With a `group` only the ranked order is drawn, one line a group.
    """
    from memlens import figures

    shown = ("n_ablated", "order") if group is None else ("n_ablated",)
    chosen = result if group is None else Result(result.data.sel(order="ranked", drop=True))
    names = asked(metric) or with_dims(chosen, *shown)
    ci = means(chosen, names, shown, of=of, group=group, **intervals)
    return figures.line_over_layers(
        ci,
        x="n_ablated",
        x_title="heads ablated",
        title=title or "How many heads must go until recall goes",
        subtitle=subtitle_of(result, of=of, level=ci.attrs["level"]),
    )


def plot_pairs(
    result: Result,
    metric: str | None,
    *,
    of: str | None = None,
    group: str | None = None,
    title: str | None = None,
    **intervals: Any,
) -> go.Figure:
    """Draw the interaction of each pair of heads, and by menu the effects (single heads on the diagonal)."""
    from memlens import figures

    dims = ("head_a", "head_b")
    every = with_dims(result, *dims)
    names = asked(metric) or sorted(every, key=lambda name: name != "interaction")
    parts: dict[str, xr.DataArray] = {}
    for name in names:
        which = "value" if name == "interaction" else of or "effect"
        parts[name] = means(result, [name], dims, of=which, group=group, **intervals)[name]
    ci = xr.Dataset(parts, attrs=result.data.attrs)
    note = "red = more harm than the sum of both"
    return figures.heatmap_paths(
        ci,
        metrics=names,
        x="head_b",
        y="head_a",
        title=title or "Pairs of heads: what both do beyond the sum of each",
        subtitle=subtitle_of(result, of="value", note=note),
    )
