"""What edits take from recitation against what they cost elsewhere: selectivity, and a frontier's area."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from memlens.errors import OptionError, ResultError, check_option
from memlens.results.result import Result
from memlens.results.statistics.intervals import bootstrap_means, quantile_interval, wilson_interval
from memlens.results.statistics.tasks import TaskTables, task_tables

OVER = ("max", "mean")


@dataclass(frozen=True, eq=False)
class Tradeoff:
    r"""For each edit, the share of recitation that it removes and the share of ability that it costs.

    - removed: :math:`r = (m_0 - m) / m_0`, with the mean exact match :math:`m` under the edit and
      :math:`m_0` without it; negative where the edit adds.
    - cost: of each task :math:`(a_0 - a) / (a_0 - c)`, with accuracies :math:`a` and the task's chance level
      :math:`c`; over tasks the largest ("max"), or the mean.
    - selectivity: :math:`S = r - \mathrm{cost}`. 1 where all recitation goes at no cost; 0 where as much is
      lost elsewhere. memlens' own, no published score.

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
        settings: How it was made.
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
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def selectivity(self) -> Float[np.ndarray, "edit"]:
        """S of each edit."""
        return self.removed - self.cost

    def table(self, *, level: float = 0.95) -> pd.DataFrame:
        """Return one row for each edit: `removed`, `cost` and `selectivity` with percentile intervals.

        Intervals of `cost` and `selectivity` are of a largest of several noisy numbers, which lies high: so
        the selectivity is rather under- than overrated.
        """
        frame = self.sites.assign(exact_match=self.exact_match, accuracy=self.accuracy)
        drawn = self.removed_draws, self.cost_draws, self.removed_draws - self.cost_draws
        for name, draws in zip(("removed", "cost", "selectivity"), drawn, strict=True):
            low, high = quantile_interval(draws, level)
            frame = frame.assign(
                **{name: getattr(self, name), f"{name}_low": low, f"{name}_high": high},
            )
        return frame.assign(worst_task=list(self.worst))

    def take(self, edits: Sequence[int] | Bool[np.ndarray, "edit"]) -> Tradeoff:
        """Return the trade-off of some edits."""
        chosen = np.arange(len(self.removed))[np.asarray(edits)]
        return Tradeoff(
            self.sites.iloc[chosen].reset_index(drop=True),
            self.removed[chosen],
            self.cost[chosen],
            [self.worst[int(i)] for i in chosen.tolist()],
            self.removed_draws[:, chosen],
            self.cost_draws[:, chosen],
            self.exact_match[chosen],
            self.accuracy[chosen],
            self.tasks,
            self.settings,
        )

    def area(self, *, level: float = 0.95) -> tuple[float, float, float]:
        """Return the area under the frontier of these edits (see `frontier_area`) with its interval."""
        value = float(frontier_area(self.removed[None], self.cost[None])[0])
        low, high = quantile_interval(frontier_area(self.removed_draws, self.cost_draws)[:, None], level)
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
    """Set what edits take from recitation against what they cost on tasks.

    Args:
        recall: A sweep over memorized sequences.
        accuracy: What `evaluate_tasks` gave for the same interventions.
        over: "max" or "mean" over tasks.
        tasks: The tasks that count; by default those on which the model is surely above chance (see
            `tasks_above_chance`): of another there is nothing to lose. Where a task's accuracy in a resample
            is not above chance, it does not count there.
        metric: What counts as recitation.
        n_resamples: Resamples of the bootstrap over sequences and over questions within tasks.
        seed: Of the bootstrap.

    Returns:
        The trade-off of each intervention, in the order of the results.

    Raises:
        ResultError: The results are of other interventions, no task counts, or nothing is recited without
            an edit.
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
        raise ResultError("the recall and the accuracy are of other interventions: run both with the same.")
    tables = task_tables(accuracy)
    for name in tasks or ():
        check_option("task", name, list(tables))
    counted = list(tasks) if tasks is not None else tasks_above_chance(accuracy)
    if not counted:
        raise ResultError("the model is not surely above chance on any task: there is no ability to lose.")
    base = recall.baseline(metric).values.astype(float)
    if not np.nanmean(base) > 0:
        raise ResultError(f"nothing is recited without an edit ({metric} is 0): there is nothing to remove.")
    n = recall.data.sizes["sequence"]
    values = np.column_stack([base, recall[metric].transpose("sequence", ...).values.reshape(n, -1)])
    removed, draws = (
        removed_share(values.mean(0)[None])[0],
        removed_share(bootstrap_means(values, n_resamples, seed)),
    )
    lost = {name: _lost(tables[name], None, 0) for name in counted}
    drawn = [_lost(tables[name], n_resamples, seed + 1 + i) for i, name in enumerate(counted)]
    stacked = np.stack([lost[name][0] for name in counted])
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
        {"over": over, "metric": metric, "tasks": counted, "n_resamples": n_resamples, "seed": seed},
    )


def tasks_above_chance(accuracy: Result, *, level: float = 0.95, margin: float = 0.05) -> list[str]:
    """Return the tasks on which the model without an edit is surely above chance.

    Only baselines are looked at, so that this choice sees nothing of what an edit does.

    Args:
        accuracy: What `evaluate_tasks` gave.
        level: Coverage of Wilson's interval.
        margin: By how much its lower end must be above the task's chance level.
    """
    found = []
    for name, task in task_tables(accuracy).items():
        base = task.tables["base"][:, 0]
        if wilson_interval(float(base.sum()), len(base), level)[0] > task.chance + margin:
            found.append(name)
    return found


def frontier_area(
    removed: Float[np.ndarray, "draw edit"], cost: Float[np.ndarray, "draw edit"]
) -> Float[np.ndarray, "draw"]:
    r"""Return the area under the best ability kept for each share of recitation removed.

    With kept ability :math:`k = 1 - \mathrm{cost}` (cut to [0, 1]), :math:`F(x)` is the largest :math:`k` of
    the edits that remove at least :math:`x`, 1 at :math:`x = 0` and 0 where none removes so much; the area is
    :math:`\int_0^1 F(x)\,dx`. 1: all recitation can go at no cost; 1/2: each share removed costs as large a
    share of ability (of infinitely many such edits; of a few it is less); 0: nothing can be removed.

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
    """Return which edits no other one beats: none removes as much or more at a lower cost.

    Of edits that do exactly the same the first counts.
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
        raise ResultError(f"a {result.kind} result without interventions holds no trade-off: give some.")
    if "target" in dims:
        raise OptionError(f"{metric!r} is one number a token here: run the sweep with per_token=False.")
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


def _lost(task: TaskTables, n_resamples: int | None, seed: int) -> Float[np.ndarray, "draw edit"]:
    def means(table: np.ndarray) -> np.ndarray:
        return (
            table.mean(0, keepdims=True) if n_resamples is None else bootstrap_means(table, n_resamples, seed)
        )

    return task.measured(means)["relative_drop_chance_corrected"]
