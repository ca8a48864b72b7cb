"""Figures over layers, heads, interventions, bounds, knock-outs and strengths of a perturbation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from memlens import figures
from memlens.errors import OptionError, SiteError, check_option
from memlens.figures import theme
from memlens.figures.labels import choice_words
from memlens.results.plots.selection import Plot, Selection, chooses, single, takes, with_dims
from memlens.results.result import Result
from memlens.results.statistics.estimates import Estimate
from memlens.results.statistics.intervals import mean_interval


@takes(of=None, group=None, sequence=None)
def plot_head_map(result: Result, s: Selection) -> go.Figure:
    """Draw the effect of each head; effects where the result has baselines, else values."""
    return _map(result, s, ("layer", "head"))


@takes(of=None, group=None, sequence=None)
def plot_own_map(result: Result, s: Selection) -> go.Figure:
    """Draw a map of the two dimensions of a result's sites, whatever they are called; layers go up."""
    names = [s.metric] if s.metric else result.metrics
    return _map(result, s, next(dims for name in names if len(dims := site_dims(result, name)) == 2))


def _map(result: Result, s: Selection, shown: tuple[str, ...]) -> go.Figure:
    of, (y, x) = s.of_result(result), shown
    names = s.names(result, *shown)
    note, heading = s.note(result, names, of), f"Effect of each {_words(x)}: {_words(result.kind)}"
    if s.sequence is None:
        ci, caption = s.drawn(result, shown, heading, of=of, note=note)
    else:
        ci = single(result, names, shown, of, s.sequence)
        subtitle = " · ".join(filter(None, (f"one sequence, {s.sequence}", note)))
        caption = {"title": s.title or heading, "subtitle": subtitle}
    return figures.heatmap_paths(ci, x=x, y=y, signed=of == "effect", **caption)


def site_dims(result: Result, name: str) -> tuple[str, ...]:
    """Return the dimensions of a metric's sites, `layer` first: not sequences, target tokens or draws."""
    dims = [str(dim) for dim in result[name].dims if dim not in ("sequence", "target", "draw")]
    return tuple(sorted(dims, key=lambda dim: dim != "layer"))


@takes(of="value", group=None)
def plot_layer_lines(result: Result, s: Selection) -> go.Figure:
    """Draw curves over layers, with the unchanged model's value as a dashed line."""
    ci, caption = s.drawn(result, ("layer",), f"Each layer in turn: {_words(result.kind)}")
    stems = [f"{name}" for name in ci if f"{name}_baseline" in result.data] if s.of != "effect" else []
    base = s.means(result, [f"{name}_baseline" for name in stems], ()) if stems else None
    if base is not None:
        base = base.rename({f"{name}_baseline": name for name in stems})
    return figures.line_over_layers(ci, baseline=base, **caption)


@takes(of=None, group=None)
def plot_layer_effects(result: Result, s: Selection) -> go.Figure:
    """Draw curves over layers: of each sequence's difference to its own baseline, where there is one."""
    return plot_layer_lines(result, replace(s, of=s.of_result(result)))


@takes(group=None)
def plot_attribution(result: Result, s: Selection) -> go.Figure:
    """Draw the direct effects of heads and layers on the target's logit."""
    if s.group is not None:
        raise OptionError("group= is not drawn for logit attribution: select one group's sequences first.")
    names = [*with_dims(result, "layer", "head")[:1], *(n for n in ("attn", "mlp") if n in result.data)]
    note = "blue = pushes toward the target"
    ci, caption = s.drawn(
        result, ("layer", "head"), "What writes the target's logit", of="value", names=names, note=note
    )
    return figures.attribution_panels(ci, **caption)


@takes(of=None, group=None)
def plot_interventions(result: Result, s: Selection, *, most: int = 40) -> go.Figure:
    """Draw each intervention's effect as a dot with its interval."""
    of = s.of_result(result)
    ci, caption = s.drawn(_in_a_row(result), ("intervention",), "Every intervention", of=of)
    return figures.dots_with_intervals(ci, most=most, **caption)


def _in_a_row(result: Result) -> Result:
    """Return the result with one dimension `intervention`, labeled by its coordinates."""
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


@takes(group="copies")
def plot_recall(result: Result, s: Selection) -> go.Figure:
    """Draw recall rates against a group, and the histogram of the score."""
    group = s.group
    order = ("memorization_score", "target_accuracy", "exact_match")
    shares = [name for name in order[::-1] if name in result.metrics]
    histogram = s.metric or next((name for name in order if name in result.metrics), result.metrics[0])
    ci = None
    if shares and group is not None and group in result.data.coords:
        wanted = [name for name in ("exact_match", histogram) if name in shares] or shares
        ci = result.mean_ci(metric=list(dict.fromkeys(wanted)), group=group, **s.intervals)
    return figures.recall_panels(
        result[histogram], ci, title=s.title or "What the model recalls", subtitle=s.subtitle(result)
    )


