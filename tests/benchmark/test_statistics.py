"""Chance levels, intervals, tests, calibration and agreement, against simulation, SciPy and by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from memlens.benchmark import Leaderboard, score_ranking
from memlens.benchmark.over_organisms import better_p_value, mean_over_organisms, share_over_organisms
from memlens.benchmark.scores import chance_level
from memlens.errors import OptionError, ResultError


@pytest.mark.parametrize(("n", "k"), [(6, 1), (24, 4), (100, 30)])
def test_the_chance_level_is_that_of_random_rankings(n: int, k: int) -> None:
    random, planted = np.random.default_rng(0), np.zeros((1, n), bool)
    planted[0, :k] = True
    found = pd.DataFrame([score_ranking(random.random((1, n)), planted) for _ in range(500)])
    for measure in ("average_precision", "recall_at_k", "roc_auc"):
        error = 4 * found[measure].std() / np.sqrt(len(found))
        assert chance_level(measure, k / n, k) == pytest.approx(found[measure].mean(), abs=error)
    assert np.isnan(chance_level("ndcg", k / n, k))


@pytest.mark.parametrize("digits", [1, 8])
@pytest.mark.parametrize("n", [5, 9, 20])
def test_the_paired_test_is_wilcoxons(n: int, digits: int) -> None:
    random = np.random.default_rng(n)
    a, b = (pd.Series(np.round(random.random(n) + shift, digits)) for shift in (0.2, 0))
    method: Any = stats.PermutationMethod(n_resamples=10**6) if n < 14 else "auto"
    expected: Any = stats.wilcoxon(a[a != b], b[a != b], alternative="greater", method=method)
    assert better_p_value(a, b) == pytest.approx(expected.pvalue)


def test_few_organisms_have_no_test_and_equal_ones_no_difference() -> None:
    assert np.isnan(better_p_value(pd.Series([1.0] * 4), pd.Series([0.0] * 4)))
    assert better_p_value(pd.Series([1.0] * 6), pd.Series([1.0] * 6)) == 1


def test_organisms_of_one_model_are_not_independent() -> None:
    values = np.repeat([0.1, 0.5, 0.6, 0.9], 10)
    by_model = mean_over_organisms(values, np.repeat(list("abcd"), 10).tolist())
    alone = mean_over_organisms(values, ["a"] * 40)
    assert by_model.value == alone.value == values.mean()
    assert by_model.high - by_model.low > 2 * (alone.high - alone.low)
    assert not mean_over_organisms(values[:2], ["a", "b"]).known


def test_a_share_is_over_all_components() -> None:
    found = share_over_organisms(np.array([1.0, 3, 0]), np.array([2.0, 8, 0]), ["a", "a", "a"])
    assert (found.value, found.n) == (0.4, 2)
    many = share_over_organisms(np.array([1.0, 3, 0, 4]), np.array([2.0, 4, 6, 4]), ["a", "b", "c", "d"])
    assert many.low < 0.5 < many.high <= 1


def rows(n: int, *, order: int = 1, kind: str = "heads") -> pd.DataFrame:
    """Three methods on n organisms; deletion orders them as the truth does, or the other way round."""
    found = []
    for seed in range(n):
        for i, name in enumerate(("good", "fair", "poor")):
            precision = 0.9 - 0.3 * i + 0.01 * seed
            found.append(
                {
                    "model": "m", "carrier": f"{kind}=2", "carrier_kind": kind, "seed": seed,
                    "component": "head", "localizer": name, "variant": "z-scored", "control": False,
                    "average_precision": precision, "recall_at_k": precision, "roc_auc": 1.0, "ndcg": 1.0,
                    "layer_hit": 1.0, "k": 2, "chance": 0.25, "seconds": 1.0, "deletion": 1.0,
                    "deletion_specific": order * precision, "deletion_random": 0.1,
                    "planted_ranks": [1, 3 + i], "n_rankings": 1, "z_counts": [4, 0, 2, 0, 0, 1, 1, 0],
                    "z_planted": [0, 0, 1, 0, 0, 0, 1, 0],
                }
            )  # fmt: skip
    return pd.DataFrame(found)


def board(table: pd.DataFrame) -> Leaderboard:
    return Leaderboard(pd.DataFrame({"passed": [True]}), table)


def test_agreement_of_deletion_with_the_truth() -> None:
    same = board(rows(4)).deletion_agreement().iloc[0]
    assert (same["tau"], same["tau_of_means"], same["precision_lost"], same["methods"]) == (1, 1, 0, 3)
    other = board(rows(4, order=-1)).deletion_agreement().iloc[0]
    assert (other["tau"], other["best_by_deletion"], other["best_by_truth"]) == (
        -1, "poor z-scored", "good z-scored",
    )  # fmt: skip
    assert other["precision_lost"] == pytest.approx(0.6)
    assert board(rows(4, kind="none")).deletion_agreement().empty


def test_calibration_by_rank_and_by_z() -> None:
    found = board(rows(4)).calibration().set_index(["localizer", "bin"])
    assert found.loc[("good", "1"), "share"] == 1
    assert found.loc[("good", "2"), "share"] == 0
    assert found.loc[("fair", "3-4"), "share"] == 0.5
    assert found.loc[("poor", "3-4"), "share"] == 0
    assert found.loc[("poor", "3-4"), "components"] == 8
    by_z = board(rows(4)).calibration("z").set_index(["localizer", "bin"])
    assert by_z.loc[("good", "1 to 2"), "share"] == 0.5
    assert by_z.loc[("good", "10 to 20"), "share"] == 1
    assert by_z.loc[("good", "above 20"), "components"] == 0


def test_the_table_says_chance_and_where_there_is_no_test() -> None:
    table: Any = board(rows(4)).table()
    assert table["behind_best"].isna().all()
    assert table["note"].tolist() == ["", *["no test: fewer than 5 organisms"] * 2]
    assert table["chance"].tolist() == pytest.approx([chance_level("average_precision", 0.25, 2)] * 3)
    tested: Any = board(rows(6)).table("deletion_specific")
    assert (tested["behind_best"].dropna() < 0.05).all()
    assert tested["chance"].tolist() == pytest.approx([0.1] * 3)


def test_what_an_older_run_did_not_measure_is_said() -> None:
    old = board(rows(3).drop(columns=["deletion_specific", "planted_ranks"]))
    with pytest.raises(ResultError, match="did not measure deletion_specific"):
        old.table("deletion_specific")
    with pytest.raises(ResultError, match="did not measure deletion"):
        old.deletion_agreement()
    with pytest.raises(ResultError, match="did not record calibration"):
        old.calibration()
    with pytest.raises(OptionError, match="measure"):
        old.table("speed")


def test_where_nothing_is_planted_the_measure_is_less_its_chance() -> None:
    nothing = rows(3, kind="none")
    found = board(pd.concat([rows(4), nothing], ignore_index=True)).without_truth()
    assert len(found) == 1
    row = found.iloc[0]
    level = chance_level("average_precision", 0.25, 2)
    assert (row["carrier_kind"], row["component"], row["n"], row["methods"]) == ("none", "head", 3, 3)
    assert row["above_chance"] == pytest.approx(nothing["average_precision"].mean() - level)
    assert row["most_above"] == pytest.approx(0.91 - level)
    assert row["low"] <= row["above_chance"] <= row["high"]
    assert board(rows(4)).without_truth().empty
