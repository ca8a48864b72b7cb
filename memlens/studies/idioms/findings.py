"""Tables and findings of the idiom study, each number with its interval; the words are in `texts.yaml`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from memlens.figures.labels import choice_words
from memlens.report.model import Finding
from memlens.results.result import Result
from memlens.results.statistics.agreement import rank_correlation
from memlens.results.statistics.comparison import compare_groups
from memlens.results.statistics.estimates import Estimate, mean_estimate, share_estimate
from memlens.results.statistics.intervals import halves, mean_interval
from memlens.studies.contrasts import against_controls, strictest
from memlens.studies.idioms.options import IdiomOptions
from memlens.studies.running import Texts, spoken

TEXTS = Texts(__file__)
"""What the report says."""

RECALLED, MISSED = "recalled", "not recalled"
_SUBSETS = {
    "hard_to_guess": ("hard to guess (flag)", True),
    "prompt_comp_ind": ("not predictable from a part of the prompt (flag)", False),
    "similarity_ind": ("target not similar to a prompt word (flag)", False),
    "frequent_target_ind": ("content-word target (flag)", True),
    "definition": ("without dictionary definitions", False),
    "shared_prompt": ("prompt of one idiom only", False),
    "object_in_subject": ("object not in the subject", False),
}
_MATCHED = ("first_promotion", "near_promotion", "stable_promotion", "boost", "promotion_share")


def resid_post(result: Result) -> Result:
    """Return what was decoded after each layer."""
    data = result.data
    return Result(data.sel(stream="resid_post", drop=True) if "stream" in data.dims else data)


def finding(key: str, name: str, found: Estimate | None = None, /, **values: Any) -> Finding:
    """Return a finding about the items called `name`; see `Texts.finding`."""
    return TEXTS.finding(key, found, name=name, Name=name.capitalize(), **values)


# ---- what is recalled ------------------------------------------------------------------------------------


def recalled(name: str, table: pd.DataFrame) -> Finding:
    """The share of items whose target is the model's prediction."""
    rows = recall_by_subset(table).iloc[1:6]
    parts = [f"{row.subset}: {row.recalled * row.n:.0f} of {row.n}" for row in rows.itertuples()]
    hits = table["exact_match"].to_numpy(float)
    values = {"recalled": int(hits.sum()), "n": len(hits), "control": "; ".join(parts)}
    return finding("recalled", name, share_estimate(hits), **values)


def recall_by_subset(table: pd.DataFrame) -> pd.DataFrame:
    """Return the recalled share of all items and of each subset that the file's flags and columns define.

    Args:
        table: One row per item, with `exact_match`.

    Returns:
        Columns `subset`, `n`, `recalled`, `low`, `high` (Wilson, 95 %).
    """
    subsets: dict[str, np.ndarray] = {"all": np.ones(len(table), dtype=bool)}
    for column, (label, wanted) in _SUBSETS.items():
        if column in table:
            subsets[label] = table[column].astype(bool).to_numpy() == wanted
    if {"hard_to_guess", "frequent_target_ind"} <= set(table):
        both = table["hard_to_guess"].astype(bool) & table["frequent_target_ind"].astype(bool)
        subsets["hard to guess and content-word target (flags)"] = both.to_numpy()
    for column in ("source", "relation", "domain"):
        values = np.array(table[column], dtype=str) if column in table else np.array([])
        if 1 < len(set(values)) <= 20:
            subsets |= {f"{column} {value}": values == value for value in sorted(set(values))}
    hits = {label: share_estimate(table.loc[chosen, "exact_match"]) for label, chosen in subsets.items()}
    return pd.DataFrame([{"subset": label, **share.row("recalled")} for label, share in hits.items()])


def recall_by_frequency(table: pd.DataFrame, column: str, *, bins: int = 10) -> pd.DataFrame:
    """Return the recalled share against a frequency: each value, or quantile bins where there are many.

    Args:
        table: One row per item, with `exact_match` and the column.
        column: A number for each item: copies, frequency, popularity.
        bins: The largest number of rows; more values than that are cut into this number of quantile bins.

    Returns:
        Columns `from`, `to` (the values of the bin), `n`, `recalled`, `low`, `high` (Wilson, 95 %).
    """
    values, hits = (np.array(table[name], dtype=float) for name in (column, "exact_match"))
    many = len(np.unique(values)) > bins
    label = np.asarray(pd.qcut(values, bins, labels=False, duplicates="drop") if many else values)
    rows = []
    for value in np.unique(label[np.isfinite(values)]):
        chosen = label == value
        ends = {"from": float(values[chosen].min()), "to": float(values[chosen].max())}
        rows.append({**ends, **share_estimate(hits[chosen]).row("recalled")})
    return pd.DataFrame(rows, columns=["from", "to", "n", "recalled", "low", "high"])


