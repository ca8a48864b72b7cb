"""Resamples of rows: weighted sums and means of every column, in memory that does not grow with the rows.

A bootstrap is a matrix product of weights `[resample, row]` with values `[row, site]`. The weights are drawn
and used in portions, so that they are never held all at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from scipy import stats

EXACT_ROWS = 10_000
"""Up to so many rows a resample draws as many rows as there are (multinomial weights); of more rows, the
weights are independent and Poisson-distributed with mean 1 (the Poisson bootstrap), which is ten times
faster. The means of both have the same distribution up to terms of the order of 1 / rows."""

_PORTION = 2**20
_ROWS, _RESAMPLES = 8192, 64

_STEPS = 2**16
# The inverse of the distribution function at 65,536 points: mean 1, variance 0.99997.
_POISSON = np.repeat(
    np.arange(10.0), np.diff(np.round(_STEPS * stats.poisson(1).cdf(np.arange(-1, 10))).astype(int))
)


def resampled_sums(
    tables: Sequence[np.ndarray], n_resamples: int, seed: int | np.random.Generator
) -> list[np.ndarray]:
    """Return the sum of each column of each table under the same `n_resamples` resamples of the rows.

    Args:
        tables: `[row, site]` each, all with the same rows, without NaN.
        n_resamples: Number of resamples.
        seed: The resamples depend on it, on `n_resamples` and on the number of rows only.

    Returns:
        For each table `[resample, site]`.
    """
    totals = [np.zeros((n_resamples, table.shape[1])) for table in tables]
    for some, rows, weights in _weights(len(tables[0]), n_resamples, seed):
        for total, table in zip(totals, tables, strict=True):
            total[some] += weights @ table[rows]
    return totals


def bootstrap_means(table: np.ndarray, n_resamples: int, seed: int | np.random.Generator) -> np.ndarray:
    """Return the mean of each column under `n_resamples` resamples of the rows: `[resample, site]`.

    NaN is skipped. A resample with no value of a column (all NaN) gives NaN there.
    """
    present = np.isfinite(table)
    if present.all():
        filled, counted = table, np.ones((len(table), 1))
    else:
        filled, counted = np.where(present, table, 0.0), present
    totals, counts = resampled_sums([filled, counted], n_resamples, seed)
    with np.errstate(invalid="ignore", divide="ignore"):
        return totals / counts


def weighted_means(weights: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Return the NaN-skipping weighted mean of each column of `table`: `[len(weights), site]`."""
    present = np.isfinite(table)
    filled = np.where(present, table, 0.0)
    totals = weights @ filled
    counts = weights.sum(1, keepdims=True) if present.all() else weights @ present.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return totals / counts


def _weights(
    rows: int, n_resamples: int, seed: int | np.random.Generator
) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """Yield some resamples, some rows, and the weights of the one in the other: `[resample, row]`."""
    rng = np.random.default_rng(seed)
    if rows <= EXACT_ROWS:
        chances = np.full(rows, 1 / rows)
        for some in _slices(n_resamples, max(1, _PORTION // rows)):
            yield some, slice(None), rng.multinomial(rows, chances, some.stop - some.start).astype(float)
        return
    for some in _slices(n_resamples, _RESAMPLES):
        for own in _slices(rows, _ROWS):
            size = (some.stop - some.start, own.stop - own.start)
            yield some, own, _POISSON[rng.integers(0, _STEPS, size, dtype=np.uint16)]


def _slices(n: int, step: int) -> Iterator[slice]:
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))
