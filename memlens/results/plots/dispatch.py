"""From a kind of result to its figure: which function draws it, and several in one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from memlens.errors import check_option
from memlens.results.groups import join_groups
from memlens.results.plots import heads as head_plots
from memlens.results.plots import heads as site_plots
from memlens.results.plots import layers as bound_plots
from memlens.results.plots import layers as edit_plots
from memlens.results.plots import layers as plots
from memlens.results.plots import tasks as task_plots
from memlens.results.plots import tokens as token_plots
from memlens.results.result import Result
from memlens.results.statistics import frontier

if TYPE_CHECKING:
    import plotly.graph_objects as go


def plot_result(result: Result, metric: str | None = None, **options: Any) -> go.Figure:
    """Return the figure of `result`, by its kind; a kind that is not known is drawn by its dimensions.

    Args:
        result: any result.
        metric: one metric; all by default, with a menu.
        options: `group` (a coordinate along `sequence`), `sequence` (one id), `of`, `title`, and those of
            `Result.mean_ci`; which of them apply depends on the kind.

    Raises:
        OptionError: for an option that this kind of figure does not have.
        SiteError: for a sequence or stream that the result does not have.
    """
    plot = _of_sweep(result) if result.kind == "sweep" else _PLOTS.get(result.kind) or _by_dimensions(result)
    known = set(plot.__kwdefaults__ or {}) | {"level", "method", "n_resamples", "seed"}
    for name in options:
        check_option("plot option", name, sorted(known))
    return plot(result, metric, **options)


def overlay(results: Mapping[str, Result], metric: str | None = None, **options: Any) -> go.Figure:
    """Draw several results of one kind in one figure, one line (or one map) for each.

    Args:
        results: name in the legend to result, say `{"memorized": a, "control": b}`.
        metric: as for `Result.plot`.
        options: as for `Result.plot`, without `group`.

    Raises:
        ResultError: when the results are of different kinds, or there are none.
    """
    joined = join_groups(results)
    if "title" not in options:
        counts = ", ".join(f"{name}: {result.data.sizes['sequence']}" for name, result in results.items())
        options["title"] = f"{joined.kind.replace('_', ' ').capitalize()} ({counts} sequences)"
    return plot_result(joined, metric, group="group", **options)


def _of_sweep(result: Result) -> Callable[..., go.Figure]:
    """Choose a figure by the coordinates that the interventions were given; others are a row of dots."""
    sites = {str(dim) for name in result.metrics for dim in result[name].dims} - {"sequence", "target"}
    if sites == {"layer"}:
        return plots.plot_layer_lines
    return plots.plot_head_map if sites == {"layer", "head"} else plots.plot_interventions


def _by_dimensions(result: Result) -> Callable[..., go.Figure]:
    """Choose a figure for a kind without one of its own."""
    for dims, plot in (
        (("layer", "head"), plots.plot_head_map),
        (("layer", "position"), token_plots.plot_patch_map),
    ):
        if plots.with_dims(result, *dims):
            return plot
    if plots.with_dims(result, "layer"):
        return plots.plot_layer_lines
    return plots.plot_interventions if plots.with_dims(result, "intervention") else plots.plot_recall


_PLOTS: dict[str, Callable[..., Any]] = {
    "residual_decoding": token_plots.plot_decoding,
    "head_ablation": plots.plot_head_map,
    "head_pair_ablation": head_plots.plot_pairs,
    "cumulative_head_ablation": head_plots.plot_cumulative,
    "attention_bypass": head_plots.plot_bypass,
    "bypass_bounds": bound_plots.plot_bounds,
    "bypass_predictor": plots.plot_layer_lines,
    "bypass_sets": task_plots.plot_sets,
    "bypass_controls": task_plots.plot_edits,
    "bypass_frontier": frontier.plot_frontier,
    "task_accuracy": task_plots.plot_tasks,
    "mlp_ablation": plots.plot_layer_lines,
    "neuron_knockout": edit_plots.plot_knock_outs,
    "residual_perturbation": edit_plots.plot_strengths,
    "prefix_perturbation": edit_plots.plot_strengths,
    "extraction_curve": edit_plots.plot_strengths,
    "prompt_compression": edit_plots.plot_strengths,
    "activation_patching": token_plots.plot_patch_map,
    "path_patching": site_plots.plot_paths,
    "gradient_attribution": site_plots.plot_gradients,
    "neuron_ablation": site_plots.plot_sites,
    "neuron_patching": site_plots.plot_sites,
    "logit_attribution": plots.plot_attribution,
    "sweep": plots.plot_interventions,
    "recall": plots.plot_recall,
}
KINDS = tuple(_PLOTS)
