from __future__ import annotations

import json

import numpy as np
import plotly.graph_objects as go
import pytest
import xarray as xr

from memlens import figures
from memlens.figures import theme
from tests.report import synthetic


def _ci(result_name: str, **options: object) -> xr.Dataset:
    return synthetic.ALL[result_name]().mean_ci(**options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def heads() -> xr.Dataset:
    return _ci("head_ablation", of="effect")


def test_map_shows_the_array_with_layers_up(heads: xr.Dataset) -> None:
    fig = figures.heatmap_layer_head(heads)
    trace = fig.data[0]
    np.testing.assert_array_equal(trace.z, heads["target_logprob"].sel(statistic="mean"))
    assert list(trace.y) == list(range(8))
    assert list(trace.x) == list(range(6))
    assert fig.layout.yaxis.title.text == "layer"
    assert fig.layout.yaxis.autorange in (None, True)  # not reversed: layer 0 is below


def test_map_is_the_same_whatever_the_order_of_dimensions(heads: xr.Dataset) -> None:
    turned = heads.transpose("head", "layer", "statistic")
    np.testing.assert_array_equal(
        figures.heatmap_layer_head(turned).data[0].z, figures.heatmap_layer_head(heads).data[0].z
    )


def test_signed_maps_are_white_at_zero_and_even(heads: xr.Dataset) -> None:
    for trace in figures.heatmap_layer_head(heads).data:
        assert trace.zmid == 0
        assert trace.zmin == -trace.zmax
        assert trace.zmax == pytest.approx(np.abs(trace.z).max())


def test_red_is_harm_for_every_metric(heads: xr.Dataset) -> None:
    """Log-prob falls and rank rises when recall is harmed; both must end up at the red end."""
    traces = dict(zip(heads.data_vars, figures.heatmap_layer_head(heads).data, strict=True))
    for name in ("target_logprob", "target_rank"):
        trace = traces[name]
        worst = trace.z.min() if name == "target_logprob" else trace.z.max()
        place = (worst - trace.zmin) / (trace.zmax - trace.zmin)
        colors = [color for _, color in trace.colorscale]
        color = colors[0] if place < 0.5 else colors[-1]
        red, _, blue = (int(part) for part in color.removeprefix("rgb(").removesuffix(")").split(","))
        assert red > blue


def test_hover_holds_mean_interval_and_count(heads: xr.Dataset) -> None:
    trace = figures.heatmap_layer_head(heads).data[0]
    row = heads["target_logprob"].sel(layer=3, head=1)
    np.testing.assert_allclose(trace.customdata[3, 1], [*row.values, 48], rtol=1e-6)
    for part in ("layer %{y}", "head %{x}", "customdata[1]", "customdata[2]", "n = %{customdata[3]"):
        assert part in trace.hovertemplate


def test_menu_shows_one_metric_at_a_time(heads: xr.Dataset) -> None:
    fig = figures.heatmap_layer_head(heads)
    buttons = fig.layout.updatemenus[0].buttons
    assert [trace.visible for trace in fig.data] == [True, False, False]
    assert [button.args[0]["visible"] for button in buttons] == np.eye(3, dtype=bool).tolist()
    assert not figures.heatmap_layer_head(heads[["exact_match"]]).layout.updatemenus


def test_groups_share_one_scale() -> None:
    grouped = _ci("head_ablation", metric="target_logprob", of="effect", group="domain")
    fig = figures.heatmap_layer_head(grouped)
    assert len(fig.data) == 3
    assert len({(trace.zmin, trace.zmax) for trace in fig.data}) == 1
    assert [note.text for note in fig.layout.annotations] == ["code", "dialogue", "table"]
    np.testing.assert_array_equal(
        fig.data[1].z, grouped["target_logprob"].sel(statistic="mean", domain="dialogue")
    )


def _grouped(n: int) -> xr.Dataset:
    parts = [_ci("head_ablation", of="effect") * (1 + place) for place in range(n)]
    return xr.concat(parts, xr.DataArray([f"<{place}>" for place in range(n)], dims="kind", name="kind"))


def test_many_groups_stand_one_at_a_time_beside_the_metrics_menu() -> None:
    grouped = _grouped(5)
    fig = figures.heatmap_layer_head(grouped)
    metrics, groups = fig.layout.updatemenus
    assert len(fig.data) == 15
    assert {trace.xaxis for trace in fig.data} == {"x"}
    assert [button.label for button in groups.buttons] == [f"kind: &lt;{place}&gt;" for place in range(5)]
    for m, metric in enumerate(metrics.buttons):
        for g, button in enumerate(groups.buttons):
            visible, state = metric.args[0]["visible"], button.args[0]
            seen = [a and b == 1 and c != "" for a, b, c in zip(visible, *state.values(), strict=True)]
            assert sum(seen) == 1
            expected = grouped[list(grouped.data_vars)[m]].sel(statistic="mean").isel(kind=g)
            np.testing.assert_array_equal(fig.data[seen.index(True)].z, expected)
    assert [trace.opacity for trace in fig.data[:5]] == [1, 0, 0, 0, 0]
    assert [trace.showscale for trace in fig.data[:5]] == [True, False, False, False, False]


def test_a_ratio_with_wild_tails_does_not_drown_the_rest() -> None:
    """The share that patching restores is wild where hardly anything was lost; colors end at the whole."""
    patched = synthetic.activation_patching()
    patched.data["normalized_effect"][0] = 40.0
    trace = patched.plot(metric="normalized_effect").data[0]
    assert (trace.zmin, trace.zmax) == (-1, 1)
    small = _ci("head_ablation", of="effect")[["target_logprob"]] / 99
    weak = figures.heatmap_layer_head(small.rename(target_logprob="normalized_effect")).data[0]
    assert weak.zmax == pytest.approx(np.abs(weak.z).max())
    assert weak.zmax < 1


def test_hovering_tells_the_token() -> None:
    trace = synthetic.residual_decoding().plot(sequence="seq-003").data[0]
    assert "target %{text}<br>" in trace.hovertemplate
    assert list(trace.text[0][:5]) == ["0 · ·the", *trace.text[0][1:4], "4 · &lt;b&gt;"]
    assert np.shape(trace.text) == trace.z.shape


def test_dark_changes_page_and_ink_but_no_data(heads: xr.Dataset) -> None:
    light = figures.heatmap_layer_head(heads)
    night = figures.dark(light)
    assert night.layout.template.layout.paper_bgcolor == "#14181d"
    assert night.layout.template.layout.font.color == "#e4e7eb"
    assert night.layout.updatemenus[0].bgcolor == "#14181d"
    assert night.layout.updatemenus[0].buttons == light.layout.updatemenus[0].buttons
    assert night.data == light.data
    lined = figures.dark(synthetic.activation_patching().plot())  # a line of ink before the continuation
    assert lined.layout.shapes[0].line.color == "#e4e7eb"
    lined.add_shape(type="rect", line={"color": "#009E73"})  # a frame in a color of its own
    assert figures.dark(lined).layout.shapes[1].line.color == "#009E73"
    assert light.layout.template == figures.TEMPLATE


def test_tokens_label_positions_uniquely_and_escaped() -> None:
    fig = synthetic.residual_decoding().plot(sequence="seq-003")
    labels = fig.data[0].x
    assert fig.layout.xaxis.type == "category"
    assert len(set(labels)) == 12
    assert labels[0] == "·the_0"
    assert labels[7] == "·the_7"
    assert labels[4] == "&lt;b&gt;_4"
    assert not any("<" in label or "$" in label for label in labels)


def test_ragged_sequences_end_where_they_end() -> None:
    result = synthetic.residual_decoding()
    for name in result.metrics:
        if name != "first_promotion":
            result.data[name][3, :, 9:] = np.nan
    fig = result.plot(sequence="seq-003")
    assert len(fig.data[0].x) == 9
    assert fig.data[0].z.shape == (8, 9)


def test_a_ragged_patch_map_ends_where_its_sequence_ends() -> None:
    """Places that a shorter sequence does not have are not drawn: their tokens are NaN."""
    result = synthetic.activation_patching()
    result.data["token"] = result.data["token"].astype(object)
    for name in ("target_logprob", "normalized_effect", "token"):
        result.data[name][3, ..., 13:] = np.nan
    fig = result.plot(sequence="seq-003")
    assert [label.rpartition("_")[2] for label in fig.data[0].x] == [str(place) for place in range(13)]
    assert not any("nan" in label for label in fig.data[0].x)
    assert len(result.plot(sequence="seq-004").data[0].x) == 20


def test_boundary_stands_before_the_first_target() -> None:
    fig = synthetic.activation_patching().plot()
    assert fig.layout.shapes[0].x0 == 9.5
    assert fig.layout.annotations[0].text == "prefix | continuation"


def test_restricted_positions_keep_their_tokens() -> None:
    result = synthetic.activation_patching()
    tokens = result.data["token"].values[0]
    chosen = type(result)(result.data.isel(position=[2, 7]))
    fig = chosen.plot(sequence="seq-003")
    assert list(fig.data[0].x) == figures.unique_tokens([tokens[2], tokens[7]], [2, 7])


def test_lines_and_bands_are_the_intervals() -> None:
    ci = _ci("attention_bypass", metric="target_logprob")
    base = synthetic.attention_bypass().mean_ci(metric="target_logprob_baseline")
    band, line, dashed = figures.line_over_layers(
        ci, baseline=base.rename(target_logprob_baseline="target_logprob")
    ).data
    mean, low, high = ci["target_logprob"].values
    np.testing.assert_array_equal(line.y, mean)
    np.testing.assert_array_equal(band.y, [*high, *low[::-1]])
    assert set(dashed.y) == {float(base["target_logprob_baseline"].sel(statistic="mean"))}
    assert dashed.line.dash == "dash"


def test_band_skips_what_has_no_interval() -> None:
    ci = _ci("attention_bypass", metric="target_logprob")
    ci["target_logprob"][1:, 2] = np.nan
    band = figures.line_over_layers(ci).data[0]
    assert len(band.x) == 14
    assert np.isfinite(np.asarray(band.y, dtype=float)).all()


def test_decoding_has_rank_one_at_the_top() -> None:
    result = synthetic.residual_decoding()
    fig = result.plot()
    line = next(trace for trace in fig.data if trace.mode == "lines+markers" and trace.yaxis == "y2")
    expected = np.exp(np.log(result["rank"] + 1).mean(("sequence", "target")))
    np.testing.assert_allclose(line.y, expected)
    assert fig.layout.yaxis2.autorange == "reversed"
    assert fig.layout.yaxis2.type == "log"


def test_interventions_are_sorted_and_drawn_with_intervals() -> None:
    ci = _ci("sweep", metric="target_logprob", of="effect")
    trace = figures.dots_with_intervals(ci).data[0]
    assert list(trace.x) == sorted(trace.x)
    worst = ci["target_logprob"].sel(intervention=trace.y[0])
    assert trace.error_x.array[0] == pytest.approx(float(worst.sel(statistic="high")) - trace.x[0])
    assert trace.error_x.arrayminus[0] == pytest.approx(trace.x[0] - float(worst.sel(statistic="low")))


def test_long_lists_keep_the_strongest_and_say_so() -> None:
    ci = _ci("sweep", metric="target_logprob", of="effect")
    fig = figures.dots_with_intervals(ci, most=3)
    means = ci["target_logprob"].sel(statistic="mean").values
    assert sorted(np.abs(fig.data[0].x)) == pytest.approx(sorted(np.abs(means))[-3:])
    assert "the 3 of 14" in fig.layout.title.subtitle.text


def test_attribution_shows_heads_and_layers() -> None:
    result = synthetic.logit_attribution()
    heads, attn, mlp = result.plot().data
    np.testing.assert_allclose(heads.z, result["heads"].mean("sequence"))
    np.testing.assert_allclose(attn.x, result["attn"].mean("sequence"))
    np.testing.assert_allclose(mlp.x, result["mlp"].mean("sequence"))
    assert attn.orientation == "h"  # layers go up, as in the map beside


def test_recall_rates_against_copies_are_in_order() -> None:
    result = synthetic.recall()
    fig = result.plot()
    line = next(trace for trace in fig.data if trace.name == "exact match")
    assert list(line.x) == ["0", "1", "4", "16", "64", "256"]
    top = result["exact_match"].values[result["copies"].values == 256].mean()
    assert line.y[-1] == pytest.approx(top)
    assert fig.data[-1].type == "histogram"
    assert len(fig.data[-1].x) == 48


def test_names_are_shown_as_text_everywhere() -> None:
    ci = _ci("sweep", metric="target_logprob", of="effect")
    fig = figures.dots_with_intervals(ci, title="<b>t</b>", subtitle="%{x} $y$")
    spec = json.loads(fig.to_json())
    for part in (
        *spec["data"][0]["y"],
        spec["layout"]["title"]["text"],
        spec["layout"]["title"]["subtitle"]["text"],
    ):
        assert "<b>" not in part
        assert "%{" not in part
        assert "$" not in part


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" a b", "·a·b"),
        ("\n\n", "↵↵"),
        ("", "∅"),
        ("\x00", "\\u0000"),
        ("\u200b", "\\u200b"),
        ("x" * 50, "x" * 19 + "…"),
    ],
)
def test_what_does_not_print_is_made_visible(token: str, shown: str) -> None:
    assert figures.visible(token) == shown


