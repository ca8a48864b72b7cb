"""What tells recalled from other sequences without looking inside the model on its continuation.

A detector that says no more than these says nothing about memory. They are the baseline of every result.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from jaxtyping import Int

from memlens.errors import SequenceError
from memlens.forward.baseline import teacher_forced_stats
from memlens.recall.columns import nll
from memlens.recall.matching import mean_log_frequency
from memlens.recall.trivial import TrivialRules, trivial_columns
from memlens.sequences.set import SequenceSet

Confound = Literal[
    "length",
    "prefix_len",
    "frequency",
    "prefix_perplexity",
    "copied_share",
    "type_token_ratio",
    "repeated_share",
]
CONFOUNDS: tuple[Confound, ...] = get_args(Confound)
"""Columns of `confounds`, in order; the one named by `COPIES` follows where it is known."""
COPIES = "copies"


def confounds(
    model: Any,
    sequences: SequenceSet,
    *,
    token_counts: Int[np.ndarray, "vocab"] | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    r"""Return the confounds of each sequence.

    - `length`, `prefix_len`: tokens.
    - `frequency`: mean over the sequence's tokens of :math:`\log(1 + \text{count})`.
    - `prefix_perplexity`: mean negative log-probability (nats) of the prefix from its second token on, the
      logarithm of its perplexity; NaN for a prefix of one token.
    - `copied_share`, `type_token_ratio`, `repeated_share`: repetition; see `trivial_continuations`.
    - `copies`: :math:`\log(1 + \text{copies})`, if the set's table has that column.

    Args:
        model: A TransformerLens model; it sees the prefixes only.
        sequences: The sequences.
        token_counts: How often each token id occurs in the training corpus; by default counted in the
            sequences.
        progress: Show a progress bar.

    Raises:
        SequenceError: A token has no count.

    Source: which confounds is ours, after arXiv 2412.01014's question.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> table = ml.detect.confounds(model, ml.load_sequences("zoo", model)[:3], progress=False)
        >>> table.shape, bool((table["prefix_perplexity"] > 0).all())
        ((3, 8), True)
    """
    found = sequences.tokens.numpy()[sequences.mask.numpy()]
    counts = np.bincount(found) if token_counts is None else np.asarray(token_counts)
    if len(counts) <= found.max():
        raise SequenceError(
            f"token_counts has {len(counts)} counts, but the sequences contain the token id {found.max()}: "
            "give one for each id of the vocabulary."
        )
    trivial = trivial_columns(sequences, None, TrivialRules())
    table = pd.DataFrame(
        {
            "length": sequences.lengths.numpy(),
            "prefix_len": sequences.prefix_len.numpy(),
            "frequency": mean_log_frequency(sequences, counts),
            "prefix_perplexity": _prefix_nll(model, sequences, progress),
            **{name: trivial[name] for name in ("copied_share", "type_token_ratio", "repeated_share")},
        },
        dtype=float,
    )
    if COPIES in sequences.table:
        table[COPIES] = np.log1p(sequences.table[COPIES].to_numpy(float))
    return table


def _prefix_nll(model: Any, sequences: SequenceSet, progress: bool) -> np.ndarray:
    prefixes = sequences.halves()[0]
    found = np.full(len(prefixes), np.nan)
    longer = [i for i, prefix in enumerate(prefixes) if len(prefix) > 1]
    if longer:
        seqs = SequenceSet.from_tokens([prefixes[i] for i in longer], 1)
        stats = teacher_forced_stats(model, seqs, progress=progress)
        found[longer] = (nll(stats) / stats.mask.sum(-1)).numpy()
    return found
