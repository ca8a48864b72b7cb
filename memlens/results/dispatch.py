"""From a kind of result to its figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memlens.errors import check_option

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from memlens.results.result import Result

__all__ = ["plot_result"]

_PLOTS: dict[str, Any] = {}


def plot_result(result: Result, metric: str | None = None, **options: Any) -> go.Figure:
    """Return the figure of `result`, by its kind."""
    check_option("kind", result.kind, sorted(_PLOTS))
    return _PLOTS[result.kind](result, metric, **options)