def test_letters_of_all_scripts_stay() -> None:
    for token in ("שלום", "🦊", "é", "漢字", "नमस्ते"):
        assert figures.visible(token) == token


def test_few_heads_have_whole_numbers() -> None:
    ci = synthetic.head_ablation(3, 4).mean_ci(metric="target_logprob", of="effect", n_resamples=50)
    assert figures.heatmap_layer_head(ci).layout.xaxis.dtick == 1


def test_unknown_metrics_are_spoken_of_by_their_own_attributes() -> None:
    array = xr.DataArray(0.0, attrs={"long_name": "my metric", "units": "bits"})
    assert figures.metric_text("mine", array).axis == "my metric (bits)"
    wordy = array.assign_attrs(long_name="what this is, said at some length in a whole sentence")
    assert figures.metric_text("mine", wordy).axis == "mine (bits)"
    assert figures.metric_text("target_logprob", wordy).axis == "target log-prob (nats)"
    assert figures.metric_text("margin", array.assign_attrs(of="effect")).label.startswith("change in margin")


def test_colors_tell_groups_apart() -> None:
    assert len(set(theme.group_colors(["a", "b", "c", "d", "e", "f", "g", "h"]))) == 8
    assert len(set(theme.group_colors(list(range(9))))) == 9
    assert len(set(theme.group_colors([str(i) for i in range(12)]))) == 12
    assert theme.translucent("#0072B2", 0.5) == "rgba(0,114,178,0.5)"
    assert theme.translucent("rgb(1, 2, 3)", 0.5) == "rgba(1,2,3,0.5)"


