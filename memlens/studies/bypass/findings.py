"""Findings of the attention-bypass study, and the drops by quartile; the words are in `texts.yaml`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float

from memlens.figures.labels import choice_words
from memlens.instruments.bypass.layer_sets import LayerSetSearch
from memlens.report.model import Finding
from memlens.results.groups import layers_label, named_layers, quartiles
from memlens.results.result import Result
from memlens.results.statistics.estimates import Estimate, chosen_site, mean_estimate, share_estimate
from memlens.results.statistics.intervals import halves, quantile_interval
from memlens.results.statistics.resampling import bootstrap_means
from memlens.results.statistics.tasks import task_tables
from memlens.results.statistics.tradeoff import Tradeoff, removed_share
from memlens.studies.bypass.options import BypassOptions
from memlens.studies.contrasts import against_controls, strictest
from memlens.studies.running import Texts, spoken

TEXTS = Texts(__file__)
"""What the report says."""

MEMORIZED, UNTRAINED = "memorized", "untrained weights"
MEASURES = ("relative_drop", "relative_drop_chance_corrected")
GAP = "language minus reasoning"
_MOST_SPOKEN = 8
"""Layers whose numbers a sentence gives with their intervals."""
_Draws = Float[np.ndarray, "draw layer"]


def recited(swept: Mapping[str, Result], given: int) -> Finding:
    """How much of each group the unchanged model recites, with the number of sequences given as memorized."""
    exact = {name: result.baseline("exact_match") for name, result in swept.items()}
    logprobs = {name: mean_estimate(result.baseline("target_logprob")) for name, result in swept.items()}
    rest = [
        f"{name} {int(hits.sum())} of {hits.size}, {logprobs[name]} nats per token"
        for name, hits in exact.items()
        if name != MEMORIZED
    ]
    return TEXTS.finding(
        "recited",
        share_estimate(exact[MEMORIZED]),
        control="; ".join(rest),
        given=given,
        recited=int(exact[MEMORIZED].sum()),
        logprob=logprobs[MEMORIZED],
    )


def layers_in_words(result: Result) -> str:
    """Say what remains under the bypass of each layer, in one sentence."""
    exact, n = result["exact_match"], result.data.sizes["sequence"]
    shares = [share_estimate(exact.sel(layer=layer)) for layer in exact["layer"].values]
    kept = ", ".join(map(str, shares) if len(shares) <= _MOST_SPOKEN else (f"{s.value:.2f}" for s in shares))
    return (
        f"Share of the {n} memorized sequences that are recited with the attention of layer 0, 1, … bypassed:"
        f" {kept}."
    )


def selective_layer(
    choosing: Tradeoff, scoring: Tradeoff, swept: Mapping[str, Result], options: BypassOptions
) -> Finding:
    """The single layer with the best selectivity."""
    place = int(np.nanargmax(choosing.selectivity))
    row: Any = scoring.table().iloc[place]
    others = np.delete(scoring.selectivity, place)
    control = f"the other layers have {np.mean(others):.3g} on average, {np.max(others):.3g} at best"
    if elsewhere := _other_text(swept, {"layer": place}, options.seed):
        control += f"; log-probability of other text under the same bypass: {elsewhere}"
    return TEXTS.finding(
        "selective_layer",
        _estimate(row, "selectivity"),
        control=control,
        layer=int(row["layer"]),
        removed=_estimate(row, "removed"),
        cost=_estimate(row, "cost"),
        worst=f"most on {row['worst_task']}" if options.over == "max" else "the mean over tasks",
    )


def nothing_to_lose(name: str, accuracy: Result) -> Finding:
    """The finding where the model is at chance on every task."""
    rows = accuracy.data[["accuracy_baseline", "chance"]].groupby(accuracy["task"]).mean().to_dataframe()
    said = [f"{task} {base:.2f} (chance {chance:.2f})" for task, base, chance in rows.itertuples()]
    return TEXTS.finding("nothing_to_lose", name=name, accuracy="; ".join(said))


def _estimate(row: Any, name: str) -> Estimate:
    """Return a column of a row with the interval in `NAME_low` and `NAME_high`."""
    return Estimate.from_row(row, name, prefix=f"{name}_", n=None)


def _other_text(results: Mapping[str, Result], place: dict[str, int], seed: int = 0) -> str | None:
    """Say how an intervention changes the log-probability of all but the memorized text."""
    effects = {name: result.effect("target_logprob").isel(place) for name, result in results.items()}
    found = {name: mean_estimate(effect, seed=seed) for name, effect in effects.items()}
    return spoken(found, "nats per token", skip=MEMORIZED)


def best_set(
    best: pd.DataFrame, areas: pd.DataFrame, search: LayerSetSearch, elsewhere: Mapping[str, Result]
) -> Finding:
    """The most selective set of layers, compared with random sets of its size and with single layers."""
    rows: Any = best.set_index("search")
    top, single = rows.loc["any"], rows.loc["single layer"]
    parts = []
    if top["random_sets"]:
        size, n = int(top["size"]), int(top["random_sets"])
        parts.append(
            f"{n} other sets of {size} layer{'s' if size > 1 else ''}: {top['random_mean']:.3g} on average, "
            f"{round(top['random_share'] * n)} of them do as well"
        )
    parts.append(f"the best single layer, {single['layers']}, has {single['selectivity']:.3g}")
    if others := _other_text(elsewhere, {"layers": 0}):
        parts.append(f"log-probability of other text: {others}")
    families = [
        f"{row['family']} {Estimate.from_row(row, 'area', n=None)}" for row in areas.to_dict("records")
    ]
    return TEXTS.finding(
        "best_set",
        _estimate(top, "selectivity"),
        control="; ".join(parts),
        n_sets=len(search.sets),
        layers=named_layers(top["layers"]),
        removed=_estimate(top, "removed"),
        cost=_estimate(top, "cost"),
        areas="; ".join(families),
    )


def quartile_table(
    recall: Result,
    accuracy: Result,
    *,
    tasks: Sequence[str],
    parts: int = 4,
    n_resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Return what bypassing single layers costs, averaged over the layers of each part of depth.

    Args:
        recall: Bypass of each layer, on memorized sequences.
        accuracy: The same on tasks.
        tasks: Tasks that count: those with something to lose (`tasks_above_chance`).
        parts: Number of parts into which depth is cut.
        n_resamples: Of the bootstraps over sequences, and over questions within tasks.
        seed: Of the bootstraps.

    Returns:
        Columns `what` ("recitation", a group of tasks, or the gap between language and reasoning), `measure`,
        `part` (1 is the first), `layers`, `mean`, `low`, `high` (95 %). Drops are relative to the unchanged
        model and positive where something is lost; those of tasks are raw and corrected for chance. A group's
        drop is the mean over its tasks.
    """
    drawn: dict[tuple[str, str], tuple[_Draws, _Draws, int]] = {}
    base = recall.baseline("exact_match").values.astype(float)
    exact = recall["exact_match"].transpose("sequence", "layer").values.astype(float)
    values = np.column_stack([base, exact])
    drawn["recitation", "relative_drop"] = (
        removed_share(values.mean(0)[None]),
        removed_share(bootstrap_means(values, n_resamples, seed)),
        len(values),
    )
    tables = {name: table for name, table in task_tables(accuracy).items() if name in tasks}
    each = {
        name: (
            table.measured(lambda t: t.mean(0, keepdims=True)),
            table.measured(lambda t, n=i: bootstrap_means(t, n_resamples, seed + 1 + n)),
        )
        for i, (name, table) in enumerate(tables.items())
    }
    for measure in MEASURES:
        for group in dict.fromkeys(table.group for table in tables.values()):
            members = [name for name, table in tables.items() if table.group == group]
            mine = [each[name] for name in members]
            value, draws = (np.nanmean([pair[i][measure] for pair in mine], 0) for i in (0, 1))
            drawn[group, measure] = value, draws, min(tables[name].n_questions for name in members)
        if ("language", measure) in drawn and ("reasoning", measure) in drawn:
            language, reasoning = drawn["language", measure], drawn["reasoning", measure]
            n = min(language[2], reasoning[2])
            drawn[GAP, measure] = language[0] - reasoning[0], language[1] - reasoning[1], n
    rows = []
    for (what, measure), (value, draws, n) in drawn.items():
        for number, layers in enumerate(quartiles(value.shape[1], parts), 1):
            low, high = quantile_interval(draws[:, layers].mean(1, keepdims=True), 0.95, n)
            mean = float(value[0, layers].mean())
            rows.append((what, measure, number, layers_label(layers), mean, float(low[0]), float(high[0])))
    return pd.DataFrame(rows, columns=["what", "measure", "part", "layers", "mean", "low", "high"])


