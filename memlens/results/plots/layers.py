"""What each kind of result shows: means and intervals here, the drawing in `memlens.figures`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import xarray as xr

from memlens.errors import OptionError, SiteError
from memlens.results.result import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go
import numpy as np

from memlens.errors import check_option


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
    note = _harm_note(result, names) if of == "effect" else ""
    if sequence is not None:
        ci = single(result, names, ("layer", "head"), of, sequence)
        subtitle = f"one sequence, {sequence} · {note}"
    else:
        ci = means(result, names, ("layer", "head"), of=of, group=group, **intervals)
        subtitle = subtitle_of(result, of=of, note=note, level=ci.attrs["level"])
    return figures.heatmap_layer_head(ci, signed=of == "effect", title=heading, subtitle=subtitle)


def _harm_note(result: Result, names: list[str]) -> str:
    """What red means in a map of effects; of a metric without a direction nothing is claimed."""
    from memlens.figures.labels import metric_text

    return "red = recall harmed" if all(metric_text(n, result[n]).better for n in names) else "change"


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


_LINES = {
    "attention, measured": ("measured", "B1"),
    "B1: what heads mix": ("limit", "B1"),
    "B2: attention to others": ("limit", "B2"),
    "after its norm, measured": ("measured", "B3"),
    "B3: weights alone": ("limit", "B3"),
    "block, measured": ("measured", "B4"),
    "B4: the block": ("limit", "B4"),
}
_BY_BOUND = {
    "slack": ("bound", "bound over measured", False),
    "total_slack_log10": ("total", "log10 of bound over measured", True),
    "total_limit_log10": ("total", "log10 of the bound", True),
    "total_measured": ("total", "change, all tokens together", False),
}


def plot_bounds(
    result: Result,
    metric: str | None,
    *,
    group: str | None = None,
    title: str | None = None,
    **intervals: Any,
) -> go.Figure:
    """Draw what each layer's bypass changes and its bounds, the mean over tokens; or one metric."""
    from memlens import figures

    if group is not None:
        raise OptionError("group= is not drawn for bounds: select one group's sequences first.")
    if metric is not None and metric not in (*_BY_BOUND, "measured", "limit"):
        return plot_layer_lines(result, metric, title=title, **intervals)
    if metric in _BY_BOUND:
        dim, words, linear = _BY_BOUND[metric]
        ci = means(result, [metric], (dim, "layer"), **intervals)
        heading = title or f"Bypassed attention: {words}"
    else:
        given = means(
            result,
            [n for n in with_dims(result, "bound", "layer") if n != "slack"],
            ("bound", "layer"),
            **intervals,
        )
        ci, words, linear = _stacked(given), "norm of the change", False
        heading = title or "Bypassed attention: what changes, and what bounds it"
    fig = figures.line_over_layers(
        ci, title=heading, subtitle=subtitle_of(result, of="value", level=ci.attrs["level"])
    )
    fig.update_yaxes(title_text=words, type="linear" if linear else "log", exponentformat="power")
    return fig


def _stacked(ci: xr.Dataset) -> xr.Dataset:
    """One line for each bound, and one for each quantity that is measured.

    What a block adds is what attention gives where no norm stands after it, and in a parallel block the
    output changes by that alone: such lines would hide each other.
    """
    measured = ci["measured"].sel(statistic="mean")
    same = {b for b in ("B3", "B4") if np.allclose(measured.sel(bound=b), measured.sel(bound="B1"))}
    hidden = {("measured", b) for b in same} | ({("limit", "B4")} & {("limit", b) for b in same})
    shown = {label: line for label, line in _LINES.items() if line not in hidden}
    parts = [ci[name].sel(bound=bound).drop_vars("bound") for name, bound in shown.values()]
    plain = [p.drop_vars([c for c in p.coords if str(c).startswith("n_")]) for p in parts]
    lines = xr.concat(plain, dim=xr.DataArray(list(shown), dims="line", name="line"))
    return xr.Dataset({"change": lines.transpose("statistic", "line", "layer")}, attrs=ci.attrs)


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
    note = _harm_note(result, names) if of == "effect" else ""
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
