"""Guess or recall: what is memorized and follows from its prefix by rule, and what is memorized and does not.

A continuation that repeats, counts, or overlaps with its prefix can be guessed by a model that never saw it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np
import pandas as pd
from jaxtyping import Float
from pydantic import NonNegativeInt
from rapidfuzz.distance import LCSseq

from memlens.errors import OptionError
from memlens.options import options_class
from memlens.recall.trivial import Share

CLASSES = ("not memorized", "guess", "recall", "few copies")
"""What `recall_classes` returns, the last only with `above`."""


@options_class
class TaxonomyRules:
    """When a memorized continuation counts as a guess: if any of the four shares reaches its threshold.

    Raises:
        OptionError: A share outside [0, 1].

    Example:
        >>> import memlens as ml
        >>> ml.recall.TaxonomyRules(rouge_l=0.6).rouge_l
        0.6
    """

    rouge_l: Share = 0.5
    """Least `prefix_rouge_l`."""
    rouge_3: Share = 0.5
    """Least `prefix_rouge_3`."""
    repeated: Share = 0.75
    """Least `repeated_share`."""
    step: Share = 0.75
    """Least `step_share`."""

    def settings(self) -> dict[str, float]:
        """Return the thresholds under the names that results record."""
        return {f"guess_{name}": value for name, value in asdict(self).items()}


def prefix_overlap(
    prefixes: Sequence[Sequence[int]], truth: Sequence[Sequence[int]]
) -> dict[str, Float[np.ndarray, "seq"]]:
    """Return how much of each continuation its prefix holds already, as ROUGE recall on tokens.

    - `prefix_rouge_l`: their longest common subsequence over the tokens of the continuation.
    - `prefix_rouge_3`: runs of three tokens of the continuation that the prefix has too (each as often as it
      occurs there, at most) over all of its runs of three; NaN for a continuation of fewer than three tokens.

    >>> found = prefix_overlap([[1, 2, 3, 9]], [[1, 2, 3, 4]])
    >>> found["prefix_rouge_l"].tolist(), found["prefix_rouge_3"].tolist()
    ([0.75], [0.5])
    """
    pairs = list(zip(prefixes, truth, strict=True))
    longest = [LCSseq.similarity(a, b) / len(b) for a, b in pairs]
    runs = [(_runs(a), _runs(b)) for a, b in pairs]
    shared = [(a & b).total() / b.total() if b else np.nan for a, b in runs]
    return {"prefix_rouge_l": np.array(longest), "prefix_rouge_3": np.array(shared)}


def _runs(row: Sequence[int], n: int = 3) -> Counter[tuple[int, ...]]:
    return Counter(tuple(row[i : i + n]) for i in range(len(row) - n + 1))


def taxonomy_columns(
    memorized: np.ndarray,
    overlap: Mapping[str, np.ndarray],
    trivial: Mapping[str, np.ndarray],
    rules: TaxonomyRules,
) -> dict[str, np.ndarray]:
    """Return the columns of the group `taxonomy`.

    - `guessed`: 1 if the continuation is memorized (an exact match) and repeats, counts or overlaps with its
      prefix by one of the rules;
    - `recollected`: 1 if it is memorized and follows none of them.

    Args:
        memorized: 1 for exact matches.
        overlap: What `prefix_overlap` returned.
        trivial: The columns `repeated_share` and `step_share`.
        rules: The thresholds.

    Source: arXiv 2508.02573 (released code: repetition, increments, and ROUGE-L or ROUGE-3 of prefix to
    continuation from 0.5 to 0.6 make a guess of what is memorized); ROUGE on tokens and the definition of
    repetition and steps are ours.
    """
    explained = (
        (overlap["prefix_rouge_l"] >= rules.rouge_l)
        | (overlap["prefix_rouge_3"] >= rules.rouge_3)  # False for NaN
        | (trivial["repeated_share"] >= rules.repeated)
        | (trivial["step_share"] >= rules.step)
    )
    hit = memorized == 1
    flags = {"guessed": hit & explained, "recollected": hit & ~explained}
    return {**overlap, **{name: flag.astype(np.int64) for name, flag in flags.items()}}


def recall_classes(table: pd.DataFrame, *, above: NonNegativeInt | None = None) -> pd.Series:
    """Return each sequence's class: "not memorized", "guess" or "recall".

    Args:
        table: A table of `score_recall` with the columns of the group `taxonomy`.
        above: Recall takes more copies than this (5, 50 and 1,000 in arXiv 2508.02573); memorized sequences
            with as many or fewer, which no rule explains, are then "few copies".

    Raises:
        OptionError: The table lacks a column.

    >>> table = pd.DataFrame({"guessed": [0, 1, 0], "recollected": [0, 0, 1], "copies": [1, 9, 9]})
    >>> recall_classes(table).tolist(), recall_classes(table, above=50).tolist()
    (['not memorized', 'guess', 'recall'], ['not memorized', 'guess', 'few copies'])
    """
    wanted = ["guessed", "recollected", *(["copies"] if above is not None else [])]
    for name in wanted:
        if name not in table:
            raise OptionError(
                f"the table has no column {name!r}: score with metrics that include 'taxonomy'."
            )
    found = np.select(
        [table["guessed"] == 1, table["recollected"] == 1], [CLASSES[1], CLASSES[2]], CLASSES[0]
    )
    if above is not None:
        found = np.where((found == CLASSES[2]) & (table["copies"] <= above), CLASSES[3], found)
    return pd.Series(found, index=table.index, name="recall_class")
