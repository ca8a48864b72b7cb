"""For each claim the number that decides it, from the study's tables, with what stands beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from memlens.results.statistics.comparison import corrected
from memlens.results.statistics.estimates import Estimate
from memlens.studies.comparative.analyze.domains import domain_agreement
from memlens.studies.comparative.analyze.frequency import BUCKETS
from memlens.studies.comparative.analyze.pooling import Column, Tables, estimates, fitted, pooled
from memlens.studies.comparative.measure import CONTROL, MEMORIZED, UNTRAINED
from memlens.studies.comparative.report.claims import Judged, by_null, over_models

_NONE = pd.DataFrame()


def smaller_beats_larger(rates: pd.DataFrame) -> pd.DataFrame:
    """Return the pairs of models of two families, with both rates and a test that the smaller recalls more.

    Returns:
        Columns `smaller`, `larger`, `smaller_rate`, `larger_rate`, `p` (one-sided two-proportion test),
        `p_corrected` (Benjamini and Hochberg over all pairs).
    """
    rows = []
    ordered = rates.sort_values("n_params").to_dict("records")
    for i, a in enumerate(ordered):
        for b in ordered[i + 1 :]:
            if a["family"] == b["family"] or a["n_params"] == b["n_params"]:
                continue
            joint = (a["memorized"] + b["memorized"]) / (a["n"] + b["n"])
            error = np.sqrt(joint * (1 - joint) * (1 / a["n"] + 1 / b["n"]))
            p = float(stats.norm.sf((a["rate"] - b["rate"]) / error)) if error > 0 else 1.0
            rows.append((a["model"], b["model"], a["rate"], b["rate"], p))
    frame = pd.DataFrame(rows, columns=["smaller", "larger", "smaller_rate", "larger_rate", "p"])
    return frame.assign(p_corrected=corrected(frame["p"].to_numpy(float)))


# ---- what is recalled ------------------------------------------------------------------------------------


def _size(tables: Tables) -> Judged | None:
    return fitted("size", tables.get("size_fits", _NONE), 1, "The rate", "share a factor 10")


def _structural_size(tables: Tables) -> Judged | None:
    fits = tables.get("structural_fits", _NONE)
    return fitted("structural_size", fits, -1, "The structural share", "share a factor 10")


def _depth(tables: Tables) -> Judged | None:
    fits = tables.get("depth_fits", _NONE)
    found = fitted("depth", fits, 1, "The mean leading run", "tokens a factor 10")
    if found is None:
        return None
    control = f"no direction to judge: what depth is there is not known; {found.control}"
    return Judged("depth", found.found, found.estimate, found.unit, control, "undecided")


def _families(tables: Tables) -> Judged | None:
    rates = tables["rates"]
    pairs = smaller_beats_larger(rates)
    if not len(pairs):
        return None
    clear = int((pairs["p_corrected"].to_numpy() < 0.05).sum())
    means: Any = rates.groupby("family")["rate"].mean()
    return Judged(
        "families",
        f"In {clear} of {len(pairs)} pairs of two families the smaller model clearly recalls more (one-sided "
        "tests, corrected for all pairs).",
        Estimate(clear / len(pairs), np.nan, np.nan, len(pairs)),
        "share of pairs",
        "mean rate by family: " + ", ".join(f"{family} {rate:.3g}" for family, rate in means.items()),
        "holds" if clear else "undecided",
    )


def _bipolar(tables: Tables) -> Judged | None:
    return pooled(
        "bipolar", tables.get("scores", _NONE), Column("at_ends"), 1,
        "The share of sequences with M = 0 or 1", "share of sequences", against=0.5,
        control="more than half of them is what we take for most",
    )  # fmt: skip


def _compressible(tables: Tables) -> Judged | None:
    return pooled(
        "compressible", tables.get("compression", _NONE), Column("ratio"), -1,
        "The share of the prompt that is enough", "share of the prompt", against=1.0,
        control="1: nothing can be cut",
    )  # fmt: skip


def _half(tables: Tables) -> Judged | None:
    return pooled(
        "half", tables.get("compression", _NONE), Column("up_to_half", "half_low", "half_high"), 1,
        "The share of memorized sequences that need half of the prompt or less", "share of sequences",
        against=0.5, control="more than half of them is what we take for often",
    )  # fmt: skip


def _structural(tables: Tables) -> Judged | None:
    return pooled(
        "structural", tables.get("structural", _NONE), Column("gap"), 1,
        "The mean rate of structural domains minus that of free text", "share of sequences",
        control="rates within domains, so that how many of each were sampled has no part in it",
    )  # fmt: skip


def _domains_shared(tables: Tables) -> Judged | None:
    table = tables.get("domains", _NONE)
    if not len(table):
        return None
    rates = table.pivot_table(index="family", columns="domain", values="rate").dropna(axis=1)
    found = domain_agreement(rates.to_numpy())
    if not np.isfinite(found["value"]):
        return None
    n = int(found["n"])
    return Judged(
        "domains_shared",
        f"The rank correlation of domain rates is {found['value']:.3g} (mean, all pairs of {n} families).",
        Estimate(found["value"], np.nan, np.nan, n),
        "rank correlation",
        f"domains shuffled: [{found['null_low']:.3g}, {found['null_high']:.3g}], p = {found['p']:.2g}",
        by_null(found["p"]),
    )


def _boundary(tables: Tables) -> Judged | None:
    return pooled(
        "boundary", tables.get("boundary_gaps", _NONE), Column("gap"), 1,
        "The change of frequency from prefix to first continuation token, M = 1 minus M = 0,",
        "occurrences in a million", control="the paper's own direction is not known",
    )  # fmt: skip


def _frequency_shared(tables: Tables) -> Judged | None:
    table = tables.get("frequency", _NONE)
    if not len(table):
        return None
    wide = table.pivot_table(index=["family", "offset"], columns="bucket", values="mean")
    if BUCKETS[0] not in wide or BUCKETS[2] not in wide:
        return None
    gaps = (wide[BUCKETS[0]] - wide[BUCKETS[2]]).unstack("offset").dropna()
    found = domain_agreement(gaps.to_numpy())
    if not np.isfinite(found["value"]):
        return None
    n = int(found["n"])
    return Judged(
        "frequency_shared",
        "The rank correlation over places of the frequency of M = 1 minus that of M = 0 is "
        f"{found['value']:.3g} (mean, all pairs of {n} families).",
        Estimate(found["value"], np.nan, np.nan, n),
        "rank correlation",
        f"places shuffled: [{found['null_low']:.3g}, {found['null_high']:.3g}], p = {found['p']:.2g}",
        by_null(found["p"]),
    )


# ---- noise -----------------------------------------------------------------------------------------------


def _strongest(table: pd.DataFrame) -> pd.DataFrame:
    return table.loc[table["alpha"] == table["alpha"].max()] if len(table) else table


def _others(table: pd.DataFrame, column: Column) -> str:
    """Say what the other groups give."""
    parts = []
    for group in (CONTROL, UNTRAINED):
        found = estimates(table.loc[table["group"] == group], column)
        if found:
            parts.append(f"{group} {over_models(found)}")
    return "; ".join(parts)


def _denoising(tables: Tables) -> Judged | None:
    table = _strongest(tables.get("recovery", _NONE))
    if not len(table):
        return None
    column = Column("recovery")
    return pooled(
        "denoising", table.loc[table["group"] == MEMORIZED], column, 1,
        f"The similarity that memorized sequences regain (alpha = {table['alpha'].max():g})", "cosine",
        control=_others(table, column),
    )  # fmt: skip


def _recovery(tables: Tables) -> Judged | None:
    return pooled(
        "recovery", _strongest(tables.get("recovery_gaps", _NONE)), Column("gap", n="pairs"), -1,
        "What memorized sequences regain minus what their matched controls do", "cosine",
        control="differences within pairs alike in length and token frequency",
    )  # fmt: skip


def _structural_noise(tables: Tables) -> Judged | None:
    return pooled(
        "structural_noise", tables.get("structural_noise", _NONE), Column("change"), 1,
        "The structural share of what is memorized under the strongest noise, minus that without,",
        "share of the memorized", control="the same sequences, resampled together",
    )  # fmt: skip


# ---- layers and heads ------------------------------------------------------------------------------------


def _burst(tables: Tables) -> Judged | None:
    table = tables.get("bursts", _NONE)
    if not len(table):
        return None
    column = Column("burst")
    return pooled(
        "burst", table.loc[table["group"] == MEMORIZED], column, 1,
        "The relative depth of the block with the largest rise", "relative depth", against=0.5,
        control=f"late is beyond 1/2; {_others(table, column)}",
    )  # fmt: skip


def _before_last(tables: Tables) -> Judged | None:
    table = tables.get("bursts", _NONE)
    if not len(table):
        return None
    column = Column("before_last", "before_low", "before_high")
    return pooled(
        "before_last", table.loc[table["group"] == MEMORIZED], column, 1,
        "The mean probability of the true token after the last block but one", "probability", against=0.5,
        control=_others(table, column),
    )  # fmt: skip


def _overlap(tables: Tables, claim: str, statistic: str, what: str, unit: str) -> Judged | None:
    table = tables.get("head_overlap", _NONE)
    if not len(table):
        return None
    here = table.loc[table["statistic"] == statistic]
    rows, layered = (
        here.loc[here["null"] == null] for null in ("heads anywhere", "heads inside their layers")
    )
    above = pd.DataFrame({name: rows[name] - rows["exact"] for name in ("value", "low", "high")})
    beside = (
        f"it is {rows['value'].mean():.3g}, by chance {rows['exact'].mean():.3g}; with heads shuffled inside "
        f"their layers {layered['null_mean'].mean():.3g}, and clearly above that in "
        f"{int((layered['p_above'].to_numpy() <= 0.05).sum())} of {len(layered)} models"
    )
    return pooled(claim, above, Column("value"), 1, what, unit, control=beside)


def _in_domain(tables: Tables) -> Judged | None:
    return _overlap(
        tables, "in_domain", "inside a domain", "The overlap of two halves of one domain, above chance,",
        "Jaccard overlap",
    )  # fmt: skip


def _universal(tables: Tables) -> Judged | None:
    return _overlap(
        tables, "universal", "universal", "The share of heads important in every domain, above chance,",
        "share of heads",
    )  # fmt: skip


EVIDENCE: Mapping[str, Callable[[Tables], Judged | None]] = MappingProxyType(
    {
        "size": _size,
        "families": _families,
        "depth": _depth,
        "bipolar": _bipolar,
        "compressible": _compressible,
        "half": _half,
        "structural": _structural,
        "structural_size": _structural_size,
        "domains_shared": _domains_shared,
        "boundary": _boundary,
        "frequency_shared": _frequency_shared,
        "denoising": _denoising,
        "recovery": _recovery,
        "structural_noise": _structural_noise,
        "burst": _burst,
        "before_last": _before_last,
        "in_domain": _in_domain,
        "universal": _universal,
    }
)
"""By claim: what judges it; None where the tables hold nothing for it."""
