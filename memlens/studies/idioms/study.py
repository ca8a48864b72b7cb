"""The idiom study: how a model that recalls a fixed expression comes to its last word.

After Haviv et al., "Understanding Transformer Memorization Recall Through Idioms" (arXiv 2210.03588). The
method is theirs; matching, controls, intervals, tuned lens, facts from any file and identifiers are ours, and
every choice is a named parameter that the report lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from memlens.errors import ColumnError
from memlens.instruments.decode.lens import TunedLens, as_lens
from memlens.instruments.decode.lens_training import train_tuned_lens
from memlens.models.provenance import describe
from memlens.recall.criteria.options import CriteriaOptions
from memlens.recall.criteria.score import score_criteria
from memlens.recall.criteria.scores import IDIOM_FLAGS, CriteriaScores, calibrate_criteria
from memlens.recall.score import score_recall
from memlens.report.bibliography import Citation, family_citation
from memlens.report.model import FigureRequest, Finding
from memlens.results.statistics.agreement import RocArea, roc_area
from memlens.results.statistics.estimates import Estimate, share_estimate
from memlens.sequences.readers.idioms import DEFECTS, idiom_defects
from memlens.sequences.set import SequenceSet
from memlens.studies.idioms import findings as find
from memlens.studies.idioms.options import IdiomOptions
from memlens.studies.idioms.unfolding import IdiomContext, Unfolding
from memlens.studies.running import StudyDirectory, StudyRun

FREQUENCIES = ("copies", "frequency", "popularity")
"""Columns that say how often an item occurs in training text, in order of preference."""

_SUB_SCORES = (
    "id", "prompt", "target", "full_top1", "sufficient_suffix", "deletion_share", "crucial_word",
    "substitution_share", "lexical_leak", "max_similarity", "common_target", "context_share", "unigram_prob",
    "bigram_prob", "trigram_prob", "pmi",
)  # fmt: skip


def study_idioms(
    model: Any,
    sequences: SequenceSet,
    out: str | Path,
    *,
    text: SequenceSet | None = None,
    facts: SequenceSet | None = None,
    identifiers: SequenceSet | None = None,
    references: Sequence[Any] = (),
    lens: str | Path | TunedLens | None = None,
    train_lens: bool = False,
    options: IdiomOptions | None = None,
    title: str | None = None,
    command: str | None = None,
    progress: bool = True,
) -> StudyRun:
    """Study how fixed expressions are recalled, layer by layer, and write results and a report to a folder.

    1. Split: recalled items (the model's prediction is the target), others, and natural text; pairs matched
       on prompt length and final probability.
    2. Decoding over layers by the logit lens (after each layer, attention and MLP) and by a tuned lens.
    3. The two phases as numbers, and recalled items against their matched controls.
    4. Knock-outs of the most dominant neurons over layers x window, with random and norm-matched controls.
    5. The same for facts.
    6. Recall of identifiers against how often they occur.
    7. The recall criteria, where there are reference models.

    Args:
        model: A TransformerLens model.
        sequences: Fixed expressions whose last word is the target, as `load_sequences` reads the idiom file;
            only the first target token counts.
        out: The folder; results are saved there one by one. A second call with the same arguments resumes the
            knock-out grid where it stopped.
        text: Running natural text, for controls and for training the lens.
        facts: Cloze statements whose object is the target.
        identifiers: (label, identifier) pairs; the whole identifier is the continuation.
        references: Models (not this one) and `NgramReference` objects that the recall criteria ask.
        lens: A tuned lens or its folder.
        train_lens: Train one on `text` (kept in the folder `lens`) where none is given.
        options: See `IdiomOptions`.
        title: Heading of the report.
        command: The command line that repeats the run, for the report.
        progress: Show progress bars.

    Returns:
        The report's path, the findings, and what failed.

    Raises:
        EmptySetError, SequenceError, VocabularyError: The sequences do not fit, before any forward pass.
        ResultError: The lens is of another model.
        ColumnError: `leave_out` names a column that is not there.

    Example:
        >>> import memlens as ml, tempfile
        >>> model = ml.load_model("zoo/pythia-s")
        >>> seqs = ml.load_sequences("zoo", model)
        >>> run = ml.studies.study_idioms(model, seqs, tempfile.mkdtemp())  # doctest: +SKIP
        >>> run.report.name  # doctest: +SKIP
        'report.html'
    """
    chosen = options or IdiomOptions()
    given = {"idioms": sequences, "text": text, "facts": facts, "identifiers": identifiers}
    about = describe(model)
    settings = {
        "study": "idioms",
        **asdict(chosen),
        "model": about,
        **{name: dict(seqs.attrs) for name, seqs in given.items() if seqs is not None},
        "lens": "trained on the text" if lens is None and train_lens else str(lens or "none"),
    }
    for column in chosen.leave_out:
        if not any(column in seqs.table for seqs in (sequences, facts) if seqs is not None):
            raise ColumnError(f"leave_out names {column!r}, a column that neither idioms nor facts have.")
    own_lens = None if lens is None else as_lens(lens, model)
    title = title or find.TEXTS["title"].format(model=about["model"], n=len(sequences))
    summary = find.TEXTS.summary(model=about["model"], n=len(sequences))
    folder = StudyDirectory(out, title=title, summary=summary, settings=settings, command=command, fresh=True)
    folder.add_citations(
        Citation("haviv2023", "the study that this one follows"),
        *family_citation(str(about["family"]), str(about["model"])),
    )
    study = IdiomContext(model, folder, chosen, text, own_lens, references, progress)
    if own_lens is None and train_lens and text is not None:
        folder.step("training the tuned lens", lambda: _train_lens(study, text))
    _items(study, "idioms", sequences)
    if facts is not None:
        _items(study, "facts", facts)
    if identifiers is not None:
        folder.step("identifiers", lambda: _identifiers(study, identifiers))
    return folder.done()


def _train_lens(study: IdiomContext, text: SequenceSet) -> None:
    """Train a tuned lens on the natural text; it is saved with the results."""
    options, most = study.options, study.options.lens_window
    rows = [row[i : i + most] for row in text.rows() for i in range(0, len(row), most)]
    study.lens = train_tuned_lens(
        study.model,
        SequenceSet.from_tokens([row for row in rows if len(row) > 1], 1),
        steps=options.lens_steps,
        batch_size=options.lens_batch_size,
        seed=options.seed,
        progress=study.progress,
    )
    study.lens.save(study.folder.path / "lens")
    title = "Tuned lens: divergence from the model, held-out text"
    study.folder.add_table("lens_gain", study.lens.heldout_kl(), title=title)


def _items(study: IdiomContext, name: str, items: SequenceSet) -> None:
    """Parts 1 to 4 for one set of items, its recall by frequency, and its criteria."""
    if set(DEFECTS) <= set(items.table):
        study.table(name, "defects", idiom_defects(items))
    part = Unfolding(study, name, _without(items, study.options.leave_out))
    study.folder.step(name, part.run)
    if part.recall is None:
        return
    table = part.recall.table
    study.folder.step(f"{name}: frequency", lambda: _frequency(study, name, table))
    criteria = study.options.criteria
    if study.references and criteria is not None:
        study.folder.step(f"{name}: criteria", lambda: _criteria(study, part, table, criteria))


def _identifiers(study: IdiomContext, seqs: SequenceSet) -> None:
    """Part 6: whole identifiers, recalled or not, against how often their label is met."""
    metrics = ("likelihood", "near_verbatim")
    recall = score_recall(study.model, seqs, generate=False, metrics=metrics, progress=study.progress)
    recall.save(study.folder.path / "identifiers_recall.parquet")
    column = _frequency_column(recall.table)
    figure = FigureRequest({"group": column} if column else {})
    study.folder.add_result(
        "identifiers_recall", recall.to_result(), title="Identifiers recalled", figures=[figure]
    )
    columns = ["label", "identifier", column, "exact_match", "matching_prefix", "target_accuracy", "nll"]
    shown = recall.table.filter(items=[name for name in columns if name])
    study.folder.add_table("identifiers", shown, title="Every identifier", section="identifiers_recall")
    study.folder.find(find.recalled("identifiers", recall.table))
    _frequency(study, "identifiers", recall.table)


def _frequency(study: IdiomContext, name: str, table: pd.DataFrame) -> None:
    column = _frequency_column(table)
    if column is None:
        return
    found = find.recall_by_frequency(table, column)
    study.table(name, f"by_{column}", found, words="frequency", column=column)
    study.folder.find(find.rises_with_frequency(name, table, column, study.options.seed))


def _criteria(study: IdiomContext, part: Unfolding, table: pd.DataFrame, criteria: CriteriaOptions) -> None:
    """Part 7: score the criteria of the items, and of natural text, which the score should tell from them."""
    folder, name = study.folder, part.name
    score = partial(
        score_criteria, references=study.references, probed=study.model, options=criteria,
        progress=study.progress, tokenizer=getattr(study.model, "tokenizer", None),
    )  # fmt: skip
    scores = score(part.items)
    scores.save(folder.path / f"{name}_criteria_scores.parquet")
    folder.add_settings({f"{name}_criteria": dict(scores.settings)})
    study.table(name, "criteria", scores.table.filter(items=list(_SUB_SCORES)))
    passed = passing(scores, table["exact_match"].to_numpy(bool))
    study.table(name, "criteria_passed", passed)
    if {flag.removeprefix("not ") for flag in IDIOM_FLAGS.values()} <= set(scores.table):
        study.table(name, "calibration", calibrate_criteria(scores, seed=criteria.seed))
    area, natural = None, part.natural
    if natural is not None and {"prompt", "target"} <= set(natural.table):
        whole = natural.table["target"].str.split().str.len().to_numpy() == 1
        area = _area(scores, score(natural[np.flatnonzero(whole)]))
    folder.find(_criteria_finding(name, passed, area, scores))


def _without(items: SequenceSet, columns: Sequence[str]) -> SequenceSet:
    """Leave out the items for which one of the columns that the table has is true."""
    out = np.zeros(len(items), dtype=bool)
    for column in columns:
        if column in items.table:
            out |= items.table[column].to_numpy(bool)
    return items[np.flatnonzero(~out)].with_attrs(left_out=int(out.sum())) if out.any() else items


def _frequency_column(table: pd.DataFrame) -> str | None:
    return next((name for name in FREQUENCIES if name in table and len(set(table[name])) > 1), None)


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
        share, hits = share_estimate(chosen), share_estimate(recalled[chosen])
        row = {"criterion": criterion, **share.row("share", n="items")}
        row |= {**hits.row("recalled", prefix="recalled_", n=None), "passed": int(chosen.sum())}
        rows.append(row)
    frame = pd.DataFrame(rows)
    frame.insert(2, "passed", frame.pop("passed"))
    return frame


def _area(items: CriteriaScores, natural: CriteriaScores) -> RocArea:
    """How well the score tells the items (those that were planted, where that is known) from natural text."""
    positive = items.score()
    if "copies" in items.table:
        positive = positive[items.table["copies"].to_numpy() > 0]
    negative = natural.score()
    label = np.arange(len(positive) + len(negative)) < len(positive)
    return roc_area(np.concatenate([positive, negative]), label)


def _criteria_finding(
    name: str, passed: pd.DataFrame, area: RocArea | None, scores: CriteriaScores
) -> Finding:
    rows: Any = passed.set_index("criterion")
    strict = rows.loc["all and tested"]
    number, unit, about = Estimate.from_row(strict, "share", n="items"), f"share of {name}", ""
    if area is not None:
        number = Estimate(area.area, area.low, area.high, area.n_positive + area.n_negative)
        unit = "area under the ROC curve"
        about = f" The number says how well the score separates {name} from natural text."
    return find.finding(
        "criteria",
        name,
        number,
        control=f"{strict['recalled'] * strict['passed']:.0f}" if strict["passed"] else None,
        strict=int(strict["passed"]),
        n=int(strict["items"]),
        references=", ".join(scores.settings["references"]),
        passed=int(rows.loc["all", "passed"]),
        area=about,
        unit=unit,
    )
