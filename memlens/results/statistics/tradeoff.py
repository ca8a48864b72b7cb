"""The trade-off of interventions: recitation removed against ability lost.

`edit_tradeoff` gives selectivity and the area under a frontier; `join_frontier` joins the two results of one
or several models for a figure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool, Float

from memlens.choices import TaskCost
from memlens.errors import EmptySetError, OptionError, ResultError, check_option
from memlens.files import exact_json
from memlens.results.groups import parse_layers
from memlens.results.kinds import register_kind
from memlens.results.plots.tasks import plot_frontier
from memlens.results.readings import read_frontier
from memlens.results.result import Result
from memlens.results.statistics.intervals import quantile_interval, wilson_interval
from memlens.results.statistics.resampling import bootstrap_means
from memlens.results.statistics.tasks import TaskTables, task_tables

OVER: tuple[str, ...] = get_args(TaskCost)


@dataclass(frozen=True, eq=False)
class Tradeoff:
    r"""For each edit, the share of recitation that it removes and the share of ability that it costs.

    - removed: :math:`r = (m_0 - m) / m_0`, with the mean exact match :math:`m` under the edit and
      :math:`m_0` without it; negative where the edit adds recitation.
    - cost: of each task :math:`(a_0 - a) / (a_0 - c)`, with accuracies :math:`a` and the task's chance level
      :math:`c`; over tasks the largest ("max"), or the mean.
    - selectivity: :math:`S = r - \mathrm{cost}`. 1 if all recitation is removed at no cost; 0 if as much is
      lost elsewhere. This score is ours, not a published one.

    Attributes:
        sites: One row for each edit: its coordinates.
        removed: The shares removed.
        cost: The shares of ability lost.
        worst: The task with the largest loss.
        removed_draws: `[resample, edit]`, resampled over sequences.
        cost_draws: The same over questions within tasks.
        exact_match: The mean exact match under each edit.
        accuracy: The mean accuracy over the counted tasks, uncorrected.
        tasks: The tasks that count.
        n_sequences: How many sequences there are.
        n_questions: How many questions the task with fewest has. One or two of either give no intervals.
        settings: The parameters.
    """

    sites: pd.DataFrame
    removed: Float[np.ndarray, "edit"]
    cost: Float[np.ndarray, "edit"]
    worst: list[str]
    removed_draws: Float[np.ndarray, "resample edit"]
    cost_draws: Float[np.ndarray, "resample edit"]
    exact_match: Float[np.ndarray, "edit"]
    accuracy: Float[np.ndarray, "edit"]
    tasks: Sequence[str]
    n_sequences: int
    n_questions: int
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def selectivity(self) -> Float[np.ndarray, "edit"]:
        """S of each edit."""
        return self.removed - self.cost

    def table(self, *, level: float = 0.95) -> pd.DataFrame:
        """Return one row for each edit: `removed`, `cost` and `selectivity` with percentile intervals.

        `cost` is the largest of several noisy numbers, which is biased upward: selectivity tends to be
        underestimated, not overestimated.
        """
        frame = self.sites.assign(exact_match=self.exact_match, accuracy=self.accuracy)
        both = min(self.n_sequences, self.n_questions)
        drawn = {
            "removed": (self.removed_draws, self.n_sequences),
            "cost": (self.cost_draws, self.n_questions),
            "selectivity": (self.removed_draws - self.cost_draws, both),
        }
        for name, (draws, n) in drawn.items():
            low, high = quantile_interval(draws, level, n)
            frame = frame.assign(**{name: getattr(self, name), f"{name}_low": low, f"{name}_high": high})
        return frame.assign(worst_task=list(self.worst))

    def take(self, edits: Sequence[int] | Bool[np.ndarray, "edit"]) -> Tradeoff:
        """Return the trade-off of some edits."""
        chosen = np.arange(len(self.removed))[np.asarray(edits)]
        arrays = ("removed", "cost", "removed_draws", "cost_draws", "exact_match", "accuracy")
        return replace(
            self,
            sites=self.sites.iloc[chosen].reset_index(drop=True),
            worst=[self.worst[int(i)] for i in chosen.tolist()],
            **{name: getattr(self, name)[..., chosen] for name in arrays},
        )

    def area(self, *, level: float = 0.95) -> tuple[float, float, float]:
        """Return the area under the frontier of these edits (see `frontier_area`) with its interval."""
        value = float(frontier_area(self.removed[None], self.cost[None])[0])
        draws = frontier_area(self.removed_draws, self.cost_draws)[:, None]
        low, high = quantile_interval(draws, level, min(self.n_sequences, self.n_questions))
        return value, float(low[0]), float(high[0])


def edit_tradeoff(
    recall: Result,
    accuracy: Result,
    *,
    over: str = "max",
    tasks: Sequence[str] | None = None,
    metric: str = "exact_match",
    n_resamples: int = 2000,
    seed: int = 0,
) -> Tradeoff:
    """Compare the share of recitation that interventions remove with their cost on tasks.

    Args:
        recall: A sweep over memorized sequences.
        accuracy: The result of `evaluate_tasks` for the same interventions.
        over: "max" or "mean" over tasks.
        tasks: The tasks that count; by default those on which the model is significantly above chance (see
            `tasks_above_chance`): on other tasks there is nothing to lose. A resample in which a task's
            accuracy is not above chance does not count that task.
        metric: The metric of recitation.
        n_resamples: Resamples of the bootstrap over sequences and over questions within tasks.
        seed: Seed of the bootstrap.

    Returns:
        The trade-off of each intervention, in the order of the results.

    Raises:
        ResultError: The results are of different interventions, no task counts, or nothing is recited
            without an edit.
        OptionError: An unknown task or `over`.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> some = ml.load_sequences("zoo", model)[::5]
        >>> seqs = ml.score_recall(model, some, generate=False, progress=False).memorized()
        >>> tasks = ml.tasks.local_tasks("zoo", model, names=["agreement", "tense"], n=20)
        >>> edits = ml.edits.attention_bypasses(model)
        >>> found = ml.tasks.edit_tradeoff(
        ...     ml.sweep(model, seqs, edits, progress=False),
        ...     ml.evaluate_tasks(model, tasks, edits, progress=False),
        ... )
        >>> found.table()["layer"].tolist()
        [0, 1, 2, 3, 4, 5]
    """
    check_option("over", over, OVER)
    sites = _sites(recall, metric)
    if not sites.equals(_sites(accuracy, "accuracy")):
        raise ResultError("recall and accuracy are of different interventions: run both with the same ones.")
    tables = task_tables(accuracy)
    for name in tasks or ():
        check_option("task", name, list(tables))
    counted = list(tasks) if tasks is not None else tasks_above_chance(accuracy)
    if not counted:
        raise ResultError(
            "the model is not significantly above chance on any task: there is no ability to lose."
        )
    base = recall.baseline(metric).values.astype(float)
    if not np.nanmean(base) > 0:
        raise ResultError(f"nothing is recited without an edit ({metric} is 0): there is nothing to remove.")
    values = np.column_stack([base, recall[metric].transpose("sequence", ...).values.reshape(len(base), -1)])
    removed = removed_share(values.mean(0)[None])[0]
    draws = removed_share(bootstrap_means(values, n_resamples, seed))
    stacked = np.stack([_lost(tables[name], lambda table: table.mean(0)) for name in counted])
    drawn = [
        _lost(tables[name], lambda table, i=i: bootstrap_means(table, n_resamples, seed + 1 + i))
        for i, name in enumerate(counted)
    ]
    combine = _largest if over == "max" else _average
    return Tradeoff(
        sites,
        removed,
        combine(stacked),
        [counted[i] for i in np.nan_to_num(stacked, nan=-np.inf).argmax(0)],
        draws,
        combine(np.stack(drawn)),
        values.mean(0)[1:],
        np.mean([tables[name].tables["accuracy"].mean(0) for name in counted], 0),
        counted,
        len(values),
        min(tables[name].n_questions for name in counted),
        {"over": over, "metric": metric, "tasks": counted, "n_resamples": n_resamples, "seed": seed},
    )


def tasks_above_chance(accuracy: Result, *, margin: float = 0.05) -> list[str]:
    """Return the tasks on which the model without an edit is significantly above chance.

    Only baselines are used, so that this choice does not depend on what an edit does.

    Args:
        accuracy: A result of `evaluate_tasks`.
        margin: By how much the lower end of Wilson's 95 % interval must be above the task's chance level.
    """
    found = []
    for name, task in task_tables(accuracy).items():
        base = task.tables["base"][:, 0]
        if wilson_interval(float(base.sum()), len(base))[0] > task.chance + margin:
            found.append(name)
    return found


def frontier_area(
    removed: Float[np.ndarray, "draw edit"], cost: Float[np.ndarray, "draw edit"]
) -> Float[np.ndarray, "draw"]:
    r"""Return the area under the best ability kept for each share of recitation removed.

    With kept ability :math:`k = 1 - \mathrm{cost}` (cut to [0, 1]), :math:`F(x)` is the largest :math:`k` of
    the edits that remove at least :math:`x`, 1 at :math:`x = 0` and 0 where none removes that much; the area
    is :math:`\int_0^1 F(x)\,dx`. 1: all recitation can be removed at no cost; 1/2: each share removed costs
    an equal share of ability (for infinitely many such edits; fewer give less); 0: nothing can be removed.

    Example:
        >>> frontier_area(np.array([[0.5, 1.0]]), np.array([[0.0, 0.5]])).tolist()
        [0.75]
    """
    x, kept = np.clip(removed, 0, 1), 1 - np.clip(cost, 0, 1)
    order = np.argsort(-x, axis=-1, kind="stable")
    x, kept = np.take_along_axis(x, order, -1), np.take_along_axis(kept, order, -1)
    best = np.maximum.accumulate(kept, axis=-1)
    steps = x - np.concatenate([x[..., 1:], np.zeros_like(x[..., :1])], -1)
    return (best * steps).sum(-1)


def on_frontier(tradeoff: Tradeoff) -> Bool[np.ndarray, "edit"]:
    """Return the edits that no other edit beats by removing at least as much at a lower cost.

    Of identical edits the first counts.
    """
    order = np.lexsort((np.arange(len(tradeoff.removed)), tradeoff.cost, -tradeoff.removed))
    found, least = np.zeros(len(order), dtype=bool), np.inf
    for edit in order:
        if tradeoff.cost[edit] < least and tradeoff.removed[edit] > 0:
            found[edit], least = True, tradeoff.cost[edit]
    return found


def _sites(result: Result, metric: str) -> pd.DataFrame:
    array = result[metric]
    dims = [str(dim) for dim in array.dims if dim != "sequence"]
    if not dims:
        raise ResultError(
            f"a {result.kind} result without interventions has no trade-off: run it with interventions."
        )
    if "target" in dims:
        raise OptionError(f"{metric!r} has one number per token here: run the sweep with per_token=False.")
    index = pd.MultiIndex.from_product([array[dim].values.tolist() for dim in dims], names=dims)
    return index.to_frame(index=False)


def removed_share(means: Float[np.ndarray, "draw column"]) -> Float[np.ndarray, "draw edit"]:
    """Return the share that each edit removes, from means without an edit (first column) and with each."""
    base = means[:, :1]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(base > 0, (base - means[:, 1:]) / base, np.nan)


def _largest(lost: Float[np.ndarray, "task *site"]) -> Float[np.ndarray, "*site"]:
    """The largest over tasks; a task that is not above chance in a sample has nothing to lose there (NaN)."""
    known = np.nan_to_num(lost, nan=-np.inf).max(0)
    return np.where(np.isfinite(known), known, np.nan)


def _average(lost: Float[np.ndarray, "task *site"]) -> Float[np.ndarray, "*site"]:
    known = np.isfinite(lost)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(known, lost, 0.0).sum(0) / known.sum(0)


def _lost(task: TaskTables, means: Callable[[np.ndarray], np.ndarray]) -> Float[np.ndarray, "*draw edit"]:
    return task.measured(means)["relative_drop_chance_corrected"]


ALL_TASKS = "all tasks"
_DIMS = ("layer", "layers")


def join_frontier(
    parts: Mapping[str, tuple[Result, Result]], *, level: float = 0.95, n_resamples: int = 2000, seed: int = 0
) -> Result:
    """Join the effects of edits on recitation and on accuracy on tasks, for one or several models.

    Args:
        parts: By the model's name, a sweep over memorized sequences and the result of `evaluate_tasks` for
            the same interventions, both with the dimension `layer` or `layers`.
        level: Coverage of the intervals of accuracies.
        n_resamples: Number of bootstrap resamples of questions within tasks.
        seed: Seed of the bootstrap.

    Returns:
        Kind "bypass_frontier", with one `site` for each model and edit: `exact_match` `(sequence, site)` (NaN
        for the sequences of other models) and `exact_match_baseline` `(sequence)`; `accuracy`,
        `accuracy_low`, `accuracy_high` `(scope, site)` and `accuracy_base` `(scope, site)`, where a scope is
        a task, a group of tasks (the mean over its tasks), or all tasks. Along `site`: `model`, `label` (the
        layers), `depth` (their mean, 0 is the first block and 1 the last) and `size` (how many).

    Raises:
        EmptySetError: No parts.
        ResultError: A part has neither a layer nor a set of layers, or its two results have different ones.
        OptionError: A label does not name layers (see `memlens.results.groups.parse_layers`).

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> seqs, tasks = ml.load_sequences("zoo", model)[:4], ml.tasks.local_tasks("zoo", model, n=4)
        >>> edits = ml.edits.attention_bypasses(model)
        >>> pair = ml.sweep(model, seqs, edits), ml.evaluate_tasks(model, tasks, edits)
        >>> ml.tasks.join_frontier({"pythia-s": pair}, n_resamples=100)["label"].values.tolist()
        ['0', '1', '2', '3', '4', '5']
    """
    if not parts:
        raise EmptySetError("there is nothing to join: give at least one model's results.")
    joined = [_one_model(name, *pair, level, n_resamples, seed) for name, pair in parts.items()]
    first = next(iter(parts.values()))[0]
    data = xr.concat(joined, "site", join="outer", combine_attrs="drop", data_vars="all", coords="minimal")
    base = xr.concat([part["exact_match_baseline"] for part in joined], "sequence")
    data = data.drop_vars("exact_match_baseline").assign(exact_match_baseline=base)
    settings = {"models": list(parts), "level": level, "n_resamples": n_resamples, "seed": seed}
    attrs = {**first.data.attrs, "kind": "bypass_frontier", "settings": exact_json(settings)}
    attrs["model"] = ", ".join(parts)
    return Result(data.assign_attrs(attrs))


def _one_model(
    name: str, recall: Result, accuracy: Result, level: float, n_resamples: int, seed: int
) -> xr.Dataset:
    dim = next((dim for dim in _DIMS if dim in recall["exact_match"].dims), None)
    if dim is None or dim not in accuracy["accuracy"].dims:
        raise ResultError(f"the results of {name} are not both of bypassed layers, or sets of layers.")
    labels = [str(value) for value in recall[dim].values.tolist()]
    if labels != [str(value) for value in accuracy[dim].values.tolist()]:
        raise ResultError(f"the two results of {name} have different layers: run both with the same edits.")
    layers = [parse_layers(label) for label in labels]
    last = max(1, *(max(some) for some in layers))
    tables = task_tables(accuracy)
    scopes = {ALL_TASKS: list(tables)}
    for task, table in tables.items():
        scopes.setdefault(table.group, []).append(task)
    scopes |= {task: [task] for task in tables}
    drawn = {
        task: bootstrap_means(table.tables["accuracy"], n_resamples, seed + i)
        for i, (task, table) in enumerate(tables.items())
    }
    value, low, high, base = (np.empty((len(scopes), len(labels))) for _ in range(4))
    for i, members in enumerate(scopes.values()):
        value[i] = np.mean([tables[m].tables["accuracy"].mean(0) for m in members], 0)
        base[i] = np.mean([tables[m].tables["base"].mean() for m in members])
        fewest = min(tables[m].n_questions for m in members)
        low[i], high[i] = quantile_interval(np.mean([drawn[m] for m in members], 0), level, fewest)
    ids = [f"{name}/{i}" for i in recall["sequence"].values]
    scoped = ("scope", "site")
    return xr.Dataset(
        {
            "exact_match": (("sequence", "site"), recall["exact_match"].values.astype(float)),
            "exact_match_baseline": ("sequence", recall.baseline("exact_match").values.astype(float)),
            "accuracy": (scoped, value),
            "accuracy_low": (scoped, low),
            "accuracy_high": (scoped, high),
            "accuracy_base": (scoped, base),
        },
        {
            "sequence": ids,
            "scope": list(scopes),
            "site": [f"{name}: {label}" for label in labels],
            "model": ("site", [name] * len(labels)),
            "label": ("site", labels),
            "depth": ("site", [float(np.mean(some)) / last for some in layers]),
            "size": ("site", [len(some) for some in layers]),
        },
    )


register_kind(
    "bypass_frontier", plot=plot_frontier, reading=read_frontier, cites=(("menta2025", "attention bypass"),)
)
