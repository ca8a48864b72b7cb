"""Resamples of rows: weighted sums and means of every column, in memory that does not grow with the rows.

A bootstrap is a matrix product of weights `[resample, row]` with values `[row, site]`. The weights are drawn
and used in portions, so that they are never held all at once; nor are the values of many rows, which may be
on disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

EXACT_ROWS = 10_000
"""Up to so many rows a resample draws as many rows as there are (multinomial weights); of more rows, the
weights are independent and Poisson-distributed with mean 1 (the Poisson bootstrap), which is ten times
faster. The means of both have the same distribution up to terms of the order of 1 / rows."""

_PORTION = 2**20
_ROWS, _RESAMPLES = 2048, 256

_STEPS = 2**16
# The inverse of the distribution function at 65,536 points: mean 1, variance 0.99997.
_POISSON = np.repeat(
    np.arange(10.0), np.diff(np.round(_STEPS * stats.poisson(1).cdf(np.arange(-1, 10))).astype(int))
)


def row_blocks(rows: int) -> Iterator[slice]:
    """Yield all rows at once, or of more than `EXACT_ROWS` some at a time."""
    return iter([slice(0, rows)]) if rows <= EXACT_ROWS else slices(rows, _ROWS)


def as_floats(table: Any, rows: slice) -> Float[np.ndarray, "row *site"]:
    """Return some rows of an array, or of one that is on disk, in double precision."""
    return np.asarray(table[rows], dtype=np.float64)


@dataclass(frozen=True)
class SideBySide:
    """Tables `[row, site]` of the same rows as one, joined only where rows of it are read."""

    tables: Sequence[Any]

    def __len__(self) -> int:
        return len(self.tables[0])

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, and sites of all tables."""
        return len(self), sum(table.shape[1] for table in self.tables)

    def __getitem__(self, rows: slice) -> np.ndarray:
        return np.concatenate([as_floats(table, rows) for table in self.tables], axis=1)


def sums_and_counts(table: Any) -> tuple[Float[np.ndarray, "site"], Int[np.ndarray, "site"]]:
    """Return the sum and the number of the finite values in each column of `[row, site]`."""
    sums, counts = np.zeros(table.shape[1]), np.zeros(table.shape[1], dtype=np.int64)
    for rows in row_blocks(len(table)):
        values = as_floats(table, rows)
        present = np.isfinite(values)
        sums += np.where(present, values, 0.0).sum(0)
        counts += present.sum(0)
    return sums, counts


def resampled_sums(
    tables: Sequence[Any], n_resamples: int, seed: int | np.random.Generator
) -> list[np.ndarray]:
    """Return the sum of each column of each table under the same `n_resamples` resamples of the rows.

    Args:
        tables: `[row, site]` each, all with the same rows; NaN counts as 0. They may be on disk (Dask): of
            more than `EXACT_ROWS` rows a few thousand are read at a time, each once.
        n_resamples: Number of resamples.
        seed: The resamples depend on it, on `n_resamples` and on the number of rows only.

    Returns:
        For each table `[resample, site]`.
    """
    totals = [np.zeros((n_resamples, table.shape[1])) for table in tables]
    blocks: list[np.ndarray] = []
    read: slice | None = None
    for some, rows, weights in _weights(len(tables[0]), n_resamples, seed):
        if rows != read:
            blocks, read = [as_floats(table, rows) for table in tables], rows
            blocks = [np.where(np.isnan(block), 0.0, block) for block in blocks]
        for total, block in zip(totals, blocks, strict=True):
            total[some] += weights @ block
    return totals


def bootstrap_means(table: Any, n_resamples: int, seed: int | np.random.Generator) -> np.ndarray:
    """Return the mean of each column under `n_resamples` resamples of the rows: `[resample, site]`.

    NaN is skipped. A resample with no value of a column (all NaN) gives NaN there.

    Args:
        table: `[row, site]`, as for `resampled_sums`.
        n_resamples: Number of resamples.
        seed: As for `resampled_sums`.
    """
    totals, counts = np.zeros((n_resamples, table.shape[1])), np.zeros((n_resamples, 1))
    block = present = np.empty(0)
    read, holes = None, False
    for some, rows, weights in _weights(len(table), n_resamples, seed):
        if rows != read:
            values, read = as_floats(table, rows), rows
            present = np.isfinite(values)
            block = np.where(present, values, 0.0)
            holes = not present.all()
            if holes and counts.shape[1] < totals.shape[1]:
                counts = np.repeat(counts, totals.shape[1], axis=1)
        totals[some] += weights @ block
        counts[some] += weights @ present if holes else weights.sum(1, keepdims=True)
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
    """Yield some resamples, some rows, and the weights of the one in the other: `[resample, row]`.

    All resamples of some rows follow one another, so that these rows are read once.
    """
    rng = np.random.default_rng(seed)
    if rows <= EXACT_ROWS:
        chances = np.full(rows, 1 / rows)
        for some in slices(n_resamples, max(1, _PORTION // rows)):
            yield some, slice(0, rows), rng.multinomial(rows, chances, some.stop - some.start).astype(float)
        return
    for own in row_blocks(rows):
        for some in slices(n_resamples, _RESAMPLES):
            size = (some.stop - some.start, own.stop - own.start)
            yield some, own, _POISSON[rng.integers(0, _STEPS, size, dtype=np.uint16)]


def slices(n: int, step: int) -> Iterator[slice]:
    """Yield `range(n)` in portions of `step`."""
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))
