"""Findings of the attention-bypass study, each one sentence with its number, and the drops by quartile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float

from memlens.instruments.bypass.layer_sets import LayerSetSearch
from memlens.report.model import Finding
from memlens.results.groups import layers_label, quartiles
from memlens.results.result import Result
from memlens.results.statistics.estimates import Estimate, mean_estimate, share_estimate
from memlens.results.statistics.intervals import bootstrap_means, quantile_interval
from memlens.results.statistics.tasks import task_tables
from memlens.results.statistics.tradeoff import Tradeoff, removed_share
from memlens.studies.bypass.options import BypassOptions

MEMORIZED, UNTRAINED = "memorized", "untrained weights"
MEASURES = ("relative_drop", "relative_drop_chance_corrected")
GAP = "language minus reasoning"
_Draws = Float[np.ndarray, "draw layer"]


def recited(swept: Mapping[str, Result], given: int) -> Finding:
    """How much of each group the unchanged model recites, with the number of sequences given as memorized."""
    shares = {name: share_estimate(result.baseline("exact_match")) for name, result in swept.items()}
    main, base = shares[MEMORIZED], swept[MEMORIZED].baseline("exact_match")
    rest = [
        f"{name} {int(result.baseline('exact_match').sum())} of {result.data.sizes['sequence']}, "
        f"{mean_estimate(result.baseline('target_logprob'))} nats a token"
        for name, result in swept.items()
        if name != MEMORIZED
    ]
    own = mean_estimate(swept[MEMORIZED].baseline("target_logprob"))
    return Finding.of(
        "What is recited",
        f"{given} sequences were given as memorized; the unchanged model recites {int(base.sum())} "
        f"of the {main.n} that are examined, with {own} nats a token.",
        main,
        "share of sequences",
        "recited of the others, and their log-probability: " + "; ".join(rest) if rest else None,
    )


def blocks_in_words(result: Result) -> str:
    """What the bypass of each block leaves, in one sentence."""
    exact = result["exact_match"].mean("sequence")
    kept = ", ".join(f"{float(value):.2f}" for value in exact.values)
    return f"Exact match with the attention of block 0, 1, … bypassed: {kept}."


def selective_block(
    choosing: Tradeoff, scoring: Tradeoff, swept: Mapping[str, Result], options: BypassOptions
) -> Finding:
    """The single block with the best selectivity."""
    place = int(np.nanargmax(choosing.selectivity))
    row: Any = scoring.table().iloc[place]
    layer = int(row["layer"])
    worst = f"most on {row['worst_task']}" if options.over == "max" else "the mean over tasks"
    others = np.delete(scoring.selectivity, place)
    elsewhere = []
    for name, result in swept.items():
        if name != MEMORIZED:
            change = mean_estimate(result.effect("target_logprob").sel(layer=layer), seed=options.seed)
            elsewhere.append(f"{name} {change} nats a token")
    control = f"the other blocks have {np.mean(others):.3g} on average, {np.max(others):.3g} at best"
    if elsewhere:
        control += "; log-probability of other text under the same bypass: " + ", ".join(elsewhere)
    return Finding.of(
        "The most selective block",
        f"Bypassing the attention of block {layer} removes {_spoken(row, 'removed')} of recitation and costs "
        f"{_spoken(row, 'cost')} of the accuracy above chance ({worst}; chosen on one half of the data, "
        "measured on the other).",
        Estimate.from_row(row, "selectivity", prefix="selectivity_", n=None),
        "selectivity (share removed less share lost)",
        control,
    )


def nothing_to_lose(name: str, accuracy: Result) -> Finding:
    """The finding where the model is at chance on every task."""
    rows = accuracy.data[["accuracy_baseline", "chance"]].groupby(accuracy["task"]).mean()
    said = "; ".join(
        f"{task} {float(rows['accuracy_baseline'].sel(task=task)):.2f} (chance "
        f"{float(rows['chance'].sel(task=task)):.2f})"
        for task in rows["task"].values.tolist()
    )
    return Finding(
        f"The price of a bypass in {name}",
        "The unchanged model is not clearly above chance on any of the tasks, so that no price can be set "
        f"against what a bypass removes. Accuracy: {said}.",
    )


def _spoken(row: Any, name: str, prefix: str | None = None) -> str:
    """Return a column of a row with the interval in `NAME_low` and `NAME_high`, or in other columns."""
    prefix = f"{name}_" if prefix is None else prefix
    return f"{row[name]:.2f} [{row[f'{prefix}low']:.2f}, {row[f'{prefix}high']:.2f}]"


def best_set(
    best: pd.DataFrame, areas: pd.DataFrame, search: LayerSetSearch, elsewhere: Mapping[str, Result]
) -> Finding:
    """The most selective set of blocks, beside random sets of its size and single blocks."""
    rows: Any = best.set_index("search")
    top, single = rows.loc["any"], rows.loc["single block"]
    area, label = areas.set_index("family"), str(top["layers"])
    parts = []
    if top["random_sets"]:
        parts.append(
            f"{int(top['random_sets'])} other sets of {int(top['size'])}: {top['random_mean']:.3g} on "
            f"average, {top['random_share']:.2f} of them do as well"
        )
    parts.append(f"the best single block ({single['layers']}) has {single['selectivity']:.3g}")
    for name, result in elsewhere.items():
        if name != MEMORIZED:
            change = mean_estimate(result.effect("target_logprob").isel(layers=0))
            parts.append(f"{name} text changes by {change} nats a token")
    families = "; ".join(f"{name} {_spoken(row, 'area', '')}" for name, row in area.iterrows())
    return Finding.of(
        "The most selective set of blocks",
        f"Of {len(search.sets)} sets, bypassing block{'' if label.isdigit() else 's'} {label} is best on one "
        f"half of the data; on the other it removes {_spoken(top, 'removed')} of recitation and costs "
        f"{_spoken(top, 'cost')}. Area under the frontier by family of sets: {families}.",
        Estimate.from_row(top, "selectivity", prefix="selectivity_", n=None),
        "selectivity",
        "; ".join(parts),
    )


def quartile_table(
    recall: Result,
    accuracy: Result,
    *,
    tasks: Sequence[str],
    parts: int = 4,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Return what bypassing single blocks costs, averaged over the blocks of each part of depth.

    Args:
        recall: Bypass of each block, on memorized sequences.
        accuracy: The same on tasks.
        tasks: Tasks that count: those with something to lose (`tasks_above_chance`).
        parts: In how many parts depth is cut.
        level: Coverage of the intervals.
        n_resamples: Of the bootstraps over sequences, and over questions within tasks.
        seed: Of the bootstraps.

    Returns:
        Columns `what` ("recitation", a group of tasks, or the gap between language and reasoning), `measure`,
        `part` (1 is the first), `layers`, `mean`, `low`, `high`. Drops are relative to the unchanged model
        and positive where something is lost; of tasks raw and corrected for chance. A group's drop is the
        mean over its tasks.
    """
    drawn: dict[tuple[str, str], tuple[_Draws, _Draws]] = {}
    base = recall.baseline("exact_match").values.astype(float)
    exact = recall["exact_match"].transpose("sequence", "layer").values.astype(float)
    values = np.column_stack([base, exact])
    drawn["recitation", "relative_drop"] = (
        removed_share(values.mean(0)[None]),
        removed_share(bootstrap_means(values, n_resamples, seed)),
    )
    tables = {name: table for name, table in task_tables(accuracy).items() if name in tasks}
    for measure in MEASURES:
        each = {
            name: (
                table.measured(lambda t: t.mean(0, keepdims=True))[measure],
                table.measured(lambda t, n=i: bootstrap_means(t, n_resamples, seed + 1 + n))[measure],
            )
            for i, (name, table) in enumerate(tables.items())
        }
        for group in dict.fromkeys(table.group for table in tables.values()):
            mine = [each[name] for name, table in tables.items() if table.group == group]
            value, draws = (np.nanmean([pair[i] for pair in mine], 0) for i in (0, 1))
            drawn[group, measure] = value, draws
        if ("language", measure) in drawn and ("reasoning", measure) in drawn:
            both = drawn["language", measure], drawn["reasoning", measure]
            drawn[GAP, measure] = both[0][0] - both[1][0], both[0][1] - both[1][1]
    rows = []
    for (what, measure), (value, draws) in drawn.items():
        for number, layers in enumerate(quartiles(value.shape[1], parts), 1):
            low, high = quantile_interval(draws[:, layers].mean(1, keepdims=True), level)
            mean = float(value[0, layers].mean())
            rows.append((what, measure, number, layers_label(layers), mean, float(low[0]), float(high[0])))
    return pd.DataFrame(rows, columns=["what", "measure", "part", "layers", "mean", "low", "high"])


