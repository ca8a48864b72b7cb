"""What edits cost on tasks, and what sets of blocks and several kinds of edit do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from memlens.errors import OptionError, check_option
from memlens.results.groups import by_part
from memlens.results.plots.layers import (
    asked,
    means,
    plot_interventions,
    plot_layer_lines,
    subtitle_of,
    with_dims,
)
from memlens.results.result import Result
from memlens.results.statistics.tasks import MEASURES, task_summary

if TYPE_CHECKING:
    import plotly.graph_objects as go


def plot_tasks(
    result: Result,
    metric: str | None,
    *,
    group: str | None = "task_group",
    parts: int | None = None,
    title: str | None = None,
    **intervals: Any,
) -> go.Figure:
    """Draw accuracy over layers, raw and corrected for chance, and its relative drop, one line a group.

    Args:
        result: What `evaluate_tasks` gave, with the dimension `layer`.
        metric: A key of `task_summary.MEASURES`; all by default, with a menu.
        group: "task_group" or "task".
        parts: Average over the layers of so many parts of depth.
        title: What is shown.
        intervals: `level`, `n_resamples` and `seed` of the bootstrap.
    """
    from memlens import figures

    if metric is not None and metric not in MEASURES:
        return plot_layer_lines(result, metric, group=group, title=title, **intervals)
    if "layer" not in result["accuracy"].dims:
        return plot_interventions(result, metric, group=group, title=title, **intervals)
    if group not in ("task", "task_group"):
        raise OptionError(f"group={group!r}: lines are of tasks; give 'task' or 'task_group'.")
    if parts is not None:
        result = by_part(result, parts)
    options = {key: value for key, value in intervals.items() if key != "method"}
    table = task_summary(result, **options)
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
    level = intervals.get("level", 0.95)
    return figures.line_over_layers(
        xr.Dataset(variables, coords),
        baseline=base,
        x_title="" if parts is None else f"part of depth, 1 to {parts}",
        title=title or "What the bypass of each layer costs on tasks",
        subtitle=f"means over tasks, {n} questions, {100 * level:g} % interval over questions",
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


def plot_sets(
    result: Result,
    metric: str | None,
    *,
    of: str = "value",
    most: int = 40,
    title: str | None = None,
    **intervals: Any,
) -> go.Figure:
    """Draw each set of layers as a dot with its interval."""
    from memlens import figures

    names = asked(metric) or with_dims(result, "layers")
    ci = means(result, names, ("layers",), of=of, **intervals)
    return figures.dots_with_intervals(
        ci,
        dim="layers",
        most=most,
        title=title or "Every set of bypassed layers",
        subtitle=subtitle_of(result, of=of, level=ci.attrs["level"]),
    )


def plot_edits(
    result: Result,
    metric: str | None,
    *,
    of: str = "effect",
    edit: str | None = None,
    group: str | None = None,
    title: str | None = None,
    **intervals: Any,
) -> go.Figure:
    """Draw curves over layers, one line an edit; with `edit`, of this edit alone, one line a group."""
    from memlens import figures

    known = [str(value) for value in result["edit"].values]
    if edit is not None:
        check_option("edit", edit, known)
        result = Result(result.data.sel(edit=edit))
    elif group is not None:
        raise OptionError(f"group= draws one edit: name it, such as edit={known[0]!r}.")
    names = asked(metric) or with_dims(result, "layer")
    shown = ("layer", "edit") if edit is None else ("layer",)
    ci = means(result, names, shown, of=of, group=group, **intervals)
    return figures.line_over_layers(
        ci,
        title=title or "Other edits of each layer",
        subtitle=subtitle_of(result, of=of, level=ci.attrs["level"]),
    )
