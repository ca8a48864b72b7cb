"""Agreement of a score or a decision with known labels, and of two rankings, with intervals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from scipy import optimize, stats

from memlens.errors import ResultError, check_option
from memlens.results.statistics.intervals import FEWEST, check_level, quantile_interval

AGREEMENT = ("precision", "recall", "kappa")


@dataclass(frozen=True)
class RocArea:
    """The area under a ROC curve with its interval.

    Attributes:
        area: Probability that a positive's score is above a negative's, with ties counted half.
        low: Lower end of the interval; NaN where there is none.
        high: Upper end likewise.
        n_positive: Number of positives.
        n_negative: Number of negatives.
        method: Method of the interval.
    """

    area: float
    low: float
    high: float
    n_positive: int
    n_negative: int
    method: str

    def __str__(self) -> str:
        groups = f"{self.n_positive} positives, {self.n_negative} negatives"
        if np.isnan(self.low):
            return f"{self.area:.3f} ({groups}: too few for an interval)"
        return f"{self.area:.3f} [{self.low:.3f}, {self.high:.3f}] ({groups})"


def roc_area(
    score: Any,
    label: Any,
    *,
    level: float = 0.95,
    method: str = "delong",
    n_resamples: int = 2000,
    seed: int = 0,
) -> RocArea:
    """Return the area under the ROC curve of a score for a yes-or-no label: U / (n_positive · n_negative).

    Intervals: "delong" is DeLong's normal interval, clipped to [0, 1]. Where one group lies entirely above
    the other, its variance is 0 and Hanley and McNeil's interval (variance as a function of the area, solved
    for the ends with the actual group sizes) is given instead. "bootstrap" resamples positives and negatives
    separately. With fewer than `FEWEST` positives or negatives there is no interval.

    Args:
        score: One number per sequence, higher for positives; rows with NaN are left out.
        label: True for positives.
        level: Coverage of the interval.
        method: "delong" or "bootstrap".
        n_resamples: Number of bootstrap resamples.
        seed: Seed of the bootstrap.

    Raises:
        OptionError: An unknown method, or a level outside (0, 1).
        ResultError: Lengths differ, or there are no positives or no negatives.

    Source: DeLong et al. (1988); Hanley and McNeil (1982).

    Example:
        >>> roc_area([3, 2, 1, 0], [True, False, True, False]).area
        0.75
    """
    check_option("method", method, ["delong", "bootstrap"])
    check_level(level)
    positive, negative = _groups(score, label)
    area = float(_above(positive, negative).mean())
    if method == "bootstrap":
        low, high = _bootstrap_area(positive, negative, level, n_resamples, seed)
    elif area in (0.0, 1.0):
        method, (low, high) = "hanley-mcneil", _solved(area, len(positive), len(negative), level)
    else:
        low, high = _delong(positive, negative, area, level)
    if min(len(positive), len(negative)) < FEWEST:
        low = high = np.nan
    return RocArea(area, float(low), float(high), len(positive), len(negative), method)


def agreement(
    found: Any, truth: Any, *, level: float = 0.95, n_resamples: int = 2000, seed: int = 0
) -> dict[str, float]:
    """Return precision, recall and Cohen's kappa of a decision against a label, with bootstrap intervals.

    Kappa is (a - e) / (1 - e), where a is the share of rows on which both agree and e the share expected if
    they were independent with the same margins. Intervals are percentile bootstraps over rows; there are none
    for fewer than `FEWEST`.

    Returns:
        `n`, `n_found`, `n_true`, and each of `AGREEMENT` with `_low` and `_high`; NaN where it is 0 / 0.

    Raises:
        ResultError: Lengths differ.

    Example:
        >>> round(agreement([True, True, False, False], [True, False, False, False])["kappa"], 3)
        0.5
    """
    found, truth = np.asarray(found, dtype=bool), np.asarray(truth, dtype=bool)
    if found.shape != truth.shape:
        raise ResultError(f"{found.shape} decisions and {truth.shape} labels: give one label per decision")
    cells = np.bincount(2 * found + truth, minlength=4)  # neither, label only, decision only, both
    draws = np.random.default_rng(seed).multinomial(len(found), cells / max(len(found), 1), n_resamples)
    values, samples = _statistics(cells[None].astype(float))[0], _statistics(draws.astype(float))
    low, high = quantile_interval(samples, level, len(found))
    numbers: dict[str, float] = {"n": len(found), "n_found": int(found.sum()), "n_true": int(truth.sum())}
    for i, name in enumerate(AGREEMENT):
        numbers |= {name: float(values[i]), f"{name}_low": float(low[i]), f"{name}_high": float(high[i])}
    return numbers


def _statistics(cells: Float[np.ndarray, "sample 4"]) -> Float[np.ndarray, "sample 3"]:
    neither, missed, wrong, both = cells.T
    n = cells.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        by_chance = ((both + wrong) * (both + missed) + (neither + missed) * (neither + wrong)) / n**2
        kappa = ((both + neither) / n - by_chance) / (1 - by_chance)
        return np.stack([both / (both + wrong), both / (both + missed), kappa], 1)


def _groups(score: Any, label: Any) -> tuple[np.ndarray, np.ndarray]:
    score, label = np.asarray(score, dtype=float), np.asarray(label, dtype=bool)
    if score.shape != label.shape or score.ndim != 1:
        raise ResultError(
            f"scores have the shape {score.shape}, labels {label.shape}: give one label per score"
        )
    known: Bool[np.ndarray, "row"] = ~np.isnan(score)
    positive, negative = score[known & label], score[known & ~label]
    if not len(positive) or not len(negative):
        raise ResultError(
            f"{len(positive)} positives and {len(negative)} negatives have a score: an area needs both"
        )
    return positive, negative


def _above(values: np.ndarray, others: np.ndarray) -> Float[np.ndarray, "value"]:
    """Return for each value the share of the others below it, with ties counted half."""
    ordered = np.sort(others)
    return (np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")) / (
        2 * len(others)
    )


def _delong(positive: np.ndarray, negative: np.ndarray, area: float, level: float) -> tuple[float, float]:
    variance = 0.0
    for values, others in ((positive, negative), (negative, positive)):
        if len(values) > 1:
            variance += _above(values, others).var(ddof=1) / len(values)
    half = stats.norm.ppf((1 + level) / 2) * np.sqrt(variance)
    return max(0.0, area - half), min(1.0, area + half)


def _solved(area: float, m: int, n: int, level: float) -> tuple[float, float]:
    """Return where |area - t| is z times Hanley and McNeil's standard error at t."""
    z = float(stats.norm.ppf((1 + level) / 2))

    def excess(t: float) -> float:
        q1, q2 = t / (2 - t), 2 * t * t / (1 + t)
        variance = (t * (1 - t) + (m - 1) * (q1 - t * t) + (n - 1) * (q2 - t * t)) / (m * n)
        return (area - t) ** 2 - z * z * variance

    end: Any = optimize.brentq(excess, 1e-9, 1 - 1e-9)
    return (float(end), 1.0) if area == 1.0 else (0.0, float(end))


