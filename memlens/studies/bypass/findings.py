"""Findings of the attention-bypass study, each one sentence with its number, interval and control."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from memlens.instruments.bypass.layer_sets import LayerSetSearch
from memlens.report.model import Finding
from memlens.results.groups import layers_label, quartiles
from memlens.results.result import Result
from memlens.results.statistics.estimates import mean_estimate, share_estimate
from memlens.results.statistics.tradeoff import Tradeoff
from memlens.studies.bypass.context import BypassInputs
from memlens.studies.bypass.controls import MEMORIZED, UNTRAINED
from memlens.studies.bypass.options import BypassOptions
from memlens.studies.bypass.tables import GAP
from memlens.studies.localization import findings as common


def recited(swept: Mapping[str, Result], inputs: BypassInputs) -> Finding:
    """How much of each group the unchanged model recites."""
    shares = {name: share_estimate(result.baseline("exact_match")) for name, result in swept.items()}
    main, base = shares[MEMORIZED], swept[MEMORIZED].baseline("exact_match")
    rest = [
        f"{name} {int(result.baseline('exact_match').sum())} of {result.data.sizes['sequence']}, "
        f"{mean_estimate(result.baseline('target_logprob'))} nats a token"
        for name, result in swept.items()
        if name != MEMORIZED
    ]
    own = mean_estimate(swept[MEMORIZED].baseline("target_logprob"))
    return Finding(
        "What is recited",
        f"{len(inputs.groups[MEMORIZED])} sequences were given as memorized; the unchanged model recites "
        f"{int(base.sum())} "
        f"of the {main.n} that are examined, with {own} nats a token.",
        main.value,
        main.low,
        main.high,
        "share of sequences",
        main.n,
        "recited of the others, and their log-probability: " + "; ".join(rest) if rest else None,
    )


def blocks_in_words(result: Result) -> str:
    """What the bypass of each block leaves, in one sentence."""
    exact = result["exact_match"].mean("sequence")
    kept = ", ".join(f"{float(value):.2f}" for value in exact.values)
    return f"Exact match with the attention of block 0, 1, … bypassed: {kept}."


def needed_block(swept: Mapping[str, Result], seed: int) -> Finding:
    """The block whose bypass harms recitation most."""
    return common.bypassed_layer(swept, seed)


def selective_block(
    choosing: Tradeoff, scoring: Tradeoff, swept: Mapping[str, Result], options: BypassOptions
) -> Finding:
    """The single block with the best selectivity."""
    place = int(np.nanargmax(choosing.selectivity))
    row = scoring.table().iloc[place]
    layer = int(row["layer"])
    others = np.delete(scoring.selectivity, place)
    elsewhere = []
    for name, result in swept.items():
        if name != MEMORIZED:
            change = mean_estimate(result.effect("target_logprob").sel(layer=layer), seed=options.seed)
            elsewhere.append(f"{name} {change} nats a token")
    control = f"the other blocks have {np.mean(others):.3g} on average, {np.max(others):.3g} at best"
    if elsewhere:
        control += "; log-probability of other text under the same bypass: " + ", ".join(elsewhere)
    return Finding(
        "The most selective block",
        f"Bypassing the attention of block {layer} removes {row['removed']:.2f} "
        f"[{row['removed_low']:.2f}, {row['removed_high']:.2f}] of recitation and costs {row['cost']:.2f} "
        f"[{row['cost_low']:.2f}, {row['cost_high']:.2f}] of the accuracy above chance "
        f"({_cost_words(options, row)}; chosen on one half of the data, measured on the other).",
        float(row["selectivity"]),
        float(row["selectivity_low"]),
        float(row["selectivity_high"]),
        "selectivity (share removed less share lost)",
        None,
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
        "The unchanged model is not surely above chance on any of the tasks, so that no price can be set "
        "against "
        f"what a bypass removes. Accuracy: {said}.",
    )


def _cost_words(options: BypassOptions, row: Any) -> str:
    return f"most on {row['worst_task']}" if options.over == "max" else "the mean over tasks"


def best_set(
    best: pd.DataFrame, areas: pd.DataFrame, search: LayerSetSearch, elsewhere: Mapping[str, Result]
) -> Finding:
    """The most selective set of blocks, beside random sets of its size and single blocks."""
    rows = best.set_index("search")
    top, single = rows.loc["any"], rows.loc["single block"]
    area = areas.set_index("family")
    parts = []
    if top["random_sets"]:
        parts.append(
            f"{int(top['random_sets'])} other sets of {int(top['size'])}: {top['random_mean']:.3g} on "
            f"average, "
            f"{top['random_share']:.2f} of them do as well"
        )
    parts.append(f"the best single block ({single['layers']}) has {single['selectivity']:.3g}")
    for name, result in elsewhere.items():
        if name != MEMORIZED:
            change = mean_estimate(result.effect("target_logprob").isel(intervention=0))
            parts.append(f"{name} text changes by {change} nats a token")
    families = "; ".join(
        f"{name} {row['area']:.2f} [{row['low']:.2f}, {row['high']:.2f}]" for name, row in area.iterrows()
    )
    return Finding(
        "The most selective set of blocks",
        f"Of {len(search.sets)} sets, bypassing {_blocks(str(top['layers']))} is best on one half of the "
        f"data; "
        f"on the other it removes {top['removed']:.2f} [{top['removed_low']:.2f}, "
        f"{top['removed_high']:.2f}] of "
        f"recitation and costs {top['cost']:.2f} [{top['cost_low']:.2f}, {top['cost_high']:.2f}]. Area under "
        f"the frontier by family of sets: {families}.",
        float(top["selectivity"]),
        float(top["selectivity_low"]),
        float(top["selectivity_high"]),
        "selectivity",
        None,
        "; ".join(parts),
    )


def _blocks(label: str) -> str:
    return f"block {label}" if label.isdigit() else f"blocks {label}"


def by_quartile(table: pd.DataFrame, swept: Mapping[str, Result]) -> list[Finding]:
    """Late against early blocks, and language against reasoning, raw and corrected for chance."""
    rows = table.set_index(["what", "measure", "part"]).sort_index()
    parts = sorted(set(table["part"]))
    first, last = parts[0], parts[-1]

    def spoken(what: str, measure: str, part: int) -> str:
        if (what, measure, part) not in rows.index:
            return "not known"
        row = rows.loc[(what, measure, part)]
        return f"{row['mean']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"

    corrected = "relative_drop_chance_corrected"
    groups = [what for what in dict.fromkeys(table["what"]) if what not in ("recitation", GAP)]
    costs = {}
    for part in (first, last):
        each = ", ".join(f"{group} {spoken(group, corrected, part)}" for group in groups)
        costs[part] = each or "nothing that is above chance"
    row = rows.loc[("recitation", "relative_drop", last)]
    found = [
        Finding(
            "Late against early blocks",
            f"One block of the last part of depth (blocks {row['layers']}) takes {row['mean']:.2f} of "
            f"recitation "
            f"on average and costs {costs[last]}; one of the first part takes "
            f"{spoken('recitation', 'relative_drop', first)} and costs {costs[first]} (drops corrected for "
            "chance).",
            float(row["mean"]),
            float(row["low"]),
            float(row["high"]),
            "share of recitation, last part",
            swept[MEMORIZED].data.sizes["sequence"],
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
            Finding(
                "Language against reasoning",
                "Language tasks lose more than reasoning tasks where the difference is positive. Difference "
                "of "
                f"the mean relative drops by part of depth: {all_parts}.",
                float(row["mean"]),
                float(row["low"]),
                float(row["high"]),
                "difference of raw drops, first part",
                None,
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
            f"{name}: block {row['layer']} of {layers}, selectivity {row['selectivity']:.2f} "
            f"[{row['selectivity_low']:.2f}, {row['selectivity_high']:.2f}]; its last blocks remove "
            f"{late['removed'].mean():.2f} on average at a cost of {late['cost'].mean():.2f}"
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
    place = mine[f"minus {control}"].idxmin()
    row = mine.loc[place]
    certain = (table[f"minus {control} high"] < 0) & (table[f"minus {control} p_corrected"] < 0.05)
    edits = table["edit"].to_numpy()
    hits = {edit: certain.to_numpy(bool)[edits == edit] for edit in dict.fromkeys(edits.tolist())}
    listed = ", ".join(f"{edit} {hit.sum()} of {len(hit)}" for edit, hit in hits.items())
    return Finding(
        "What is special to memorized text",
        f"The bypass harms memorized text more than {control} text by the most at blocks {row['layers']}. "
        "Parts of depth at which an edit harms memorized text more (interval below 0, p < 0.05 corrected for "
        f"all): {listed}. What every edit does is no trait of attention: recited text is fragile to all of "
        "them, and has more log-probability to lose.",
        float(row[f"minus {control}"]),
        float(row[f"minus {control} low"]),
        float(row[f"minus {control} high"]),
        f"nats a token, memorized less {control}",
        None,
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
        "instead: "
        "each token's own values at full weight."
        if gap.high < 0 and gap.value < 0.5 * float(changed(main, "identity").mean())
        else "So it does surely more than a removal."
        if gap.high < 0
        else "So it does not surely do more than a removal."
    )
    zero = f", by nothing {said('zero')}" if "zero" in main["edit"].values else ""
    return Finding(
        "Bypass against removal, late blocks",
        f"In blocks {layers_label(last)} the bypass changes the log-probability of memorized text by "
        f"{said('identity')} nats a token, attention replaced by its mean {said('mean')}{zero}. {words}",
        gap.value,
        gap.low,
        gap.high,
        "nats a token, bypass less mean",
        gap.n,
        "the same difference: " + "; ".join(f"{name} {e}" for name, e in gaps.items() if name != MEMORIZED)
        if len(gaps) > 1
        else None,
    )


def any_stack(depth: pd.DataFrame) -> Finding:
    """What of the order by depth is true of any residual stack."""
    rows = depth.loc[depth["edit"] == "identity"].set_index("group")
    main = rows.loc[MEMORIZED]
    rest = "; ".join(
        f"{name} {row['correlation']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
        for name, row in rows.iterrows()
        if name != MEMORIZED
    )
    known = UNTRAINED in rows.index
    shared = known and rows.loc[UNTRAINED, "high"] < 0
    words = (
        "Untrained weights show this order too: that early edits matter more is no sign of memorization."
        if shared
        else "Untrained weights do not surely show this order."
        if known
        else "It was not asked of untrained weights."
    )
    return Finding(
        "What any residual stack does",
        f"On memorized text the size of the bypass' effect goes with depth by a rank correlation of "
        f"{main['correlation']:.2f}. {words}",
        float(main["correlation"]),
        float(main["low"]),
        float(main["high"]),
        "rank correlation of effect size and depth",
        int(main["n"]),
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
    return Finding(
        "Single heads",
        f"The most harmful bypass of a single head is that of head {site['head']} of layer {site['layer']}, "
        f"the "
        f"largest of {mean.size}: it changes the target log-probability by {main} nats a token.",
        main.value,
        main.low,
        main.high,
        "nats a token",
        main.n,
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
        f"{row['predictor']} on {row['weights']} {row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
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