def _words(kind: str) -> str:
    return kind.replace("_", " ")


@chooses
def plot_sweep(result: Result) -> Plot:
    """Choose the figure of a sweep by the coordinates of its interventions; others are a row of dots."""
    sites = {dim for name in result.metrics for dim in site_dims(result, name)}
    if sites == {"layer"}:
        return plot_layer_effects
    return plot_own_map if len(sites) == 2 else plot_interventions


_LINES = {
    "attention, measured": ("measured", "B1"),
    "B1: what heads mix": ("limit", "B1"),
    "B2: attention to others": ("limit", "B2"),
    "after its norm, measured": ("measured", "B3"),
    "B3: weights alone": ("limit", "B3"),
    "block, measured": ("measured", "B4"),
    "B4: the block": ("limit", "B4"),
}


@takes(group=None)
def plot_bounds(result: Result, s: Selection) -> go.Figure:
    """Draw what each layer's bypass changes and its bounds, the mean over tokens; or one metric."""
    metric = s.metric
    if s.group is not None:
        raise OptionError("group= is not drawn for bounds: select one group's sequences first.")
    if metric is not None and metric not in ("slack", "measured", "limit"):
        return plot_layer_lines(result, s)
    shown = ("bound", "layer")
    if metric == "slack":
        words = "bound over measured"
        ci, caption = s.drawn(result, shown, f"Bypassed attention: {words}", of="value")
    else:
        words, heading = "norm of the change", "Bypassed attention: what changes, and what bounds it"
        names = [name for name in with_dims(result, *shown) if name != "slack"]
        ci, caption = s.drawn(result, shown, heading, of="value", names=names)
        ci = _stacked(ci)
    fig = figures.line_over_layers(ci, **caption)
    drawn = [ci[name].values for name in ci.data_vars]
    fig.update_yaxes(theme.log_axis(np.concatenate([values.ravel() for values in drawn]), 200))
    return fig.update_yaxes(title_text=words)


def _stacked(ci: xr.Dataset) -> xr.Dataset:
    """Return one line per bound and one per measured quantity.

    Without a norm after attention, a block adds exactly what attention gives, and in a parallel block its
    output changes by that alone: such lines coincide and are drawn once.
    """
    measured = ci["measured"].sel(statistic="mean")
    same = {b for b in ("B3", "B4") if np.allclose(measured.sel(bound=b), measured.sel(bound="B1"))}
    hidden = {("measured", b) for b in same} | ({("limit", "B4")} & {("limit", b) for b in same})
    shown = {label: line for label, line in _LINES.items() if line not in hidden}
    parts = [ci[name].sel(bound=bound).drop_vars("bound") for name, bound in shown.values()]
    plain = [p.drop_vars([c for c in p.coords if str(c).startswith("n_")]) for p in parts]
    lines = xr.concat(plain, dim=xr.DataArray(list(shown), dims="line", name="line"))
    return xr.Dataset({"change": lines.transpose("statistic", "line", "layer")}, attrs=ci.attrs)


@takes(group=None)
def plot_training(result: Result, s: Selection, *, step: int | None = None) -> go.Figure:
    """Draw what a checkpoint's components do to the model, and the reverse: layer up, step to the right.

    Heads are drawn for one `step`, the first by default. A metric of the checkpoints themselves is a curve.
    """
    names = ["into_model", "into_checkpoint"] if s.metric is None else [s.metric]
    if "layer" not in result[names[0]].dims:
        return plot_strengths(result, s)
    if s.group is not None:
        raise OptionError("group= is not drawn for checkpoints: select one group's sequences first.")
    of = s.of or "effect"
    if "head" not in result[names[0]].dims:
        heading = "A checkpoint's layer in the model after training, and the reverse"
        ci, caption = s.drawn(result, ("layer", "step"), heading, of=of, names=names)
        ci = ci.transpose(..., "layer", "step")
        return figures.heatmap_layer_position(ci, x="step", signed=of == "effect", **caption)
    steps = result["step"].values.tolist()
    chosen = steps[0] if step is None else step
    if chosen not in steps:
        raise SiteError(f"step={step} is not in this result: use one of {steps}.")
    heading = f"Heads of step {chosen} in the model after training, and the reverse"
    one_step = Result(result.data.sel(step=chosen))
    ci, caption = s.drawn(one_step, ("layer", "head"), heading, of=of, names=names)
    return figures.heatmap_layer_head(ci, signed=of == "effect", **caption)


