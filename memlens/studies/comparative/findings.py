"""Findings: the paper's claims, each judged by one number of the study's tables.

The claims and their words are in `texts.yaml`; `EVIDENCE` names what judges each of them. A claim is judged
by a number with a direction and its 95 % interval, or by a permutation null.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
import pandas as pd
import yaml

from memlens.report.model import Finding
from memlens.results.statistics.estimates import Estimate
from memlens.studies.comparative.analyze.domains import domain_agreement
from memlens.studies.comparative.analyze.frequency import BUCKETS
from memlens.studies.comparative.analyze.profiles import FamilyTest
from memlens.studies.comparative.analyze.rates import smaller_beats_larger
from memlens.studies.comparative.measure import CONTROL, MEMORIZED, UNTRAINED

TEXTS: dict[str, Any] = yaml.safe_load(
    resources.files("memlens.studies.comparative").joinpath("texts.yaml").read_text(encoding="utf-8")
)

VERDICTS = ("holds", "does not hold", "undecided", "not tested")

_FEW_LABELINGS = 20
"""With fewer ways to label the models no p can be 0.05."""

_NONE = pd.DataFrame()


@dataclass(frozen=True)
class Claim:
    """A finding of the paper.

    Attributes:
        title: In a few words.
        statement: What is claimed, in our words.
        known_from: How we know it.
        toy: Why models trained on a toy corpus may differ.
        unit: Of the number that judges it.
        needs: What it is judged from.
        found: Begins the sentence that says what was found.
        control: What the number is compared with.
    """

    title: str
    statement: str
    known_from: str
    toy: str
    unit: str
    needs: str = "What it needs was not measured."
    found: str = ""
    control: str = ""


CLAIMS: dict[str, Claim] = {name: Claim(**text) for name, text in TEXTS["claims"].items()}


@dataclass(frozen=True)
class Judged:
    """What was found about a claim.

    Attributes:
        claim: Key of `CLAIMS`.
        found: One sentence.
        estimate: The number that decides, with its interval.
        control: What it is compared with, and what that gave.
        verdict: One of `VERDICTS`.
    """

    claim: str
    found: str
    estimate: Estimate
    control: str
    verdict: str


# ---- rules -----------------------------------------------------------------------------------------------


def judge(estimate: Estimate, sign: int, against: float = 0.0) -> str:
    """Return the verdict on a number that the paper has above (`sign` 1) or below (-1) `against`.

    >>> judge(Estimate(0.3, 0.1, 0.5, 10), 1), judge(Estimate(0.3, -0.1, 0.5, 10), 1)
    ('holds', 'undecided')
    >>> judge(Estimate(0.3, 0.1, 0.5, 10), -1)
    'does not hold'
    """
    if not estimate.excludes(against):
        return "undecided"
    return "holds" if sign * (estimate.low - against) > 0 else "does not hold"


def by_null(p_above: float) -> str:
    """Return the verdict of a permutation null; `p_above` is the share of it at least as large as the value.

    >>> by_null(0.01), by_null(0.4), by_null(0.99)
    ('holds', 'undecided', 'does not hold')
    """
    if not np.isfinite(p_above):
        return "undecided"
    return "holds" if p_above <= 0.05 else "does not hold" if p_above >= 0.975 else "undecided"


def over_models(estimates: Sequence[Estimate]) -> Estimate:
    """Return the mean over models with Student's 95 % interval over them.

    One model keeps its own interval. Two models say nothing about how models differ: the ends of their own
    intervals are averaged.

    >>> found = over_models([Estimate(1.0, 0, 2, 5), Estimate(3.0, 2, 4, 5), Estimate(2.0, 1, 3, 5)])
    >>> round(found.value, 2), round(found.low, 2), found.n
    (2.0, -0.48, 3)
    """
    from scipy import stats

    known = [estimate for estimate in estimates if np.isfinite(estimate.value)]
    if not known:
        return Estimate.unknown()
    n, mean = len(known), float(np.mean([estimate.value for estimate in known]))
    if n < 3:
        low, high = np.mean([(estimate.low, estimate.high) for estimate in known], axis=0).tolist()
        return Estimate(mean, low, high, known[0].n if n == 1 else n)
    spread = np.std([estimate.value for estimate in known], ddof=1)
    half = float(stats.t.ppf(0.975, n - 1) * spread / np.sqrt(n))
    return Estimate(mean, mean - half, mean + half, n)


def _estimates(table: pd.DataFrame, value: str, prefix: str = "", n: str = "n") -> list[Estimate]:
    """Return one estimate per row; rows without a number are left out."""
    count = n if n in table else None
    rows = [Estimate.from_row(row, value, prefix=prefix, n=count) for row in table.to_dict("records")]
    return [estimate for estimate in rows if np.isfinite(estimate.value)]


def _pooled(
    claim: str,
    table: pd.DataFrame,
    value: str,
    sign: int,
    *,
    prefix: str = "",
    n: str = "n",
    against: float = 0.0,
    control: str = "",
) -> Judged | None:
    """Judge the mean of a column over models; None where no model has the number.

    Args:
        claim: Key of the claim.
        table: One row per model.
        value: The column; its interval is in `prefix` + "low" and "high".
        sign: The side of `against` on which the paper has it.
        prefix: See above.
        n: Column of the counts.
        against: What it is compared with.
        control: Further words on the control.
    """
    own = _estimates(table, value, prefix, n)
    if not own:
        return None
    mean, verdicts = over_models(own), [judge(estimate, sign, against) for estimate in own]
    over = "one model"
    if len(own) > 1:
        over = (
            f"mean over {len(own)} models; by a model's own interval it holds in {verdicts.count('holds')} "
            f"and does not hold in {verdicts.count('does not hold')}"
        )
    text = CLAIMS[claim]
    found = f"{text.found} is {mean} ({over})."
    return Judged(claim, found, mean, text.control + control, judge(mean, sign, against))


def _fitted(claim: str, fits: pd.DataFrame, sign: int) -> Judged | None:
    """Judge the slope on size that all families share, or one family's; None where nothing was fitted."""
    if not len(fits):
        return None
    joint = fits[fits["family"] == "all families"]
    row: Any = (joint if len(joint) else fits).iloc[0]
    slope = Estimate.from_row(row, "slope", prefix="" if np.isfinite(row["low"]) else "boot_", n="sizes")
    others = "; ".join(
        f"{other['family']}, {other['reading']}: {Estimate.from_row(other, 'slope', n='sizes')}, "
        f"R² {other['r2']:.2g}"
        for other in fits.drop(index=row.name).to_dict("records")
    )
    found = (
        f"{CLAIMS[claim].found} changes by {slope} with every factor 10 in parameters ({row['family']}, "
        f"{slope.n} sizes, R² {row['r2']:.2g})."
    )
    verdict = "undecided" if claim == "depth" else judge(slope, sign)  # depth has no direction to judge
    return Judged(claim, found, slope, CLAIMS[claim].control + others, verdict)


