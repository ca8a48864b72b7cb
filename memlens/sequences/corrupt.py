"""Corrupted sequences: the same targets after a changed prefix.

They are the other half of activation patching, and a control for recall: what a model still predicts after a
corrupted prefix does not depend on the prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from memlens.errors import SequenceError, check_option
from memlens.sequences.set import SequenceSet, some

KINDS = ("replace_token", "shuffle_prefix", "other_sequence")


def corrupt(
    seqs: SequenceSet,
    kind: str = "replace_token",
    *,
    seed: int = 0,
    n_tokens: int = 1,
    positions: Sequence[int] | None = None,
) -> SequenceSet:
    """Return the same sequences with another prefix: same shape, same targets, same ids and order.

    Kinds:

    - `replace_token`: `n_tokens` tokens of each prefix, at random positions or at `positions`, are replaced
      by other tokens, drawn from the set's own unigram distribution.
    - `shuffle_prefix`: the prefix's tokens in another order.
    - `other_sequence`: the prefix of another sequence of the set with the same prefix length, each used
      once, never an equal one.

    A beginning-of-text token that memlens prepended (`prepend_bos`) stays where it is.

    Args:
        seqs: The set.
        kind: One of `KINDS`.
        seed: The same seed gives the same corruption.
        n_tokens: Number of tokens that `replace_token` replaces in each prefix.
        positions: Positions at which `replace_token` replaces tokens; negative ones count from the end of the
            prefix: -1 is the token right before the continuation. Overrides `n_tokens`.

    Returns:
        The set; its table gains `corrupted_positions` (where a token differs from the original's) and
        `clean_text` in place of `text`, its attributes `corruption` and `corruption_seed`.

    Raises:
        OptionError: There is no such kind.
        SequenceError: A prefix is too short or cannot be changed (names the row).

    >>> clean = SequenceSet.from_tokens([[1, 2, 3, 9], [4, 5, 6, 8]], 3)
    >>> corrupt(clean, "other_sequence").rows()
    [[4, 5, 6, 9], [1, 2, 3, 8]]
    >>> corrupt(clean, positions=[-1]).table["corrupted_positions"].tolist()
    [[2], [2]]
    """
    check_option("kind", kind, KINDS)
    rng = np.random.default_rng(seed)
    first = 1 if seqs.attrs.get("prepend_bos") else 0
    tokens = seqs.tokens.numpy().copy()
    if kind == "replace_token":
        _replace_tokens(tokens, seqs, rng, first, n_tokens, positions)
    elif kind == "shuffle_prefix":
        _shuffle_prefixes(tokens, seqs, rng, first)
    else:
        _exchange_prefixes(tokens, seqs, rng)
    changed = tokens != seqs.tokens.numpy()
    table = seqs.table.rename(columns={"text": "clean_text"})
    table["corrupted_positions"] = [np.flatnonzero(row).tolist() for row in changed]
    attrs = {**seqs.attrs, "corruption": kind, "corruption_seed": seed}
    return SequenceSet(torch.from_numpy(tokens), seqs.mask, seqs.prefix_len, table, attrs)


def _replace_tokens(
    tokens: np.ndarray,
    seqs: SequenceSet,
    rng: np.random.Generator,
    first: int,
    n_tokens: int,
    positions: Sequence[int] | None,
) -> None:
    if positions is None and n_tokens < 1:
        raise SequenceError(f"n_tokens={n_tokens}: replace at least one token of each prefix")
    draw = _unigram_sampler(seqs, rng)
    for row, prefix_len in enumerate(seqs.prefix_len.tolist()):
        if positions is not None:
            where = [_resolved(p, prefix_len, first, row) for p in positions]
        elif n_tokens > prefix_len - first:
            raise SequenceError(
                f"row {row} has a prefix of {prefix_len - first} tokens that may be replaced: "
                f"n_tokens={n_tokens} is too many"
            )
        else:
            where = rng.choice(np.arange(first, prefix_len), size=n_tokens, replace=False)
        for position in where:
            tokens[row, position] = draw(tokens[row, position])


def _resolved(position: int, prefix_len: int, first: int, row: int) -> int:
    resolved = position + prefix_len if position < 0 else position
    if not first <= resolved < prefix_len:
        raise SequenceError(
            f"position {position} is not in the prefix of row {row}, which has {prefix_len} tokens"
        )
    return resolved


def _unigram_sampler(seqs: SequenceSet, rng: np.random.Generator) -> Callable[[int], int]:
    """Return a function that draws from the set's unigram distribution, excluding a given token."""
    ids, counts = np.unique(seqs.tokens.numpy()[seqs.mask.numpy()], return_counts=True)
    if len(ids) < 2:
        raise SequenceError("the set has fewer than two different tokens: there is none to replace one by")
    ends = np.cumsum(counts)
    places = {int(token): place for place, token in enumerate(ids)}

    def draw(token: int) -> int:
        place = places[int(token)]
        drawn = int(rng.integers(ends[-1] - counts[place]))
        if drawn >= ends[place] - counts[place]:
            drawn += counts[place]
        return int(ids[np.searchsorted(ends, drawn, side="right")])

    return draw


def _shuffle_prefixes(tokens: np.ndarray, seqs: SequenceSet, rng: np.random.Generator, first: int) -> None:
    for row, prefix_len in enumerate(seqs.prefix_len.tolist()):
        prefix = tokens[row, first:prefix_len].copy()
        others = np.flatnonzero(prefix != prefix[0]) if len(prefix) else prefix
        if not len(others):
            raise SequenceError(f"the prefix of row {row} repeats a single token: it cannot be shuffled")
        shuffled = rng.permutation(prefix)
        if (shuffled == prefix).all():
            swap = int(rng.choice(others))
            shuffled[[0, swap]] = shuffled[[swap, 0]]
        tokens[row, first:prefix_len] = shuffled


def _exchange_prefixes(tokens: np.ndarray, seqs: SequenceSet, rng: np.random.Generator) -> None:
    lengths = seqs.prefix_len.numpy()
    original = tokens.copy()
    for prefix_len in np.unique(lengths):
        rows = np.flatnonzero(lengths == prefix_len)
        givers = derangement(original[rows, :prefix_len], rng)
        if givers is None:
            raise SequenceError(
                f"rows {some(rows.tolist())} have a prefix of {prefix_len} tokens, and too few differ "
                "to exchange them: add sequences with that prefix length"
            )
        tokens[rows, :prefix_len] = original[rows[givers], :prefix_len]


def derangement(rows: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
    """Return for each row another row whose content differs, each used once; None if impossible.

    With equal rows next to each other, a rotation by the size of the largest group of equal rows never maps
    a row to an equal one, as long as that group is at most half of all.
    """
    _, content = np.unique(rows, axis=0, return_inverse=True)
    content = rng.permutation(content.max() + 1)[content.ravel()]
    largest = np.bincount(content).max()
    if 2 * largest > len(content):
        return None
    shuffled = rng.permutation(len(content))
    order = shuffled[np.argsort(content[shuffled], kind="stable")]
    givers = np.empty_like(order)
    givers[order] = np.roll(order, -largest)
    return givers
