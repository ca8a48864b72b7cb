"""`CriteriaScores`: the sub-scores of the two criteria, one row per sequence, and decisions from them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypedDict, Unpack

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from memlens.errors import ColumnError, OptionError, check_option, near_matches
from memlens.results.statistics.agreement import agreement

_SHOWN = ("id", "prompt", "target", "full_top1", "sufficient_suffix", "deletion_share", "context_share")


class Limits(TypedDict, total=False):
    """The thresholds of `CriteriaScores.violations`."""

    max_deletion: float
    max_substitution: float
    max_similarity: float


@dataclass(frozen=True, eq=False)
class CriteriaScores:
    """To what extent each sequence can only be recalled: sub-scores, and decisions at chosen thresholds.

    Attributes:
        table: One row per sequence: the given columns, then the sub-scores (see `score_criteria`).
        by_reference: One row per sequence and reference: the sub-scores of that reference alone.
        edits: One row per edited prompt: row, kind, prompt, the share of references that predict the target
            (`top1`), whether that is enough (`kept`), mean log-probability (`logprob`, nats).
        settings: Every option, the references' names and their numbers of forward passes.
    """

    table: pd.DataFrame
    by_reference: pd.DataFrame
    edits: pd.DataFrame
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.table)

    def violations(
        self, *, max_deletion: float = 0.0, max_substitution: float = 0.0, max_similarity: float = 0.75
    ) -> pd.DataFrame:
        """Return `id` and one column per kind of leak: whether the sequence has it.

        `suffix` (some last words suffice), `deletion` and `substitution` (more than the allowed share of
        edits keeps the target), `lexical`, `similar`, `common`. What was not measured is not a violation.

        Args:
            max_deletion: Share of single-word deletions that may keep the target.
            max_substitution: Share of substitutions that may keep the target.
            max_similarity: Highest allowed cosine between the target and a word of the prompt.

        Raises:
            OptionError: A share outside [0, 1].
        """
        for name, value in {"max_deletion": max_deletion, "max_substitution": max_substitution}.items():
            if not 0 <= value <= 1:
                raise OptionError(f"{name}={value} is not a share in [0, 1]")
        table = self.table
        columns = {
            "suffix": table["sufficient_suffix"].notna(),
            "deletion": table["deletion_share"] > max_deletion,
            "substitution": table["substitution_share"] > max_substitution,
            "lexical": table["lexical_leak"],
            "similar": table["max_similarity"] > max_similarity,
            "common": table["common_target"],
        }
        return pd.DataFrame({"id": table["id"], **columns})

    def passes(
        self,
        *,
        min_context: float = 0.9,
        min_corpus_share: float = 0.9,
        min_corpus_count: int = 5,
        min_known: float = 0.5,
        **limits: Unpack[Limits],
    ) -> pd.DataFrame:
        """Return `id` and one boolean column per criterion: whether no violation was found.

        - `irreducible`: no last words suffice, nor more than the allowed deletions and substitutions.
        - `no_leak`: the prompt contains neither the target or a form of it, nor a word too similar.
        - `single_target`: the target stays the prediction in at least `min_context` of the contexts (tested
          only for sequences that the references know), and in the corpus at least `min_corpus_share` of the
          prompt's occurrences are followed by it (tested only for `min_corpus_count` occurrences or more).
        - `uncommon_target`: a warning only; it is not part of `all`.
        - `tested`: at least the share `min_known` of the references predict the target from the whole prompt.
          **Where this is False, the references could not have found a violation of `irreducible` that depends
          on knowing the sequence, and contexts were not tested.**
        - `all`: irreducible, no leak and single target. For the strict reading take `all & tested`.

        The keywords `max_deletion`, `max_substitution` and `max_similarity` are those of `violations`.
        """
        found, table = self.violations(**limits), self.table
        known = table["full_top1"] >= min_known
        counted = table["corpus_count"] >= min_corpus_count
        wavers = known & (table["context_share"] < min_context)
        ambiguous = counted & (table["corpus_share"] < min_corpus_share)
        passed = {
            "irreducible": ~(found["suffix"] | found["deletion"] | found["substitution"]),
            "no_leak": ~(found["lexical"] | found["similar"]),
            "single_target": ~(wavers | ambiguous),
            "uncommon_target": ~found["common"],
            "tested": known,
        }
        every = passed["irreducible"] & passed["no_leak"] & passed["single_target"]
        return pd.DataFrame({"id": table["id"], **passed, "all": every})

    def score(self, *, part: str = "max") -> np.ndarray:
        """Return one number per sequence, in nats: what the whole prompt says and none of its parts does.

        S = mean over the bare prompt and the prompt in each context of log p(target | prompt), minus the
        largest (`part="max"`) or mean (`part="mean"`) log p(target | part) over all suffixes, deletions and
        substitutions; log p is the mean over references. High for sequences that the references know, in
        any context, and only as a whole; near 0 both for sequences of which a part suffices and for those
        that the references do not know. "max" is the definition (one sufficient part is enough), "mean" is
        less noisy. NaN for prompts of one word. Leaks and common targets are not part of it.

        Raises:
            OptionError: `part` is neither.
        """
        check_option("part", part, ["max", "mean"])
        return (self.table["whole_logprob"] - self.table[f"part_logprob_{part}"]).to_numpy(dtype=float)

    def to_frame(self) -> pd.DataFrame:
        """Return a copy of the table."""
        return self.table.copy()

    def save(self, path: str | Path) -> Path:
        """Write the table to a parquet file, with the settings in its metadata (key `memlens`, JSON).

        The edits are not in it; save them with `scores.edits.to_parquet(...)`.
        """
        from memlens.sequences.parquet import write_table

        return write_table(self.table, path, criteria=dict(self.settings))

    def __repr__(self) -> str:
        n = int(self.passes()["all"].to_numpy().sum())
        names = ", ".join(self.settings.get("references", []))
        return f"CriteriaScores({len(self)} sequences, {n} pass all criteria; references: {names})"

    def _repr_html_(self) -> str:
        head = self.table[[c for c in _SHOWN if c in self.table]].head(5)
        return f"<p><b>{escape(repr(self))}</b></p>{head.to_html(escape=True, index=False)}"


IDIOM_FLAGS: Mapping[str, str] = MappingProxyType(
    {
        "suffix": "prompt_comp_ind",
        "part": "prompt_comp_ind",
        "lexical": "similarity_ind",
        "similar": "similarity_ind",
        "leak": "similarity_ind",
        "common": "not frequent_target_ind",
        "guessable": "not hard_to_guess",
    }
)
"""The idiom file's flags and the decisions that correspond to them. `frequent_target_ind` is False for common
targets, despite its name."""


def calibrate_criteria(
    scores: CriteriaScores,
    flags: Mapping[str, str] | None = None,
    *,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
    **limits: Unpack[Limits],
) -> pd.DataFrame:
    """Return how well decisions agree with flags of the scored table: precision, recall, Cohen's kappa.

    Decisions are the columns of `CriteriaScores.violations` ("suffix", "deletion", "substitution",
    "lexical", "similar", "common"), and "part" (a suffix, or too many deletions or substitutions keep the
    target), "leak" (lexical or similar), "guessable" (a suffix suffices, or a leak: the opposite of the
    file's `hard_to_guess`), or any yes-or-no column of the table.

    Args:
        scores: What `score_criteria` returned for a table with the flags.
        flags: From a decision to a flag's column, with "not " in front if the flag means the opposite; by
            default `IDIOM_FLAGS`, those of the idiom file.
        level: Coverage of the intervals (bootstrap over sequences).
        n_resamples: Number of bootstrap resamples.
        seed: Seed of the bootstrap.
        **limits: `max_deletion`, `max_substitution`, `max_similarity`: see `CriteriaScores.violations`.

    Returns:
        One row per pair: `decision`, `flag`, and the columns of `memlens.results.statistics.agreement`.

    Raises:
        ColumnError: The table has no such flag, or there is no such decision.

    Source: ours; the flags are those of arXiv 2210.03588's data file.

    Example:
        >>> import pandas as pd
        >>> import memlens as ml
        >>> corpus = ["kick the bucket", "fill the glass", "break the glass", "a piece of cake", "of cake"]
        >>> frame = pd.DataFrame({"prompt": ["kick the", "a piece of"], "target": ["bucket", "cake"]})
        >>> reference = ml.recall.NgramReference(corpus, order=3)
        >>> scores = ml.recall.score_criteria(frame.assign(easy=[False, True]), reference, progress=False)
        >>> len(ml.recall.calibrate_criteria(scores, {"suffix": "easy"}, n_resamples=20))
        1
    """
    found = _decisions(scores, **limits)
    rows = []
    for decision, flag in (IDIOM_FLAGS if flags is None else flags).items():
        ours = _column(decision, found if decision in found else scores.table, [*found, *scores.table])
        theirs = _column(flag, scores.table, list(scores.table))
        numbers = agreement(ours, theirs, level=level, n_resamples=n_resamples, seed=seed)
        rows.append({"decision": decision, "flag": flag, **numbers})
    return pd.DataFrame(rows)


def _decisions(scores: CriteriaScores, **limits: Unpack[Limits]) -> pd.DataFrame:
    """Return `CriteriaScores.violations` and the decisions that combine them."""
    found = scores.violations(**limits).drop(columns="id")
    part = found["suffix"] | found["deletion"] | found["substitution"]
    leak = found["lexical"] | found["similar"]
    return found.assign(part=part, leak=leak, guessable=found["suffix"] | leak)


def _column(name: str, table: pd.DataFrame, known: list[Any]) -> np.ndarray:
    bare = name.removeprefix("not ")
    if bare not in table:
        raise ColumnError(f"there is no column {bare!r} to compare.{near_matches(bare, map(str, known))}")
    values = table[bare].to_numpy().astype(bool)
    return ~values if bare != name else values


PARTS = ("suffix", "deletion", "substitution")
CONTEXTS = ("neutral", "shifted")

Answers = Float[np.ndarray, "reference edit"]


def mean_over_references(values: Answers) -> Float[np.ndarray, "edit"]:
    """Return the mean over the references that could be asked; NaN if none could."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0.0).sum(0) / known.sum(0)


def keeps(
    edits: pd.DataFrame, top1: Answers, logprob: Answers, *, least: int, threshold: float | None
) -> Float[np.ndarray, "edit"]:
    """Return 1 where at least `least` references still give the target, else 0; NaN where none was asked.

    A reference gives the target if it is its prediction; or, after a part of the prompt (suffix, deletion,
    substitution) and with a `threshold`, if the target is more likely than that.
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
    """Return the sub-scores that depend on which edits keep the target: shares, and fewest last words."""
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
    """Return the answers to the whole prompt and to each suffix, and the word that matters most."""
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
    """Return the terms of `CriteriaScores.score`, in nats."""
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
