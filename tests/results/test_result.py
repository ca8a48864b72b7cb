from __future__ import annotations

import copy
import pickle

import numpy as np
import plotly.graph_objects as go
import pytest
import xarray as xr

from memlens.errors import OptionError, ResultError, SiteError
from memlens.results.groups import join_groups
from memlens.results.kinds import overlay
from memlens.results.result import Result
from memlens.results.statistics.comparison import compare_groups
from tests.report import synthetic


def _result(values: np.ndarray, base: np.ndarray | None = None, **coords: object) -> Result:
    data: dict[str, object] = {"margin": (("sequence", "layer"), values)}
    if base is not None:
        data["margin_baseline"] = ("sequence", base)
    ids = [f"s{i}" for i in range(len(values))]
    return Result.create(xr.Dataset(data, {"sequence": ids, **coords}), kind="attention_bypass", seed=0)


def test_effect_is_intervened_minus_baseline() -> None:
    result = _result(np.array([[1.0, 2.0], [5.0, 5.0]]), np.array([2.0, 5.0]))
    np.testing.assert_array_equal(result.effect("margin").values, [[-1, 0], [0, 0]])
    assert result.effect("margin").dims == ("sequence", "layer")


def test_effect_of_patching_is_against_the_corrupt_run() -> None:
    result = synthetic.activation_patching()
    patched = result["target_logprob"] - result["target_logprob_corrupt"]
    np.testing.assert_array_equal(result.effect("target_logprob").values, patched.values)


def test_effect_interval_is_of_paired_differences() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(0, 100, 30)  # sequences differ wildly, the change is small and steady
    result = _result(base[:, None] - 1 + rng.normal(0, 0.1, (30, 2)), base)
    found = result.mean_ci(of="effect")["margin"]
    assert float((found.sel(statistic="high") - found.sel(statistic="low")).max()) < 0.2
    np.testing.assert_allclose(found.sel(statistic="mean"), -1, atol=0.1)


def test_other_dimensions_are_averaged_inside_sequences_first() -> None:
    values = xr.DataArray(np.array([[0.0, 0.0], [1.0, np.nan]]), dims=("sequence", "target"))
    result = Result.create(xr.Dataset({"margin": values}), kind="recall")
    found = result.mean_ci(("sequence", "target"))
    assert float(found["margin"].sel(statistic="mean")) == 0.5
    assert int(found["n_margin"]) == 2


def test_intervals_are_never_over_sites() -> None:
    with pytest.raises(OptionError, match="'sequence'"):
        _result(np.zeros((2, 2))).mean_ci("layer")


def test_groups_are_means_of_their_sequences() -> None:
    result = synthetic.attention_bypass()
    found = result.mean_ci(metric="target_logprob", group="copies")
    assert found["copies"].values.tolist() == [0, 1, 4, 16, 64, 256]
    chosen = result.data["target_logprob"][result.data["copies"].values == 16]
    np.testing.assert_allclose(
        found["target_logprob"].sel(copies=16, statistic="mean"), chosen.mean("sequence")
    )
    assert found["n_target_logprob"].sel(copies=16, layer=0) == len(chosen)


def test_all_groups_have_one_method() -> None:
    score = xr.DataArray([0.0, 1.0, 0.3, 0.7], dims="sequence")
    data = xr.Dataset({"memorization_score": score}, {"copies": ("sequence", [0, 0, 1, 1])})
    found = Result.create(data, kind="recall").mean_ci(group="copies")
    assert found["memorization_score"].attrs["interval_method"] == "bootstrap"


def test_metrics_leave_out_what_stands_beside_them() -> None:
    assert synthetic.head_ablation().metrics == ["target_logprob", "target_rank", "exact_match"]
    assert synthetic.activation_patching().metrics == ["target_logprob", "normalized_effect"]
    assert "token" not in synthetic.residual_decoding().metrics


