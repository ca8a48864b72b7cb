"""`Estimate`: a value with its interval; choosing on one half of the sequences and reporting on the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float, Int
from scipy import stats

from memlens.results.result import Result
from memlens.results.statistics.intervals import mean_interval, ratio_interval


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval over `n` sequences; NaN where there is none.

    Attributes:
        value: The estimate.
        low: Lower end.
        high: Upper end.
        n: Sequences behind it.
    """

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def chosen_site(
    result: Result, metric: str, rows: Int[np.ndarray, "row"], *, of: str = "effect", largest: bool = False
) -> dict[str, int]:
    """Return the site with the smallest (or largest) mean over some sequences, as coordinates.

    Args:
        result: A result with `sequence` and site dimensions.
        metric: Which metric.
        rows: The sequences to choose on.
        of: "effect" (intervened minus baseline) or "value".
        largest: Take the largest mean, not the smallest.
    """
    array = result.effect(metric) if of == "effect" else result[metric]
    means = array.isel(sequence=rows).mean("sequence", skipna=True)
    filled = means.fillna(-np.inf if largest else np.inf).values
    place = np.unravel_index(int(filled.argmax() if largest else filled.argmin()), filled.shape)
    return {str(dim): int(means[dim].values[i]) for dim, i in zip(means.dims, place, strict=True)}


def mean_estimate(array: xr.DataArray, *, seed: int = 0) -> Estimate:
    """Return the mean over sequences of a one-dimensional array, with a percentile bootstrap interval."""
    return _estimate(array.values.astype(float), np.mean, seed)


def share_estimate(array: xr.DataArray) -> Estimate:
    """Return the share of ones over sequences, with Wilson's interval."""
    interval = mean_interval(array, method="wilson")
    mean, low, high = interval.values.tolist()
    return Estimate(mean, low, high, int(interval["n"]))


def median_estimate(values: Float[np.ndarray, "seq"], *, seed: int = 0) -> Estimate:
    """Return the median over sequences, with a percentile bootstrap interval."""
    return _estimate(np.asarray(values, float), np.median, seed)


def ratio_estimate(part: xr.DataArray, whole: xr.DataArray, *, seed: int = 0) -> Estimate:
    """Return sum(part) / sum(whole) over sequences, with a percentile bootstrap interval over sequences.

    A mean of ratios would be ruled by the sequences whose `whole` is near 0.
    """
    share = ratio_interval(part, whole, seed=seed)
    value, low, high = share.values.tolist()
    return Estimate(value, low, high, int(share["n"]))


def _estimate(values: np.ndarray, statistic: Callable[..., Any], seed: int) -> Estimate:
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return Estimate(np.nan, np.nan, np.nan, 0)
    value = float(statistic(values))
    if len(values) < 2 or np.ptp(values) == 0:
        return Estimate(
            value, value if len(values) > 1 else np.nan, value if len(values) > 1 else np.nan, len(values)
        )
    found = stats.bootstrap(
        (values,),
        statistic,
        method="percentile",
        n_resamples=2000,
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    return Estimate(
        value, float(found.confidence_interval.low), float(found.confidence_interval.high), len(values)
    )
