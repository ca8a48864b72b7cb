"""Statistics over organisms: intervals that heed their base models, paired tests, agreement of orders."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

from memlens.results.statistics.estimates import Estimate
from memlens.results.statistics.intervals import FEWEST, quantile_interval

_RESAMPLES = 2000
FEWEST_PAIRS = 5
"""Fewest organisms for a paired test: with four, the least possible p-value is above 0.05."""


def resampled_over(models: Sequence[str]) -> str:
    """Return what intervals of organisms of these base models are over: "models" or "organisms".

    >>> resampled_over(["a", "a", "b"]), resampled_over(["a", "b", "c"])
    ('organisms', 'models')
    """
    return "models" if len(set(models)) >= FEWEST else "organisms"


@lru_cache(maxsize=128)
def _weights(models: tuple[str, ...], seed: int) -> Float[np.ndarray, "resample organism"]:
    """Return how often each organism occurs in each resample."""
    random = np.random.default_rng(seed)
    n = len(models)
    if resampled_over(models) == "organisms":
        return random.multinomial(n, np.full(n, 1 / n), size=_RESAMPLES).astype(float)
    names, place = np.unique(models, return_inverse=True)
    drawn = random.multinomial(len(names), np.full(len(names), 1 / len(names)), size=_RESAMPLES)
    weights = np.zeros((_RESAMPLES, n))
    for i in range(len(names)):
        own = np.flatnonzero(place == i)
        weights[:, own] = random.multinomial(drawn[:, i] * len(own), np.full(len(own), 1 / len(own)))
    return weights


def mean_over_organisms(
    values: Float[np.ndarray, " organism"], models: Sequence[str], *, seed: int = 0
) -> Estimate:
    """Return the mean over organisms with a 95 % percentile bootstrap interval.

    With organisms of three or more base models the bootstrap draws models, then organisms within each of
    them, because organisms of one model are not independent; with fewer it draws organisms, and the interval
    says nothing about other models. See `resampled_over`.

    Args:
        values: One value per organism; NaN is skipped.
        models: The base model of each.
        seed: Of the bootstrap.
    """
    known = np.isfinite(values)
    values, models = values[known], [m for m, k in zip(models, known, strict=True) if k]
    if not len(values):
        return Estimate.unknown()
    mean = float(values.mean())
    if len(values) < FEWEST:
        return Estimate(mean, n=len(values))
    weights = _weights(tuple(models), seed)
    low, high = quantile_interval((weights @ values / weights.sum(1))[:, None], 0.95, len(values))
    return Estimate(mean, float(low[0]), float(high[0]), len(values))


def share_over_organisms(
    hits: Float[np.ndarray, " organism"],
    of: Float[np.ndarray, " organism"],
    models: Sequence[str],
    *,
    seed: int = 0,
) -> Estimate:
    """Return sum(hits) / sum(of) with an interval as in `mean_over_organisms`; `n` counts those with any."""
    some = of > 0
    if not some.any():
        return Estimate.unknown()
    value, n = float(hits.sum() / of.sum()), int(some.sum())
    if n < FEWEST:
        return Estimate(value, n=n)
    weights = _weights(tuple(models), seed)
    with np.errstate(invalid="ignore"):
        shares = (weights @ hits) / (weights @ of)
    low, high = quantile_interval(shares[:, None], 0.95, n)
    return Estimate(value, float(low[0]), float(high[0]), n)


def better_p_value(best: pd.Series, other: pd.Series) -> float:
    """Return the p-value of Wilcoxon's signed-rank test that `best` is above `other`, over common organisms.

    1 where they never differ; NaN with fewer than `FEWEST_PAIRS` organisms.
    """
    both = pd.concat([best, other], axis=1, join="inner").to_numpy(float)
    difference = both[:, 0] - both[:, 1]
    if len(difference) < FEWEST_PAIRS:
        return math.nan
    difference = difference[difference != 0]
    if not len(difference):
        return 1.0
    if len(difference) > _ENUMERATED:
        found: Any = stats.wilcoxon(difference, alternative="greater")
        return float(found.pvalue)
    ranks = stats.rankdata(np.abs(difference))
    return float((_signs(len(difference)) @ ranks >= ranks[difference > 0].sum() - 1e-9).mean())


_ENUMERATED = 13
"""Up to this many differences all signs are enumerated, which is exact also with equal ranks; SciPy does the
same and takes a second."""


@lru_cache
def _signs(n: int) -> Float[np.ndarray, "case difference"]:
    """Return every choice of the positive ones among n differences."""
    return (np.arange(2**n)[:, None] >> np.arange(n) & 1).astype(float)


def agreement(first: np.ndarray, second: np.ndarray) -> float:
    """Return Kendall's tau-b of two orders; NaN where one of them orders nothing.

    >>> agreement(np.array([1.0, 2, 3, 4]), np.array([1.0, 2, 4, 3])).__round__(3)
    0.667
    """
    known = np.isfinite(first) & np.isfinite(second)
    if known.sum() < FEWEST:
        return math.nan
    found: Any = stats.kendalltau(first[known], second[known])
    return float(found.statistic)
