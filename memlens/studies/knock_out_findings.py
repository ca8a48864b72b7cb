"""What the knock-out grid says: its table, the layer that matters most, early against late layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd
import xarray as xr

from memlens.report import Finding
from memlens.results import Result
from memlens.results.statistics import mean_interval
from memlens.studies.idiom_findings import RECALLED, spoken
from memlens.studies.idiom_options import IdiomOptions
from memlens.studies.statistics import Estimate, chosen_site, halves, mean_estimate, share_estimate

__all__ = ["controls_in_words", "knock_out_table", "knocked_out", "largest_shared_k"]

_MEAN = {"flipped": "", "logprob": "_change"}


def largest_shared_k(result: Result) -> int:
    """Return the largest k that every selection has."""
    flipped = result["prediction_flipped"]
    over = [dim for dim in flipped.dims if dim not in ("k", "selection")]
    there = flipped.notnull().any(over)
    there = there.all("selection") if "selection" in there.dims else there
    return int(there["k"].values[there.values].max())


def knock_out_table(result: Result, dominant: Mapping[str, Result], options: IdiomOptions) -> pd.DataFrame:
    """Return one row a knock-out of each group and selection: flips with Wilson intervals, and the cost.

    Returns:
        Columns `group`, `selection`, `k`, `window`, `layer` (the window's first), `n`, `flipped`,
        `flipped_low`, `flipped_high` (share of items whose prediction changes, 95 % Wilson),
        `logprob_change`, `logprob_low`, `logprob_high` (of the target, nats, bootstrap over items).
    """
    parts = [_rows(part, RECALLED, label, options) for label, part in _by_selection(result)]
    parts += [_rows(part, name, "dominant", options) for name, part in dominant.items() if name != RECALLED]
    return pd.concat(parts, ignore_index=True)


def _by_selection(result: Result) -> Iterator[tuple[str, Result]]:
    if "selection" not in result.data.dims:
        yield "dominant", result
        return
    for label in result.data["selection"].values:
        yield str(label), Result(result.data.sel(selection=label, drop=True))


def _rows(part: Result, group: str, selection: str, options: IdiomOptions) -> pd.DataFrame:
    flips, cost = (
        _over_draws(array) for array in (part["prediction_flipped"], part.effect("target_logprob"))
    )
    shares = mean_interval(flips, method="wilson" if "draw" not in part.data.dims else "bootstrap")
    change = mean_interval(cost, method="bootstrap", n_resamples=options.n_resamples, seed=options.seed)
    columns: dict[str, Any] = {"n": shares["n"]}
    for key, array in (("flipped", shares), ("logprob", change)):
        for place, statistic in (("", "mean"), ("_low", "low"), ("_high", "high")):
            columns[f"{key}{place or _MEAN[key]}"] = array.sel(statistic=statistic, drop=True).drop_vars("n")
    table = xr.Dataset(columns).to_dataframe().reset_index()
    table = table.loc[table["n"] > 0].assign(group=group, selection=selection)
    order = ["group", "selection", "k", "window", "layer", "n", "flipped", "flipped_low", "flipped_high"]
    return table.filter(items=[*order, "logprob_change", "logprob_low", "logprob_high"])


def _over_draws(array: xr.DataArray) -> xr.DataArray:
    return array.mean("draw", skipna=True) if "draw" in array.dims else array


def controls_in_words(result: Result, k: int) -> str:
    """Say how many predictions each selection of k neurons flips, over all windows."""
    parts = []
    for label, part in _by_selection(result):
        flips = _over_draws(part["prediction_flipped"]).sel(k=k)
        parts.append(f"{label.replace('_', ' ')} {mean_estimate(flips.mean(('layer', 'window')))}")
    return f"Mean share of predictions flipped over all windows, k = {k}: {', '.join(parts)}."


def knocked_out(name: str, result: Result, dominant: Mapping[str, Result], seed: int) -> Iterator[Finding]:
    """Where the dominant neurons matter: the strongest window, and early against late ones."""
    k = largest_shared_k(result)
    selections = dict(_by_selection(result))
    one = {label: _over_draws(part["prediction_flipped"]).sel(k=k) for label, part in selections.items()}
    yield _strongest(name, k, one, dominant, seed)
    yield _early_and_late(name, k, one, dominant, seed)


def _strongest(
    name: str, k: int, flips: Mapping[str, xr.DataArray], dominant: Mapping[str, Result], seed: int
) -> Finding:
    """The single layer whose dominant neurons flip most predictions."""
    window = int(flips["dominant"]["window"].min())
    main = flips["dominant"].sel(window=window)
    choose, measure = halves(main.sizes["sequence"], seed)
    layer = chosen_site(_as_result(main), "flipped", choose, of="value", largest=True)["layer"]
    here = share_estimate(main.sel(layer=layer).isel(sequence=measure))
    others = {
        f"{label.replace('_', ' ')} neurons": mean_estimate(
            array.sel(window=window, layer=layer).isel(sequence=measure), seed=seed
        )
        for label, array in flips.items()
        if label != "dominant"
    }
    for group, part in dominant.items():
        if group != RECALLED:
            others[group] = share_estimate(part["prediction_flipped"].sel(k=k, window=window, layer=layer))
    return Finding(
        f"{name.capitalize()}: the layer whose neurons recall hangs on",
        f"Zeroing the {k} most dominant of the neurons of layer {layer}{_more(window)} flips the prediction "
        f"of {here} of the recalled {name} (chosen on one half of them, measured on the other).",
        here.value,
        here.low,
        here.high,
        "share of predictions flipped",
        here.n,
        spoken(others),
    )


def _more(window: int) -> str:
    return "" if window == 1 else f" and the {window - 1} after it"


def _early_and_late(
    name: str, k: int, flips: Mapping[str, xr.DataArray], dominant: Mapping[str, Result], seed: int
) -> Finding:
    """Windows of the first half of the layers against those of the second, each item against itself."""
    found = {label: _contrast(array, seed) for label, array in flips.items()}
    for group, part in dominant.items():
        if group != RECALLED:
            found[group] = _contrast(part["prediction_flipped"].sel(k=k), seed)
    early, late, difference = found.pop("dominant")
    others = {label.replace("_", " "): values[2] for label, values in found.items()}
    return Finding(
        f"{name.capitalize()}: early against late layers",
        f"Zeroing the {k} most dominant neurons of windows inside the first half of the layers flips "
        f"{early} of the predictions of recalled {name}, of windows inside the second half {late} (mean over "
        "windows of all lengths; the number is the first minus the second, within items).",
        difference.value,
        difference.low,
        difference.high,
        "share of predictions flipped",
        difference.n,
        spoken(others),
    )


def _contrast(flips: xr.DataArray, seed: int) -> tuple[Estimate, Estimate, Estimate]:
    n_layers = int(flips["layer"].max()) + 1
    last = flips["layer"] + flips["window"] - 1
    early = flips.where(last < n_layers // 2).mean(("layer", "window"), skipna=True)
    late = flips.where(flips["layer"] >= n_layers // 2).mean(("layer", "window"), skipna=True)
    return tuple(mean_estimate(array, seed=seed) for array in (early, late, early - late))  # pyright: ignore


def _as_result(array: xr.DataArray) -> Result:
    return Result.create(
        xr.Dataset({"flipped": array.drop_vars("k", errors="ignore")}), kind="neuron_knockout"
    )
