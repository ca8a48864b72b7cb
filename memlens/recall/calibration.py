"""`calibrate_criteria`: do our tests of the criteria agree with flags that somebody else set?"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd

from memlens.errors import ColumnError, near_matches
from memlens.recall.criteria_scores import CriteriaScores
from memlens.results.agreement import agreement

__all__ = ["IDIOM_FLAGS", "calibrate_criteria"]

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
"""The idiom file's flags and the decisions that stand for them. `frequent_target_ind` is False for common
targets, against its name."""


def calibrate_criteria(
    scores: CriteriaScores,
    flags: Mapping[str, str] | None = None,
    *,
    max_deletion: float = 0.0,
    max_substitution: float = 0.0,
    max_similarity: float = 0.75,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Return how well decisions agree with flags of the scored table: precision, recall, Cohen's kappa.

    Decisions are the columns of `CriteriaScores.violations` ("suffix", "deletion", "substitution",
    "lexical", "similar", "common"), and "part" (a suffix, or too many deletions or substitutions keep the
    target), "leak" (lexical or similar), "guessable" (a suffix suffices, or a leak: what the file's
    `hard_to_guess` denies), or any yes-or-no column of the table.

    Args:
        scores: What `score_criteria` gave, of a table with the flags.
        flags: From a decision to a flag's column, with "not " in front where the flag says the opposite; by
            default `IDIOM_FLAGS`, those of the idiom file.
        max_deletion: See `CriteriaScores.violations`.
        max_substitution: See `CriteriaScores.violations`.
        max_similarity: See `CriteriaScores.violations`.
        level: Coverage of the intervals (bootstrap over sequences).
        n_resamples: Of the bootstrap.
        seed: Of the bootstrap.

    Returns:
        One row a pair: `decision`, `flag`, and the columns of `agreement` in `memlens.results.agreement`.

    Raises:
        ColumnError: The table has no such flag, or there is no such decision.

    Source: ours; the flags are those of arXiv 2210.03588's data file.
    """
    found = decisions(
        scores, max_deletion=max_deletion, max_substitution=max_substitution, max_similarity=max_similarity
    )
    rows = []
    for decision, flag in (IDIOM_FLAGS if flags is None else flags).items():
        ours = _column(decision, found if decision in found else scores.table, [*found, *scores.table])
        theirs = _column(flag, scores.table, list(scores.table))
        numbers = agreement(ours, theirs, level=level, n_resamples=n_resamples, seed=seed)
        rows.append({"decision": decision, "flag": flag, **numbers})
    return pd.DataFrame(rows)


def decisions(scores: CriteriaScores, **thresholds: float) -> pd.DataFrame:
    """Return `CriteriaScores.violations` and what `calibrate_criteria` makes of them."""
    found = scores.violations(**thresholds).drop(columns="id")
    part = found["suffix"] | found["deletion"] | found["substitution"]
    leak = found["lexical"] | found["similar"]
    return found.assign(part=part, leak=leak, guessable=found["suffix"] | leak)


def _column(name: str, table: pd.DataFrame, known: list[Any]) -> np.ndarray:
    bare = name.removeprefix("not ")
    if bare not in table:
        raise ColumnError(f"there is no column {bare!r} to compare.{near_matches(bare, map(str, known))}")
    values = table[bare].to_numpy().astype(bool)
    return ~values if bare != name else values
