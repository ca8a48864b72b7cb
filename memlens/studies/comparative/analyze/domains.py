"""Which kinds of text are memorized: rates within domains, shares among the memorized, structural or free."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pandas as pd
from jaxtyping import Float

from memlens.results.statistics.estimates import Estimate, share_estimate
from memlens.results.statistics.intervals import FEWEST
from memlens.results.statistics.resampling import bootstrap_means
from memlens.studies.comparative.analyze.rates import against_null, drawn_estimate
from memlens.studies.comparative.options import DEFAULTS, STRUCTURAL, ComparativeOptions


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
    hits: Float[np.ndarray, " seq"], domains: np.ndarray, options: ComparativeOptions = DEFAULTS
) -> Estimate:
    """Return the share of structural text among the memorized, as an equal sample of every domain gives it.

    The sum of the structural domains' rates over the sum of all rates, with a bootstrap interval over
    sequences within each domain (of the resamples in which anything is memorized); there is none where a
    domain has fewer than `FEWEST` sequences, or fewer are memorized.

    Args:
        hits: How far each sequence is memorized: 0 or 1, or a mean over draws.
        domains: Its domain.
        options: `structural`, and `n_resamples` and `seed` of the bootstrap.

    >>> found = structural_share(np.array([1.0, 1, 0, 1]), np.array(["code", "code", "web", "web"]))
    >>> round(found.value, 3)
    0.667
    """
    shares = shares_of(*resampled_rates(hits, domains, options))
    return drawn_estimate(shares[0], shares[1:], int((hits > 0).sum()))


def structural_gap(
    hits: Float[np.ndarray, " seq"], domains: np.ndarray, options: ComparativeOptions = DEFAULTS
) -> Estimate:
    """Return the mean rate of structural domains minus that of the others; every domain has the same weight.

    NaN where all domains are of one kind. See `structural_share` for the arguments and the interval.

    >>> hits, domains = np.array([1.0, 1, 0, 1]), np.array(["code", "code", "web", "web"])
    >>> structural_gap(hits, domains).value
    0.5
    """
    rates, structural = resampled_rates(hits, domains, options)
    if structural.all() or not structural.any():
        return Estimate.unknown(len(hits))
    gaps = rates[:, structural].mean(1) - rates[:, ~structural].mean(1)
    return drawn_estimate(gaps[0], gaps[1:], len(hits))


def resampled_rates(
    hits: np.ndarray, domains: np.ndarray, options: ComparativeOptions
) -> tuple[Float[np.ndarray, "1+draw domain"], np.ndarray]:
    """Return the domains' rates, followed by those of bootstrap resamples, and which are structural.

    Resamples of fewer than `FEWEST` sequences are NaN.
    """
    rng, labels = np.random.default_rng(options.seed), np.asarray(domains).astype(str)
    names, rates = np.unique(labels), []
    for name in names:
        own = hits[labels == name][:, None].astype(float)
        drawn = bootstrap_means(own, options.n_resamples, rng)
        rates.append(np.vstack([own.mean(0), drawn if len(own) >= FEWEST else np.full_like(drawn, np.nan)]))
    return np.hstack(rates), np.isin(names, options.structural)


def shares_of(rates: np.ndarray, structural: np.ndarray) -> np.ndarray:
    """Return the structural share in each row of `resampled_rates`; NaN where nothing is memorized."""
    with np.errstate(invalid="ignore"):
        return rates[:, structural].sum(1) / rates.sum(1)


def domain_agreement(
    rates: Float[np.ndarray, "model domain"], options: ComparativeOptions = DEFAULTS
) -> dict[str, float]:
    """Return the mean rank correlation of the domain rates of all pairs of models.

    The null shuffles each model's domains (`n_permutations` and `seed` of the options).

    Returns:
        `value` (mean Spearman correlation), `n` (models), and what `against_null` gives; with fewer than two
        models or three domains, only `n` and a NaN `value`. Models whose rates are all equal are left out.

    >>> found = domain_agreement(np.array([[0.1, 0.2, 0.3, 0.4], [0.2, 0.3, 0.6, 0.7]]))
    >>> round(found["value"], 3), found["p_above"] < 0.1
    (1.0, True)
    """
    from scipy.stats import rankdata

    rates = rates[np.ptp(rates, axis=1) > 0] if len(rates) else rates
    if len(rates) < 2 or rates.shape[1] < 3:
        return {"value": np.nan, "n": len(rates)}
    ranks, rng = rankdata(rates, axis=1), np.random.default_rng(options.seed)

    def mean_correlation(rows: np.ndarray) -> float:
        return float(np.corrcoef(rows)[np.triu_indices(len(rows), 1)].mean())

    value = mean_correlation(ranks)
    null = np.array([mean_correlation(rng.permuted(ranks, axis=1)) for _ in range(options.n_permutations)])
    return {"value": value, "n": len(rates), **against_null(value, null)}
