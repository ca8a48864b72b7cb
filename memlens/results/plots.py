"""What each kind of result shows: means and intervals here, the drawing in `memlens.figures`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from memlens.errors import OptionError, SiteError, check_option
from memlens.results.result import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = [
    "plot_attribution",
    "plot_decoding",
    "plot_head_map",
    "plot_interventions",
    "plot_layer_lines",
    "plot_patch_map",
    "plot_recall",
    "with_dims",
]


def _subtitle(result: Result, *, of: str, level: float = 0.95, note: str = "", n: int | None = None) -> str:
    count = result.data.sizes["sequence"] if n is None else n
    what = "mean change (with − without the intervention)" if of == "effect" else "mean"
    parts = [
        f"{what} over {count} sequences, {level:.0%} interval",
        note,
        str(result.data.attrs.get("model", "")),
    ]
    return " · ".join(part for part in parts if part)


def _one(result: Result, sequence: str) -> xr.Dataset:
    ids = [str(value) for value in result["sequence"].values] if "sequence" in result.data.coords else []
    if str(sequence) not in ids:
        raise SiteError(f"sequence={sequence!r} is not in this result: take one of its {len(ids)} ids.")
    return result.data.isel(sequence=ids.index(str(sequence)))


def _names(metric: str | None) -> list[str] | None:
    return None if metric is None else [metric]


def _has_effect(result: Result) -> bool:
    return any(
        f"{name}{tail}" in result.data for name in result.metrics for tail in ("_baseline", "_corrupt")
    )


def _of(result: Result, of: str | None) -> str:
    return of or ("effect" if _has_effect(result) else "value")


def with_dims(result: Result, *dims: str) -> list[str]:
    """Return the metrics that have all of `dims`."""
    return [name for name in result.metrics if set(dims) <= set(result.data[name].dims)]


def plot_head_map(
    result: Result,
    metric: str | None,
    *,
    of: str | None = None,
    group: str | None = None,
    sequence: str | None = None,
    title: str | None = None,
    **intervals: Any,
) -> go.Figure:
    """Draw the effect of each head; effects where the result has baselines, else values."""
    from memlens import figures

    of = _of(result, of)
    names = _names(metric) or with_dims(result, "layer", "head")
    heading = title or f"Effect of each head: {_words(result.kind)}"
    note = "red = recall harmed" if of == "effect" else ""
    if sequence is not None:
        ci = _single(result, names, of, sequence)
        subtitle = f"one sequence, {sequence} · {note}"
    else:
        ci = result.mean_ci(metric=names, of=of, group=group, **intervals)
        subtitle = _subtitle(result, of=of, note=note, level=ci.attrs["level"])
    return figures.heatmap_layer_head(ci, signed=of == "effect", title=heading, subtitle=subtitle)


def _single(result: Result, names: list[str], of: str, sequence: str) -> xr.Dataset:
    arrays = {name: result.effect(name) if of == "effect" else result[name] for name in names}
    return _one(Result(xr.Dataset(arrays, attrs=result.data.attrs)), sequence)


def plot_layer_lines(
    result: Result,
    metric: str | None,
    *,
    of: str = "value",
    group: str | None = None,
    title: str | None = None,
    **intervals: Any,
) -> go.Figure:
    """Draw curves over layers, with the unchanged model's value as a dashed line."""
    from memlens import figures

    names = _names(metric) or with_dims(result, "layer")
    ci = result.mean_ci(metric=names, of=of, group=group, **intervals)
    base = None
    if of == "value":
        stems = [name for name in names if f"{name}_baseline" in result.data]
        if stems:
            wanted = [f"{name}_baseline" for name in stems]
            base = result.mean_ci(metric=wanted, group=group, **intervals)
            base = base.rename(dict(zip(wanted, stems, strict=True)))
    return figures.line_over_layers(
        ci,
        baseline=base,
        title=title or f"Each layer in turn: {_words(result.kind)}",
        subtitle=_subtitle(result, of=of, level=ci.attrs["level"]),
    )


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

    x = next((d for d in ("position", "head", "target") if with_dims(result, "layer", d)), None)
    if x is None:
        return plot_layer_lines(result, metric, group=group, title=title, **intervals)
    names = _names(metric) or with_dims(result, "layer", x)
    names = sorted(names, key=lambda name: name != "normalized_effect")  # the one that needs no unit first
    ci, note = _patch_values(result, names, of, group, sequence, intervals)
    heading = title or f"Recall restored by patching each layer and {x}"
    if x == "head":
        return figures.heatmap_layer_head(ci, metrics=names, title=heading, subtitle=note)
    boundary, tokens = _boundary(result, sequence), None
    if sequence is not None and "token" in result.data.variables:
        row = _one(result, sequence)["token"]
        tokens = [str(value) for value in row.values] if row.dims == (x,) else None
    return figures.heatmap_layer_position(
        ci, metrics=names, x=x, tokens=tokens, boundary=boundary if x == "position" else None,
        title=heading, subtitle=note,
    )  # fmt: skip


