"""Statistics of the ontologies study: accuracy against popularity by buckets, and what errors resemble."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Float
from rapidfuzz.distance import Levenshtein

from memlens.errors import ColumnError, OptionError, ResultError, check_option
from memlens.results.statistics.agreement import rank_correlation
from memlens.results.statistics.estimates import Estimate, mean_estimate

Units = Literal["word", "trigram"]


@dataclass(frozen=True, eq=False)
class BucketStatistics:
    """How a value goes with popularity, by buckets.

    Attributes:
        table: One row per bucket that is not empty: `bucket`, `n`, `popularity` and `value` (means).
        pearson: Correlation of the bucket means; NaN with fewer than three buckets, or without spread.
        pearson_p: Its two-sided p value, by permutation of the buckets.
        spearman: Rank correlation of the bucket means.
        spearman_p: Its p value.
        n_permutations: Permutations behind the p values.
    """

    table: pd.DataFrame
    pearson: float
    pearson_p: float
    spearman: float
    spearman_p: float
    n_permutations: int


def popularity_buckets(
    popularity: Sequence[float] | np.ndarray,
    value: Sequence[float] | np.ndarray,
    *,
    n_buckets: int = 50,
    n_permutations: int = 10_000,
    seed: int = 0,
) -> BucketStatistics:
    """Correlate a value, such as exact match or prediction invariance, with popularity over buckets.

    The edges of the buckets are percentiles of the *unique* popularities, so that a bucket spans as many
    different counts as any other. Within each, popularity and value are averaged; the correlations are
    between these means, and their p values compare with values shuffled among the buckets.

    Correlations of bucket means are higher than those of single items, and say nothing about a single item.

    Args:
        popularity: Occurrence counts, one per item.
        value: What is to be explained. Items without one of both (NaN) are left out.
        n_buckets: Number of buckets.
        n_permutations: Shuffles.
        seed: Of the shuffles.

    Raises:
        OptionError: A number is below 1.
        ResultError: Lengths differ.

    Source: arXiv 2401.14931 (released code): percentiles of unique counts, 50 buckets, both correlations
    between bucket means, 10,000 permutations.

    >>> found = popularity_buckets([1, 2, 3, 4, 5, 6], [0, 0, 0, 1, 1, 1], n_buckets=3, n_permutations=99)
    >>> found.table["value"].tolist(), round(found.spearman, 3)
    ([0.0, 0.5, 1.0], 1.0)
    """
    for name, number in (("n_buckets", n_buckets), ("n_permutations", n_permutations)):
        if number < 1:
            raise OptionError(f"{name}={number}: give 1 or more.")
    x, y = np.asarray(popularity, float), np.asarray(value, float)
    if x.shape != y.shape or x.ndim != 1:
        raise ResultError(
            f"popularities have the shape {x.shape}, values {y.shape}: give one of each per item."
        )
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    edges = np.percentile(np.unique(x), np.linspace(0, 100, n_buckets + 1)[1:-1]) if len(x) else np.empty(0)
    bucket, which = np.unique(np.searchsorted(edges, x, side="left"), return_inverse=True)
    n = np.bincount(which)
    a, b = np.bincount(which, x) / n, np.bincount(which, y) / n
    table = pd.DataFrame({"bucket": bucket, "n": n, "popularity": a, "value": b})
    order = np.random.default_rng(seed).permuted(np.tile(b, (n_permutations, 1)), axis=1)
    found = {}
    for name, correlation in (("pearson", _pearson), ("spearman", _spearman)):
        own = float(correlation(a, b[None])[0])
        drawn = np.abs(correlation(a, order))
        extreme = (1 + int((drawn >= abs(own) - 1e-12).sum())) / (1 + n_permutations)
        found |= {name: own, f"{name}_p": extreme if np.isfinite(own) else np.nan}
    return BucketStatistics(table, **found, n_permutations=n_permutations)


def _pearson(x: Float[np.ndarray, "bucket"], y: Float[np.ndarray, "draw bucket"]) -> np.ndarray:
    """Return Pearson's correlation with each row of `y`."""
    if len(x) < 3:
        return np.full(len(y), np.nan)
    a, b = x - x.mean(), y - y.mean(1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return b @ a / np.sqrt((a @ a) * (b**2).sum(1))


def _spearman(x: Float[np.ndarray, "bucket"], y: Float[np.ndarray, "draw bucket"]) -> np.ndarray:
    return rank_correlation(np.broadcast_to(x, y.shape), y)


def identifier_errors(
    table: pd.DataFrame, answers: Sequence[str], *, units: Units = "word", seed: int = 0
) -> pd.DataFrame:
    """Return what wrong identifiers resemble: the true identifier, and labels of similar names.

    For each wrong answer: `distance`, the Levenshtein distance (characters) to the true identifier; and if
    the answer is the identifier of another label, `answered_label` with its similarity to the true label:
    `jaccard` (shared over all units) and `cosine` (of the counts of units). The control columns `…_random`
    compare with the identifier and the label of another item, drawn at random: errors resemble the truth only
    where they do so more than these (`error_similarity`).

    Args:
        table: One row per item with the columns `label` and `identifier`.
        answers: The model's answer to each.
        units: What labels are divided into: words, or runs of three characters.
        seed: Of the random items.

    Returns:
        One row per wrong answer, with `row`, its row in `table`.

    Raises:
        ColumnError: A column is missing.
        OptionError: There are not as many answers as items, or an unknown unit.

    Source: arXiv 2401.14931 (released code) compares labels by Jaccard and cosine and identifiers by
    Levenshtein; units and the random control are ours.

    >>> items = pd.DataFrame({"label": ["red cat", "red dog"], "identifier": ["0012", "0013"]})
    >>> identifier_errors(items, ["0012", "0012"])[["distance", "answered_label", "jaccard"]].values.tolist()
    [[1, 'red cat', 0.3333333333333333]]
    """
    check_option("units", units, ["word", "trigram"])
    for name in ("label", "identifier"):
        if name not in table:
            raise ColumnError(f"the table has no column {name!r}: it needs label and identifier.")
    if len(answers) != len(table):
        raise OptionError(f"{len(answers)} answers to {len(table)} items: give one answer per item.")
    labels, truth = (table[name].astype(str).tolist() for name in ("label", "identifier"))
    owner = {identifier: label for label, identifier in zip(labels, truth, strict=True)}
    rng, rows = np.random.default_rng(seed), []
    for i, answer in enumerate(str(each).strip() for each in answers):
        if answer == truth[i]:
            continue
        other = int(rng.integers(0, len(truth) - 1)) if len(truth) > 1 else i
        other += other >= i and len(truth) > 1
        label = owner.get(answer)
        row = {
            "row": i, "answer": answer, "distance": Levenshtein.distance(answer, truth[i]),
            "distance_random": Levenshtein.distance(answer, truth[other]), "answered_label": label,
        }  # fmt: skip
        for name, similarity in _SIMILARITIES.items():
            for tail, against in (("", labels[i]), ("_random", labels[other])):
                known = label is not None
                row[name + tail] = (
                    similarity(_units(label, units), _units(against, units)) if known else np.nan
                )
        rows.append(row)
    columns = ["row", "answer", "distance", "distance_random", "answered_label"]
    columns += [name + tail for name in _SIMILARITIES for tail in ("", "_random")]
    return pd.DataFrame(rows, columns=columns)


def _units(label: str | None, units: str) -> Counter[str]:
    text = (label or "").lower()
    return Counter(text.split() if units == "word" else [text[i : i + 3] for i in range(len(text) - 2)])


def _jaccard(a: Counter[str], b: Counter[str]) -> float:
    return len(a.keys() & b.keys()) / max(1, len(a.keys() | b.keys()))


def _cosine(a: Counter[str], b: Counter[str]) -> float:
    size = np.sqrt(sum(n * n for n in a.values()) * sum(n * n for n in b.values()))
    return float(sum(n * b[unit] for unit, n in a.items()) / size) if size else 0.0


_SIMILARITIES: dict[str, Callable[[Counter[str], Counter[str]], float]] = {
    "jaccard": _jaccard,
    "cosine": _cosine,
}


def error_similarity(errors: pd.DataFrame, *, seed: int = 0) -> dict[str, Estimate]:
    """Return what `identifier_errors` found minus its random control, with intervals over errors.

    Returns:
        `distance` (characters; below 0 where wrong identifiers are nearer to the true one than to others),
        `jaccard` and `cosine` (above 0 where labels are similar); a value without errors is not known.

    Example:
        >>> import pandas as pd
        >>> import memlens as ml
        >>> labels, identifiers = ["red cat", "red dog", "old cow"], ["0012", "0013", "9999"]
        >>> items = pd.DataFrame({"label": labels, "identifier": identifiers})
        >>> errors = ml.detect.identifier_errors(items, ["0012", "0012", "0012"])
        >>> sorted(ml.detect.error_similarity(errors))
        ['cosine', 'distance', 'jaccard']
    """
    found = {}
    for name in ("distance", *_SIMILARITIES):
        gap = (errors[name] - errors[f"{name}_random"]).dropna().to_numpy(float)
        found[name] = mean_estimate(pd.Series(gap).to_xarray(), seed=seed) if len(gap) else Estimate.unknown()
    return found
