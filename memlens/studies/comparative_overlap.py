"""How far important heads are shared: between domains, inside a domain, and by all, against chance.

Each statistic stands beside nulls of its own: heads drawn anywhere (exact, and simulated for the interval),
heads shuffled inside their layers (so that only the choice within a layer is random), and domain labels
shuffled over the sequences (so that domains do not matter, while the sets stay as good as they are).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

from memlens.studies.comparative_heads import (
    HeadEffects,
    expected_jaccard,
    jaccard,
    mean_pairwise,
    universal_share,
)

__all__ = ["NULLS", "head_overlap", "head_table"]

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

    - "across domains": mean Jaccard overlap of the sets of every two domains;
    - "universal": share of all heads that are in the set of every domain;
    - "inside a domain": mean Jaccard overlap of the sets from two disjoint halves of one domain's sequences,
      over domains and splits;
    - "across domains, halves": the same from a half of one domain and a half of another, so that both are of
      sets from equally many sequences;
    - "inside minus across": the difference of the last two.

    The interval is the basic bootstrap's over sequences inside each domain (of the splits: the central 95 %
    of splits). Sets of resampled sequences are less alike than those of the sample, which the basic bootstrap
    takes out.

    Args:
        effects: See `HeadEffects`; at least two domains.
        n_permutations: Of each null.
        n_splits: Random halves.
        n_resamples: Of the bootstrap.
        seed: Of all of it.

    Returns:
        One row a statistic and null: columns `statistic`, `value`, `low`, `high`, `null` (of `NULLS`),
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
    """Return inside minus across when labels are shuffled: each a mean over a few splits."""
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
    """Return mean and central 95 % of a null, and the share of it at least as large and as small."""
    n, slack = len(null), 1e-12
    above = (1 + (null >= value - slack).sum()) / (1 + n)
    below = (1 + (null <= value + slack).sum()) / (1 + n)
    return float(null.mean()), *_central(null), float(above), float(below)