def by_quartile(table: pd.DataFrame, swept: Mapping[str, Result]) -> list[Finding]:
    """Late against early layers, and language against reasoning, raw and corrected for chance."""
    rows: Any = table.set_index(["what", "measure", "part"]).sort_index()
    parts = sorted(set(table["part"]))
    first, last = parts[0], parts[-1]
    raw, corrected = MEASURES

    def mean(what: str, measure: str, part: int) -> Estimate:
        key = (what, measure, part)
        return Estimate.from_row(rows.loc[key], "mean", n=None) if key in rows.index else Estimate.unknown()

    def cost(part: int) -> str:
        groups = [what for what in dict.fromkeys(table["what"]) if what not in ("recitation", GAP)]
        each = ", ".join(f"{group} {mean(group, corrected, part)}" for group in groups)
        return each or "nothing that is above chance"

    late = mean("recitation", raw, last)
    found = [
        TEXTS.finding(
            "late_and_early",
            replace(late, n=swept[MEMORIZED].data.sizes["sequence"]),
            control=_stack_control(swept),
            layers=named_layers(rows.loc[("recitation", raw, last), "layers"]),
            late=late,
            late_cost=cost(last),
            early=mean("recitation", raw, first),
            early_cost=cost(first),
        )
    ]
    if GAP in set(table["what"]):
        said = [f"part {p}: raw {mean(GAP, raw, p)}, corrected {mean(GAP, corrected, p)}" for p in parts]
        clear = " and ".join(f"part {p}" for p in parts if mean(GAP, raw, p).excludes(0)) or "no part"
        words = {"clear": clear, "parts": "; ".join(said)}
        found.append(TEXTS.finding("language_and_reasoning", mean(GAP, raw, first), **words))
    return found


