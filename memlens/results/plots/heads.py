"""What sets of heads and kinds of bypass show."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import xarray as xr

from memlens.results.plots.layers import asked, means, plot_head_map, plot_layer_lines, subtitle_of, with_dims
from memlens.results.result import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go
from collections.abc import Mapping

import pandas as pd

from memlens.results.plots.layers import plot_interventions
from memlens.results.plots.tokens import patch_values, plot_patch_map


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


_LETTERS = {"layer": "L", "head": "H", "neuron": "N", "position": " at "}


def plot_gradients(
    result: Result,
    metric: str | None,
    *,
    of: str | None = None,
    group: str | None = None,
    sequence: str | None = None,
    title: str | None = None,
    **intervals: Any,
) -> go.Figure:
    """Draw estimated effects as the exact instrument's figure draws exact ones; neurons as dots."""
    if with_dims(result, "neuron"):
        return plot_sites(result, metric, of=of, group=group, title=title, **intervals)
    x = next((d for d in ("head", "position") if with_dims(result, "layer", d)), None)
    if x is None:
        return plot_layer_lines(
            _without_ratio(result),
            metric,
            of=of or "effect",
            group=group,
            title=title or "Estimated effect of each layer",
            **intervals,
        )
    ablated = result.settings.get("mode")
    heading = title or f"Estimated effect of {'ablating' if ablated else 'patching'} each layer and {x}"
    plot = plot_head_map if ablated and x == "head" else plot_patch_map
    return plot(result, metric, of=of, group=group, sequence=sequence, title=heading, **intervals)


def plot_sites(
    result: Result,
    metric: str | None,
    *,
    of: str | None = None,
    group: str | None = None,
    most: int = 40,
    title: str | None = None,
    **intervals: Any,
) -> go.Figure:
    """Draw the largest effects of many sites as dots with their intervals."""
    names = asked(metric) or [n for n in with_dims(result, "layer") if n != "normalized_effect"]
    dims = [d for d in ("layer", "head", "neuron", "position") if d in result[names[0]].dims]
    flat = _without_ratio(_named(result, {"intervention": dims}))
    heading = title or (
        "Estimated effects" if result.kind == "gradient_attribution" else "Effects of single sites"
    )
    return plot_interventions(flat, metric, of=of, group=group, most=most, title=heading, **intervals)


def plot_paths(
    result: Result,
    metric: str | None,
    *,
    of: str | None = None,
    group: str | None = None,
    sequence: str | None = None,
    title: str | None = None,
    **intervals: Any,
) -> go.Figure:
    """Draw what each path restores: sender by receiver, or each head's path to the logits."""
    from memlens import figures

    noising = result.settings.get("direction") == "noising"
    verb = "left after" if noising else "restored by"
    if not with_dims(result, "sender_layer"):
        heading = title or f"Recall {verb} patching each head's path to the logits"
        return plot_patch_map(
            result, metric, of=of, group=group, sequence=sequence, title=heading, **intervals
        )
    ends = [d for d in ("receiver_layer", "receiver_head") if d in result.data.dims]
    flat = _named(result, {"sender": ["sender_layer", "sender_head"], "receiver": ends})
    ci, note = patch_values(flat, metric, ("sender", "receiver"), of, group, sequence, intervals)
    receiver = result.settings.get("receiver_input", "")
    heading = title or f"Recall {verb} patching each path into {receiver}"
    return figures.heatmap_paths(ci, title=heading, subtitle=note)


def plot_screening(
    table: pd.DataFrame,
    agreement: pd.DataFrame,
    metric: str,
    attrs: Mapping[str, Any],
    *,
    title: str = "Estimated and exact effects of the verified sites",
) -> go.Figure:
    """Draw a screen's verified sites; see `memlens.instruments.Screening`."""
    from memlens import figures

    dims = [d for d in _LETTERS if d in table]
    labels = ["".join(f"{_LETTERS[d]}{row[d]}" for d in dims) for _, row in table.iterrows()]
    arrays = {
        name: (("statistic", "site"), table[[name, f"{name}_low", f"{name}_high"]].to_numpy().T)
        for name in ("estimate", "exact")
    }
    coords: dict[str, Any] = {"statistic": ["mean", "low", "high"], "label": ("site", labels)}
    sites = xr.Dataset(arrays, {**coords, "chosen": ("site", table["chosen"].to_numpy(dtype=str))})
    recall = agreement.loc["recall of exact top k"]
    said = f"recall of the exact top k {recall['value']:.2f} [{recall['low']:.2f}, {recall['high']:.2f}]"
    subtitle = " · ".join((f"{table['n'].max()} sequences", said, str(attrs.get("model", ""))))
    return figures.scatter_agreement(sites, metric=metric, title=title, subtitle=subtitle)


def _without_ratio(result: Result) -> Result:
    """Leave out the normalized effect, which is no change of a metric."""
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
