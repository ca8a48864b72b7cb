"""The registry of kinds: a figure, a reading and known citations for each; options checked once for all."""

from __future__ import annotations

import html
from typing import Any

import plotly.graph_objects as go
import pytest
import xarray as xr

from memlens.errors import OptionError, ResultError, SiteError
from memlens.report.bibliography import REFERENCES, citations_of
from memlens.report.run_directory import RunDirectory
from memlens.results.kinds import KINDS, Kind, overlay, plot_result, reading, register_kind
from memlens.results.plots.selection import Selection, takes
from memlens.results.result import Result
from tests.report import synthetic

NAMES = {
    "residual_decoding", "head_ablation", "head_pair_ablation", "cumulative_head_ablation",
    "attention_bypass", "bypass_bounds", "bypass_predictor", "bypass_sets", "bypass_controls",
    "bypass_frontier", "task_accuracy", "mlp_ablation", "neuron_knockout", "residual_perturbation",
    "prefix_perturbation", "extraction_curve", "prompt_compression", "activation_patching",
    "path_patching", "gradient_attribution", "neuron_ablation", "neuron_patching", "logit_attribution",
    "sweep", "recall", "recall_over_training", "token_frequency",
}  # fmt: skip


def test_every_kind_of_memlens_is_registered() -> None:
    assert set(KINDS) >= NAMES


def test_every_kind_has_a_figure_a_reading_and_known_citations() -> None:
    for kind in KINDS.values():
        assert callable(kind.plot), kind.name
        assert callable(kind.reading), kind.name
        assert isinstance(kind.cites, tuple), kind.name
        assert {key for key, _ in kind.cites} <= set(REFERENCES), kind.name
        assert all(what for _, what in kind.cites), kind.name


@pytest.mark.parametrize("missing", ["plot", "reading"])
def test_a_kind_without_a_figure_or_a_reading_is_an_error(missing: str) -> None:
    parts: dict[str, Any] = {"plot": lambda r, s: go.Figure(), "reading": lambda r, m: "", missing: None}
    with pytest.raises(OptionError, match=f"needs a function as its {missing}"):
        Kind("mine", **parts)
    parts.pop(missing)
    with pytest.raises(TypeError, match=missing):
        register_kind("mine", **parts)
    assert "mine" not in KINDS


def test_a_name_is_given_once() -> None:
    with pytest.raises(OptionError, match="registered already"):
        register_kind("sweep", plot=lambda r, s: go.Figure(), reading=lambda r, m: "")


def test_a_kind_of_another_package_is_drawn_read_and_cited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KINDS, "_items", dict(KINDS._items))
    asked: dict[str, Any] = {}

    @takes(of="value", group=None)
    def plot(result: Result, selection: Selection, *, width: int = 3) -> go.Figure:
        asked.update(selection=selection, width=width)
        return go.Figure()

    register_kind(
        "of_a_plugin", plot=plot, reading=lambda r, m: f"{m} of {r.kind}", cites=(("meng2022", "the idea"),)
    )
    result = Result(synthetic.head_ablation().data.assign_attrs(kind="of_a_plugin"))
    result.plot("exact_match", width=5, level=0.9)
    assert asked == {"selection": Selection("exact_match", of="value", level=0.9), "width": 5}
    assert reading(result, "exact_match") == "exact_match of of_a_plugin"
    assert ("meng2022", "the idea") in [(c.key, c.what) for c in citations_of(result)]
    with pytest.raises(OptionError, match="plot option"):
        result.plot(sequence="seq-000")


def test_an_unknown_kind_is_drawn_by_its_dimensions_and_has_no_reading() -> None:
    heads = synthetic.head_ablation()
    unknown = Result(heads.data.assign_attrs(kind="of_tomorrow"))
    assert plot_result(unknown).data[0].z.shape == (synthetic.LAYERS, synthetic.HEADS)
    lines = Result(synthetic.attention_bypass().data.assign_attrs(kind="of_tomorrow")).plot()
    assert len(lines.data[1].x) == synthetic.LAYERS
    assert reading(unknown) == ""


@pytest.mark.parametrize(
    ("option", "value"), [("level", 1.0), ("method", "guess"), ("n_resamples", 0), ("of", "both")]
)
def test_options_are_checked_once_for_all_figures(option: str, value: Any) -> None:
    with pytest.raises(OptionError, match=option):
        synthetic.head_ablation().plot(**{option: value})


