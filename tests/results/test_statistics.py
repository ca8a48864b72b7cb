from __future__ import annotations

import warnings

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from memlens.errors import OptionError, ResultError
from memlens.results.statistics.intervals import is_binary, mean_interval, quantile_interval, ratio_interval
from memlens.results.statistics.resampling import bootstrap_means, weighted_means
from memlens.results.statistics.tradeoff import removed_share


def _array(values: np.ndarray) -> xr.DataArray:
    return xr.DataArray(values, dims=("sequence", "layer")[: values.ndim])


def test_bootstrap_agrees_with_scipy() -> None:
    values = np.random.default_rng(0).gamma(2.0, size=60)
    ours = mean_interval(_array(values), method="bootstrap", n_resamples=20_000)
    theirs = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20_000, rng=1
    ).confidence_interval
    assert float(ours.sel(statistic="mean")) == pytest.approx(values.mean())
    spread = theirs.high - theirs.low
    assert float(ours.sel(statistic="low")) == pytest.approx(theirs.low, abs=0.03 * spread)
    assert float(ours.sel(statistic="high")) == pytest.approx(theirs.high, abs=0.03 * spread)


def test_t_interval_is_scipys() -> None:
    values = np.random.default_rng(0).normal(size=(15, 3))
    ours = mean_interval(_array(values), method="t", level=0.9)
    for layer in range(3):
        theirs = stats.ttest_1samp(values[:, layer], 0).confidence_interval(0.9)
        assert ours[1:, layer].values == pytest.approx([theirs.low, theirs.high])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.booleans(), min_size=3, max_size=40), st.sampled_from([0.5, 0.9, 0.95]))
def test_auto_is_wilson_for_hits(hits: list[bool], level: float) -> None:
    ours = mean_interval(xr.DataArray(hits, dims="sequence"), level=level)
    low, high = proportion_confint(sum(hits), len(hits), alpha=1 - level, method="wilson")
    assert ours.attrs["interval_method"] == "wilson"
    assert ours.values == pytest.approx([np.mean(hits), low, high], abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 12), st.integers(1, 5), st.data())
def test_nan_is_skipped_as_if_absent(n: int, layers: int, data: st.DataObject) -> None:
    values = np.random.default_rng(n).normal(size=(n, layers))
    missing = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    values[missing, 0] = np.nan
    ours = mean_interval(_array(values), method="t")
    alone = mean_interval(_array(values[~missing, :1]), method="t")
    np.testing.assert_allclose(ours[:, 0].values, alone[:, 0].values)
    assert ours["n"].values.tolist() == [int((~missing).sum())] + [n] * (layers - 1)


def test_bootstrap_skips_nan() -> None:
    values = np.random.default_rng(0).normal(size=(40, 2))
    values[::2, 0] = np.nan
    ours = mean_interval(_array(values), n_resamples=20_000)
    theirs = stats.bootstrap((values[1::2, 0],), np.mean, method="percentile", n_resamples=20_000, rng=2)
    np.testing.assert_allclose(ours[1:, 0].values, theirs.confidence_interval, atol=0.04)


def test_sites_share_resamples_so_order_does_not_matter() -> None:
    values = np.random.default_rng(0).normal(size=(20, 4))
    whole = mean_interval(_array(values))
    turned = mean_interval(_array(values[:, ::-1]))
    np.testing.assert_array_equal(whole.values[:, ::-1], turned.values)


def test_blocks_of_sites_do_not_change_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    values = _array(np.random.default_rng(0).normal(size=(20, 7)))
    whole = mean_interval(values)
    monkeypatch.setattr("memlens.results.statistics.intervals._BLOCK_BYTES", 8 * 2000 * 3)
    np.testing.assert_allclose(mean_interval(values).values, whole.values)


def test_bootstrap_covers() -> None:
    rng = np.random.default_rng(0)
    values = xr.DataArray(rng.exponential(size=(50, 400)), dims=("sequence", "layer"))
    found = mean_interval(values, n_resamples=500)
    covered = ((found[1] <= 1) & (found[2] >= 1)).mean()
    assert 0.88 < float(covered) < 0.97


def test_too_few_values_have_no_interval() -> None:
    values = np.array([[1.5, np.nan], [np.nan, np.nan]])
    for method in ("bootstrap", "t"):
        found = mean_interval(_array(values), method=method)
        assert found[0, 0] == 1.5
        assert np.isnan(found[1:, 0]).all()
        assert np.isnan(found[:, 1]).all()


def test_resample_weights_keep_the_mean() -> None:
    assert np.abs(bootstrap_means(np.full((9, 2), 3.0), 50, 0) - 3).max() < 1e-12


def test_no_sequences_give_nan() -> None:
    found = mean_interval(xr.DataArray(np.zeros((0, 3)), dims=("sequence", "layer")))
    assert found.shape == (3, 3)
    assert np.isnan(found).all()
    assert found["n"].values.tolist() == [0, 0, 0]


def test_binary_needs_values() -> None:
    assert not is_binary(np.array([np.nan]))
    assert not is_binary(np.array([], dtype=bool))
    assert is_binary(np.array([True]))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "bayes"}, OptionError, "method='bayes'.*'bootstrap', 'wilson'"),
        ({"level": 95}, OptionError, "95"),
        ({"method": "wilson"}, OptionError, "0 or 1"),
        ({"dim": "head"}, ResultError, "'head'"),
    ],
)
def test_bad_options(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mean_interval(_array(np.array([0.5, 2.0])), **options)  # type: ignore[arg-type]


def test_columns_without_values_have_no_interval() -> None:
    low, high = quantile_interval(np.full((5, 3), np.nan), 0.95, 5)
    assert np.isnan(low).tolist() == np.isnan(high).tolist() == [True] * 3


def test_sites_of_few_values_have_a_mean_and_neither_end_of_an_interval() -> None:
    values = np.array([[1.0, 0.0, 1.0], [0.0, np.nan, 0.0], [1.0, 1.0, 1.0], [1.0, np.nan, np.nan]])
    for method in ("wilson", "bootstrap", "t"):
        found = mean_interval(_array(values), method=method)
        assert found["n"].values.tolist() == [4, 2, 3]
        np.testing.assert_allclose(found[0], [0.75, 0.5, 2 / 3])
        assert np.isnan(found[1:]).values.tolist() == [[False, True, False]] * 2
    ratio = ratio_interval(_array(values), _array(values + 1))
    assert ratio["n"].values.tolist() == [4, 2, 3]
    np.testing.assert_allclose(ratio[0], [3 / 7, 1 / 3, 2 / 5])
    assert np.isnan(ratio[1:]).values.tolist() == [[False, True, False]] * 2


def test_nothing_measured_gives_no_number_and_no_warning() -> None:
    nothing = _array(np.full((4, 2), np.nan))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for method in ("auto", "bootstrap", "t"):
            assert np.isnan(mean_interval(nothing, method=method)).all()
        assert np.isnan(ratio_interval(nothing, nothing)).all()
        assert np.isnan(bootstrap_means(nothing.values, 5, 0)).all()
        assert np.isnan(weighted_means(np.ones((1, 4)), nothing.values)).all()
        assert np.isnan(removed_share(np.array([[0.0, 1.0], [-1.0, 0.0]]))).all()
