"""Findings of the attention-bypass study on its controls: other edits, single heads, bounds."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import xarray as xr

from memlens.attribution.layer_sets import layers_label
from memlens.report import Finding
from memlens.results import Result
from memlens.results.depth import quartiles
from memlens.studies.bypass_controls import MEMORIZED, UNTRAINED
from memlens.studies.statistics import mean_estimate

__all__ = ["any_stack", "beside_removal", "bounded", "heads_against_blocks", "special"]


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
    vacuous = float(result["vacuous"].mean())
    said = "; ".join(
        f"{row['predictor']} on {row['weights']} {row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
        for _, row in agreements.iterrows()
    )
    return Finding(
        "Bounds",
        f"Of {measured.size} bounds none is passed; the median bound over the measured change is {tight}. "
        f"The "
        f"bound of the whole model is vacuous at {vacuous:.2f} of the sites."
        if not over
        else f"{over} of {measured.size} bounds are passed: this is an error in memlens, please report it.",
        control=f"rank correlation of a guess from one pass with the measured divergence: {said}"
        if said
        else None,
    )
