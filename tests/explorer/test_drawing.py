"""The figures of a sequence hold its numbers, each in its own column and row."""

from __future__ import annotations

import numpy as np

from memlens.explorer.drawing import attention_figure, effects_figure, lens_figure
from tests.explorer.synthetic import view

ONE = view("a", ["the", " cat", " sat", " on", " <b>", " cat"], 2)


def test_effects_of_mlps_and_bypasses_stand_in_columns_of_their_own() -> None:
    heads, branches = effects_figure(ONE, "target_logprob", (1, 2)).data
    np.testing.assert_array_equal(np.array(heads.z, float), ONE.head_effects)
    titles = dict(zip(branches.x, np.array(branches.z, float).T, strict=True))
    axis = effects_figure(ONE, "target_logprob").layout.xaxis
    labels = dict(zip(axis.ticktext, axis.tickvals, strict=True))
    np.testing.assert_array_equal(titles[labels["MLP"]], ONE.mlp_effects)
    np.testing.assert_array_equal(titles[labels["bypass"]], ONE.bypass_effects)
    assert [list(row) for row in branches.customdata] == [["MLP", "bypass"]] * 3  # what hovering says


def test_the_lens_has_a_row_per_layer_and_a_column_per_target() -> None:
    (trace,) = lens_figure(ONE).data
    np.testing.assert_array_equal(np.array(trace.z, float), ONE.lens_probability)
    np.testing.assert_array_equal(np.array(trace.customdata), ONE.lens_rank)
    assert list(trace.x) == ["·sat_2", "·on_3", "·&lt;b&gt;_4", "·cat_5"]


def test_attention_goes_from_queries_to_keys() -> None:
    weights = ONE.attention[1, 3]
    trace = attention_figure(ONE, (1, 3), weights).data[0]
    below = np.tril_indices(6)
    np.testing.assert_allclose(np.array(trace.z, float)[below], weights[below] / 255)
