"""Means over sequences with their confidence intervals, overall and by group."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from memlens.recall.targets import METRICS
from memlens.results.statistics import is_binary, mean_interval

__all__ = ["GROUPS", "summarize"]

GROUPS = ("copies", "domain")
"""Columns by which rates are given where the table has them."""

_SUMMARIZED = (*METRICS, "memorization_score", "near_tie")

# Decided by what is counted, not by the values: a mean that happens to be 0 everywhere is no proportion.
_PROPORTIONS = ("exact_match", "near_tie")


def summarize(table: pd.DataFrame, *, level: float, n_resamples: int, seed: int) -> pd.DataFrame:
    """Return one row for each metric of all sequences and of each value of each column of `GROUPS`."""
    options = {"level": level, "n_resamples": n_resamples, "seed": seed}
    records = _records(table, "all", "all", options)
    for column in GROUPS:
        if column in table:
            for value, part in table.groupby(column, sort=True):
                records += _records(part, column, value, options)
    return pd.DataFrame.from_records(records)


def _records(table: pd.DataFrame, by: str, group: object, options: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "by": by,
            "group": group,
            "metric": name,
            **_interval(name, table[name].to_numpy(dtype=float), options),
        }
        for name in _SUMMARIZED
        if name in table
    ]


def _interval(name: str, values: np.ndarray, options: dict[str, Any]) -> dict[str, Any]:
    method = "wilson" if name in _PROPORTIONS and is_binary(values) else "bootstrap"
    interval = mean_interval(xr.DataArray(values, dims="sequence"), method=method, **options)
    mean, low, high = interval.values.tolist()
    return {"mean": mean, "low": low, "high": high, "n": len(values), "method": method}
