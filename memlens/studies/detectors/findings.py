"""Findings of the study of detectors, with numbers, intervals and controls; the words are in `texts.yaml`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import xarray as xr

from memlens.instruments.detect.beyond import gain_of
from memlens.instruments.detect.buckets import BucketStatistics
from memlens.instruments.detect.exposure import BY_CHANCE
from memlens.instruments.detect.separation import ACTIVATIONS, SHUFFLED, estimate_at
from memlens.recall.taxonomy import CLASSES
from memlens.report.model import Finding
from memlens.results.result import Result
from memlens.results.statistics.estimates import Estimate, mean_estimate, share_estimate
from memlens.studies.running import Texts

TEXTS = Texts(__file__)
"""What the report says."""


def recalled(classes: pd.Series) -> Finding:
    """What share of sequences is recalled, and what share of these no rule explains."""
    hit = (classes != CLASSES[0]).to_numpy()
    own = (classes[hit] == CLASSES[2]).to_numpy()
    return TEXTS.finding("recalled", share_estimate(hit), recalled=int(hit.sum()), own=share_estimate(own))


def separated(name: str, found: Result, copies: Sequence[int] = ()) -> Finding:
    """What the last layer's activations add to the strictest baseline.

    Args:
        name: The finding.
        found: Of `separation`.
        copies: The numbers of copies that were compared.
    """
    n = found.data.sizes["sequence"]
    baseline = str(found["baseline"].values[-1])
    last = {"layer": int(found["layer"].values[-1])}
    area = found["area"].sel(last)
    gain = estimate_at(found["gain"].sel(last).sel(baseline=baseline), n)
    at = {key: estimate_at(area.sel(features=key), n) for key in (ACTIVATIONS, SHUFFLED, baseline)}
    return TEXTS.finding(
        name, gain, baseline=baseline, own=at[ACTIVATIONS], alone=at[baseline], shuffled=at[SHUFFLED],
        copies=", ".join(map(str, copies)), verdict=verdict(gain), layer=last["layer"],
    )  # fmt: skip


def no_mixed_copies(fewest: int, wanted: int) -> Finding:
    """That there are too few sequences of equal copies to compare."""
    return TEXTS.finding("no_mixed_copies", fewest=fewest, wanted=wanted)


def verdict(gain: Estimate) -> str:
    """Say whether a gain is above 0."""
    if not gain.known:
        return "With so few sequences this cannot be decided."
    if gain.low > 0:
        return "That is more than nothing."
    return "Nothing is shown beyond them."


def behaving(found: Result) -> Finding:
    """How stable the choice of behaviour neurons is."""
    same, control = (mean_estimate(found[name]) for name in ("overlap", "overlap_shuffled"))
    # The halvings are not independent: their mean is given without an interval.
    return TEXTS.finding(
        "behaving", Estimate(same.value), control=f"{control.value:.3g}", n=int(found["chosen"].sum())
    )


def steering(curve: Result, cost: Result | None) -> Finding:
    """What the largest dose away from recalling does to recall, beyond random shifts, and to tasks."""
    alpha = float(curve["alpha"].min())
    at = curve["exact_match"].sel(alpha=alpha)
    own = at.sel(direction="behaviour")
    random = [d for d in at["direction"].values if d != "behaviour"]
    gap = own - at.sel(direction=random).mean("direction") if random else own - curve["exact_match_baseline"]
    tasks = "not measured"
    if cost is not None:
        lost = cost.effect("accuracy").sel(alpha=alpha)
        tasks = f"{mean_estimate(lost.sel(direction='behaviour'))}"
        if random:
            tasks += f", with random shifts {mean_estimate(lost.sel(direction=random).mean('direction'))}"
    return TEXTS.finding("steering", mean_estimate(gap), alpha=alpha, left=share_estimate(own), tasks=tasks)


def dimension(found: Result) -> Finding:
    """How well a low local dimension marks recalled sequences, in the last layer."""
    area = estimate_at(found["area"].isel(layer=-1), found.data.sizes["sequence"])
    group, lid = found["group"].values, found["lid"].isel(layer=-1)
    ours, theirs = (mean_estimate(lid[group == name]) for name in ("recalled", "matched"))
    return TEXTS.finding(
        "dimension", area, ours=ours, theirs=theirs, layer=int(found["layer"].values[-1]),
        references=found.settings["n_references"],
    )  # fmt: skip


def attention(compared: Mapping[str, xr.Dataset]) -> Finding:
    """How many heads attend differently, by statistic, and by how much the clearest one."""
    counts = {name: int((part["p_corrected"] < 0.05).sum()) for name, part in compared.items()}
    name = max(counts, key=lambda key: counts[key])
    part = compared[name].stack(site=("layer", "head"))
    best = part.isel(site=int(np.nanargmax(np.abs(part["difference"].values))))
    found = Estimate(*(float(best[key]) for key in ("difference", "low", "high")), n=int(part.attrs["n_a"]))
    layer, head = best["site"].item()
    return TEXTS.finding(
        "attention", found, counts="; ".join(f"{key.replace('_', ' ')}: {n}" for key, n in counts.items()),
        total=part.sizes["site"], statistic=name.replace("_", " "), layer=int(layer), head=int(head),
    )  # fmt: skip


def beyond(table: pd.DataFrame) -> Finding:
    """Which detector adds most to a baseline, and which add anything."""
    rows = table.to_dict("records")
    best = max(rows, key=lambda row: row["gain"])
    gain = gain_of(best)
    adding = [str(row["detector"]) for row in rows if gain_of(row).known and row["gain_low"] > 0]
    copies = "; ".join(f"{row['detector']} {row['copies_correlation']:.2f}" for row in rows)
    return TEXTS.finding(
        "beyond", gain, baseline=best["baseline"], alone=f"{best['baseline_area']:.3g}",
        detector=best["detector"], adding=", ".join(adding) or "none", copies=copies,
    )  # fmt: skip


def exposed(found: Result) -> Finding:
    """How exposed canaries are, by copies where known."""
    return TEXTS.finding(
        "exposed", mean_estimate(found["exposure"]), control=_by_copies(found, "exposure"),
        chance=BY_CHANCE, bits=found.settings["bits"],
    )  # fmt: skip


def invariant(found: Result, buckets: BucketStatistics | None) -> Finding:
    """How invariant predictions are over temperatures, and how that goes with popularity."""
    said = "not known"
    if buckets is not None:
        said = (
            f"Pearson {buckets.pearson:.2f} (p = {buckets.pearson_p:.2g}), Spearman {buckets.spearman:.2f} "
            f"(p = {buckets.spearman_p:.2g}), over {len(buckets.table)} buckets"
        )
    return TEXTS.finding(
        "invariant", mean_estimate(found["invariance"]), control=_by_copies(found, "invariance"), buckets=said
    )


def _by_copies(found: Result, name: str) -> str | None:
    if "copies" not in found.data.coords:
        return None
    copies = found["copies"].values
    return ", ".join(f"{mean_estimate(found[name][copies == n]).value:.2f} at {n}" for n in np.unique(copies))
