"""The truth ratio: how likely wrong continuations are, compared with the true one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from memlens.errors import SequenceError
from memlens.forward.baseline import teacher_forced_stats
from memlens.forward.metrics import TargetStats
from memlens.recall.columns import perplexity
from memlens.sequences.set import SequenceSet
from memlens.sequences.tokenizing import encode

ALTERNATIVES = "alternatives"
"""The column of a set's table with wrong continuations, a list of texts or of lists of ids per sequence."""


def truth_ratio(
    model: Any,
    seqs: SequenceSet,
    stats: TargetStats,
    *,
    batch_size: int | None = None,
    banned: int | None = None,
) -> Float[np.ndarray, "seq"]:
    r"""Return the truth ratio of each sequence; NaN where it has no alternatives.

    .. math:: \frac{\frac{1}{|A|} \sum_{a \in A} p(a \mid \text{prefix})^{1/|a|}}
                   {p(y \mid \text{prefix})^{1/|y|}}

    with the wrong continuations A of the column `alternatives` and the true continuation y, each probability
    to the power of one over its number of tokens. Below 1, the truth is the likelier one.

    Args:
        model: A TransformerLens model.
        seqs: The sequences; their table has the column `alternatives`.
        stats: The statistics of the true continuations.
        batch_size: Sequences per forward pass.
        banned: A token whose logit counts as minus infinity.

    Raises:
        SequenceError: An alternative is empty, or neither a text nor token ids.

    Source: arXiv 2401.06121 (TOFU), section 2.2.2, where y is a paraphrase of the answer that was trained on.
    """
    owners: list[int] = []
    rows: list[list[int]] = []
    prefixes = seqs.halves()[0]
    for number, given in enumerate(seqs.table[ALTERNATIVES]):
        for wrong in given if isinstance(given, list | tuple | np.ndarray) else ():
            owners.append(number)
            rows.append(prefixes[number] + _ids(wrong, model, number))
    found = np.full(len(seqs), np.nan)
    if rows:
        wrong = SequenceSet.from_tokens(rows, seqs.prefix_len[owners])
        theirs = teacher_forced_stats(model, wrong, batch_size=batch_size, banned=banned, progress=False)
        sums = np.bincount(owners, 1 / perplexity(theirs).numpy(), minlength=len(seqs))
        counts = np.bincount(owners, minlength=len(seqs))
        means = np.divide(sums, counts, out=np.full(len(seqs), np.nan), where=counts > 0)
        found = means * perplexity(stats).numpy()
    return found


def _ids(wrong: str | Sequence[int], model: Any, number: int) -> list[int]:
    ids = encode(model.tokenizer, [wrong])[0] if isinstance(wrong, str) else wrong
    if not isinstance(ids, list | tuple | np.ndarray) or not len(ids):
        raise SequenceError(
            f"row {number} has the alternative {wrong!r}: give continuations as texts or as lists of ids"
        )
    return [int(token) for token in ids]
