"""Modular view: how many neurons carry half of the effect, and how much the sets of two domains share."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from memlens.errors import OptionError, ResultError
from memlens.results.result import Result
from memlens.results.statistics.intervals import FEWEST, quantile_interval, rows_by_group


def carrying_neurons(harm: Float[np.ndarray, "seq site"], share: float = 0.5) -> Bool[np.ndarray, "site"]:
    r"""Return the fewest neurons that together carry a share of the effect.

    With :math:`c_i = \max(0, \text{mean harm of neuron } i)` these are the neurons of largest :math:`c_i`
    whose sum reaches the share of :math:`\sum_i c_i`; none where no neuron does harm.

    Args:
        harm: What removing each neuron takes from each sequence, above 0 for harm.
        share: Above 0 and at most 1.

    >>> carrying_neurons(np.array([[4.0, 1.0, 1.0, -3.0]])).tolist()
    [True, False, False, False]
    """
    if not 0 < share <= 1:
        raise OptionError(f"share={share} is not in (0, 1]: give a share of the effect, such as 0.5.")
    mean = np.maximum(harm.mean(0), 0)
    order = np.argsort(-mean, kind="stable")
    reached = mean[order].cumsum()
    found = np.zeros(len(mean), bool)
    if reached[-1] > 0:
        found[order[: 1 + int((reached < share * reached[-1] * (1 - 1e-12)).sum())]] = True
    return found


def modular_view(
    result: Result,
    metric: str = "target_logprob",
    *,
    group: str = "domain",
    share: float = 0.5,
    n_resamples: int = 500,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return how concentrated the effect of each group is on neurons, and how much two groups share.

    The set of a group is `carrying_neurons` of its sequences, over all layers. The number of neurons depends
    on the noise of the effects and so on the number of sequences: compare groups of equal size.

    *Null of the overlap.* The sequences of both groups are divided at random into two of the same sizes,
    `n_resamples` times. Groups whose sets share less than these use different neurons; a group label that
    means nothing shares as much.

    Args:
        result: Effects of neurons, `(sequence, layer, neuron)`, with a baseline: of a knock-out of single
            neurons, or estimated by `ml.instruments.attribute_ablation(..., site="mlp_post")`.
        metric: One of its metrics; lower than the baseline is harm.
        group: A coordinate along `sequence`.
        share: Of the effect.
        n_resamples: Bootstrap resamples, and draws of the null.
        level: Coverage of the intervals.
        seed: Of both.

    Returns:
        - One row per group: `group`, `n`, `neurons` with `low` and `high` (percentile bootstrap over
          sequences; NaN for fewer than three), `of` (all neurons), `share_of_neurons`.
        - One row per pair of groups: `a`, `b`, `overlap` (common neurons over the smaller set), `null_mean`,
          `null_low`, `null_high`, and `p`: the share of the null at most as large, counting the value itself.

    Raises:
        OptionError: A share out of range.
        ResultError: The metric has no baseline, no neurons, or an unknown group.

    Source: ours, after the questions of the survey arXiv 2409.02877 (activation sparsity, functional
    specialization, partitions of neurons).

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-xs")
        >>> seqs = ml.load_sequences("zoo", model)
        >>> often = seqs[seqs.table["copies"].to_numpy() == 256][:6]
        >>> estimate = ml.instruments.attribute_ablation
        >>> effects = estimate(model, often, site="mlp_post", steps=2, progress=False)
        >>> counts, shared = ml.detect.modular_view(effects, n_resamples=20)
        >>> bool((counts["neurons"] < counts["of"]).all())
        True
    """
    effect = -result.effect(metric)
    if "neuron" not in effect.dims:
        raise ResultError(
            f"{metric!r} has the dimensions {effect.dims}: effects of single neurons are needed."
        )
    harm = effect.transpose("sequence", ...).values.reshape(effect.sizes["sequence"], -1)
    rows, rng = rows_by_group(result[group]), np.random.default_rng(seed)
    counts = []
    for name, own in rows.items():
        drawn = rng.integers(0, len(own), (n_resamples, len(own)))
        sizes = np.array([[carrying_neurons(harm[own[some]], share).sum()] for some in drawn], float)
        low, high = quantile_interval(sizes, level, len(own))
        n = int(carrying_neurons(harm[own], share).sum())
        counts.append(
            {
                "group": name, "n": len(own), "neurons": n, "low": float(low[0]), "high": float(high[0]),
                "of": harm.shape[1], "share_of_neurons": n / harm.shape[1],
            }
        )  # fmt: skip
    pairs = []
    for a, b in combinations(rows, 2):
        ours, theirs = harm[rows[a]], harm[rows[b]]
        value, both = _overlap(ours, theirs, share), np.concatenate([ours, theirs])
        orders = [rng.permutation(len(both)) for _ in range(n_resamples)]
        null = np.array([_overlap(both[o[: len(ours)]], both[o[len(ours) :]], share) for o in orders])
        known = min(len(ours), len(theirs)) >= FEWEST
        low, high = quantile_interval(null[:, None], level, len(both))
        pairs.append(
            {
                "a": a, "b": b, "overlap": value, "null_mean": float(null.mean()),
                "null_low": float(low[0]), "null_high": float(high[0]),
                "p": (1 + int((null <= value + 1e-12).sum())) / (1 + len(null)) if known else np.nan,
            }
        )  # fmt: skip
    columns = ["a", "b", "overlap", "null_mean", "null_low", "null_high", "p"]
    return pd.DataFrame(counts), pd.DataFrame(pairs, columns=columns)


def _overlap(ours: np.ndarray, theirs: np.ndarray, share: float) -> float:
    """Return the common neurons over the smaller set; 0 where one is empty."""
    first, second = (carrying_neurons(harm, share) for harm in (ours, theirs))
    smaller = min(first.sum(), second.sum())
    return float((first & second).sum() / smaller) if smaller else 0.0
