"""Races for the top k: the answer against the whole table, its errors, its cost, and what it cannot see."""

from __future__ import annotations

from itertools import combinations, permutations
from typing import Any

import numpy as np
import pytest
from scipy import stats

from memlens.errors import EmptySetError, OptionError
from memlens.results.statistics.racing import (
    RANK_BY,
    Race,
    RaceOptions,
    Sample,
    betting_interval,
    race,
    wealth,
)

MEANS = np.r_[1.0, 0.8, 0.7, 0.6, np.linspace(0.4, 0.0, 8)]


def table_of(kind: str, n: int, seed: int) -> np.ndarray:
    """Effects with known means up to noise, on sequences that are easy or hard for all components."""
    rng = np.random.default_rng(seed)
    shape = (n, len(MEANS))
    if kind == "skewed":
        return MEANS * rng.lognormal(-0.5, 1.0, shape) + rng.gamma(1, 0.3, (n, 1))
    if kind == "rare":  # one sequence in ten makes all of the mean
        return rng.normal(0, 0.05, shape) + 10 * MEANS * (rng.random(shape) < 0.1)
    return MEANS * rng.gamma(4, 0.25, (n, 1)) + rng.normal(0, 0.3, shape)


def run(table: np.ndarray, k: int = 3, seed: int = 0, *, known: Any = None, **options: Any) -> Race:
    return race(
        lambda rows, parts: table[np.ix_(rows, parts)], len(table), table.shape[1], RaceOptions(k, **options),
        estimates=known, seed=seed,
    )  # fmt: skip


def top_of(table: np.ndarray, k: int, rank_by: str = "magnitude") -> set[int]:
    return set(np.argsort(-RANK_BY[rank_by](table.mean(0)), kind="stable")[:k].tolist())


def chosen(found: Race, status: str = "in") -> set[int]:
    return set(np.flatnonzero(found.status == status).tolist())


@pytest.mark.parametrize("rank_by", list(RANK_BY))
@pytest.mark.parametrize("kind", ["shared", "skewed", "rare"])
def test_the_error_rate_is_within_the_level(kind: str, rank_by: str) -> None:
    wrong, cells = 0, 0.0
    for seed in range(100):
        table = table_of(kind, 150, seed) * (-1 if rank_by == "decrease" else 1)
        found = run(table, seed=seed, rank_by=rank_by, level=0.9)
        wrong += chosen(found) != top_of(table, 3, rank_by)
        cells += found.cells / table.size / 100
    assert wrong <= 10
    assert cells < {"shared": 0.65, "skewed": 0.9, "rare": 1.0}[kind]


def test_a_sample_without_the_rare_sequences_misleads_t_and_not_bets() -> None:
    """The documented limit: most sequences speak for the one component, a few much more for the other."""
    found = dict.fromkeys(("t", "betting"), 0)
    for seed in range(8):
        rng = np.random.default_rng(seed)
        table = rng.normal([0.1, 0.0], 0.01, (200, 2))
        table[rng.permutation(200)[:4], 0] -= 8  # the mean of the first is about -0.06
        for interval in found:
            bounds = (-9.0, 1.0) if interval == "betting" else None
            got = run(table, k=1, seed=seed, rank_by="increase", interval=interval, bounds=bounds)
            found[interval] += chosen(got) != {1}
    assert found["t"] > 2
    assert found["betting"] == 0


def test_bets_are_right_at_every_round_and_save_cells() -> None:
    wrong = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        table = (rng.random((300, 4)) < [0.9, 0.2, 0.2, 0.1]).astype(float)
        found = run(table, k=1, seed=seed, interval="betting", bounds=(-1, 1), rank_by="increase")
        wrong += chosen(found) != {0}
        assert found.cells < 0.6 * table.size
        mean = table.mean(0)
        assert ((found.low <= mean + 1e-9) & (mean <= found.high + 1e-9)).all()
    assert wrong == 0