def test_frame_has_one_row_a_value() -> None:
    result = synthetic.head_ablation()
    frame = result.to_frame()
    assert len(frame) == result["target_logprob"].size
    row = frame.query("sequence == 'seq-003' and layer == 2 and head == 1").iloc[0]
    where = {"sequence": "seq-003", "layer": 2, "head": 1}
    assert row["target_logprob"] == float(result["target_logprob"].sel(where))
    names = ["target_logprob", "target_rank", "exact_match"]
    dims = ["sequence", "layer", "head"]
    assert set(frame) == {*dims, *names, *(f"{name}_baseline" for name in names)}
    assert list(result.to_frame(["copies", "target_rank"])) == [*dims, "copies", "target_rank"]
    whole = result.to_frame("all").query("sequence == 'seq-003' and layer == 2 and head == 1").iloc[0]
    assert whole["copies"] == int(result["copies"].sel(sequence="seq-003"))
    assert len(result.to_frame(["copies"])) == len(result.data["copies"])
    with pytest.raises(ResultError, match="Did you mean 'copies'"):
        result.to_frame(["copis"])


def test_a_result_is_selected_and_read_as_its_dataset() -> None:
    result = synthetic.head_ablation()
    xr.testing.assert_identical(result.copies, result.data["copies"])
    part = result.sel(layer=2).isel(head=[0, 1])
    xr.testing.assert_identical(part.data, result.data.sel(layer=2).isel(head=[0, 1]))
    assert part.kind == "head_ablation"
    one = result.sel(sequence="seq-003")
    assert one.data.sizes["sequence"] == result.isel(sequence=3).data.sizes["sequence"] == 1
    assert result.isel(sequence=slice(0, 5, 2)).data.sizes["sequence"] == 3
    assert {"copies", "target_logprob"} <= set(dir(result))
    with pytest.raises(AttributeError, match="no 'target_logprobs'"):
        result.target_logprobs  # noqa: B018
    layers = f"0 to {len(result.layer) - 1}"
    for wrong, message in (
        ({"layer": 99}, f"has no layer 99: layer is {layers}"),
        ({"head": 0, "layer": [1, 99]}, f"has no layer 99: layer is {layers}"),
        ({"leyer": 0}, "has no dimension 'leyer': it has sequence, layer, head. Did you mean 'layer'"),
        ({"sequence": "seq-3"}, "has no sequence 'seq-3': sequence is 'seq-000', .* Did you mean 'seq-"),
    ):
        with pytest.raises(ResultError, match=message):
            result.sel(**wrong)
    with pytest.raises(ResultError, match=f"no layer at place 99: its places are {layers}"):
        result.isel(layer=99)
    with pytest.raises(ResultError, match="no dimension 'copies'"):
        result.isel(copies=0)
    for again in (copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        xr.testing.assert_identical(again.data, result.data)


def test_one_metric_is_a_table_of_pandas() -> None:
    result = synthetic.head_ablation()
    table = result.isel(layer=1).to_pandas("target_rank")
    assert table.loc["seq-003", 2] == int(result["target_rank"].sel(sequence="seq-003", head=2).isel(layer=1))
    assert result.to_pandas("copies").loc["seq-003"] == int(result["copies"].sel(sequence="seq-003"))
    with pytest.raises(ResultError, match="sequence, layer, head: select"):
        result.to_pandas()


def test_groups_of_one_result_are_compared_as_two_results() -> None:
    result = synthetic.head_ablation()
    rare, often = (result.isel(sequence=result["copies"].values == n) for n in (0, 256))
    found = result.compare_groups("target_logprob", "copies", (256, 0), of="effect", n_permutations=99)
    expected = compare_groups(often, rare, "target_logprob", of="effect", n_permutations=99)
    xr.testing.assert_identical(found, expected)
    with pytest.raises(ResultError, match=r"6 values.*name two"):
        result.compare_groups("target_logprob", "copies")
    with pytest.raises(ResultError, match="no coordinate along 'sequence'"):
        result.compare_groups("target_logprob", "layer")


def test_repr_shows_kind_model_and_escapes() -> None:
    result = synthetic.head_ablation()
    assert repr(result).startswith("<Result head_ablation of zoo/pythia-s: target_logprob")
    nasty = Result(result.data.assign_attrs(model="<script>x</script>"))
    assert "<script>x" not in nasty._repr_html_().split("</table>")[0]
    assert "setting: mode" in result._repr_html_()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (xr.Dataset({"a": ("sequence", [1.0])}), "kind"),
        (xr.Dataset(attrs={"kind": "recall"}), "at least one variable"),
        (xr.Dataset({"a": ("layer", [1.0])}, attrs={"kind": "recall"}), "'sequence'"),
    ],
)
def test_what_is_no_result_is_refused(data: xr.Dataset, message: str) -> None:
    with pytest.raises(ResultError, match=message):
        Result(data)


