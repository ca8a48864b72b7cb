"""How well a ranking of components agrees with the ground truth."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import rankdata

MEASURES: Mapping[str, str] = {
    "average_precision": "average precision",
    "average_precision_carrying": "average precision, planted components that carry nothing left out",
    "recall_at_k": "recall at k, the number planted",
    "roc_auc": "area under the ROC curve",
    "ndcg": "NDCG against the graded truth",
    "layer_hit": "the first layer is a planted one",
}
"""What is measured of a ranking, with words for each."""

CARRYING = 0.05
"""Planted components that carry less than this share of what the largest carries, carry nothing."""


Z_EDGES: tuple[float, ...] = (-np.inf, 0, 1, 2, 3, 5, 10, 20, np.inf)
"""Edges of the bins of z that calibration counts in."""


def score_ranking(
    scores: Float[np.ndarray, "layer index"],
    planted: Bool[np.ndarray, "layer index"],
    graded: Float[np.ndarray, "layer index"] | None = None,
) -> dict[str, float]:
    r"""Compare a ranking with the truth.

    `average_precision` is :math:`\sum_n (R_n - R_{n-1}) P_n` over the thresholds; its chance level is the
    share of planted components. `average_precision_carrying` leaves out planted components whose graded
    truth is below `CARRYING` of the largest: their weights were changed, but giving them back changes
    nothing, so that no method that measures effects can find them. `recall_at_k` is the share of the k
    planted components among the first k; with ties at the cut, its expectation over their orders. `ndcg`
    takes the graded truth as gain, negative parts as 0. `layer_hit` is 1 if the layer with the largest sum of
    positive scores holds a planted component, else 0.

    Args:
        scores: Higher where the sequence is rather stored.
        planted: True where it is.
        graded: What each component carries, in nats.

    Returns:
        The measures, `k` and `chance` (the share planted). All measures are NaN where everything or
        nothing is planted.

    Example:
        >>> import numpy as np
        >>> import memlens as ml
        >>> scores = np.array([[0.9, 0.2], [0.1, 0.8]])
        >>> planted = np.array([[True, False], [False, False]])
        >>> ml.benchmark.score_ranking(scores, planted)["average_precision"]
        1.0
    """
    from sklearn.metrics import average_precision_score, ndcg_score, roc_auc_score

    values, truth = scores.ravel(), planted.ravel()
    k = int(truth.sum())
    if not 0 < k < truth.size:
        return {**dict.fromkeys(MEASURES, float("nan")), "k": k, "chance": k / truth.size}
    found = {
        "average_precision": float(average_precision_score(truth, values)),
        "average_precision_carrying": float("nan"),
        "recall_at_k": _recall_at(values, truth, k),
        "roc_auc": float(roc_auc_score(truth, values)),
        "ndcg": float("nan"),
        "layer_hit": float("nan"),
    }
    if graded is not None and (graded > 0).any():
        kept = ~(planted & (graded < CARRYING * graded.max()))
        found["average_precision_carrying"] = float(average_precision_score(planted[kept], scores[kept]))
        found["ndcg"] = float(ndcg_score(graded.clip(min=0).reshape(1, -1), values.reshape(1, -1)))
    if scores.shape[1] > 1:
        found["layer_hit"] = float(planted[int(scores.clip(min=0).sum(1).argmax())].any())
    return {**found, "k": k, "chance": k / truth.size}


def _recall_at(values: np.ndarray, truth: np.ndarray, k: int) -> float:
    cut = np.partition(values, -k)[-k]
    above, ties = values > cut, values == cut
    share = (k - above.sum()) / ties.sum()
    return float((truth[above].sum() + share * truth[ties].sum()) / k)


def chance_level(measure: str, share: float, k: float) -> float:
    r"""Return what a random ranking gets on average.

    Average precision of N components of which k are planted, with :math:`H_N = \sum_{n \le N} 1/n`:
    :math:`\frac{1}{N} \left[ H_N + \frac{k - 1}{N - 1} (N - H_N) \right]`, which is above the share k/N.

    Args:
        measure: One of `MEASURES`; of others, and of those without a closed form, NaN.
        share: The share of planted components.
        k: The number of planted components.

    >>> round(chance_level("average_precision", 1 / 6, 1), 3), chance_level("recall_at_k", 0.25, 4)
    (0.408, 0.25)
    """
    if measure == "recall_at_k":
        return share
    if measure == "roc_auc":
        return 0.5
    if measure != "average_precision" or not 0 < share < 1:
        return float("nan")
    n = round(k / share)
    harmonic = float((1 / np.arange(1, n + 1)).sum())
    return (harmonic + (k - 1) / (n - 1) * (n - harmonic)) / n


def planted_ranks(
    scores: Float[np.ndarray, "layer index"], planted: Bool[np.ndarray, "layer index"]
) -> list[int]:
    """Return the ranks of the planted components, in order; the highest score has rank 1.

    Equal scores are put in a random order, the same at each call.

    >>> planted_ranks(np.array([[0.2, 0.9], [0.5, 0.1]]), np.array([[True, True], [False, False]]))
    [1, 3]
    """
    values = scores.ravel()
    order = np.lexsort((np.random.default_rng(0).random(values.size), -values))
    return (np.flatnonzero(planted.ravel()[order]) + 1).tolist()


def overlap(first: np.ndarray, second: np.ndarray, k: int) -> float:
    """Return the Jaccard index of the k components with the highest scores in two rankings.

    >>> overlap(np.array([3, 2, 1, 0]), np.array([3, 1, 2, 0]), 2)
    0.3333333333333333
    """
    one, other = (set(np.argsort(-v.ravel(), kind="stable")[:k].tolist()) for v in (first, second))
    return len(one & other) / len(one | other)


def mean_ranks(rankings: list[np.ndarray]) -> np.ndarray:
    """Return the mean of several rankings' ranks, highest for what most of them put first.

    Args:
        rankings: Scores of one shape.
    """
    ranks = [rankdata(values.ravel()).reshape(values.shape) for values in rankings]
    return np.mean(ranks, axis=0)


def less_others(scores: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Return scores `(sequence, ...)` less their mean on other sequences, `there`."""
    return scores - there.mean(0)


def z_scored(scores: Float[np.ndarray, "sequence ..."], there: Float[np.ndarray, "other ..."]) -> np.ndarray:
    """Return scores less their mean on other sequences, over their standard deviation there.

    A standard deviation below a thousandth of the mean one is replaced by that, so that components that do
    nothing on other text do not come first for this alone.
    """
    spread = there.std(0, ddof=1)
    return (scores - there.mean(0)) / np.maximum(spread, 1e-6 + 1e-3 * spread.mean())
