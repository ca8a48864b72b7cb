"""Which of the claims hold here: every claim judged, as a table and as findings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from memlens.report.model import Finding
from memlens.results.statistics.estimates import Estimate
from memlens.studies.comparative.analyze.pooling import Tables
from memlens.studies.comparative.analyze.profiles import FamilyTest
from memlens.studies.comparative.report.claims import CLAIMS, Judged, by_null
from memlens.studies.comparative.report.evidence import EVIDENCE

_FEW_LABELINGS = 20
"""With fewer ways to label the models no p can be 0.05."""


_NEEDS = {
    "size": "It needs a family of three sizes.",
    "depth": "It needs a family of three sizes.",
    "structural_size": "It needs a family of three sizes, and domains of both kinds.",
    "families": "It needs two families of different sizes.",
    "domains_shared": "It needs two families and three domains.",
    "structural": "It needs domains of both kinds.",
    "frequency_shared": "It needs two families with sequences of M = 1 and of M = 0.",
    "structural_noise": "It needs domains of both kinds, and memorized sequences that are left under noise.",
    "boundary": "It needs sequences with M = 1 and with M = 0.",
    "signature": "It needs three models of two families, two of them of one.",
    "in_domain": "It needs two domains with enough memorized sequences.",
    "universal": "It needs two domains with enough memorized sequences.",
}


def judge_all(tables: Tables, tests: Mapping[str, FamilyTest], signature: Estimate | None) -> list[Judged]:
    """Judge every claim; one for which nothing was measured is "not tested".

    Args:
        tables: The study's tables by name, without control models.
        tests: "families", and "untrained" for the twins of random weights, where there are such tests.
        signature: Similarity within families minus across, with its interval over sequences.
    """
    found = []
    for claim in CLAIMS:
        judged = _signature(tests, signature) if claim == "signature" else EVIDENCE[claim](tables)
        if judged is None:
            why = _NEEDS.get(claim, "What it needs was not measured.")
            judged = Judged(claim, why, Estimate(np.nan, np.nan, np.nan, 0), "", "", "not tested")
        found.append(judged)
    return found


def _signature(tests: Mapping[str, FamilyTest], signature: Estimate | None) -> Judged | None:
    if "families" not in tests or signature is None:
        return None
    rows = tests["families"].table.set_index("statistic")
    accuracy, gap = rows.loc["accuracy"], rows.loc["difference"]
    beside = (
        f"family labels shuffled: [{gap['null_low']:.3g}, {gap['null_high']:.3g}], p = {gap['p']:.2g}; left "
        f"out one by one, {accuracy['value']:.3g} of {int(accuracy['n'])} models are given to their family "
        f"(shuffled {accuracy['null_mean']:.3g}, p = {accuracy['p']:.2g})"
    )
    if "untrained" in tests:
        other = tests["untrained"].table.set_index("statistic").loc["accuracy"]
        beside += f"; of untrained twins {other['value']:.3g} (p = {other['p']:.2g})"
    found = f"Profiles are {signature} more alike within families than across."
    verdict = by_null(float(gap["p"]))
    if tests["families"].labelings < _FEW_LABELINGS:
        verdict, beside = "undecided", f"too few models for a permutation test to decide; {beside}"
    return Judged("signature", found, signature, "similarity", beside, verdict)


def claim_table(judged: Sequence[Judged]) -> pd.DataFrame:
    """Return one row a claim.

    Columns `claim`, `verdict`, `found`, `value`, `low`, `high`, `unit`, `n`, `beside`, `known_from`,
    `why_a_toy_may_differ`.
    """
    rows = []
    for item in judged:
        claim, number = CLAIMS[item.claim], item.estimate
        rows.append(
            {
                "claim": claim.statement,
                "verdict": item.verdict,
                "found": item.found,
                "value": number.value,
                "low": number.low,
                "high": number.high,
                "unit": item.unit,
                "n": number.n,
                "beside": item.control,
                "known_from": claim.known_from,
                "why_a_toy_may_differ": claim.toy,
            }
        )
    return pd.DataFrame(rows)


def as_finding(judged: Judged) -> Finding:
    """Return a judged claim as a finding of the report."""
    claim, number = CLAIMS[judged.claim], judged.estimate
    known = np.isfinite(number.value)
    return Finding(
        f"{claim.title}: {judged.verdict}",
        f"Claimed ({claim.known_from}): {claim.statement} Here: {judged.found}",
        number.value if known else None,
        number.low if known else None,
        number.high if known else None,
        judged.unit,
        number.n if known else None,
        judged.control or None,
    )


_SIGNATURES = (
    ("starcoder", "rate", 1, "has the highest rate"),
    ("olmo1", "rate", -1, "has the lowest rate"),
    ("starcoder", "head_overlap", -1, "has the most domain-specific heads (lowest overlap across domains)"),
    ("olmo2", "head_overlap", 1, "shares its heads across domains most (the trait is noted of its 1B)"),
    ("olmo1", "noise_left", -1, "loses most of its rate under noise (noted of its 7B)"),
    ("olmo3", "noise_left", 1, "loses least under noise (its scores are basically unchanged)"),
    ("pythia", "family_similarity", 1, "has the most alike depth profiles over its sizes"),
)


def signature_table(models: pd.DataFrame, similarity: pd.DataFrame | None = None) -> pd.DataFrame:
    """Return what is noted of single families of the paper beside the order of families here.

    The traits are a reader's notes on the full text; "most" and "least" are our reading of them. Where a
    trait comes from a family's data, models of one toy corpus cannot show it; only an order is compared,
    without a test.

    Args:
        models: The table of models, without controls.
        similarity: Of all pairs: a column `model` and one a model.

    Returns:
        Columns `family`, `noted`, `here` (mean of each family, in order), `order` ("as noted", "otherwise",
        "family is not here").
    """
    rows = []
    for family, column, sign, noted in _SIGNATURES:
        if column not in models:
            continue
        means: Any = models.groupby("family")[column].mean()
        means = means.dropna().sort_values(ascending=sign < 0)
        here = ", ".join(f"{name} {value:.3g}" for name, value in means.items())
        if family not in means.index or len(means) < 2:
            order = "family is not here"
        else:
            order = "as noted" if means.index[0] == family else "otherwise"
        rows.append((family, noted, here, order))
    if similarity is not None and len(similarity):
        rows.append(_generations(models, similarity))
    return pd.DataFrame(rows, columns=["family", "noted", "here", "order"])


def _generations(models: pd.DataFrame, similarity: pd.DataFrame) -> tuple[str, str, str, str]:
    """Compare pairs of two generations of OLMo with the other pairs of two families."""
    families = dict(zip(models["model"], models["family"], strict=True))
    labels = [str(label) for label in similarity["model"] if label in families]
    values = similarity.set_index("model").loc[labels, labels].to_numpy(float)
    ours, others = [], []
    for i, a in enumerate(labels):
        for j, b in enumerate(labels[:i]):
            if families[a] != families[b]:
                both = families[a].startswith("olmo") and families[b].startswith("olmo")
                (ours if both else others).append(values[i, j])
    noted = "profiles of the generations 1, 2 and 3 resemble one another more than other families"
    if not ours or not others:
        return "olmo1, olmo2, olmo3", noted, "", "family is not here"
    here = f"pairs of generations {np.mean(ours):.3g}, other pairs across families {np.mean(others):.3g}"
    order = "as noted" if np.mean(ours) > np.mean(others) else "otherwise"
    return "olmo1, olmo2, olmo3", noted, here, order