def rises_with_frequency(name: str, table: pd.DataFrame, column: str, seed: int) -> Finding:
    """Whether recall rises with a frequency: Spearman's rank correlation over items, with its interval."""
    x, y = table[column].to_numpy(float), table["exact_match"].to_numpy(float)
    bins = recall_by_frequency(table, column)
    shares = [f"{share:.2f} at {to:g}" for to, share in bins[["to", "recalled"]].to_numpy()]
    found = _spearman(x, y, seed)
    correlation = (
        f"The number is Spearman's rank correlation of recall and {column} over all items."
        if np.isfinite(found.value)
        else "Recall does not vary enough for a correlation."
    )
    least, most = ("fewest", "most") if column == "copies" else ("lowest", "highest")
    first, last = _counted(bins.iloc[0]), _counted(bins.iloc[-1])
    return finding(
        "rises_with_frequency",
        name,
        found,
        control=", ".join(shares),
        column=column,
        least=least,
        most=most,
        first=f"{first} are",
        last=last,
        correlation=correlation,
    )


def _counted(row: Any) -> str:
    """Say how many of the items of a bin are recalled: "(2 to 4), 3 of 16"."""
    values = f"{row['from']:g}" if row["from"] == row["to"] else f"{row['from']:g} to {row['to']:g}"
    return f"({values}), {row['recalled'] * row['n']:.0f} of {row['n']:.0f}"


def _spearman(x: np.ndarray, y: np.ndarray, seed: int) -> Estimate:
    kept = np.isfinite(x) & np.isfinite(y)
    x, y = x[kept], y[kept]
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return Estimate.unknown(len(x))
    rows = np.random.default_rng(seed).integers(0, len(x), (2000, len(x)))
    low, high = np.nanpercentile(rank_correlation(x[rows], y[rows]), [2.5, 97.5])
    return Estimate(float(rank_correlation(x, y)), float(low), float(high), len(x))


# ---- the two phases --------------------------------------------------------------------------------------


def decoded_in_words(decoded: Mapping[str, Result], stream: str = "resid_post") -> str:
    """Say of each group how sure the model is in the end, and from which layer its prediction is on top.

    Of the output of attention or MLPs alone: at which layer the predicted token is likeliest.
    """
    if stream != "resid_post":
        return " ".join(_likeliest(group, result, stream) for group, result in decoded.items())
    parts = []
    for group, result in decoded.items():
        data = resid_post(result).data
        final = mean_estimate(data["predicted_probability"].isel(layer=-1).mean("target"))
        rank = data["predicted_rank"].transpose("sequence", "layer", "target").values
        ranks = np.nanmean(np.log1p(rank), axis=(0, 2))
        stays = np.logical_and.accumulate(np.exp(ranks[::-1]) < 2)[::-1]
        first = f"{data['layer'].values[stays][0]} on" if stays.any() else "no layer on"
        parts.append(
            f"{group[:1].upper()}{group[1:]} (n = {final.n}): the predicted token ends with a mean "
            f"probability of {final}; its geometric mean rank is below 2 (1 is the top) from layer {first}."
        )
    return "\n\n".join(parts)


def _likeliest(group: str, result: Result, stream: str) -> str:
    each = result.data["predicted_probability"].sel(stream=stream).mean("target")
    layer = int(each.mean("sequence").argmax("layer"))
    found = mean_estimate(each.isel(layer=layer))
    return (
        f"{group[:1].upper()}{group[1:]} (n = {found.n}): likeliest at layer {each['layer'].values[layer]}, "
        f"with a mean probability of {found}."
    )


def last_layers_in_words(decoded: Mapping[str, Result], metric: str, text: str) -> str:
    """Say of each group what a metric of the decoded residual is in the end, which `text` calls `{last}`.

    The divergence from the final prediction is 0 after the last layer, so that the one before counts.
    """
    layer = -2 if metric == "kl_to_final" else -1
    last: dict[str, Estimate] = {}
    for group, result in decoded.items():
        values = resid_post(result).data[metric].mean("target")
        last[group] = mean_estimate(values.isel(layer=max(layer, -values.sizes["layer"])))
    return text.format(last=spoken(last, "nats"))


def groups_in_words(dominant: Mapping[str, Result], k: int) -> str:
    """Say how many predictions of each group the k dominant neurons flip, over all windows."""
    found = {
        group: mean_estimate(_over_draws(part["prediction_flipped"]).sel(k=k).mean(("layer", "window")))
        for group, part in dominant.items()
    }
    return f"Mean share of predictions flipped over all windows, k = {k}: {spoken(found)}."


