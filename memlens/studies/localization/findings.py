"""Findings of the main job, each with its number, interval and control; the words are in `texts.yaml`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from memlens.recall.scores import RecallScores
from memlens.report.model import Finding
from memlens.results.result import Result
from memlens.results.statistics.comparison import compare_groups
from memlens.results.statistics.estimates import (
    chosen_site,
    mean_estimate,
    median_estimate,
    ratio_estimate,
    share_estimate,
)
from memlens.results.statistics.intervals import halves
from memlens.studies.contrasts import against_controls, strictest
from memlens.studies.running import Texts, spoken

TEXTS = Texts(__file__)
"""What the report says."""

MEMORIZED, CONTROL, UNTRAINED = "memorized", "matched control", "untrained twin"


def recalled(recall: RecallScores, *, enough: bool = True) -> Finding:
    """How many sequences are recalled exactly, and how that depends on copies where they are known.

    Args:
        recall: The scores.
        enough: Whether there are enough recalled sequences to localize anything.
    """
    hits = recall.table["exact_match"].to_numpy(float)
    return TEXTS.finding(
        "recalled" if enough else "nothing_recalled",
        share_estimate(hits),
        control=_by_copies(recall.table),
        recalled=int(hits.sum()),
        n=len(hits),
        longest=recall.table["matching_prefix"].max(),
    )


def _by_copies(table: pd.DataFrame) -> str | None:
    if "copies" not in table or len(set(table["copies"])) < 2:
        return None
    groups = table.groupby("copies")["exact_match"]
    return ", ".join(f"{hits.mean():.2f} at {copies}" for copies, hits in groups)


def promoted(decoded: Mapping[str, Result], seed: int) -> Finding:
    """The layer from which the predicted token is and stays the top one."""
    stable = {name: result["stable_promotion"].median("target") for name, result in decoded.items()}
    found = {name: median_estimate(values.values, seed=seed) for name, values in stable.items()}
    others = spoken(found, skip=MEMORIZED)
    last = decoded[MEMORIZED].data.sizes["layer"] - 1
    return TEXTS.finding("promoted", found[MEMORIZED], control=others, last=last)


def strongest_head(results: Mapping[str, Result], seed: int) -> Finding:
    """The head whose ablation harms recall most."""
    return _most_harmful("strongest_head", results, seed)


def head_table(results: Mapping[str, Result], seed: int, most: int = 20) -> pd.DataFrame:
    """Return the heads with the most harmful ablation, compared with controls, p corrected for all heads."""
    result = results[MEMORIZED]
    ci = result.mean_ci("sequence", metric="target_logprob", of="effect", seed=seed)["target_logprob"]
    frame = ci.reset_coords(drop=True).to_dataset("statistic").to_dataframe(dim_order=["layer", "head"])
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
    return _most_harmful("bypassed_layer", results, seed)


def _most_harmful(finding: str, results: Mapping[str, Result], seed: int) -> Finding:
    """The site at which the intervention costs the most log-probability."""
    result = results[MEMORIZED]
    choose, measure = halves(result.data.sizes["sequence"], seed)
    site: dict[str, Any] = chosen_site(result, "target_logprob", choose)
    effects = {name: each.effect("target_logprob").sel(site) for name, each in results.items()}
    effects[MEMORIZED] = effects[MEMORIZED].isel(sequence=measure)
    found = {name: mean_estimate(effect, seed=seed) for name, effect in effects.items()}
    left = share_estimate(result["exact_match"].sel(site).isel(sequence=measure))
    others = spoken(found, "nats per token", skip=MEMORIZED)
    own = effects.pop(MEMORIZED)
    differs = against_controls(
        strictest(own, effects, sign=-1, seed=seed), "more harm than", "nats per token"
    )
    clause = differs[:1].lower() + differs[1:]
    return TEXTS.finding(
        finding, found[MEMORIZED], control=others, left=left, differs=differs, clause=clause, **site
    )


def restoring_layer(results: Mapping[str, Result], corrupted: np.ndarray, seed: int) -> Finding:
    """Up to which layer recall depends on the residual at the corrupted token's position.

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
    deepest = -1 if half is None else half
    stays, falls = "the last layer, so the cue stays at its place", "the first with an estimate below half"
    if half is not None and not shares[half].high < 0.5:
        falls += ", though its interval does not exclude half"
    lost_by = {
        name: mean_estimate(each["target_logprob_corrupt"] - each["target_logprob_clean"], seed=seed)
        for name, each in results.items()
    }
    return TEXTS.finding(
        "restoring_layer",
        shares[deepest],
        control=spoken(lost_by, "nats per token"),
        first=shares[0],
        layer=int(gained["layer"].values[deepest]),
        ending=stays if half is None else falls,
    )