def by_quartile(table: pd.DataFrame, swept: Mapping[str, Result]) -> list[Finding]:
    """Late against early blocks, and language against reasoning, raw and corrected for chance."""
    rows: Any = table.set_index(["what", "measure", "part"]).sort_index()
    parts = sorted(set(table["part"]))
    first, last = parts[0], parts[-1]

    def spoken(what: str, measure: str, part: int) -> str:
        key = (what, measure, part)
        return _spoken(rows.loc[key], "mean", "") if key in rows.index else "not known"

    corrected = "relative_drop_chance_corrected"
    groups = [what for what in dict.fromkeys(table["what"]) if what not in ("recitation", GAP)]
    costs = {}
    for part in (first, last):
        each = ", ".join(f"{group} {spoken(group, corrected, part)}" for group in groups)
        costs[part] = each or "nothing that is above chance"
    row = rows.loc[("recitation", "relative_drop", last)]
    found = [
        Finding.of(
            "Late against early blocks",
            f"One block of the last part of depth (blocks {row['layers']}) takes {row['mean']:.2f} of "
            f"recitation on average and costs {costs[last]}; one of the first part takes "
            f"{spoken('recitation', 'relative_drop', first)} and costs {costs[first]} (drops corrected for "
            "chance).",
            replace(Estimate.from_row(row, "mean", n=None), n=swept[MEMORIZED].data.sizes["sequence"]),
            "share of recitation, last part",
            _stack_control(swept),
        )
    ]
    if GAP in set(table["what"]):
        row = rows.loc[(GAP, "relative_drop", first)]
        all_parts = "; ".join(
            f"part {part}: raw {spoken(GAP, 'relative_drop', part)}, corrected {spoken(GAP, corrected, part)}"
            for part in parts
        )
        found.append(
            Finding.of(
                "Language against reasoning",
                "Language tasks lose more than reasoning tasks where the difference is positive. Difference "
                f"of the mean relative drops by part of depth: {all_parts}.",
                Estimate.from_row(row, "mean", n=None),
                "difference of raw drops, first part",
                "the same difference corrected for chance: tasks with few choices cannot lose all of their "
                "accuracy, so the raw one is partly made by the number of choices",
            )
        )
    return found


