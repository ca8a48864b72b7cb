"""How frequent the tokens of memorized sequences are: by position, at the boundary, and as a threshold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool, Float, Int

from memlens.errors import ResultError
from memlens.results.kinds import register_kind
from memlens.results.plots.layers import plot_recall
from memlens.results.readings import read_frequency
from memlens.results.result import Result
from memlens.results.statistics.agreement import roc_area
from memlens.results.statistics.estimates import Estimate, mean_estimate
from memlens.results.statistics.intervals import mean_interval
from memlens.sequences.set import SequenceSet
from memlens.studies.comparative.analyze.rates import drawn_estimate

BUCKETS = ("M = 1", "M about 0.5", "M = 0")


def token_frequencies(seqs: SequenceSet, counts: Int[np.ndarray, " vocab"], counted_in: str) -> Result:
    """Return how frequent each token of each sequence is in a corpus, by position relative to the boundary.

    Args:
        seqs: The sequences.
        counts: How often each token id occurs in the corpus.
        counted_in: Which corpus, for the record.

    Returns:
        Kind "token_frequency": `per_million` `(sequence, offset)`: occurrences per million tokens. Offset 0
        is the first continuation token, -1 the last token of the prompt; NaN outside a sequence.

    Raises:
        ResultError: A token id has no count.
    """
    largest = int(seqs.tokens.max())
    if largest >= len(counts):
        raise ResultError(f"token id {largest} has no count: {len(counts)} ids are counted in {counted_in}.")
    scale = 1e6 / max(float(counts.sum()), 1.0)
    before, after = int(seqs.prefix_len.max()), seqs.max_targets
    values = np.full((len(seqs), before + after), np.nan, dtype=np.float32)
    for i, (row, prefix) in enumerate(zip(seqs.rows(), seqs.prefix_len.tolist(), strict=True)):
        values[i, before - prefix : before - prefix + len(row)] = counts[row] * scale
    coords: dict[str, Any] = {"sequence": np.array(seqs.ids), "offset": np.arange(-before, after)}
    data = xr.Dataset({"per_million": (("sequence", "offset"), values)}, coords)
    settings = {"counted_in": counted_in, "tokens_counted": int(counts.sum())}
    return Result.create(data, kind="token_frequency", settings=settings)


def bucket_labels(scores: Float[np.ndarray, " seq"], half_width: float = 0.1) -> np.ndarray:
    """Return the bucket of each memorization score; "" for those in none.

    >>> bucket_labels(np.array([1.0, 0.45, 0.0, 0.2])).tolist()
    ['M = 1', 'M about 0.5', 'M = 0', '']
    """
    found = (scores == 1, np.abs(scores - 0.5) <= half_width + 1e-9, scores == 0)
    return np.select(found, np.array(BUCKETS, dtype=object), "")


def frequency_by_offset(result: Result, buckets: np.ndarray, seed: int = 0) -> pd.DataFrame:
    """Return the mean token frequency at each position, in each bucket.

    Returns:
        Columns `bucket`, `offset`, `n`, `mean`, `low`, `high` (occurrences per million; bootstrap over
        sequences). Buckets without sequences are left out.
    """
    rows = []
    for bucket, part in _parts(result, buckets):
        found = mean_interval(part, method="bootstrap", n_resamples=500, seed=seed)
        for i, offset in enumerate(part["offset"].values.tolist()):
            rows.append({"bucket": bucket, "offset": offset, **Estimate.of(found[:, i]).row("mean")})
    return pd.DataFrame(rows)


def boundary_table(result: Result, buckets: np.ndarray, seed: int = 0) -> pd.DataFrame:
    """Return how the token frequency changes at the first continuation token, in each bucket.

    Returns:
        Columns `bucket`, `n`, `prefix` (mean over the prompt), `last` (its last token), `first` (the first
        continuation token), `continuation` (mean), in occurrences per million; `change` = first - prefix,
        within each sequence, with `low` and `high` (bootstrap over sequences); `counted_in` (the corpus).
    """
    rows = []
    for bucket, part in _parts(result, buckets):
        offsets = part["offset"].values
        means = {
            "prefix": part.isel(offset=offsets < 0).mean("offset"),
            "last": part.sel(offset=-1),
            "first": part.sel(offset=0),
            "continuation": part.isel(offset=offsets >= 0).mean("offset"),
        }
        numbers = {name: float(array.mean()) for name, array in means.items()}
        change = mean_estimate(means["first"] - means["prefix"], seed=seed).row("change")
        rows.append({"bucket": bucket, **numbers, **change, "counted_in": result.settings["counted_in"]})
    return pd.DataFrame(rows)


def _parts(result: Result, buckets: np.ndarray) -> list[tuple[str, xr.DataArray]]:
    """Return the frequencies of each bucket that has sequences."""
    array = result["per_million"]
    return [(name, array.isel(sequence=buckets == name)) for name in BUCKETS if (buckets == name).any()]


def boundary_gap(result: Result, buckets: np.ndarray, seed: int = 0) -> Estimate:
    """Return the change of frequency at the boundary of M = 1 sequences minus that of M = 0 ones.

    The change is the first continuation token minus the mean of the prompt, in occurrences per million;
    bootstrap over sequences, each bucket on its own. NaN where a bucket has fewer than two.
    """
    array = result["per_million"]
    change = (array.sel(offset=0) - array.isel(offset=array["offset"].values < 0).mean("offset")).values
    ours, theirs = (change[buckets == bucket] for bucket in (BUCKETS[0], BUCKETS[2]))
    n, rng = len(ours) + len(theirs), np.random.default_rng(seed)
    if min(len(ours), len(theirs)) < 2:
        return Estimate.unknown(n)
    first, second = (part[rng.integers(0, len(part), (2000, len(part)))].mean(1) for part in (ours, theirs))
    return drawn_estimate(float(ours.mean() - theirs.mean()), first - second, n)


def mean_log_frequencies(result: Result) -> Float[np.ndarray, " seq"]:
    """Return each sequence's mean of log10(1 + occurrences per million), over prompt and continuation."""
    return np.nanmean(np.log10(1 + result["per_million"].values.astype(float)), axis=1)


