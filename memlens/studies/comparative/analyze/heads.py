"""Which attention heads matter for recall in each domain, and how far these sets agree.

Everything here works on saved effects of head ablations; nothing runs a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import combinations

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool, Float
from scipy import stats

from memlens.errors import OptionError, ResultError
from memlens.results.statistics.agreement import rank_correlation


def set_size(n: int, fraction: float) -> int:
    """Return how many of `n` heads are the important ones: `fraction * n`, rounded up.

    >>> set_size(256, 0.2), set_size(1344, 0.2)
    (52, 269)
    """
    if not 0 < fraction < 1:
        raise OptionError(f"top_fraction={fraction} is not a share of heads: give a number between 0 and 1.")
    return math.ceil(round(fraction * n, 9))


def top_set(importance: Float[np.ndarray, "*sets site"], fraction: float) -> Bool[np.ndarray, "*sets site"]:
    """Mark the `set_size` sites of largest importance along the last axis; the earlier site wins a tie.

    >>> top_set(np.array([0.1, 3.0, -1.0, 2.0, 0.0]), 0.4).tolist()
    [False, True, False, True, False]
    """
    k = set_size(importance.shape[-1], fraction)
    order = np.argsort(-importance, axis=-1, kind="stable")[..., :k]
    out = np.zeros(importance.shape, dtype=bool)
    np.put_along_axis(out, order, True, axis=-1)
    return out


def jaccard(a: Bool[np.ndarray, "... site"], b: Bool[np.ndarray, "... site"]) -> np.ndarray:
    """Return the size of the intersection over that of the union; NaN for two empty sets.

    >>> float(jaccard(np.array([True, True, False]), np.array([True, False, False])))
    0.5
    """
    both, either = (a & b).sum(-1), (a | b).sum(-1)
    with np.errstate(invalid="ignore"):
        return both / either


def expected_jaccard(n: int, k: int, other: int | None = None) -> float:
    r"""Return the exact mean Jaccard overlap of two independent random subsets of `n` sites.

    With sizes :math:`k, k'` the intersection :math:`X` is hypergeometric, and

    .. math:: E\left[\frac{X}{k + k' - X}\right] = \sum_x P(X = x)\, \frac{x}{k + k' - x}

    Args:
        n: Sites.
        k: Size of one subset.
        other: Size of the other; `k` by default.

    Example:
        >>> round(expected_jaccard(1344, 269), 4), round(expected_jaccard(256, 52), 4)
        (0.1114, 0.1139)
    """
    other = k if other is None else other
    if not 0 < k <= n or not 0 < other <= n:
        raise OptionError(f"subsets of {k} and {other} out of {n} sites: give sizes from 1 to {n}.")
    x = np.arange(min(k, other) + 1)
    return float((stats.hypergeom.pmf(x, n, k, other) * x / (k + other - x)).sum())


def mean_pairwise(sets: Bool[np.ndarray, "... set site"]) -> np.ndarray:
    """Return the mean Jaccard overlap of all pairs along the next-to-last axis."""
    pairs = list(combinations(range(sets.shape[-2]), 2))
    return np.mean([jaccard(sets[..., i, :], sets[..., j, :]) for i, j in pairs], axis=0)


def universal_share(sets: Bool[np.ndarray, "... set site"]) -> np.ndarray:
    """Return the share of sites that are in every set."""
    return sets.all(-2).mean(-1)


class HeadEffects:
    """What ablating each head does to each memorized sequence, with the sequences' domains.

    Args:
        importance: `(sequence, layer, head)`: loss of recall, positive where the head helped.
        domains: Each sequence's domain.
        fraction: Share of all heads that count as important.
        least: Domains with fewer sequences are left out.

    Attributes:
        domains: The remaining domains, sorted.
        left_out: The other domains, with their number of sequences.
        n_heads: Number of heads in all layers.
        k: Heads in a set.

    Raises:
        ResultError: There are no sequences.
    """

    shape: tuple[int, int]
    table: Float[np.ndarray, "sequence site"]
    left_out: dict[str, int]
    domains: list[str]
    rows: dict[str, np.ndarray]
    n_heads: int
    k: int

    def __init__(
        self, importance: xr.DataArray, domains: np.ndarray, *, fraction: float = 0.2, least: int = 4
    ) -> None:
        array = importance.transpose("sequence", "layer", "head")
        if array.sizes["sequence"] == 0:
            raise ResultError("no sequences to find important heads with: ablate for at least one.")
        self.shape = array.sizes["layer"], array.sizes["head"]
        self.table = array.values.reshape(array.sizes["sequence"], -1).astype(float)
        self.fraction = fraction
        labels = np.asarray(domains).astype(str)
        counts = {str(name): int((labels == name).sum()) for name in np.unique(labels)}
        self.left_out = {name: n for name, n in counts.items() if n < least}
        self.domains = [name for name in sorted(counts) if name not in self.left_out]
        self.rows = {name: np.flatnonzero(labels == name) for name in self.domains}
        self.n_heads = self.table.shape[1]
        self.k = set_size(self.n_heads, fraction)

    def importance(self, rows: np.ndarray | None = None) -> Float[np.ndarray, "layer head"]:
        """Return the mean importance of each head over all (or some) sequences."""
        return (self.table if rows is None else self.table[rows]).mean(0).reshape(self.shape)

    def sets(self) -> Bool[np.ndarray, "domain site"]:
        """Return each domain's important heads."""
        return top_set(self._means(self.rows), self.fraction)

    def _means(self, rows: Mapping[str, np.ndarray]) -> Float[np.ndarray, "domain site"]:
        means = [self.table[rows[name]].mean(0) for name in self.domains]
        return np.array(means).reshape(len(means), self.n_heads)

    def pairs(self) -> pd.DataFrame:
        """Return the Jaccard overlap of every pair of domains: columns `domain`, `other`, `jaccard`."""
        sets = dict(zip(self.domains, self.sets(), strict=True))
        rows = [(a, b, float(jaccard(sets[a], sets[b]))) for a, b in combinations(self.domains, 2)]
        return pd.DataFrame(rows, columns=["domain", "other", "jaccard"])

    def universal(self) -> list[tuple[int, int]]:
        """Return the heads (layer, head) that are in the set of every domain."""
        places = np.flatnonzero(self.sets().all(0))
        return [(int(place // self.shape[1]), int(place % self.shape[1])) for place in places]

    # ---- random redraws ----------------------------------------------------------------------------------

    def resampled(self, n: int, rng: np.random.Generator) -> Bool[np.ndarray, "n domain site"]:
        """Return the sets under `n` bootstrap resamples of the sequences within each domain."""
        means = np.stack([self._drawn(self.rows[name], n, rng) for name in self.domains], axis=1)
        return top_set(means, self.fraction)

    def _drawn(self, rows: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
        weights = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=n)
        return weights @ self.table[rows] / len(rows)

    def relabeled(self, n: int, rng: np.random.Generator) -> Bool[np.ndarray, "n domain site"]:
        """Return the sets after shuffling the domain labels over the sequences."""
        rows = np.concatenate([self.rows[name] for name in self.domains])
        ends = np.cumsum([len(self.rows[name]) for name in self.domains])
        order = rng.permuted(np.tile(rows, (n, 1)), axis=1)
        means = np.empty((n, len(self.domains), self.n_heads))
        for i, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            for j in range(n):
                means[j, i] = self.table[order[j, start:end]].mean(0)
        return top_set(means, self.fraction)

    def random(self, n: int, n_sets: int, rng: np.random.Generator) -> Bool[np.ndarray, "n set site"]:
        """Return sets of heads drawn anywhere in the network."""
        return top_set(rng.random((n, n_sets, self.n_heads)), self.fraction)

    def in_their_layers(
        self, sets: Bool[np.ndarray, "set site"], n: int, rng: np.random.Generator
    ) -> Bool[np.ndarray, "n set site"]:
        """Return the sets with their heads shuffled within layers, which keeps the depth profile."""
        grid = np.broadcast_to(sets.reshape(len(sets), *self.shape), (n, len(sets), *self.shape))
        return rng.permuted(grid, axis=-1).reshape(n, *sets.shape)

    def halves(
        self, n: int, rng: np.random.Generator, rows: Mapping[str, np.ndarray] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the sets of two disjoint random halves of each domain's sequences, `n` times.

        Args:
            n: Splits.
            rng: Draws them.
            rows: Other rows for each domain; the domain's own by default.

        Returns:
            Two arrays `[n, domain, site]`.
        """
        first, second = ([] for _ in range(2))
        for _ in range(n):
            parts = {name: rng.permutation(own) for name, own in (rows or self.rows).items()}
            first.append(self._means({name: rows[: len(rows) // 2] for name, rows in parts.items()}))
            second.append(self._means({name: rows[len(rows) // 2 :] for name, rows in parts.items()}))
        return top_set(np.stack(first), self.fraction), top_set(np.stack(second), self.fraction)


def rank_agreement(first: xr.DataArray, second: xr.DataArray) -> float:
    """Return Spearman's rank correlation over heads of two importances, each a mean over sequences.

    NaN where one of them is equal for all heads.
    """
    a, b = (array.mean("sequence").transpose("layer", "head").values.ravel() for array in (first, second))
    return float(rank_correlation(a, b))


NULLS = ("heads anywhere", "heads inside their layers", "domain labels shuffled")
_COLUMNS = (
    "statistic", "value", "low", "high", "null", "null_mean", "null_low", "null_high", "p_above", "p_below",
    "exact",
)  # fmt: skip


def head_overlap(
    effects: HeadEffects,
    *,
    n_permutations: int = 999,
    n_splits: int = 50,
    n_resamples: int = 500,
    seed: int = 0,
) -> pd.DataFrame:
    """Return the overlap of important heads, with intervals and nulls.

    Statistics:

    - "across domains": mean Jaccard overlap of the sets of every pair of domains;
    - "universal": share of all heads that are in the set of every domain;
    - "inside a domain": mean Jaccard overlap of the sets from two disjoint halves of one domain's sequences,
      over domains and splits;
    - "across domains, halves": the same from a half of one domain and a half of another, so that all
      sets come from equally many sequences;
    - "inside minus across": the difference of the last two.

    The interval is the basic bootstrap's over sequences within each domain (for splits: the central 95 % of
    splits). Sets of resampled sequences are less similar than those of the sample; the basic bootstrap
    corrects this.

    Args:
        effects: See `HeadEffects`; at least two domains.
        n_permutations: Of each null.
        n_splits: Random halves.
        n_resamples: Of the bootstrap.
        seed: Of all of it.

    Returns:
        One row per statistic and null: columns `statistic`, `value`, `low`, `high`, `null` (of `NULLS`),
        `null_mean`, `null_low`, `null_high` (central 95 %), `p_above` and `p_below` (share of the null at
        least as large, and as small), `exact` (the null's exact mean where there is one). Empty with fewer
        than two domains.
    """
    if len(effects.domains) < 2:
        return pd.DataFrame(columns=list(_COLUMNS))
    rng = np.random.default_rng(seed)
    sets = effects.sets()
    resampled = effects.resampled(n_resamples, rng)
    drawn = {
        "heads anywhere": effects.random(n_permutations, len(sets), rng),
        "heads inside their layers": effects.in_their_layers(sets, n_permutations, rng),
        "domain labels shuffled": effects.relabeled(n_permutations, rng),
    }
    rows = []
    exact = {
        "across domains": expected_jaccard(effects.n_heads, effects.k),
        "universal": (effects.k / effects.n_heads) ** len(sets),
    }
    measures: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "across domains": mean_pairwise, "universal": universal_share,
    }  # fmt: skip
    for name, measure in measures.items():
        value = float(measure(sets))
        ends = _basic(value, measure(resampled))
        for null, found in drawn.items():
            known = exact[name] if null == "heads anywhere" else np.nan
            rows.append((name, value, *ends, null, *_beside(value, measure(found)), known))
    return pd.DataFrame(rows + _split_rows(effects, n_splits, n_permutations, rng), columns=list(_COLUMNS))


def _split_rows(
    effects: HeadEffects, n_splits: int, n_permutations: int, rng: np.random.Generator
) -> list[tuple[object, ...]]:
    first, second = effects.halves(n_splits, rng)
    n = len(effects.domains)
    inside = jaccard(first, second).mean(-1)
    table = jaccard(first[:, :, None], second[:, None])
    across = (table.sum((1, 2)) - np.trace(table, axis1=1, axis2=2)) / (n * (n - 1))
    rows: list[tuple[object, ...]] = []
    one = [part[rng.integers(0, n_splits, n_permutations)] for part in (first, second)]
    pairs = {
        "heads anywhere": (effects.random(n_permutations, n, rng), effects.random(n_permutations, n, rng)),
        "heads inside their layers": tuple(
            rng.permuted(part.reshape(len(part), n, *effects.shape), axis=-1).reshape(part.shape)
            for part in one
        ),
    }
    exact = expected_jaccard(effects.n_heads, effects.k)
    for name, values in (("inside a domain", inside), ("across domains, halves", across)):
        for null, (a, b) in pairs.items():
            known = exact if null == "heads anywhere" else np.nan
            beside = _beside(float(values.mean()), jaccard(a, b).mean(-1))
            rows.append((name, float(values.mean()), *_central(values), null, *beside, known))
    gap, shuffled = inside - across, _gaps_of_labels(effects, max(99, n_permutations // 10), n_splits, rng)
    rows.append(
        ("inside minus across", float(gap.mean()), *_central(gap), "domain labels shuffled",
         *_beside(float(gap.mean()), shuffled), 0.0)
    )  # fmt: skip
    return rows


def _gaps_of_labels(effects: HeadEffects, n: int, n_splits: int, rng: np.random.Generator) -> np.ndarray:
    """Return inside minus across under shuffled labels, each a mean over a few splits."""
    rows = np.concatenate([effects.rows[name] for name in effects.domains])
    ends = np.cumsum([len(effects.rows[name]) for name in effects.domains])[:-1]
    few, count = min(n_splits, 5), len(effects.domains)
    gaps = []
    for _ in range(n):
        parts = dict(zip(effects.domains, np.split(rng.permutation(rows), ends), strict=True))
        first, second = effects.halves(few, rng, parts)
        table = jaccard(first[:, :, None], second[:, None]).mean(0)
        off = (table.sum() - np.trace(table)) / (count * (count - 1))
        gaps.append(np.trace(table) / count - off)
    return np.array(gaps)


def head_table(effects: HeadEffects) -> pd.DataFrame:
    """Return every head: `layer`, `head`, `importance` (over all, and of each domain), `sets` it is in."""
    layer, head = np.divmod(np.arange(effects.n_heads), effects.shape[1])
    table = pd.DataFrame({"layer": layer, "head": head, "importance": effects.importance().ravel()})
    for name in effects.domains:
        table[f"importance_{name}"] = effects.importance(effects.rows[name]).ravel()
    if effects.domains:
        table["sets"] = effects.sets().sum(0)
    return table.sort_values("importance", ascending=False, ignore_index=True)


def _basic(value: float, samples: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(np.clip(2 * value - high, 0, 1)), float(np.clip(2 * value - low, 0, 1))


def _central(samples: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)


def _beside(value: float, null: np.ndarray) -> tuple[float, float, float, float, float]:
    """Return a null's mean and central 95 %, and the shares of it at least as large and at least as small."""
    n, slack = len(null), 1e-12
    above = (1 + (null >= value - slack).sum()) / (1 + n)
    below = (1 + (null <= value + slack).sum()) / (1 + n)
    return float(null.mean()), *_central(null), float(above), float(below)
