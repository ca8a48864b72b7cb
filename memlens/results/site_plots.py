"""What gradient estimates, path patching and screens show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd
import xarray as xr

from memlens.results.plots import (
    asked,
    plot_head_map,
    plot_interventions,
    plot_layer_lines,
    with_dims,
)
from memlens.results.result import Result
from memlens.results.token_plots import patch_values, plot_patch_map

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = ["plot_gradients", "plot_paths", "plot_screening", "plot_sites"]

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
    """Draw a screen's verified sites; see `memlens.Screening`."""
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
