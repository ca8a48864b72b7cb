"""One plotly figure for each kind of labeled array.

Every function takes xarray objects (mostly what `Result.mean_ci` returns) and returns a
`plotly.graph_objects.Figure`; none shows it. `Result.plot` chooses the function by the kind of result.
"""

from __future__ import annotations

from memlens.figures.exploring import heatmap_attention, heatmap_effects, heatmap_lens
from memlens.figures.heatmaps import heatmap_layer_head, heatmap_layer_position, heatmap_paths
from memlens.figures.labels import MetricText, metric_text, plain, unique_tokens, visible
from memlens.figures.lines import decoding_panels, dots_with_intervals, line_over_layers
from memlens.figures.models import curves_by_family, model_dots, shares_by_model, similarity_map, sizes
from memlens.figures.panels import attribution_panels, frontier_panels, recall_panels, scatter_agreement
from memlens.figures.theme import DARK_TEMPLATE, OKABE_ITO, TEMPLATE, dark

__all__ = [
    "DARK_TEMPLATE",
    "OKABE_ITO",
    "TEMPLATE",
    "MetricText",
    "attribution_panels",
    "curves_by_family",
    "dark",
    "decoding_panels",
    "dots_with_intervals",
    "frontier_panels",
    "heatmap_attention",
    "heatmap_effects",
    "heatmap_layer_head",
    "heatmap_layer_position",
    "heatmap_lens",
    "heatmap_paths",
    "line_over_layers",
    "metric_text",
    "model_dots",
    "plain",
    "recall_panels",
    "scatter_agreement",
    "shares_by_model",
    "similarity_map",
    "sizes",
    "unique_tokens",
    "visible",
]
