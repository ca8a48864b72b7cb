"""Which kinds of text are memorized: rates within domains, shares among the memorized, structural or free."""

from __future__ import annotations

from collections.abc import Collection
from itertools import combinations

import numpy as np
import pandas as pd
from jaxtyping import Float

from memlens.results.statistics.estimates import Estimate, share_estimate
from memlens.studies.comparative.analyze.rates import drawn_estimate
from memlens.studies.comparative.options import STRUCTURAL


def domain_table(table: pd.DataFrame, structural: Collection[str] = STRUCTURAL) -> pd.DataFrame:
    """Return the rate within each domain and its share among the memorized.

    Args:
        table: Recall table with `exact_match` and `domain`.
        structural: Domains that count as structural text.

    Returns:
        Columns `domain`, `structural`, `n` (sampled), `memorized`, `rate`, `low`, `high` (Wilson); `share`,
        `share_low`, `share_high` (among the memorized of this sample); `equal_share`: the share that an equal
        sample of every domain would give, rate over the sum of the rates. NaN where nothing is memorized.

    >>> frame = pd.DataFrame({"domain": ["a", "a", "b"], "exact_match": [1, 0, 1]})
    >>> domain_table(frame)[["domain", "rate", "share", "equal_share"]].round(3).to_numpy().tolist()
    [['a', 0.5, 0.5, 0.333], ['b', 1.0, 0.5, 0.667]]
    """
    labels = table["domain"].astype(str).to_numpy()
    hits = table["exact_match"].to_numpy(float)
    rows = []
    for domain in np.unique(labels):
        here = labels == domain
        rate, share = share_estimate(hits[here]), share_estimate(here[hits == 1])
        facts = {"domain": domain, "structural": domain in structural, "memorized": int(hits[here].sum())}
        rows.append({**facts, **rate.row("rate"), **share.row("share", prefix="share_", n=None)})
    frame = pd.DataFrame(rows)
    total = float(frame["rate"].to_numpy().sum())
    return frame.assign(equal_share=frame["rate"] / total if total > 0 else np.nan)


def structural_share(
    hits: Float[np.ndarray, " seq"],
    domains: np.ndarray,
    structural: Collection[str] = STRUCTURAL,
    *,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Return the share of structural text among the memorized, as an equal sample of every domain gives it.

    The sum of the structural domains' rates over the sum of all rates, with a bootstrap interval over
    sequences within each domain (of the resamples in which anything is memorized).

    Args:
        hits: How far each sequence is memorized: 0 or 1, or a mean over draws.
        domains: Its domain.
        structural: Domains that count as structural text.
        n_resamples: Of the bootstrap.
        seed: Of the bootstrap.

    >>> found = structural_share(np.array([1.0, 1, 0, 1]), np.array(["code", "code", "web", "web"]))
    >>> round(found.value, 3)
    0.667
    """
    value, drawn = structural_draws(hits, domains, structural, n_resamples, seed)
    return drawn_estimate(value, drawn, int((hits > 0).sum()))


def structural_draws(
    hits: Float[np.ndarray, " seq"],
    domains: np.ndarray,
    structural: Collection[str],
    n_resamples: int,
    seed: int,
) -> tuple[float, Float[np.ndarray, " draw"]]:
    """Return `structural_share` and its bootstrap draws; equal seeds resample the same sequences."""
    rates, drawn, names = _rates(hits, domains, n_resamples, seed)
    chosen = np.isin(names, list(structural))
    return float(_share(rates[None], chosen)[0]), _share(drawn, chosen)


def structural_gap(
    hits: Float[np.ndarray, " seq"],
    domains: np.ndarray,
    structural: Collection[str] = STRUCTURAL,
    *,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Return the mean rate of structural domains minus that of the others; every domain has the same weight.

    NaN where all domains are of one kind.

    >>> hits, domains = np.array([1.0, 1, 0, 1]), np.array(["code", "code", "web", "web"])
    >>> structural_gap(hits, domains).value
    0.5
    """
    rates, drawn, names = _rates(hits, domains, n_resamples, seed)
    chosen = np.isin(names, list(structural))
    if chosen.all() or not chosen.any():
        return Estimate.unknown(len(hits))
    gaps = drawn[:, chosen].mean(1) - drawn[:, ~chosen].mean(1)
    return drawn_estimate(float(rates[chosen].mean() - rates[~chosen].mean()), gaps, len(hits))


def domain_agreement(
    rates: Float[np.ndarray, "model domain"], *, n_permutations: int = 999, seed: int = 0
) -> dict[str, float]:
    """Return the mean rank correlation of the domain rates of all pairs of models.

    The null shuffles each model's domains.

    Returns:
        `value` (mean Spearman correlation), `null_low`, `null_high` (central 95 %), `p` (share of the null at
        least as large) and `n` (models). NaN with fewer than two models or three domains; models whose rates
        are all equal are left out.

    >>> found = domain_agreement(np.array([[0.1, 0.2, 0.3, 0.4], [0.2, 0.3, 0.6, 0.7]]))
    >>> round(found["value"], 3), found["p"] < 0.1
    (1.0, True)
    """
    from scipy.stats import rankdata

    rates = rates[np.ptp(rates, axis=1) > 0] if len(rates) else rates
    if len(rates) < 2 or rates.shape[1] < 3:
        return dict.fromkeys(("value", "null_low", "null_high", "p"), np.nan) | {"n": len(rates)}
    ranks = rankdata(rates, axis=1)
    ranks = ranks - ranks.mean(1, keepdims=True)
    ranks = ranks / np.linalg.norm(ranks, axis=1, keepdims=True)
    rng = np.random.default_rng(seed)

    def mean_correlation(rows: np.ndarray) -> float:
        return float(np.mean([rows[i] @ rows[j] for i, j in combinations(range(len(rows)), 2)]))

    value = mean_correlation(ranks)
    null = np.array([mean_correlation(rng.permuted(ranks, axis=1)) for _ in range(n_permutations)])
    low, high = np.percentile(null, [2.5, 97.5]).tolist()
    p = float((1 + (null >= value - 1e-12).sum()) / (1 + n_permutations))
    return {"value": value, "null_low": low, "null_high": high, "p": p, "n": len(rates)}


def _rates(
    hits: np.ndarray, domains: np.ndarray, n_resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return each domain's rate, its bootstrap resamples, and the domains."""
    rng, labels = np.random.default_rng(seed), np.asarray(domains).astype(str)
    names = np.unique(labels)
    rates, drawn = [], []
    for name in names:
        own = hits[labels == name]
        weights = rng.multinomial(len(own), np.full(len(own), 1 / len(own)), size=n_resamples)
        rates.append(own.mean())
        drawn.append(weights @ own / len(own))
    return np.array(rates), np.stack(drawn, 1), names


def _share(rates: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    total = rates.sum(1)
    return np.where(total > 0, rates[:, chosen].sum(1) / np.where(total > 0, total, 1), np.nan)
