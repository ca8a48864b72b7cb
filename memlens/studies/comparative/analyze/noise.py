"""What noise in the residual does to recall, and how far later layers take it out again."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pandas as pd
import xarray as xr

from memlens.results.result import Result
from memlens.results.statistics.estimates import Estimate, mean_estimate
from memlens.results.statistics.intervals import mean_interval
from memlens.studies.comparative.analyze.domains import STRUCTURAL, structural_draws, structural_share


def over_draws(array: xr.DataArray) -> xr.DataArray:
    """Return the mean over draws of the noise, where there are several."""
    return array.mean("draw") if "draw" in array.dims else array


def noise_table(
    result: Result, structural: Collection[str] = STRUCTURAL, *, n_resamples: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Return rate, spread of the score and structural share at each strength.

    Args:
        result: Kind "residual_perturbation" with `exact_match`, `matching_prefix` and `target_accuracy` of
            a sample of all sequences, and their coordinates `n_targets` and `domain`.
        structural: Domains that count as structural text.
        n_resamples: Of the bootstraps.
        seed: Of the bootstraps.

    Returns:
        Columns `alpha`, `n`, `rate`, `low`, `high` (mean over draws; bootstrap over sequences), `leading`
        (mean share of the continuation that is right from its start: M is at least that), `accuracy`
        (teacher-forced share of right tokens: mostly above M), `below_half`, `between` and `all_right`
        (shares of sequences by that share: under 1/2, from there to under 1, and 1), `structural`,
        `structural_low`, `structural_high` (see `structural_share`).

    With one draw a rate's interval is Wilson's.
    """
    hits, accuracy = over_draws(result["exact_match"]), result["target_accuracy"]
    leading = over_draws(result["matching_prefix"]) / result["n_targets"]
    domains = result["domain"].values if "domain" in result.data.coords else None
    rows = []
    for alpha in hits["alpha"].values.tolist():
        here = hits.sel(alpha=alpha)
        mean, low, high = mean_interval(here, n_resamples=n_resamples, seed=seed).values.tolist()
        right = accuracy.sel(alpha=alpha).values
        parts = [
            float((right < 0.5).mean()),
            float(((right >= 0.5) & (right < 1)).mean()),
            float((right == 1).mean()),
        ]
        share = Estimate(np.nan, np.nan, np.nan, 0)
        if domains is not None:
            share = structural_share(here.values, domains, structural, n_resamples=n_resamples, seed=seed)
        rows.append(
            (
                alpha, here.sizes["sequence"], mean, low, high,
                float(leading.sel(alpha=alpha).mean()), float(right.mean()), *parts, share.value,
                share.low, share.high,
            )
        )  # fmt: skip
    columns = [
        "alpha", "n", "rate", "low", "high", "leading", "accuracy", "below_half", "between", "all_right",
        "structural",
        "structural_low", "structural_high",
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def structural_change(
    result: Result, structural: Collection[str] = STRUCTURAL, *, n_resamples: int = 1000, seed: int = 0
) -> Estimate:
    """Return the structural share of what is memorized under the strongest noise minus that without noise.

    Bootstrap over the same sequences, inside each domain; `n` counts those that are still memorized in some
    draw. NaN where nothing is left, or all domains are of one kind.
    """
    hits = over_draws(result["exact_match"])
    strongest = float(hits["alpha"].max())
    clean, noisy = (hits.sel(alpha=alpha).values for alpha in (0.0, strongest))
    labels = result["domain"].values.astype(str)
    kinds = np.isin(np.unique(labels), list(structural))
    if kinds.all() or not kinds.any():
        return Estimate(np.nan, np.nan, np.nan, 0)
    value, drawn = (
        shares[1] - shares[0]
        for shares in zip(
            *(structural_draws(h, labels, structural, n_resamples, seed) for h in (clean, noisy)), strict=True
        )
    )
    known = drawn[np.isfinite(drawn)]
    n = int((noisy > 0).sum())
    if not np.isfinite(value) or not len(known):
        return Estimate(np.nan, np.nan, np.nan, n)
    low, high = np.percentile(known, [2.5, 97.5])
    return Estimate(float(value), float(low), float(high), n)


def recovery_table(result: Result, *, seed: int = 0) -> pd.DataFrame:
    """Return the similarity regained, R = sim(last) - sim(at the noise), of each group at each strength.

    Returns:
        Columns `group`, `alpha`, `n`, `recovery`, `low`, `high` (bootstrap over sequences), `at_noise`,
        `at_last` (mean similarities).
    """
    rows = []
    labels = result["group"].values.astype(str)
    recovery, at_noise = (over_draws(result[name]) for name in ("recovery", "similarity_at_noise"))
    for group in dict.fromkeys(labels.tolist()):
        for alpha in recovery["alpha"].values.tolist():
            here = recovery.sel(alpha=alpha).isel(sequence=labels == group)
            found = mean_estimate(here, seed=seed)
            start = float(at_noise.sel(alpha=alpha).isel(sequence=labels == group).mean())
            rows.append(
                (group, alpha, found.n, found.value, found.low, found.high, start, start + found.value)
            )
    columns = ["group", "alpha", "n", "recovery", "low", "high", "at_noise", "at_last"]
    return pd.DataFrame(rows, columns=columns)


def recovery_gap(
    result: Result, alpha: float, ours: str, theirs: str, matched: np.ndarray | None = None, *, seed: int = 0
) -> Estimate:
    """Return how much more similarity one group regains than another, at one strength.

    Args:
        result: With the coordinate `group`.
        alpha: The strength.
        ours: The one group.
        theirs: The other.
        matched: For each sequence of the other group the id of the one it is matched to: then differences are
            taken within pairs. Else the groups are resampled on their own.
        seed: Of the bootstrap over sequences (or pairs).
    """
    labels = result["group"].values.astype(str)
    values = over_draws(result["recovery"]).sel(alpha=alpha)
    a, b = (values.isel(sequence=labels == name) for name in (ours, theirs))
    if not a.sizes["sequence"] or not b.sizes["sequence"]:
        return Estimate(np.nan, np.nan, np.nan, 0)
    if matched is not None:
        rows = {str(name): i for i, name in enumerate(a["sequence"].values)}
        pairs = [(rows[str(name)], j) for j, name in enumerate(matched) if str(name) in rows]
        if pairs:
            i, j = np.array(pairs).T
            gaps = xr.DataArray(a.values[i] - b.values[j], dims="sequence")
            return mean_estimate(gaps, seed=seed)
    rng = np.random.default_rng(seed)
    drawn = [part.values[rng.integers(0, part.size, (2000, part.size))].mean(1) for part in (a, b)]
    low, high = np.percentile(drawn[0] - drawn[1], [2.5, 97.5])
    return Estimate(float(a.mean() - b.mean()), float(low), float(high), a.size + b.size)
