"""ROC areas, precision, recall and kappa against scipy, statsmodels and the definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.inter_rater import cohens_kappa

from memlens.errors import OptionError, ResultError
from memlens.results.statistics.agreement import agreement, roc_area

PAIRS = st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=40)


@given(PAIRS)
def test_the_area_is_the_mann_whitney_statistic(pairs: list[tuple[int, bool]]) -> None:
    score, label = np.array([s for s, _ in pairs], float), np.array([b for _, b in pairs])
    if label.all() or not label.any():
        with pytest.raises(ResultError, match="an area needs both"):
            roc_area(score, label)
        return
    found = roc_area(score, label)
    u = stats.mannwhitneyu(score[label], score[~label]).statistic
    assert found.area == pytest.approx(u / label.sum() / (~label).sum())
    if min(label.sum(), (~label).sum()) < 3:
        assert np.isnan(found.low) and np.isnan(found.high)  # noqa: PT018
    else:
        assert 0 <= found.low <= found.area <= found.high <= 1
    assert roc_area(-score, label).area == pytest.approx(1 - found.area)


def test_delong_s_variance_by_its_definition() -> None:
    rng = np.random.default_rng(0)
    positive, negative = rng.normal(1, 1, 30), rng.normal(0, 1, 50)
    above = (positive[:, None] > negative).astype(float)
    variance = above.mean(1).var(ddof=1) / 30 + above.mean(0).var(ddof=1) / 50
    found = roc_area([*positive, *negative], [True] * 30 + [False] * 50)
    assert found.low == pytest.approx(above.mean() - 1.959964 * np.sqrt(variance), abs=1e-6)
    assert found.high == pytest.approx(above.mean() + 1.959964 * np.sqrt(variance), abs=1e-6)
    drawn = roc_area([*positive, *negative], [True] * 30 + [False] * 50, method="bootstrap")
    assert (drawn.low, drawn.high) == pytest.approx((found.low, found.high), abs=0.03)
    assert drawn.area == found.area


@pytest.mark.parametrize(("sign", "n"), [(1, 5), (-1, 5), (1, 200)])
def test_groups_wholly_apart_have_an_interval_all_the_same(sign: int, n: int) -> None:
    found = roc_area(sign * np.arange(2 * n), np.arange(2 * n) >= n)
    assert found.method == "hanley-mcneil"
    end = found.low if sign == 1 else found.high
    assert (found.high if sign == 1 else found.low) == found.area
    q1, q2 = end / (2 - end), 2 * end**2 / (1 + end)
    variance = (end * (1 - end) + (n - 1) * (q1 - end**2) + (n - 1) * (q2 - end**2)) / n**2
    assert abs(found.area - end) == pytest.approx(1.959964 * np.sqrt(variance), rel=1e-5)
    assert abs(found.area - end) == pytest.approx({5: 0.5, 200: 0.015}[n], rel=0.5)


def test_rows_without_a_score_are_left_out() -> None:
    found = roc_area([3, 2, np.nan, 1], [True, True, False, False])
    assert (found.n_positive, found.n_negative, found.area) == (2, 1, 1)
    assert str(found) == "1.000 (2 positives, 1 negatives: too few for an interval)"
    assert str(roc_area([3, 3, 3, 1, 1, 1], [True] * 3 + [False] * 3)).startswith("1.000 [")


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=50))
def test_kappa_is_statsmodels(pairs: list[tuple[bool, bool]]) -> None:
    found, truth = (np.array(column) for column in zip(*pairs, strict=True))
    ours = agreement(found, truth, n_resamples=20)
    cells = np.array(
        [[(~found & ~truth).sum(), (~found & truth).sum()], [(found & ~truth).sum(), (found & truth).sum()]]
    )
    if found.any():
        assert ours["precision"] == pytest.approx(cells[1, 1] / cells[1].sum())
    else:
        assert np.isnan(ours["precision"])
    if (found == found[0]).all() and (truth == truth[0]).all() and found[0] == truth[0]:
        assert np.isnan(ours["kappa"])  # all agree on one answer: agreement by chance is certain
    else:
        assert ours["kappa"] == pytest.approx(cohens_kappa(cells).kappa, abs=1e-12)


def test_kappa_by_hand() -> None:
    # 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no: a = 0.7, e = 0.5 * 0.6 + 0.5 * 0.4 = 0.5
    found = np.repeat([True, True, False, False], [20, 5, 10, 15])
    truth = np.repeat([True, False, True, False], [20, 5, 10, 15])
    ours = agreement(found, truth)
    assert ours["kappa"] == pytest.approx(0.4)
    assert (ours["precision"], ours["recall"]) == pytest.approx((20 / 25, 20 / 30))
    standard_error = np.sqrt(ours["precision"] * (1 - ours["precision"]) / 25)
    half = (ours["precision_high"] - ours["precision_low"]) / 2
    assert half == pytest.approx(1.96 * standard_error, rel=0.15)
    assert ours == agreement(found, truth)
    assert ours != agreement(found, truth, seed=1)


def test_refusals() -> None:
    with pytest.raises(OptionError, match="method='exact'"):
        roc_area([1, 2], [True, False], method="exact")
    with pytest.raises(OptionError, match="level=95"):
        roc_area([1, 2], [True, False], level=95)
    with pytest.raises(ResultError, match="give one label per score"):
        roc_area([1, 2], [True])
    with pytest.raises(ResultError, match="give one label per decision"):
        agreement([True], [True, False])
