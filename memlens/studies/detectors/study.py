"""The detectors, side by side: what each tells of recall beyond copies and other confounds.

Recalled sequences are compared with matched ones that are not recalled, and, where the copies in the training
corpus are known, recalled with other sequences of the same number of copies. Every score is out of fold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from memlens import figures
from memlens.errors import MemlensError
from memlens.instruments.detect.attention import STATISTICS as ATTENTION
from memlens.instruments.detect.attention import (
    attention_by_class,
    attention_statistics,
    class_differences,
)
from memlens.instruments.detect.behaviour import behaviour_neurons, projection
from memlens.instruments.detect.beyond import BeyondOptions, beyond_confounds
from memlens.instruments.detect.buckets import popularity_buckets
from memlens.instruments.detect.confounds import confounds
from memlens.instruments.detect.dimension import DimensionOptions, local_dimension
from memlens.instruments.detect.exposure import exposure
from memlens.instruments.detect.groups import MATCHED, RECALLED, Groups
from memlens.instruments.detect.invariance import prediction_invariance
from memlens.instruments.detect.separation import ACTIVATIONS, separating_neurons, separation
from memlens.instruments.tasks.tasks import ChoiceTask
from memlens.models.provenance import describe
from memlens.recall.scores import RecallScores
from memlens.recall.taxonomy import CLASSES, recall_classes
from memlens.report.bibliography import Citation
from memlens.results.groups import join_groups
from memlens.results.result import Result
from memlens.results.statistics.comparison import compare_groups
from memlens.sequences.checks import check_sequences
from memlens.sequences.set import SequenceSet
from memlens.studies.detectors import causal
from memlens.studies.detectors import findings as find
from memlens.studies.detectors.causal import Detecting
from memlens.studies.detectors.options import DetectorOptions
from memlens.studies.running import StudyDirectory, StudyRun, matched_with


def study_detectors(
    model: Any,
    sequences: SequenceSet,
    out: str | Path,
    *,
    canaries: SequenceSet | None = None,
    slots: Sequence[Sequence[int]] = (),
    tasks: Sequence[ChoiceTask] = (),
    text: SequenceSet | None = None,
    options: DetectorOptions | None = None,
    command: str | None = None,
    progress: bool = True,
) -> StudyRun:
    """Run every detector on a model and sequences, and write results and report to a folder.

    1. Recall, and whether it is a guess or a recollection.
    2. Separation by neurons and probes, of all recalled from matched sequences, and inside equal copies.
    3. Behaviour neurons found on one half, and steering along them on the other.
    4. Local intrinsic dimension.
    5. Attention statistics.
    6. Attention by class of the guess-or-recall taxonomy, also among equal copies and domains.
    7. Neurons that tell recalling from answering new questions, tested on matched sequences; steering.
    8. K-FAC curvature: what is left with the directions of large curvature.
    9. The modular view: how many neurons carry half of the effect, and which domains share them.
    10. In context or in weights, by ablation and by patching.
    11. Exposure and prediction invariance of the canaries.
    12. All scores side by side: what each adds to the confounds, and to the confounds and copies.

    A part whose input is missing (tasks, text, canaries, the column of `modules_by`) is left out.

    Args:
        model: A TransformerLens model.
        sequences: What it may have memorized, with a column `copies` where they are known.
        out: The folder; results are saved there one by one. A second call with the same arguments resumes the
            sweeps of dose curves and curvature.
        canaries: Secrets of one format, such as identifiers.
        slots: Their format; see `memlens.detect.exposure`.
        tasks: What steering and edits may cost; their answered questions are what recalling is set against.
        text: General text for the curvature, without the sequences; at least two.
        options: See `DetectorOptions`.
        command: The command line that repeats the run, for the report.
        progress: Show progress bars.

    Returns:
        The report's path, the findings, and what failed.

    Raises:
        EmptySetError, SequenceError, VocabularyError: The sequences do not fit, before any forward pass.

    Example:
        >>> import memlens as ml, tempfile
        >>> model = ml.load_model("zoo/pythia-s")
        >>> seqs = ml.load_sequences("zoo", model)
        >>> run = ml.studies.study_detectors(model, seqs, tempfile.mkdtemp())  # doctest: +SKIP
        >>> run.report.name  # doctest: +SKIP
        'report.html'
    """
    check_sequences(sequences, model)
    for given in (canaries, text):
        if given is not None:
            check_sequences(given, model)
    options, about = options or DetectorOptions(), describe(model)
    settings = {"study": "detectors", **asdict(options), "model": about, "sequences": dict(sequences.attrs)}
    title = find.TEXTS["title"].format(model=about["model"], n=len(sequences))
    summary = find.TEXTS.summary(model=about["model"], n=len(sequences))
    folder = StudyDirectory(out, title=title, summary=summary, settings=settings, command=command, fresh=True)
    return _Detectors(model, folder, options, progress).run(sequences, canaries, slots, tasks, text)


class _Detectors(Detecting):
    def run(
        self,
        seqs: SequenceSet,
        canaries: SequenceSet | None,
        slots: Sequence[Sequence[int]],
        tasks: Sequence[ChoiceTask],
        text: SequenceSet | None,
    ) -> StudyRun:
        with self.folder.timed("recall"):
            recall = self.folder.scored("recall", self.model, seqs, progress=self.progress)
            groups = self._keep_recall(recall)
        if groups is not None:
            self._compare(recall, groups, tasks)
            self.folder.step("attention by class", partial(self._attend_by_class, recall))
            self._change(groups, tasks, text)
        if canaries is not None and slots:
            few = self.few(canaries, self.options.max_canaries)
            self.folder.step("exposure", partial(self._expose, few, slots))
        if canaries is not None:
            few = self.few(canaries, self.options.max_canaries)
            self.folder.step("prediction invariance", partial(self._vary, few))
        return self.folder.done()

    def _keep_recall(self, recall: RecallScores) -> Groups | None:
        recall.save(self.folder.path / "recall.parquet")
        self.folder.add_result("recall", recall.to_result(), title="What is recalled")
        classes = recall_classes(recall.table)
        self.folder.find(find.recalled(classes))
        copies = (
            recall.table["copies"].to_numpy() if "copies" in recall.table else np.zeros(len(classes), int)
        )
        counts = pd.crosstab(copies, classes, rownames=["copies"])
        table = counts.reindex(columns=list(CLASSES[:3]), fill_value=0).reset_index()
        self.folder.add_table("classes", table, title="Guess or recall, by copies", section="recall")
        self.folder.add_citations(Citation("dentan2025", "guess or recall"))
        try:
            matched = recall.matched_controls(seed=self.options.seed)
        except MemlensError as error:
            self.folder.failed("matched controls", error)
            return None
        chosen = self.few(recall.memorized(), self.options.max_sequences)
        return Groups.of(chosen, matched_with(chosen, matched))

    def _compare(self, recall: RecallScores, groups: Groups, tasks: Sequence[ChoiceTask]) -> None:
        recalled, matched = (groups.sequences[rows] for rows in (groups.recalled, ~groups.recalled))
        scores: dict[str, np.ndarray] = {}
        for name, work in (
            ("separation", self._separate),
            ("behaviour neurons", partial(self._behave, tasks)),
            ("local dimension", self._measure_dimension),
            ("attention", self._attend),
        ):
            self.folder.step(name, partial(work, groups, recalled, matched, scores))
        if "copies" in recall.table:
            self.folder.step("inside copies", partial(self._inside_copies, recall))
        if scores:
            self.folder.step("side by side", partial(self._side_by_side, groups, scores))

    def _change(self, groups: Groups, tasks: Sequence[ChoiceTask], text: SequenceSet | None) -> None:
        """Run the parts that change the model."""
        recalled, matched = (groups.sequences[rows] for rows in (groups.recalled, ~groups.recalled))
        if tasks:
            work = partial(causal.generalize, self, recalled, matched, tasks)
            self.folder.step("recalling or answering", work)
        if text is not None:
            self.folder.step("curvature", partial(causal.curvature, self, recalled, text, tasks))
        if self.options.modules_by in recalled.table:
            self.folder.step("modules", partial(causal.modules, self, recalled))
        self.folder.step("context or weights", partial(causal.context, self, recalled, matched))
        self.folder.step("context patching", partial(causal.patching, self, recalled, matched))

    def _attend_by_class(self, recall: RecallScores) -> None:
        found = attention_by_class(self.model, recall, progress=self.progress)
        self.folder.add_result("attention_classes", found, title=find.TEXTS["titles"]["attention_classes"])
        table = class_differences(
            found, n_permutations=self.options.n_permutations - 1, seed=self.options.seed
        )
        self.folder.add_table(
            "attention_classes", table, title="Differences between the classes", section="attention_classes"
        )
        self.folder.find(find.attention_classes(table))

    def _separate(
        self, groups: Groups, recalled: SequenceSet, matched: SequenceSet, scores: dict[str, np.ndarray]
    ) -> None:
        found = separation(
            self.model, recalled, matched, options=self.options.separation(), progress=self.progress
        )
        self.folder.add_result("separation", found, title="Neurons and probes")
        table = separating_neurons(found).head(20)
        self.folder.add_table(
            "neurons", table, title="Neurons that separate, by the other half", section="separation"
        )
        self.folder.find(find.separated("separation", found))
        scores["probe"] = found["score"].sel(features=ACTIVATIONS).mean("layer").values

    def _inside_copies(self, recall: RecallScores) -> None:
        """Compare recalled with other sequences of the same numbers of copies."""
        hit = recall.table["exact_match"].to_numpy() == 1
        mixed = mixed_copies(recall.table["copies"].to_numpy(), hit, self.options.least_mixed)
        here = recall.table["copies"].isin(mixed).to_numpy()
        fewest = min((here & hit).sum(), (here & ~hit).sum())
        if fewest < self.options.folds:
            self.folder.find(find.no_mixed_copies(int(fewest), self.options.folds))
            return
        scored = recall.sequences.with_table(recall.table)
        options = replace(self.options.separation(), top=1)
        found = separation(
            self.model, scored[here & hit], scored[here & ~hit], options=options, progress=self.progress
        )
        self.folder.add_result("inside_copies", found, title="The same inside equal copies")
        self.folder.find(find.separated("inside_copies", found, copies=mixed))

    def _behave(
        self,
        tasks: Sequence[ChoiceTask],
        groups: Groups,
        recalled: SequenceSet,
        matched: SequenceSet,
        scores: dict[str, np.ndarray],
    ) -> None:
        """Choose the neurons on each half and look at the other; steer the second half."""
        score = np.full(len(groups), np.nan)
        halves = groups.halves(self.options.seed)
        chosen: list[Result] = []
        for own, other in (halves, halves[::-1]):
            sides = [groups.sequences[own[groups.recalled[own] == side]] for side in (True, False)]
            found = behaviour_neurons(
                self.model, *sides, names=(RECALLED, MATCHED), options=self.options.behaviour(),
                progress=self.progress,
            )  # fmt: skip
            values = projection(self.model, found, groups.sequences[other], progress=self.progress)
            score[other] = (values - values.mean()) / max(float(values.std()), 1e-12)
            chosen.append(found)
        scores["behaviour neurons"] = score
        self.folder.add_result("behaviour_neurons", chosen[0], title="Behaviour neurons")
        self.folder.find(find.behaving(chosen[0]))
        other = halves[1][groups.recalled[halves[1]]]
        self.steer("steering", chosen[0], groups.sequences[other], tasks, self.options.alphas)

    def _measure_dimension(
        self, groups: Groups, recalled: SequenceSet, matched: SequenceSet, scores: dict[str, np.ndarray]
    ) -> None:
        options = DimensionOptions(seed=self.options.seed)
        found = local_dimension(self.model, recalled, matched, options=options, progress=self.progress)
        self.folder.add_result("local_dimension", found, title="Local intrinsic dimension")
        self.folder.find(find.dimension(found))
        by_id = dict(zip(found["sequence"].values.tolist(), -found["lid"].mean("layer").values, strict=True))
        scores["minus local dimension"] = np.array(
            [by_id.get(str(name), np.nan) for name in groups.sequences.ids]
        )

    def _attend(
        self, groups: Groups, recalled: SequenceSet, matched: SequenceSet, scores: dict[str, np.ndarray]
    ) -> None:
        parts = {
            name: attention_statistics(self.model, seqs, progress=self.progress)
            for name, seqs in ((RECALLED, recalled), (MATCHED, matched))
        }
        self.folder.add_result("attention", join_groups(parts), title="Attention at the targets")
        compared = {
            name: compare_groups(parts[RECALLED], parts[MATCHED], name, seed=self.options.seed)
            for name in ATTENTION
        }
        table = pd.concat(
            [part.to_dataframe().reset_index().assign(statistic=name) for name, part in compared.items()]
        )
        first = table.sort_values("p_corrected", kind="stable").head(20)
        self.folder.add_table("attention_heads", first, title="Heads that differ most", section="attention")
        self.folder.find(find.attention(compared))
        for name in ATTENTION:
            both = [part[name].mean(["layer", "head"]).values for part in parts.values()]
            scores[name.replace("_", " ")] = np.concatenate(both)

    def _side_by_side(self, groups: Groups, scores: dict[str, np.ndarray]) -> None:
        known = confounds(self.model, groups.sequences, progress=self.progress)
        options = BeyondOptions(folds=self.options.folds, seed=self.options.seed)
        table = beyond_confounds(groups, scores, known, options=options)
        self.folder.add_section("beyond", find.TEXTS["beyond"]["title"], find.TEXTS["beyond"]["lead"])
        figure = figures.dots_with_intervals(
            areas_of(table), dim="detector", title=find.TEXTS["beyond"]["figure"],
            subtitle=f"{len(groups)} sequences · {describe(self.model)['model']}",
        )  # fmt: skip
        reading = find.TEXTS["beyond"]["reading"]
        self.folder.add_figure("detectors", figure, section="beyond", reading=reading)
        self.folder.add_table(
            "detectors", table, title="What each adds to the confounds", section="beyond",
            note=find.TEXTS["beyond"]["note"],
        )  # fmt: skip
        baselines = [rows for _, rows in table.groupby("baseline", sort=False)]
        for rows in baselines:
            self.folder.find(find.beyond(rows, told=rows is baselines[-1]))

    def _expose(self, canaries: SequenceSet, slots: Sequence[Sequence[int]]) -> None:
        found = exposure(self.model, canaries, slots, options=self.options.exposure(), progress=self.progress)
        self.folder.add_result("exposure", found, title="Exposure of canaries")
        self.folder.find(find.exposed(found))

    def _vary(self, canaries: SequenceSet) -> None:
        found = prediction_invariance(self.model, canaries)
        self.folder.add_result("prediction_invariance", found, title="Prediction invariance")
        buckets = None
        if "copies" in canaries.table:
            buckets = popularity_buckets(
                canaries.table["copies"].to_numpy(float), found["invariance"].values,
                n_buckets=self.options.n_buckets, n_permutations=self.options.n_permutations,
                seed=self.options.seed,
            )  # fmt: skip
            self.folder.add_table(
                "buckets", buckets.table, title="Invariance by popularity", section="prediction_invariance"
            )
        self.folder.find(find.invariant(found, buckets))


def mixed_copies(copies: np.ndarray, hit: np.ndarray, least: int) -> list[int]:
    """Return the numbers of copies of which at least `least` sequences are recalled, and as many are not.

    >>> mixed_copies(np.array([1, 1, 2, 2, 2, 2]), np.array([0, 0, 0, 0, 1, 1], bool), 2)
    [2]
    """
    return [
        int(n)
        for n in np.unique(copies)
        if min((hit & (copies == n)).sum(), (~hit & (copies == n)).sum()) >= least
    ]


def areas_of(table: pd.DataFrame) -> xr.Dataset:
    """Return the area of each detector alone, and of the confounds, as `[statistic, detector]`."""
    rows: dict[str, list[float]] = {}
    for row in table.to_dict("records"):
        rows.setdefault(str(row["detector"]), [row["area"], row["low"], row["high"]])
    for baseline in dict.fromkeys(table["baseline"]):
        known = table["baseline_area"].to_numpy(float)[(table["baseline"] == baseline).to_numpy()]
        rows[str(baseline)] = [float(known.mean()), np.nan, np.nan]
    names, values = list(rows), np.array(list(rows.values())).T
    words = {"label": "area under the ROC curve", "units": "0.5 = chance"}
    coords = {"statistic": ["mean", "low", "high"], "detector": names}
    return xr.Dataset({"area": (("statistic", "detector"), values, words)}, coords)