def test_a_bet_against_a_true_claim_seldom_wins() -> None:
    rng = np.random.default_rng(0)
    table = np.where(rng.random((100, 1)) < 0.2, 4.0, -1.0)
    table -= table.mean()  # exactly 0 over all
    orders = np.stack([rng.permutation(table[:, 0]) for _ in range(2000)], 1)
    won = wealth(orders[:90], 0.0, float(table.min()), 5.0, 100)
    assert 0.0 < (won >= 10).mean() <= 0.1
    assert (wealth(orders[:90], -0.8, float(table.min()), 5.0, 100) >= 10).mean() > 0.9


def test_the_interval_of_bets_holds_what_no_bet_refutes() -> None:
    rng = np.random.default_rng(1)
    values = rng.random((60, 2))
    low, high = betting_interval(values, (0.0, 1.0), 200, 0.05)
    assert (low < 0.5).all()
    assert (high > 0.5).all()
    for sign, end in ((1.0, low), (-1.0, high)):
        least = min(0.0, sign)
        inside, outside = (
            wealth(sign * values, sign * end + step, least, 1.0, 200) for step in (1e-3, -1e-3)
        )
        assert (inside < 20).all()
        assert (outside >= 20).all()


def test_t_is_the_paired_test_with_the_finite_population_correction() -> None:
    rng = np.random.default_rng(0)
    effects = rng.normal(0, 1, (20, 3))
    sample = Sample.of(effects, None, None, 80)
    difference = effects[:, 0] - effects[:, 1]
    by_hand = difference.std(ddof=1) * (20 / 19) / np.sqrt(20) * np.sqrt(1 - 20 / 80)
    for alpha, gap in ((0.3, 0.0), (0.3, 1.0), (1e-6, 1.0)):
        moved = Sample(
            sample.mean + np.array([gap, 0, 0]), sample.residuals, sample.df, sample.share, sample.controlled
        )
        above = bool(moved.exceeds(np.ones(3), 1.0, alpha)[0, 1])
        assert above == (difference.mean() + gap > stats.t.isf(alpha, 19) * by_hand)
    low, high = sample.interval(0.025)
    alone = stats.t.isf(0.025, 19) * effects.std(0, ddof=1) * (20 / 19) / np.sqrt(20) * np.sqrt(0.75)
    np.testing.assert_allclose(high - low, 2 * alone)


def test_the_corrected_mean_is_the_regression_estimator_and_residuals_are_of_left_out_sequences() -> None:
    rng = np.random.default_rng(3)
    n, n_all = 12, 50
    whole = rng.normal(2, 1, (n_all, 2))
    effects = 3 * whole[:n] + rng.normal(0, 0.5, (n, 2)) - 7
    effects[:, 1] = rng.normal(0, 1, n)  # which gradients say nothing about
    sample = Sample.of(effects, whole[:n], whole, n_all)
    assert sample.controlled.tolist() == [True, False]
    assert (sample.df, sample.share) == (n - 2, 1 - n / n_all)

    g = whole[:n, 0]

    def estimate(y: np.ndarray) -> float:
        return float(y.mean() - np.polyfit(g, y, 1)[0] * (g.mean() - whole[:, 0].mean()))

    y = effects[:, 0]
    np.testing.assert_allclose(sample.mean, [estimate(y), effects[:, 1].mean()])
    for i in range(n):
        others = np.arange(n) != i
        missed = y[i] - np.polyval(np.polyfit(g[others], y[others], 1), g[i])
        weight = estimate(y + (np.arange(n) == i)) - estimate(y)  # the estimate is linear in the effects
        np.testing.assert_allclose(sample.residuals[i, 0], missed * n * weight)
        np.testing.assert_allclose(sample.residuals[i, 1], effects[i, 1] - effects[others, 1].mean())
    plain = Sample.of(effects, None, None, n_all)
    assert not plain.controlled.any()
    assert plain.df == n - 1
    np.testing.assert_array_equal(plain.mean, effects.mean(0))


@pytest.mark.parametrize(("n", "controlled"), [(3, False), (4, True)])
def test_three_sequences_are_too_few_for_a_slope(n: int, controlled: bool) -> None:
    known = np.array([[0.0], [1.0], [2.0], [4.0]] * 3)
    effects = 5 * known[:n] + np.array([[0.1], [-0.1], [0.1], [-0.1]])[:n]
    assert Sample.of(effects, known[:n], known, 12).controlled.tolist() == [controlled]


