"""Findings of the main job, each one sentence with its number, interval and control."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import xarray as xr

from memlens.recall.scores import RecallScores
from memlens.report.model import Finding
from memlens.results.result import Result
from memlens.results.statistics.comparison import compare_groups
from memlens.results.statistics.estimates import (
    Estimate,
    chosen_site,
    mean_estimate,
    median_estimate,
    ratio_estimate,
    share_estimate,
)
from memlens.results.statistics.intervals import halves

MEMORIZED, CONTROL, UNTRAINED = "memorized", "matched control", "untrained twin"
_HALVES = "chosen on one half of the sequences, measured on the other"


def recalled(recall: RecallScores) -> Finding:
    """How many sequences are recalled exactly, and how that depends on copies where they are known."""
    hits = recall.table["exact_match"].to_numpy(float)
    share = share_estimate(hits)
    return Finding.of(
        "What is recalled",
        f"The model recalls {int(hits.sum())} of {len(hits)} sequences exactly.",
        share,
        "share of sequences",
        _by_copies(recall.table),
    )


def _by_copies(table: pd.DataFrame) -> str | None:
    if "copies" not in table:
        return None
    groups = table.groupby("copies")["exact_match"]
    if groups.ngroups < 2:
        return None
    text = ", ".join(f"{hits.mean():.2f} at {copies}" for copies, hits in groups)
    return f"by copies in the training corpus: {text}"


def nothing_recalled(recall: RecallScores) -> Finding:
    """The finding when there is nothing to localize."""
    found = recalled(recall)
    best = recall.table["matching_prefix"].max()
    statement = (
        f"{found.statement} That is too few to localize anything; the longest run of right tokens is "
        f"{best:.0f}."
    )
    return Finding(
        found.title, statement, found.estimate, found.low, found.high, found.unit, found.n, found.control
    )


def promoted(decoded: Mapping[str, Result], seed: int) -> Finding:
    """The layer from which the predicted token is and stays the top one."""
    found = {name: median_estimate(_stable(result), seed=seed) for name, result in decoded.items()}
    layers = decoded[MEMORIZED].data.sizes["layer"]
    main = found[MEMORIZED]
    return Finding.of(
        "When the prediction is made",
        "For recalled sequences the predicted token becomes the top one for good after layer "
        f"{main.value:.3g} of 0 to {layers - 1} (median over sequences of each sequence's median token).",
        main,
        "layer",
        _others(found, MEMORIZED, "layer"),
    )


def _stable(result: Result) -> np.ndarray:
    return result["stable_promotion"].median("target", skipna=True).values


def strongest_head(results: Mapping[str, Result], seed: int) -> Finding:
    """The head whose ablation harms recall most."""
    return _most_harmful(results, seed, "Which head matters most", "Ablating head {head} of layer {layer}")


def head_table(results: Mapping[str, Result], seed: int, most: int = 20) -> pd.DataFrame:
    """The heads with the most harmful ablation, beside the matched controls and corrected for all heads."""
    result = results[MEMORIZED]
    ci = result.mean_ci("sequence", metric="target_logprob", of="effect", seed=seed)["target_logprob"]
    frame = (
        ci.to_dataframe("effect")
        .reset_index()
        .pivot(index=["layer", "head"], columns="statistic", values="effect")
    )
    exact = result["exact_match"].mean("sequence").to_dataframe("exact_match_left")["exact_match_left"]
    frame = frame[["mean", "low", "high"]].add_prefix("effect_").join(exact)
    if CONTROL in results and results[CONTROL].data.sizes["sequence"] > 1:
        contrast = compare_groups(result, results[CONTROL], "target_logprob", of="effect", seed=seed)
        columns = contrast[["difference", "low", "high", "p_corrected"]].to_dataframe()
        names = {"difference": "minus_control", "low": "minus_control_low", "high": "minus_control_high"}
        frame = frame.join(columns.rename(columns=names))
    return frame.sort_values("effect_mean").head(most).reset_index()


def bypassed_layer(results: Mapping[str, Result], seed: int) -> Finding:
    """The layer whose attention, bypassed, harms recall most."""
    return _most_harmful(
        results, seed, "Which layer's attention recall needs", "Bypassing the attention of layer {layer}"
    )


def _most_harmful(results: Mapping[str, Result], seed: int, title: str, intervention: str) -> Finding:
    """The site at which the intervention (a template over coordinates) costs the most log-probability."""
    result = results[MEMORIZED]
    choose, measure = halves(result.data.sizes["sequence"], seed)
    site = chosen_site(result, "target_logprob", choose)
    main = _at(result, site, measure, seed)
    exact = _left(result, site, measure)
    others = {n: _at(r, site, None, seed) for n, r in results.items() if n != MEMORIZED}
    return Finding.of(
        title,
        f"{intervention.format(**site)} changes the target log-probability by {main} nats a token and leaves "
        f"{exact} of the sequences recalled ({_HALVES}).",
        main,
        "nats a token",
        _others(others, None, "nats a token"),
    )


def restoring_layer(results: Mapping[str, Result], corrupted: np.ndarray, seed: int) -> Finding:
    """How deep the recall still depends on the corrupted token's own place.

    Args:
        results: Activation patching (denoising) of each group.
        corrupted: The position of the corrupted token in each memorized sequence.
        seed: Seed of the intervals.
    """
    result = results[MEMORIZED]
    here = xr.DataArray(corrupted, dims="sequence")
    gained = (result["target_logprob"] - result["target_logprob_corrupt"]).sel(position=here)
    lost = result["target_logprob_clean"] - result["target_logprob_corrupt"]
    shares = [ratio_estimate(gained.isel(layer=i), lost, seed=seed) for i in range(gained.sizes["layer"])]
    half = next((i for i, share in enumerate(shares) if share.value < 0.5), None)
    main = shares[-1 if half is None else half]
    layer = int(gained["layer"].values[-1 if half is None else half])
    ending = (
        "the last layer, so it stays at its place" if half is None else "the first where it is under half"
    )
    return Finding.of(
        "How deep the cue stays at its place",
        f"One token of the prefix was replaced. Writing the clean residual back at its position restores "
        f"{shares[0]} of the lost log-probability at layer 0 and {main} at the input of layer {layer}, "
        f"{ending}.",
        main,
        "share of the lost log-probability",
        _lost(results, seed),
    )


def _lost(results: Mapping[str, Result], seed: int) -> str:
    """How much the corruption takes from each group."""
    parts = []
    for name, result in results.items():
        lost = mean_estimate(result["target_logprob_corrupt"] - result["target_logprob_clean"], seed=seed)
        parts.append(f"{name} {lost} nats a token")
    return "what the corruption changes: " + "; ".join(parts)


def _at(result: Result, site: Mapping[str, int], rows: np.ndarray | None, seed: int) -> Estimate:
    """The effect on the target log-probability at a site."""
    here = result.effect("target_logprob").sel(site)
    return mean_estimate(here if rows is None else here.isel(sequence=rows), seed=seed)


def _left(result: Result, site: Mapping[str, int], rows: np.ndarray) -> Estimate:
    """The share of sequences still recalled exactly at a site."""
    return share_estimate(result["exact_match"].sel(site).isel(sequence=rows))


def _others(found: Mapping[str, Estimate], skip: str | None, unit: str) -> str | None:
    parts = [
        f"{name} {estimate} {unit}, n = {estimate.n}" for name, estimate in found.items() if name != skip
    ]
    return "; ".join(parts) or None
