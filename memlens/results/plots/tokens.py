"""What results with a token dimension show: patching and decoding, with the sequence's tokens as labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from memlens.errors import check_option
from memlens.results.plots.layers import asked, means, one, plot_layer_lines, single, subtitle_of, with_dims
from memlens.results.result import Result
from memlens.results.statistics.restored import restorable_metric, restored_share

if TYPE_CHECKING:
    import plotly.graph_objects as go


def plot_patch_map(
    result: Result,
    metric: str | None,
    *,
    of: str | None = None,
    group: str | None = None,
    sequence: str | None = None,
    title: str | None = None,
    **intervals: Any,
) -> go.Figure:
    """Draw what patching each layer and position (or head) restores."""
    from memlens import figures

    x = next((d for d in ("head", "position", "target") if with_dims(result, "layer", d)), None)
    if x is None:
        return plot_layer_lines(result, metric, group=group, title=title, **intervals)
    ci, note = patch_values(result, metric, ("layer", x), of, group, sequence, intervals)
    noising = result.settings.get("direction") == "noising"
    heading = title or f"Recall {'left after' if noising else 'restored by'} patching each layer and {x}"
    if x == "head":
        return figures.heatmap_layer_head(ci, title=heading, subtitle=note)
    boundary, tokens = _boundary(result, sequence), None
    if sequence is not None and "token" in result.data.variables:
        row = one(result, sequence)["token"]
        tokens = [str(value) for value in row.sel({x: ci[x]}).values] if row.dims == (x,) else None
    return figures.heatmap_layer_position(
        ci, x=x, tokens=tokens, boundary=boundary if x == "position" else None,
        title=heading, subtitle=note,
    )  # fmt: skip


def patch_values(
    result: Result,
    metric: str | None,
    shown: tuple[str, str],
    of: str | None,
    group: str | None,
    sequence: str | None,
    intervals: dict[str, Any],
) -> tuple[xr.Dataset, str]:
    """Return what patching has to show on two dimensions, and the words below the title.

    That is, for each metric, its effect where it has a baseline, else its value; unasked, the share of the
    lost recall that is restored comes first, as it needs no unit. Over sequences it is one share for all of
    them; of one sequence it is its `normalized_effect`.
    """
    names = asked(metric) or with_dims(result, *shown)
    one_has_it = sequence is None or "normalized_effect" in result.data
    if metric is None and one_has_it and restorable_metric(result):
        names = ["restored_share", *(name for name in names if name != "normalized_effect")]
    parts: dict[str, xr.DataArray] = {}
    for name in names:
        paired = any(name + tail in result.data for tail in ("_baseline", "_corrupt"))
        which = of or ("effect" if paired else "value")
        if name == "restored_share" and sequence is not None:
            parts[name] = single(result, ["normalized_effect"], shown, "value", sequence)["normalized_effect"]
        elif name == "restored_share":
            hidden = {str(dim) for dim in result.data.dims} - {*shown}
            options = {key: value for key, value in intervals.items() if key != "method"}
            parts[name] = restored_share(result, hidden, group=group, **options)[name]
        elif sequence is not None:
            parts[name] = single(result, [name], shown, which, sequence)[name]
        else:
            parts[name] = means(result, [name], shown, of=which, group=group, **intervals)[name]
    count = result.data.sizes["sequence"]
    who = f"over {count} sequences" if sequence is None else f"one sequence, {sequence}"
    scale = "blue = more recall, red = less"
    return xr.Dataset(parts), " · ".join((who, scale, str(result.data.attrs.get("model", ""))))


def _boundary(result: Result, sequence: str | None) -> float | None:
    """Return the first position of the continuation, where all the shown sequences share it."""
    if "prefix_len" not in result.data.variables:
        found = result.data.attrs.get("prefix_len", result.settings.get("prefix_len"))
        return float(found) if isinstance(found, int | float) else None
    lengths = one(result, sequence)["prefix_len"] if sequence is not None else result.data["prefix_len"]
    values = np.unique(lengths.values)
    return float(values[0]) if len(values) == 1 else None


def plot_decoding(
    result: Result,
    metric: str | None,
    *,
    stream: str = "resid_post",
    token: str = "target",
    group: str | None = None,
    sequence: str | None = None,
    title: str | None = None,
    **intervals: Any,
) -> go.Figure:
    """Draw a token's probability and rank over layers, another metric over layers, or one sequence's map.

    The token is the "target", or the "predicted" one, which the model says in the end.
    """
    from memlens import figures

    data = result.data
    if "stream" in data.dims:
        check_option("stream", stream, [str(value) for value in data["stream"].values])
        data = data.sel(stream=stream)
    if sequence is not None:
        return _decoding_map(Result(data), metric, sequence, title)
    check_option("token", token, ("target", "predicted"))
    if metric is not None and metric not in ("rank", "probability"):
        return plot_layer_lines(Result(data), metric, group=group, title=title, **intervals)
    prefix = "predicted_" if token == "predicted" else ""
    rank = np.log(data[f"{prefix}rank"] + 1.0)
    derived = xr.Dataset({"probability": data[f"{prefix}probability"], "rank": rank}, attrs=data.attrs)
    ci = Result(derived).mean_ci(("sequence", "target"), group=group, **{"method": "bootstrap", **intervals})
    ci["rank"] = np.exp(ci["rank"])
    return figures.decoding_panels(
        ci,
        title=title or f"The {token} token, decoded after each layer",
        subtitle=subtitle_of(result, of="value", level=ci.attrs["level"]),
    )


def _decoding_map(result: Result, metric: str | None, sequence: str, title: str | None) -> go.Figure:
    from memlens import figures

    row = one(result, sequence)
    x = "target" if "target" in row.dims else "position"
    names = [metric] if metric else [n for n in result.metrics if set(row[n].dims) == {"layer", x}]
    places = row[names].dropna(x, how="all")[x]  # a ragged set has empty targets at the end
    row = row.sel({x: places})
    labels = row["token"] if "token" in row.variables else None
    tokens = [str(v) for v in labels.values] if labels is not None and labels.dims == (x,) else None
    return figures.heatmap_layer_position(
        row[names], metrics=names, x=x, signed=False, tokens=tokens,
        title=title or "Each target token, decoded after each layer",
        subtitle=f"one sequence, {sequence} · {result.data.attrs.get('model', '')}",
    )  # fmt: skip
