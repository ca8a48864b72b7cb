"""Which attention heads matter for recall in each domain, and how far these sets agree.

Everything here works on saved effects of head ablations; nothing runs a model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool, Float
from scipy import stats

from memlens.errors import OptionError, ResultError
from memlens.results.statistics.agreement import rank_correlation
from memlens.results.statistics.intervals import FEWEST
from memlens.results.statistics.resampling import bootstrap_means
from memlens.studies.comparative.analyze.rates import against_null, central
from memlens.studies.comparative.options import DEFAULTS, ComparativeOptions


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


def expected_jaccard(n: int, k: int) -> float:
    r"""Return the exact mean Jaccard overlap of two independent random subsets of `k` of `n` sites.

    The intersection :math:`X` is hypergeometric, and

    .. math:: E\left[\frac{X}{2k - X}\right] = \sum_x P(X = x)\, \frac{x}{2k - x}

    Example:
        >>> round(expected_jaccard(1344, 269), 4), round(expected_jaccard(256, 52), 4)
        (0.1114, 0.1139)
    """
    if not 0 < k <= n:
        raise OptionError(f"subsets of {k} out of {n} sites: give a size from 1 to {n}.")
    x = np.arange(k + 1)
    return float((stats.hypergeom.pmf(x, n, k, k) * x / (2 * k - x)).sum())


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
        options: `top_fraction` of all heads count as important; domains with fewer than `min_per_domain`
            sequences are left out.

    Attributes:
        shape: Layers, and heads of a layer.
        table: Importance for each sequence (rows) of each head of all layers (columns).
        domains: The remaining domains, sorted.
        rows: Their rows of the table.
        n_heads: Number of heads in all layers.
        k: Heads in a set.
        fraction: Share of the heads that a set holds.

    Raises:
        ResultError: There are no sequences.
    """

    shape: tuple[int, int]
    table: Float[np.ndarray, "sequence site"]
    domains: list[str]
    rows: list[np.ndarray]
    n_heads: int
    k: int
    fraction: float

    def __init__(
        self, importance: xr.DataArray, domains: np.ndarray, options: ComparativeOptions = DEFAULTS
    ) -> None:
        array = importance.transpose("sequence", "layer", "head")
        if array.sizes["sequence"] == 0:
            raise ResultError("no sequences to find important heads with: ablate for at least one.")
        self.shape = array.sizes["layer"], array.sizes["head"]
        self.table = array.values.reshape(array.sizes["sequence"], -1).astype(float)
        self.fraction, self.n_heads = options.top_fraction, self.table.shape[1]
        self.k = set_size(self.n_heads, self.fraction)
        labels = np.asarray(domains).astype(str)
        names, counts = np.unique(labels, return_counts=True)
        self.domains = names[counts >= options.min_per_domain].tolist()
        self.rows = [np.flatnonzero(labels == name) for name in self.domains]

    def sets(self, rows: Sequence[np.ndarray] | None = None) -> Bool[np.ndarray, "domain site"]:
        """Return each domain's important heads, of its own or of other rows."""
        means = [self.table[own].mean(0) for own in (self.rows if rows is None else rows)]
        return top_set(np.array(means).reshape(len(means), self.n_heads), self.fraction)

    def pairs(self) -> pd.DataFrame:
        """Return the Jaccard overlap of every pair of domains: columns `domain`, `other`, `jaccard`."""
        sets = dict(zip(self.domains, self.sets(), strict=True))
        rows = [(a, b, float(jaccard(sets[a], sets[b]))) for a, b in combinations(self.domains, 2)]
        return pd.DataFrame(rows, columns=["domain", "other", "jaccard"])

    def universal(self) -> list[tuple[int, int]]:
        """Return the heads (layer, head) that are in the set of every domain."""
        places = np.argwhere(self.sets().all(0).reshape(self.shape)).tolist()
        return [(layer, head) for layer, head in places]

    # ---- random redraws ----------------------------------------------------------------------------------

    def resampled(self, n: int, rng: np.random.Generator) -> Bool[np.ndarray, "n domain site"]:
        """Return the sets under `n` bootstrap resamples of the sequences within each domain."""
        means = [bootstrap_means(self.table[own], n, rng) for own in self.rows]
        return top_set(np.stack(means, axis=1), self.fraction)

    def relabeled(self, rng: np.random.Generator) -> list[np.ndarray]:
        """Return each domain's rows after shuffling the domain labels over the sequences."""
        ends = np.cumsum([len(own) for own in self.rows])[:-1]
        return np.split(rng.permutation(np.concatenate(self.rows)), ends)

    def random(self, n: int, n_sets: int, rng: np.random.Generator) -> Bool[np.ndarray, "n set site"]:
        """Return sets of heads drawn anywhere in the network."""
        return top_set(rng.random((n, n_sets, self.n_heads)), self.fraction)

    def in_their_layers(
        self, sets: Bool[np.ndarray, "... site"], rng: np.random.Generator
    ) -> Bool[np.ndarray, "... site"]:
        """Return the sets with their heads shuffled within layers, which keeps the depth profile."""
        return rng.permuted(sets.reshape(*sets.shape[:-1], *self.shape), axis=-1).reshape(sets.shape)

    def halves(
        self, n: int, rng: np.random.Generator, rows: Sequence[np.ndarray] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the sets of two disjoint random halves of each domain's sequences, `n` times.

        Args:
            n: Splits.
            rng: Draws them.
            rows: Other rows for each domain; the domain's own by default.

        Returns:
            Two arrays `[n, domain, site]`.
        """
        first, second = [], []
        for _ in range(n):
            parts = [rng.permutation(own) for own in (self.rows if rows is None else rows)]
            first.append(self.sets([own[: len(own) // 2] for own in parts]))
            second.append(self.sets([own[len(own) // 2 :] for own in parts]))
        return np.stack(first), np.stack(second)


def rank_agreement(first: xr.DataArray, second: xr.DataArray) -> float:
    """Return Spearman's rank correlation over heads of two importances, each a mean over sequences.

    NaN where one of them is equal for all heads.
    """
    a, b = (array.mean("sequence").transpose("layer", "head").values.ravel() for array in (first, second))
    return float(rank_correlation(a, b))


NULLS = ("heads anywhere", "heads inside their layers", "domain labels shuffled")


def head_overlap(effects: HeadEffects, options: ComparativeOptions = DEFAULTS) -> pd.DataFrame:
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
    corrects this. There is none where a domain has one or two sequences.

    Args:
        effects: See `HeadEffects`; at least two domains.
        options: `n_permutations` of each null, `n_splits` into random halves, `n_resamples` of the bootstrap,
            `seed` of all of it.

    Returns:
        One row per statistic and null: columns `statistic`, `value`, `low`, `high`, `null` (of `NULLS`), what
        `against_null` gives, `exact` (the null's exact mean where there is one). Empty with fewer than two
        domains.
    """
    if len(effects.domains) < 2:
        return pd.DataFrame()
    rng, n, count = np.random.default_rng(options.seed), options.n_permutations, len(effects.domains)
    sets = effects.sets()
    resampled = effects.resampled(options.n_resamples, rng)
    drawn = (
        effects.random(n, count, rng),
        effects.in_their_layers(np.broadcast_to(sets, (n, *sets.shape)), rng),
        np.stack([effects.sets(effects.relabeled(rng)) for _ in range(n)]),
    )
    by_chance = expected_jaccard(effects.n_heads, effects.k)
    few, no_ends = min(map(len, effects.rows)) < FEWEST, (np.nan, np.nan)
    rows = []
    for name, measure, exact in (
        ("across domains", mean_pairwise, by_chance),
        ("universal", universal_share, (effects.k / effects.n_heads) ** count),
    ):
        value = float(measure(sets))
        ends = no_ends if few else _basic(value, measure(resampled))
        rows += _rows(name, value, ends, dict(zip(NULLS, map(measure, drawn), strict=True)), exact)

    halves = effects.halves(options.n_splits, rng)
    inside, across = _inside_and_across(*halves)
    some = [half[rng.integers(0, options.n_splits, n)] for half in halves]
    anywhere = [effects.random(n, count, rng) for _ in halves]
    in_layers = [effects.in_their_layers(half, rng) for half in some]
    null = {name: jaccard(*pair).mean(-1) for name, pair in zip(NULLS, (anywhere, in_layers), strict=False)}
    for name, values in (("inside a domain", inside), ("across domains, halves", across)):
        rows += _rows(name, float(values.mean()), no_ends if few else central(values), null, by_chance)

    gaps = []  # under shuffled labels, each a mean over a few splits
    for _ in range(max(99, n // 10)):
        few = effects.halves(min(options.n_splits, 5), rng, effects.relabeled(rng))
        gaps.append(np.mean(np.subtract(*_inside_and_across(*few))))
    gap, labels = inside - across, {NULLS[2]: np.array(gaps)}
    ends = no_ends if few else central(gap)
    return pd.DataFrame(rows + _rows("inside minus across", float(gap.mean()), ends, labels, 0.0))


def _inside_and_across(
    first: Bool[np.ndarray, "split domain site"], second: Bool[np.ndarray, "split domain site"]
) -> tuple[Float[np.ndarray, " split"], Float[np.ndarray, " split"]]:
    """Return the mean overlap of two halves of one domain, and of halves of two domains."""
    table, n = jaccard(first[:, :, None], second[:, None]), first.shape[1]
    inside = np.trace(table, axis1=1, axis2=2)
    return inside / n, (table.sum((1, 2)) - inside) / (n * (n - 1))


def _rows(
    statistic: str, value: float, ends: tuple[float, float], nulls: Mapping[str, np.ndarray], exact: float
) -> list[dict[str, object]]:
    """Return one row per null; the exact mean is that of the first."""
    low, high = ends
    found = {"statistic": statistic, "value": value, "low": low, "high": high}
    return [
        {**found, "null": name, **against_null(value, null), "exact": np.nan if i else exact}
        for i, (name, null) in enumerate(nulls.items())
    ]


def _basic(value: float, samples: np.ndarray) -> tuple[float, float]:
    """Return the basic bootstrap's interval of a share."""
    low, high = central(samples)
    return float(np.clip(2 * value - high, 0, 1)), float(np.clip(2 * value - low, 0, 1))


def head_table(effects: HeadEffects) -> pd.DataFrame:
    """Return every head: `layer`, `head`, `importance` (over all, and of each domain), `sets` it is in."""
    layer, head = np.divmod(np.arange(effects.n_heads), effects.shape[1])
    table = pd.DataFrame({"layer": layer, "head": head, "importance": effects.table.mean(0)})
    for name, rows in zip(effects.domains, effects.rows, strict=True):
        table[f"importance_{name}"] = effects.table[rows].mean(0)
    if effects.domains:
        table["sets"] = effects.sets().sum(0)
    return table.sort_values("importance", ascending=False, ignore_index=True)
