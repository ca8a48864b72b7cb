"""Figures of many models: what stands where, and that names are shown as they are."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from scipy.cluster import hierarchy

from memlens.errors import ResultError
from memlens.figures.models import curves_by_family, model_dots, shares_by_model, similarity_map, sizes
from memlens.studies.comparative.analyze.profiles import cluster


@pytest.fixture
def models() -> pd.DataFrame:
    rows = [(f"{f}-{i}", f, 10.0**i, 0.1 * i, 0.05 * i, 0.2 * i) for f in ("a", "<b>") for i in (3, 2, 1)]
    return pd.DataFrame(rows, columns=["model", "family", "n_params", "rate", "low", "high"])


def test_sizes_are_sorted_lines_on_a_logarithmic_axis(models: pd.DataFrame) -> None:
    fig = sizes(models)
    assert [trace.name for trace in fig.data] == ["a", "&lt;b&gt;"]
    assert list(fig.data[0].x) == [10, 100, 1000]
    assert list(fig.data[0].error_y.array) == pytest.approx([0.1, 0.2, 0.3])
    assert fig.layout.xaxis.type == "log"
    with pytest.raises(ResultError, match="n_params"):
        sizes(models.drop(columns="n_params"))
    with pytest.raises(ResultError, match="no rows"):
        sizes(models[:0])


def test_curves_have_a_panel_a_family_and_a_line_a_model(models: pd.DataFrame) -> None:
    points = models.assign(mean=models["rate"], alpha=0.5)
    points = pd.concat([points, points.assign(alpha=0.0)])
    fig = curves_by_family(points, "alpha")
    lines = [trace for trace in fig.data if trace.hovertemplate]
    assert len(lines) == 6
    assert {trace.xaxis for trace in lines} == {"x", "x2"}
    assert list(lines[0].x) == [0.0, 0.5]
    assert "a-3<br>" in lines[0].hovertemplate
    assert "&lt;b&gt;-3<br>" in lines[3].hovertemplate
    dropped = curves_by_family(points, "alpha", log_x=True)
    assert all(0 not in trace.x for trace in dropped.data)


def _entries(fig: go.Figure) -> list[str]:
    return [trace.name for trace in fig.data if trace.showlegend]


def test_the_legend_names_places_in_a_family_and_styles_once(models: pd.DataFrame) -> None:
    points = models.assign(mean=models["rate"], depth=models["n_params"])
    both = pd.concat([points.assign(group="memorized"), points.assign(group="control")])
    fig = curves_by_family(both, "depth", dash="group")
    places = ["1st in size", "2nd in size", "3rd in size"]
    assert _entries(fig) == [*places, "memorized", "control"]
    for place in places:  # one color, and one click, for a place in all families
        group = [trace for trace in fig.data if trace.legendgroup == place and trace.hovertemplate]
        assert len(group) == 4
        assert len({trace.line.color for trace in group}) == 1
    assert _entries(curves_by_family(points[points["family"] == "a"], "depth")) == ["a-3", "a-2", "a-1"]
    assert _entries(curves_by_family(points[points["model"].str.endswith("-1")], "depth")) == []


def test_hovering_tells_interval_and_count(models: pd.DataFrame) -> None:
    points = models.assign(mean=models["rate"], n=7)
    for trace in (
        curves_by_family(points, "n_params").data[1],
        sizes(points.sort_values("n_params", ascending=False)[::-1]).data[0],
        model_dots(points).data[0],
    ):
        assert "[%{customdata[0]:.4g}, %{customdata[1]:.4g}]<br>n = %{customdata[2]:d}" in trace.hovertemplate
        assert len(trace.customdata) == len(trace.y)
        rates = trace.x if trace.orientation == "h" or isinstance(trace.y[0], str) else trace.y
        np.testing.assert_allclose(trace.customdata[:, 0], np.asarray(rates) / 2)
    bare = curves_by_family(points.drop(columns=["low", "high", "n"]), "n_params").data[0]
    assert bare.customdata is None


def test_only_the_lowest_panels_name_their_axis(models: pd.DataFrame) -> None:
    many = pd.concat([models.assign(family=f"f{place}", model=f"m{place}") for place in range(6)])
    fig = curves_by_family(many.assign(mean=many["rate"]), "n_params", x_title="size")
    titles = [fig.layout[f"xaxis{place or ''}"].title.text for place in ("", 2, 3, 4, 5, 6)]
    assert titles == ["", "", "size", "size", "size", "size"]


def test_kinds_are_dashed_and_colored_where_a_family_has_one_model(models: pd.DataFrame) -> None:
    points = models.assign(mean=models["rate"], depth=models["n_params"], low=np.nan, high=np.nan)
    both = pd.concat([points.assign(group="memorized"), points.assign(group="control")])
    lines = [trace for trace in curves_by_family(both, "depth", dash="group").data if trace.hovertemplate]
    assert {line.line.dash for line in lines} == {"solid", "dot"}
    assert lines[0].line.color == lines[1].line.color
    fig = curves_by_family(both[both["model"].str.endswith("-1")], "depth", dash="group")
    assert fig.data[0].line.color != fig.data[1].line.color
    assert fig.data[0].line.color == fig.data[2].line.color
    assert _entries(fig) == ["memorized", "control"]


def test_shares_and_dots_have_a_row_a_model(models: pd.DataFrame) -> None:
    parts = pd.concat([models.assign(part="x", share=0.25), models.assign(part="y", share=0.75)])
    fig = shares_by_model(parts, "part")
    assert [bar.name for bar in fig.data] == ["x", "y"]
    assert sum(bar.x[0] for bar in fig.data) == 1
    dots = models.assign(mean=models["rate"], chance=0.1)
    fig = model_dots(dots, reference="chance")
    assert [trace.name for trace in fig.data] == ["a", "&lt;b&gt;", "chance"]
    assert list(fig.data[2].x) == [0.1] * 6
    twice = pd.concat([dots.assign(kind="inside"), dots.assign(kind="across")])
    assert len(set(model_dots(twice).layout.yaxis.categoryarray)) == 12


def test_the_map_stands_in_the_order_of_its_tree() -> None:
    rng = np.random.default_rng(0)
    profiles = rng.random((6, 5))
    similarity = np.corrcoef(profiles)
    merges, order = cluster(similarity)
    labels = [f"m{i}" for i in range(6)]
    fig = similarity_map(similarity, labels, merges, order)
    tree, heat = fig.data[:-1], fig.data[-1]
    assert len(tree) == 5
    assert heat.z[0][1] == pytest.approx(similarity[order[0], order[1]])
    assert list(fig.layout.xaxis2.ticktext) == [labels[i] for i in order]
    # scipy's own dendrogram has the same heights, and its leaves stand at 5, 15, 25, …
    theirs = hierarchy.dendrogram(merges, no_plot=True)
    ours = sorted(tuple(round(y, 6) for y in branch.y) for branch in tree)
    assert ours == sorted(tuple(round(y, 6) for y in branch) for branch in theirs["dcoord"])
    places = sorted(tuple((x - 5) / 10 for x in branch) for branch in theirs["icoord"])
    assert [sorted(p) for p in places] == sorted(sorted(branch.x) for branch in tree)
    with pytest.raises(ResultError, match="2 labels"):
        similarity_map(similarity, ["a", "b"], merges, order)
