"""Comparison of two results, such as memorized sequences with their controls."""

from __future__ import annotations

import warnings

import numpy as np
import xarray as xr

from memlens.errors import ResultError, check_option
from memlens.results.result import Result
from memlens.results.statistics.intervals import quantile_interval
from memlens.results.statistics.resampling import bootstrap_means, weighted_means


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
    x, y = (part.values.reshape(part.sizes["sequence"], -1) for part in (first, second))
    if paired:
        difference, p = _means(x - y), _paired_p(x - y, n_permutations, seed)
        samples, n = bootstrap_means(x - y, n_resamples, seed), _counts(x - y)
    else:
        difference, p = _means(x) - _means(y), _unpaired_p(x, y, n_permutations, seed)
        samples = bootstrap_means(x, n_resamples, seed) - bootstrap_means(y, n_resamples, seed + 1)
        n = np.minimum(_counts(x), _counts(y))
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
    controls = [second.isel(sequence=links == key).mean("sequence") for key in keys]
    return first.isel(sequence=[rows[key] for key in keys]), xr.concat(controls, "sequence", coords="minimal")


def _counts(table: np.ndarray) -> np.ndarray:
    return np.isfinite(table).sum(0)


def _means(table: np.ndarray) -> np.ndarray:
    return weighted_means(np.ones((1, len(table))), table)[0]


def _paired_p(difference: np.ndarray, n_permutations: int, seed: int) -> np.ndarray:
    filled = np.where(np.isfinite(difference), difference, 0.0)
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(n_permutations, len(difference)))
    p = _share_as_extreme(signs @ filled, filled.sum(0))
    return np.where(np.isfinite(difference).any(0), p, np.nan)


def _unpaired_p(x: np.ndarray, y: np.ndarray, n_permutations: int, seed: int) -> np.ndarray:
    pooled = np.concatenate([x, y])
    order = np.random.default_rng(seed).permuted(np.tile(np.arange(len(pooled)), (n_permutations, 1)), axis=1)
    in_x = np.concatenate([(np.arange(len(pooled)) < len(x))[None], order < len(x)]).astype(float)
    gaps = weighted_means(in_x, pooled) - weighted_means(1 - in_x, pooled)
    return np.where(np.isfinite(gaps[0]), _share_as_extreme(gaps[1:], gaps[0]), np.nan)


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