def boundary(name: str, lens: str, phases: pd.DataFrame, n_layers: int) -> Finding:
    """The layer at which a group's predictions are on top: the first of median rank 0."""
    rows = _quantity(phases, "boundary")
    main = rows[RECALLED]
    where = (
        f"is 0 (the top) for the first time after layer {main.value:.3g} (of 0 to {n_layers - 1})"
        if np.isfinite(main.value)
        else "is 0 (the top) after no layer, except by chance"
    )
    others = spoken(rows, skip=RECALLED)
    return finding("boundary", name, main, control=others, lens=lens, where=where)


def boosting(name: str, phases: pd.DataFrame) -> Finding:
    """How much of the final probability comes after the prediction is on top for good."""
    rows, shares = _quantity(phases, "boost"), _quantity(phases, "promotion_share")
    others = spoken(rows, skip=RECALLED)
    return finding("boosting", name, rows[RECALLED], control=others, share=shares[RECALLED])


def _quantity(phases: pd.DataFrame, quantity: str) -> dict[str, Estimate]:
    chosen: Any = phases[(phases["quantity"] == quantity) & (phases["token"] == "predicted")]
    return {str(row["group"]): Estimate.from_row(row) for row in chosen.to_dict("records")}


def matched_table(mine: Result, theirs: Result, control: str, options: IdiomOptions) -> pd.DataFrame:
    """Compare recalled items with their matched controls, phase by phase.

    Returns:
        Columns `control`, `quantity`, `recalled`, `control_mean`, `difference`, `low`, `high`, `p`, `pairs`:
        means over the pairs that have both values, paired bootstrap interval, sign-flip permutation test.
    """
    rows = []
    for name in _MATCHED:
        a, b = (result[name].values[:, 0] for result in (mine, theirs))
        both = np.isfinite(a) & np.isfinite(b)
        if both.sum() < 2:
            continue
        parts = [Result(result.data.isel(sequence=both)) for result in (mine, theirs)]
        found = compare_groups(parts[0], parts[1], name, n_resamples=options.n_resamples, seed=options.seed)
        values = [float(found[key].squeeze()) for key in ("difference", "low", "high", "p")]
        rows.append((control, name, a[both].mean(), b[both].mean(), *values, int(both.sum())))
    columns = ["control", "quantity", "recalled", "control_mean", "difference", "low", "high", "p", "pairs"]
    return pd.DataFrame(rows, columns=columns)


def unmatched(name: str, options: IdiomOptions) -> Finding:
    """The finding where too few items have a control that is alike."""
    calipers = {"length": options.length_caliper, "probability": options.probability_caliper}
    return finding("unmatched", name, **calipers)


def matched_promotion(name: str, table: pd.DataFrame) -> Finding:
    """Whether recalled items are promoted earlier than others of which the model is as certain.

    With several kinds of controls the one that says least for it is judged.
    """
    chosen: Any = table[table["quantity"] == "stable_promotion"]
    rows: list[dict[str, Any]] = chosen.to_dict("records")
    whens = [_when(row) for row in rows]
    # Undecided before decided, and of these the difference that is nearest to none.
    place = min(range(len(rows)), key=lambda i: (whens[i] is not None, abs(rows[i]["difference"])))
    main, when = rows.pop(place), whens[place] if len(set(whens)) == 1 else None
    others = [
        f"against {row['control']}: {Estimate.from_row(row, 'difference', n='pairs')} layers, "
        f"p = {row['p']:.2g}, {row['pairs']} pairs"
        for row in rows
    ]
    return finding(
        "matched_promotion",
        name,
        Estimate.from_row(main, "difference", n="pairs"),
        control="; ".join(others),
        when=when or "not clearly earlier or later",
        other=main["control"] + (", the strictest control" if rows else ""),
        p=main["p"],
    )


def _when(row: Any) -> str | None:
    """Return what the difference says; with few pairs, the bootstrap interval alone is too narrow."""
    clear = row["p"] < 0.05
    return "earlier" if clear and row["high"] < 0 else "later" if clear and row["low"] > 0 else None


# ---- knock-outs ------------------------------------------------------------------------------------------


def largest_shared_k(result: Result) -> int:
    """Return the largest k that every selection has."""
    flipped = result["prediction_flipped"]
    over = [dim for dim in flipped.dims if dim not in ("k", "selection")]
    there = flipped.notnull().any(over)
    there = there.all("selection") if "selection" in there.dims else there
    return int(there["k"].values[there.values].max())


