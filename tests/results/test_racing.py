"""Races for the top k: the answer against the whole table, its errors, its cost, and what it cannot see."""

from __future__ import annotations

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
    assert found.used.tolist() == asked.sum(0).tolist()
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


def test_nothing_to_rank_is_refused() -> None:
    with pytest.raises(EmptySetError, match="0 sequences"):
        run(np.zeros((0, 3)))
