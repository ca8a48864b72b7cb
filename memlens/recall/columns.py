"""The columns that scoring adds to the built-in metrics, in groups, and the functions that compute them.

Likelihoods come from the statistics of the one teacher-forced pass, over the continuation's tokens given the
prefix; papers on membership score all tokens of a text: use a prefix of one token for that. Near-verbatim
recall compares the generated continuation with the true one when tokens may shift: M compares position by
position, so one missing token makes everything after it wrong; an edit distance does not.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from types import MappingProxyType
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from rapidfuzz.distance import LCSseq, Levenshtein
from torch import Tensor

from memlens.errors import OptionError
from memlens.forward.metrics import BUILT_IN, METRICS, Direction, TargetStats


@dataclass(frozen=True)
class Column:
    """A column of the recall table.

    Attributes:
        group: Which of `METRIC_GROUPS` it belongs to; empty if it is always computed.
        unit: Its unit.
        meaning: What it is, in one line.
        better: Whether a higher or a lower value means better recall; None if neither does.
        summarized: Whether a mean over sequences is meaningful.
        proportion: Whether it is 0 or 1, so that its mean is a share of sequences.
        cites: Pairs of a reference's key and what it is cited for.
    """

    group: str
    unit: str
    meaning: str
    better: Direction | None = None
    summarized: bool = True
    proportion: bool = False
    cites: tuple[tuple[str, str], ...] = ()


# fmt: off
COLUMNS: Mapping[str, Column] = MappingProxyType({
    "near_tie": Column(
        "", "0 or 1", "whether the margin is too small to decide the exact match", proportion=True),
    "memorization_score": Column(
        "", "share of tokens", "share of positions at which the greedy continuation equals the true one",
        "higher", cites=(("chen2026", "memorization score M"),)),
    "nll": Column("likelihood", "nats", "negative log-probability of the whole continuation", "lower"),
    "perplexity": Column("likelihood", "1", "exp of the mean negative log-probability", "lower"),
    "min_k": Column(
        "likelihood", "nats", "mean log-probability of the least likely targets", "higher",
        cites=(("shi2024", "Min-K %"),)),
    "min_k_plus_plus": Column(
        "likelihood", "1", "mean of the lowest log-probabilities, standardized over the vocabulary", "higher",
        cites=(("zhang2024", "Min-K %++"),)),
    "zlib_ratio": Column(
        "likelihood", "nats per byte", "mean NLL of targets over the zlib size of the whole text", "lower",
        cites=(("carlini2021", "ratio to the size compressed by zlib"),)),
    "nll_per_zlib_byte": Column(
        "likelihood", "nats per byte", "NLL of the continuation over the zlib size of its text", "lower"),
    "truth_ratio": Column(
        "likelihood", "1", "likelihood per token of wrong continuations over that of the true one", "lower"),
    "sample_logprob": Column(
        "sampling", "nats", "log-probability that one sample is the whole continuation", "higher"),
    "samples_needed": Column(
        "sampling", "samples", "fewest samples that contain it with probability p", "lower",
        summarized=False),
    "np_discoverable": Column(
        "sampling", "0 or 1", "whether n samples contain it with probability p", "higher", proportion=True,
        cites=(("hayes2025", "(n, p)-discoverable extraction"),)),
    "extraction_strength": Column(
        "near_verbatim", "share", "1 - share of the continuation that must be given for the rest to follow",
        "higher"),
    "rouge_l": Column(
        "near_verbatim", "share", "words of the true continuation, in order, in the generated one", "higher"),
    "edit_distance": Column(
        "near_verbatim", "tokens", "Levenshtein distance between generated and true continuation", "lower"),
    "edit_similarity": Column("near_verbatim", "share", "1 - edit distance over the longer length", "higher"),
    "edit_distance_characters": Column(
        "near_verbatim", "characters", "the same distance between both texts", "lower"),
    "edit_similarity_characters": Column(
        "near_verbatim", "share", "1 - that distance over the longer text", "higher"),
    "longest_run": Column("near_verbatim", "tokens", "longest run of tokens in both", "higher"),
    "longest_run_at": Column(
        "near_verbatim", "position", "where it begins in the true continuation", summarized=False),
    "longest_run_generated_at": Column(
        "near_verbatim", "position", "where it begins in the generated tokens", summarized=False),
    "copied_share": Column("trivial", "share", "longest run of the continuation found in the prefix"),
    "type_token_ratio": Column("trivial", "share", "distinct tokens over tokens of the continuation"),
    "repeated_share": Column("trivial", "share", "tokens that repeat with the best period"),
    "step_share": Column("trivial", "share", "tokens or words that continue in constant steps"),
    "trivial": Column(
        "trivial", "0 or 1", "one of the four rules explains the continuation", proportion=True),
    "prefix_rouge_l": Column("taxonomy", "share", "tokens of the continuation, in order, in the prefix"),
    "prefix_rouge_3": Column("taxonomy", "share", "runs of three tokens of the continuation in the prefix"),
    "guessed": Column(
        "taxonomy", "0 or 1", "memorized, and a rule explains it from the prefix", proportion=True,
        cites=(("dentan2025", "guess or recall"),)),
    "recollected": Column(
        "taxonomy", "0 or 1", "memorized, and no rule explains it from the prefix", proportion=True,
        cites=(("dentan2025", "guess or recall"),)),
})
# fmt: on
"""By name, in the order of the table."""

MetricGroup = Literal["likelihood", "sampling", "near_verbatim", "trivial", "taxonomy"]
METRIC_GROUPS: tuple[MetricGroup, ...] = get_args(MetricGroup)

SCORE_COLUMNS = (*BUILT_IN, *COLUMNS, "generated", "generated_text")
"""The columns that scoring adds to a set's table."""

