"""Near-verbatim recall: how far what was generated is from the truth, when tokens may shift.

M compares position by position: one token left out makes everything after it wrong. An edit distance and the
longest common run do not mind.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from rapidfuzz.distance import Levenshtein

_BLOCK = 16_384
"""Sequences whose tables are held at a time."""


def near_verbatim_columns(
    generated: Sequence[Sequence[int]], truth: Sequence[Sequence[int]]
) -> dict[str, np.ndarray]:
    """Return how nearly each generated continuation is the true one, one array a column.

    - `edit_distance` (tokens): the fewest insertions, deletions and substitutions (each costs 1) that turn
      one into the other (Levenshtein).
    - `edit_similarity` (share): ``1 - edit_distance / max(len(generated), len(truth))``.
    - `longest_run` (tokens): the longest run of tokens that occurs in both, at any position.
    - `longest_run_at`, `longest_run_generated_at`: where its first occurrence begins in the truth (counted
      from the continuation's first token) and in the generated tokens; -1 where there is none.

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
    """Return the longest run common to both of each pair: its length, and where it begins in each.

    Of several longest runs the one that begins first in `first` is meant, then first in `second`. Starts are
    -1 where nothing is common.

    >>> [a.tolist() for a in longest_common_runs([[1, 2, 3]], [[7, 2, 3, 2]])]
    [[2], [1], [1]]
    """
    parts = [
        _runs(_padded(first[i : i + _BLOCK], -1), _padded(second[i : i + _BLOCK], -2))
        for i in range(0, len(first), _BLOCK)
    ]
    lengths, starts, other_starts = np.concatenate([np.zeros((3, 0), np.int64), *parts], axis=1)
    return lengths, starts, other_starts


def _padded(rows: Sequence[Sequence[int]], fill: int) -> np.ndarray:
    out = np.full((len(rows), max(map(len, rows), default=0)), fill, dtype=np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def _runs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """All pairs at once; after step i, `run[:, j]` is the common run that ends at a's i and b's j."""
    n = len(a)
    best, a_end, b_end = (np.zeros(n, dtype=np.int64) for _ in range(3))
    run = np.zeros((n, b.shape[1] + 1), dtype=np.int64)
    every = np.arange(n)
    for i in range(a.shape[1]):
        run[:, 1:] = np.where(a[:, i : i + 1] == b, run[:, :-1] + 1, 0)
        j = run.argmax(1)
        longer = run[every, j] > best
        best = np.where(longer, run[every, j], best)
        a_end, b_end = np.where(longer, i + 1, a_end), np.where(longer, j, b_end)
    found = best > 0
    return np.stack([best, np.where(found, a_end - best, -1), np.where(found, b_end - best, -1)])
