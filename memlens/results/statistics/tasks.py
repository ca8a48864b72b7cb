"""`task_summary`: accuracy of tasks and groups of tasks, raw and corrected for chance, with intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from memlens.errors import ResultError
from memlens.results.result import Result
from memlens.results.statistics.intervals import check_level, quantile_interval
from memlens.results.statistics.resampling import bootstrap_means

Table = Float[np.ndarray, "resample site"]
Means = Mapping[str, Table]


def _over(above: Table, below: Table) -> Table:
    """A ratio, NaN where there is nothing to lose."""
    return np.where(below > 0, above / np.where(below > 0, below, 1.0), np.nan)


MEASURES: Mapping[str, Callable[[Means, float], Table]] = {
    "accuracy": lambda m, chance: m["accuracy"],
    "accuracy_norm": lambda m, chance: m["accuracy_norm"],
    "accuracy_chance_corrected": lambda m, chance: (m["accuracy"] - chance) / (1 - chance),
    "relative_drop": lambda m, chance: _over(m["base"] - m["accuracy"], m["base"]),
    "relative_drop_chance_corrected": lambda m, chance: _over(m["base"] - m["accuracy"], m["base"] - chance),
}
"""The measures, from a task's mean accuracies (`base`: without intervention) and its chance level.

Relative drops are positive where accuracy is lost. Uncorrected, the drop of a two-way task rarely exceeds
0.5, while that of LAMBADA can reach 1.
"""


@dataclass(frozen=True)
class TaskTables:
    """The questions of one task.

    Attributes:
        group: The group of the task.
        chance: The chance level.
        tables: Values `[question, site]` by name; `base` is without intervention.
    """

    group: str
    chance: float
    tables: Mapping[str, Float[np.ndarray, "question site"]]

    @property
    def n_questions(self) -> int:
        """How many questions there are."""
        return len(self.tables["accuracy"])

    def measured(self, resample: Callable[[np.ndarray], np.ndarray]) -> dict[str, Table]:
        """Return every measure of `MEASURES`, from means that `resample` takes of each table."""
        means = {name: resample(table) for name, table in self.tables.items()}
        return {name: measure(means, self.chance) for name, measure in MEASURES.items()}


def task_summary(
    result: Result, *, level: float = 0.95, n_resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """Return mean accuracies of each task and of each group of tasks, with intervals.

    A group's value is the mean over its tasks, regardless of their numbers of questions. Intervals are
    percentile bootstraps over questions within tasks: they generalize to other questions of the same tasks,
    not to other tasks. Intervened and baseline accuracies of a task are resampled together. Where a task has
    one or two questions, there is no interval.

    Args:
        result: A result of `evaluate_tasks`.
        level: Coverage of the intervals.
        n_resamples: Number of resamples.
        seed: Seed of the resamples.

    Returns:
        One row for each task or group, site and measure: `scope` ("task" or "group"), `name`, `tasks` (how
        many), `questions`, a column for each dimension of the sweep (`layer`, …), `measure` (a key of
        `MEASURES`), `mean`, `low`, `high`. Where there are no interventions, there are no relative drops.

    Raises:
        ResultError: It is not a result of `evaluate_tasks`.
        OptionError: A level outside 0 to 1.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> result = ml.evaluate_tasks(model, ml.tasks.local_tasks("zoo", model, names=["agreement"], n=20))
        >>> table = ml.tasks.task_summary(result, n_resamples=200)
        >>> table["scope"].tolist(), table["measure"].unique().tolist()[:2]
        (['task', 'task', 'task', 'group', 'group', 'group'], ['accuracy', 'accuracy_norm'])
    """
    check_level(level)
    tasks = task_tables(result)
    values = {name: task.measured(lambda table: table.mean(0, keepdims=True)) for name, task in tasks.items()}
    drawn = {
        name: task.measured(lambda table, n=number: bootstrap_means(table, n_resamples, seed + n))
        for number, (name, task) in enumerate(tasks.items())
    }
    groups = list(dict.fromkeys(task.group for task in tasks.values()))
    units = [("task", name, [name]) for name in tasks]
    units += [("group", group, [n for n, task in tasks.items() if task.group == group]) for group in groups]
    has_base = "accuracy_baseline" in result.data
    rows = []
    for scope, name, members in units:
        n = sum(tasks[member].n_questions for member in members)
        fewest = min(tasks[member].n_questions for member in members)
        for measure in MEASURES:
            if measure.startswith("relative") and not has_base:
                continue
            mean = np.mean([values[member][measure][0] for member in members], 0)
            draws = np.mean([drawn[member][measure] for member in members], 0)
            low, high = quantile_interval(draws, level, fewest)
            known = np.isfinite(mean)
            for site, numbers in zip(
                _sites(result), zip(mean, _where(known, low), _where(known, high), strict=True), strict=True
            ):
                rows.append((scope, name, len(members), n, *site, measure, *map(float, numbers)))
    dims = [str(dim) for dim in result["accuracy"].dims[1:]]
    columns = ["scope", "name", "tasks", "questions", *dims, "measure", "mean", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def _where(known: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.where(known, values, np.nan)


def _sites(result: Result) -> Iterable[tuple[Any, ...]]:
    accuracy = result["accuracy"]
    return product(*(accuracy[dim].values.tolist() for dim in accuracy.dims[1:]))


def task_tables(result: Result) -> dict[str, TaskTables]:
    """Return the tables of each task in a result of `evaluate_tasks`.

    Raises:
        ResultError: It is not a result of `evaluate_tasks`.
    """
    if result.kind != "task_accuracy":
        raise ResultError(
            f"a {result.kind} result is not an evaluation of tasks: use a result of evaluate_tasks."
        )
    data, found = result.data, {}
    for name in dict.fromkeys(data["task"].values.tolist()):
        part = data.isel(sequence=np.flatnonzero(data["task"].values == name))
        n = part.sizes["sequence"]
        tables = {m: part[m].values.reshape(n, -1) for m in ("accuracy", "accuracy_norm")}
        if "accuracy_baseline" in part:
            base = part["accuracy_baseline"].values[:, None]
            tables["base"] = np.broadcast_to(base, tables["accuracy"].shape)
        else:
            tables["base"] = tables["accuracy"]
        found[name] = TaskTables(str(part["task_group"].values[0]), float(part["chance"].values[0]), tables)
    return found
