"""What edits take and cost: every number by hand on made-up results, the area against plain integration."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

import memlens as ml
from memlens.errors import OptionError, ResultError
from memlens.results.statistics.tradeoff import Tradeoff, frontier_area, on_frontier, tasks_above_chance

LAYERS = [0, 1, 2]


def recall_result(exact: list[list[float]], base: list[float]) -> ml.Result:
    data = xr.Dataset(
        {"exact_match": (("sequence", "layer"), exact), "exact_match_baseline": ("sequence", base)},
        {"sequence": [f"s{i}" for i in range(len(base))], "layer": LAYERS},
    )
    return ml.Result.create(data, kind="attention_bypass")


def task_result(tasks: dict[str, tuple[str, float, list[list[float]], list[float]]]) -> ml.Result:
    """By task: its group, its chance level, right or wrong `[question, layer]`, and without an edit."""
    right = np.concatenate([np.array(values) for _, _, values, _ in tasks.values()])
    base = np.concatenate([np.array(values) for _, _, _, values in tasks.values()])
    counts = [len(values) for _, _, _, values in tasks.values()]
    data = xr.Dataset(
        {
            "accuracy": (("sequence", "layer"), right),
            "accuracy_norm": (("sequence", "layer"), right),
            "accuracy_baseline": ("sequence", base),
            "accuracy_norm_baseline": ("sequence", base),
        },
        {
            "sequence": [f"q{i}" for i in range(len(base))],
            "layer": LAYERS,
            "task": ("sequence", np.repeat(list(tasks), counts)),
            "task_group": ("sequence", np.repeat([g for g, *_ in tasks.values()], counts)),
            "chance": ("sequence", np.repeat([c for _, c, *_ in tasks.values()], counts)),
        },
    )
    return ml.Result.create(data, kind="task_accuracy")


@pytest.fixture(scope="module")
def results() -> tuple[ml.Result, ml.Result]:
    exact = [[0, 0, 1]] * 6 + [[0, 1, 1]] * 2 + [[0, 1, 0]] * 2
    two_way = [[0, 1, 1]] * 10 + [[1, 1, 1]] * 10
    open_ended = [[0, 0, 1]] * 5 + [[0, 1, 1]] * 15
    guessed = [[1, 0, 0], [0, 1, 1]] * 10
    return recall_result(exact, [1.0] * 10), task_result(
        {
            "two-way": ("language", 0.5, two_way, [1.0] * 20),
            "open": ("reasoning", 0.0, open_ended, [1.0] * 20),
            "guessed": ("reasoning", 0.5, guessed, [1.0, 0.0] * 10),
        }
    )


def test_removed_cost_and_selectivity_by_hand(results: tuple[ml.Result, ml.Result]) -> None:
    found = ml.tasks.edit_tradeoff(*results, n_resamples=500)
    assert found.tasks == ["two-way", "open"]  # of the guessed one there is nothing to lose
    assert found.removed.tolist() == pytest.approx([1.0, 0.6, 0.2])
    # two-way: (1 - 0.5) / (1 - 0.5) = 1 at layer 0; open: 1 at layer 0, 0.25 at layer 1
    assert found.cost.tolist() == pytest.approx([1.0, 0.25, 0.0])
    assert found.worst[1] == "open"
    assert found.selectivity.tolist() == pytest.approx([0.0, 0.35, 0.2])
    mean = ml.tasks.edit_tradeoff(*results, over="mean", n_resamples=500)
    assert mean.cost.tolist() == pytest.approx([1.0, 0.125, 0.0])
    only = ml.tasks.edit_tradeoff(*results, tasks=["two-way"], n_resamples=500)
    assert only.cost.tolist() == pytest.approx([1.0, 0.0, 0.0])
    table = found.table()
    assert table["exact_match"].tolist() == pytest.approx([0.0, 0.4, 0.8])
    assert table["accuracy"].tolist() == pytest.approx([0.25, 0.875, 1.0])  # of the two that count
    assert table["layer"].tolist() == LAYERS
    assert table["worst_task"].tolist() == list(found.worst)
    for name in ("removed", "cost", "selectivity"):
        assert (table[f"{name}_low"] <= table[name] + 1e-9).all()
        assert (table[name] <= table[f"{name}_high"] + 1e-9).all()
    assert table.loc[1, "removed_low"] < 0.6 < table.loc[1, "removed_high"]


def test_intervals_cover_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for trial in range(60):
        exact = (rng.random((40, 3)) < [0.5, 0.5, 0.5]).astype(float)
        right = (rng.random((40, 3)) < 0.75).astype(float)
        found = ml.tasks.edit_tradeoff(
            recall_result(exact.tolist(), [1.0] * 40),
            task_result({"open": ("language", 0.0, right.tolist(), [1.0] * 40)}),
            n_resamples=300,
            seed=trial,
        ).table()
        inside += int(((found["selectivity_low"] <= 0.25) & (found["selectivity_high"] >= 0.25)).sum())
    assert 0.88 <= inside / 180 <= 1.0


def test_a_task_at_chance_is_left_out(results: tuple[ml.Result, ml.Result]) -> None:
    assert tasks_above_chance(results[1]) == ["two-way", "open"]
    data = results[1].data
    guessed = ml.Result(data.isel(sequence=data["task"].values == "guessed"))
    with pytest.raises(ResultError, match="not significantly above chance on any task"):
        ml.tasks.edit_tradeoff(results[0], guessed)


def test_a_task_of_no_hits_and_one_of_few_are_left_out() -> None:
    never = ("language", 0.0, [[0, 0, 0]] * 12, [0.0] * 12)
    once = ("language", 0.0, [[0, 0, 0]] * 12, [1.0] + [0.0] * 11)
    often = ("language", 0.0, [[0, 1, 1]] * 12, [1.0] * 12)
    accuracy = task_result({"never": never, "once": once, "often": often})
    assert tasks_above_chance(accuracy) == ["often"]
    assert tasks_above_chance(accuracy, margin=0.0) == ["once", "often"]
    recall = recall_result([[0, 0, 1]] * 6, [1.0] * 6)
    # a resample without the one hit has nothing to lose on that task: it does not count there
    found = ml.tasks.edit_tradeoff(recall, accuracy, tasks=["once", "often"], n_resamples=200)
    assert np.isfinite(found.cost_draws).all()
    assert found.cost.tolist() == pytest.approx([1.0, 1.0, 1.0])
    assert set(np.unique(found.cost_draws[:, 1])) == {0.0, 1.0}
    alone = ml.tasks.edit_tradeoff(recall, accuracy, tasks=["never", "often"], n_resamples=20)
    assert alone.cost.tolist() == pytest.approx([1.0, 0.0, 0.0])


def test_what_does_not_fit_is_refused(results: tuple[ml.Result, ml.Result]) -> None:
    recall, accuracy = results
    with pytest.raises(ResultError, match="different interventions"):
        ml.tasks.edit_tradeoff(ml.Result(recall.data.isel(layer=slice(0, 2))), accuracy)
    with pytest.raises(OptionError, match="over"):
        ml.tasks.edit_tradeoff(recall, accuracy, over="median")
    with pytest.raises(OptionError, match="task"):
        ml.tasks.edit_tradeoff(recall, accuracy, tasks=["three-way"])
    nothing = recall.data.assign(exact_match_baseline=("sequence", [0.0] * 10))
    with pytest.raises(ResultError, match="nothing is recited"):
        ml.tasks.edit_tradeoff(ml.Result(nothing), accuracy)


def integrated(removed: np.ndarray, cost: np.ndarray) -> float:
    """The area by its definition, on a fine grid."""
    x = (np.arange(20_000) + 0.5) / 20_000
    best = np.zeros_like(x)
    for r, c in zip(removed, cost, strict=True):
        best = np.maximum(best, np.where(np.clip(r, 0, 1) >= x, 1 - np.clip(c, 0, 1), 0))
    return float(best.mean())


edits = st.lists(st.tuples(st.floats(-0.5, 1.2), st.floats(-0.5, 1.5)), min_size=1, max_size=8)


@given(edits)
def test_the_area_is_the_integral_of_the_best_ability_kept(pairs: list[tuple[float, float]]) -> None:
    removed, cost = np.array(pairs).T
    found = frontier_area(removed[None], cost[None])[0]
    assert found == pytest.approx(integrated(removed, cost), abs=2e-4)
    kept = on_frontier(made_up(removed, cost))
    if kept.any():
        assert frontier_area(removed[None, kept], cost[None, kept])[0] == pytest.approx(found, abs=1e-9)
    for i in np.flatnonzero(kept):
        beaten = (removed >= removed[i]) & (cost < cost[i])
        assert not beaten.any()


def made_up(removed: np.ndarray, cost: np.ndarray) -> Tradeoff:
    import pandas as pd

    n = len(removed)
    sites = pd.DataFrame({"layer": range(n)})
    return Tradeoff(
        sites,
        removed,
        cost,
        ["task"] * n,
        removed[None],
        cost[None],
        1 - removed,
        1 - cost,
        ["task"],
        n_sequences=100,
        n_questions=100,
    )


def test_the_ends_of_the_area() -> None:
    assert made_up(np.array([1.0]), np.array([0.0])).area() == (1.0, 1.0, 1.0)
    assert made_up(np.array([0.0]), np.array([0.0])).area()[0] == 0.0
    line = np.linspace(0, 1, 1001)[1:]
    assert made_up(line, line).area()[0] == pytest.approx(0.5, abs=1e-3)