def _bootstrap_area(
    positive: np.ndarray, negative: np.ndarray, level: float, n_resamples: int, seed: int
) -> tuple[float, float]:
    rng = np.random.default_rng(seed)
    areas = [
        _above(rng.choice(positive, len(positive)), rng.choice(negative, len(negative))).mean()
        for _ in range(n_resamples)
    ]
    low, high = np.quantile(areas, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def roc_gain(
    score: Any, other: Any, label: Any, *, level: float = 0.95, n_resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Return area(score) - area(other) for the same rows and labels, with its interval: value, low, high.

    The areas are as in `roc_area`; the interval is the percentile bootstrap over positives and negatives
    separately, with both areas from the same resample. With fewer than `FEWEST` of either, low and high are
    NaN. Rows with NaN in either score are left out.

    Raises:
        OptionError: A level outside (0, 1).
        ResultError: Lengths differ, or there are no positives or no negatives.

    >>> roc_gain([3, 2, 1, 0], [0, 1, 2, 3], [True, True, False, False])[0]
    1.0
    """
    check_level(level)
    score, other = np.asarray(score, dtype=float), np.asarray(other, dtype=float)
    if score.shape != other.shape:
        raise ResultError(f"scores have the shapes {score.shape} and {other.shape}: give both for each row")
    unknown = np.isnan(score) | np.isnan(other)
    first, second = (_groups(np.where(unknown, np.nan, values), label) for values in (score, other))
    value = float(_above(*first).mean() - _above(*second).mean())
    n_positive, n_negative = map(len, first)
    fewest = min(n_positive, n_negative)
    if fewest < FEWEST:
        return value, np.nan, np.nan
    rng, samples = np.random.default_rng(seed), np.empty(n_resamples)
    for i in range(n_resamples):
        ours, theirs = (rng.integers(0, n, n) for n in (n_positive, n_negative))
        areas = [_above(positive[ours], negative[theirs]).mean() for positive, negative in (first, second)]
        samples[i] = areas[0] - areas[1]
    low, high = quantile_interval(samples[:, None], level, fewest)
    return value, float(low[0]), float(high[0])


def rank_correlation(
    a: Float[np.ndarray, "*resample site"], b: Float[np.ndarray, "*resample site"]
) -> Float[np.ndarray, "*resample"]:
    """Return Spearman's rank correlation over the last axis; NaN with fewer than 3 sites or a NaN.

    >>> rank_correlation(np.array([1.0, 2.0, 5.0]), np.array([0.1, 0.3, 0.2])).round(6).item()
    0.5
    """
    known = np.isfinite(a).all(-1) & np.isfinite(b).all(-1)
    if a.shape[-1] < 3:
        return np.full(known.shape, np.nan)
    ranks = [stats.rankdata(x, axis=-1) for x in (a, b)]
    x, y = (r - r.mean(-1, keepdims=True) for r in ranks)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = (x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    return np.where(known, found, np.nan)


def standard_interval(
    value: float, samples: np.ndarray, level: float, least: float, n: int
) -> tuple[float, float]:
    """Return value ± the bootstrap's standard error times the normal quantile, between `least` and 1.

    NaN where fewer than `FEWEST` units (`n`) were resampled.

    A percentile interval of an agreement is biased: two estimates share the noise of a resample, which raises
    their correlation, and it moves sites out of the top, which lowers the recall.
    """
    known = samples[np.isfinite(samples)]
    if n < FEWEST or len(known) < 2 or not np.isfinite(value):
        return np.nan, np.nan
    half = float(stats.norm.ppf((1 + level) / 2) * known.std(ddof=1))
    return max(least, value - half), min(1.0, value + half)


def share_interval(hits: int, n: int, level: float) -> tuple[float, float]:
    """Return the interval of Clopper and Pearson of a share, which is exact for few draws.

    >>> [round(x, 3) for x in share_interval(0, 10, 0.95)]
    [0.0, 0.308]
    """
    tail = (1 - level) / 2
    low = float(stats.beta.ppf(tail, hits, n - hits + 1)) if hits else 0.0
    high = float(stats.beta.ppf(1 - tail, hits + 1, n - hits)) if hits < n else 1.0
    return low, high