def _agreed(claim: str, values: np.ndarray) -> Judged | None:
    """Judge the mean rank correlation of families; `values` is `[family, domain or position]`."""
    found = domain_agreement(values)
    if not np.isfinite(found["value"]):
        return None
    text, n = CLAIMS[claim], int(found["n"])
    return Judged(
        claim,
        f"{text.found} is {found['value']:.3g} (mean, all pairs of {n} families).",
        Estimate(found["value"], n=n),
        f"{text.control} shuffled: [{found['null_low']:.3g}, {found['null_high']:.3g}], p = {found['p']:.2g}",
        by_null(found["p"]),
    )


# ---- evidence --------------------------------------------------------------------------------------------

Get = Callable[[str], pd.DataFrame]
"""Gives a table by name; one that was not made is empty."""


def _families(get: Get) -> Judged | None:
    rates = get("rates")
    pairs = smaller_beats_larger(rates) if len(rates) else rates
    if not len(pairs):
        return None
    clear = int((pairs["p_corrected"].to_numpy() < 0.05).sum())
    means: Any = rates.groupby("family")["rate"].mean()
    return Judged(
        "families",
        f"In {clear} of {len(pairs)} pairs of two families the smaller model recalls significantly more "
        "(one-sided tests, corrected for all pairs).",
        Estimate(clear / len(pairs), n=len(pairs)),
        "mean rate by family: " + ", ".join(f"{family} {rate:.3g}" for family, rate in means.items()),
        "holds" if clear else "undecided",
    )


def _domains_shared(get: Get) -> Judged | None:
    table = get("domains")
    if not len(table):
        return None
    rates = table.pivot_table(index="family", columns="domain", values="rate").dropna(axis=1)
    return _agreed("domains_shared", rates.to_numpy())