LABELS: Mapping[str, dict[str, Any]] = MappingProxyType(
    {
        **{name: METRICS[name].attrs for name in BUILT_IN},
        **{
            name: {"units": c.unit, "long_name": c.meaning, **({"better": c.better} if c.better else {})}
            for name, c in COLUMNS.items()
        },
    }
)
"""Unit, meaning and direction of each number, as attributes of an array."""


def sequence_coords(table: pd.DataFrame) -> dict[str, Any]:
    """Return the ids and the columns used for grouping as coordinates of the dimension `sequence`."""
    coords: dict[str, Any] = {"sequence": table["id"].to_numpy(dtype=object)}
    for name in ("domain", "copies", "source"):
        if name in table:
            values, numeric = table[name], pd.api.types.is_numeric_dtype(table[name])
            coords[name] = ("sequence", values.to_numpy() if numeric else values.astype(str).to_numpy(object))
    return coords


def nll(stats: TargetStats) -> Float[Tensor, "seq"]:
    r"""Return the negative log-likelihood of each continuation, in nats.

    .. math:: \mathrm{NLL} = -\sum_j \log p(y_j \mid \text{prefix}, y_{<j})

    A sum over the targets, so it grows with their number; ``exp(-nll)`` is the probability that one sample
    from the model's own distribution is the continuation.
    """
    return -torch.where(stats.mask, stats.logprob, 0).sum(-1)


def perplexity(stats: TargetStats) -> Float[Tensor, "seq"]:
    """Return ``exp(nll / n)`` for n target tokens: no unit, 1 for a continuation that is certain."""
    return (nll(stats) / stats.mask.sum(-1)).exp()


def min_k(stats: TargetStats, share: float = 0.2) -> Float[Tensor, "seq"]:
    """Return Min-K %: the mean log-probability (nats) of the least likely tokens; higher is more likely seen.

    The ``max(1, floor(share * n))`` targets with the lowest log-probability, of n.

    Args:
        stats: What `target_stats` returned.
        share: k as a share of the targets, in (0, 1]; with 1 it is the mean log-probability.

    Raises:
        OptionError: A share outside (0, 1].

    Source: arXiv 2310.16789 (Min-K% Prob), there over all tokens of a text. The rounding is ours.
    """
    return _mean_of_lowest(stats.logprob, stats.mask, share)


