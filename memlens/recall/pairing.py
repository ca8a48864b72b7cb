"""Pairs of sequences that are alike in what would explain a difference away, and how alike they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Int
from scipy.optimize import linear_sum_assignment

from memlens.errors import OptionError
from memlens.recall.matching import standardized


@dataclass(frozen=True, eq=False)
class Pairs:
    """Who is matched with whom.

    Attributes:
        ours: Rows of the first group, in order.
        theirs: The row of the second group that each is matched with; none twice.
        balance: One row a covariate: mean of either group before and after matching, and the standardized
            mean differences.
    """

    ours: Int[np.ndarray, "pair"]
    theirs: Int[np.ndarray, "pair"]
    balance: pd.DataFrame

    def __len__(self) -> int:
        return len(self.ours)


def match_pairs(ours: pd.DataFrame, theirs: pd.DataFrame, calipers: Mapping[str, float]) -> Pairs:
    r"""Match as many rows as can be, each within the caliper of every covariate, with the least distance.

    The distance of a pair is :math:`\sum_c |a_c - b_c| / w_c` with the caliper :math:`w_c` of covariate
    :math:`c`; a pair outside any caliper is not made. Of the matchings with the most pairs, the one with the
    least total distance is taken (an assignment, not greedy).

    Args:
        ours: The covariates of the first group, a row a sequence.
        theirs: Of the second.
        calipers: The largest difference a covariate may have, above 0.

    Raises:
        OptionError: A caliper is not above 0.

    >>> a, b = pd.DataFrame({"x": [1.0, 5.0]}), pd.DataFrame({"x": [5.2, 1.4, 9.0]})
    >>> found = match_pairs(a, b, {"x": 0.5})
    >>> found.ours.tolist(), found.theirs.tolist()
    ([0, 1], [1, 0])
    """
    for name, caliper in calipers.items():
        if not caliper > 0:
            raise OptionError(f"the caliper of {name!r} is {caliper}: give a number above 0.")
    distance, fits = np.zeros((len(ours), len(theirs))), np.ones((len(ours), len(theirs)), dtype=bool)
    for name, caliper in calipers.items():
        gap = np.abs(np.subtract.outer(ours[name].to_numpy(float), theirs[name].to_numpy(float))) / caliper
        distance, fits = distance + gap, fits & (gap <= 1 + 1e-9)
    # A pair outside a caliper costs more than all that fit together, so as many as can be fit.
    far = 1 + float(distance[fits].max(initial=0.0)) * (min(distance.shape, default=0) + 1)
    a, b = linear_sum_assignment(np.where(fits, distance, far))
    kept = fits[a, b]
    a, b = a[kept], b[kept]
    return Pairs(a, b, _balance(ours, theirs, a, b, list(calipers)))


def _balance(
    ours: pd.DataFrame, theirs: pd.DataFrame, a: np.ndarray, b: np.ndarray, names: list[str]
) -> pd.DataFrame:
    first, second = ours[names].astype(float), theirs[names].astype(float)
    spread = ((first.var(ddof=0) + second.var(ddof=0)) / 2) ** 0.5
    table = pd.DataFrame({"pairs": len(a)}, index=pd.Index(names, name="covariate"))
    for when, x, y in (("before", first, second), ("after", first.iloc[a], second.iloc[b])):
        table[f"first_{when}"], table[f"second_{when}"] = x.mean(), y.mean()
        table[f"smd_{when}"] = standardized(x.mean() - y.mean(), spread)
    return table.reset_index()