@pytest.mark.parametrize(("share", "claimed"), [(0.45, False), (0.55, True)])
def test_a_sample_with_less_than_half_of_the_variance_claims_nothing(share: float, claimed: bool) -> None:
    drawn, rest = np.array([[-1.0], [1.0]] * 4), np.array([[-1.0], [1.0]] * 10)
    whole = np.concatenate([np.sqrt(20 * share / (28 - 8 * share)) * drawn, rest])
    assert whole[:8].var() / whole.var() == pytest.approx(share)
    for scale in (1.0, 100.0):
        sample = Sample.of(drawn * 0.1 + 3, scale * whole[:8], scale * whole, 28)
        assert np.isfinite(sample.interval(0.05)).all() == claimed


def plain_wealth(values: list[float], null: float, low: float, width: float, n: int) -> float:
    """One bet against one claim, as the documentation of `wealth` has it."""
    now = most = 1.0
    for t, x in enumerate(values):
        left = (n * null - sum(values[:t])) / (n - t)  # what the claim leaves to those not drawn
        if left <= low:
            return np.inf
        guesses = [(sum(values[:i]) + null) / (i + 1) for i in range(t + 1)]
        squares = [(value - guess) ** 2 for value, guess in zip(values[:t], guesses[:t], strict=True)]
        variance = (width**2 / 4 + sum(squares)) / (t + 1)
        ahead = guesses[t] - left
        now *= 1 + min(max(ahead / (variance + ahead**2), 0), 0.75 / (left - low)) * (x - left)
        most = max(most, now)
    drawn = len(values)
    return np.inf if (n * null - sum(values)) / max(n - drawn, 1) < low else most


def test_wealth_is_that_of_one_bet_after_the_other() -> None:
    rng = np.random.default_rng(4)
    for n_drawn, n, null, low, width in (
        (20, 50, 0.3, -0.2, 1.7),
        (20, 20, 0.6, 0.0, 1.0),
        (1, 3, 0.4, 0.0, 2.0),
        (12, 15, 0.1, 0.0, 1.0),  # impossible: too much has been drawn
        (30, 90, 0.75, 0.0, 1.0),  # never ahead
    ):
        values = rng.random((n_drawn, 3)) * [1, 0.8, 0.9]
        expected = [plain_wealth(column.tolist(), null, low, width, n) for column in values.T]
        np.testing.assert_allclose(wealth(values, null, low, width, n), expected)
    ones = np.ones(
        (2, 1)
    )  # of four values from 0 on: their mean may be 0.5, if the others are 0, and no less
    assert np.isfinite(wealth(ones, 0.5, 0.0, 1.0, 4)).all()
    assert np.isinf(wealth(ones, 0.49, 0.0, 1.0, 4)).all()


@pytest.mark.parametrize("max_sequences", [None, 20])
@pytest.mark.parametrize("rank_by", ["magnitude", "increase"])
def test_the_error_probability_is_shared_by_claims_looks_and_sides(
    rank_by: str, max_sequences: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, set[float]] = {"exceeds": set(), "interval": set()}
    exceeds, interval = Sample.exceeds, Sample.interval

    def noted_exceeds(self: Sample, mine: Any, theirs: float, alpha: float) -> Any:
        asked["exceeds"].add(alpha)
        return exceeds(self, mine, theirs, alpha)

    def noted_interval(self: Sample, alpha: float) -> Any:
        asked["interval"].add(alpha)
        return interval(self, alpha)

    monkeypatch.setattr(Sample, "exceeds", noted_exceeds)
    monkeypatch.setattr(Sample, "interval", noted_interval)
    table = table_of("shared", 60, 0)
    found = run(table, k=3, rank_by=rank_by, level=0.9, max_sequences=max_sequences)
    looks = 2 if max_sequences else 4  # rounds of 16, 24, 36 and 54; all 60 are exact
    assert len(found.sizes) <= looks + 1
    sides = {"magnitude": 2, "increase": 1}[rank_by]
    assert [*asked["exceeds"]] == [pytest.approx(0.1 / (3 * 9 * looks * sides))]
    assert [*asked["interval"]] == [pytest.approx(0.1 / (2 * 12 * looks))]


