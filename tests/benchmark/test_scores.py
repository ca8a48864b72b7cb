"""Scores of a ranking against enumeration and by hand."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from memlens.benchmark.scores import mean_ranks, score_ranking


def test_the_measures_by_hand() -> None:
    scores = np.array([[5.0, 1.0], [4.0, 0.0], [3.0, -1.0]])
    planted = np.array([[True, False], [False, False], [True, False]])
    graded = np.array([[2.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    found = score_ranking(scores, planted, graded)
    assert found["average_precision"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["recall_at_k"] == 0.5
    assert found["roc_auc"] == pytest.approx(7 / 8)
    gain = (2 + 1 / np.log2(4)) / (2 + 1 / np.log2(3))
    assert found["ndcg"] == pytest.approx(gain)
    assert (found["layer_hit"], found["k"], found["chance"]) == (1, 2, 1 / 3)


def test_recall_at_k_with_ties_is_its_mean_over_their_orders() -> None:
    values, truth = np.array([3.0, 1.0, 1.0, 1.0, 0.0]), np.array([False, True, True, False, False])
    every = []
    for order in permutations(range(5)):
        ranked = sorted(order, key=lambda i: -values[i])
        every.append(truth[ranked[:2]].mean())
    assert score_ranking(values[None], truth[None])["recall_at_k"] == pytest.approx(np.mean(every))


def test_where_all_or_nothing_is_planted_there_is_no_score() -> None:
    for planted in (np.zeros((2, 2), bool), np.ones((2, 2), bool)):
        assert np.isnan(score_ranking(np.ones((2, 2)), planted)["average_precision"])


def test_a_random_ranking_is_at_chance() -> None:
    random = np.random.default_rng(0)
    planted = np.zeros((10, 50), bool)
    planted[random.integers(10, size=20), random.integers(50, size=20)] = True
    found = [score_ranking(random.random(planted.shape), planted) for _ in range(200)]
    assert np.mean([f["roc_auc"] for f in found]) == pytest.approx(0.5, abs=0.02)
    assert np.mean([f["recall_at_k"] for f in found]) == pytest.approx(planted.mean(), abs=0.01)


def test_mean_ranks_put_first_what_most_put_first() -> None:
    found = mean_ranks([np.array([[1.0, 9.0, 2.0]]), np.array([[10.0, 30.0, 20.0]])])
    assert found.tolist() == [[1, 3, 2]]


def test_planted_components_that_carry_nothing_are_left_out_of_one_measure() -> None:
    planted = np.array([[True, True, False, False]])
    graded = np.array([[1.0, 0.01, 0.0, 0.0]])
    scores = np.array([[4.0, 1.0, 3.0, 2.0]])
    found = score_ranking(scores, planted, graded)
    assert found["average_precision_carrying"] == 1.0
    assert found["average_precision"] == pytest.approx((1 + 2 / 4) / 2)
    assert np.isnan(score_ranking(scores, planted)["average_precision_carrying"])
