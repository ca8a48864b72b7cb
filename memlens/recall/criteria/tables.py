"""From the answers to every edited prompt to sub-scores, one value a sequence."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

PARTS = ("suffix", "deletion", "substitution")
CONTEXTS = ("neutral", "shifted")

Answers = Float[np.ndarray, "reference edit"]


def mean_over_references(values: Answers) -> Float[np.ndarray, "edit"]:
    """Return the mean over the references that could be asked; NaN where none could."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0.0).sum(0) / known.sum(0)


def keeps(
    edits: pd.DataFrame, top1: Answers, logprob: Answers, *, least: int, threshold: float | None
) -> Float[np.ndarray, "edit"]:
    """Return 1 where at least `least` references still give the target, else 0; NaN where none was asked.

    A reference gives the target where it is its prediction; after a part of the prompt (suffix, deletion,
    substitution), where `threshold` is a number, where the target is more likely than that.
    """
    gives = top1 == 1
    if threshold is not None:
        likely = np.nan_to_num(logprob, nan=-np.inf) > np.log(threshold)
        gives = np.where(edits["kind"].isin(PARTS).to_numpy(), likely, gives)
    return np.where(np.isfinite(top1).any(0), gives.sum(0) >= least, np.nan)


def edit_share(edits: pd.DataFrame, values: np.ndarray, kinds: Collection[str], n: int) -> np.ndarray:
    """Return `[n]`: the mean of `values` over each row's edits of these kinds, NaN skipped."""
    used = edits["kind"].isin(list(kinds)).to_numpy() & np.isfinite(values)
    rows = edits["row"].to_numpy(dtype=np.int64)[used]
    with np.errstate(invalid="ignore"):
        return np.bincount(rows, values[used], n) / np.bincount(rows, minlength=n)


def part_columns(edits: pd.DataFrame, kept: np.ndarray, n: int) -> dict[str, np.ndarray]:
    """Return what follows from which edits keep the target: the shares, and the fewest last words."""
    suffixes = ((edits["kind"] == "suffix") & (kept == 1)).to_numpy()
    rows, words = edits["row"].to_numpy(dtype=np.int64), edits["index"].to_numpy(dtype=float)
    return {
        "sufficient_suffix": -_largest(rows[suffixes], -words[suffixes], n),
        "deletion_share": edit_share(edits, kept, ["deletion"], n),
        "substitution_share": edit_share(edits, kept, ["substitution"], n),
        "context_share": edit_share(edits, kept, CONTEXTS, n),
        "neutral_share": edit_share(edits, kept, ["neutral"], n),
        "shifted_share": edit_share(edits, kept, ["shifted"], n),
    }


def answer_columns(
    edits: pd.DataFrame, top1: Answers, logprob: Answers, n: int, max_suffix: int
) -> dict[str, np.ndarray]:
    """Return what is said of the whole prompt and of each suffix, and the word that counts most."""
    share, mean = mean_over_references(top1), mean_over_references(logprob)
    probability = mean_over_references(np.exp(logprob))
    columns = {
        "full_top1": edit_share(edits, share, ["full"], n),
        "full_logprob": edit_share(edits, mean, ["full"], n),
    }
    for k in range(1, max_suffix + 1):
        of_k = edits.assign(kind=edits["kind"].where(edits["index"] == k, ""))
        columns[f"suffix_{k}"] = edit_share(of_k, share, ["suffix"], n)
        columns[f"suffix_{k}_prob"] = edit_share(of_k, probability, ["suffix"], n)
    return columns | _crucial(edits, mean, columns["full_logprob"])


def _crucial(edits: pd.DataFrame, mean: np.ndarray, full: np.ndarray) -> dict[str, np.ndarray]:
    used: Bool[np.ndarray, "edit"] = (edits["kind"] == "deletion").to_numpy() & np.isfinite(mean)
    cut = edits[used].assign(effect=mean[used] - full[edits["row"].to_numpy(dtype=np.int64)[used]])
    worst = cut.loc[cut.groupby("row")["effect"].idxmin()].set_index("row").reindex(range(len(full)))
    return {
        "crucial_word": worst["word"].fillna("").to_numpy(dtype=object),
        "crucial_place": worst["index"].to_numpy(dtype=float),
        "crucial_effect": worst["effect"].to_numpy(dtype=float),
    }


def logprob_columns(edits: pd.DataFrame, logprob: Answers, n: int) -> dict[str, np.ndarray]:
    """Return what `CriteriaScores.score` is made of, in nats."""
    mean = mean_over_references(logprob)
    parts = edits["kind"].isin(PARTS).to_numpy() & np.isfinite(mean)
    rows = edits["row"].to_numpy(dtype=np.int64)[parts]
    return {
        "whole_logprob": edit_share(edits, mean, ("full", *CONTEXTS), n),
        "part_logprob_max": _largest(rows, mean[parts], n),
        "part_logprob_mean": edit_share(edits, mean, PARTS, n),
    }


def _largest(rows: np.ndarray, values: np.ndarray, n: int) -> Float[np.ndarray, "row"]:
    """Return each row's largest value, NaN where a row has none."""
    largest = np.full(n, -np.inf)
    np.maximum.at(largest, rows, values)
    return np.where(np.isneginf(largest), np.nan, largest)
