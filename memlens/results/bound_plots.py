"""What a bypass changes beside what it could change: lines over layers, on a logarithmic axis."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from memlens.errors import OptionError
from memlens.results.plots import means, plot_layer_lines, subtitle_of, with_dims
from memlens.results.result import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = ["plot_bounds"]

_LINES = {
    "attention, measured": ("measured", "B1"),
    "B1: what heads mix": ("limit", "B1"),
    "B2: attention to others": ("limit", "B2"),
    "after its norm, measured": ("measured", "B3"),
    "B3: weights alone": ("limit", "B3"),
    "block, measured": ("measured", "B4"),
    "B4: the block": ("limit", "B4"),
}
_BY_BOUND = {
    "slack": ("bound", "bound over measured", False),
    "total_slack_log10": ("total", "log10 of bound over measured", True),
    "total_limit_log10": ("total", "log10 of the bound", True),
    "total_measured": ("total", "change, all tokens together", False),
}


def plot_bounds(
    result: Result,
    metric: str | None,
    *,
    group: str | None = None,
    title: str | None = None,
    **intervals: Any,
) -> go.Figure:
    """Draw what each layer's bypass changes and its bounds, the mean over tokens; or one metric."""
    from memlens import figures

    if group is not None:
        raise OptionError("group= is not drawn for bounds: select one group's sequences first.")
    if metric is not None and metric not in (*_BY_BOUND, "measured", "limit"):
        return plot_layer_lines(result, metric, title=title, **intervals)
    if metric in _BY_BOUND:
        dim, words, linear = _BY_BOUND[metric]
        ci = means(result, [metric], (dim, "layer"), **intervals)
        heading = title or f"Bypassed attention: {words}"
    else:
        given = means(
            result,
            [n for n in with_dims(result, "bound", "layer") if n != "slack"],
            ("bound", "layer"),
            **intervals,
        )
        ci, words, linear = _stacked(given), "norm of the change", False
        heading = title or "Bypassed attention: what changes, and what bounds it"
    fig = figures.line_over_layers(
        ci, title=heading, subtitle=subtitle_of(result, of="value", level=ci.attrs["level"])
    )
    fig.update_yaxes(title_text=words, type="linear" if linear else "log", exponentformat="power")
    return fig


def _stacked(ci: xr.Dataset) -> xr.Dataset:
    """One line for each bound, and one for each quantity that is measured.

    What a block adds is what attention gives where no norm stands after it, and in a parallel block the
    output changes by that alone: such lines would hide each other.
    """
    measured = ci["measured"].sel(statistic="mean")
    same = {b for b in ("B3", "B4") if np.allclose(measured.sel(bound=b), measured.sel(bound="B1"))}
    hidden = {("measured", b) for b in same} | ({("limit", "B4")} & {("limit", b) for b in same})
    shown = {label: line for label, line in _LINES.items() if line not in hidden}
    parts = [ci[name].sel(bound=bound).drop_vars("bound") for name, bound in shown.values()]
    plain = [p.drop_vars([c for c in p.coords if str(c).startswith("n_")]) for p in parts]
    lines = xr.concat(plain, dim=xr.DataArray(list(shown), dims="line", name="line"))
    return xr.Dataset({"change": lines.transpose("statistic", "line", "layer")}, attrs=ci.attrs)
