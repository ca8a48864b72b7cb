"""The share of lost recall that patching restores, over all sequences."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import pandas as pd
import xarray as xr

from memlens.errors import ResultError
from memlens.results.statistics.intervals import ratio_interval, rows_by_group

if TYPE_CHECKING:
    from memlens.results.result import Result


def restorable_metric(result: Result) -> str | None:
    """Return the first metric with values from a clean and a corrupt run, or None."""
    names = [name for name in result.metrics if {f"{name}_clean", f"{name}_corrupt"} <= set(result.data)]
    return names[0] if names else None


def changed_too_little(result: Result, metric: str | None = None) -> bool:
    """Return whether the corruption changed a metric too little to say what share of it patching restores.

    That is where the mean over sequences of clean minus corrupt has an interval that includes 0.
    """
    name = metric or restorable_metric(result)
    if name is None:
        return False
    lost = result[f"{name}_clean"] - result[f"{name}_corrupt"]
    whole = lost.mean([dim for dim in lost.dims if dim != "sequence"])
    return bool(ratio_interval(whole, whole).isnull().sel(statistic="mean"))


def restored_share(
    result: Result,
    dim: str | Iterable[str] = "sequence",
    *,
    metric: str | None = None,
    group: str | None = None,
    **options: Any,
) -> xr.Dataset:
    r"""Return the share of the lost recall that each patch restores, over all sequences together.

    .. math:: \frac{\sum_i m_{\mathrm{patched},i} - m_{\mathrm{corrupt},i}}
                   {\sum_i m_{\mathrm{clean},i} - m_{\mathrm{corrupt},i}}

    with sums over sequences: 0 is the corrupt run and 1 the clean one. The mean of `normalized_effect`, the
    same ratio within each sequence, is dominated by the sequences that the corruption hardly harmed. Where
    the corruption changed too little (see `changed_too_little`), the share is NaN.

    Args:
        result: A result of activation or path patching, or of its estimate from gradients.
        dim: `"sequence"`, or several dimensions with it: the others are averaged within each sequence
            first, as targets always are.
        metric: Which metric; by default the first that both runs measured.
        group: A coordinate along `sequence`; shares are then computed within each group.
        options: `level`, `n_resamples` and `seed` of the percentile bootstrap over sequences.

    Returns:
        A dataset as `Result.mean_ci` gives: `restored_share` `[statistic, ...]`, statistics `mean` (the
        share), `low`, `high`, with the coordinate `n_restored_share` (sequences).

    Raises:
        ResultError: The result has no clean and corrupt run, or lacks the metric.

    Example:
        >>> from memlens.results.result import Result
        >>> data = {"m": [0.9, 1.0], "m_clean": [1.0, 1.1], "m_corrupt": [0.0, 1.0]}
        >>> result = Result.create(
        ...     xr.Dataset({name: ("sequence", values) for name, values in data.items()}),
        ...     kind="activation_patching",
        ... )
        >>> float(restored_share(result)["restored_share"].sel(statistic="mean").round(2))
        0.82
    """
    name = metric or restorable_metric(result)
    if name is None or not {f"{name}_clean", f"{name}_corrupt"} <= set(result.data):
        what = "no metric" if metric is None else f"{metric!r} not"
        raise ResultError(f"this {result.kind} result has {what} measured in a clean and in a corrupt run.")
    inner = {dim} if isinstance(dim, str) else set(dim)
    inner = (inner | {"target"}) - {"sequence"}
    gained = (result[run] - result[f"{name}_corrupt"] for run in (name, f"{name}_clean"))
    part, whole = (array.mean([d for d in array.dims if d in inner]) for array in gained)
    if group is None:
        share = ratio_interval(part, whole, **options)
    else:
        rows = rows_by_group(result[group])
        parts = [
            ratio_interval(part.isel(sequence=own), whole.isel(sequence=own), **options)
            for own in rows.values()
        ]
        share = xr.concat(parts, dim=pd.Index(list(rows), name=group), combine_attrs="override", coords=["n"])
    attrs = {**result.data.attrs, "metric": name, "n_sequences": result.data.sizes["sequence"]}
    return xr.Dataset({"restored_share": share.rename(n="n_restored_share")}, attrs=attrs)
