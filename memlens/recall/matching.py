"""Matching by optimal assignment: controls for memorized sequences, and pairs within calipers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment

from memlens.errors import OptionError
from memlens.sequences.set import SequenceSet

_BLOCK = 1000
"""Memorized sequences assigned together: the assignment is optimal within a block."""

_POOL = 20_000
"""Candidates a block chooses from."""

_COVARIATES = ("length", "prefix_len", "frequency")


@dataclass(frozen=True, eq=False)
class Matching:
    """Controls for memorized sequences, and how well they match.

    Attributes:
        controls: The controls, in the order of the memorized sequences.
        balance: Standardized mean differences `before` and `after` matching, one row per covariate.
        n_unmatched: Number of controls that were wanted and not found.
    """

    controls: SequenceSet
    balance: pd.DataFrame
    n_unmatched: int


def match_controls(
    memorized: SequenceSet,
    pool: SequenceSet,
    token_counts: Int[np.ndarray, "vocab"],
    *,
    n_per: int,
    seed: int,
    also: Sequence[str] = (),
) -> Matching:
    """Assign to each memorized sequence `n_per` sequences of the pool, none twice.

    The cost of a pair is the absolute difference in prefix length plus that in continuation length (tokens),
    plus the difference in mean log frequency, scaled so that all of the latter together weigh less than one
    token. The columns of both tables named in `also` count like frequency, all of them in standard deviations
    of memorized and pool together. More than a thousand memorized sequences are assigned in random blocks,
    each optimal on its own share of the pool.
    """
    first, second = (_covariates(seqs, token_counts, also) for seqs in (memorized, pool))
    wanted = np.repeat(np.arange(len(memorized)), n_per)
    blocks = _blocks(wanted, len(pool), np.random.default_rng(seed))
    pairs = np.concatenate([_assign(first, second, rows, columns) for rows, columns in blocks])
    a, b = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))].T
    controls, theirs = pool[b], second.iloc[b].reset_index(drop=True)
    gaps = theirs - first.iloc[a].reset_index(drop=True)
    table = controls.table.assign(
        matched_to=np.array(memorized.ids, dtype=object)[a],
        length_difference=gaps["length"],
        frequency_difference=gaps["frequency"],
    )
    spread = _spread(first, second)
    smd = {"before": _smd(first, second, spread), "after": _smd(first, theirs, spread)}
    balance = pd.DataFrame(smd).rename_axis("covariate")
    return Matching(controls.with_table(table), balance, len(wanted) - len(pairs))


def mean_log_frequency(seqs: SequenceSet, counts: Int[np.ndarray, "vocab"]) -> Float[np.ndarray, "seq"]:
    """Return the mean over each sequence's tokens of ``log(1 + count)``.

    >>> seqs = SequenceSet.from_tokens([[0, 1], [1, 1]], 1)
    >>> mean_log_frequency(seqs, np.array([0, 1])).round(3).tolist()
    [0.347, 0.693]
    """
    mask = seqs.mask.numpy()
    logs = np.log1p(counts.astype(float))[seqs.tokens.numpy()]
    return np.where(mask, logs, 0).sum(-1) / mask.sum(-1)


def _covariates(seqs: SequenceSet, counts: np.ndarray, also: Sequence[str]) -> pd.DataFrame:
    values = (seqs.lengths.numpy(), seqs.prefix_len.numpy(), mean_log_frequency(seqs, counts))
    table = pd.DataFrame(dict(zip(_COVARIATES, values, strict=True)))
    return table.assign(**{name: seqs.table[name].to_numpy(dtype=float) for name in also})


def _blocks(
    wanted: np.ndarray, n_pool: int, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    n_blocks = -(-len(wanted) // _BLOCK)
    ours = np.array_split(rng.permutation(wanted), n_blocks)
    theirs = np.array_split(rng.permutation(n_pool), n_blocks)
    yield from ((a, b[:_POOL]) for a, b in zip(ours, theirs, strict=True) if len(b))


def _assign(ours: pd.DataFrame, pool: pd.DataFrame, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return the pairs (memorized, pool) of least total cost."""
    a, b = ours.iloc[rows].to_numpy(dtype=float), pool.iloc[columns].to_numpy(dtype=float)
    n_targets = np.abs(np.subtract.outer(a[:, 0] - a[:, 1], b[:, 0] - b[:, 1]))
    prefix_len = np.abs(np.subtract.outer(a[:, 1], b[:, 1]))
    fine = np.abs(np.subtract.outer(a[:, 2], b[:, 2]))
    if a.shape[1] > 3:
        spread = np.maximum(np.concatenate([a, b])[:, 2:].std(0), 1e-12)
        fine = fine / spread[0]
        for i, each in enumerate(spread[1:], start=3):
            fine += np.abs(np.subtract.outer(a[:, i], b[:, i])) / each
    # All of these differences together weigh less than half a token, so lengths come first.
    weight = 1 / (2 * len(rows) * max(float(fine.max()), 1e-12))
    chosen = linear_sum_assignment(prefix_len + n_targets + weight * fine)
    return np.stack([rows[chosen[0]], columns[chosen[1]]], axis=1)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Which rows of two groups are matched.

    Attributes:
        ours: Rows of the first group, in order.
        theirs: The row of the second group matched with each; none twice.
        balance: One row per covariate: both groups' means before and after matching, and the standardized
            mean differences.
    """

    ours: Int[np.ndarray, "pair"]
    theirs: Int[np.ndarray, "pair"]
    balance: pd.DataFrame

    def __len__(self) -> int:
        return len(self.ours)


def match_pairs(ours: pd.DataFrame, theirs: pd.DataFrame, calipers: Mapping[str, float]) -> Pairs:
    r"""Match as many rows as possible, within the caliper of every covariate, with the least total distance.

    The distance of a pair is :math:`\sum_c |a_c - b_c| / w_c` with the caliper :math:`w_c` of covariate
    :math:`c`; rows further apart than any caliper are not matched. Of the matchings with the most pairs, the
    one with the least total distance is returned (an assignment, not greedy).

    Args:
        ours: The covariates of the first group, one row per sequence.
        theirs: Those of the second group.
        calipers: The largest allowed difference of each covariate, above 0.

    Raises:
        OptionError: A caliper is not above 0.

    >>> a, b = pd.DataFrame({"x": [1.0, 5.0]}), pd.DataFrame({"x": [5.2, 1.4, 9.0]})
    >>> found = match_pairs(a, b, {"x": 0.5})
    >>> found.ours.tolist(), found.theirs.tolist()
    ([0, 1], [1, 0])
    """
    for name, caliper in calipers.items():
        if not caliper > 0:
            raise OptionError(f"the caliper of {name!r} is {caliper}: give a number above 0.")
    distance, fits = np.zeros((len(ours), len(theirs))), np.ones((len(ours), len(theirs)), dtype=bool)
    for name, caliper in calipers.items():
        gap = np.abs(np.subtract.outer(ours[name].to_numpy(float), theirs[name].to_numpy(float))) / caliper
        distance, fits = distance + gap, fits & (gap <= 1 + 1e-9)
    # A pair outside a caliper costs more than all others together, so there are as many pairs as possible.
    far = 1 + float(distance[fits].max(initial=0.0)) * (min(distance.shape, default=0) + 1)
    a, b = linear_sum_assignment(np.where(fits, distance, far))
    kept = fits[a, b]
    a, b = a[kept], b[kept]
    return Pairs(a, b, _balance(ours, theirs, a, b, list(calipers)))


def _balance(
    ours: pd.DataFrame, theirs: pd.DataFrame, a: np.ndarray, b: np.ndarray, names: list[str]
) -> pd.DataFrame:
    first, second = ours[names].astype(float), theirs[names].astype(float)
    spread = _spread(first, second)
    table = pd.DataFrame({"pairs": len(a)}, index=pd.Index(names, name="covariate"))
    for when, x, y in (("before", first, second), ("after", first.iloc[a], second.iloc[b])):
        table[f"first_{when}"], table[f"second_{when}"] = x.mean(), y.mean()
        table[f"smd_{when}"] = _smd(x, y, spread)
    return table.reset_index()


def _spread(first: Any, second: Any) -> pd.Series:
    """Return the pooled standard deviations of two groups: the root of the mean of their variances."""
    return ((first.var(ddof=0) + second.var(ddof=0)) / 2) ** 0.5


def _smd(first: Any, second: Any, spread: pd.Series) -> pd.Series:
    """Return the standardized mean differences; 0 for equal means even if the spread is 0."""
    gap = first.mean() - second.mean()
    return (gap / spread.where(spread > 0)).where(gap != 0, 0.0)
