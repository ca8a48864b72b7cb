"""Two groups compared among units that are alike in a confound."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from memlens.results.statistics.estimates import Estimate
from memlens.results.statistics.intervals import quantile_interval


@dataclass(frozen=True)
class WithinStrata:
    """A difference of two groups inside strata; see `difference_within`.

    Attributes:
        found: The difference with its interval; NaN where no stratum has both groups.
        p: Of the permutation test.
        n_a: Sequences of the first group in strata that have both.
        n_b: Those of the second.
    """

    found: Estimate
    p: float
    n_a: int
    n_b: int


def difference_within(
    values: Float[np.ndarray, "seq"],
    is_a: Bool[np.ndarray, "seq"],
    stratum: Int[np.ndarray, "seq"],
    *,
    level: float = 0.95,
    n_resamples: int = 2000,
    n_permutations: int = 9999,
    seed: int = 0,
) -> WithinStrata:
    r"""Compare two groups among sequences that have the same value of a confound.

    .. math:: \frac{\sum_s w_s (\bar x_{a,s} - \bar x_{b,s})}{\sum_s w_s},
              \quad w_s = \frac{n_{a,s} n_{b,s}}{n_{a,s} + n_{b,s}}

    over the strata :math:`s` that have both groups: the coefficient of the group in a regression with one
    constant per stratum. The interval is a percentile bootstrap that resamples each group in each stratum,
    and `p` is from a two-sided test that permutes the groups inside strata.

    Args:
        values: One number per sequence; NaN is left out.
        is_a: True for the first group, False for the second.
        stratum: Which sequences are alike, by number.
        level: Coverage of the interval.
        n_resamples: Resamples of the bootstrap.
        n_permutations: Permutations of the test.
        seed: Seed of both.

    >>> stratum, is_a = np.array([0, 0, 1, 1, 1]), np.array([True, False, True, False, False])
    >>> difference_within(np.array([2.0, 1.0, 12.0, 11.0, 11.0]), is_a, stratum).found.value
    1.0
    """
    cells = [
        (a, b)
        for s in np.unique(stratum)
        if len(a := np.flatnonzero((stratum == s) & is_a & np.isfinite(values)))
        and len(b := np.flatnonzero((stratum == s) & ~is_a & np.isfinite(values)))
    ]
    if not cells:
        return WithinStrata(Estimate(np.nan), np.nan, 0, 0)
    weight = np.array([len(a) * len(b) / (len(a) + len(b)) for a, b in cells])
    weight /= weight.sum()
    rows = np.concatenate([part for cell in cells for part in cell])
    # The difference is the sum of share * x, with these shares of each row.
    sizes = [len(part) for cell in cells for part in cell]
    signed = np.repeat([w * sign for w in weight for sign in (1, -1)], sizes)
    share, x = signed / np.repeat(sizes, sizes), values[rows]
    value, rng = float(share @ x), np.random.default_rng(seed)
    drawn, shuffled = np.empty((n_resamples, len(x))), np.empty((n_permutations, len(x)))
    start = 0
    for size in sizes:
        some = rng.integers(start, start + size, (n_resamples, size))
        drawn[:, start : start + size] = x[some]
        start += size
    start = 0
    for a, b in cells:
        part = slice(start, start + len(a) + len(b))
        shuffled[:, part] = rng.permuted(np.tile(share[part], (n_permutations, 1)), axis=1)
        start = part.stop
    n_a, n_b = (sum(len(cell[i]) for cell in cells) for i in (0, 1))
    low, high = quantile_interval((drawn @ share)[:, None], level, min(n_a, n_b))
    extreme = np.abs(shuffled @ x) >= abs(value) - 1e-12 * max(1.0, abs(value))
    p = float((1 + extreme.sum()) / (1 + n_permutations))
    return WithinStrata(Estimate(value, float(low[0]), float(high[0]), n_a + n_b, level), p, n_a, n_b)