@pytest.mark.parametrize("name", list(synthetic.ALL))
def test_no_two_parts_of_a_figure_stand_in_one_place(name: str) -> None:
    """Legends are below the axes, menus above them, and the margins hold both."""
    fig: go.Figure = synthetic.ALL[name]().plot()
    legend, menus = any(trace.showlegend for trace in fig.data), bool(fig.layout.updatemenus)
    assert legend or menus or name == "residual_decoding"  # which has neither
    if legend:
        assert fig.layout.margin.b >= 100
    if menus:
        assert fig.layout.margin.t >= 130


def test_many_heads_and_positions_stay_light() -> None:
    ci = synthetic.head_ablation(48, 128).mean_ci(metric="target_logprob", of="effect", n_resamples=50)
    fig = figures.heatmap_layer_head(ci[["target_logprob"]])
    assert len(fig.to_json()) < 400_000
    assert fig.layout.xaxis.nticks <= 24


def test_what_is_made_from_a_metric_is_not_called_by_its_name() -> None:
    """Older files give the restored share the attributes of the metric."""
    result = synthetic.activation_patching()
    result.data["normalized_effect"].attrs = {"label": "target log-prob", "units": "nats", "better": "higher"}
    fig = result.plot("normalized_effect", sequence="seq-003")
    assert "recall restored" in fig.data[0].colorbar.title.text
    flips = xr.DataArray([0.0], dims="sequence", attrs={"label": "first prediction", "of": "effect"})
    assert figures.metric_text("prediction_flipped", flips).label == "change in prediction flipped"


def test_a_panel_without_values_has_the_axis_of_the_others() -> None:
    values = np.full((3, 2, 2, 4), 0.5)
    values[:, 1] = np.nan
    dims = ("statistic", "group", "layer", "position")
    coords = {"statistic": ["mean", "low", "high"], "group": ["a", "b"], "position": [30, 40, 50, 60]}
    ci = xr.Dataset({"target_logprob": (dims, values)}, coords | {"layer": [0, 1]})
    layout = figures.heatmap_layer_position(ci).layout
    assert layout.xaxis2.matches == "x"