def _frequency_shared(get: Get) -> Judged | None:
    table = get("frequency")
    if not len(table):
        return None
    wide = table.pivot_table(index=["family", "offset"], columns="bucket", values="mean")
    if BUCKETS[0] not in wide or BUCKETS[2] not in wide:
        return None
    gaps = (wide[BUCKETS[0]] - wide[BUCKETS[2]]).unstack("offset").dropna()
    return _agreed("frequency_shared", gaps.to_numpy())


def _strongest(table: pd.DataFrame) -> pd.DataFrame:
    return table.loc[table["alpha"] == table["alpha"].max()] if len(table) else table


def _memorized(claim: str, table: pd.DataFrame, value: str, sign: int, **options: Any) -> Judged | None:
    """Judge the memorized group's number; the other groups' numbers are the control."""
    if not len(table):
        return None
    others = {
        name: _estimates(table.loc[table["group"] == name], value, options.get("prefix", ""))
        for name in (CONTROL, UNTRAINED)
    }
    control = "; ".join(f"{name} {over_models(found)}" for name, found in others.items() if found)
    own = table.loc[table["group"] == MEMORIZED]
    return _pooled(claim, own, value, sign, control=control, **options)


def _overlap(claim: str, table: pd.DataFrame, statistic: str) -> Judged | None:
    """Judge an overlap of heads minus what random sets give."""
    if not len(table):
        return None
    nulls = table.loc[table["statistic"] == statistic].groupby("null")
    rows, layered = (nulls.get_group(null) for null in ("heads anywhere", "heads inside their layers"))
    above = pd.DataFrame({name: rows[name] - rows["exact"] for name in ("value", "low", "high")})
    control = (
        f"it is {rows['value'].mean():.3g}, by chance {rows['exact'].mean():.3g}; with heads shuffled inside "
        f"their layers {layered['null_mean'].mean():.3g}, and significantly above that in "
        f"{int((layered['p_above'].to_numpy() <= 0.05).sum())} of {len(layered)} models"
    )
    return _pooled(claim, above, "value", 1, control=control)


EVIDENCE: Mapping[str, Callable[[Get], Judged | None]] = {
    "size": lambda get: _fitted("size", get("size_fits"), 1),
    "families": _families,
    "depth": lambda get: _fitted("depth", get("depth_fits"), 1),
    "bipolar": lambda get: _pooled("bipolar", get("scores"), "at_ends", 1, against=0.5),
    "compressible": lambda get: _pooled("compressible", get("compression"), "ratio", -1, against=1.0),
    "half": lambda get: _pooled(
        "half", get("compression"), "up_to_half", 1, prefix="half_", against=0.5
    ),
    "structural": lambda get: _pooled("structural", get("structural"), "gap", 1),
    "structural_size": lambda get: _fitted("structural_size", get("structural_fits"), -1),
    "domains_shared": _domains_shared,
    "boundary": lambda get: _pooled("boundary", get("boundary_gaps"), "gap", 1),
    "frequency_shared": _frequency_shared,
    "denoising": lambda get: _memorized("denoising", _strongest(get("recovery")), "recovery", 1),
    "recovery": lambda get: _pooled("recovery", _strongest(get("recovery_gaps")), "gap", -1, n="pairs"),
    "structural_noise": lambda get: _pooled("structural_noise", get("structural_noise"), "change", 1),
    "burst": lambda get: _memorized("burst", get("bursts"), "burst", 1, against=0.5),
    "before_last": lambda get: _memorized(
        "before_last", get("bursts"), "before_last", 1, prefix="before_", against=0.5
    ),
    "in_domain": lambda get: _overlap("in_domain", get("head_overlap"), "inside a domain"),
    "universal": lambda get: _overlap("universal", get("head_overlap"), "universal"),
}  # fmt: skip
"""For each claim but "signature", what judges it; None where the tables hold nothing for it."""


def judge_all(
    tables: Mapping[str, pd.DataFrame], tests: Mapping[str, FamilyTest], signature: Estimate | None
) -> list[Judged]:
    """Judge every claim; a claim without measurements is "not tested".

    Args:
        tables: The study's tables by name, without control models.
        tests: "families", and "untrained" for the twins of random weights, where there are such tests.
        signature: Similarity within families minus across, with its interval over sequences.
    """
    found = []
    for claim, text in CLAIMS.items():
        if claim == "signature":
            judged = _signature(tests, signature)
        else:
            judged = EVIDENCE[claim](lambda name: tables.get(name, _NONE))
        found.append(judged or Judged(claim, text.needs, Estimate.unknown(), "", "not tested"))
    return found


