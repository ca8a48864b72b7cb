"""What each kind of result shows: means and intervals here, the drawing in `memlens.figures`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import xarray as xr

from memlens.errors import OptionError, SiteError
from memlens.results.result import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = [
    "plot_attribution",
    "plot_head_map",
    "plot_interventions",
    "plot_layer_lines",
    "plot_recall",
    "with_dims",
]


def subtitle_of(result: Result, *, of: str, level: float = 0.95, note: str = "") -> str:
    """Say what the numbers are, on how many sequences, of which model."""
    count = result.data.sizes["sequence"]
    what = "mean change (with − without the intervention)" if of == "effect" else "mean"
    parts = [
        f"{what} over {count} sequences, {100 * level:g} % interval",
        note,
        str(result.data.attrs.get("model", "")),
    ]
    return " · ".join(part for part in parts if part)


def one(result: Result, sequence: str) -> xr.Dataset:
    """Return the values of one sequence, by its id."""
    ids = [str(value) for value in result["sequence"].values] if "sequence" in result.data.coords else []
    if str(sequence) not in ids:
        raise SiteError(f"sequence={sequence!r} is not in this result: take one of its {len(ids)} ids.")
    return result.data.isel(sequence=ids.index(str(sequence)))


def asked(metric: str | None) -> list[str] | None:
    """Return the metric as a list, None where all are wanted."""
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
    names = asked(metric) or with_dims(result, "layer", "head")
    heading = title or f"Effect of each head: {_words(result.kind)}"
    note = "red = recall harmed" if of == "effect" else ""
    if sequence is not None:
        ci = single(result, names, ("layer", "head"), of, sequence)
        subtitle = f"one sequence, {sequence} · {note}"
    else:
        ci = means(result, names, ("layer", "head"), of=of, group=group, **intervals)
        subtitle = subtitle_of(result, of=of, note=note, level=ci.attrs["level"])
    return figures.heatmap_layer_head(ci, signed=of == "effect", title=heading, subtitle=subtitle)


def means(result: Result, names: list[str], shown: tuple[str, ...], **options: Any) -> xr.Dataset:
    """Return means over sequences on the dimensions that are shown; others are averaged inside each."""
    return result.mean_ci(("sequence", *_hidden(result, names, shown)), metric=names, **options)


def _hidden(result: Result, names: list[str], shown: tuple[str, ...]) -> list[str]:
    every = [str(dim) for name in names for dim in result[name].dims]
    return [dim for dim in dict.fromkeys(every) if dim not in ("sequence", *shown)]


def single(result: Result, names: list[str], shown: tuple[str, ...], of: str, sequence: str) -> xr.Dataset:
    """Return effects or values of one sequence, on the dimensions that are shown."""
    arrays = {name: result.effect(name) if of == "effect" else result[name] for name in names}
    row = one(Result(xr.Dataset(arrays, attrs=result.data.attrs)), sequence)
    return row.mean(_hidden(result, names, shown), keep_attrs=True)


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

    names = asked(metric) or with_dims(result, "layer")
    ci = means(result, names, ("layer",), of=of, group=group, **intervals)
    base = None
    if of == "value":
        stems = [name for name in names if f"{name}_baseline" in result.data]
        if stems:
            wanted = [f"{name}_baseline" for name in stems]
            base = means(result, wanted, (), group=group, **intervals)
            base = base.rename(dict(zip(wanted, stems, strict=True)))
    return figures.line_over_layers(
        ci,
        baseline=base,
        title=title or f"Each layer in turn: {_words(result.kind)}",
        subtitle=subtitle_of(result, of=of, level=ci.attrs["level"]),
    )


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
    ci = means(result, names, ("layer", "head"), **intervals)
    note = "blue = pushes toward the target"
    return figures.attribution_panels(
        ci,
        title=title or "What writes the target's logit",
        subtitle=subtitle_of(result, of="value", note=note, level=ci.attrs["level"]),
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
    result = _in_a_row(result)
    names = asked(metric) or with_dims(result, "intervention")
    ci = means(result, names, ("intervention",), of=of, group=group, **intervals)
    return figures.dots_with_intervals(
        ci,
        most=most,
        title=title or "Every intervention",
        subtitle=subtitle_of(result, of=of, level=ci.attrs["level"]),
    )


def _in_a_row(result: Result) -> Result:
    """Return the result with one dimension `intervention`, labelled by the coordinates that it stands for."""
    if "intervention" in result.data.dims:
        return result
    dims = [str(dim) for dim in result.data.dims if dim not in ("sequence", "target")]
    sites = result.data.stack(intervention=dims)
    sites = sites.dropna("intervention", how="all", subset=with_dims(Result(sites), "intervention"))
    labels = [
        ", ".join(f"{dim} {value}" for dim, value in zip(dims, values, strict=True))
        for values in sites["intervention"].values.tolist()
    ]
    return Result(sites.drop_vars(["intervention", *dims]).assign_coords(intervention=labels))


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
        result[histogram],
        ci,
        title=title or "What the model recalls",
        subtitle=subtitle_of(result, of="value"),
    )


def _words(kind: str) -> str:
    return kind.replace("_", " ")
