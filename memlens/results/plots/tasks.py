"""Figures of what interventions cost on tasks, of sets of blocks, and of recitation against ability."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from memlens import figures
from memlens.errors import OptionError, check_option
from memlens.figures.labels import choice_words
from memlens.results.groups import by_part
from memlens.results.plots.layers import plot_interventions, plot_layer_lines
from memlens.results.plots.selection import Selection, takes
from memlens.results.result import Result
from memlens.results.statistics.intervals import mean_interval
from memlens.results.statistics.tasks import MEASURES, task_summary


@takes(group="task_group")
def plot_tasks(result: Result, s: Selection, *, parts: int | None = None) -> go.Figure:
    """Draw accuracy over layers, raw and corrected for chance, and its relative drop, one line per group.

    Args:
        result: What `evaluate_tasks` gave, with the dimension `layer`.
        s: `metric` is a key of `task_summary.MEASURES`, all by default; `group` is "task_group" or "task".
        parts: Average over the layers of each of this many parts of depth.
    """
    metric, group = s.metric, s.group
    if metric is not None and metric not in MEASURES:
        return plot_layer_lines(result, s)
    if "layer" not in result["accuracy"].dims:
        return plot_interventions(result, s)
    if group not in ("task", "task_group"):
        raise OptionError(f"group={group!r}: lines are of tasks; give 'task' or 'task_group'.")
    if parts is not None:
        result = by_part(result, parts)
    table = task_summary(result, **s.bootstrap)
    table = table.loc[table["scope"] == ("task" if group == "task" else "group")]
    names = list(dict.fromkeys(table["name"]))
    layers = result["layer"].values
    measures = [name for name in MEASURES if name in set(table["measure"]) and metric in (None, name)]
    variables = {}
    for measure in measures:
        grid = table.loc[table["measure"] == measure].set_index(["name", "layer"])
        values = [
            [grid.loc[(n, layer), s] for layer in layers] for s in ("mean", "low", "high") for n in names
        ]
        array = np.array(values, dtype=float).reshape(3, len(names), len(layers))
        variables[measure] = (("statistic", group, "layer"), array)
    coords = {"statistic": ["mean", "low", "high"], group: names, "layer": layers}
    base = xr.Dataset()
    if "accuracy_baseline" in result.data:
        wanted = {"accuracy": "accuracy_baseline", "accuracy_norm": "accuracy_norm_baseline"}
        base = _baselines(result, group, names, {m: b for m, b in wanted.items() if m in measures})
    n = result.data.sizes["sequence"]
    return figures.line_over_layers(
        xr.Dataset(variables, coords),
        baseline=base,
        x_title="" if parts is None else f"part of depth, 1 to {parts}",
        title=s.title or "What the bypass of each layer costs on tasks",
        subtitle=f"means over tasks, {n} questions, {100 * s.level:g} % interval over questions",
    )


def _baselines(result: Result, group: str, names: list[str], wanted: Mapping[str, str]) -> xr.Dataset:
    """Return the unchanged model's mean over tasks of each group, without an interval."""
    tasks = result["task"].values
    groups = result[group].values
    found = {}
    for measure, name in wanted.items():
        values = result.data[name].values
        means = [
            np.mean([values[tasks == task].mean() for task in dict.fromkeys(tasks[groups == g].tolist())])
            for g in names
        ]
        found[measure] = (("statistic", group), np.array([means] * 3))
    return xr.Dataset(found, {"statistic": ["mean", "low", "high"], group: names})


@takes(of="value")
def plot_sets(result: Result, s: Selection, *, most: int = 40) -> go.Figure:
    """Draw each set of layers as a dot with its interval."""
    ci, caption = s.drawn(result, ("layers",), "Every set of bypassed layers")
    return figures.dots_with_intervals(ci, dim="layers", most=most, **caption)


@takes(of="effect", group=None)
def plot_edits(result: Result, s: Selection, *, edit: str | None = None) -> go.Figure:
    """Draw curves over layers, one line per edit; with `edit`, that edit only, one line per group."""
    known = [str(value) for value in result["edit"].values]
    if edit is not None:
        check_option("edit", edit, known)
        result = Result(result.data.sel(edit=edit))
    elif s.group is not None:
        raise OptionError(f"group= draws one edit: name it, such as edit={known[0]!r}.")
    names = s.names(result, "layer")
    shown = ("layer", "edit") if edit is None else ("layer",)
    heading = "Other edits of each layer"
    ci, caption = s.drawn(result, shown, heading, of=s.of or "effect", names=names)
    if edit is None:
        ci = ci.assign_coords(edit=[choice_words(value) for value in known])
    return figures.line_over_layers(ci, **caption)


@takes()
def plot_frontier(result: Result, s: Selection) -> go.Figure:
    """Draw exact match (up) against accuracy (right), with one panel per model; a menu chooses the tasks."""
    data = result.data
    base = {}
    for model in dict.fromkeys(data["model"].values.tolist()):
        own = [str(i).startswith(f"{model}/") for i in data["sequence"].values]
        base[model] = float(data["exact_match_baseline"].values[own].mean())
    return figures.frontier_panels(
        data,
        mean_interval(data["exact_match"], **s.intervals),
        base,
        title=s.title or "Recitation against ability",
        subtitle=f"one point per bypass, {100 * s.level:g} % intervals · dashed: the unchanged model · "
        "down and right is selective",
    )
