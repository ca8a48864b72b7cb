"""`Estimate` in words, rows and back, and the rule that one or two sequences give no interval."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from scipy import stats

from memlens.results.result import Result
from memlens.results.statistics.estimates import (
    Estimate,
    chosen_site,
    mean_estimate,
    median_estimate,
    ratio_estimate,
    share_estimate,
)
from memlens.results.statistics.intervals import METHODS, mean_interval


def test_an_estimate_is_read_from_what_mean_ci_gives() -> None:
    data = xr.Dataset({"m": (("sequence", "layer"), [[0.0, 1.0], [1.0, 3.0], [2.0, 5.0]])})
    ci = Result.create(data, kind="sweep").mean_ci(level=0.9)["m"]
    found = Estimate.of(ci.isel(layer=1))
    assert (found.value, found.n, found.level) == (3.0, 3, 0.9)
    assert [found.low, found.high] == ci.isel(layer=1).values[1:].tolist()
    assert found.text("nats") == f"3 nats (90 % interval {found.low:.3g} to {found.high:.3g})"


@pytest.mark.parametrize("name", ["n", "n_restored_share"])
def test_the_count_is_read_by_any_of_its_names(name: str) -> None:
    interval = mean_interval(xr.DataArray([1.0, 2.0, 4.0, 5.0], dims="sequence")).rename(n=name)
    assert Estimate.of(interval).n == 4
    assert Estimate.of(interval.drop_vars(name).assign_coords(other=7)).n == 0
    assert Estimate.of(interval.assign_coords(n_z=9)).n == 4  # the first of several
    del interval.attrs["level"]
    assert Estimate.of(interval).level == 0.95


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [1, 2])
def test_one_or_two_sequences_give_a_mean_without_an_interval(method: str, n: int) -> None:
    mean, low, high = mean_interval(xr.DataArray([1.0, 0.0][:n], dims="sequence"), method=method).values
    assert mean == 1 / n
    assert np.isnan([low, high]).all()
    three = mean_interval(xr.DataArray([1.0, 0.0, 1.0], dims="sequence"), method=method)
    assert np.isfinite(three).all()


def test_every_kind_of_estimate_says_why_there_is_no_interval() -> None:
    one, two = (xr.DataArray(values, dims="sequence") for values in ([0.5], [1.0, 0.0]))
    assert mean_estimate(one).text("nats") == "0.5 nats (no interval: one sequence is too few)"
    assert share_estimate(two).text() == "0.5 (no interval: 2 sequences are too few)"
    assert ratio_estimate(two, two).text() == "1 (no interval: 2 sequences are too few)"
    assert median_estimate(two.values).text(units="models") == "0.5 (no interval: 2 models are too few)"
    assert Estimate.unknown(4).text() == "not known"
    assert Estimate(0.5, n=9).text() == "0.5 (no interval)"
    assert str(Estimate(0.5, n=9)) == "0.5"
    assert str(Estimate(0.5, 0.25, 0.75, 9)) == "0.5 [0.25, 0.75]"


def test_a_row_is_read_back() -> None:
    found = Estimate(0.5, 0.25, 0.75, 9)
    row = found.row("share", prefix="share_", n="models")
    assert row == {"models": 9, "share": 0.5, "share_low": 0.25, "share_high": 0.75}
    assert Estimate.from_row(row, "share", prefix="share_", n="models") == found
    assert found.row("gap", n=None) == {"gap": 0.5, "low": 0.25, "high": 0.75}


def test_excluding_needs_an_interval() -> None:
    assert Estimate(1.0, 0.5, 2.0, 9).excludes(0)
    assert not Estimate(1.0, 0.5, 2.0, 9).excludes(0.5)
    assert not Estimate(1.0, n=1).excludes(0)


def test_the_median_s_interval_is_the_bootstrap_of_the_median() -> None:
    values = np.random.default_rng(0).normal(size=40)
    found = median_estimate(np.append(values, np.nan), seed=3)
    draws = np.median(np.random.default_rng(9).choice(values, (4000, 40)), axis=1)
    assert (found.value, found.n) == (np.median(values), 40)
    np.testing.assert_allclose([found.low, found.high], np.quantile(draws, [0.025, 0.975]), atol=0.08)
    assert median_estimate(np.full(5, 2.0)) == Estimate(2.0, 2.0, 2.0, 5)


def test_a_ratio_to_nothing_is_not_known() -> None:
    whole = xr.DataArray([1.0, -1.0, 0.5, -0.4], dims="sequence")
    assert ratio_estimate(xr.ones_like(whole), whole).text() == "not known"


def test_the_mean_s_interval_is_close_to_student_s() -> None:
    values = np.random.default_rng(1).normal(2, 1, 200)
    found = mean_estimate(xr.DataArray(values, dims="sequence"))
    expected = stats.t.interval(0.95, 199, values.mean(), stats.sem(values))
    np.testing.assert_allclose([found.low, found.high], expected, atol=0.03)


def test_the_chosen_site_has_the_smallest_mean_effect() -> None:
    values = np.array([[[3.0, 1.0, np.nan], [0.5, 4.0, -9.0]], [[3.0, 1.0, np.nan], [2.5, 0.0, 9.0]]])
    data = xr.Dataset(
        {"m": (("sequence", "layer", "head"), values), "m_baseline": ("sequence", [1.0, 1.0])},
        {"layer": [4, 7], "head": [0, 2, 5]},
    )
    result = Result.create(data, kind="sweep")
    assert chosen_site(result, "m", np.array([0])) == {"layer": 7, "head": 5}
    assert chosen_site(result, "m", np.array([1])) == {"layer": 7, "head": 2}
    assert chosen_site(result, "m", np.array([0, 1])) == {"layer": 7, "head": 5}
