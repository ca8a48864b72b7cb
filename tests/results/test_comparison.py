"""Comparisons of two groups: p values by enumeration, corrections by hand, independent draws."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from memlens.results.result import Result
from memlens.results.statistics.comparison import compare_groups, corrected
from memlens.results.statistics.intervals import mean_interval


def _group(values: list[float], **coords: object) -> Result:
    return Result.create(xr.Dataset({"m": ("sequence", values)}, coords), kind="recall")


def test_paired_p_is_the_share_of_signs_as_extreme() -> None:
    ids = ["a", "b", "c", "d"]
    first = _group([1.0, 2.0, 3.0, 4.0], sequence=ids)
    second = _group([0.0, 0.0, 0.0, 0.0], match=("sequence", ids))
    found = compare_groups(first, second, "m", n_permutations=20_000)
    assert found.attrs["paired"]
    assert float(found["p"]) == pytest.approx(2 / 16, abs=0.01)  # all signs alike, of 2^4


def test_unpaired_p_is_the_share_of_labelings_as_extreme() -> None:
    found = compare_groups(_group([10.0, 11.0]), _group([0.0, 1.0]), "m", n_permutations=20_000)
    assert float(found["p"]) == pytest.approx(2 / 6, abs=0.015)  # 2 of the 6 ways to choose two of four


def test_p_is_never_0() -> None:
    found = compare_groups(_group([100.0 + i for i in range(20)]), _group([float(i) for i in range(20)]), "m",
                           n_permutations=99)  # fmt: skip
    assert float(found["p"]) == pytest.approx(1 / 100)


def test_the_correction_is_benjamini_and_hochberg_s() -> None:
    p = np.array([0.04, 0.01, np.nan, 0.02])
    np.testing.assert_allclose(corrected(p), [0.04, 0.03, np.nan, 0.03])  # min over j >= i of p_j * 3 / j


def test_unpaired_groups_are_resampled_with_draws_of_their_own() -> None:
    values = np.random.default_rng(0).normal(size=40).tolist()
    found = compare_groups(_group(values), _group(values), "m")
    assert float(found["difference"]) == 0
    expected = 2 * 1.96 * np.std(values) * np.sqrt(2 / 40)
    assert float(found["high"] - found["low"]) == pytest.approx(expected, rel=0.1)


def test_the_seed_decides_the_resamples() -> None:
    values = xr.DataArray(np.random.default_rng(0).normal(size=30), dims="sequence")
    assert mean_interval(values, seed=1).equals(mean_interval(values, seed=1))
    assert not mean_interval(values, seed=1).equals(mean_interval(values, seed=2))