def _patch_values(
    result: Result, names: list[str], of: str | None, group: str | None, sequence: str | None, intervals: Any
) -> tuple[xr.Dataset, str]:
    """Return what each metric has to show: its effect where it has a baseline, else its value."""
    parts: dict[str, xr.DataArray] = {}
    for name in names:
        paired = any(name + tail in result.data for tail in ("_baseline", "_corrupt"))
        which = of or ("effect" if paired else "value")
        if sequence is not None:
            parts[name] = _single(result, [name], which, sequence)[name]
        else:
            parts[name] = result.mean_ci(metric=name, of=which, group=group, **intervals)[name]
    note = "blue = recall restored · " + str(result.data.attrs.get("model", ""))
    if sequence is not None:
        return xr.Dataset(parts), f"one sequence, {sequence} · {note}"
    return xr.Dataset(
        parts
    ), f"mean over {result.data.sizes['sequence']} sequences, intervals on hover · {note}"


def _boundary(result: Result, sequence: str | None) -> float | None:
    """Return the first position of the continuation, where all the shown sequences share it."""
    if "prefix_len" not in result.data.variables:
        found = result.data.attrs.get("prefix_len", result.settings.get("prefix_len"))
        return float(found) if isinstance(found, int | float) else None
    lengths = _one(result, sequence)["prefix_len"] if sequence is not None else result.data["prefix_len"]
    values = np.unique(lengths.values)
    return float(values[0]) if len(values) == 1 else None


def plot_decoding(
    result: Result,
    metric: str | None,
    *,
    stream: str = "resid_post",
    group: str | None = None,
    sequence: str | None = None,
    title: str | None = None,
    **intervals: Any,
) -> go.Figure:
    """Draw the target's probability and rank over layers, or the map of one sequence."""
    from memlens import figures

    data = result.data
    if "stream" in data.dims:
        check_option("stream", stream, [str(value) for value in data["stream"].values])
        data = data.sel(stream=stream)
    if sequence is not None:
        return _decoding_map(Result(data), metric, sequence, title)
    derived = xr.Dataset(
        {"probability": data["probability"], "rank": np.log(data["rank"] + 1.0)}, attrs=data.attrs
    )
    ci = Result(derived).mean_ci(("sequence", "target"), group=group, **{"method": "bootstrap", **intervals})
    ci["rank"] = np.exp(ci["rank"])
    return figures.decoding_panels(
        ci,
        title=title or "The target token, decoded after each layer",
        subtitle=_subtitle(result, of="value", level=ci.attrs["level"]),
    )


def _decoding_map(result: Result, metric: str | None, sequence: str, title: str | None) -> go.Figure:
    from memlens import figures

    row = _one(result, sequence)
    x = "target" if "target" in row.dims else "position"
    names = [metric] if metric else [n for n in result.metrics if set(row[n].dims) == {"layer", x}]
    labels = row["token"] if "token" in row.variables else None
    tokens = [str(v) for v in labels.values] if labels is not None and labels.dims == (x,) else None
    return figures.heatmap_layer_position(
        row[names], metrics=names, x=x, signed=False, tokens=tokens,
        title=title or "Each target token, decoded after each layer",
        subtitle=f"one sequence, {sequence} · {result.data.attrs.get('model', '')}",
    )  # fmt: skip


def plot_attribution(
    result: Result,
    metric: str | None,
    *,
    group: str | None = None,
    title: str | None = None,
    **intervals: Any,
) -> go.Figure:
    """Draw the direct effects of heads and layers on the target's logit."""
    from memlens import figures

    if group is not None:
        raise OptionError("group= is not drawn for logit attribution: select one group's sequences first.")
    names = [*with_dims(result, "layer", "head")[:1], *(n for n in ("attn", "mlp") if n in result.data)]
    dims = ["sequence", *(d for d in ("target", "position") if d in result.data.dims)]
    ci = result.mean_ci(dims, metric=names, **intervals)
    note = "blue = pushes toward the target"
    return figures.attribution_panels(
        ci,
        title=title or "What writes the target's logit",
        subtitle=_subtitle(result, of="value", note=note, level=ci.attrs["level"]),
    )


def plot_interventions(
    result: Result,
    metric: str | None,
    *,
    of: str | None = None,
    group: str | None = None,
    most: int = 40,
    title: str | None = None,
    **intervals: Any,
) -> go.Figure:
    """Draw each intervention's effect as a dot with its interval."""
    from memlens import figures

    of = _of(result, of)
    names = _names(metric) or with_dims(result, "intervention")
    ci = result.mean_ci(metric=names, of=of, group=group, **intervals)
    return figures.dots_with_intervals(
        ci,
        most=most,
        title=title or "Every intervention",
        subtitle=_subtitle(result, of=of, level=ci.attrs["level"]),
    )


def plot_recall(
    result: Result,
    metric: str | None,
    *,
    group: str | None = "copies",
    title: str | None = None,
    **intervals: Any,
) -> go.Figure:
    """Draw recall rates against a group, and the histogram of the score."""
    from memlens import figures

    order = ("memorization_score", "target_accuracy", "exact_match")
    shares = [name for name in order[::-1] if name in result.metrics]
    histogram = metric or next((name for name in order if name in result.metrics), result.metrics[0])
    ci = None
    if shares and group is not None and group in result.data.coords:
        wanted = [name for name in ("exact_match", histogram) if name in shares] or shares
        ci = result.mean_ci(metric=list(dict.fromkeys(wanted)), group=group, **intervals)
    return figures.recall_panels(
        result[histogram], ci, title=title or "What the model recalls", subtitle=_subtitle(result, of="value")
    )


def _words(kind: str) -> str:
    return kind.replace("_", " ")