def _stack_control(swept: Mapping[str, Result]) -> str | None:
    if UNTRAINED not in swept:
        return None
    size = abs(swept[UNTRAINED].effect("target_logprob")).mean("sequence")
    return (
        "untrained weights: the same bypass changes the log-probability by "
        f"{float(size.isel(layer=0)):.2g} nats a token (in size) at the first block and by "
        f"{float(size.isel(layer=-1)):.2g} at the last, so depth alone orders the effects there too"
        if float(size.isel(layer=0)) > float(size.isel(layer=-1))
        else "untrained weights: the first block's bypass changes no more than the last one's"
    )


def scaling(table: pd.DataFrame, parts: int) -> Finding:
    """What the last blocks are worth in each model."""
    words = []
    for name, rows in table.groupby("model", sort=False):
        layers = max(rows["layer"].tolist()) + 1
        late = rows.loc[rows["layer"] >= layers * (1 - 1 / parts)]
        row = rows.loc[rows["selectivity_chosen"].idxmax()].to_dict()
        words.append(
            f"{name}: block {row['layer']} of {layers}, selectivity {_spoken(row, 'selectivity')}; its last "
            f"blocks remove {late['removed'].mean():.2f} on average at a cost of {late['cost'].mean():.2f}"
        )
    return Finding(
        "From one model to the next",
        "The most selective block of each model (chosen on one half of the data, measured on the other). "
        f"{'. '.join(words)}.",
    )


def special(table: pd.DataFrame) -> Finding:
    """Where memorized text is harmed more than its control by the bypass, and where any edit does so."""
    controls = [
        name
        for name in ("predictable", "not memorized")
        if f"minus {name}" in table and np.isfinite(table[f"minus {name}"].to_numpy(float)).any()
    ]
    if not controls:
        return Finding(
            "What is special to memorized text",
            "No control text was given, so nothing can be called special to memorized text.",
        )
    control = controls[0]
    mine = table.loc[table["edit"] == "identity"]
    row: Any = mine.loc[mine[f"minus {control}"].idxmin()]
    certain = (table[f"minus {control} high"] < 0) & (table[f"minus {control} p_corrected"] < 0.05)
    edits = table["edit"].to_numpy()
    hits = {edit: certain.to_numpy(bool)[edits == edit] for edit in dict.fromkeys(edits.tolist())}
    listed = ", ".join(f"{edit} {hit.sum()} of {len(hit)}" for edit, hit in hits.items())
    return Finding.of(
        "What is special to memorized text",
        f"The bypass harms memorized text more than {control} text by the most at blocks {row['layers']}. "
        "Parts of depth at which an edit harms memorized text more (interval below 0, p < 0.05 corrected for "
        f"all): {listed}. What every edit does is no trait of attention: recited text is fragile to all of "
        "them, and has more log-probability to lose.",
        Estimate.from_row(row, f"minus {control}", prefix=f"minus {control} ", n=None),
        f"nats a token, memorized less {control}",
        f"effect of the same bypass on memorized text {row[MEMORIZED]:.3g}, on {control} text "
        f"{row[control]:.3g} nats a token",
    )


