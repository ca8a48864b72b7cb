"""Controls by enumeration: lengths first, then frequency; no control twice; balance by its definition."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memlens.errors import OptionError
from memlens.recall import matching
from memlens.recall.matching import match_controls, match_pairs, mean_log_frequency
from memlens.sequences.set import SequenceSet

COUNTS = np.array([0, 1, 10, 1000, 100_000])
some_rows = st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=6), min_size=1, max_size=4)


def sequences(rows: list[list[int]], prefix: list[int]) -> SequenceSet:
    return SequenceSet.from_tokens(rows, prefix)


def costs(a: SequenceSet, b: SequenceSet) -> tuple[np.ndarray, np.ndarray]:
    """The differences in tokens (prefix and continuation), and in frequency, of all pairs."""
    apart = [np.abs(np.subtract.outer(x, y)) for x, y in zip(*map(counted, (a, b)), strict=True)]
    return apart[0] + apart[1], apart[2]


def counted(seqs: SequenceSet) -> list[np.ndarray]:
    prefix = seqs.prefix_len.numpy()
    return [prefix, seqs.lengths.numpy() - prefix, mean_log_frequency(seqs, COUNTS)]


@settings(max_examples=40, deadline=None)
@given(some_rows, some_rows, st.integers(1, 2), st.integers(0, 2))
def test_no_frequency_outweighs_a_token(
    ours: list[list[int]], theirs: list[list[int]], n_per: int, cut: int
) -> None:
    first = sequences(ours, [1 + len(row) % 2 for row in ours])
    pool = sequences(theirs, [1 + (len(row) + cut) % 2 for row in theirs])
    found = match_controls(first, pool, COUNTS, n_per=n_per, seed=0)
    of = found.controls.table["matched_to"].tolist()
    wanted = [name for name in first.ids for _ in range(n_per)]
    assert len(of) == min(len(wanted), len(pool)) == len(wanted) - found.n_unmatched
    assert of == sorted(of, key=first.ids.index)
    tokens, frequency = costs(first, pool)
    rows = [first.ids.index(name) for name in of]
    columns = [pool.ids.index(name) for name in found.controls.ids]
    assert len(set(columns)) == len(columns)
    reached = tokens[rows, columns].sum(), frequency[rows, columns].sum()
    slots = [i for i in range(len(first)) for _ in range(n_per)]
    if len(slots) <= len(pool):
        pairs = [
            list(zip(slots, chosen, strict=True)) for chosen in permutations(range(len(pool)), len(slots))
        ]
    else:
        pairs = [
            list(zip(chosen, range(len(pool)), strict=True)) for chosen in permutations(slots, len(pool))
        ]
    best = min(
        (tokens[i].sum(), round(frequency[i].sum(), 9)) for i in (tuple(zip(*p, strict=True)) for p in pairs)
    )
    assert reached == pytest.approx(best, abs=1e-8)


def test_differences_and_balance_by_hand() -> None:
    first = sequences([[3, 3, 3, 3], [1, 1, 1]], [2, 1])
    pool = sequences([[2, 2, 2], [4, 4, 4, 4, 4], [3, 3, 4, 4]], [1, 2, 2])
    found = match_controls(first, pool, COUNTS, n_per=1, seed=0)
    logs = np.log1p(COUNTS)
    table = found.controls.table
    assert found.controls.ids == [pool.ids[2], pool.ids[0]]
    assert table["matched_to"].tolist() == first.ids
    assert table["length_difference"].tolist() == [0, 0]
    assert table["frequency_difference"].tolist() == pytest.approx(
        [(logs[4] - logs[3]) / 2, logs[2] - logs[1]]
    )
    ours, before = np.array([4, 3]), np.array([3, 5, 4])
    spread = np.sqrt((ours.var() + before.var()) / 2)
    assert found.balance.loc["length", "before"] == pytest.approx((ours.mean() - before.mean()) / spread)
    assert found.balance.loc["length", "after"] == 0
    mine, theirs = logs[[3, 1]], np.array([logs[2], logs[4], (logs[3] + logs[4]) / 2])
    spread = np.sqrt((mine.var() + theirs.var()) / 2)
    assert found.balance.loc["frequency", "before"] == pytest.approx((mine.mean() - theirs.mean()) / spread)
    assert found.balance.loc["frequency", "after"] == pytest.approx(
        (mine.mean() - theirs[[2, 0]].mean()) / spread
    )


def test_many_sequences_are_assigned_in_blocks_that_share_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "_BLOCK", 4)
    monkeypatch.setattr(matching, "_POOL", 5)
    rng = np.random.default_rng(0)
    first, pool = (SequenceSet.from_tokens(rng.integers(0, 5, (n, 6)), 2) for n in (10, 40))
    found = match_controls(first, pool, COUNTS, n_per=1, seed=1)
    assert found.controls.table["matched_to"].tolist() == first.ids
    assert found.n_unmatched == 0
    assert len(set(found.controls.ids)) == 10
    again = match_controls(first, pool, COUNTS, n_per=1, seed=1)
    assert found.controls.ids == again.controls.ids
    assert found.controls.ids != match_controls(first, pool, COUNTS, n_per=1, seed=2).controls.ids
    few = match_controls(first, pool[:2], COUNTS, n_per=1, seed=1)
    assert (len(few.controls), few.n_unmatched) == (2, 8)


def test_frequency_is_the_mean_logarithm_over_the_real_tokens() -> None:
    seqs = sequences([[1, 2, 4, 4], [3, 3]], [1, 1])
    logs = np.log1p(COUNTS)
    assert mean_log_frequency(seqs, COUNTS).tolist() == pytest.approx(
        [(logs[1] + logs[2] + 2 * logs[4]) / 4, logs[3]]
    )


def test_equal_groups_are_balanced_and_a_gap_without_spread_has_no_size() -> None:
    same = sequences([[1, 1, 1]] * 3, [1] * 3)
    found = match_controls(same, same, COUNTS, n_per=1, seed=0).balance
    assert found.to_numpy().tolist() == [[0.0, 0.0]] * 3
    longer = sequences([[1, 1, 1, 1]] * 3, [1] * 3)
    found = match_controls(same, longer, COUNTS, n_per=1, seed=0).balance
    assert np.isnan(found.loc["length"]).all()  # a token apart, and all alike
    assert found.loc["prefix_len"].tolist() == [0.0, 0.0]
    assert list(found) == ["before", "after"]
    assert found.index.name == "covariate"
    assert list(found.index) == ["length", "prefix_len", "frequency"]


def test_pairs_within_calipers_are_as_many_and_as_near_as_possible() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        ours, theirs = (pd.DataFrame(rng.integers(0, 6, (n, 2)) / 2, columns=["x", "y"]) for n in (3, 4))
        calipers = {"x": 1.0, "y": 0.5}
        gap = {c: np.abs(np.subtract.outer(ours[c].to_numpy(), theirs[c].to_numpy())) for c in calipers}
        fits = np.logical_and.reduce([gap[c] <= width for c, width in calipers.items()])
        cost = sum(gap[c] / width for c, width in calipers.items())
        ways = [[(i, j) for i, j in enumerate(chosen) if fits[i, j]] for chosen in permutations(range(4), 3)]
        best = min((-len(way), round(sum(cost[i, j] for i, j in way), 9)) for way in ways)
        found = match_pairs(ours, theirs, calipers)
        assert all(fits[i, j] for i, j in zip(found.ours, found.theirs, strict=True))
        assert len(set(found.theirs.tolist())) == len(found) == -best[0]
        assert cost[found.ours, found.theirs].sum() == pytest.approx(best[1])
        assert found.ours.tolist() == sorted(found.ours)
        balance = found.balance.set_index("covariate")
        assert list(balance.index) == ["x", "y"]
        assert (balance["pairs"] == len(found)).all()
        for c in calipers:
            spread = np.sqrt((ours[c].var(ddof=0) + theirs[c].var(ddof=0)) / 2)
            a, b = ours[c].iloc[found.ours], theirs[c].iloc[found.theirs]
            for when, first, second in (("before", ours[c], theirs[c]), ("after", a, b)):
                means = balance.loc[c, [f"first_{when}", f"second_{when}"]].tolist()
                np.testing.assert_allclose(means, [first.mean(), second.mean()])
                gap_of_means = first.mean() - second.mean()
                expected = 0.0 if gap_of_means == 0 else gap_of_means / spread
                np.testing.assert_allclose(balance.loc[c, f"smd_{when}"], expected)
    assert len(match_pairs(ours.iloc[:0], theirs, calipers)) == 0
    for width in (0, -1.0, float("nan")):
        with pytest.raises(OptionError, match=r"the caliper of 'y' is .*: give a number above 0"):
            match_pairs(ours, theirs, {"x": 1.0, "y": width})
