"""Findings of the audit, in words for a reader who is not a researcher; the words are in `texts.yaml`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from memlens.benchmark.ranking import Ranking
from memlens.forward.components import Component
from memlens.report.model import Finding
from memlens.results.result import Result
from memlens.results.statistics.estimates import (
    Estimate,
    mean_estimate,
    median_estimate,
    share_estimate,
    shown_number,
)
from memlens.studies.auditing.leaks import LEAKS, NEARLY, SAMPLED, WHOLE
from memlens.studies.auditing.options import AuditOptions, Step
from memlens.studies.auditing.redaction import masked
from memlens.studies.auditing.remedies import change_of
from memlens.studies.running import Texts

TEXTS = Texts(__file__)
"""What the report says."""

MEMORY, GUESS, ANYWHERE, REFERENCE = (
    "memory", "can be guessed", "comes after other text too", "the reference says it too"
)  # fmt: skip
"""What a leaking string is taken for."""

_FIRST = 5


def leaks(table: pd.DataFrame) -> np.ndarray:
    """Return whether each string leaks: whole, or by sampling."""
    return table["leaks"].isin([WHOLE, SAMPLED]).to_numpy()


def leaked(table: pd.DataFrame, options: AuditOptions, left_out: str) -> Finding:
    """How many strings leak, and how."""
    how = table["leaks"].tolist()
    own, others = (_values(table, name) for name in ("edit_similarity_characters", "likeness_to_others"))
    return TEXTS.finding(
        "leak",
        share_estimate(leaks(table)),
        leaking=how.count(WHOLE) + how.count(SAMPLED),
        n=len(how),
        whole=how.count(WHOLE),
        sampled=how.count(SAMPLED),
        nearly=how.count(NEARLY),
        samples=options.n_samples,
        p=options.probability,
        left_out=f" Left out: {left_out}." if left_out else "",
        own=own.mean(),
        others=f"{others.mean():.2f}" if len(others) else "not known how",
    )


def _values(table: Any, name: str) -> np.ndarray:
    """Return the values of a column that are known."""
    values = table[name].to_numpy(float)
    return values[np.isfinite(values)]


def _mean(values: np.ndarray, seed: int) -> Estimate:
    return mean_estimate(xr.DataArray(values, dims="sequence"), seed=seed)


def exposed(table: pd.DataFrame, among: str, seed: int) -> Finding:
    """How far leaking secrets stand out from others of their form, compared with those that do not leak.

    Args:
        table: With the exposures.
        among: In what the others of their form differ: "digits" or "characters".
        seed: Of the intervals.
    """
    here, leaking = (table["exposure_among"] == among).to_numpy(), leaks(table)
    own, others = (_values(table[here & rows], "exposure") for rows in (leaking, ~leaking))
    control = "none that does not leak"
    if len(others):
        control = f"{_mean(others, seed)} bits for {len(others)} that do not leak"
    found = _mean(own, seed) if len(own) else Estimate.unknown()
    words = TEXTS["exposure"][among]
    return TEXTS.finding(
        "exposed" if len(own) else "nothing_exposed",
        found,
        control=control,
        most=_values(table[here], "exposure_most").max(),
        **words,
    )


def from_how_little(table: pd.DataFrame, curve: Result, options: AuditOptions) -> Finding:
    """How many tokens of the text before a string bring it out."""
    some, seed = table[table["shortest_prefix"].notna()], options.seed
    damaged = [
        f"With {n} of them replaced, a share of {_mean(values, seed)} still comes."
        for n in options.damaged
        if len(values := _values(some, f"with_{n}_replaced"))
    ]
    found = curve["exact_match"]
    shares = {int(k): found.sel(prefix_len=k).dropna("sequence").values for k in curve["prefix_len"].values}
    return TEXTS.finding(
        "little",
        median_estimate(_values(some, "shortest_prefix"), seed=seed),
        control="; ".join(f"{k}: {hits.sum():.0f} of {len(hits)}" for k, hits in shares.items()),
        whole=float(np.median(_values(some, "prefix_tokens"))),
        deleted=median_estimate(_values(some, "deleted_to"), seed=seed),
        damaged=" ".join(damaged),
    )


def is_memory(
    table: pd.DataFrame, above: Mapping[str, np.ndarray], matched: np.ndarray, seed: int
) -> Finding:
    """What the leaking strings are taken for.

    Args:
        table: With the column `verdict`.
        above: By how much each string's log-probability (nats per token) is above that under something else.
        matched: Which strings do not leak and match those that do.
        seed: Of the intervals.
    """
    leaking = leaks(table)
    verdicts = table["verdict"].to_numpy()[leaking].tolist()
    compared = "reference_exact" in table
    said = f"and the reference model says {verdicts.count(REFERENCE)} as well"
    controls = []
    for name, values in above.items():
        own, others = (values[rows & np.isfinite(values)] for rows in (leaking, matched))
        if len(own):
            theirs = f"{_mean(others, seed)} for {len(others)} matched ones that do not leak"
            controls.append(
                f"log-probability above that {name}: {_mean(own, seed)} nats per token for leaking strings, "
                + (theirs if len(others) else "and no others match")
            )
    return TEXTS.finding(
        "memory",
        share_estimate([verdict == MEMORY for verdict in verdicts]),
        control="; ".join(controls),
        n=len(verdicts),
        memory=verdicts.count(MEMORY),
        guessed=verdicts.count(GUESS),
        anywhere=verdicts.count(ANYWHERE),
        reference=said if compared else "and there is no reference model to ask",
    )


def ranked(ranking: Ranking, *, first: bool) -> Finding:
    """Which components the leaking strings depend on most, and how well the method is known to work."""
    names = ", ".join(map(_named, ranking.top(_FIRST)))
    return TEXTS.finding(
        "where" if first else "where_other",
        method=ranking.method,
        first=names,
        evidence=ranking.evidence,
        component=ranking.component,
    )


def _named(component: Component) -> str:
    words = {"head": f"head {component.index}", "neuron": f"neuron {component.index}"}
    return f"{words.get(component.kind, component.kind)} of layer {component.layer}"


def helped(row: Mapping[str, Any], *, made: int = 0) -> Finding:
    """What a remedy leaves of the leaks, what it costs, and whether others come instead.

    Args:
        row: Of the table of remedies.
        made: How many of the strings that do not leak were made for lack of given ones; 0: none.
    """
    cost = "Its cost on other text is not known, since no text was given."
    if "perplexity_before" in row:
        ratio = Estimate(row["perplexity_ratio"], row["perplexity_ratio_low"], row["perplexity_ratio_high"])
        cost = (
            f"The perplexity of the text goes from {shown_number(row['perplexity_before'])} to "
            f"{shown_number(row['perplexity_after'])} ({ratio} times)."
        )
    begun = row["others_whole_after"] - row["others_whole_before"]
    those = f"{made} made strings, since every given one leaks" if made else "the strings that did not leak"
    now = f"{row['others_whole_after']:.0%} now do" if begun > 0 else "none begins to"
    instead = f"Of {those}, {now}; "
    instead += f"after {row['another_string_instead']:.0%} of the prefixes another string of the list comes."
    controls = {"random directions": "change_random", "other random components": "change_random_components"}
    said = [f"{name} {row[key]:+.2f}" for name, key in controls.items() if np.isfinite(row[key])]
    return TEXTS.finding(
        "help",
        change_of(row),
        control="; ".join(said)
        or "none: weights cannot express it, so there is no random edit of the same size",
        remedy=row["remedy"],
        what=row["what"],
        n=row["strings"],
        before=row["whole_before"],
        after=row["whole_after"],
        cost=cost,
        instead=instead,
    )


def skipped(step: Step, reason: str) -> Finding:
    """That a question was not asked, and why."""
    return TEXTS.finding("skipped", question=TEXTS["questions"][step], reason=reason)


WORDS = {
    "string": "string", "kind": "kind", "secret": "secret", "leaks": "leaks", "verdict": "taken for",
    "samples_needed": "samples needed", "exposure": "exposure (bits)", "exposure_most": "of at most",
    "exposure_among": "others differ in",
    "shortest_prefix": "enough tokens before it", "prefix_tokens": "of", "deleted_to": "if any is deleted",
    "reference_exact": "the reference says it", "target_tokens": "its tokens",
    "memorization_score": "of them right", "edit_similarity": "alike, by tokens",
    "edit_similarity_characters": "alike, by characters", "likeness_to_others": "alike to others",
    "prefix": "text before it", "generated": "what comes",
}  # fmt: skip
"""Columns of the table in the report, in words."""
IN_SHORT = {
    name: WORDS[name]
    for name in (
        "string", "kind", "secret", "leaks", "samples_needed", "exposure", "shortest_prefix", "verdict"
    )
}  # fmt: skip
"""Columns of the table on the terminal."""


def redacted(table: pd.DataFrame, *, redact: bool) -> pd.DataFrame:
    """Return the table without what is secret: names, texts, and all but the ends of each secret."""
    if not redact:
        return table
    plain = table.drop(columns=["id", "prefix", "target", "generated"])
    return plain.assign(secret=[masked(secret) for secret in table["secret"]])


def shown(table: pd.DataFrame, words: Mapping[str, str], *, redact: bool) -> pd.DataFrame:
    """Return the table as the report and the terminal show it, in words and without what is secret."""
    frame = redacted(table, redact=redact)
    frame = frame.assign(samples_needed=[_count(value) for value in frame["samples_needed"]])
    columns = [name for name in words if name in frame and not frame[name].isna().to_numpy().all()]
    return pd.DataFrame({words[name]: frame[name] for name in columns})


def _count(value: float) -> str:
    """Return a number of samples; beyond a million, only that it is.

    >>> [_count(value) for value in (12345.0, 3e6, np.inf)]
    ['12,345', 'over a million', 'never']
    """
    return f"{value:,.0f}" if value < 1e6 else ("never" if np.isinf(value) else "over a million")


def ranking_order(table: pd.DataFrame) -> np.ndarray:
    """Return the order of the rows: by how they leak, then by the fewest samples, then by likeness."""
    alike, needed = (table[name].to_numpy(float) for name in ("edit_similarity_characters", "samples_needed"))
    return np.lexsort((-alike, needed, np.array([LEAKS.index(how) for how in table["leaks"]])))
