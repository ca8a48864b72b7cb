"""Means over sequences with their confidence intervals, for every site at once.

Sequences are the unit of resampling: two values of one sequence (at two layers, or two target tokens) are not
independent, so other dimensions are averaged within each sequence first. NaN means "not measured" and is
skipped. All methods are vectorized over sites; the resamples of a bootstrap are those of `resampling`.
`restored_share`, a ratio of sums over all sequences, is also here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Int
from scipy import stats

from memlens.errors import OptionError, ResultError, check_option
from memlens.results.statistics.resampling import (
    SideBySide,
    as_floats,
    bootstrap_means,
    resampled_sums,
    row_blocks,
    sums_and_counts,
)

if TYPE_CHECKING:
    from memlens.results.result import Result

STATISTICS = ("mean", "low", "high")
METHODS = ("auto", "bootstrap", "wilson", "t")
FEWEST = 3
"""The fewest sequences that give an interval: one or two say nothing reliable about others."""
_BLOCK_BYTES = 64 * 2**20


def is_binary(values: Any) -> bool:
    """Return whether every finite value is 0 or 1 (and there is at least one).

    >>> is_binary(np.array([0.0, 1.0, np.nan])), is_binary(np.array([0.0, 0.5]))
    (True, False)
    """
    if values.dtype == bool:
        return values.size > 0
    found = False
    for rows in row_blocks(len(values)) if values.ndim else [...]:
        block = np.asarray(values[rows])
        finite = block[np.isfinite(block)]
        if not np.isin(finite, (0, 1)).all():
            return False
        found = found or bool(finite.size)
    return found


def check_level(level: float) -> None:
    """Raise `OptionError` unless `level` is a coverage."""
    if not 0 < level < 1:
        raise OptionError(f"level={level!r} is not a coverage: give a number between 0 and 1, such as 0.95.")


def mean_interval(
    values: xr.DataArray,
    dim: str = "sequence",
    *,
    level: float = 0.95,
    method: str = "auto",
    n_resamples: int = 2000,
    seed: int = 0,
) -> xr.DataArray:
    """Return mean, low and high over `dim`, on a new first dimension `statistic`.

    Methods: `bootstrap` is the percentile bootstrap over sequences (for more than 10,000, with Poisson
    weights: see `resampling`); `wilson` is Wilson's score interval of a proportion and needs 0/1 values; `t`
    is Student's interval of a mean; `auto` takes `wilson` where all values are 0 or 1 and `bootstrap`
    elsewhere. With fewer than `FEWEST` values low and high are NaN.

    Args:
        values: Numeric or boolean array with the dimension `dim`; NaN is skipped.
        dim: The dimension of independent units, normally `sequence`.
        level: Coverage of the interval, between 0 and 1.
        method: One of `METHODS`.
        n_resamples: Resamples of the bootstrap.
        seed: Seed of the bootstrap; the same resamples serve every site.

    Returns:
        Array `[statistic, ...]` in the unit of `values`, with a coordinate `n` (values that were not NaN).

    Raises:
        OptionError: For an unknown method, a level outside (0, 1), or `wilson` on values other than 0 and 1.
        ResultError: When `values` lacks `dim`.

    Example:
        >>> hits = xr.DataArray([1, 1, 0, 1], dims="sequence")
        >>> mean_interval(hits).round(2).values.tolist()
        [0.75, 0.3, 0.95]
    """
    return mean_intervals([values], dim, methods=[method], level=level, n_resamples=n_resamples, seed=seed)[0]


def mean_intervals(
    arrays: Sequence[xr.DataArray],
    dim: str = "sequence",
    *,
    methods: Sequence[str],
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> list[xr.DataArray]:
    """Return `mean_interval` of several arrays over the same units, each by its method.

    They share their resamples, which are drawn once.
    """
    check_level(level)
    tables: list[Any] = []
    for values, method in zip(arrays, methods, strict=True):
        check_option("method", method, METHODS)
        if dim not in values.dims:
            raise ResultError(
                f"{values.name or 'the array'} has no dimension {dim!r}: its dimensions are {values.dims}."
            )
        tables.append(as_table(values, dim))
    methods = [interval_method(table, method) for table, method in zip(tables, methods, strict=True)]
    drawn = [table for table, method in zip(tables, methods, strict=True) if method == "bootstrap"]
    bootstraps = iter(_bootstrap(drawn, level, n_resamples, seed) if drawn else [])
    found: list[xr.DataArray] = []
    for values, table, method in zip(arrays, tables, methods, strict=True):
        sums, n = sums_and_counts(table)
        ends = next(bootstraps) if method == "bootstrap" else _INTERVALS[method](table, sums, n, level)
        attrs = {"interval_method": method, "level": level}
        found.append(_labeled(values.transpose(dim, ...), sums, n, ends, attrs))
    return found


def as_table(values: xr.DataArray, dim: str = "sequence") -> Any:
    """Return an array as `[dim, site]`, not yet read where it is on disk (Dask), else of numpy."""
    data = values.transpose(dim, ...).data
    data = data if data.dtype.kind in "biuf" else np.asarray(data, dtype=np.float64)
    return data.reshape(data.shape[0], math.prod(data.shape[1:]))


def interval_method(values: Any, method: str = "auto") -> str:
    """Return the method that `mean_interval` uses for these values: what `auto` stands for."""
    if method != "auto":
        return method
    return "wilson" if is_binary(values) else "bootstrap"


def _labeled(
    values: xr.DataArray, sums: np.ndarray, n: np.ndarray, ends: Ends, attrs: dict[str, Any]
) -> xr.DataArray:
    """Return mean, low and high of `[unit, ...]`, with the sites' coordinates and the counts `n`."""
    dim = str(values.dims[0])
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = sums / n
    low, high = ends
    interval = mean, np.where(n < FEWEST, np.nan, low), np.where(n < FEWEST, np.nan, high)
    per_unit = [name for name, coord in values.coords.items() if dim in coord.dims]
    first = values.drop_vars(per_unit)[:1].sum(dim)  # only its shape and the sites' coordinates are used
    out = xr.DataArray(
        np.stack(interval).reshape(3, *first.shape),
        dims=("statistic", *first.dims),
        coords={**first.coords, "statistic": list(STATISTICS)},
        name=values.name,
        attrs={**values.attrs, **attrs},
    )
    return out.assign_coords(n=(first.dims, n.reshape(first.shape)))


