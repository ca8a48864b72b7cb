"""Figures of bypasses, sets of heads, single sites, paths, estimated effects and screens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import xarray as xr

from memlens import figures
from memlens.results.plots.layers import plot_head_map, plot_interventions, plot_layer_lines
from memlens.results.plots.selection import Selection, takes, with_dims
from memlens.results.plots.tokens import patch_values, plot_patch_map
from memlens.results.result import Result
from memlens.results.statistics.estimates import Estimate


@takes(of=None, group=None)
def plot_bypass(result: Result, s: Selection) -> go.Figure:
    """Draw curves over layers, one per strength where there are several; a map where heads differ."""
    if with_dims(result, "layer", "head"):
        return plot_head_map(result, s)
    if s.group is not None or result.data.sizes.get("strength", 1) == 1:
        return plot_layer_lines(result, s)
    heading, note = "Each layer in turn: attention bypass in part", "strength 1 = full bypass"
    names = s.names(result, "layer")
    ci, caption = s.drawn(result, ("layer", "strength"), heading, names=names, note=note)
    return figures.line_over_layers(ci, **caption)


@takes(of="value", group=None)
def plot_cumulative(result: Result, s: Selection) -> go.Figure:
    """Draw a metric over the number of heads ablated, in the ranked order and in random orders.

    With a `group` only the ranked order is drawn, with one line per group.
    """
    shown = ("n_ablated", "order")
    if s.group is not None:
        result, shown = Result(result.data.sel(order="ranked", drop=True)), ("n_ablated",)
    ci, caption = s.drawn(result, shown, "How many heads must go until recall goes")
    return figures.line_over_layers(ci, x="n_ablated", x_title="heads ablated", **caption)


@takes(of=None, group=None)
def plot_pairs(result: Result, s: Selection) -> go.Figure:
    """Draw the interaction of each pair of heads; a menu shows effects (single heads on the diagonal)."""
    dims = ("head_a", "head_b")
    names = sorted(s.names(result, *dims), key=lambda name: name != "interaction")
    parts: dict[str, xr.DataArray] = {}
    for name in names:
        of = "value" if name == "interaction" else s.of or "effect"
        parts[name] = s.means(result, [name], dims, of=of)[name]
    return figures.heatmap_paths(
        xr.Dataset(parts, attrs=result.data.attrs), x="head_b", y="head_a",
        title=s.title or "Pairs of heads: what both do beyond the sum of each",
        subtitle=s.subtitle(result, note="red = more harm than the sum of both"),
    )  # fmt: skip


_LETTERS = {"layer": "L", "head": "H", "neuron": "N", "position": " at "}


@takes(of=None, group=None, sequence=None)
def plot_gradients(result: Result, s: Selection) -> go.Figure:
    """Draw estimated effects in the form of the exact instrument's figure; neurons as dots."""
    if with_dims(result, "neuron"):
        return plot_sites(result, s)
    x = next((d for d in ("head", "position") if with_dims(result, "layer", d)), None)
    if x is None:
        heading = s.title or "Estimated effect of each layer"
        return plot_layer_lines(_without_ratio(result), replace(s, of=s.of or "effect", title=heading))
    ablated = result.settings.get("mode")
    heading = s.title or f"Estimated effect of {'ablating' if ablated else 'patching'} each layer and {x}"
    plot = plot_head_map if ablated and x == "head" else plot_patch_map
    return plot(result, replace(s, title=heading))


@takes(of=None, group=None)
def plot_sites(result: Result, s: Selection, *, most: int = 40) -> go.Figure:
    """Draw the largest effects of many sites as dots with their intervals."""
    names = [n for n in s.names(result, "layer") if n != "normalized_effect"]
    dims = [d for d in ("layer", "head", "neuron", "position") if d in result[names[0]].dims]
    flat = _without_ratio(_named(result, {"intervention": dims}))
    heading = s.title or (
        "Estimated effects" if result.kind == "gradient_attribution" else "Effects of single sites"
    )
    return plot_interventions(flat, replace(s, title=heading), most=most)


@takes(of=None, group=None, sequence=None)
def plot_paths(result: Result, s: Selection) -> go.Figure:
    """Draw what each path restores: sender by receiver, or each head's path to the logits."""
    noising = result.settings.get("direction") == "noising"
    verb = "left after" if noising else "restored by"
    if not with_dims(result, "sender_layer"):
        heading = s.title or f"Recall {verb} patching each head's path to the logits"
        return plot_patch_map(result, replace(s, title=heading))
    ends = [d for d in ("receiver_layer", "receiver_head") if d in result.data.dims]
    flat = _named(result, {"sender": ["sender_layer", "sender_head"], "receiver": ends})
    ci, note = patch_values(flat, s, ("sender", "receiver"))
    receiver = result.settings.get("receiver_input", "")
    heading = s.title or f"Recall {verb} patching each path into {receiver}"
    return figures.heatmap_paths(ci, title=heading, subtitle=note)


