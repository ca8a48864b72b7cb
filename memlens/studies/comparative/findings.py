"""Findings: the paper's claims, each judged by one number of the study's tables.

The claims, their words and what each is judged from are in `texts.yaml`. A claim is judged by a number with a
direction and its 95 % interval, or by a permutation null.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
import yaml

from memlens.report.model import Finding
from memlens.results.statistics.estimates import Estimate
from memlens.results.statistics.intervals import mean_interval
from memlens.studies.comparative.analyze.domains import domain_agreement
from memlens.studies.comparative.analyze.frequency import BUCKETS
from memlens.studies.comparative.analyze.profiles import FamilyTest
from memlens.studies.comparative.analyze.rates import smaller_beats_larger
from memlens.studies.comparative.options import MEMORIZED, UNTRAINED

TEXTS: dict[str, Any] = yaml.safe_load(
    resources.files("memlens.studies.comparative").joinpath("texts.yaml").read_text(encoding="utf-8")
)

VERDICTS = ("holds", "does not hold", "undecided", "not tested")

_FEW_LABELINGS = 20
"""With fewer ways to label the models no p can be 0.05."""


@dataclass(frozen=True)
class Claim:
    """A finding of the paper.

    Attributes:
        title: In a few words.
        statement: What is claimed, in our words.
        known_from: How we know it.
        toy: Why models trained on a toy corpus may differ.
        unit: Of the number that judges it.
        table: The table that holds the number.
        rule: How it is judged: the name of one of `RULES`.
        column: The number's column ("overlap": the statistic).
        prefix: Of the columns `low` and `high` of its interval.
        n: Column of its count.
        sign: The side of `against` on which the paper has the number: 1 above, -1 below, 0 unknown.
        against: What it is compared with.
        needs: What it is judged from.
        found: Begins the sentence that says what was found.
        control: What the number is compared with, in words.
    """

    title: str
    statement: str
    known_from: str
    toy: str
    unit: str
    table: str
    rule: str = "pooled"
    column: str = ""
    prefix: str = ""
    n: str = "n"
    sign: int = 1
    against: float = 0.0
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
        over: What the number's `n` counts.
    """

    claim: str
    found: str
    estimate: Estimate
    control: str
    verdict: str
    over: str = "sequences"


# ---- rules -----------------------------------------------------------------------------------------------


