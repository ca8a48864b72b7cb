"""Matched pairs: as many as fit, the closest of these, none outside a caliper."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlens.errors import OptionError
from memlens.recall.matching import match_pairs

CALIPERS = {"length": 1.0, "probability": 0.1}
rows = st.lists(st.tuples(st.integers(2, 5), st.floats(0, 1)), min_size=1, max_size=5)


def frame(values: list[tuple[int, float]]) -> pd.DataFrame:
    return pd.DataFrame(values, columns=list(CALIPERS)).astype(float)


@given(rows, rows)
def test_equals_the_best_of_all_matchings(
    ours: list[tuple[int, float]], theirs: list[tuple[int, float]]
) -> None:
    """Brute force: the most pairs inside the calipers, and of these the least total distance."""
    a, b = frame(ours), frame(theirs)
    found = match_pairs(a, b, CALIPERS)
    gaps = np.abs(a.to_numpy()[:, None] - b.to_numpy()[None]) / np.array(list(CALIPERS.values()))
    fits, cost = (gaps <= 1 + 1e-9).all(-1), gaps.sum(-1)
    best = (0, 0.0)
    places = [*range(len(b)), *[None] * len(a)]
    for chosen in set(permutations(places, len(a))):
        pairs = [(i, j) for i, j in enumerate(chosen) if j is not None]
        if all(fits[i, j] for i, j in pairs):
            best = min(best, (-len(pairs), sum(cost[i, j] for i, j in pairs)))
    assert len(found) == -best[0]
    assert cost[found.ours, found.theirs].sum() == pytest.approx(best[1], abs=1e-9)
    assert fits[found.ours, found.theirs].all()
    assert len(set(found.theirs.tolist())) == len(found.theirs)


def test_balance_says_how_alike_they_are() -> None:
    a, b = frame([(3, 0.9), (4, 0.5)]), frame([(3, 0.85), (4, 0.1), (5, 0.55)])
    balance = match_pairs(a, b, CALIPERS).balance.set_index("covariate")
    assert balance["pairs"].tolist() == [2, 2]
    assert balance.loc["probability", "first_before"] == pytest.approx(0.7)
    assert balance.loc["probability", "second_before"] == pytest.approx(0.5)
    assert balance.loc["probability", "second_after"] == pytest.approx(0.7)
    spread = np.sqrt((np.var([0.9, 0.5]) + np.var([0.85, 0.1, 0.55])) / 2)
    assert balance.loc["probability", "smd_before"] == pytest.approx(0.2 / spread)
    assert balance.loc["probability", "smd_after"] == pytest.approx(0.0, abs=1e-12)


def test_no_pair_and_no_caliper() -> None:
    found = match_pairs(frame([(3, 0.9)]), frame([(3, 0.1)]), CALIPERS)
    assert len(found) == 0
    assert found.balance["second_after"].isna().all()
    with pytest.raises(OptionError, match=r"'length' is 0.*above 0"):
        match_pairs(frame([(3, 0.9)]), frame([(3, 0.9)]), {"length": 0})
