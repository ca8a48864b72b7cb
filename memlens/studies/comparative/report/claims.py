"""The directional findings of arXiv 2603.21658, as far as they are known, and the rule that judges them here.

The full text is not public to us: each claim says how it is known. A claim is judged by one number that has a
direction, with its 95 % interval; why a toy corpus may differ stands beside every verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from memlens.results.statistics.estimates import Estimate

ABSTRACT = "the abstract"
QUOTED = "quoted by a reader of the full text"
NOTE = "a reader's note on the full text"
PREDECESSOR = "the same authors' earlier code (arXiv 2405.11577), not this paper"

VERDICTS = ("holds", "does not hold", "undecided", "not tested")

RULE = (
    "A number with a direction holds where its 95 % interval lies wholly on the paper's side, does not hold "
    "where it lies wholly on the other, and is undecided else. Over three models or more it is the mean over "
    "models with Student's interval over models (models of one zoo share corpus and sequences, so they are "
    "no independent draws); of one model it is its own, over sequences, and of two the mean of their own. "
    "Where the control is a permutation null, it holds with p of at most 0.05 and does not hold with p of at "
    "least 0.975."
)


@dataclass(frozen=True)
class Claim:
    """A finding of the paper.

    Attributes:
        title: In a few words.
        statement: What is claimed, in our words.
        known_from: How we know it.
        toy: Why models trained on a toy corpus may differ.
    """

    title: str
    statement: str
    known_from: str
    toy: str


@dataclass(frozen=True)
class Judged:
    """What was found about a claim.

    Attributes:
        claim: Key of `CLAIMS`.
        found: One sentence.
        estimate: The number that decides, with its interval.
        unit: Its unit.
        control: What stands beside it.
        verdict: One of `VERDICTS`.
    """

    claim: str
    found: str
    estimate: Estimate
    unit: str
    control: str
    verdict: str


_SIZES = "three sizes within a factor of twenty, each trained to the same small corpus, are a short lever"
_COPIES = "which sequences are memorized is ruled by planted copies, alike in every domain"
_WINDOWS = (
    "a planted sequence fills a training window from its first token, so that a prompt without its beginning "
    "was never seen."
)
_SMALL = "a few layers leave little room between early and late"

CLAIMS: dict[str, Claim] = {
    "size": Claim(
        "Rate and size",
        "Within a family the memorization rate grows log-linearly with size.",
        ABSTRACT,
        f"{_SIZES}; sequences of many copies are recalled by all sizes, so that the rate is bounded above.",
    ),
    "families": Claim(
        "Larger is not always more",
        "Across families a stronger model does not imply a higher rate.",
        f"{QUOTED} (section 4.1)",
        "all families read the same corpus here; there they differ in corpus, copies and training time, too.",
    ),
    "depth": Claim(
        "Depth and size",
        "Memorization depth is a property of the individual model, not a predictable product of scaling.",
        f"{QUOTED} (section 4.1); what depth is there is not known, here it is the right leading run",
        _SIZES,
    ),
    "bipolar": Claim(
        "Two-ended scores",
        "The memorization score is 0 or 1 for most sequences, with little between.",
        NOTE,
        "the toy language is regular: a continuation is right in part without being memorized.",
    ),
    "compressible": Claim(
        "Prompts can be cut",
        "Memorized sequences are still recalled from a part of their prompt.",
        ABSTRACT,
        _WINDOWS,
    ),
    "half": Claim(
        "Half of the prompt",
        "Often half of the prompt or less is enough.",
        NOTE,
        _WINDOWS,
    ),
    "structural": Claim(
        "Structural text first",
        "Structural text (code, mathematics) dominates what is memorized.",
        NOTE,
        f"{_COPIES}; real code is copied far more often than prose.",
    ),
    "structural_size": Claim(
        "Free text with scale",
        "Growing a model adds mainly free text, so the structural share falls with size.",
        NOTE,
        f"{_COPIES}; {_SIZES}.",
    ),
    "domains_shared": Claim(
        "Shared domain pattern",
        "Families memorize the same domains more.",
        ABSTRACT,
        f"{_COPIES}, so that there may be no pattern to share.",
    ),
    "boundary": Claim(
        "Frequency at the boundary",
        "At the first continuation token frequency drops more for unmemorized sequences than for memorized.",
        PREDECESSOR,
        "the boundary stands at a fixed token of a made-up row, and planted sequences were drawn alike.",
    ),
    "frequency_shared": Claim(
        "Shared frequency pattern",
        "Families share how the token frequency of memorized and unmemorized sequences differs.",
        f"{ABSTRACT}; what the pattern is, is not known",
        "all families are scored on one list of sequences of one corpus: much is shared by construction.",
    ),
    "denoising": Claim(
        "Noise is partly removed",
        "Later layers move the residual back to its clean state.",
        ABSTRACT,
        f"{_SMALL}: there are few layers to remove it in, and the last one writes the prediction over it.",
    ),
    "recovery": Claim(
        "Memorized recover less",
        "Memorized sequences regain less similarity after noise than unmemorized ones.",
        f"{QUOTED} (section 4.4), and the abstract",
        "controls are matched in length and token frequency, which may not be so there.",
    ),
    "structural_noise": Claim(
        "Free text is lost first",
        "Under noise the structural share of what is still memorized rises.",
        f"{NOTE}, of Pythia-12B alone",
        "few sequences are left at the largest strength; arithmetic and tables of the toy are brittle.",
    ),
    "burst": Claim(
        "Late burst",
        "The probability of the token rises slowly in early layers and bursts in late ones.",
        f"{QUOTED} (section 4.5)",
        _SMALL,
    ),
    "before_last": Claim(
        "Sure before the end",
        "Memorized tokens pass probability 1/2 before the last layer.",
        NOTE,
        f"{_SMALL}; a planted sequence is learned by heart, which makes it sure.",
    ),
    "in_domain": Claim(
        "Heads of a domain",
        "Inside a domain the important heads overlap strongly.",
        NOTE,
        "a handful of sequences decides each half's set, which makes sets less alike than with thousands.",
    ),
    "universal": Claim(
        "Universal heads",
        "A small set of heads is important in every domain.",
        f"{ABSTRACT}; a reader notes 1 to 5 % of all heads",
        "with twenty to a hundred heads the top fifth is a few heads, which are shared more easily.",
    ),
    "signature": Claim(
        "Depth profiles differ by family",
        "How important heads are spread over depth is a feature of the family.",
        ABSTRACT,
        "families share corpus and recipe here, so only architecture can leave a signature; untrained twins "
        "show how much of it needs no training.",
    ),
}  # fmt: skip


def judge(estimate: Estimate, sign: int, against: float = 0.0) -> str:
    """Return the verdict on a number that the paper has above (`sign` 1) or below (-1) `against`.

    >>> judge(Estimate(0.3, 0.1, 0.5, 10), 1), judge(Estimate(0.3, -0.1, 0.5, 10), 1)
    ('holds', 'undecided')
    >>> judge(Estimate(0.3, 0.1, 0.5, 10), -1)
    'does not hold'
    """
    if not np.isfinite([estimate.low, estimate.high]).all():
        return "undecided"
    low, high = sorted((sign * (estimate.low - against), sign * (estimate.high - against)))
    return "holds" if low > 0 else "does not hold" if high < 0 else "undecided"


def by_null(p_above: float) -> str:
    """Return the verdict of a permutation null, `p_above` the share of it at least as large as what was seen.

    >>> by_null(0.01), by_null(0.4), by_null(0.99)
    ('holds', 'undecided', 'does not hold')
    """
    if not np.isfinite(p_above):
        return "undecided"
    return "holds" if p_above <= 0.05 else "does not hold" if p_above >= 0.975 else "undecided"


def over_models(estimates: Sequence[Estimate]) -> Estimate:
    """Return the mean over models with Student's 95 % interval over them.

    Of one model it is its own; two say nothing of how models differ, so the ends of their own intervals are
    averaged, as if both erred together.

    >>> found = over_models([Estimate(1.0, 0, 2, 5), Estimate(3.0, 2, 4, 5), Estimate(2.0, 1, 3, 5)])
    >>> round(found.value, 2), round(found.low, 2), found.n
    (2.0, -0.48, 3)
    """
    from scipy import stats

    known = [estimate for estimate in estimates if np.isfinite(estimate.value)]
    if not known:
        return Estimate(np.nan, np.nan, np.nan, 0)
    if len(known) < 3:
        n = known[0].n if len(known) == 1 else len(known)
        value, low, high = np.mean([(e.value, e.low, e.high) for e in known], axis=0).tolist()
        return Estimate(value, low, high, n)
    values = np.array([estimate.value for estimate in known])
    half = float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    mean = float(values.mean())
    return Estimate(mean, mean - half, mean + half, len(values))
