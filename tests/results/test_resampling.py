from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import xarray as xr

import memlens as ml
from memlens.results.statistics import intervals, resampling
from memlens.results.statistics.estimates import median_estimate
from memlens.results.statistics.intervals import mean_interval
from memlens.results.statistics.resampling import EXACT_ROWS, bootstrap_means, resampled_sums


def _dense(table: np.ndarray, n_resamples: int, seed: int) -> np.ndarray:
    """All multinomial weights at once: the definition for sets of up to `EXACT_ROWS` rows."""
    rows = len(table)
    weights = np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), size=n_resamples)
    present = np.isfinite(table)
    return (weights @ np.where(present, table, 0.0)) / (weights @ present)


@pytest.mark.parametrize("holes", [False, True])
def test_portions_draw_what_one_draw_of_all_resamples_gives(
    holes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resampling, "_PORTION", 1000)
    rng = np.random.default_rng(1)
    table = rng.normal(size=(37, 4))
    if holes:
        table[rng.random(table.shape) < 0.3] = np.nan
    np.testing.assert_allclose(bootstrap_means(table, 101, 5), _dense(table, 101, 5), rtol=1e-12)


def test_a_generator_goes_on_after_the_resamples() -> None:
    table, ours, theirs = np.arange(12.0)[:, None], np.random.default_rng(3), np.random.default_rng(3)
    bootstrap_means(table, 40, ours)
    theirs.multinomial(12, np.full(12, 1 / 12), size=40)
    assert ours.random() == theirs.random()


def test_memory_does_not_grow_with_the_rows() -> None:
    peaks = []
    for rows in (EXACT_ROWS, 3 * EXACT_ROWS, 12 * EXACT_ROWS):
        table = np.random.default_rng(0).random((rows, 1))
        tracemalloc.start()
        bootstrap_means(table, 200, 0)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks) < 40 * 2**20  # all weights of the last would be 192 MB
    assert peaks[2] < 1.2 * peaks[1] + 2**20


def test_weights_of_many_rows_are_poisson_with_mean_one() -> None:
    rows, resamples = EXACT_ROWS + 7, 64
    drawn = np.full((resamples, rows), np.nan)
    for some, own, weights in resampling._weights(rows, resamples, 0):
        drawn[some, own] = weights
    counts = np.bincount(drawn.astype(int).reshape(-1), minlength=6)[:6] / drawn.size
    expected = np.exp(-1) / np.array([1, 1, 2, 6, 24, 120])
    assert (abs(counts - expected) < 4e-3 * np.sqrt(expected)).all()
    assert len(resampling._POISSON) == 2**16
    assert resampling._POISSON.mean() == 1
    assert resampling._POISSON.var() == pytest.approx(1, abs=5e-5)
    assert abs(np.corrcoef(drawn)[~np.eye(resamples, dtype=bool)]).max() < 0.06  # resamples are independent


def test_intervals_of_many_rows_agree_with_the_standard_error() -> None:
    values = np.random.default_rng(2).normal(5, 2, size=2 * EXACT_ROWS)
    values[::9] = np.nan
    found = mean_interval(xr.DataArray(values, dims="sequence"), method="bootstrap")
    n = np.isfinite(values).sum()
    half = 1.96 * np.nanstd(values) / np.sqrt(n)
    mean, low, high = found.values
    assert mean == pytest.approx(np.nanmean(values))
    assert (high - mean) / half == pytest.approx(1, abs=0.06)
    assert (mean - low) / half == pytest.approx(1, abs=0.06)


def test_sums_share_their_resamples() -> None:
    x = np.random.default_rng(0).random((20, 3))
    ours, twice = resampled_sums([x, 2 * x[:, :1]], 30, 0)
    np.testing.assert_allclose(twice, 2 * ours[:, :1], rtol=1e-12)


def _result(n: int) -> ml.Result:
    rng = np.random.default_rng(0)
    arrays = {name: (("sequence", "layer"), rng.random((n, 3))) for name in ("a", "b", "c")}
    arrays["hit"] = (("sequence", "layer"), rng.integers(0, 2, (n, 3)).astype(float))
    coords = {"sequence": np.arange(n).astype(str), "domain": ("sequence", np.arange(n) % 2)}
    return ml.Result.create(xr.Dataset(arrays, coords), kind="sweep")


@pytest.mark.parametrize("group", [None, "domain"])
def test_metrics_share_one_drawing_and_get_their_own_intervals(
    group: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawings = []
    weights = resampling._weights
    monkeypatch.setattr(resampling, "_weights", lambda *args: drawings.append(args) or weights(*args))
    monkeypatch.setattr(intervals, "_BLOCK_BYTES", 8 * 2000 * 9)
    result = _result(40)
    together = result.mean_ci(group=group)
    assert len(drawings) == (1 if group is None else 2)
    for name in result.metrics:
        alone = result.mean_ci(metric=name, group=group)[name]
        np.testing.assert_allclose(together[name], alone, rtol=1e-12)
        assert alone.attrs["interval_method"] == ("wilson" if name == "hit" else "bootstrap")


def test_blocks_of_sites_may_cut_a_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _result(30).mean_ci()
    monkeypatch.setattr(intervals, "_BLOCK_BYTES", 8 * 2000 * 2)
    xr.testing.assert_allclose(_result(30).mean_ci(), whole, rtol=1e-12)


def test_medians_of_many_values_are_resampled_in_portions() -> None:
    values = np.random.default_rng(0).random(20_001)
    tracemalloc.start()
    found = median_estimate(values)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 * 2**20  # all at once: more than 600 MB
    assert found.low < found.value < found.high