@takes(group=None)
def plot_depth(result: Result, s: Selection) -> go.Figure:
    """Draw by how much the states of the retain and of the edited model lower recall; or one metric."""
    if s.metric is not None:
        return plot_layer_lines(result, s)
    if s.group is not None:
        raise OptionError(
            "group= is not drawn for the two models' lines: name a metric, or select sequences."
        )
    names = ["fall_retain", "fall_edited"]
    found = Estimate.of(mean_interval(result["depth"].astype(float), method="bootstrap"))
    heading = f"Unlearning depth {found}: what is missing in each layer's states"
    ci, caption = s.drawn(result, ("layer",), heading, names=names)
    lines = xr.DataArray(["of the retain model", "of the edited model"], dims="states", name="states")
    plain = [ci[n].drop_vars([c for c in ci[n].coords if str(c).startswith("n_")]) for n in names]
    falls = xr.concat(plain, dim=lines).transpose("statistic", "states", "layer")
    falls.attrs = {"label": "fall of the target log-prob", "units": "nats"}
    return figures.line_over_layers(xr.Dataset({"fall": falls}, attrs=ci.attrs), **caption)


STRENGTHS = {
    "alpha": "noise strength α",
    "replaced": "replaced prefix tokens",
    "prefix_len": "prefix tokens given",
    "prompt_tokens": "prompt tokens kept",
    "tokens_back": "tokens before the continuation",
    "step": "training steps",
}


FLIPS = ("prediction_flipped", "target_missed")
"""What a knock-out is shown by first, where it was measured."""


@takes(of="effect", group=None)
def plot_knock_outs(
    result: Result, s: Selection, *, k: int | None = None, selection: str | None = None
) -> go.Figure:
    """Draw the effect of each window of layers: its first layer up, its length to the right.

    Several `k` are drawn side by side. With controls (or a `group`) these are side by side instead, for one
    `k`: the largest unless one is given.
    """
    data = result.data
    if k is not None and k not in data["k"].values:
        raise SiteError(f"k={k} is not in this result: use one of {data['k'].values.tolist()}.")
    controls = "selection" in data.dims
    if selection is not None:
        known = [str(value) for value in data["selection"].values] if controls else []
        check_option("selection", selection, known)
        data, controls = data.sel(selection=selection), False
    elif controls and s.group is not None:
        raise OptionError("group= draws one selection: name it, such as selection='dominant'.")
    if k is None and (controls or s.group is not None):
        k = int(data["k"].max())
    side = "selection" if controls else "k"
    if k is not None:
        data = data.sel(k=k)
    else:
        data = data.assign_coords(k=[f"k = {value}" for value in data["k"].values])
    chosen = Result(data)
    of = s.of or "effect"
    names = s.names(chosen, "layer", "window")
    names = sorted(names, key=lambda name: name not in FLIPS)
    what = "all but the top" if result.settings.get("keep") else "the top"
    heading = f"Knock-out of {what} {'k' if k is None else k} neurons of a layer"
    note = s.note(chosen, names, of)
    ci, caption = s.drawn(chosen, ("layer", "window", side), heading, of=of, names=names, note=note)
    if controls:
        ci = ci.assign_coords(selection=[choice_words(value) for value in ci["selection"].values])
    return figures.heatmap_layer_position(ci, x="window", signed=of == "effect", **caption)


@takes(of="value", group=None)
def plot_strengths(result: Result, s: Selection) -> go.Figure:
    """Draw curves over the strength of a perturbation; a metric with layers is drawn over these instead."""
    x = next(name for name in STRENGTHS if name in result.data.dims)
    if s.metric is not None and "layer" in result[s.metric].dims:
        if s.group is not None:
            raise OptionError(f"group= is not drawn for {s.metric!r}: its lines are strengths.")
        ci, caption = s.drawn(result, ("layer", x), "Each layer's residual, clean against disturbed")
        return figures.line_over_layers(ci, **caption)
    names = [n for n in s.names(result, x) if "layer" not in result[n].dims]
    ci, caption = s.drawn(result, (x,), f"Recall by {STRENGTHS[x]}", names=names)
    return figures.line_over_layers(ci, x=x, x_title=STRENGTHS[x], **caption)


@chooses
def plot_by_dimensions(result: Result) -> Plot:
    """Choose a figure by the dimensions, for a kind that is not registered."""
    from memlens.results.plots.tokens import plot_patch_map

    dims = (
        (("layer", "head"), plot_head_map),
        (("layer", "position"), plot_patch_map),
    )
    for wanted, plot in dims:
        if with_dims(result, *wanted):
            return plot
    if len({dim for name in result.metrics for dim in site_dims(result, name)}) == 2:
        return plot_own_map
    for wanted, plot in ((("layer",), plot_layer_lines), (("intervention",), plot_interventions)):
        if with_dims(result, *wanted):
            return plot
    return plot_recall