def test_bets_are_shared_by_claims_and_sides_alone_as_they_may_be_looked_at_any_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(0)
    table = rng.random((40, 4))
    found = run(table, k=1, level=0.9, interval="betting", bounds=(0, 1), max_sequences=30)
    rows = np.flatnonzero(np.isfinite(found.effects[:, 0]))
    order = np.random.default_rng(0).permutation(40)[:30]
    assert sorted(order.tolist()) == rows.tolist()
    low, high = betting_interval(table[order], (0, 1), 40, 0.1 / (2 * 4))
    open_ = found.used == 30
    assert open_.any()
    np.testing.assert_allclose(found.low[open_], low[open_])
    np.testing.assert_allclose(found.high[open_], high[open_])


def test_bets_take_no_estimates() -> None:
    table = np.random.default_rng(0).random((60, 4))
    options: dict[str, Any] = {"k": 1, "interval": "betting", "bounds": (0, 1)}
    found, alone = run(table, known=table, **options), run(table, **options)
    assert not found.controlled.any()
    np.testing.assert_array_equal(found.estimate, alone.estimate)
    np.testing.assert_array_equal(found.low, alone.low)
    assert run(table, k=1, known=table).controlled.any()


def test_what_is_decided_is_what_every_possible_ranking_has_in_common(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Components surely differ if their means do by more than 1: all rankings that agree are tried."""

    def by_more_than_one(self: Sample, mine: Any, theirs: float, alpha: float) -> Any:
        return np.subtract.outer(mine * self.mean, theirs * self.mean) > 1

    monkeypatch.setattr(Sample, "exceeds", by_more_than_one)
    seen = set()
    for seed in range(12):
        means = np.random.default_rng(seed).uniform(0, 3, 5)
        rankings = [
            order
            for order in permutations(range(5))
            if not any(means[b] - means[a] > 1 for a, b in combinations(order, 2))
        ]
        for k in (1, 2, 4):
            found = run(np.tile(means, (40, 1)), k, max_sequences=16, rank_by="increase")
            for i, status in enumerate(found.status):
                among = {i in order[:k] for order in rankings}
                expected = "undecided" if len(among) > 1 else "in" if among == {True} else "out"
                assert status == expected
                assert found.by[i] == ("" if expected == "undecided" else "interval")
                seen.add(status)
    assert seen == {"in", "out", "undecided"}


def test_two_sequences_are_enough_for_a_test_and_one_is_not() -> None:
    effects = np.array([[9.0, 0.0], [9.1, 0.1]])
    two, one = (Sample.of(effects[:n], None, None, 50) for n in (2, 1))
    assert two.exceeds(np.ones(2), 1.0, 0.01).tolist() == [[False, True], [False, False]]
    assert not one.exceeds(np.ones(2), 1.0, 0.01).any()
    half = stats.t.isf(0.1, 1) * 0.1 * np.sqrt(48 / 50)  # residuals, each less the other, are -0.1 and 0.1
    np.testing.assert_allclose(two.interval(0.1), [[9.05 - half, 0.05 - half], [9.05 + half, 0.05 + half]])
    assert np.isnan(one.interval(0.1)).all()


def test_a_control_variate_saves_cells_and_is_off_where_it_does_not_help() -> None:
    plain, with_known, biased = [], [], []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        table = MEANS * rng.gamma(4, 0.25, (150, 1)) + rng.normal(0, 0.5, (150, len(MEANS)))
        known = 3 + 0.1 * (table + rng.normal(0, 0.1, table.shape))  # another scale, and shifted
        noise = rng.normal(0, 1, table.shape)
        plain.append(run(table, seed=seed))
        with_known.append(run(table, seed=seed, known=known))
        off = run(table, seed=seed, known=noise)
        assert off.controlled.mean() < 0.6
        if seed < 10:
            assert chosen(run(table, seed=seed, known=np.zeros_like(table))) == chosen(plain[-1])
        n = with_known[-1].used < 150
        biased.append((with_known[-1].estimate - table.mean(0))[n])
    assert all(found.controlled.all() for found in with_known)
    assert sum(f.cells for f in with_known) < 0.75 * sum(f.cells for f in plain)
    errors = np.concatenate(biased)
    assert abs(errors.mean()) < 3 * errors.std() / np.sqrt(len(errors))


def test_gradients_show_that_a_sample_lacks_the_rare_sequences() -> None:
    """What t alone cannot know: some sequences still to come are unlike all that ran."""
    wrong = {"plain": 0, "known": 0}
    for seed in range(20):
        rng = np.random.default_rng(seed)
        table = rng.normal([0.1, 0.0], 0.01, (200, 2))
        table[rng.permutation(200)[:4], 0] -= 8
        known = 0.1 * table + rng.normal(0, 0.01, table.shape)
        for name, estimates in (("plain", None), ("known", known)):
            wrong[name] += chosen(run(table, 1, seed, rank_by="increase", known=estimates)) != {1}
    assert wrong["plain"] > 5
    assert wrong["known"] == 0


def test_nothing_is_claimed_where_a_sample_is_unlike_the_rest() -> None:
    effects = np.random.default_rng(0).normal([5.0, 0.0, 0.0], 0.1, (40, 3))
    whole = np.random.default_rng(1).normal(0, 1, (100, 3))
    whole[50, 0] = 50.0  # not among the drawn
    sample = Sample.of(effects, whole[:40], whole, 100)
    assert not sample.exceeds(np.ones(3), 1.0, 0.05)[0].any()
    low, high = sample.interval(0.05)
    assert np.isinf([low[0], high[0]]).all()
    assert np.isfinite([low[1:], high[1:]]).all()
    assert Sample.of(effects, None, None, 100).exceeds(np.ones(3), 1.0, 0.05)[0, 1:].all()


def test_a_slope_that_one_sequence_decides_is_not_trusted() -> None:
    effects = np.random.default_rng(0).normal(0, 1, (10, 1))
    known = np.zeros((10, 1))
    known[0], effects[0] = 1.0, 5.0  # the slope through one point predicts nothing of it
    sample = Sample.of(effects, known, np.tile(known, (10, 1)), 100)
    assert not sample.controlled.any()
    assert sample.mean[0] == effects.mean()


def test_everything_run_is_exact() -> None:
    table = np.random.default_rng(0).normal(0, 1, (40, 10)) + np.linspace(0, 0.02, 10)
    found = run(table, k=4)
    assert found.cells > 0.9 * table.size
    assert chosen(found) == top_of(table, 4)
    done = found.used == 40
    assert set(found.by[done]) == {"all sequences"}
    np.testing.assert_allclose(found.estimate[done], table.mean(0)[done])
    assert (found.low[done] == found.high[done]).all()


def test_every_cell_is_asked_for_once() -> None:
    table, asked = table_of("shared", 150, 0), np.zeros((150, len(MEANS)), int)

    def source(rows: np.ndarray, parts: np.ndarray) -> np.ndarray:
        asked[np.ix_(rows, parts)] += 1
        return table[np.ix_(rows, parts)]

    found = race(source, 150, len(MEANS), RaceOptions(3), seed=5)
    assert asked.max() == 1
    assert found.cells == asked.sum()
    np.testing.assert_array_equal(np.isfinite(found.effects), asked == 1)
    np.testing.assert_array_equal(found.effects[asked == 1], table[asked == 1])
    np.testing.assert_array_equal(found.used, asked.sum(0), strict=True)
    assert len(found.running) == len(found.sizes)
    assert sum(m * n for m, n in zip(found.running, np.diff([0, *found.sizes]), strict=True)) == found.cells


def test_accepted_components_run_on_for_equal_widths() -> None:
    table = table_of("shared", 200, 3)
    early, equal = run(table, seed=1), run(table, seed=1, equal_width=True)
    assert chosen(early) == chosen(equal)
    assert len(set(early.used[early.status == "in"])) > 1
    assert set(equal.used[equal.status == "in"]) == {equal.sizes[-1]}
    assert early.cells < equal.cells < table.size


def test_too_few_sequences_leave_the_rest_undecided() -> None:
    table = table_of("shared", 200, 0)
    found = run(table, max_sequences=20)
    assert found.sizes == [16, 20]
    assert found.used.max() == 20
    open_ = chosen(found, "undecided")
    assert open_
    assert set(found.by[list(open_)]) == {""}
    assert len(chosen(found)) < 3
    assert (found.low < found.high).all()


@pytest.mark.parametrize("value", [0.0, -1.5])
def test_equal_effects_are_a_tie_in_their_order(value: float) -> None:
    found = run(np.full((30, 5), value), k=2)
    assert found.status.tolist() == ["in", "in", "out", "out", "out"]
    assert set(found.by) == {"tie"}
    assert found.cells == 150


@pytest.mark.parametrize(("k", "tied"), [(1, []), (2, [1, 2]), (3, []), (4, [3, 4]), (5, []), (9, [])])
def test_only_what_is_equal_at_the_border_is_a_tie(k: int, tied: list[int]) -> None:
    found = run(np.tile([3.0, -2.0, 2.0, 1.0, 1.0], (16, 1)), k=k)
    assert chosen(found) == set(range(min(k, 5)))
    assert np.flatnonzero(found.by == "tie").tolist() == tied
    assert set(found.by) <= {"tie", "all sequences"}
    assert run(np.tile([2.0, 2.0, 1.0], (16, 1)), k=1).by.tolist() == ["tie", "tie", "all sequences"]


def test_k_of_all_components_or_more_takes_one_round() -> None:
    for k in (12, 50):
        found = run(table_of("shared", 100, 0), k=k)
        assert chosen(found) == set(range(12))
        assert found.cells == 12 * 16


def test_one_sequence_and_one_component() -> None:
    found = run(np.array([[3.0, -5.0, 1.0]]), k=1)
    assert chosen(found) == {1}
    assert found.estimate.tolist() == [3.0, -5.0, 1.0]
    alone = run(np.ones((50, 1)), k=1)
    assert (chosen(alone), alone.cells) == ({0}, 16)


def test_a_component_with_nan_is_left_out_of_the_ranking() -> None:
    table = table_of("shared", 120, 0)
    table[:, 0] = np.nan  # would be the best
    table[60, 1] = np.inf
    found = run(table, k=2)
    assert found.status[0] == "undefined"
    assert np.isnan([found.estimate[0], found.low[0], found.high[0]]).all()
    assert found.used[0] == 16
    assert chosen(found) - {1} == {2, 3} - (set() if found.status[1] == "undefined" else {3})
    assert chosen(run(np.full((20, 3), np.nan), k=1)) == set()


def test_another_seed_is_another_order() -> None:
    table = table_of("shared", 150, 0)
    first, again, other = (run(table, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.effects, again.effects)
    assert (np.isnan(first.effects) != np.isnan(other.effects)).any()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"k": 0}, "k=0"),
        ({"k": True}, "k=True"),
        ({"k": 1.5}, "k=1.5"),
        ({"first": 1}, "first=1"),
        ({"max_sequences": 0}, "max_sequences=0"),
        ({"growth": 1.0}, "growth=1.0"),
        ({"growth": "twice"}, "growth='twice'"),
        ({"growth": float("nan")}, "growth=nan"),
        ({"interval": "betting", "bounds": 3}, "least effect first"),
        ({"level": 1.0}, "level"),
        ({"rank_by": "size"}, "rank_by"),
        ({"interval": "z"}, "interval"),
        ({"interval": "betting"}, "bounds"),
        ({"bounds": (-1, 1)}, "betting"),
        ({"interval": "betting", "bounds": (1, -1)}, "least effect first"),
    ],
)
def test_impossible_rules_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        RaceOptions(**{"k": 1, **options})


def test_bounds_that_an_effect_exceeds_are_refused() -> None:
    with pytest.raises(OptionError, match=r"bounds=\(-1, 1\).*-2"):
        run(np.full((20, 2), -2.0), interval="betting", bounds=(-1, 1))
    with pytest.raises(OptionError, match=r"bounds=\(-1, 1\).*2"):
        run(np.full((20, 2), 2.0), interval="betting", bounds=(-1, 1))
    ends = np.array([[-1.0, 1.0]] * 20)  # which are possible themselves
    assert chosen(run(ends, k=1, interval="betting", bounds=(-1, 1), rank_by="increase")) == {1}


def test_nothing_to_rank_is_refused() -> None:
    with pytest.raises(EmptySetError, match="0 sequences"):
        run(np.zeros((0, 3)))