def youden(score: Float[np.ndarray, " seq"], label: Bool[np.ndarray, " seq"]) -> tuple[float, float, float]:
    """Return the cut with the largest Youden's J = sensitivity + specificity - 1.

    A sequence is classified as positive where its score is at least the cut.

    Returns:
        The cut (a value that occurs), sensitivity and specificity there; the first of equally good cuts.

    >>> youden(np.array([1.0, 2.0, 3.0, 4.0]), np.array([False, False, True, True]))
    (3.0, 1.0, 1.0)
    """
    cuts = np.unique(score)
    positive, negative = np.sort(score[label]), np.sort(score[~label])
    sensitivity = 1 - np.searchsorted(positive, cuts, "left") / len(positive)
    specificity = np.searchsorted(negative, cuts, "left") / len(negative)
    best = int(np.argmax(sensitivity + specificity))
    return float(cuts[best]), float(sensitivity[best]), float(specificity[best])


def frequency_threshold(
    frequency: Float[np.ndarray, " seq"],
    scores: Float[np.ndarray, " seq"],
    domains: np.ndarray,
    below: float = 0.5,
) -> pd.DataFrame:
    """Return the frequency that best separates memorized (M = 1) from unmemorized (M < `below`) sequences.

    Where the area is under 1/2, memorized sequences are the *less* frequent ones, and the cut is taken from
    that side. With several domains a second row compares within domains: each domain's mean is subtracted, so
    that the domains themselves are not what is separated (the cut is relative to that mean).

    Args:
        frequency: Mean log10 frequency of each sequence.
        scores: M of each.
        domains: Its domain.
        below: Unmemorized are those under it.

    Returns:
        Columns `comparison` ("all", "inside domains"), `area`, `low`, `high` (DeLong), `more_frequent`
        (whether memorized is the more frequent side), `threshold`, `sensitivity`, `specificity`, `youden`,
        `memorized`, `unmemorized`. Empty where one of the groups is.
    """
    chosen = (scores == 1) | (scores < below)
    label = scores[chosen] == 1
    if label.all() or not label.any():
        return pd.DataFrame()
    values, groups = pd.Series(frequency[chosen]), domains[chosen].astype(str)
    compared = {"all": values}
    if len(set(groups)) > 1:
        compared["inside domains"] = values - values.groupby(groups).transform("mean")
    rows = []
    for comparison, part in compared.items():
        area = roc_area(part, label)
        sign = 1.0 if area.area >= 0.5 else -1.0
        cut, sensitivity, specificity = youden(sign * part.to_numpy(), label)
        rows.append(
            {
                "comparison": comparison, "area": area.area, "low": area.low, "high": area.high,
                "more_frequent": sign > 0, "threshold": sign * cut, "sensitivity": sensitivity,
                "specificity": specificity, "youden": sensitivity + specificity - 1,
                "memorized": area.n_positive, "unmemorized": area.n_negative,
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


register_kind("token_frequency", plot=plot_recall, reading=read_frequency)