def judge(estimate: Estimate, sign: int, against: float = 0.0) -> str:
    """Return the verdict on a number that the paper has above (`sign` 1) or below (-1) `against`.

    >>> judge(Estimate(0.3, 0.1, 0.5, 10), 1), judge(Estimate(0.3, -0.1, 0.5, 10), 1)
    ('holds', 'undecided')
    >>> judge(Estimate(0.3, 0.1, 0.5, 10), -1)
    'does not hold'
    """
    if not sign or not estimate.excludes(against):
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

    One model keeps its own interval, which is over its sequences. Two models say nothing about how models
    differ: there is no interval.

    >>> found = over_models([Estimate(1.0, 0, 2, 5), Estimate(3.0, 2, 4, 5), Estimate(2.0, 1, 3, 5)])
    >>> round(found.value, 2), round(found.low, 2), found.n
    (2.0, -0.48, 3)
    """
    if len(estimates) == 1:
        return estimates[0]
    values = xr.DataArray([estimate.value for estimate in estimates], dims="model")
    return Estimate.of(mean_interval(values, "model", method="t"))


def _estimates(claim: Claim, table: Any) -> list[Estimate]:
    """Return one estimate per row; rows without a number are left out."""
    rows = table[np.isfinite(table[claim.column])].to_dict("records")
    n = claim.n if claim.n in table else None
    return [Estimate.from_row(row, claim.column, prefix=claim.prefix, n=n) for row in rows]


Evidence = tuple[str, Estimate, str, str, str]
"""The sentence, the number, the control, the verdict of a `Judged` claim, and what its n counts."""


def _pooled(claim: Claim, table: Any) -> Evidence | None:
    """Judge the mean of a column over models; None where no model has the number.

    With several strengths of noise the strongest counts. With several groups, memorized sequences are judged,
    and the other groups' numbers are the control; what untrained twins do as well is not shown to hold of
    trained models, and is undecided.
    """
    if "alpha" in table:
        table = table[table["alpha"] == table["alpha"].max()]
    control, twin = [], None
    if "group" in table:
        for group, part in table[table["group"] != MEMORIZED].groupby("group", sort=False):
            if others := _estimates(claim, part):
                control.append(f"{group} {over_models(others)}")
            if others and group == UNTRAINED:
                twin = over_models(others)
        table = table[table["group"] == MEMORIZED]
    own = _estimates(claim, table)
    if not own:
        return None
    mean, verdicts = over_models(own), [judge(estimate, claim.sign, claim.against) for estimate in own]
    over = "one model"
    if len(own) > 1:
        over = (
            f"mean over {len(own)} models; by a model's own interval it holds in {verdicts.count('holds')} "
            f"and does not hold in {verdicts.count('does not hold')}"
        )
    sentence, verdict = f"{claim.found} is {mean} ({over}).", judge(mean, claim.sign, claim.against)
    if verdict == "holds" and twin is not None and not claim.sign * (mean.low - twin.high) > 0:
        sentence += " Untrained twins, the strictest control, are not clearly different."
        verdict = "undecided"
    counted = "models" if len(own) > 1 else "sequences"
    return sentence, mean, claim.control + "; ".join(control), verdict, counted


def _overlap(claim: Claim, table: Any) -> Evidence | None:
    """Judge an overlap of heads by the strictest of its nulls: what random sets of heads give.

    Against heads drawn anywhere, the overlap minus the exact expectation is judged by its interval. Against
    heads shuffled inside their layers each model has a permutation test, and more than half of the models
    have to agree. The number is the overlap above the null that says least for the claim.
    """
    found: dict[str, tuple[str, float, Evidence]] = {}
    controls = []
    for null, part in table[table["statistic"] == claim.column].groupby("null", sort=False):
        chance = part["exact"].where(np.isfinite(part["exact"]), part["null_mean"])
        above = pd.DataFrame({name: part[name] - chance for name in ("value", "low", "high")})
        judged = _pooled(replace(claim, column="value", control=""), above)
        if judged is None:
            continue
        verdict = judged[3]
        if not np.isfinite(part["exact"]).all():
            verdict = _by_most([by_null(p) for p in part["p_above"]])
        found[str(null)] = verdict, float(chance.mean()), judged
        clear = np.count_nonzero(part["p_above"] <= 0.05)
        controls.append(
            f"{null} give {chance.mean():.3g}, and {clear} of {len(part)} models are significantly above that"
        )
    if not found:
        return None
    name = min(found, key=lambda null: (_STRICT.index(found[null][0]), -found[null][1]))
    verdict, chance, (sentence, number, *_, counted) = found[name]
    sentence = f"{sentence} The strictest null is that of random {name} ({chance:.3g})."
    control = f"it is {number.value + chance:.3g}; random {'; '.join(controls)}"
    return sentence, number, control, verdict, counted


_STRICT = ("does not hold", "undecided", "holds")


def _by_most(verdicts: Sequence[str]) -> str:
    """Return the verdict of more than half of the models.

    >>> _by_most(["holds", "undecided", "holds"]), _by_most(["holds", "undecided"])
    ('holds', 'undecided')
    """
    return next((v for v in _STRICT if 2 * verdicts.count(v) > len(verdicts)), "undecided")


def _fitted(claim: Claim, fits: Any) -> Evidence:
    """Judge the slope on size that all families share, or one family's."""
    joint = fits[fits["family"] == "all families"]
    row = (joint if len(joint) else fits).iloc[0]
    slope = Estimate.from_row(row, "slope", prefix="" if np.isfinite(row["low"]) else "boot_", n="sizes")
    others = "; ".join(
        f"{other['family']}, {other['reading']}: {Estimate.from_row(other, 'slope', n='sizes')}, "
        f"R² {other['r2']:.2g}"
        for other in fits.drop(index=row.name).to_dict("records")
    )
    found = (
        f"{claim.found} changes by {slope} with every factor 10 in parameters ({row['family']}, "
        f"{slope.n} sizes, R² {row['r2']:.2g})."
    )
    return found, slope, claim.control + others, judge(slope, claim.sign), "sizes"