def _stack_control(swept: Mapping[str, Result]) -> str | None:
    if UNTRAINED not in swept:
        return None
    size = abs(swept[UNTRAINED].effect("target_logprob")).mean("sequence")
    first, last = (float(size.isel(layer=place)) for place in (0, -1))
    return TEXTS["verdicts"]["twin"]["ordered" if first > last else "flat"].format(first=first, last=last)


def scaling(table: pd.DataFrame, parts: int) -> Finding:
    """What the last layers are worth in each model."""
    words = []
    for name, rows in table.groupby("model", sort=False):
        layers = max(rows["layer"].tolist()) + 1
        late = rows.loc[rows["layer"] >= layers * (1 - 1 / parts)]
        row = rows.loc[rows["selectivity_chosen"].idxmax()]
        words.append(
            f"{name}: layer {row['layer']} of {layers}, selectivity {_estimate(row, 'selectivity')}; on "
            f"average the last layers remove {late['removed'].mean():.2f} and cost {late['cost'].mean():.2f}"
        )
    return TEXTS.finding("scaling", models=". ".join(words))


def special(table: pd.DataFrame) -> Finding:
    """Where the bypass harms memorized text more than its control, and where any intervention does so."""
    controls = [
        name
        for name in ("predictable", "not memorized")
        if f"minus {name}" in table and np.isfinite(table[f"minus {name}"].to_numpy(float)).any()
    ]
    if not controls:
        return TEXTS.finding("nothing_special")
    # What is said of memorized text holds against every control; the number is that of the strictest one.
    minus = {name: table[f"minus {name}"].to_numpy(float) for name in controls}
    strict = np.nanmax(list(minus.values()), axis=0)
    identity = np.flatnonzero(table["edit"] == "identity")
    place = int(identity[np.nanargmin(strict[identity])])
    control = max(controls, key=lambda name: np.nan_to_num(minus[name][place], nan=-np.inf))
    row: Any = table.iloc[place]
    certain = np.all([_certain(table, name) for name in controls], axis=0)
    hits = pd.Series(certain).groupby(table["edit"].to_numpy(), sort=False).agg(["sum", "size"])
    text = " and ".join(controls)
    return TEXTS.finding(
        "special",
        Estimate.from_row(row, f"minus {control}", prefix=f"minus {control} ", n=None),
        control=control,
        text=text,
        strictest=f", the stricter of {len(controls)} controls" if len(controls) > 1 else "",
        harms="harms" if certain[place] else "does not clearly harm",
        layers=named_layers(row["layers"]),
        parts=", ".join(f"{choice_words(edit)} {n} of {size}" for edit, n, size in hits.itertuples()),
        mine=row[MEMORIZED],
        theirs=row[control],
    )


def _certain(table: pd.DataFrame, control: str) -> np.ndarray:
    """Where memorized text is harmed more than a control: the interval and the corrected p say so."""
    minus = f"minus {control}"
    return ((table[f"{minus} high"] < 0) & (table[f"{minus} p_corrected"] < 0.05)).to_numpy()