def beside_removal(results: Mapping[str, Result], parts: int, seed: int) -> Finding | None:
    """Whether late blocks' bypass does more than taking their attention away; None without such an edit."""
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
    words = (
        "So most of what it does there is not the loss of what attention brings in, but what it writes "
        "instead: each token's own values at full weight."
        if gap.high < 0 and gap.value < 0.5 * float(changed(main, "identity").mean())
        else "So it clearly does more than a removal."
        if gap.high < 0
        else "So it does not clearly do more than a removal."
    )
    zero = f", by nothing {said('zero')}" if "zero" in main["edit"].values else ""
    return Finding.of(
        "Bypass against removal, late blocks",
        f"In blocks {layers_label(last)} the bypass changes the log-probability of memorized text by "
        f"{said('identity')} nats a token, attention replaced by its mean {said('mean')}{zero}. {words}",
        gap,
        "nats a token, bypass less mean",
        "the same difference: " + "; ".join(f"{name} {e}" for name, e in gaps.items() if name != MEMORIZED)
        if len(gaps) > 1
        else None,
    )


def any_stack(depth: pd.DataFrame) -> Finding:
    """What of the order by depth is true of any residual stack."""
    rows: Any = depth.loc[depth["edit"] == "identity"].set_index("group")
    main = rows.loc[MEMORIZED]
    rest = "; ".join(
        f"{name} {_spoken(row, 'correlation', '')}" for name, row in rows.iterrows() if name != MEMORIZED
    )
    known = UNTRAINED in rows.index
    shared = known and rows.loc[UNTRAINED, "high"] < 0
    words = (
        "Untrained weights show this order too: that early edits matter more is no sign of memorization."
        if shared
        else "Untrained weights do not clearly show this order."
        if known
        else "It was not asked of untrained weights."
    )
    return Finding.of(
        "What any residual stack does",
        f"On memorized text the size of the bypass' effect goes with depth by a rank correlation of "
        f"{main['correlation']:.2f}. {words}",
        Estimate.from_row(main, "correlation"),
        "rank correlation of effect size and depth",
        rest or None,
    )


def heads_against_blocks(heads: Result, blocks: Result | None, seed: int) -> Finding:
    """Whether single heads carry what their block does."""
    effect = heads.effect("target_logprob")
    mean = effect.mean("sequence")
    place = np.unravel_index(int(mean.values.argmin()), mean.shape)
    site = {dim: int(mean[dim].values[i]) for dim, i in zip(mean.dims, place, strict=True)}
    main = mean_estimate(effect.sel(site), seed=seed)
    control = None
    if blocks is not None:
        rows = blocks["sequence"].isin(heads["sequence"].values)
        whole = mean_estimate(
            blocks.effect("target_logprob").sel(layer=site["layer"]).isel(sequence=rows.values), seed=seed
        )
        others = float(mean.sel(layer=site["layer"]).drop_sel(head=site["head"]).mean())
        control = (
            f"its whole block: {whole} nats a token; the other heads of the block alone: {others:.3g} on "
            "average"
        )
    return Finding.of(
        "Single heads",
        f"The most harmful bypass of a single head is that of head {site['head']} of layer {site['layer']}, "
        f"the largest of {mean.size}: it changes the target log-probability by {main} nats a token.",
        main,
        "nats a token",
        control,
    )


def bounded(result: Result, agreements: pd.DataFrame) -> Finding:
    """Whether the bounds hold, how tight they are, and what the cheap guess is worth."""
    measured, limit = result["measured"], result["limit"]
    over = int((measured > limit * (1 + 1e-9) + result["rounding"]).sum())
    slack = result["slack"]
    medians = slack.median([dim for dim in slack.dims if dim != "bound"])
    tight = ", ".join(f"{name} {float(medians.sel(bound=name)):.3g}" for name in medians["bound"].values)
    said = "; ".join(
        f"{row['predictor']} on {row['weights']} {_spoken(row, 'value', '')}"
        for _, row in agreements.iterrows()
    )
    return Finding(
        "Bounds",
        f"Of {measured.size} bounds none is passed; the median bound over the measured change is {tight}."
        if not over
        else f"{over} of {measured.size} bounds are passed: this is an error in memlens, please report it.",
        control=f"rank correlation of a guess from one pass with the measured divergence: {said}"
        if said
        else None,
    )