def plot_screening(
    table: pd.DataFrame, agreement: pd.DataFrame, metric: str, attrs: Mapping[str, Any]
) -> go.Figure:
    """Draw a screen's verified sites; see `memlens.instruments.Screening`."""
    dims = [d for d in _LETTERS if d in table]
    labels = ["".join(f"{_LETTERS[d]}{row[d]}" for d in dims) for _, row in table.iterrows()]
    arrays = {
        name: (("statistic", "site"), table[[name, f"{name}_low", f"{name}_high"]].to_numpy().T)
        for name in ("estimate", "exact")
    }
    coords: dict[str, Any] = {"statistic": ["mean", "low", "high"], "label": ("site", labels)}
    sites = xr.Dataset(arrays, {**coords, "chosen": ("site", table["chosen"].to_numpy(dtype=str))})
    recall = Estimate.from_row(agreement.loc["recall of exact top k"].to_dict(), n=None)
    said = f"recall of the exact top k {recall}"
    subtitle = " · ".join((f"{table['n'].max()} sequences", said, str(attrs.get("model", ""))))
    title = "Estimated and exact effects of the verified sites"
    return figures.scatter_agreement(sites, metric=metric, title=title, subtitle=subtitle)


@takes()
def plot_top(result: Result, s: Selection, *, most: int = 40) -> go.Figure:
    """Draw what a race for the top k knows of each component: estimate, interval and decision.

    The intervals are those that the race ended with; they are not computed anew.
    """
    name = str(result.settings["metric"])
    dims = [str(d) for d in result["status"].dims]
    table = result.data[["status", "estimate", "low", "high", "sequences_used"]].reset_coords(drop=False)
    labels = table["status"].stack(component=dims)["component"].values
    if dims == ["intervention"]:
        labels = [str(label[0] if isinstance(label, tuple) else label) for label in labels]
    else:
        labels = [
            "".join(f"{_LETTERS.get(d, f' {d} ')}{v}" for d, v in zip(dims, at, strict=True)) for at in labels
        ]
    flat = {part: table[part].values.ravel() for part in table.data_vars}
    there = flat["status"] != ""
    words = {"in": f"in the top {result.settings['k']}"}
    groups = [g for g in ("in", "undecided", "out") if (flat["status"] == g).any()]
    ends = np.stack([flat["estimate"], flat["low"], flat["high"]])[:, there]
    parts = [np.where(flat["status"][there] == g, ends, np.nan) for g in groups]
    ci = xr.Dataset(
        {name: (("statistic", "component", "status"), np.stack(parts, -1))},
        {
            "statistic": ["mean", "low", "high"],
            "component": np.array(labels, dtype=object)[there],
            "status": [words.get(g, g) for g in groups],
            f"n_{name}": ("component", flat["sequences_used"][there]),
        },
        result.data.attrs,
    )
    ci[name].attrs = {**result[name].attrs, "of": "effect"}
    share = result.settings["share"]
    level = f"{100 * result.settings['level']:g} %"
    subtitle = f"{level} intervals of the mean over the given sequences · {100 * share:.3g} % of all cells"
    figure = figures.dots_with_intervals(
        ci, dim="component", most=most, title=s.title or "Which components are in the top", subtitle=subtitle
    )
    inside = flat["status"][there] == "in"
    if inside.any() and ends[0, inside].mean() < ends[0].mean():
        figure.update_yaxes(autorange="reversed")  # the top is seen first, also where it is the most negative
    return figure


def _without_ratio(result: Result) -> Result:
    """Leave out the normalized effect, which is not a change of a metric."""
    return Result(result.data.drop_vars("normalized_effect", errors="ignore"))


def _named(result: Result, flat: Mapping[str, list[str]]) -> Result:
    """Join dimensions into one that names its places, such as `L3H2`; those without any value are dropped."""
    data = result.data[[n for n, array in result.data.data_vars.items() if _fits(array, flat)]]
    for name, dims in flat.items():
        letters = [_LETTERS[dim.rpartition("_")[2]] for dim in dims]
        data = data.stack({name: dims})
        places = [place if isinstance(place, tuple) else (place,) for place in data[name].values]
        labels = ["".join(f"{a}{v}" for a, v in zip(letters, place, strict=True)) for place in places]
        data = data.drop_vars([name, *dims]).assign_coords({name: labels})
        full = [n for n, array in data.data_vars.items() if name in array.dims]
        data = data.dropna(name, how="all", subset=full)
    return Result(data)


def _fits(array: xr.DataArray, flat: Mapping[str, list[str]]) -> bool:
    """Whether an array has all the dimensions to be joined, or none of them."""
    dims = [dim for parts in flat.values() for dim in parts]
    return all(d in array.dims for d in dims) or not any(d in array.dims for d in dims)
