"""The recall criteria in the idiom study: which items could only be recalled, and which of them are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from memlens.recall.criteria.score import CriteriaOptions, score_criteria
from memlens.recall.criteria.scores import IDIOM_FLAGS, CriteriaScores, calibrate_criteria
from memlens.report.model import Finding
from memlens.results.statistics.agreement import RocArea, roc_area
from memlens.sequences.set import SequenceSet
from memlens.studies.idioms.findings import share_of
from memlens.studies.running import StudyDirectory

_SUB_SCORES = (
    "id", "prompt", "target", "full_top1", "sufficient_suffix", "deletion_share", "crucial_word",
    "substitution_share", "lexical_leak", "max_similarity", "common_target", "context_share", "unigram_prob",
    "bigram_prob", "trigram_prob", "pmi",
)  # fmt: skip


def study_criteria(
    folder: StudyDirectory,
    name: str,
    items: SequenceSet,
    recalled: np.ndarray,
    natural: SequenceSet | None,
    references: Sequence[Any],
    probed: Any,
    *,
    criteria: CriteriaOptions,
    progress: bool,
) -> None:
    """Score the criteria of items and of natural text; add tables and findings to the folder.

    Args:
        folder: Where they go.
        name: Of the items, such as "idioms".
        items: With the columns `prompt` and `target`, or of tokens of the probed model.
        recalled: Whether the probed model recalls each.
        natural: Prompts from natural text, to set the score against; None leaves the ROC area out.
        references: What the criteria ask; not the probed model.
        probed: The model that is studied.
        criteria: How they are tested.
        progress: Show progress bars.
    """
    options: dict[str, Any] = {
        "probed": probed,
        "options": criteria,
        "tokenizer": getattr(probed, "tokenizer", None),
        "progress": progress,
    }
    scores = score_criteria(items, references, **options)
    scores.save(folder.path / f"{name}_criteria_scores.parquet")
    folder.add_settings({f"{name}_criteria": dict(scores.settings)})
    section = f"{name}_recall"
    title = f"{name.capitalize()}: sub-scores of the recall criteria"
    folder.add_table(
        f"{name}_criteria", scores.table.filter(items=list(_SUB_SCORES)), title=title, section=section
    )
    passed = passing(scores, recalled)
    note = (
        "tested: the references know the item, so that a part that suffices could be found; where they do "
        "not, it passes untested."
    )
    title = f"{name.capitalize()}: how many pass each criterion"
    folder.add_table(f"{name}_criteria_passed", passed, title=title, note=note, section=section)
    if {flag.removeprefix("not ") for flag in IDIOM_FLAGS.values()} <= set(scores.table):
        agreement = calibrate_criteria(scores, seed=criteria.seed)
        title = f"{name.capitalize()}: agreement of the criteria with the file's flags"
        folder.add_table(f"{name}_calibration", agreement, title=title, section=section)
    area = None
    if natural is not None and {"prompt", "target"} <= set(natural.table):
        whole = natural.table["target"].str.split().str.len().to_numpy() == 1
        area = _area(scores, score_criteria(natural[np.flatnonzero(whole)], references, **options))
    folder.find(_finding(name, passed, area, scores))


def passing(scores: CriteriaScores, recalled: np.ndarray) -> pd.DataFrame:
    """Return how many items pass each criterion, and how many of these are recalled.

    Returns:
        Columns `criterion`, `items`, `passed` (a count), `share`, `low`, `high` (Wilson, 95 %), and of those
        that pass `recalled`, `recalled_low`, `recalled_high`.
    """
    table = scores.passes().drop(columns="id").astype(bool)
    table["all and tested"] = table["all"] & table["tested"]
    rows = []
    for criterion in table.columns:
        chosen = table[criterion].to_numpy(bool)
        share, hits = share_of(chosen), share_of(recalled[chosen])
        rows.append(
            (
                criterion,
                share.n,
                int(chosen.sum()),
                share.value,
                share.low,
                share.high,
                hits.value,
                hits.low,
                hits.high,
            )
        )
    columns = [
        "criterion",
        "items",
        "passed",
        "share",
        "low",
        "high",
        "recalled",
        "recalled_low",
        "recalled_high",
    ]
    return pd.DataFrame(rows, columns=columns)


def _area(items: CriteriaScores, natural: CriteriaScores) -> RocArea:
    """How well the score tells the items (those that were planted, where that is known) from natural text."""
    positive = items.score()
    if "copies" in items.table:
        positive = positive[items.table["copies"].to_numpy() > 0]
    negative = natural.score()
    label = np.arange(len(positive) + len(negative)) < len(positive)
    return roc_area(np.concatenate([positive, negative]), label)


def _finding(name: str, passed: pd.DataFrame, area: RocArea | None, scores: CriteriaScores) -> Finding:
    rows = passed.set_index("criterion")
    strict, references = rows.loc["all and tested"], ", ".join(scores.settings["references"])
    statement = (
        f"{int(strict['passed'])} of {int(strict['items'])} {name} pass every criterion and are known to the "
        f"references ({references}), so that a part that suffices could have been found; "
        f"{int(rows.loc['all', 'passed'])} pass tested or not."
    )
    control = None
    if strict["passed"]:
        control = (
            f"of those that pass and are tested {strict['recalled']:.3g} are recalled by the studied model"
        )
    if area is None:
        return Finding(
            f"{name.capitalize()}: the recall criteria", statement, strict["share"], strict["low"],
            strict["high"], f"share of {name}", int(strict["items"]), control,
        )  # fmt: skip
    statement += f" The number says how well the score tells {name} from natural text."
    return Finding(
        f"{name.capitalize()}: the recall criteria", statement, area.area, area.low, area.high,
        "area under the ROC curve", area.n_positive + area.n_negative, control,
    )  # fmt: skip
