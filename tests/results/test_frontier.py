"""The figure of recitation against ability: what is joined, and what is drawn."""

from __future__ import annotations

import numpy as np
import pytest

import memlens as ml
from memlens.errors import EmptySetError, OptionError, ResultError
from memlens.results.groups import by_part
from memlens.results.statistics.tasks import MEASURES, task_summary
from memlens.results.statistics.tradeoff import ALL_TASKS, join_frontier
from tests.results.test_tradeoff import recall_result, task_result

RIGHT = {
    "two-way": ("language", 0.5, [[0, 1, 1]] * 10 + [[1, 1, 1]] * 10, [1.0] * 20),
    "open": ("reasoning", 0.0, [[0, 0, 1]] * 5 + [[0, 1, 1]] * 15, [1.0] * 10 + [0.0] * 10),
}


@pytest.fixture(scope="module")
def pair() -> tuple[ml.Result, ml.Result]:
    return recall_result([[0, 0, 1]] * 6 + [[0, 1, 1]] * 4, [1.0] * 10), task_result(RIGHT)


def test_scopes_are_means_over_tasks(pair: tuple[ml.Result, ml.Result]) -> None:
    found = join_frontier({"a": pair}, n_resamples=200)
    assert found["scope"].values.tolist() == [ALL_TASKS, "language", "reasoning", "two-way", "open"]
    np.testing.assert_allclose(found["accuracy"].sel(scope="two-way"), [0.5, 1.0, 1.0])
    np.testing.assert_allclose(found["accuracy"].sel(scope="open"), [0.0, 0.75, 1.0])
    np.testing.assert_allclose(found["accuracy"].sel(scope=ALL_TASKS), [0.25, 0.875, 1.0])
    np.testing.assert_allclose(found["accuracy_base"].sel(scope=ALL_TASKS), 0.75)
    assert (found["accuracy_low"] <= found["accuracy"] + 1e-9).all()
    np.testing.assert_allclose(found["exact_match"].mean("sequence"), [0.0, 0.4, 1.0])
    assert found["depth"].values.tolist() == [0.0, 0.5, 1.0]


def test_models_keep_to_their_own_sequences(
    pair: tuple[ml.Result, ml.Result], tmp_path: pytest.TempPathFactory
) -> None:
    recall, accuracy = pair
    smaller = ml.Result(recall.data.isel(sequence=slice(0, 4)))
    joined = join_frontier({"a": pair, "b": (smaller, accuracy)}, n_resamples=100)
    exact = joined["exact_match"].mean("sequence", skipna=True)
    assert exact.sel(site="a: 1") == pytest.approx(0.4)
    assert exact.sel(site="b: 1") == pytest.approx(0.0)
    joined.save(f"{tmp_path}/f.nc")
    drawn = ml.load_result(f"{tmp_path}/f.nc").plot()
    dots = [trace for trace in drawn.data if "markers" in trace.mode and trace.visible]
    assert [list(dot.y) for dot in dots] == [pytest.approx([0, 0.4, 1]), pytest.approx([0, 0, 1])]
    assert list(dots[0].x) == pytest.approx([0.25, 0.875, 1.0])
    assert [annotation.text for annotation in drawn.layout.annotations] == ["a", "b"]
    hairs = [trace for trace in drawn.data if trace.mode == "lines" and trace.visible]
    assert [float(hair.x[0]) for hair in hairs[::2]] == [0.75, 0.75]  # the unchanged models' accuracy
    assert [button.label for button in drawn.layout.updatemenus[0].buttons][:2] == [ALL_TASKS, "language"]


def test_sets_of_layers_stand_at_their_mean_depth(pair: tuple[ml.Result, ml.Result]) -> None:
    recall, accuracy = (
        ml.Result(part.data.rename(layer="layers").assign_coords(layers=["0", "0,2", "1-2"])) for part in pair
    )
    found = join_frontier({"a": (recall, accuracy)}, n_resamples=50)
    assert found["depth"].values.tolist() == [0.0, 0.5, 0.75]
    assert found["size"].values.tolist() == [1, 2, 2]
    odd = ml.Result(recall.data.assign_coords(layers=["x", "0,2", "1-2"]))
    with pytest.raises(ResultError, match="have different layers"):
        join_frontier({"a": (odd, accuracy)})
    named = tuple(ml.Result(p.data.assign_coords(layers=["x", "0", "1"])) for p in (recall, accuracy))
    with pytest.raises(OptionError, match="is not a layer or a range of layers"):
        join_frontier({"a": named})  # pyright: ignore[reportArgumentType]
    with pytest.raises(EmptySetError):
        join_frontier({})


def test_task_lines_are_those_of_the_summary(pair: tuple[ml.Result, ml.Result]) -> None:
    drawn = pair[1].plot(n_resamples=100)
    table = task_summary(pair[1], n_resamples=100)
    lines = [trace for trace in drawn.data if trace.mode == "lines+markers"]
    assert len(lines) == 2 * len(MEASURES)
    rows = table[(table["scope"] == "group") & (table["measure"] == "accuracy")]
    for line in lines[:2]:
        wanted = rows[rows["name"] == line.name]
        assert list(line.y) == pytest.approx(wanted["mean"].tolist())
    dashed = [trace for trace in drawn.data if trace.line.dash == "dash"][:2]
    assert [float(trace.y[0]) for trace in dashed] == [1.0, 0.5]
    assert len([t for t in pair[1].plot("accuracy", group="task").data if t.mode == "lines+markers"]) == 2
    with pytest.raises(OptionError, match="lines are of tasks"):
        pair[1].plot(group="chance")


def test_lines_by_part_of_depth_are_means_over_layers(pair: tuple[ml.Result, ml.Result]) -> None:
    table = task_summary(pair[1], n_resamples=50)
    rows = table[(table["name"] == "two-way") & (table["measure"] == "relative_drop_chance_corrected")]
    drops = rows.set_index("layer")["mean"]
    drawn = pair[1].plot("relative_drop_chance_corrected", group="task", parts=2, n_resamples=50)
    line = next(trace for trace in drawn.data if trace.name == "two-way")
    # of three layers the middle one belongs to the second half
    assert list(line.y) == pytest.approx([drops[0], (drops[1] + drops[2]) / 2])
    whole = by_part(pair[0], 2)
    np.testing.assert_allclose(whole["exact_match"].sel(layer=1), pair[0]["exact_match"].sel(layer=0))
    np.testing.assert_allclose(whole["exact_match_baseline"], 1.0)


def test_a_task_may_have_one_question_and_the_normalized_accuracy_is_its_own() -> None:
    result = task_result(
        {"one": ("language", 0.25, [[0, 1, 1]], [1.0]), "two": ("reasoning", 0.5, [[0, 1, 1]] * 2, [1.0] * 2)}
    )
    norm = result["accuracy"].copy(data=[[1, 0, 1], [0, 1, 0], [0, 0, 0]])
    table = task_summary(ml.Result(result.data.assign(accuracy_norm=norm)), n_resamples=20)
    means = table.set_index(["name", "measure", "layer"])["mean"]
    assert means["one"]["accuracy"].tolist() == [0, 1, 1]
    assert means["one"]["accuracy_norm"].tolist() == [1, 0, 1]
    assert means["two"]["accuracy_norm"].tolist() == [0, 0.5, 0]
    assert means["one"]["accuracy_chance_corrected"].tolist() == pytest.approx([-1 / 3, 1, 1])
    assert means["two"]["accuracy_chance_corrected"].tolist() == [-1, 1, 1]
    assert means["language"].equals(means["one"])
    assert table["questions"].unique().tolist() == [1, 2]
