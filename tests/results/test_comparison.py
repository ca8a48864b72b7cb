"""Comparisons of two groups: p values by enumeration, corrections by hand, independent draws."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from memlens.errors import OptionError, ResultError
from memlens.results.result import Result
from memlens.results.statistics.comparison import compare_groups, corrected
from memlens.results.statistics.intervals import mean_interval
from memlens.results.statistics.strata import difference_within


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


@pytest.mark.parametrize("paired", [False, True])
def test_a_comparison_says_of_what_it_is(paired: bool) -> None:
    ids = [f"s{i}" for i in range(5)]
    link = {"match": ("sequence", ids[1:])} if paired else {}
    first, second = _group([1.0, 2.0, 4.0, 3.0, 9.0], sequence=ids), _group([0.0, 1.0, 1.5, 4.0], **link)
    found = compare_groups(first, second, "m", level=0.8, n_resamples=50, n_permutations=50)
    sizes = {"n_a": 4, "n_b": 4} if paired else {"n_a": 5, "n_b": 4}
    assert found.attrs == {"metric": "m", "of": "value", "level": 0.8, "paired": paired, **sizes}
    assert list(found) == ["difference", "low", "high", "p", "p_corrected"]
    assert float(found["difference"]) == pytest.approx((4.5 if paired else 3.8) - 1.625)
    assert float(found["p"]) == float(found["p_corrected"])  # of a single site


def test_of_an_effect_each_sequence_is_compared_with_its_own_baseline() -> None:
    def group(values: list[float], base: list[float]) -> Result:
        data = {"m": ("sequence", values), "m_baseline": ("sequence", base)}
        return Result.create(xr.Dataset(data), kind="sweep")

    first, second = group([1.0, 2.0, 3.0], [1.0, 1.0, 1.0]), group([5.0, 5.0, 8.0], [1.0, 2.0, 3.0])
    of_effects = compare_groups(first, second, "m", of="effect", n_resamples=50, n_permutations=50)
    assert float(of_effects["difference"]) == pytest.approx(1 - 4)
    assert of_effects.attrs["of"] == "effect"
    assert float(compare_groups(first, second, "m", n_resamples=50)["difference"]) == pytest.approx(-4)


def test_sites_without_a_value_have_no_p() -> None:
    values = np.array([[1.0, np.nan, 3.0], [2.0, np.nan, 5.0], [4.0, np.nan, np.nan]])
    first, second = (
        Result.create(xr.Dataset({"m": (("sequence", "layer"), part)}), kind="sweep")
        for part in (values, values[::-1] - 1)
    )
    paired = Result.create(second.data.assign_coords(match=("sequence", [2, 1, 0])), kind="sweep")
    named = Result.create(first.data.assign_coords(sequence=[0, 1, 2]), kind="sweep")
    for found in (compare_groups(first, second, "m"), compare_groups(named, paired, "m")):
        assert found["difference"].isnull().values.tolist() == [False, True, False]
        assert found["p"].isnull().values.tolist() == [False, True, False]
        assert found["p_corrected"].isnull().values.tolist() == [False, True, False]
        np.testing.assert_allclose(found["difference"][[0, 2]], [1, 1])


@pytest.mark.parametrize("swapped", [False, True])
def test_a_site_that_one_group_lacks_has_no_p_and_one_with_a_single_value_has(swapped: bool) -> None:
    """A permutation that gives one group no value there says nothing, whichever comes first."""
    nan = np.nan
    ours = np.array([[nan, 5.0, 1.0], [nan, nan, 2.0], [nan, nan, 3.0], [nan, nan, 4.0]])
    theirs = np.array([[1.0, nan, 2.0], [2.0, nan, 3.0], [3.0, nan, 4.0], [4.0, 1.0, 6.0]])
    groups = [
        Result.create(xr.Dataset({"m": (("sequence", "layer"), part)}), kind="sweep")
        for part in (ours, theirs)
    ]
    for seed in range(5):
        found = compare_groups(*groups[:: -1 if swapped else 1], "m", n_permutations=200, seed=seed)
        assert found["p"].isnull().values.tolist() == [True, False, False]
        assert found["difference"].isnull().values.tolist() == [True, False, False]


def test_what_cannot_be_compared_is_refused() -> None:
    one, two, three = _group([1.0]), _group([1.0, 2.0]), _group([1.0, 2.0, 3.0], sequence=["a", "b", "c"])
    with pytest.raises(OptionError, match=r"of='change'.*value.*effect"):
        compare_groups(two, two, "m", of="change")
    for pair in ((one, two), (two, one)):
        with pytest.raises(ResultError, match="'m' needs at least two sequences per group, not 1"):
            compare_groups(*pair, "m")
    whole = Result.create(xr.Dataset({"m": ("layer", np.ones(3)), "x": ("sequence", [1.0])}), kind="sweep")
    with pytest.raises(ResultError, match="'m' has no sequences to compare"):
        compare_groups(whole, whole, "m")
    with pytest.raises(ResultError, match=r"'match' of the second result names 1 sequences of the first"):
        compare_groups(three, _group([1.0, 2.0], match=("sequence", ["b", "x"])), "m")
    by_layer = Result.create(xr.Dataset({"m": (("sequence", "layer"), np.ones((2, 3)))}), kind="sweep")
    with pytest.raises(
        ResultError, match=r"'m' has sites \{\} in one result and \{'layer': 3\} in the other"
    ):
        compare_groups(two, by_layer, "m")


def test_a_difference_inside_strata_is_a_regression_with_a_constant_per_stratum() -> None:
    from statsmodels.api import OLS

    rng = np.random.default_rng(0)
    stratum = np.repeat([4, 1, 7, 9], [6, 9, 5, 3])
    is_a = np.array([0, 1, 0, 1, 1, 0] + [1, 0, 0] * 3 + [1, 1, 0, 0, 0] + [1] * 3, bool)
    values = 10 * stratum + rng.normal(size=len(stratum)) + 2 * is_a
    values[0] = np.nan
    found = difference_within(values, is_a, stratum, n_resamples=400, n_permutations=999)
    assert (found.n_a, found.n_b) == (8, 11)  # the last stratum has one group only
    known = np.isfinite(values) & (stratum != 9)
    columns = [is_a[known].astype(float), *((stratum[known] == s).astype(float) for s in (1, 4, 7))]
    fitted = OLS(values[known], np.column_stack(columns)).fit()
    assert found.found.value == pytest.approx(fitted.params[0])
    assert found.found.low < 2 < found.found.high
    assert found.p < 0.02
    # Between strata the groups differ a lot; inside them nothing is left without the shift.
    shuffled = difference_within(values - 2 * is_a, is_a, stratum, n_resamples=400, n_permutations=999)
    assert shuffled.p > 0.1
    assert shuffled.found.low < 0 < shuffled.found.high


def test_the_test_inside_strata_counts_every_permutation() -> None:
    """Two strata of two sequences: four equally likely arrangements."""
    values, is_a = np.array([1.0, 0.0, 13.0, 10.0]), np.array([True, False, True, False])
    found = difference_within(values, is_a, np.array([0, 0, 1, 1]), n_permutations=4000)
    assert found.found.value == pytest.approx(2.0)
    assert found.p == pytest.approx(0.5, abs=0.03)  # 2 and -2 of 2, 1, -1, -2
    assert not found.found.known  # two sequences of either group give no interval
    apart = difference_within(values, is_a, np.arange(4))
    assert np.isnan([apart.found.value, apart.p]).all()
    assert (apart.n_a, apart.n_b) == (0, 0)