def test_unknown_names_are_refused_with_a_hint() -> None:
    result = synthetic.head_ablation()
    with pytest.raises(ResultError, match="Did you mean 'target_logprob'"):
        result["target_logprobs"]
    with pytest.raises(ResultError, match="no baseline"):
        synthetic.recall().effect("exact_match")
    with pytest.raises(ResultError, match="no metric of this recall result has a baseline"):
        synthetic.recall().mean_ci(of="effect")
    with pytest.raises(ResultError, match="group='layer'"):
        result.mean_ci(group="layer")
    with pytest.raises(OptionError, match="colour"):
        result.plot(colour="red")
    with pytest.raises(SiteError, match="'nobody'"):
        result.plot(sequence="nobody")


@pytest.mark.parametrize("name", list(synthetic.ALL))
def test_every_kind_plots(name: str) -> None:
    fig = synthetic.ALL[name]().plot()
    assert isinstance(fig, go.Figure)
    assert fig.layout.title.text
    assert "48 sequences" in fig.layout.title.subtitle.text


def test_a_new_kind_is_drawn_by_its_dimensions() -> None:
    for make, trace in ((synthetic.head_ablation, "heatmap"), (synthetic.attention_bypass, "scatter")):
        result = Result(make().data.assign_attrs(kind="something new"))
        assert trace in {drawn.type for drawn in result.plot().data}


def test_a_sweep_is_drawn_by_the_coordinates_of_its_interventions() -> None:
    def of_sweep(data: xr.Dataset) -> Result:
        return Result(data.assign_attrs(kind="sweep"))

    by_layer = of_sweep(synthetic.attention_bypass().data)
    assert "layer" in by_layer.plot("target_logprob").layout.xaxis.title.text
    effect = by_layer.effect("target_logprob").mean("sequence")
    assert any(
        np.allclose(line.y, effect)
        for line in by_layer.plot("target_logprob").data
        if len(line.y) == len(effect)
    )
    assert overlay({"a": by_layer, "b": by_layer}, "target_logprob").data
    assert of_sweep(synthetic.head_ablation().data).plot("target_logprob").data[0].type == "heatmap"

    ids, names = ["s0", "s1"], {"layer": [0, 1], "strength": [0.5, 1.0], "side": ["a"]}
    values = [[[[1.0], [2.0]], [[3.0], [np.nan]]]] * 2  # there is no layer 1 at strength 1
    data = xr.Dataset({"margin": (("sequence", *names), values)}, {"sequence": ids, **names})
    sweep = Result.create(data, kind="sweep")
    drawn = next(trace for trace in sweep.plot().data if trace.x is not None and len(trace.x) == 3)
    assert dict(zip(drawn.y, drawn.x, strict=True)) == {
        "layer 0, strength 0.5, side a": 1,
        "layer 0, strength 1.0, side a": 2,
        "layer 1, strength 0.5, side a": 3,
    }


@pytest.mark.parametrize("kind", ["sweep", "of_tomorrow"])
def test_dimensions_with_names_of_ones_own_get_a_map(kind: str) -> None:
    """Layers go up; two dimensions without layers are drawn as they are named; one sequence can be chosen."""
    heads = synthetic.head_ablation().data.rename(head="value_head").assign_attrs(kind=kind)
    expected = Result(heads).effect("target_logprob").mean("sequence")
    fig = Result(heads).plot("target_logprob")
    assert (fig.data[0].type, fig.layout.xaxis.title.text) == ("heatmap", "value head")
    assert fig.layout.yaxis.title.text == "layer"
    np.testing.assert_allclose(fig.data[0].z, expected.transpose("layer", "value_head"))
    assert "value head %{x}" in fig.data[0].hovertemplate
    one = Result(heads).plot("target_logprob", sequence="seq-003").data[0].z
    np.testing.assert_allclose(one, Result(heads).effect("target_logprob").sel(sequence="seq-003"))
    named = heads.rename(layer="block").assign_coords(value_head=list("abcdef"))
    fig = Result(named).plot("target_logprob")
    assert list(fig.data[0].x) == list("abcdef")
    assert fig.layout.yaxis.title.text == "block"


