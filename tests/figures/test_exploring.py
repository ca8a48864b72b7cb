from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from memlens.figures.exploring import heatmap_attention, heatmap_effects, heatmap_lens
from memlens.figures.labels import unique_tokens

LAYERS = {"layer": [0, 1]}


def branches(mlp: list[float], bypass: list[float]) -> xr.Dataset:
    return xr.Dataset({"mlp": ("layer", mlp), "bypass": ("layer", bypass)}, LAYERS)


def test_heads_and_branches_have_scales_of_their_own_and_red_always_harms() -> None:
    heads = xr.DataArray([[0.1, -0.2, 0.0], [0.0, 0.05, np.nan]], LAYERS, dims=("layer", "head"))
    fig = heatmap_effects(heads, branches([-5, 1], [-2, 0]), metric="target_logprob", chosen=(1, 2))
    first, second = fig.data
    assert (first.zmin, first.zmax, second.zmin, second.zmax) == (-0.2, 0.2, -5, 5)
    assert list(first.x) == [0, 1, 2]
    assert list(second.x) == [4, 5]
    assert list(fig.layout.xaxis.ticktext) == ["0", "1", "2", "MLP", "bypass"]
    assert list(fig.layout.xaxis.tickvals) == [0, 1, 2, 4, 5]
    frame = fig.layout.shapes[0]
    assert (frame.x0, frame.x1, frame.y0, frame.y1) == (1.5, 2.5, 0.5, 1.5)
    assert first.colorscale == second.colorscale
    turned = heatmap_effects(heads, branches([1, 1], [1, 1]), metric="target_rank")
    assert turned.data[0].colorscale[0][1] == first.colorscale[-1][1] != first.colorscale[0][1]
    assert "nats" in first.hovertemplate


@pytest.mark.parametrize("n", [1, 5, 16, 32])
def test_the_names_of_the_branches_have_room_beside_any_number_of_heads(n: int) -> None:
    heads = xr.DataArray(np.zeros((2, n)), LAYERS, dims=("layer", "head"))
    fig = heatmap_effects(heads, branches([0, 0], [0, 0]), metric="exact_match")
    first, second = fig.data[1].x
    low, high = fig.layout.xaxis.range
    assert (second - first) / (high - low) > 0.16


def test_a_map_of_zeros_has_a_scale() -> None:
    heads = xr.DataArray(np.zeros((2, 3)), LAYERS, dims=("layer", "head"))
    fig = heatmap_effects(heads, branches([0, 0], [0, 0]), metric="exact_match")
    assert (fig.data[0].zmin, fig.data[0].zmax) == (-1, 1)
    assert not fig.layout.shapes


def test_attention_is_blank_above_the_diagonal_and_labels_are_unique() -> None:
    weights = xr.DataArray(np.tril(np.full((3, 3), 0.5)), dims=("query", "key"))
    fig = heatmap_attention(weights, unique_tokens([" a", "<b>", " a"]), boundary=2)
    z = np.array(fig.data[0].z, dtype=float)
    assert np.isnan(z[np.triu_indices(3, 1)]).all()
    assert (z[np.tril_indices(3)] == 0.5).all()
    assert list(fig.data[0].x) == ["·a_0", "&lt;b&gt;_1", "·a_2"] == list(fig.data[0].y)
    assert fig.layout.yaxis.autorange == "reversed"
    assert [shape.x0 for shape in fig.layout.shapes] == [1.5, -0.5]
    assert not np.isnan(weights.values).any()


def test_the_lens_goes_up_with_the_layer() -> None:
    data = xr.Dataset(
        {"probability": (("target", "layer"), [[0.1, 0.9]]), "rank": (("target", "layer"), [[7, 0]])}, LAYERS
    )
    trace = heatmap_lens(data, ["a_3"]).data[0]
    assert np.array(trace.z).tolist() == [[0.1], [0.9]]
    assert np.array(trace.customdata).tolist() == [[7], [0]]
    assert (trace.zmin, trace.zmax) == (0, 1)
