"""Means over sequences with their confidence intervals, overall and by group."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from memlens.recall.columns import COLUMNS
from memlens.recall.targets import METRICS
from memlens.results.statistics import is_binary, mean_interval

__all__ = ["GROUPS", "summarize"]

GROUPS = ("copies", "domain")
"""Columns by which rates are given where the table has them."""

_SUMMARIZED = (
    *METRICS,
    "memorization_score",
    "near_tie",
    *(name for name, column in COLUMNS.items() if column.summarized),
)

# Decided by what is counted, not by the values: a mean that happens to be 0 everywhere is no proportion.
_PROPORTIONS = ("exact_match", "near_tie", "np_discoverable", "trivial")


def summarize(table: pd.DataFrame, *, level: float, n_resamples: int, seed: int) -> pd.DataFrame:
    """Return one row for each metric of all sequences and of each value of each column of `GROUPS`.

    Values that are not finite (a log-probability of minus infinity) are left out of the mean; `n` counts the
    others.
    """
    options = {"level": level, "n_resamples": n_resamples, "seed": seed}
    parts = [_summary(table, "all", "all", options)]
    for column in GROUPS:
        if column in table:
            parts += [
                _summary(part, column, value, options) for value, part in table.groupby(column, sort=True)
            ]
    return pd.concat(parts, ignore_index=True)


def _summary(table: pd.DataFrame, by: str, group: object, options: dict[str, Any]) -> pd.DataFrame:
    names = [name for name in _SUMMARIZED if name in table]
    values = table[names].to_numpy(dtype=float)
    array = xr.DataArray(np.where(np.isfinite(values), values, np.nan), dims=("sequence", "metric"))
    binary = [i for i, n in enumerate(names) if n in _PROPORTIONS and is_binary(values[:, i])]
    others = [i for i in range(len(names)) if i not in binary]
    methods = [(rows, method) for rows, method in ((binary, "wilson"), (others, "bootstrap")) if rows]
    # All metrics of a kind at once: they share their resamples.
    columns = [_intervals(array[:, rows], rows, method, options) for rows, method in methods]
    found = pd.concat(columns).sort_index()
    found.insert(0, "metric", names)
    found.insert(0, "group", pd.Series([group] * len(names), dtype=object))
    found.insert(0, "by", by)
    return found


def _intervals(values: xr.DataArray, index: list[int], method: str, options: dict[str, Any]) -> pd.DataFrame:
    interval = mean_interval(values, method=method, **options)
    mean, low, high = interval.values
    columns = {"mean": mean, "low": low, "high": high, "n": interval["n"].values, "method": method}
    return pd.DataFrame(columns, index=index)
