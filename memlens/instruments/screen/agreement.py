"""How well a cheap estimate finds what is large: rank correlation, and recall of the exact top k."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from memlens.results.statistics.intervals import bootstrap_means


@dataclass(frozen=True)
class Verified:
    """Sites with both an estimate and an exact effect, one value per sequence.

    Attributes:
        estimate: Estimated effects; NaN where a sequence lacks the site.
        exact: Exact effects.
        screened: True for the sites the screen chose, False for random ones of the rest.
        n_sites: How many sites there are, verified or not.
        score: From effects to what sites are ranked by, greatest first.
    """

    estimate: Float[np.ndarray, "sequence site"]
    exact: Float[np.ndarray, "sequence site"]
    screened: Bool[np.ndarray, " site"]
    n_sites: int
    score: Callable[[np.ndarray], np.ndarray]

    @property
    def n_rest(self) -> int:
        """How many sites the screen left out."""
        return self.n_sites - int(self.screened.sum())


def rank_correlation(
    a: Float[np.ndarray, "*resample site"], b: Float[np.ndarray, "*resample site"]
) -> Float[np.ndarray, "*resample"]:
    """Return Spearman's rank correlation over the last axis; NaN with fewer than 3 sites, or NaN in one.

    >>> rank_correlation(np.array([1.0, 2.0, 5.0]), np.array([0.1, 0.3, 0.2])).round(6).item()
    0.5
    """
    from scipy.stats import rankdata

    known = np.isfinite(a).all(-1) & np.isfinite(b).all(-1)
    if a.shape[-1] < 3:
        return np.full(known.shape, np.nan)
    ranks = [rankdata(x, axis=-1) for x in (a, b)]
    x, y = (r - r.mean(-1, keepdims=True) for r in ranks)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = (x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    return np.where(known, found, np.nan)


def recall_of_top(
    score: Float[np.ndarray, "*resample site"], screened: Bool[np.ndarray, " site"], n_rest: int
) -> tuple[Float[np.ndarray, "*resample"], Int[np.ndarray, "*resample"]]:
    r"""Return the share of the exact top :math:`k` that a screen of :math:`k` sites caught.

    Each of the :math:`r` random sites stands for ``n_rest / r`` sites of the rest. Sites are counted from the
    greatest exact score down until they amount to :math:`k`; the share of the screened ones is the recall.
    With every site verified that is exact.

    Returns:
        The recall (NaN where nothing of a rest was verified), and how many random sites are in the top.

    >>> score, screened = np.array([9.0, 1.0, 5.0, 0.0]), np.array([True, True, False, False])
    >>> recall_of_top(score, screened, 2)[0].item()
    0.5
    """
    k, sampled = int(screened.sum()), int((~screened).sum())
    if n_rest and not sampled:
        return np.full(score.shape[:-1], np.nan), np.zeros(score.shape[:-1], int)
    weight = np.where(screened, 1.0, n_rest / max(1, sampled))
    order = np.argsort(-np.where(np.isfinite(score), score, -np.inf), axis=-1, kind="stable")
    weight, own = weight[order], screened[order]
    room = np.clip(k - (np.cumsum(weight, -1) - weight), 0, weight)
    return (room * own).sum(-1) / k, ((room > 1e-9) & ~own).sum(-1)


def agreement_table(data: Verified, *, level: float, n_resamples: int, seed: int) -> pd.DataFrame:
    """Return each statistic with its interval; see `memlens.screen_then_verify`."""
    means = [np.nanmean(x, axis=0) for x in (data.estimate, data.exact)]
    samples = [bootstrap_means(x, n_resamples, seed) for x in (data.estimate, data.exact)]
    if len(data.estimate) < 2:
        samples = [np.full_like(x, np.nan) for x in samples]  # one sequence tells nothing of the spread
    k, rest, drawn = int(data.screened.sum()), data.n_rest, int((~data.screened).sum())
    rows: dict[str, tuple[float, float, float, int]] = {}
    groups = {"screened": data.screened, "random": ~data.screened}
    if rest == drawn:
        groups["all sites"] = np.ones(len(data.screened), bool)
    for name, part in groups.items():
        if part.any():
            value = float(rank_correlation(means[0][part], means[1][part]))
            spread = rank_correlation(samples[0][:, part], samples[1][:, part])
            rows[f"rank correlation, {name}"] = (
                value,
                *standard_interval(value, spread, level, -1.0),
                int(part.sum()),
            )
    value, missed = recall_of_top(data.score(means[1]), data.screened, rest)
    spread, _ = recall_of_top(data.score(samples[1]), data.screened, rest)
    low, high = standard_interval(float(value), spread, level, 0.0)
    if 0 < drawn < rest:
        least, most = share_interval(int(missed), drawn, level)
        low = np.fmin(low, max(0.0, 1 - most * rest / k))
        high = np.fmax(high, max(0.0, 1 - least * rest / k))
    rows["recall of exact top k"] = float(value), float(low), float(high), len(data.screened)
    if drawn:
        typical = np.nanmedian(data.score(means[1])[data.screened])
        above = int((data.score(means[1])[~data.screened] >= typical).sum())
        share = above / drawn
        low, high = share_interval(above, drawn, level) if drawn < rest else (share, share)
        rows["share of the rest above the screened median"] = share, low, high, drawn
    return pd.DataFrame.from_dict(rows, orient="index", columns=["value", "low", "high", "n_sites"])


def standard_interval(value: float, samples: np.ndarray, level: float, least: float) -> tuple[float, float]:
    """Return value ± the bootstrap's standard error times the normal quantile, within `least` and 1.

    A percentile interval would not do: the noise of a resample is shared by estimate and exact effect, which
    raises their correlation, and moves sites out of the top, which lowers the recall.
    """
    from scipy.stats import norm

    known = samples[np.isfinite(samples)]
    if len(known) < 2 or not np.isfinite(value):
        return np.nan, np.nan
    half = float(norm.ppf((1 + level) / 2) * known.std(ddof=1))
    return max(least, value - half), min(1.0, value + half)


def share_interval(hits: int, n: int, level: float) -> tuple[float, float]:
    """Return Clopper and Pearson's interval of a share, which is exact for few draws.

    >>> [round(x, 3) for x in share_interval(0, 10, 0.95)]
    [0.0, 0.308]
    """
    from scipy.stats import beta

    tail = (1 - level) / 2
    low = float(beta.ppf(tail, hits, n - hits + 1)) if hits else 0.0
    high = float(beta.ppf(1 - tail, hits + 1, n - hits)) if hits < n else 1.0
    return low, high