def test_plot_averages_target_tokens_inside_sequences() -> None:
    whole = synthetic.head_ablation()
    data = whole.data[["target_logprob", "target_logprob_baseline"]]
    tokens = data.expand_dims(target=3).transpose("sequence", ..., "target")
    fig = Result(tokens.assign_attrs(whole.data.attrs)).plot("target_logprob")
    np.testing.assert_allclose(fig.data[0].z, whole.effect("target_logprob").mean("sequence"))


def test_a_sequence_in_several_groups_is_counted_once() -> None:
    whole = synthetic.head_ablation()
    groups = {
        "few": whole.isel(sequence=slice(5)),
        "all": whole,
        "others": whole.isel(sequence=slice(40, 48)),
    }
    joined = join_groups(groups)
    assert joined.data.sizes["sequence"] == 5 + 48 + 8
    assert "over 48 sequences" in joined.plot("target_logprob", group="group").layout.title.subtitle.text
    assert joined["original_id"].values.tolist()[-8:] == whole["sequence"].values.tolist()[-8:]


def test_overlay_has_a_line_for_each_in_the_order_given() -> None:
    low, high = (_result(np.full((4, 3), value)) for value in (0.0, 1.0))
    fig = overlay({"zebra": low, "ape": high})
    lines = [trace for trace in fig.data if trace.name in ("zebra", "ape")]
    assert [(line.name, line.y[0]) for line in lines] == [("zebra", 0), ("ape", 1)]
    with pytest.raises(ResultError, match="one kind"):
        overlay({"a": low, "b": synthetic.recall()})


def test_a_comparison_that_leaves_most_pairs_out_says_so() -> None:
    rng = np.random.default_rng(0)
    first = _result(rng.normal(size=(9, 2)))
    links = ["s0", "s1", *(f"other {i}" for i in range(7))]
    second = _result(rng.normal(size=(9, 2)), matched_to=("sequence", links))
    with pytest.warns(UserWarning, match="only 2 pairs are compared"):
        found = compare_groups(first, second, "margin")
    assert (found.attrs["n_a"], found.attrs["n_b"]) == (2, 2)


def test_unpaired_comparison_finds_the_shift_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (40, 5)), rng.normal(0, 1, (50, 5))
    a[:, 2] += 2
    found = compare_groups(_result(a), _result(b), "margin")
    np.testing.assert_allclose(found["difference"], a.mean(0) - b.mean(0))
    assert not found.attrs["paired"]
    assert (found["p_corrected"] < 0.05).values.tolist() == [False, False, True, False, False]
    assert (found["p_corrected"] >= found["p"]).all()
    assert ((found["low"] < found["difference"]) & (found["difference"] < found["high"])).all()


def test_matched_controls_are_paired_by_id() -> None:
    rng = np.random.default_rng(0)
    level = rng.normal(0, 10, 30)
    a = level[:, None] + 0.5 + rng.normal(0, 0.1, (30, 1))
    order = rng.permutation(30)
    b = level[order, None] + rng.normal(0, 0.1, (30, 1))
    control = _result(b, matched_to=("sequence", [f"s{i}" for i in order]))
    found = compare_groups(_result(a), control, "margin")
    assert found.attrs["paired"]
    assert float(found["difference"][0]) == pytest.approx(0.5, abs=0.1)
    assert float(found["high"][0] - found["low"][0]) < 0.3
    assert float(found["p"][0]) < 0.001
    unpaired = compare_groups(_result(a), _result(b), "margin")
    assert float(unpaired["p"][0]) > 0.3


def test_several_controls_of_one_sequence_count_once() -> None:
    a = _result(np.array([[2.0], [4.0], [6.0]]))
    links = ("sequence", ["s0", "s0", "s1", "s2"])
    b = _result(np.array([[0.0], [2.0], [1.0], [1.0]]), matched_to=links)
    found = compare_groups(a, b, "margin")
    assert found.attrs["n_b"] == 3
    assert float(found["difference"][0]) == pytest.approx((1 + 3 + 5) / 3)


def test_equal_groups_differ_by_nothing() -> None:
    a = _result(np.tile(np.arange(6.0)[:, None], (1, 2)), np.zeros(6))
    found = compare_groups(a, a, "margin", of="effect")
    assert found["p"].values.tolist() == [1, 1]
    with pytest.raises(ResultError, match="sites"):
        compare_groups(a, _result(np.zeros((6, 3)), np.zeros(6)), "margin")
