"""Figures of patching and decoding, with the tokens of a sequence as labels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from memlens import figures
from memlens.errors import check_option
from memlens.results.plots.layers import plot_layer_lines
from memlens.results.plots.selection import Selection, one, single, takes, with_dims
from memlens.results.result import Result
from memlens.results.statistics.intervals import changed_too_little, restorable_metric, restored_share


@takes(of=None, group=None, sequence=None)
def plot_patch_map(result: Result, s: Selection) -> go.Figure:
    """Draw what patching each layer and position (or head) restores."""
    x = next((d for d in ("head", "position", "target") if with_dims(result, "layer", d)), None)
    if x is None:
        return plot_layer_lines(result, replace(s, of="value"))
    ci, note = patch_values(result, s, ("layer", x))
    noising = result.settings.get("direction") == "noising"
    heading = s.title or f"Recall {'left after' if noising else 'restored by'} patching each layer and {x}"
    if x == "head":
        return figures.heatmap_layer_head(ci, title=heading, subtitle=note)
    boundary, tokens = _boundary(result, s.sequence), None
    if s.sequence is not None:
        ci = ci.dropna(x, how="all")  # a ragged set has empty places at the end of its shorter sequences
    if s.sequence is not None and "token" in result.data.variables:
        row = one(result, s.sequence)["token"]
        tokens = [str(value) for value in row.sel({x: ci[x]}).values] if row.dims == (x,) else None
    return figures.heatmap_layer_position(
        ci, x=x, tokens=tokens, boundary=boundary if x == "position" else None,
        title=heading, subtitle=note,
    )  # fmt: skip


def patch_values(result: Result, s: Selection, shown: tuple[str, str]) -> tuple[xr.Dataset, str]:
    """Return what patching shows on two dimensions, and the subtitle.

    For each metric that is its effect where it has a baseline, else its value. Unless a metric is asked for,
    the restored share of the lost recall comes first, since it needs no unit: over all sequences it is
    `restored_share` (left out where the corruption changed too little), for one it is its
    `normalized_effect`.
    """
    sequence = s.sequence
    names = s.names(result, *shown)
    one_has_it = sequence is None or "normalized_effect" in result.data
    if s.metric is None and one_has_it and restorable_metric(result) and not changed_too_little(result):
        names = ["restored_share", *(name for name in names if name != "normalized_effect")]
    parts: dict[str, xr.DataArray] = {}
    for name in names:
        paired = any(name + tail in result.data for tail in ("_baseline", "_corrupt"))
        which = s.of or ("effect" if paired else "value")
        if name == "restored_share" and sequence is not None:
            parts[name] = single(result, ["normalized_effect"], shown, "value", sequence)["normalized_effect"]
        elif name == "restored_share":
            hidden = {str(dim) for dim in result.data.dims} - {*shown}
            parts[name] = restored_share(result, hidden, group=s.group, **s.bootstrap)[name]
        elif sequence is not None:
            parts[name] = single(result, [name], shown, which, sequence)[name]
        else:
            parts[name] = s.means(result, [name], shown, of=which)[name]
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


@takes(group=None, sequence=None)
def plot_decoding(
    result: Result, s: Selection, *, stream: str = "resid_post", token: str = "target"
) -> go.Figure:
    """Draw a token's probability and rank over layers, another metric over layers, or one sequence's map.

    The token is the "target", or the "predicted" one, which the model says in the end.
    """
    data = result.data
    if "stream" in data.dims:
        check_option("stream", stream, [str(value) for value in data["stream"].values])
        data = data.sel(stream=stream)
    if s.sequence is not None:
        return _decoding_map(Result(data), s, s.sequence)
    check_option("token", token, ("target", "predicted"))
    if s.metric not in (None, "rank", "probability"):
        return plot_layer_lines(Result(data), s)
    prefix = "predicted_" if token == "predicted" else ""
    rank = np.log(data[f"{prefix}rank"] + 1.0)
    derived = xr.Dataset({"probability": data[f"{prefix}probability"], "rank": rank}, attrs=data.attrs)
    method = "bootstrap" if s.method == "auto" else s.method
    options = {**s.bootstrap, "method": method, "group": s.group}
    ci = Result(derived).mean_ci(("sequence", "target"), **options)
    ci["rank"] = np.exp(ci["rank"])
    return figures.decoding_panels(
        ci, title=s.title or f"The {token} token, decoded after each layer", subtitle=s.subtitle(result)
    )


def _decoding_map(result: Result, s: Selection, sequence: str) -> go.Figure:
    row = one(result, sequence)
    x = "target" if "target" in row.dims else "position"
    names = [s.metric] if s.metric else [n for n in result.metrics if set(row[n].dims) == {"layer", x}]
    places = row[names].dropna(x, how="all")[x]  # a ragged set has empty targets at the end
    row = row.sel({x: places})
    labels = row["token"] if "token" in row.variables else None
    tokens = [str(v) for v in labels.values] if labels is not None and labels.dims == (x,) else None
    return figures.heatmap_layer_position(
        row[names], x=x, signed=False, tokens=tokens,
        title=s.title or "Each target token, decoded after each layer",
        subtitle=f"one sequence, {sequence} · {result.data.attrs.get('model', '')}",
    )  # fmt: skip