def _smaller(claim: Claim, rates: Any) -> Evidence | None:
    """Judge in how many pairs of two families the smaller model recalls more."""
    pairs = smaller_beats_larger(rates)
    if not len(pairs):
        return None
    clear = int(np.count_nonzero(pairs["p_corrected"] < 0.05))
    means = rates.groupby("family")["rate"].mean()
    return (
        f"In {clear} of {len(pairs)} pairs of two families the smaller model recalls significantly more "
        "(one-sided tests, corrected for all pairs).",
        Estimate(clear / len(pairs), n=len(pairs)),
        "mean rate by family: " + ", ".join(f"{family} {rate:.3g}" for family, rate in means.items()),
        "holds" if clear else "undecided",
        "pairs of models",
    )


def _domains(claim: Claim, table: Any) -> Evidence | None:
    rates = table.pivot_table(index="family", columns="domain", values="rate").dropna(axis=1)
    return _agreed(claim, rates.to_numpy())


def _offsets(claim: Claim, table: Any) -> Evidence | None:
    wide = table.pivot_table(index=["family", "offset"], columns="bucket", values="mean")
    if BUCKETS[0] not in wide or BUCKETS[2] not in wide:
        return None
    gaps = (wide[BUCKETS[0]] - wide[BUCKETS[2]]).unstack("offset").dropna()
    return _agreed(claim, gaps.to_numpy())


def _agreed(claim: Claim, values: np.ndarray) -> Evidence | None:
    """Judge the mean rank correlation of families; `values` is `[family, domain or position]`."""
    found = domain_agreement(values)
    if not np.isfinite(found["value"]):
        return None
    n, p = int(found["n"]), found["p_above"]
    null = f"shuffled: [{found['null_low']:.3g}, {found['null_high']:.3g}], p = {p:.2g}"
    sentence = f"{claim.found} is {found['value']:.3g} (mean, all pairs of {n} families)."
    return sentence, Estimate(found["value"], n=n), f"{claim.control} {null}", by_null(p), "families"


RULES: Mapping[str, Callable[[Claim, pd.DataFrame], Evidence | None]] = {
    "pooled": _pooled, "overlap": _overlap, "fitted": _fitted, "smaller": _smaller, "domains": _domains,
    "offsets": _offsets,
}  # fmt: skip
"""Judge a claim by its table; None where that holds nothing for it. "signature" is judged by its tests."""


def judge_all(
    tables: Mapping[str, pd.DataFrame], tests: Mapping[str, FamilyTest], signature: Estimate | None
) -> list[Judged]:
    """Judge every claim; a claim without measurements is "not tested".

    Args:
        tables: The study's tables by name, without control models.
        tests: "families", and "untrained" for the twins of random weights, where there are such tests.
        signature: Similarity within families minus across, with its interval over sequences.
    """
    judged = []
    for name, claim in CLAIMS.items():
        found = _signature(tests, signature) if claim.rule == "signature" else None
        if claim.rule in RULES and len(table := tables.get(claim.table, pd.DataFrame())):
            found = RULES[claim.rule](claim, table)
        evidence: Evidence = found or (claim.needs, Estimate.unknown(), "", "not tested", "sequences")
        judged.append(Judged(name, *evidence))
    return judged


def _signature(tests: Mapping[str, FamilyTest], signature: Estimate | None) -> Evidence | None:
    if "families" not in tests or signature is None:
        return None
    rows = tests["families"].table.set_index("statistic")
    accuracy, gap = rows.loc["accuracy"], rows.loc["difference"]
    n = int(accuracy["n"])
    control = (
        f"family labels shuffled: [{gap['null_low']:.3g}, {gap['null_high']:.3g}], p = {gap['p']:.2g}; "
        f"leave-one-out assigns {accuracy['value'] * n:.0f} of {n} models to their family "
        f"(shuffled {accuracy['null_mean'] * n:.3g} on average, p = {accuracy['p']:.2g})"
    )
    found = f"Profiles are {signature} more similar within families than across."
    verdicts = {
        "shuffled family labels (similarity)": by_null(float(gap["p"])),
        "shuffled family labels (leave-one-out)": by_null(float(accuracy["p"])),
    }
    if "untrained" in tests:
        other = tests["untrained"].table.set_index("statistic").loc["accuracy"]
        control += f"; untrained twins {other['value']:.3g} (p = {other['p']:.2g})"
        better = accuracy["value"] > other["value"] or by_null(float(other["p"])) != "holds"
        verdicts["untrained twins"] = "holds" if better else "undecided"
    if tests["families"].labelings < _FEW_LABELINGS:
        few = "too few models for a permutation test to decide"
        return found, signature, f"{few}; {control}", "undecided", "sequences"
    strictest = min(verdicts, key=lambda null: _STRICT.index(verdicts[null]))
    return f"{found} The strictest null: {strictest}.", signature, control, verdicts[strictest], "sequences"


