"""Comparison of two results, such as memorized sequences with their controls."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from memlens.errors import ResultError, check_option
from memlens.results.result import Result
from memlens.results.statistics.intervals import as_table, quantile_interval
from memlens.results.statistics.resampling import (
    EXACT_ROWS,
    as_floats,
    bootstrap_means,
    row_blocks,
    slices,
    sums_and_counts,
    weighted_means,
)


def compare_groups(
    a: Result,
    b: Result,
    metric: str,
    *,
    of: str = "value",
    level: float = 0.95,
    n_resamples: int = 2000,
    n_permutations: int = 9999,
    seed: int = 0,
) -> xr.Dataset:
    """Compare the mean of `a` with the mean of `b` at every site.

    The difference is `mean(a) - mean(b)` over sequences, in the metric's unit, with a percentile bootstrap
    interval (none with two sequences or pairs). Where `b` has a coordinate `match` (or `matched_to`, as
    matched controls have) along `sequence`, its sequences are paired with those of `a` with the same `match`,
    or with that id. Several controls of one sequence are averaged first, and pairs are resampled. Otherwise
    the two groups are resampled separately.
    `p` is from a two-sided permutation test (signs of the pairs, or labels of the sequences) and cannot be
    below `1 / (n_permutations + 1)`; `p_corrected` is Benjamini and Hochberg's over all sites.

    Args:
        a: The first group, such as the memorized sequences.
        b: The second group, such as matched controls; with the same sites as `a`.
        metric: A variable of both.
        of: `"value"`, or `"effect"` for the difference to each sequence's own baseline.
        level: Coverage of the interval.
        n_resamples: Resamples of the bootstrap.
        n_permutations: Permutations of the test.
        seed: Seed of both.

    Returns:
        A dataset of `difference`, `low`, `high`, `p`, `p_corrected` over the sites (`layer`, `head`, …), with
        the attributes `paired`, `n_a` and `n_b`.

    Raises:
        ResultError: The sites differ, or a group has fewer than two sequences.

    Example:
        >>> def group(values):
        ...     return Result.create(xr.Dataset({"margin": ("sequence", values)}), kind="recall")
        >>> found = compare_groups(group([5.0, 6.0, 5.5, 6.5]), group([1.0, 2.0, 1.5, 2.5]), "margin")
        >>> float(found["difference"]), float(found["p"]) < 0.05
        (4.0, True)
    """
    check_option("of", of, ("value", "effect"))
    first, second = (_table(result, metric, of) for result in (a, b))
    _check_sites(first, second, metric)
    pairs = _paired(first, second)
    paired = pairs is not None
    if pairs is not None:
        first, second = pairs
    x, y = as_table(first), as_table(second)
    if paired:
        gaps = x - y
        (difference, n), samples = _means(gaps), bootstrap_means(gaps, n_resamples, seed)
        p = _paired_p(gaps, n_permutations, seed)
    else:
        (of_x, n_x), (of_y, n_y) = _means(x), _means(y)
        difference, n = of_x - of_y, np.minimum(n_x, n_y)
        samples = bootstrap_means(x, n_resamples, seed) - bootstrap_means(y, n_resamples, seed + 1)
        p = _unpaired_p(x, y, n_permutations, seed)
    low, high = quantile_interval(samples, level, n)
    columns = {"difference": difference, "low": low, "high": high, "p": p, "p_corrected": corrected(p)}
    site = first.isel(sequence=0, drop=True)
    attrs = {"metric": metric, "of": of, "level": level, "paired": paired, "n_a": len(x), "n_b": len(y)}
    arrays = {key: site.copy(data=values.reshape(site.shape)) for key, values in columns.items()}
    return xr.Dataset(arrays, attrs=attrs)


def _table(result: Result, metric: str, of: str) -> xr.DataArray:
    array = result.effect(metric) if of == "effect" else result[metric].astype(float)
    if "sequence" not in array.dims:
        raise ResultError(f"{metric!r} has no sequences to compare: its dimensions are {array.dims}.")
    if array.sizes["sequence"] < 2:
        raise ResultError(
            f"{metric!r} needs at least two sequences per group, not {array.sizes['sequence']}."
        )
    return array.transpose("sequence", ...)


def _check_sites(first: xr.DataArray, second: xr.DataArray, metric: str) -> None:
    ours, theirs = ({k: v for k, v in part.sizes.items() if k != "sequence"} for part in (first, second))
    if ours != theirs:
        raise ResultError(
            f"{metric!r} has sites {ours} in one result and {theirs} in the other: "
            "compare results with the same sites."
        )


def _paired(first: xr.DataArray, second: xr.DataArray) -> tuple[xr.DataArray, xr.DataArray] | None:
    """Return both with one row per pair, or None where `second` does not name its matches."""
    link = next((name for name in ("match", "matched_to") if name in second.coords), None)
    own = next((name for name in ("match", "sequence") if name in first.coords), None)
    if link is None or own is None:
        return None
    rows = {str(key): row for row, key in enumerate(first[own].values.tolist())}
    links = np.array([str(key) for key in second[link].values.tolist()])
    keys = [key for key in dict.fromkeys(links.tolist()) if key in rows]
    if len(keys) < 2:
        raise ResultError(
            f"{link!r} of the second result names {len(keys)} sequences of the first: "
            "at least two pairs are needed."
        )
    if 2 * len(keys) < min(len(rows), len(links)):
        warnings.warn(
            f"only {len(keys)} pairs are compared: {link!r} of the {len(links)} sequences of the second "
            f"result matches no others of the {len(rows)} of the first: use the controls of these sequences.",
            stacklevel=3,
        )
    return first.isel(sequence=[rows[key] for key in keys]), _averaged(second, links, keys)


def _averaged(array: xr.DataArray, links: np.ndarray, keys: list[str]) -> xr.DataArray:
    """Return the mean of the rows of each key, NaN skipped: the n-th row of every key, for each n in turn."""
    number = pd.Series(links).groupby(links).cumcount().to_numpy()
    total = count = xr.DataArray(0.0)
    for nth in np.unique(number):
        own = np.flatnonzero(number == nth)
        row = pd.Series(own, index=links[own]).reindex(keys)
        part = array.isel(sequence=row.fillna(0).to_numpy(int)).drop_vars("sequence", errors="ignore")
        there = part.notnull() & xr.DataArray(row.notna().to_numpy(), dims="sequence")
        total, count = total + part.where(there, 0.0), count + there
    return (total / count.where(count > 0)).transpose(*array.dims)


def _means(table: Any) -> tuple[np.ndarray, np.ndarray]:
    sums, counts = sums_and_counts(table)
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums / counts, counts


_PERMUTED = 256
"""So many permutations of many rows are drawn at a time."""


def _paired_p(difference: Any, n_permutations: int, seed: int) -> np.ndarray:
    rng, n = np.random.default_rng(seed), len(difference)
    seen, counts = sums_and_counts(difference)
    sums = np.zeros((n_permutations, len(seen)))
    for rows in row_blocks(n):
        values = as_floats(difference, rows)
        filled = np.where(np.isfinite(values), values, 0.0)
        for some in slices(n_permutations, _PERMUTED if n > EXACT_ROWS else n_permutations):
            sums[some] += rng.choice([-1.0, 1.0], size=(some.stop - some.start, len(filled))) @ filled
    return np.where(counts > 0, _share_as_extreme(sums, seen), np.nan)


def _unpaired_p(x: Any, y: Any, n_permutations: int, seed: int) -> np.ndarray:
    """Return p over permutations of the labels, or of many rows over labels drawn one by one."""
    if len(x) + len(y) > EXACT_ROWS:
        gaps = _gaps_of_drawn_labels(x, y, n_permutations, seed)
    else:
        pooled = np.concatenate([as_floats(part, slice(None)) for part in (x, y)])
        order = np.random.default_rng(seed).permuted(
            np.tile(np.arange(len(pooled)), (n_permutations, 1)), axis=1
        )
        in_x = (order < len(x)).astype(float)
        gaps = weighted_means(in_x, pooled) - weighted_means(1 - in_x, pooled)
    seen = _means(x)[0] - _means(y)[0]
    return np.where(np.isfinite(seen), _share_as_extreme(gaps, seen), np.nan)


def _gaps_of_drawn_labels(x: Any, y: Any, n_permutations: int, seed: int) -> np.ndarray:
    """Return differences of means where each row is in `x` with the chance len(x) / (len(x) + len(y)).

    Given how many rows are in each group these are permutations, and the groups' sizes vary by a share of
    the order of 1 / sqrt(rows): p is that of permutations up to terms of the order of 1 / rows.
    """
    rng, chance = np.random.default_rng(seed), len(x) / (len(x) + len(y))
    shape = (n_permutations, x.shape[1])
    in_x, all_sums = (np.zeros(shape), np.zeros(shape)), np.zeros((2, x.shape[1]))
    for table in (x, y):
        for rows in row_blocks(len(table)):
            values = as_floats(table, rows)
            present = np.isfinite(values)
            filled, whole = np.where(present, values, 0.0), bool(present.all())
            all_sums += [filled.sum(0), present.sum(0)]
            for some in slices(n_permutations, _PERMUTED):
                drawn = (rng.random((some.stop - some.start, len(values)), dtype=np.float32) < chance) * 1.0
                in_x[0][some] += drawn @ filled
                in_x[1][some] += drawn.sum(1, keepdims=True) if whole else drawn @ present
    with np.errstate(invalid="ignore", divide="ignore"):
        return in_x[0] / in_x[1] - (all_sums[0] - in_x[0]) / (all_sums[1] - in_x[1])


def _share_as_extreme(samples: np.ndarray, seen: np.ndarray) -> np.ndarray:
    slack = 1e-12 * np.maximum(1.0, np.abs(seen))
    extreme = (np.abs(samples) >= np.abs(seen) - slack).sum(0)
    return (1 + extreme) / (1 + len(samples))


def corrected(p: np.ndarray) -> np.ndarray:
    """Return Benjamini and Hochberg's correction of p values; NaN is kept."""
    from statsmodels.stats.multitest import multipletests  # takes most of a second to import

    known = np.isfinite(p)
    out = np.full_like(p, np.nan)
    if known.any():
        out[known] = multipletests(p[known], method="fdr_bh")[1]
    return out