def beside_removal(results: Mapping[str, Result], parts: int, seed: int) -> Finding | None:
    """Whether bypassing late layers does more than removing their attention; None without such a removal."""
    main = results[MEMORIZED]
    if not {"identity", "mean"} <= set(main["edit"].values.tolist()):
        return None
    last = quartiles(main.data.sizes["layer"], parts)[-1]

    def changed(result: Result, edit: str) -> xr.DataArray:
        return result.effect("target_logprob").sel(edit=edit).isel(layer=last).mean("layer")

    def said(edit: str) -> str:
        left = main["exact_match"].sel(edit=edit).isel(layer=last).mean()
        return f"{mean_estimate(changed(main, edit), seed=seed)} (exact match left {float(left):.2f})"

    gaps = {
        name: mean_estimate(changed(result, "identity") - changed(result, "mean"), seed=seed)
        for name, result in results.items()
    }
    gap = gaps[MEMORIZED]
    written = gap.value < 0.5 * float(changed(main, "identity").mean())
    verdict = "alike" if not gap.high < 0 else "written" if written else "more"
    return TEXTS.finding(
        "beside_removal",
        gap,
        control=spoken(gaps, skip=MEMORIZED),
        layers=named_layers(layers_label(last)),
        identity=said("identity"),
        mean=said("mean"),
        zero=f", by nothing {said('zero')}" if "zero" in main["edit"].values else "",
        verdict=TEXTS["verdicts"]["removal"][verdict],
    )


def any_stack(depth: pd.DataFrame) -> Finding:
    """Which part of the order by depth is true of any residual stack."""
    rows = depth.loc[depth["edit"] == "identity"].to_dict("records")
    found = {str(row["group"]): Estimate.from_row(row, "correlation") for row in rows}
    twin = found.get(UNTRAINED)
    verdict = "unknown" if twin is None else "shared" if twin.high < 0 else "own"
    return TEXTS.finding(
        "any_stack",
        found[MEMORIZED],
        control=spoken(found, skip=MEMORIZED),
        verdict=TEXTS["verdicts"]["stack"][verdict],
    )


def heads_against_layers(results: Mapping[str, Result], layers: Result | None, seed: int) -> Finding:
    """Whether single heads have the effect of their layer.

    Args:
        results: Bypass of each head, by group.
        layers: Bypass of each layer, on memorized sequences.
        seed: Of the halves and the intervals: the head is chosen on one half of the sequences.
    """
    heads = results[MEMORIZED]
    effect = heads.effect("target_logprob")
    choose, measure = halves(effect.sizes["sequence"], seed)
    site = chosen_site(heads, "target_logprob", choose)
    effects = {name: result.effect("target_logprob").sel(site) for name, result in results.items()}
    own = effects.pop(MEMORIZED).isel(sequence=measure)
    mean = effect.isel(sequence=measure).mean("sequence")
    control = None
    if layers is not None:
        same = layers["sequence"].isin(own["sequence"].values).values
        whole = layers.effect("target_logprob").sel(layer=site["layer"]).isel(sequence=same)
        others = float(mean.sel(layer=site["layer"]).drop_sel(head=site["head"]).mean())
        control = (
            f"its whole layer: {mean_estimate(whole, seed=seed)} nats per token; the other heads of the "
            f"layer, each alone: {others:.3g} on average"
        )
    differs = against_controls(
        strictest(own, effects, sign=-1, seed=seed), "more harm than", "nats per token"
    )
    main = mean_estimate(own, seed=seed)
    said = {"n": mean.size, "differs": differs}
    return TEXTS.finding("heads_against_layers", main, control=control, **said, **site)


def bounded(result: Result, agreements: Sequence[Mapping[str, Any]]) -> Finding:
    """Whether the bounds hold, how tight they are, and how well the predictor orders the layers."""
    measured, limit, slack = result["measured"], result["limit"], result["slack"]
    over = int((measured > limit * (1 + 1e-9) + result["rounding"]).sum())
    medians = slack.median([dim for dim in slack.dims if dim != "bound"])
    ratios = ", ".join(f"{name} {float(medians.sel(bound=name)):.3g}" for name in medians["bound"].values)
    said = [
        f"{choice_words(row['predictor'])} on {row['weights']} {Estimate.from_row(row, n=None)}"
        for row in agreements
    ]
    verdict = TEXTS["verdicts"]["bounds"]["broken" if over else "hold"]
    verdict = verdict.format(over=over, n=int(slack.notnull().sum()), ratios=ratios)
    return TEXTS.finding("bounded", control="; ".join(said), verdict=verdict)
