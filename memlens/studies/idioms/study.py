"""The idiom study: how a model that recalls a fixed expression comes to its last word.

After Haviv et al., "Understanding Transformer Memorization Recall Through Idioms" (arXiv 2210.03588). The
method is theirs; matching, controls, intervals, tuned lens, facts from any file and identifiers are ours, and
every choice is a named parameter that the report lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from memlens.errors import ColumnError
from memlens.instruments.decode.lens import TunedLens, as_lens
from memlens.instruments.decode.lens_training import train_tuned_lens
from memlens.models.provenance import describe
from memlens.recall.criteria.score import score_criteria
from memlens.recall.criteria.scores import IDIOM_FLAGS, CriteriaScores, calibrate_criteria
from memlens.recall.score import score_recall
from memlens.report.bibliography import Citation, family_citation
from memlens.report.model import FigureRequest, Finding
from memlens.results.statistics.agreement import RocArea, roc_area
from memlens.results.statistics.estimates import Estimate, share_estimate
from memlens.sequences.natural import natural_controls
from memlens.sequences.readers.idioms import DEFECTS, idiom_defects
from memlens.sequences.set import SequenceSet
from memlens.studies.idioms import findings as find
from memlens.studies.idioms.options import IdiomOptions
from memlens.studies.idioms.unfolding import Unfolding
from memlens.studies.running import StudyDirectory, StudyRun

FREQUENCIES = ("copies", "frequency", "popularity")
"""Columns that say how often an item is met, in the order of preference."""

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
    2. Decoding over layers by the logit lens (after each block, attention and MLP) and by a tuned lens.
    3. The two phases as numbers, and recalled items against their matched controls.
    4. Knock-outs of the most dominant neurons over layers x window, with random and norm-matched controls.
    5. The same for facts.
    6. Recall of identifiers against how often they are met.
    7. The recall criteria, where there are reference models.

    Args:
        model: A TransformerLens model.
        sequences: Fixed expressions whose last word is the target, as `load_sequences` reads the idiom file;
            only the first target token counts.
        out: The folder; results are saved there one by one. A second call with the same arguments takes up
            the knock-out grid where it stopped.
        text: Running natural text, for controls and for training the lens.
        facts: Cloze statements whose object is the target.
        identifiers: (label, identifier) pairs; the whole identifier is the continuation.
        references: Models (not this one) and `NgramReference` objects that the recall criteria ask.
        lens: A tuned lens or its folder.
        train_lens: Train one on `text` (kept in the folder `lens`) where none is given.
        options: See `IdiomOptions`.
        title: Heading of the report.
        command: The command line that makes it again, for the report.
        progress: Show progress bars.

    Returns:
        The report's path, the findings, and what failed. A step that fails is named in the report and does
        not stop those that do not need it.

    Raises:
        EmptySetError, SequenceError, VocabularyError: The sequences do not fit; before any forward pass.
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
    folder = StudyDirectory(
        out,
        title=title or f"How {about['model']} recalls {len(sequences)} fixed expressions",
        settings=settings,
        command=command,
        fresh=True,
    )
    folder.add_citations(
        Citation("haviv2023", "the study that this one follows"),
        *family_citation(str(about["family"]), str(about["model"])),
    )
    study = _IdiomStudy(model, folder, chosen, text, own_lens, list(references), progress=progress)
    if own_lens is None and train_lens and text is not None:
        folder.step("training the tuned lens", study.train_lens)
    study.items("idioms", sequences)
    if facts is not None:
        study.items("facts", facts)
    if identifiers is not None:
        folder.step("identifiers", lambda: study.identifiers(identifiers))
    return folder.done()


class _IdiomStudy:
    def __init__(
        self,
        model: Any,
        folder: StudyDirectory,
        options: IdiomOptions,
        text: SequenceSet | None,
        lens: TunedLens | None,
        references: list[Any],
        *,
        progress: bool,
    ) -> None:
        self.model, self.folder, self.options, self.text = model, folder, options, text
        self.lens, self.references, self.progress = lens, references, progress

    def train_lens(self) -> None:
        """Train a tuned lens on the natural text; it is kept beside the results."""
        assert self.text is not None
        most = self.options.lens_window
        rows = [row[i : i + most] for row in self.text.rows() for i in range(0, len(row), most)]
        rows = [row for row in rows if len(row) > 1]
        self.lens = train_tuned_lens(
            self.model,
            SequenceSet.from_tokens(rows, 1),
            steps=self.options.lens_steps,
            batch_size=self.options.lens_batch_size,
            seed=self.options.seed,
            progress=self.progress,
        )
        self.lens.save(self.folder.path / "lens")
        self.folder.add_table(
            "lens_gain", self.lens.heldout_kl(), title="Tuned lens: divergence from the model, held-out text"
        )

    def items(self, name: str, items: SequenceSet) -> None:
        """Parts 1 to 4 for one set of items, its recall by frequency, and its criteria."""
        if set(DEFECTS) <= set(items.table):
            self.folder.add_table(
                f"{name}_defects", idiom_defects(items), title=f"{name.capitalize()}: defects of the file",
                section=f"{name}_recall",
            )  # fmt: skip
        items = _without(items, self.options.leave_out)
        part = Unfolding(
            self.model, name, items, self._natural(items), self.lens, self.folder, self.options,
            progress=self.progress,
        )  # fmt: skip
        self.folder.step(name, part.run)
        if part.recall is None:
            return
        table = part.recall.table
        self.folder.step(f"{name}: frequency", lambda: self._frequency(name, table))
        if self.references and self.options.criteria is not None:
            self.folder.step(f"{name}: criteria", lambda: self._criteria(name, part))

    def identifiers(self, seqs: SequenceSet) -> None:
        """Part 6: whole identifiers, recalled or not, against how often their label is met."""
        recall = score_recall(
            self.model, seqs, generate=False, metrics=("likelihood", "near_verbatim"), progress=self.progress
        )
        recall.save(self.folder.path / "identifiers_recall.parquet")
        column = _frequency_column(recall.table)
        figure = FigureRequest({"group": column} if column else {})
        self.folder.add_result(
            "identifiers_recall", recall.to_result(), title="Identifiers recalled", figures=[figure]
        )
        columns = ["label", "identifier", column, "exact_match", "matching_prefix", "target_accuracy", "nll"]
        shown = recall.table.filter(items=[name for name in columns if name])
        self.folder.add_table("identifiers", shown, title="Every identifier", section="identifiers_recall")
        self.folder.find(find.recalled("identifiers", recall.table))
        self._frequency("identifiers", recall.table)

    def _natural(self, items: SequenceSet) -> SequenceSet | None:
        if self.text is None:
            return None
        return natural_controls(
            self.text,
            items.first_targets(),
            tokenizer=getattr(self.model, "tokenizer", None),
            n=self.options.control_n,
            seed=self.options.seed,
        )

    def _frequency(self, name: str, table: pd.DataFrame) -> None:
        column = _frequency_column(table)
        if column is None:
            return
        found = find.recall_by_frequency(table, column)
        self.folder.add_table(
            f"{name}_by_{column}", found, title=f"{name.capitalize()}: recall by {column}",
            section=f"{name}_recall",
        )  # fmt: skip
        self.folder.find(find.rises_with_frequency(name, table, column, self.options.seed))

    def _criteria(self, name: str, part: Unfolding) -> None:
        """Part 7: score the criteria of the items, and of natural text to set the score against."""
        assert part.recall is not None
        assert self.options.criteria is not None
        folder, section, recall = self.folder, f"{name}_recall", part.recall.table
        options: dict[str, Any] = {
            "probed": self.model, "options": self.options.criteria, "progress": self.progress,
            "tokenizer": getattr(self.model, "tokenizer", None),
        }  # fmt: skip
        scores = score_criteria(part.items, self.references, **options)
        scores.save(folder.path / f"{name}_criteria_scores.parquet")
        folder.add_settings({f"{name}_criteria": dict(scores.settings)})
        title = f"{name.capitalize()}: sub-scores of the recall criteria"
        folder.add_table(
            f"{name}_criteria", scores.table.filter(items=list(_SUB_SCORES)), title=title, section=section
        )
        passed = passing(scores, recall["exact_match"].to_numpy(bool))
        note = (
            "tested: the references know the item, so that a part that suffices could be found; where they "
            "do not, it passes untested."
        )
        title = f"{name.capitalize()}: how many pass each criterion"
        folder.add_table(f"{name}_criteria_passed", passed, title=title, note=note, section=section)
        if {flag.removeprefix("not ") for flag in IDIOM_FLAGS.values()} <= set(scores.table):
            agreement = calibrate_criteria(scores, seed=self.options.criteria.seed)
            title = f"{name.capitalize()}: agreement of the criteria with the file's flags"
            folder.add_table(f"{name}_calibration", agreement, title=title, section=section)
        area, natural = None, part.natural
        if natural is not None and {"prompt", "target"} <= set(natural.table):
            whole = natural.table["target"].str.split().str.len().to_numpy() == 1
            chosen = natural[np.flatnonzero(whole)]
            area = _area(scores, score_criteria(chosen, self.references, **options))
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
        columns = {"criterion": criterion, **share.row("share", n="items")}
        rows.append(
            {**columns, **hits.row("recalled", prefix="recalled_", n=None), "passed": int(chosen.sum())}
        )
    order = [
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
    return pd.DataFrame(rows, columns=order)


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
    title, number, unit = (
        f"{name.capitalize()}: the recall criteria",
        Estimate.from_row(strict, "share", n="items"),
        f"share of {name}",
    )
    if area is not None:
        statement += f" The number says how well the score tells {name} from natural text."
        number = Estimate(area.area, area.low, area.high, area.n_positive + area.n_negative)
        unit = "area under the ROC curve"
    return Finding.of(title, statement, number, unit, control)
