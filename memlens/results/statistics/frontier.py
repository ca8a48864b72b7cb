"""Recitation against ability, one point for each bypassed block or set of blocks, of one model or several."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

import numpy as np
import xarray as xr

from memlens.errors import EmptySetError, ResultError
from memlens.results.kinds import register_kind
from memlens.results.plots.tasks import plot_frontier
from memlens.results.readings import read_frontier
from memlens.results.result import Result
from memlens.results.statistics.intervals import bootstrap_means, quantile_interval
from memlens.results.statistics.tasks import task_tables

ALL_TASKS = "all tasks"
_DIMS = ("layer", "layers")


def join_frontier(
    parts: Mapping[str, tuple[Result, Result]],
    *,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Result:
    """Join what edits did to recitation with what they did to accuracy on tasks, for one or several models.

    Args:
        parts: By the model's name: a sweep over memorized sequences, and what `evaluate_tasks` gave for the
            same interventions, both with the dimension `layer` or `layers`.
        level: Coverage of the intervals of accuracies.
        n_resamples: Of their bootstrap over questions within tasks.
        seed: Of the bootstrap.

    Returns:
        Kind "bypass_frontier", with one `site` for each model and edit: `exact_match` `(sequence, site)` (NaN
        for the sequences of other models) and `exact_match_baseline` `(sequence)`; `accuracy`,
        `accuracy_low`, `accuracy_high` `(scope, site)` and `accuracy_base` `(scope, site)`, where a scope is
        a task, a group of tasks (the mean over its tasks), or all tasks. Along `site`: `model`, `label` (the
        layers), `depth` (their mean, 0 is the first block and 1 the last) and `size` (how many).

    Raises:
        EmptySetError: No parts.
        ResultError: A part has neither a layer nor a set of layers, or its two results other ones.

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
    joined = [
        _one(name, *pair, level=level, n_resamples=n_resamples, seed=seed) for name, pair in parts.items()
    ]
    first = next(iter(parts.values()))[0]
    data = xr.concat(joined, "site", join="outer", combine_attrs="drop", data_vars="all", coords="minimal")
    base = xr.concat([part["exact_match_baseline"] for part in joined], "sequence")
    data = data.drop_vars("exact_match_baseline").assign(exact_match_baseline=base)
    settings = {"models": list(parts), "level": level, "n_resamples": n_resamples, "seed": seed}
    attrs = {**first.data.attrs, "kind": "bypass_frontier", "settings": json.dumps(settings)}
    attrs["model"] = ", ".join(parts)
    return Result(data.assign_attrs(attrs))


def _one(
    name: str, recall: Result, accuracy: Result, *, level: float, n_resamples: int, seed: int
) -> xr.Dataset:
    dim = next((dim for dim in _DIMS if dim in recall["exact_match"].dims), None)
    if dim is None or dim not in accuracy["accuracy"].dims:
        raise ResultError(f"the results of {name} are not both of bypassed layers, or sets of layers.")
    labels = [str(value) for value in recall[dim].values.tolist()]
    if labels != [str(value) for value in accuracy[dim].values.tolist()]:
        raise ResultError(f"the two results of {name} are of other layers: run both with the same edits.")
    layers = [_layers(label) for label in labels]
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
        low[i], high[i] = quantile_interval(np.mean([drawn[m] for m in members], 0), level)
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


def _layers(label: str) -> list[int]:
    """Return the layers that a label such as `0,2-4` names."""
    found: list[int] = []
    for part in label.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None:
            raise ResultError(f"{label!r} names no layers: write them as in 0,2-4.")
        first = int(match[1])
        found += range(first, int(match[2] or first) + 1)
    return found


register_kind(
    "bypass_frontier", plot=plot_frontier, reading=read_frontier, cites=(("menta2025", "attention bypass"),)
)