def ratio_interval(
    part: xr.DataArray,
    whole: xr.DataArray,
    dim: str = "sequence",
    *,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> xr.DataArray:
    """Return sum(part) / sum(whole) over `dim` with its interval, on a new first dimension `statistic`.

    A mean of ratios would be dominated by the units whose `whole` is near 0. The interval is the percentile
    bootstrap over `dim`, with both sums from the same resample. A unit without a value in either array is
    left out of both sums. Where the interval of sum(whole) includes 0, a ratio to it means nothing (Fieller's
    interval would be unbounded): ratio, low and high are NaN there. The interval always holds the ratio.

    Args:
        part: `[dim, ...]`.
        whole: `[dim]`, or with dimensions of `part`.
        dim: The dimension of independent units.
        level: Coverage of the interval.
        n_resamples: Resamples of the bootstrap.
        seed: Seed of the bootstrap.

    Returns:
        As `mean_interval`; `mean` is the ratio. With fewer than `FEWEST` units low and high are NaN.

    Example:
        >>> part, whole = (xr.DataArray(a, dims="sequence") for a in ([1.0, 3.0, 2.0], [2.0, 6.0, 4.0]))
        >>> ratio_interval(part, whole).values.tolist()
        [0.5, 0.5, 0.5]
    """
    part, whole = xr.broadcast(part, whole)
    both = (part.notnull() & whole.notnull()).transpose(dim, ...)
    part, whole = (array.where(both).transpose(*both.dims) for array in (part, whole))
    rows = part.sizes[dim]
    above, below = (as_table(array, dim) for array in (part, whole))
    low, high = np.full((2, above.shape[1]), np.nan)
    n = both.sum(dim).compute()
    few = n.values.reshape(-1) < FEWEST
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = sums_and_counts(above)[0] / sums_and_counts(below)[0]
        ratio = np.where(np.isfinite(ratio), ratio, np.nan)
        for own in _blocks(above.shape[1], n_resamples):
            parts, sums = resampled_sums([above[:, own], below[:, own]], n_resamples, seed)
            samples = parts / sums
            low[own], high[own] = quantile_interval(
                np.where(np.isfinite(samples), samples, np.nan), level, rows
            )
            least, most = quantile_interval(sums, level, rows)
            ratio[own] = np.where((least <= 0) & (most >= 0) & ~few[own], np.nan, ratio[own])
    few |= np.isnan(ratio)
    low = np.where(few, np.nan, np.fmin(low, ratio))
    high = np.where(few, np.nan, np.fmax(high, ratio))
    return xr.DataArray(
        np.stack([ratio, low, high]).reshape(3, *n.shape),
        dims=("statistic", *n.dims),
        coords={**n.coords, "statistic": list(STATISTICS)},
        attrs={"interval_method": "bootstrap", "level": level},
    ).assign_coords(n=(n.dims, n.values))


def rows_by_group(labels: xr.DataArray) -> dict[Any, np.ndarray]:
    """Return the rows of each group, with groups sorted, or in order of appearance (`keep_order`).

    Raises:
        ResultError: There is not one label per sequence.
    """
    if labels.dims != ("sequence",):
        raise ResultError(
            f"group={labels.name!r} has dimensions {labels.dims}: give one along 'sequence' only."
        )
    numeric = labels.dtype.kind in "biuf"
    same = labels.values if numeric else np.array([str(value) for value in labels.values], dtype=object)
    keys = pd.unique(same)
    keys = keys if labels.attrs.get("keep_order") else np.sort(keys)
    return {key: np.flatnonzero(same == key) for key in keys}


def by_group(
    labels: xr.DataArray, intervals: Callable[[np.ndarray], Sequence[xr.DataArray]]
) -> list[xr.DataArray]:
    """Return intervals for the rows of each group, along a dimension with the name of the labels."""
    rows = rows_by_group(labels)
    groups = pd.Index(list(rows), name=labels.name)
    parts: Any = zip(*(intervals(own) for own in rows.values()), strict=True)
    return [xr.concat(part, groups, combine_attrs="override", coords=["n"]) for part in parts]


def _blocks(sites: int, n_resamples: int) -> Iterator[slice]:
    """Yield blocks of sites whose resamples fit into memory."""
    block = max(1, _BLOCK_BYTES // (8 * n_resamples))
    for start in range(0, sites, block):
        yield slice(start, start + block)


def quantile_interval(
    samples: np.ndarray, level: float, n: int | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the central `level` of each column of `samples`, NaN skipped.

    Args:
        samples: `[resample, site]`.
        level: Coverage.
        n: How many units were resampled, of all or of each column; with fewer than `FEWEST` both ends are
            NaN.
    """
    tails = [(1 - level) / 2, (1 + level) / 2]
    low, high = np.full((2, samples.shape[1]), np.nan)
    known = ~np.isnan(samples).all(0) & (np.asarray(n) >= FEWEST)
    if known.all() and not np.isnan(samples).any():
        low, high = np.quantile(samples, tails, axis=0)
    elif known.any():
        low[known], high[known] = np.nanquantile(samples[:, known], tails, axis=0)
    return low, high


def wilson_interval(hits: Any, n: Any, level: float = 0.95) -> tuple[Any, Any]:
    """Return Wilson's score interval of a proportion: `hits` out of `n`, numbers or arrays.

    NaN where `n` is below `FEWEST`.

    >>> low, high = wilson_interval(8, 10)
    >>> round(float(low), 2), round(float(high), 2)
    (0.49, 0.94)
    """
    from statsmodels.stats.proportion import proportion_confint  # takes most of a second to import

    low, high = proportion_confint(hits, n, alpha=1 - level, method="wilson")
    # There the ends are exactly 0 and 1, except for rounding errors.
    ends = np.where(np.asarray(hits) == 0, 0.0, low), np.where(np.asarray(hits) == n, 1.0, high)
    few = np.asarray(n) < FEWEST
    return np.where(few, np.nan, ends[0]), np.where(few, np.nan, ends[1])


def halves(n: int, seed: int) -> tuple[Int[np.ndarray, "a"], Int[np.ndarray, "b"]]:
    """Return two random halves of `range(n)`, sorted; use the first to choose and the second to measure.

    >>> a, b = halves(5, seed=0)
    >>> sorted([*a.tolist(), *b.tolist()]), len(b)
    ([0, 1, 2, 3, 4], 3)
    """
    order = np.random.default_rng(seed).permutation(n)
    return np.sort(order[: n // 2]), np.sort(order[n // 2 :])


Ends = tuple[np.ndarray, np.ndarray]


def _bootstrap(tables: Sequence[Any], level: float, n_resamples: int, seed: int) -> list[Ends]:
    """Return the ends for each table `[unit, site]`; all of them are resampled together."""
    edges = np.cumsum([0, *(table.shape[1] for table in tables)])
    low, high = np.full((2, edges[-1]), np.nan)
    for part in _blocks(edges[-1] if len(tables[0]) else 0, n_resamples):
        inside = [
            table[:, max(part.start - first, 0) : max(part.stop - first, 0)]
            for table, first in zip(tables, edges[:-1], strict=True)
        ]
        samples = bootstrap_means(SideBySide(inside), n_resamples, seed)
        low[part], high[part] = quantile_interval(samples, level, len(tables[0]))
    return list(zip(np.split(low, edges[1:-1]), np.split(high, edges[1:-1]), strict=True))


def _wilson(table: Any, sums: np.ndarray, n: np.ndarray, level: float) -> Ends:
    if n.any() and not is_binary(table):
        raise OptionError("method='wilson' needs values that are all 0 or 1: use method='bootstrap'.")
    return wilson_interval(sums, np.maximum(n, 1), level)


def _student(table: Any, sums: np.ndarray, n: np.ndarray, level: float) -> Ends:
    squares, mean = np.zeros(table.shape[1]), sums / np.maximum(n, 1)
    for rows in row_blocks(len(table)):
        away = as_floats(table, rows) - mean
        squares += np.square(np.where(np.isfinite(away), away, 0.0)).sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        half = stats.t.ppf((1 + level) / 2, n - 1) * np.sqrt(squares / (n - 1) / n)
    return mean - half, mean + half


_INTERVALS = {"wilson": _wilson, "t": _student}


def restorable_metric(result: Result) -> str | None:
    """Return the first metric with values from a clean and a corrupt run, or None."""
    names = [name for name in result.metrics if {f"{name}_clean", f"{name}_corrupt"} <= set(result.data)]
    return names[0] if names else None


def changed_too_little(result: Result) -> bool:
    """Return whether the corruption changed the metric too little to say what share of it patching restores.

    That is where the mean over sequences of clean minus corrupt has an interval that includes 0.
    """
    name = restorable_metric(result)
    if name is None:
        return False
    lost = result[f"{name}_clean"] - result[f"{name}_corrupt"]
    whole = lost.mean([dim for dim in lost.dims if dim != "sequence"])
    return bool(ratio_interval(whole, whole).isnull().sel(statistic="mean"))


def restored_share(
    result: Result,
    dim: str | Iterable[str] = "sequence",
    *,
    metric: str | None = None,
    group: str | None = None,
    **options: Any,
) -> xr.Dataset:
    r"""Return the share of the lost recall that each patch restores, over all sequences together.

    .. math:: \frac{\sum_i m_{\mathrm{patched},i} - m_{\mathrm{corrupt},i}}
                   {\sum_i m_{\mathrm{clean},i} - m_{\mathrm{corrupt},i}}

    with sums over sequences: 0 is the corrupt run and 1 the clean one. The mean of `normalized_effect`, the
    same ratio within each sequence, is dominated by the sequences that the corruption hardly harmed. Where
    the corruption changed too little (see `changed_too_little`), the share is NaN.

    Args:
        result: A result of activation or path patching, or of its estimate from gradients.
        dim: `"sequence"`, or several dimensions with it: the others are averaged within each sequence
            first, as targets always are.
        metric: Which metric; by default the first that both runs measured.
        group: A coordinate along `sequence`; shares are then computed within each group.
        options: `level`, `n_resamples` and `seed` of the percentile bootstrap over sequences.

    Returns:
        A dataset as `Result.mean_ci` gives: `restored_share` `[statistic, ...]`, statistics `mean` (the
        share), `low`, `high`, with the coordinate `n_restored_share` (sequences).

    Raises:
        ResultError: The result has no clean and corrupt run, or lacks the metric.

    Example:
        >>> from memlens.results.result import Result
        >>> data = {"m": [0.9, 1.0], "m_clean": [1.0, 1.1], "m_corrupt": [0.0, 1.0]}
        >>> result = Result.create(
        ...     xr.Dataset({name: ("sequence", values) for name, values in data.items()}),
        ...     kind="activation_patching",
        ... )
        >>> float(restored_share(result)["restored_share"].sel(statistic="mean").round(2))
        0.82
    """
    name = metric or restorable_metric(result)
    if name is None or not {f"{name}_clean", f"{name}_corrupt"} <= set(result.data):
        what = "no metric" if metric is None else f"{metric!r} not"
        raise ResultError(f"this {result.kind} result has {what} measured in a clean and in a corrupt run.")
    inner = {dim} if isinstance(dim, str) else set(dim)
    inner = (inner | {"target"}) - {"sequence"}
    gained = (result[run] - result[f"{name}_corrupt"] for run in (name, f"{name}_clean"))
    part, whole = (array.mean([d for d in array.dims if d in inner]) for array in gained)
    if group is None:
        share = ratio_interval(part, whole, **options)
    else:
        (share,) = by_group(
            result[group],
            lambda own: [ratio_interval(part.isel(sequence=own), whole.isel(sequence=own), **options)],
        )
    attrs = {**result.data.attrs, "metric": name, "n_sequences": result.data.sizes["sequence"]}
    return xr.Dataset({"restored_share": share.rename(n="n_restored_share")}, attrs=attrs)