def _signature(tests: Mapping[str, FamilyTest], signature: Estimate | None) -> Judged | None:
    if "families" not in tests or signature is None:
        return None
    rows = tests["families"].table.set_index("statistic")
    accuracy, gap = rows.loc["accuracy"], rows.loc["difference"]
    control = (
        f"family labels shuffled: [{gap['null_low']:.3g}, {gap['null_high']:.3g}], p = {gap['p']:.2g}; "
        f"leave-one-out assigns {accuracy['value']:.3g} of {int(accuracy['n'])} models to their family "
        f"(shuffled {accuracy['null_mean']:.3g}, p = {accuracy['p']:.2g})"
    )
    if "untrained" in tests:
        other = tests["untrained"].table.set_index("statistic").loc["accuracy"]
        control += f"; untrained twins {other['value']:.3g} (p = {other['p']:.2g})"
    found = f"Profiles are {signature} more similar within families than across."
    verdict = by_null(float(gap["p"]))
    if tests["families"].labelings < _FEW_LABELINGS:
        verdict, control = "undecided", f"too few models for a permutation test to decide; {control}"
    return Judged("signature", found, signature, control, verdict)


def claim_table(judged: Sequence[Judged]) -> pd.DataFrame:
    """Return one row per claim.

    Columns `claim`, `verdict`, `found`, `value`, `low`, `high`, `unit`, `n`, `control`, `known_from`,
    `why_a_toy_may_differ`.
    """
    rows = []
    for item in judged:
        claim = CLAIMS[item.claim]
        rows.append(
            {
                "claim": claim.statement,
                "verdict": item.verdict,
                "found": item.found,
                **item.estimate.row(n=None),
                "unit": claim.unit if item.verdict != "not tested" else "",
                "n": item.estimate.n,
                "control": item.control,
                "known_from": claim.known_from,
                "why_a_toy_may_differ": claim.toy,
            }
        )
    return pd.DataFrame(rows)


def as_finding(judged: Judged) -> Finding:
    """Return a judged claim as a finding of the report."""
    claim, number = CLAIMS[judged.claim], judged.estimate
    statement = f"Claimed ({claim.known_from}): {claim.statement} Here: {judged.found}"
    title, control = f"{claim.title}: {judged.verdict}", judged.control or None
    if not np.isfinite(number.value):
        return Finding(title, statement, control=control)
    return Finding.of(title, statement, number, claim.unit, control)


def signature_table(models: pd.DataFrame, similarity: pd.DataFrame | None = None) -> pd.DataFrame:
    """Return what is noted of single families of the paper, and the order of families here.

    The traits are a reader's notes on the full text; "most" and "least" are our reading of them. Where a
    trait comes from a family's data, models of one toy corpus cannot show it; only the order is compared,
    without a test.

    Args:
        models: The table of models, without controls.
        similarity: Of all pairs: a column `model` and one column per model.

    Returns:
        Columns `family`, `noted`, `here` (mean of each family, in order), `order` ("as noted", "otherwise",
        "family is not here").
    """
    rows = []
    for trait in TEXTS["signatures"]:
        family, column = trait["family"], trait["column"]
        if column not in models:
            continue
        means: Any = models.groupby("family")[column].mean()
        means = means.dropna().sort_values(ascending=trait["first"] == "lowest")
        here = ", ".join(f"{name} {value:.3g}" for name, value in means.items())
        order = "family is not here"
        if family in means.index and len(means) > 1:
            order = "as noted" if means.index[0] == family else "otherwise"
        rows.append((family, trait["noted"], here, order))
    if similarity is not None and len(similarity):
        rows.append(("olmo1, olmo2, olmo3", TEXTS["generations"], *_generations(models, similarity)))
    return pd.DataFrame(rows, columns=["family", "noted", "here", "order"])


def _generations(models: pd.DataFrame, similarity: pd.DataFrame) -> tuple[str, str]:
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
    if not ours or not others:
        return "", "family is not here"
    here = f"pairs of generations {np.mean(ours):.3g}, other pairs across families {np.mean(others):.3g}"
    return here, "as noted" if np.mean(ours) > np.mean(others) else "otherwise"
