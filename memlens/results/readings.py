"""What a figure shows, in plain words with its numbers; one reading for each kind of result."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import xarray as xr

from memlens.errors import MemlensError
from memlens.figures.labels import MetricText, metric_text
from memlens.results.result import Result
from memlens.results.statistics.restored import restorable_metric, restored_share


def reading(
    result: Result, metric: str | None = None, *, sequence: str | None = None, stream: str = "resid_post"
) -> str:
    """Return a few sentences on a result, in the order a reader would ask.

    They are descriptions of the numbers, not tests: the largest of many sites is named as such, and how many
    sites have an interval that excludes 0 is set against how many would by chance.

    Args:
        result: any result.
        metric: the metric to speak of; the first by default.
        sequence: the id of the one sequence to speak of; all by default.
        stream: which stream to speak of, where several were decoded.

    Returns:
        Plain text; empty for a kind that has no words yet or a result without the values they need.

    Example:
        >>> data = xr.Dataset({"exact_match": ("sequence", [1.0, 1.0, 0.0, 1.0])})
        >>> reading(Result.create(data, kind="recall"))
        'The exact match, mean over 4 sequences, is 0.75 (95 % interval 0.301 to 0.954).'
    """
    try:
        if sequence is not None:
            ids = result["sequence"].values.astype(str)
            result = Result(result.data.isel(sequence=ids == str(sequence)))
        if "stream" in result.data.dims:
            result = Result(result.data.sel(stream=stream))
        return _READINGS[result.kind](result, metric) if result.kind in _READINGS else ""
    except (MemlensError, KeyError, ValueError):
        return ""


def _spoken(row: xr.DataArray, text: MetricText) -> str:
    """Return `-1.2 nats (95 % interval -1.5 to -0.9)`."""
    mean, low, high = (float(row.sel(statistic=name)) for name in ("mean", "low", "high"))
    unit = f" {text.unit}" if text.unit and "=" not in text.unit and "share" not in text.unit else ""
    interval = f" (95 % interval {low:.3g} to {high:.3g})" if np.isfinite([low, high]).all() else ""
    return f"{mean:.3g}{unit}{interval}"


def _includes_zero(row: xr.DataArray) -> bool:
    return bool(row.sel(statistic="low") <= 0 <= row.sel(statistic="high"))


def _over(result: Result) -> str:
    count = result.data.sizes["sequence"]
    return "in one sequence" if count == 1 else f"mean over {count} sequences"


def _extreme(ci: xr.DataArray, better: int, *, harm: bool) -> tuple[xr.DataArray, dict[str, object]]:
    """Return the site with the most harmful (or most helpful) mean, and its coordinates.

    Where it is not known which direction is better, the site with the largest mean is returned.
    """
    means = ci.sel(statistic="mean").fillna(0.0)
    means = means * better * (-1 if harm else 1) if better else abs(means)
    place = np.unravel_index(int(np.argmax(means.values)), means.shape)
    index = dict(zip(means.dims, map(int, place), strict=True))
    site = ci.isel(index)
    return site, {str(dim): ci[dim].values[i] for dim, i in index.items()}


def _where(site: dict[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in site.items())


def _chance(ci: xr.DataArray) -> str:
    low, high = ci.sel(statistic="low"), ci.sel(statistic="high")
    if not np.isfinite(low.values).any():
        return ""
    away, sites = int(((low > 0) | (high < 0)).sum()), int(low.size)
    if sites < 2:
        return ""
    return (
        f" The interval excludes 0 at {away} of {sites} sites; about {max(1, round(0.05 * sites))} would by "
        "chance if nothing mattered."
    )


def _harm(result: Result, metric: str | None) -> str:
    name = metric or next(n for n in result.metrics if f"{n}_baseline" in result.data)
    ci = result.mean_ci(("sequence", "target"), metric=name, of="effect")[name]
    text = metric_text(name, result[name])
    row, site = _extreme(ci, text.better, harm=True)
    unsure = " That interval includes 0: this may be no effect at all." if _includes_zero(row) else ""
    lead = "Recall is harmed most" if text.better else "The change is largest"
    return (
        f"{lead} at {_where(site)}: the {text.label} there changes by {_spoken(row, text)}, "
        f"{_over(result)}, against the unchanged model.{unsure}{_chance(ci)}"
    )


def _restored(result: Result, metric: str | None) -> str:
    name = metric or ("restored_share" if restorable_metric(result) else result.metrics[0])
    noising = result.settings.get("direction") == "noising"
    if name == "restored_share":
        ci = restored_share(result)[name]
    else:
        of = "effect" if f"{name}_corrupt" in result.data else "value"
        ci = result.mean_ci(("sequence", "target"), metric=name, of=of)[name]
    text = metric_text(name)
    row, site = _extreme(ci, text.better, harm=noising)
    scale = " (0 is the corrupt run, 1 the clean one)" if text.whole else ""
    what = "Least is left" if noising else "Most is restored"
    together = name == "restored_share" and result.data.sizes["sequence"] > 1
    over = f"{result.data.sizes['sequence']} sequences together" if together else _over(result)
    said = f"{what} at {_where(site)}: {text.label} {_spoken(row, text)}{scale}, {over}."
    return said if noising else said + _chance(ci)


def _decoded(result: Result, metric: str | None) -> str:
    data = result.data
    ranks = Result(xr.Dataset({"rank": np.log(data["rank"] + 1.0)}, attrs=data.attrs))
    log_rank = ranks.mean_ci(("sequence", "target"), metric="rank")["rank"].sel(statistic="mean")
    odds = Result(data).mean_ci(("sequence", "target"), metric="probability", method="bootstrap")[
        "probability"
    ]
    last = odds.isel(layer=-1)
    text = "After the last layer the target tokens have a mean probability of "
    text += f"{_spoken(last, MetricText(''))} ({_over(result)})."
    means = odds.sel(statistic="mean").values
    half = odds["layer"].values[means >= 0.5 * means[-1]]
    stays = np.logical_and.accumulate(np.exp(log_rank.values[::-1]) < 2)[::-1]
    top = data["layer"].values[stays]
    text += f" Half of that is first reached after layer {half[0]}." if len(half) else ""
    text += f" Their geometric mean rank is below 2 from layer {top[0]} on." if len(top) else ""
    return text


def _attributed(result: Result, metric: str | None) -> str:
    said = []
    for name, array in result.data.data_vars.items():
        if "head" not in array.dims and name not in ("attn", "mlp"):
            continue
        dims = ["sequence", *(dim for dim in ("target", "position") if dim in array.dims)]
        row, site = _extreme(result.mean_ci(dims, metric=str(name))[str(name)], 1, harm=False)
        part = "head" if "head" in array.dims else metric_text(str(name)).label
        said.append(f"the {part} that adds most is {_where(site)}, {_spoken(row, MetricText('', 'logits'))}")
    return "Of what is written into the target's logit, " + "; ".join(said) + "." if said else ""


def _recalled(result: Result, metric: str | None) -> str:
    name = metric or ("exact_match" if "exact_match" in result.metrics else result.metrics[0])
    text = metric_text(name, result[name])
    row = result.mean_ci(metric=name)[name]
    said = f"The {text.label}, {_over(result)}, is {_spoken(row, text)}."
    if "copies" not in result.data.coords:
        return said
    grouped = result.mean_ci(metric=name, group="copies")[name]
    if grouped.sizes["copies"] < 2:
        return said
    ends = [(grouped["copies"].values[i], _spoken(grouped.isel(copies=i), text)) for i in (0, -1)]
    return f"{said} With {ends[0][0]} copies it is {ends[0][1]}, with {ends[1][0]} copies {ends[1][1]}."


_READINGS: dict[str, Callable[[Result, str | None], str]] = {
    "residual_decoding": _decoded,
    "head_ablation": _harm,
    "attention_bypass": _harm,
    "neuron_knockout": _harm,
    "activation_patching": _restored,
    "logit_attribution": _attributed,
    "sweep": _harm,
    "recall": _recalled,
}