def claim_table(judged: Sequence[Judged]) -> pd.DataFrame:
    """Return one row per claim.

    Columns `claim`, `verdict`, `found`, `value`, `low`, `high`, `unit`, `n`, `control`, `known_from`,
    `why_a_toy_may_differ`.
    """
    rows = []
    for item in judged:
        claim, unit = CLAIMS[item.claim], CLAIMS[item.claim].unit if item.verdict != "not tested" else ""
        found = {"claim": claim.statement, "verdict": item.verdict, "found": item.found}
        number = {**item.estimate.row(n=None), "unit": unit, "n": item.estimate.n, "control": item.control}
        known = {"known_from": claim.known_from, "why_a_toy_may_differ": claim.toy}
        rows.append({**found, **number, **known})
    return pd.DataFrame(rows)


def as_finding(judged: Judged) -> Finding:
    """Return a judged claim as a finding of the report."""
    claim, number = CLAIMS[judged.claim], judged.estimate
    statement = f"Claimed ({claim.known_from}): {claim.statement} Here: {judged.found}"
    title, control = f"{claim.title}: {judged.verdict}", judged.control or None
    if not np.isfinite(number.value):
        return Finding(title, statement, control=control)
    return Finding.of(title, statement, number, claim.unit, control, over=judged.over)


_VERBS = {
    "holds": ("holds", "hold"),
    "does not hold": ("does not", "do not"),
    "undecided": ("is undecided", "are undecided"),
}


def in_sentences(judged: Sequence[Judged]) -> dict[str, str]:
    """Return in one sentence each what was found over all claims, how sure that is, and the comparison.

    Where no claim could be tested, that is all that is said.
    """
    counts = {verdict: sum(item.verdict == verdict for item in judged) for verdict in VERDICTS}
    if counts["not tested"] == len(judged):
        return {}
    said = [f"{counts[verdict]} {verbs[counts[verdict] != 1]}" for verdict, verbs in _VERBS.items()]
    verdicts = f"{', '.join(said[:-1])} and {said[-1]}"
    values = {"all": len(judged), "tested": len(judged) - counts["not tested"], "verdicts": verdicts}
    return {name: text.format(**values) for name, text in TEXTS["judged"].items()}


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
        known = family in means.index and len(means) > 1
        rows.append((family, trait["noted"], here, means.index[0] == family if known else None))
    if similarity is not None and len(similarity):
        rows.append(("olmo1, olmo2, olmo3", TEXTS["generations"], *_generations(models, similarity)))
    frame = pd.DataFrame(rows, columns=["family", "noted", "here", "order"])
    words = {True: "as noted", False: "otherwise", None: "family is not here"}
    return frame.assign(order=[words[row[-1]] for row in rows])


def _generations(models: Any, similarity: Any) -> tuple[str, bool | None]:
    """Compare pairs of two generations of OLMo with the other pairs of two families."""
    families = models.set_index("model")["family"]
    pairs = similarity.melt("model", var_name="other")
    pairs = pairs[pairs[["model", "other"]].isin(families.index).all(axis=1)]
    one, two = (pairs[name].map(families) for name in ("model", "other"))
    olmo = one.str.startswith("olmo") & two.str.startswith("olmo")
    ours, others = (float(pairs["value"][(one != two) & chosen].mean()) for chosen in (olmo, ~olmo))
    if not np.isfinite(ours - others):
        return "", None
    return f"pairs of generations {ours:.3g}, other pairs across families {others:.3g}", ours > others
