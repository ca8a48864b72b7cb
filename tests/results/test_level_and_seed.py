"""Every interval heeds its level and its seed, and rests on as many resamples as asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import xarray as xr
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

import memlens as ml
from memlens.errors import OptionError
from memlens.results.statistics.agreement import (
    agreement,
    rank_correlation,
    roc_area,
    share_interval,
    standard_interval,
)
from memlens.results.statistics.comparison import compare_groups
from memlens.results.statistics.estimates import mean_estimate, median_estimate, ratio_estimate
from memlens.results.statistics.intervals import halves, mean_interval, ratio_interval, wilson_interval
from memlens.results.statistics.resampling import weighted_means
from memlens.results.statistics.tasks import task_summary
from memlens.results.statistics.tradeoff import edit_tradeoff, join_frontier
from tests.results.test_tradeoff import recall_result, task_result

RNG = np.random.default_rng(0)
N = 80
VALUES, OTHERS = RNG.normal(1, 1, N), RNG.normal(0.5, 1, N)
IDS = [f"s{i}" for i in range(N)]
LABELS = np.arange(N) % 2 == 0
RECALL = recall_result((RNG.random((N, 3)) < 0.5).tolist(), [1.0] * N)
ANSWERS = {
    name: (group, 0.25, (RNG.random((N, 3)) < 0.6).tolist(), (RNG.random(N) < 0.9).tolist())
    for name, group in (("a", "language"), ("b", "reasoning"), ("c", "reasoning"))
}
ACCURACY = task_result(ANSWERS)


def _ends(interval: tuple[Any, Any]) -> list[float]:
    return [float(end) for end in interval]


def _width(interval: tuple[Any, Any]) -> float:
    low, high = _ends(interval)
    return high - low


def _array(values: np.ndarray) -> xr.DataArray:
    return xr.DataArray(values, dims="sequence")


def _group(values: np.ndarray, **coords: Any) -> ml.Result:
    return ml.Result.create(xr.Dataset({"m": ("sequence", values)}, coords), kind="recall")


def _compared(pairs: bool, **options: Any) -> tuple[Any, Any]:
    link = {"match": ("sequence", IDS)} if pairs else {}
    found = compare_groups(
        _group(VALUES, sequence=IDS), _group(OTHERS, **link), "m", n_permutations=9, **options
    )
    return found["low"], found["high"]


def _summary(name: str, **options: Any) -> tuple[Any, Any]:
    table = task_summary(ACCURACY, **options).set_index(["name", "layer", "measure"]).sort_index()
    return table.loc[(name, 1, "accuracy"), "low"], table.loc[(name, 1, "accuracy"), "high"]


def _area(level: float = 0.95, **options: Any) -> tuple[float, float]:
    return edit_tradeoff(RECALL, ACCURACY, **options).area(level=level)[1:]


def _removed(name: str, level: float = 0.95, **options: Any) -> tuple[Any, Any]:
    table = edit_tradeoff(RECALL, ACCURACY, **options).table(level=level)
    return table[f"{name}_low"][1], table[f"{name}_high"][1]


def _kappa(name: str, **options: Any) -> tuple[float, float]:
    found = agreement(VALUES > 1, OTHERS > 0.5, **options)
    return found[f"{name}_low"], found[f"{name}_high"]


def _roc(**options: Any) -> tuple[float, float]:
    found = roc_area(VALUES + LABELS, LABELS, method="bootstrap", **options)
    return found.low, found.high


def _frontier(scope: str, **options: Any) -> tuple[Any, Any]:
    found = join_frontier({"m": (RECALL, ACCURACY)}, **options).data.sel(scope=scope, site="m: 1")
    return found["accuracy_low"], found["accuracy_high"]


DRAWN: dict[str, Callable[..., tuple[Any, Any]]] = {
    "mean": lambda **options: mean_interval(_array(VALUES), **options).values[1:],
    "ratio": lambda **options: ratio_interval(_array(VALUES), _array(OTHERS + 2), **options).values[1:],
    "difference of pairs": lambda **options: _compared(True, **options),
    "difference of groups": lambda **options: _compared(False, **options),
    "accuracy of a task": lambda **options: _summary("a", **options),
    "accuracy of a group": lambda **options: _summary("reasoning", **options),
    "area": _area,
    "removed": lambda **options: _removed("removed", **options),
    "cost": lambda **options: _removed("cost", **options),
    "selectivity": lambda **options: _removed("selectivity", **options),
    "kappa": lambda **options: _kappa("kappa", **options),
    "precision": lambda **options: _kappa("precision", **options),
    "ROC": _roc,
    "frontier of a task": lambda **options: _frontier("b", **options),
    "frontier of a group": lambda **options: _frontier("reasoning", **options),
}
COMPUTED: dict[str, Callable[..., tuple[Any, Any]]] = {
    "t": lambda level: mean_interval(_array(VALUES), method="t", level=level).values[1:],
    "wilson": lambda level: mean_interval(_array(LABELS), level=level).values[1:],
    "wilson of counts": lambda level: wilson_interval(40, 80, level),
    "delong": lambda level: (lambda a: (a.low, a.high))(roc_area(VALUES + LABELS, LABELS, level=level)),
    "share": lambda level: share_interval(400, 800, level),
    "standard": lambda level: standard_interval(0.0, VALUES / 10, level, -1.0, len(VALUES)),
}


@pytest.mark.parametrize("what", DRAWN)
def test_the_seed_decides_the_draws_and_the_level_the_width(what: str) -> None:
    interval = DRAWN[what]
    first, again, other = (_ends(interval(seed=seed)) for seed in (3, 3, 4))
    assert first == again
    assert first != other
    assert first != _ends(interval(seed=3, n_resamples=60))
    wide, narrow = (_width(interval(level=level)) for level in (0.95, 0.5))
    # a normal distribution's ratio of widths; draws of few hits are coarse
    assert narrow / wide == pytest.approx(stats.norm.ppf(0.75) / stats.norm.ppf(0.975), abs=0.08)


@pytest.mark.parametrize("what", COMPUTED)
def test_computed_intervals_heed_the_level(what: str) -> None:
    wide, narrow = (_width(COMPUTED[what](level)) for level in (0.95, 0.5))
    assert narrow / wide == pytest.approx(stats.norm.ppf(0.75) / stats.norm.ppf(0.975), abs=0.02)


def test_a_ratio_s_interval_is_named_a_bootstrap() -> None:
    found = ratio_interval(_array(VALUES), _array(OTHERS + 2), level=0.9)
    assert found.attrs == {"interval_method": "bootstrap", "level": 0.9}
    assert found["n"] == N


def test_estimates_take_the_seed() -> None:
    for seed in (1, 2):
        expected = mean_interval(_array(VALUES), method="bootstrap", seed=seed)
        assert [mean_estimate(_array(VALUES), seed=seed).low] == expected.values[1:2].tolist()
        expected = ratio_interval(_array(VALUES), _array(OTHERS + 2), seed=seed)
        assert [ratio_estimate(_array(VALUES), _array(OTHERS + 2), seed=seed).low] == expected[
            1:2
        ].values.tolist()
    medians = {median_estimate(VALUES, seed=seed).low for seed in (1, 1, 2, 3)}
    assert len(medians) > 1
    assert median_estimate(VALUES, seed=2) == median_estimate(VALUES, seed=2)
    assert [half.tolist() for half in halves(N, 1)] == [half.tolist() for half in halves(N, 1)]
    assert halves(N, 1)[0].tolist() != halves(N, 2)[0].tolist()


@pytest.mark.parametrize("pairs", [False, True])
def test_the_seed_decides_the_permutations(pairs: bool) -> None:
    link = {"match": ("sequence", IDS)} if pairs else {}
    groups = _group(VALUES, sequence=IDS), _group(OTHERS + 0.4, **link)
    p = [float(compare_groups(*groups, "m", n_permutations=4999, seed=seed)["p"]) for seed in (1, 1, 2, 3)]
    assert p[0] == p[1]
    assert len(set(p)) > 1
    test = stats.ttest_rel(VALUES, OTHERS + 0.4) if pairs else stats.ttest_ind(VALUES, OTHERS + 0.4)
    assert p == pytest.approx([test.pvalue] * 4, rel=0.15)


@pytest.mark.parametrize("level", [0.0, 1.0, -0.1, 95])
def test_a_level_outside_0_to_1_is_refused(level: float) -> None:
    for interval in (mean_interval, lambda values, level: roc_area(values, LABELS, level=level)):
        with pytest.raises(OptionError, match="is not a coverage"):
            interval(_array(VALUES), level=level)
    with pytest.raises(OptionError, match="is not a coverage"):
        task_summary(ACCURACY, level=level)


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_the_share_s_interval_is_clopper_and_pearson_s(level: float) -> None:
    for n in (1, 7, 30):
        for hits in range(n + 1):
            expected = proportion_confint(hits, n, alpha=1 - level, method="beta")
            np.testing.assert_allclose(
                share_interval(hits, n, level), np.nan_to_num(expected, nan=[0, 1][hits > 0])
            )


def test_wilson_s_ends_of_none_and_all_are_exact() -> None:
    low, high = wilson_interval(np.array([0, 3, 11]), np.array([11, 11, 11]))
    assert low[0] == 0
    assert high[2] == 1
    expected = proportion_confint(3, 11, method="wilson")
    np.testing.assert_allclose([low[1], high[1]], expected)
    np.testing.assert_allclose([high[0], low[2]], [1 - low[2], 1 - high[0]])


def test_the_standard_interval_is_value_plus_minus_and_is_cut() -> None:
    samples = np.array([0.1, np.nan, 0.3, 0.8, np.inf])
    half = stats.norm.ppf(0.95) * np.std([0.1, 0.3, 0.8], ddof=1)
    assert standard_interval(0.2, samples, 0.9, -1.0, 9) == pytest.approx((0.2 - half, 0.2 + half))
    assert standard_interval(0.2, samples, 0.9, 0.0, 9)[0] == 0.0
    assert standard_interval(0.9, samples, 0.9, 0.0, 9)[1] == 1.0
    assert np.isfinite(standard_interval(0.2, samples[:3], 0.9, 0.0, 3)).all()
    assert np.isnan(standard_interval(0.2, samples, 0.9, 0.0, 2)).all()
    for value, drawn in ((np.nan, samples), (0.2, samples[:2]), (np.inf, samples)):
        assert np.isnan(standard_interval(value, drawn, 0.9, 0.0, 9)).all()


@pytest.mark.parametrize("sites", [3, 4, 9])
def test_rank_correlations_of_resamples_are_spearman_s(sites: int) -> None:
    a, b = np.random.default_rng(sites).integers(0, 6, (2, 2, 5, sites)).astype(float)
    a[0, 0], a[0, 0, 0], b[0, 0] = np.arange(sites), 7, np.arange(sites)
    a[1, 0, 1], b[1, 1, 0] = np.nan, np.inf
    found = rank_correlation(a, b)
    expected = np.full((2, 5), np.nan)
    for i in np.ndindex(2, 5):
        if np.isfinite(a[i]).all() and np.isfinite(b[i]).all() and np.ptp(a[i]) and np.ptp(b[i]):
            expected[i] = stats.spearmanr(a[i], b[i]).statistic
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert np.isnan(found[1, :2]).all()
    assert np.isfinite(found[0, 0])
    assert np.isnan(rank_correlation(a[..., :2], b[..., :2])).all()
    assert rank_correlation(a[..., :2], b[..., :2]).shape == (2, 5)


@pytest.mark.parametrize("holes", [False, True])
def test_weighted_means_are_numpy_s_over_what_is_there(holes: bool) -> None:
    rng = np.random.default_rng(0)
    table, weights = rng.normal(size=(9, 4)), rng.integers(0, 3, (5, 9)).astype(float)
    if holes:
        table[[0, 3, 3, 8], [1, 1, 2, 0]] = [np.nan, np.inf, np.nan, np.nan]
    expected = [
        [np.average(column[(k := np.isfinite(column))], weights=row[k]) for column in table.T]
        for row in weights
    ]
    np.testing.assert_allclose(weighted_means(weights, table), expected)
    assert np.isnan(weighted_means(np.zeros((1, 9)), table)).all()