def min_k_plus_plus(stats: TargetStats, share: float = 0.2) -> Float[Tensor, "seq"]:
    r"""Return Min-K %++: the mean of the lowest standardized log-probabilities; no unit.

    .. math:: z_j = \frac{\log p(y_j) - \mu_j}{\sigma_j}, \quad
        \mu_j = \sum_v p_j(v) \log p_j(v), \quad
        \sigma_j^2 = \sum_v p_j(v) (\log p_j(v) - \mu_j)^2

    with sums over the whole vocabulary: how much likelier the token is than one drawn from the model. z is 0
    for a distribution without spread.

    Args:
        stats: What `target_stats` returned.
        share: As for `min_k`.

    Raises:
        OptionError: A share outside (0, 1].

    Source: arXiv 2404.02936 (Min-K%++), there over all tokens of a text. The rounding is ours.
    """
    gap = stats.logprob + stats.entropy
    z = torch.where(stats.spread > 0, gap / stats.spread.clamp_min(1e-30), 0)
    return _mean_of_lowest(z, stats.mask, share)


def zlib_bytes(texts: Sequence[str]) -> Float[Tensor, "seq"]:
    """Return the number of bytes of each text in UTF-8, compressed by zlib (level 6).

    >>> zlib_bytes(["", "aaaaaaaaaaaaaaaaaaaaaaaa"]).tolist()
    [8.0, 11.0]
    """
    sizes = [len(zlib.compress(text.encode("utf-8", "replace"), 6)) for text in texts]
    return torch.tensor(sizes, dtype=torch.float64)


def zlib_ratio(stats: TargetStats, texts: Sequence[str]) -> Float[Tensor, "seq"]:
    """Return the mean NLL of the targets / `zlib_bytes` of the whole texts, in nats per byte.

    Args:
        stats: What `target_stats` returned.
        texts: Prefix and continuation together, as text.

    Source: arXiv 2012.07805 (its "zlib" attack), there with the mean over all tokens of a text: give a prefix
    of one token for that.
    """
    return nll(stats) / stats.mask.sum(-1) / zlib_bytes(texts)


def nll_per_zlib_byte(stats: TargetStats, texts: Sequence[str]) -> Float[Tensor, "seq"]:
    """Return NLL / `zlib_bytes`, in nats per byte: low if the model predicts more than a compressor can.

    Args:
        stats: What `target_stats` returned.
        texts: The continuations as text.

    Source: ours, after `zlib_ratio`: a sum over a sum, so that it does not depend on the prefix.
    """
    return nll(stats) / zlib_bytes(texts)


def extraction_strength(stats: TargetStats) -> Float[Tensor, "seq"]:
    r"""Return the extraction strength: 1 if the prefix is enough, 0 if the last token is never predicted.

    .. math:: 1 - \frac{1}{n} \min \{ k : \text{greedy decoding from the prefix and } y_{<k}
              \text{ gives } y_{\ge k} \}

    for a continuation of n tokens, with k = n where its last token is wrong. Greedy decoding gives the rest
    if and only if the arg-max is right at every place from k on, given the true tokens before.

    Args:
        stats: What `target_stats` returned.

    Source: the metric of that name in open-unlearning (arXiv 2506.12618), which gives 1 / n rather than 0
    where no k is enough.
    """
    n = stats.mask.shape[1]
    wrong = stats.mask & ~stats.correct
    needed = torch.where(wrong, torch.arange(1, n + 1), 0).amax(-1)  # up to the last error
    return 1 - needed.double() / stats.mask.sum(-1)


_WORDS = re.compile(r"[a-z0-9]+")


def rouge_l(generated: Sequence[str], truth: Sequence[str]) -> Float[np.ndarray, "seq"]:
    """Return ROUGE-L recall: the longest common subsequence of words over the words of the true text.

    Words are runs of Latin letters and digits in lower case, without stemming, as in the package
    rouge-score. NaN where the true text has no word.

    >>> rouge_l(["The cat, it sat."], ["a cat sat down"]).tolist()
    [0.5]

    Source: Lin, 2004 (ROUGE: A Package for Automatic Evaluation of Summaries).
    """
    pairs = [
        (_WORDS.findall(a.lower()), _WORDS.findall(b.lower())) for a, b in zip(generated, truth, strict=True)
    ]
    return np.array([LCSseq.similarity(a, b) / len(b) if b else np.nan for a, b in pairs])