def test_an_option_that_a_figure_does_not_have_is_an_error() -> None:
    with pytest.raises(OptionError, match="sequence"):
        synthetic.attention_bypass().plot(sequence="seq-000")
    with pytest.raises(OptionError, match="stream"):
        synthetic.head_ablation().plot(stream="resid_mid")
    with pytest.raises(SiteError, match="nobody"):
        synthetic.head_ablation().plot(sequence="nobody")


def test_an_overlay_draws_one_line_per_result() -> None:
    result = synthetic.attention_bypass()
    parts = {name: Result(result.data.isel(sequence=rows)) for name, rows in
             (("a", slice(0, 24)), ("b", slice(24, 48)))}  # fmt: skip
    drawn = overlay(parts, "exact_match")
    assert [t.name for t in drawn.data if t.showlegend and t.mode == "lines+markers"][:2] == ["a", "b"]
    assert drawn.layout.title.text == "Attention bypass (a: 24, b: 24 sequences)"


def test_colors_and_words_follow_the_direction_of_a_metric() -> None:
    values = xr.DataArray([[[1.0, 3.0]], [[2.0, 4.0]], [[3.0, 5.0]]], dims=("sequence", "layer", "head"))
    data = {"loss": values, "loss_baseline": xr.zeros_like(values[:, 0, 0])}
    notes = {
        "higher": "red = recall harmed",
        "lower": "red = recall harmed",
        None: "red = lower, blue = higher",
    }
    scales = {"higher": "RdBu", "lower": "RdBu_r", None: "RdBu"}
    for better, note in notes.items():
        attrs = {"label": "loss", **({"better": better} if better else {})}
        result = Result.create(
            xr.Dataset({"loss": data["loss"].assign_attrs(attrs), "loss_baseline": data["loss_baseline"]}),
            kind="head_ablation",
        )
        fig = result.plot()
        assert note in fig.layout.title.subtitle.text
        expected = go.Figure(go.Heatmap(z=[[0]], colorscale=scales[better])).data[0].colorscale
        assert fig.data[0].colorscale == expected


@pytest.fixture
def own_kind(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Registers a kind for one test, and returns a result of it."""

    def made(plot: Any, read: Any) -> Result:
        monkeypatch.setattr(KINDS, "_items", dict(KINDS._items))
        register_kind("of_a_plugin", plot=plot, reading=read)
        return Result(synthetic.head_ablation().data.assign_attrs(kind="of_a_plugin"))

    return made


def test_a_plot_function_returns_a_figure_and_a_reading_a_text(own_kind: Any) -> None:
    result = own_kind(lambda result, selection: None, lambda result, metric: None)
    with pytest.raises(ResultError, match="plot function of the kind 'of_a_plugin' returned NoneType"):
        result.plot()
    with pytest.raises(ResultError, match="reading of the kind 'of_a_plugin' returned None"):
        reading(result)


def test_a_reading_that_fails_costs_no_figure(own_kind: Any, tmp_path: Any) -> None:
    def broken(result: Result, metric: str | None) -> str:
        raise TypeError("no reading today")

    result = own_kind(lambda result, selection: go.Figure(layout={"title": {"text": "My own"}}), broken)
    run = RunDirectory(tmp_path, title="T", settings={})
    run.add_result("mine", result)
    text = run.finish().read_text()
    assert "The result 'mine' has no reading: TypeError: no reading today" in html.unescape(text)
    assert text.count("<figure>") == 1
    assert "My own" in text


def test_a_figure_that_fails_is_named_with_the_type_of_the_error(own_kind: Any, tmp_path: Any) -> None:
    def broken(result: Result, selection: Selection) -> go.Figure:
        raise KeyError("layer")

    run = RunDirectory(tmp_path, title="T", settings={})
    run.add_result("mine", own_kind(broken, lambda result, metric: "A reading."))
    said = html.unescape(run.finish().read_text())
    assert "The result 'mine' cannot be shown: KeyError: 'layer'" in said


def test_what_a_kind_cites_is_named_in_pairs() -> None:
    with pytest.raises(OptionError, match="the kind 'mine' cites 'meng2022'"):
        Kind("mine", lambda r, s: go.Figure(), lambda r, m: "", ("meng2022", "the idea"))  # type: ignore[arg-type]