def knock_out_table(result: Result, dominant: Mapping[str, Result], options: IdiomOptions) -> pd.DataFrame:
    """Return one row per knock-out of each group and selection: flips with Wilson intervals, and the cost.

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
    for names, array in (
        (("flipped", "flipped_low", "flipped_high"), shares),
        (("logprob_change", "logprob_low", "logprob_high"), change),
    ):
        for name, statistic in zip(names, ("mean", "low", "high"), strict=True):
            columns[name] = array.sel(statistic=statistic).reset_coords(drop=True)
    table = xr.Dataset(columns).to_dataframe().reset_index()
    table = table.loc[table["n"] > 0].assign(group=group, selection=selection)
    return table.filter(items=["group", "selection", "k", "window", "layer", *columns])


def _over_draws(array: xr.DataArray) -> xr.DataArray:
    return array.mean("draw", skipna=True) if "draw" in array.dims else array


def controls_in_words(result: Result, k: int) -> str:
    """Say how many predictions each selection of k neurons flips, over all windows."""
    parts = []
    for label, part in _by_selection(result):
        flips = _over_draws(part["prediction_flipped"]).sel(k=k)
        parts.append(f"{choice_words(label)} {mean_estimate(flips.mean(('layer', 'window')))}")
    return f"Mean share of predictions flipped over all windows, k = {k}: {', '.join(parts)}."


def knocked_out(name: str, result: Result, dominant: Mapping[str, Result], seed: int) -> Iterator[Finding]:
    """Where the dominant neurons matter: the strongest window, and early against late ones."""
    k = largest_shared_k(result)
    flips = {
        choice_words(label): _over_draws(part["prediction_flipped"]).sel(k=k)
        for label, part in _by_selection(result)
    }
    groups = {
        group: part["prediction_flipped"].sel(k=k) for group, part in dominant.items() if group != RECALLED
    }
    yield _strongest(name, k, flips, groups, seed)
    yield _early_and_late(name, k, {**flips, **groups}, seed)


_Flips = Mapping[str, xr.DataArray]


def _strongest(name: str, k: int, flips: _Flips, groups: _Flips, seed: int) -> Finding:
    """The single layer whose dominant neurons flip most predictions."""
    window = int(flips["dominant"]["window"].min())
    choose, measure = halves(flips["dominant"].sizes["sequence"], seed)
    mean = flips["dominant"].sel(window=window).isel(sequence=choose).mean("sequence")
    layer = int(mean.idxmax("layer"))
    site = {"window": window, "layer": layer}
    here = {label: array.sel(site).isel(sequence=measure) for label, array in flips.items()}
    own = here.pop("dominant")
    main, mine = share_estimate(own), _matched(own)
    rivals = {f"{label} neurons": _matched(array) for label, array in here.items()}
    rivals |= {group: array.sel(site).dropna("sequence") for group, array in groups.items()}
    differs = against_controls(strictest(mine, rivals, sign=1, seed=seed), "more than")
    others = {f"{label} neurons": mean_estimate(array, seed=seed) for label, array in here.items()}
    for group, array in groups.items():
        others[group] = share_estimate(array.sel(site))
    more = "" if window == 1 else f" and the {window - 1} after it"
    clause = differs[:1].lower() + differs[1:]
    values = {"k": k, "layer": layer, "more": more, "differs": differs, "clause": clause}
    return finding("strongest", name, main, control=spoken(others), **values)


def _matched(flips: xr.DataArray) -> xr.DataArray:
    """Return the values of the items that have one, to be compared item by item."""
    known = flips.dropna("sequence").reset_coords(drop=True)
    return known.assign_coords(match=("sequence", known["sequence"].values))


def _early_and_late(name: str, k: int, flips: _Flips, seed: int) -> Finding:
    """Windows of the first half of the layers against those of the second, each item against itself."""
    found = {label: _contrast(array, seed) for label, array in flips.items()}
    early, late, difference = found.pop("dominant")
    others = spoken({label: values[2] for label, values in found.items()})
    return finding("early_and_late", name, difference, control=others, k=k, early=early, late=late)


def _contrast(flips: xr.DataArray, seed: int) -> tuple[Estimate, Estimate, Estimate]:
    n_layers = int(flips["layer"].max()) + 1
    last = flips["layer"] + flips["window"] - 1
    early = flips.where(last < n_layers // 2).mean(("layer", "window"), skipna=True)
    late = flips.where(flips["layer"] >= n_layers // 2).mean(("layer", "window"), skipna=True)
    return tuple(mean_estimate(array, seed=seed) for array in (early, late, early - late))  # pyright: ignore