def near_verbatim_texts(generated: Sequence[str], truth: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the columns that compare texts: edit distance in characters, its similarity, and `rouge_l`.

    >>> near_verbatim_texts(["kitten"], ["sitting"])["edit_distance_characters"].tolist()
    [3]
    """
    pairs = list(zip(generated, truth, strict=True))
    distance = np.array([Levenshtein.distance(a, b) for a, b in pairs], dtype=np.int64)
    longest = np.array([max(len(a), len(b), 1) for a, b in pairs])
    return {
        "rouge_l": rouge_l(generated, truth),
        "edit_distance_characters": distance,
        "edit_similarity_characters": 1 - distance / longest,
    }


def _mean_of_lowest(values: Tensor, mask: Tensor, share: float) -> Tensor:
    if not 0 < share <= 1:
        raise OptionError(f"min_k={share} is not in (0, 1]: give a share of the targets, such as 0.2")
    ordered = torch.where(mask, values, torch.inf).sort(-1).values
    # Guards against 0.29 * 100 = 28.999…
    count = (share * mask.sum(-1).double() + 1e-9).floor().clamp_min(1)
    lowest = torch.arange(mask.shape[1]) < count[:, None]
    return torch.where(lowest, ordered, 0).sum(-1) / count


def near_verbatim_columns(
    generated: Sequence[Sequence[int]], truth: Sequence[Sequence[int]]
) -> dict[str, np.ndarray]:
    """Return how close each generated continuation is to the true one, one array per column.

    - `edit_distance` (tokens): the fewest insertions, deletions and substitutions that turn one into the
      other (Levenshtein).
    - `edit_similarity` (share): ``1 - edit_distance / max(len(generated), len(truth))``.
    - `longest_run` (tokens): the longest run of tokens that occurs in both, at any position.
    - `longest_run_at`, `longest_run_generated_at`: where its first occurrence begins in the true continuation
      (counted from its first token) and in the generated one; -1 if there is none.

    Source: standard definitions on tokens; the choice of these for near-verbatim recall is ours.

    >>> columns = near_verbatim_columns([[1, 2, 3, 4]], [[9, 1, 2, 3]])
    >>> {name: value.tolist() for name, value in columns.items() if name != "edit_similarity"}
    {'edit_distance': [2], 'longest_run': [3], 'longest_run_at': [1], 'longest_run_generated_at': [0]}
    """
    pairs = list(zip(generated, truth, strict=True))
    distance = np.array([Levenshtein.distance(a, b) for a, b in pairs], dtype=np.int64)
    longest = np.array([max(len(a), len(b), 1) for a, b in pairs])
    length, start, generated_start = longest_common_runs(truth, generated)
    return {
        "edit_distance": distance,
        "edit_similarity": 1 - distance / longest,
        "longest_run": length,
        "longest_run_at": start,
        "longest_run_generated_at": generated_start,
    }


def longest_common_runs(
    first: Sequence[Sequence[int]], second: Sequence[Sequence[int]]
) -> tuple[Int[np.ndarray, "pair"], Int[np.ndarray, "pair"], Int[np.ndarray, "pair"]]:
    """Return the longest run that both of each pair contain: its length, and where it begins in each.

    Of several longest runs it is the one that begins first in `first`, then first in `second`. Starts are -1
    if the two have no token in common.

    >>> [a.tolist() for a in longest_common_runs([[1, 2, 3]], [[7, 2, 3, 2]])]
    [[2], [1], [1]]
    """
    matches = [
        SequenceMatcher(None, a, b, autojunk=False).find_longest_match()
        for a, b in zip(first, second, strict=True)
    ]
    found = [(m.size, m.a, m.b) if m.size else (0, -1, -1) for m in matches]
    lengths, starts, other_starts = np.array(found, dtype=np.int64).reshape(-1, 3).T
    return lengths, starts, other_starts
