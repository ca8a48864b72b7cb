"""Curves over relative depth, for models of different depth: decoding probability and recovery from noise."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float

from memlens.results.result import Result
from memlens.results.statistics.estimates import Estimate
from memlens.results.statistics.intervals import bootstrap_means


def group_values(result: Result, metric: str, group: str) -> Float[np.ndarray, "seq layer"]:
    """Return one group's values, one row a sequence and one column a layer, mean over targets.

    Args:
        result: A result with a coordinate `group` along `sequence`.
        metric: Of it.
        group: Which group; rows are none where it has no such group.
    """
    data = result[metric].isel(sequence=result["group"].values.astype(str) == group)
    if "target" in data.dims:
        data = data.mean("target", skipna=True)
    return data.transpose("sequence", "layer").values.astype(float)


def on_depth(values: Float[np.ndarray, "seq layer"], bins: int = 20) -> xr.DataArray:
    """Return values after blocks on a common grid of relative depth: `(sequence, depth)`.

    The output of block l of L stands at (l + 1) / L, so the last block's at 1; the grid is 1/bins, 2/bins, …,
    1. Between blocks it is linear; before the first it is the first's.

    >>> on_depth(np.array([[0.0, 1.0]]), 4).values.tolist()
    [[0.0, 0.0, 0.5, 1.0]]
    """
    layers = np.arange(1, values.shape[1] + 1) / values.shape[1]
    grid = np.arange(1, bins + 1) / bins
    rows = [np.interp(grid, layers, row) for row in values]
    return xr.DataArray(np.array(rows).reshape(-1, bins), {"depth": grid}, ("sequence", "depth"))


def depth_curve(
    values: Float[np.ndarray, "seq layer"], *, n_resamples: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Return the mean after each block: columns `layer`, `depth`, `mean`, `low`, `high` (bootstrap), `n`."""
    n, n_layers = values.shape
    low = high = np.full(n_layers, np.nan)
    if n > 1:
        low, high = np.percentile(bootstrap_means(values, n_resamples, seed), [2.5, 97.5], axis=0)
    depth = np.arange(1, n_layers + 1) / n_layers
    return pd.DataFrame(
        {
            "layer": np.arange(n_layers),
            "depth": depth,
            "mean": values.mean(0),
            "low": low,
            "high": high,
            "n": n,
        }
    )


def burst(values: Float[np.ndarray, "seq layer"], *, n_resamples: int = 1000, seed: int = 0) -> Estimate:
    """Return the relative depth of the block that raises the mean most, from block to block.

    The rise to block l + 1 counts as that block's; the first block's own rise, from what the embeddings give,
    is not known. Bootstrap over sequences.

    >>> burst(np.array([[0.0, 0.1, 0.9, 1.0], [0.0, 0.0, 0.7, 1.0]])).value
    0.75
    """
    return _of_curve(values, _burst, n_resamples, seed)


def crossing(
    values: Float[np.ndarray, "seq layer"], level: float = 0.5, *, n_resamples: int = 1000, seed: int = 0
) -> Estimate:
    """Return the relative depth of the first block after which the mean is above `level`; NaN for none.

    Bootstrap over sequences, of the resamples that cross.

    >>> crossing(np.array([[0.1, 0.4, 0.6, 0.9], [0.1, 0.2, 0.6, 0.9]])).value
    0.75
    """

    def first(means: np.ndarray) -> np.ndarray:
        above = means > level
        depth = (above.argmax(1) + 1) / means.shape[1]
        return np.where(above.any(1), depth, np.nan)

    return _of_curve(values, first, n_resamples, seed)


def _burst(means: np.ndarray) -> np.ndarray:
    return (np.diff(means, axis=1).argmax(1) + 2) / means.shape[1]


def _of_curve(
    values: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], n_resamples: int, seed: int
) -> Estimate:
    n, n_layers = values.shape
    if n == 0 or n_layers < 2:
        return Estimate(np.nan, np.nan, np.nan, n)
    value = float(statistic(values.mean(0, keepdims=True))[0])
    if n < 2:
        return Estimate(value, np.nan, np.nan, n)
    drawn = statistic(bootstrap_means(values, n_resamples, seed))
    drawn = drawn[np.isfinite(drawn)]
    if not np.isfinite(value) or not len(drawn):
        return Estimate(value, np.nan, np.nan, n)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Estimate(value, float(low), float(high), n)
