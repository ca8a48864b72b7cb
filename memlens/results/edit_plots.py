"""What knock-outs and perturbations show: maps of windows of layers, and curves over a strength."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memlens.errors import OptionError, SiteError, check_option
from memlens.results.plots import asked, means, subtitle_of, with_dims
from memlens.results.result import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = ["plot_knock_outs", "plot_strengths"]

_STRENGTHS = {
    "alpha": "noise strength α",
    "replaced": "replaced prefix tokens",
    "prefix_len": "prefix tokens given",
    "prompt_tokens": "prompt tokens kept",
    "tokens_back": "tokens before the continuation",
}


def plot_knock_outs(
    result: Result,
    metric: str | None,
    *,
    of: str = "effect",
    k: int | None = None,
    selection: str | None = None,
    group: str | None = None,
    title: str | None = None,
    **intervals: Any,
) -> go.Figure:
    """Draw the effect of each window of layers: its first layer up, its length to the right.

    Maps for several `k` stand side by side; with controls (or a `group`) those do, for the largest `k` unless
    one is given.
    """
    from memlens import figures

    data = result.data
    if k is not None and k not in data["k"].values:
        raise SiteError(f"k={k} is not in this result: take one of {data['k'].values.tolist()}.")
    controls = "selection" in data.dims
    if selection is not None:
        known = [str(value) for value in data["selection"].values] if controls else []
        check_option("selection", selection, known)
        data, controls = data.sel(selection=selection), False
    elif controls and group is not None:
        raise OptionError("group= draws one selection: name it, such as selection='dominant'.")
    if k is None and (controls or group is not None):
        k = int(data["k"].max())
    side = "selection" if controls else "k"
    if k is not None:
        data = data.sel(k=k)
    else:
        data = data.assign_coords(k=[f"k = {value}" for value in data["k"].values])
    chosen = Result(data)
    names = asked(metric) or with_dims(chosen, "layer", "window")
    names = sorted(names, key=lambda name: name not in ("prediction_flipped", "target_missed"))
    ci = means(chosen, names, ("layer", "window", side), of=of, group=group, **intervals)
    note = "red = recall harmed" if of == "effect" else ""
    what = "all but the top" if result.settings.get("keep") else "the top"
    count = "k" if k is None else str(k)
    heading = title or f"Knock-out of {what} {count} neurons of a layer"
    return figures.heatmap_layer_position(
        ci, metrics=names, x="window", signed=of == "effect", title=heading,
        subtitle=subtitle_of(result, of=of, note=note, level=ci.attrs["level"]),
    )  # fmt: skip


def plot_strengths(
    result: Result,
    metric: str | None,
    *,
    of: str = "value",
    group: str | None = None,
    title: str | None = None,
    **intervals: Any,
) -> go.Figure:
    """Draw curves over the strength of a perturbation; a metric with layers is drawn over these instead."""
    from memlens import figures

    x = next(name for name in _STRENGTHS if name in result.data.dims)
    if metric is not None and "layer" in result[metric].dims:
        if group is not None:
            raise OptionError(f"group= is not drawn for {metric!r}: its lines are strengths.")
        ci = means(result, [metric], ("layer", x), of=of, **intervals)
        heading = title or "Each layer's residual, clean against disturbed"
        place: dict[str, Any] = {"x": "layer"}
    else:
        names = asked(metric) or [n for n in with_dims(result, x) if "layer" not in result[n].dims]
        ci = means(result, names, (x,), of=of, group=group, **intervals)
        heading = title or f"Recall by {_STRENGTHS[x]}"
        place = {"x": x, "x_title": _STRENGTHS[x]}
    subtitle = subtitle_of(result, of=of, level=ci.attrs["level"])
    return figures.line_over_layers(ci, title=heading, subtitle=subtitle, **place)
